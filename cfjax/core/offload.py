"""Weights offloaded to host memory, copied to the device where they are used.

The `memory_kind` of an array's sharding says where it is; so does its type while a function is traced, so that a layer
needs no flag: `on_device` copies what is on the host and leaves everything else alone. Inside a scan over layers the
copy is one layer's, and XLA overlaps it with the previous layer on devices that can.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

HOST = "pinned_host"


def has_host_memory(device: jax.Device) -> bool:
    """Whether programs on this device can read the host's memory (TPU, GPU, and CPU, where the two are one)."""
    return HOST in {memory.kind for memory in device.addressable_memories()}


def host_sharding(sharding: NamedSharding | None) -> NamedSharding | SingleDeviceSharding:
    """The same sharding in host memory; of None (no mesh), the host memory of the default device."""
    if sharding is None:
        return SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    return sharding.with_memory_kind(HOST)


def is_on_host(leaf: Any) -> bool:
    """Whether an array, or a shape with a sharding, is in host memory."""
    return getattr(leaf.sharding, "memory_kind", None) == HOST


def on_device(tree: Any) -> Any:
    """Inside jit: copies leaves in host memory to the device; the others are unchanged."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x, tree)


def _on_host(x: Any) -> bool:
    return getattr(jax.typeof(x), "memory_space", jax.memory.Space.Device) == jax.memory.Space.Host
