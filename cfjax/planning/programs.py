"""One update compiled ahead of time for a machine that need not be attached, and the compiler's figures for it."""

import gzip
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfjax.core.compile_cache import no_compile_cache
from cfjax.core.topology import GIB, Topology
from cfjax.planning.collectives import Traffic, collectives
from cfjax.planning.trip_counts import TripCounts

# Without a GPU to try them on, XLA finds no tile sizes for some odd shapes (32760 tokens) in its Triton kernels.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# TPU's compiler spends minutes on large convolutions. With the least effort it takes a tenth of them (libtpu 0.0.42,
# two of the Wan VAE's at 480 x 832: 1.5 s of one core, not 12.9), and lays out larger buffers (866 MiB, not 516).
QUICK_OPTIONS = {"exec_time_optimization_effort": -1.0}
# What TPU's compiler says of a program that is too large. In the second, which comes before memory is laid out,
# "temporaries" are everything, arguments and results too; the others are of one kernel's blocks and scratch.
_SIZE = r"([\d.]+)([KMGT]?)"
_HBM = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_KERNEL_MEMORY = re.compile(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\).*?space=(\w+)", re.DOTALL)
_SCOPED = re.compile(rf"Scoped allocation with size {_SIZE} and limit {_SIZE} exceeded scoped (\w+) limit")
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_KERNEL = re.compile(r'op_name="([^"]*)/(splash_mha_\w+)/pallas_call"')
# Words of JAX's own in a name stack; what is left are the model's scopes.
_JAX = re.compile(r"update|while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|shard_map|main")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Cost:
    """Memory (bytes), FLOPs and collectives of one update on one device.

    Attributes:
      arguments: everything stored on the device, also what only other updates read.
      temporaries: the buffer that the program allocates besides.
      peak: both, and results that replace no argument.
      live: most bytes in use at once, by the compiler; less than `peak` where the buffer has gaps. 0: unknown.
      fits: None on simulated devices, whose memory says nothing.
      flops: of the mathematics, per device.  executed: recomputation included.
      kernels: see `kernels`.
      problem: why it does not compile, or "".
    """

    role: str
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    live: int = 0
    fits: bool | None = None
    flops: float = 0.0
    executed: float = 0.0
    traffic: dict[str, Traffic] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    compile_seconds: float = 0.0
    problem: str = ""

    def seconds(self, topology: Topology) -> float:
        """Time of the executed FLOPs at the chip's peak, a lower bound; 0 where the peak is unknown."""
        return self.executed / topology.flops if topology.flops else 0.0

    def traffic_bytes(self) -> float:
        """Bytes of all collectives."""
        return sum(traffic.bytes for traffic in self.traffic.values())


def _sizes(compiled: Any, platform: str) -> tuple[int, int, int, int]:
    """(arguments that it reads, temporaries, new results, live). CPU's own figure of the last has no temporaries."""
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    live = getattr(memory, "peak_memory_in_bytes", 0) if platform != "cpu" else 0
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes, new, live


def kernels(text: str) -> tuple[str, ...]:
    """Flash kernels that a TPU program calls, below the model's scopes: "real_score/self_attention/splash_mha_..."."""
    found = set()
    for stack, kernel in _KERNEL.findall(text):
        words = (re.sub(r"^.*\(|\)+$", "", word) for word in stack.split("/"))
        scopes = [word for word in words if word and not _JAX.fullmatch(word) and "splash" not in word]
        found.add("/".join([*scopes, kernel]))
    return tuple(sorted(found))


@dataclass(frozen=True)
class Shortage:
    """Why a program is too large: bytes of HBM that it would use (0: the compiler does not say), and a sentence."""

    used: int
    text: str


def shortage(message: str) -> Shortage | None:
    """What a compiler that ran out of memory says; None for any other failure."""
    for pattern in _HBM:
        if found := pattern.search(message):
            used, there = (float(n) * _UNITS[unit] for n, unit in (found.groups()[:2], found.groups()[2:]))
            return Shortage(int(used), f"needs {used / GIB:.2f} GiB of HBM, of which programs have {there / GIB:.2f}")
    if found := _KERNEL_MEMORY.search(message):
        used, there = (int(size) / 2**20 for size in found.groups()[:2])
        memory = found[3].upper()
        return Shortage(0, f"a kernel needs {used:.0f} MiB of {memory}, of which there are {there:.0f}")
    if found := _SCOPED.search(message):
        used, there = (float(n) * _UNITS[unit] / 2**20 for n, unit in (found.groups()[:2], found.groups()[2:4]))
        memory = found[5].upper()
        return Shortage(0, f"a kernel needs {used:.0f} MiB of {memory}, of which kernels have {there:.0f}")
    if _EXHAUSTED in message:
        first = " ".join(message.partition(_EXHAUSTED)[2].strip(": ").split())[:200]
        return Shortage(0, f"the compiler ran out of memory: {first}")
    return None


def compile_update(
    role: str,
    lowered: Any,
    topology: Topology,
    *,
    arguments: int,
    trip_counts: TripCounts,
    keep: Path | None = None,
    quick: bool = False,
) -> Cost:
    """Compiles one update; running out of memory is a result, not an error.

    Args:
      arguments: bytes of all arguments on a device, unread ones too (jit drops them, but they are stored there).
      trip_counts: see `collectives`.
      keep: folder for the program's optimised HLO text, or None.
      quick: with the least effort, see `QUICK_OPTIONS`.
    """
    platform = topology.chip.platform
    options: dict[str, Any] = (GPU_OPTIONS if platform == "gpu" else {}) | (QUICK_OPTIONS if quick else {})
    begun = time.perf_counter()
    try:
        with nullcontext() if platform == "cpu" else no_compile_cache():
            compiled = lowered.compile(compiler_options=options or None)
    except Exception as error:
        short = shortage(str(error))
        if short is None:
            raise
        # What only other updates read is not in the compiler's figure, which does not say how much that is.
        return Cost(
            role,
            arguments=arguments,
            temporaries=max(short.used - arguments, 0),
            peak=short.used or arguments,
            fits=False,
            compile_seconds=time.perf_counter() - begun,
            problem=short.text,
        )
    seconds = time.perf_counter() - begun
    read, temporaries, new, live = _sizes(compiled, platform)
    peak = arguments + temporaries + new
    text = compiled.as_text()
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        with gzip.open(keep / f"{role}.hlo.gz", "wt", encoding="utf-8") as file:
            file.write(text)
    return Cost(
        role,
        arguments=arguments,
        temporaries=temporaries,
        peak=peak,
        live=live and live + max(arguments - read, 0),
        fits=peak <= topology.memory if topology.memory else None,
        traffic=collectives(text, trip_counts=trip_counts),
        kernels=kernels(text),
        compile_seconds=seconds,
    )
