"""Arrays that rest in the host's memory and visit the device where they are used.

An array's sharding says where it rests (`memory_kind`); while a function is traced its type says so too, so that a
layer needs no flag: `on_device` copies what is on the host and leaves everything else alone. Inside a scan over layers
the copy is one layer's, and XLA overlaps it with the layer before on devices that can.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

HOST = "pinned_host"


def has_host_memory(device: jax.Device) -> bool:
    """Whether programs on this device can read the host's memory (TPU, GPU, and CPU, whose two memories are one)."""
    return HOST in {memory.kind for memory in device.addressable_memories()}


def resting_place(sharding: NamedSharding | None) -> NamedSharding | SingleDeviceSharding:
    """The same cut in host memory; of None (no mesh) the default device's host memory, whole."""
    if sharding is None:
        return SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    return sharding.with_memory_kind(HOST)


def rests_on_host(leaf: Any) -> bool:
    """Of an array or a shape with a sharding."""
    return getattr(leaf.sharding, "memory_kind", None) == HOST


def on_device(tree: Any) -> Any:
    """Inside jit: leaves that rest on the host, copied to the device; the others as they are."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x, tree)


def _on_host(x: Any) -> bool:
    return getattr(jax.typeof(x), "memory_space", jax.memory.Space.Device) == jax.memory.Space.Host
