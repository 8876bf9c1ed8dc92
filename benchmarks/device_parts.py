"""Parts of benchmarks/device.py: sizes, random weights, programs compiled several at a time, slowest kernels."""

import math
import re
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cfjax.core.precision import BF16
from cfjax.core.quantize import LEVELS, Quantized, is_quantized
from cfjax.core.tree import map_named
from cfjax.models.tiny_vae import TinyVAEConfig
from cfjax.models.vae import VAEConfig
from cfjax.models.wan import PRESETS, WanConfig

TOP = 3  # kernels of each case


@dataclass(frozen=True)
class Scale:
    """Everything that `--scale` changes.

    Attributes:
      student, score: the causal network (also the critic's), and the real score of DMD.
      frames: latent frames of a video.  latent: height and width of one.
      window, sink: in latent frames, of the bounded caches.
      matmul: side of the matrix product, and copied: elements of the copy, that the chip's rates are measured on.
      attention: queries, keys, heads and head dim that attention is compared at.
      layers: of the network that bfloat16 is compared on.
    """

    student: WanConfig
    score: WanConfig
    vae: VAEConfig
    tiny: TinyVAEConfig
    frames: int
    latent: tuple[int, int]
    text_rows: int
    window: int
    sink: int
    matmul: int
    copied: int
    attention: tuple[int, int, int, int]
    layers: int


def _small(layers: int) -> WanConfig:
    return WanConfig(32, 64, 2, layers, text_dim=16, freq_dim=16, precision=BF16)


SCALES = {
    "full": Scale(
        student=PRESETS["wan_1_3b"],
        score=PRESETS["wan_14b"],
        vae=VAEConfig(precision=BF16),
        tiny=TinyVAEConfig(precision=BF16),
        frames=21,
        latent=(60, 104),
        text_rows=512,
        window=12,
        sink=3,
        matmul=8192,
        copied=2**30,
        attention=(4680, 14040, 12, 128),
        layers=4,
    ),
    "tiny": Scale(
        student=_small(2),
        score=_small(3),
        vae=VAEConfig(base_dim=4, multipliers=(1, 1, 1, 1), res_blocks=1, precision=BF16),
        tiny=TinyVAEConfig(encoder_width=4, decoder_widths=(8, 8, 4, 4), precision=BF16),
        frames=6,
        latent=(2, 4),
        text_rows=4,
        window=4,
        sink=1,
        matmul=256,
        copied=2**16,
        attention=(24, 72, 2, 16),
        layers=1,
    ),
}


def hashed_bits(shape: tuple[int, ...], seed: int) -> jax.Array:
    """uint32 bits that look random (murmur3's finaliser of every element's index): one fused loop, quick to compile."""
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) + jnp.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x ^ (x >> 16)).reshape(shape)


def hashed_uniform(shape: tuple[int, ...], seed: int, largest: float = 3**0.5) -> jax.Array:
    """Numbers in [-largest, largest) that look random, float32; the default has variance 1."""
    return largest * (hashed_bits(shape, seed).astype(jnp.float32) * 2.0**-31 - 1.0)


def random_like(template: Any) -> Any:
    """Random weights in a network's shapes and storage dtypes; no copy of them in another dtype ever exists.

    Kernels have the variance of Xavier's initialisation (the head's too, which starts at zero in training: flows are to
    differ from 0); int8 ones are drawn as bits.
    """

    def leaf(name: str, like: Any) -> Any:
        shape, seed = like.shape, zlib.crc32(name.encode())
        if isinstance(like, Quantized):
            int8 = jnp.maximum(hashed_bits(shape, seed).astype(jnp.int8), -LEVELS)
            scale = (6.0 / sum(shape[-2:])) ** 0.5 / LEVELS
            return Quantized(int8, jnp.full(like.scale.shape, scale, jnp.float32))
        if name.endswith("/scale"):
            return jnp.ones(shape, like.dtype)
        if not name.endswith(("/kernel", "modulation")):
            return jnp.zeros(shape, like.dtype)
        inputs = math.prod(shape[-4:-1]) if len(shape) > 3 else shape[-2]  # a convolution's, or a stack of matrices'
        std = (2.0 / (inputs + shape[-1])) ** 0.5 if name.endswith("/kernel") else shape[-1] ** -0.5
        return (std * hashed_uniform(shape, seed)).astype(like.dtype)

    return map_named(leaf, template, is_quantized)


def shapes_of(tree: Any) -> Any:
    """The same pytree of shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def zeros_if(arrays: bool, shapes: Any) -> Any:
    """Arrays of zeros in these shapes, or the shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes) if arrays else shapes


@dataclass
class Program:
    """One program: what compiling took, and what it needs."""

    name: str
    trace_s: float
    lowered: Any
    future: Future[Any]
    compile_s: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)


class Ahead:
    """Compiles jitted functions before their first call, several at a time; calls what it compiled.

    `prepare` has the signature of a call, takes shapes in place of arrays, and returns shapes: code that calls
    everything through one function (`cfjax.rollout.stream`) names all of its programs by being run on shapes.
    """

    def __init__(self, workers: int) -> None:
        self.seconds = 0.0  # that calls waited for compiling, as `cfjax.core.programs` counts them
        self._pool = ThreadPoolExecutor(workers)
        self._programs: dict[Any, Program] = {}

    @property
    def programs(self) -> list[Program]:
        """All of them, in the order in which they were asked for."""
        return list(self._programs.values())

    @property
    def pending(self) -> int:
        """How many are still being compiled."""
        return sum(not program.future.done() for program in self.programs)

    def wait(self, until: float) -> None:
        """Waits for all, or until `time.monotonic()` is `until`."""
        while self.pending and time.monotonic() < until:
            time.sleep(0.05)

    def prepare(self, function: Any, *args: Any, **static: Any) -> Any:
        """The shapes that `function(*args, **static)` returns, which is being compiled from now on."""
        return shapes_of(self._program(function, args, static).lowered.out_info)

    def __call__(self, function: Any, *args: Any, **static: Any) -> Any:
        """`function(*args, **static)` by the compiled program. What failed beside others is compiled once more."""
        return self.compiled(function, *args, **static)(*args)

    def compiled(self, function: Any, *args: Any, **static: Any) -> Any:
        """The compiled program."""
        begun = time.perf_counter()
        program = self._program(function, args, static)
        if program.future.exception() is not None:
            program.future = self._pool.submit(self._compile, program)
        compiled = program.future.result()
        self.seconds += time.perf_counter() - begun
        return compiled

    def _program(self, function: Any, args: tuple[Any, ...], static: dict[str, Any]) -> Program:
        leaves, treedef = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (function, treedef, shapes, tuple(sorted(static.items())))
        if key not in self._programs:
            begun = time.perf_counter()
            lowered = function.lower(*args, **static)
            name = getattr(function, "__name__", "program").strip("_<>")
            program = Program(name, time.perf_counter() - begun, lowered, Future())
            program.future = self._pool.submit(self._compile, program)
            self._programs[key] = program
        return self._programs[key]

    @staticmethod
    def _compile(program: Program) -> Any:
        begun = time.perf_counter()
        compiled = program.lowered.compile()
        program.compile_s = time.perf_counter() - begun
        memory = compiled.memory_analysis()
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes", "alias_size_in_bytes")
        program.memory = {name.removesuffix("_size_in_bytes"): getattr(memory, name, 0) / 2**30 for name in sizes}
        return compiled


@contextmanager
def traced(kernels: dict[str, Any]) -> Iterator[None]:
    """Profiles what is run inside; `kernels` gets the slowest ones, or why there are none. The trace is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            jax.profiler.start_trace(folder)
        except Exception as error:
            kernels["problem"] = f"{type(error).__name__}: {error}"
            yield
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            wall = time.perf_counter() - begun
            try:
                jax.profiler.stop_trace()
                kernels.update(slowest(Path(folder), wall))
            except Exception as error:
                kernels["problem"] = f"{type(error).__name__}: {error}"


def _kernels(folder: Path) -> Iterator[tuple[str, float, str]]:
    """(name, ms, scope) of every kernel run: on a GPU's streams, or the operations of XLA's CPU threads."""
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            on_gpu = plane.name.startswith("/device:GPU")
            if not on_gpu and not plane.name.startswith("/host:CPU"):
                continue
            for line in plane.lines:
                if on_gpu and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    if on_gpu or "hlo_op" in stats:
                        yield event.name, event.duration_ns / 1e6, str(stats.get("tf_op") or stats.get("hlo_op") or "")


def slowest(folder: Path, wall_s: float, top: int = TOP) -> dict[str, Any]:
    """The `top` kernels of a trace by their summed time, with the share of all kernels' time that they take.

    Names lose their last numbers, so that the copies of one fusion count together; scope: of its longest run.
    """
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    longest: dict[str, tuple[float, str]] = {}
    for name, ms, scope in _kernels(folder):
        short = re.sub(r"[._]\d+$", "", name)
        total[short] += ms
        count[short] += 1
        longest[short] = max(longest.get(short, (0.0, "")), (ms, scope))
    busy = sum(total.values())
    rows = [
        {"kernel": name[:120], "ms": ms, "runs": count[name], "share": ms / busy, "scope": longest[name][1][-160:]}
        for name, ms in total.most_common(top)
        if busy
    ]
    return {"kernels_ms": busy, "wall_ms": 1e3 * wall_s, "slowest": rows}
