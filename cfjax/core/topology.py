"""Accelerator topologies by name, present or not: figures of their chips, and devices to compile for.

    v5p:4x4x4   a slice of TPU chips by its shape: v4, v5e, v5p, v6e, tpu7x (libtpu compiles for it on any machine)
    h100:8x8    hosts x GPUs (CUDA's PJRT plug-in compiles for it on any machine)
    cpu:64      64 simulated devices of this machine

Figures of chips are the vendors': cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (memory is given in GiB
or GB; TPU's compiler takes GiB) and NVIDIA's H100 data sheet (SXM, dense). Interconnect is what a chip sends and
receives together in a second, over all its links: ICI, or NVLink within a host.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from cfjax.core.errors import UserError

GIB = 2**30
LARGEST_CPU = 256  # simulated devices


@dataclass(frozen=True)
class Chip:
    """One kind of chip; all numbers are per chip.

    Attributes:
      memory: bytes.  flops: bfloat16 FLOP/s at its peak.  interconnect, bandwidth (of the memory): bytes/s.
      devices: JAX devices per chip (TPU7x shows its two cores as two).
      dimensions: of a slice's shape.
      config: libtpu's setting for cores that work as one device, where that is not its default for the chip.
    """

    name: str
    platform: str
    memory: int
    flops: float
    interconnect: float
    bandwidth: float = 0.0
    devices: int = 1
    dimensions: int = 1
    config: str = ""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 32 * GIB, 275e12, 300e9, 1228e9, dimensions=3, config="megacore"),
        Chip("v5e", "tpu", 16 * GIB, 197e12, 400e9, 819e9, dimensions=2),
        Chip("v5p", "tpu", 95 * GIB, 459e12, 1200e9, 2765e9, dimensions=3),
        Chip("v6e", "tpu", 32 * GIB, 918e12, 800e9, 1638e9, dimensions=2),
        Chip("tpu7x", "tpu", 192 * GIB, 2307e12, 1200e9, 7380e9, devices=2, dimensions=3),
        # What JAX's pool holds at least: launch/worker.sh gives it 0.95 of the 84.94e9 bytes that the driver shows,
        # 80.7e9; the rest is for CUDA's context, NCCL's buffers and CUDA graphs. JAX's own share is 0.75: 63.7e9.
        Chip("h100", "gpu", 80 * 10**9, 989e12, 900e9, 3352e9, dimensions=2),
        Chip("cpu", "cpu", 0, 0.0, 0.0),
    )
}
# How JAX calls the chips of this process (`Device.device_kind`): what the name holds, first match. H200 is a faster
# memory on an H100.
_KINDS = (
    ("TPU7x", "tpu7x"), ("TPU v6", "v6e"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"),
    ("TPU v4", "v4"), ("H100", "h100"), ("H200", "h100"),
)  # fmt: skip
# Shapes that a search goes through, smallest first.
SHAPES = {
    1: ("1", "2", "4", "8", "16", "32", "64", "128", "256"),
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
}
GPU_SHAPES = ("1x2", "1x4", "1x8", "2x8", "4x8", "8x8", "16x8", "32x8")


def peak_flops(device_kind: str) -> float:
    """bfloat16 FLOP/s at the peak of one JAX device of this kind; 0 is unknown."""
    name = next((chip for part, chip in _KINDS if part in device_kind), "cpu")
    return CHIPS[name].flops / CHIPS[name].devices


def peak_bandwidth(device_kind: str) -> float:
    """Bytes/s of the memory of one JAX device of this kind; 0 is unknown. An H200's is 4.8e12."""
    if "H200" in device_kind:
        return 4800e9
    name = next((chip for part, chip in _KINDS if part in device_kind), "cpu")
    return CHIPS[name].bandwidth / CHIPS[name].devices


@dataclass(frozen=True)
class Topology:
    """A machine by name; `open_topology` finds its devices."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many JAX devices."""
        return self.chips * self.chip.devices

    @property
    def memory(self) -> int:
        """Bytes of one device; 0 is unknown."""
        return self.chip.memory // self.chip.devices

    @property
    def flops(self) -> float:
        """FLOP/s of one device at its peak; 0 is unknown."""
        return self.chip.flops / self.chip.devices


def parse_topology(name: str) -> Topology:
    """The topology `CHIP:SHAPE`.

    Raises:
      UserError: an unknown chip, or a shape of other dimensions.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: write CHIP:SHAPE, such as v5p:4x4x4; chips are {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    example = shapes_of(chip)[-3]
    if not re.fullmatch(r"\d+(x\d+)*", shape) or shape.count("x") + 1 != chip.dimensions:
        raise UserError(f"--topology={name}: {kind} needs {chip.dimensions} numbers, such as {kind}:{example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    if min(sizes) < 1 or (chip.platform == "cpu" and sizes[0] > LARGEST_CPU):
        raise UserError(f"--topology={name}: use 1 to {LARGEST_CPU} devices, such as cpu:64")
    return Topology(name, chip, sizes)


def shapes_of(chip: Chip) -> tuple[str, ...]:
    """Shapes of slices of this chip, smallest first."""
    return GPU_SHAPES if chip.platform == "gpu" else SHAPES[chip.dimensions]


def simulate_devices(topology: Topology) -> None:
    """To be called before JAX initialises its backends: uses CPU only, with the devices of a simulated topology."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no questions to a cloud that this machine may not be in
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.platform == "cpu" and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        jax.config.update("jax_num_cpu_devices", topology.devices)


def open_topology(topology: Topology) -> list[Any]:
    """Devices to compile for, which need not be attached.

    Raises:
      UserError: the compiler of that platform is not installed, there is no such shape, or too few CPU devices.
    """
    if topology.chip.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise UserError(
                f"--topology={topology.name}: this process has {len(devices)} CPU devices; "
                f"unset XLA_FLAGS, or set it to --xla_force_host_platform_device_count={topology.devices}"
            )
        return devices[: topology.devices]
    if topology.chip.platform == "gpu":
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology.name} needs TPU's compiler: pip install -e '.[tpu]' in the clone")
    shape = "x".join(map(str, topology.shape))
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling takes no chip: one may be training beside it
    more: dict[str, Any] = {"chip_config_name": topology.chip.config} if topology.chip.config else {}
    if topology.chips == 1:  # a part of a host
        more["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.chip.name}:{shape}", **more)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        hint = f"is {shape} a slice of {topology.chip.name}?"
        raise UserError(f"--topology={topology.name}: TPU's compiler does not take it ({reason}); {hint}") from error
    return list(described.devices)


def _gpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(f"--topology={topology.name} needs CUDA's compiler: pip install -e '.[gpu]' in the clone")
    hosts, gpus = topology.shape
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{gpus}", target_config=H100
    )
    return list(described.devices)


# What XLA needs to know about a GPU that is not there (GpuTargetConfigProto), from an H100's driver and data sheet.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
