"""Where arrays live: one mesh of four named axes, and an ordered table that says how each parameter is cut.

    data     copies of the network, each with its own part of the batch
    fsdp     the batch again, and the parameters: gathered layer by layer where they are used
    context  the token axis of long sequences
    tensor   heads and hidden channels: the matrix products themselves are split

Placement is a matter of arguments only: the same jitted function runs on one device or on a pod, and XLA derives the
collectives. A rule's axis is dropped where it does not divide a dimension.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cfjax.core.errors import UserError
from cfjax.core.tree import map_named, match, named_leaves

AXES = ("data", "fsdp", "context", "tensor")

# Mesh axis of each array dimension, or None. A pair of matrices (q k v -> o, up -> down) is cut over `tensor` along its
# inner dimension, so that one reduction per pair suffices (Megatron-LM, arXiv 1909.08053).
Cut = tuple[str | None, ...]
WAN_RULES: tuple[tuple[str, Cut], ...] = (
    (r"blocks/(self|cross)_attn/[qkv]/kernel|blocks/ffn/up/kernel", (None, "fsdp", "tensor")),
    (r"blocks/(self|cross)_attn/o/kernel|blocks/ffn/down/kernel", (None, "tensor", "fsdp")),
    (r"(text|time)_embedding/down/kernel|head/kernel", ("tensor", "fsdp")),
    (r"(text_embedding/up|time_embedding/up|time_projection|patch_embedding)/kernel", ("fsdp", "tensor")),
    (r".*/(bias|scale)|blocks/modulation|head_modulation", ()),
)


def make_mesh(
    *, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `AXES` over all devices (or the given ones), with automatic sharding propagation.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (data, fsdp, context, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        named = " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh {named} has {math.prod(sizes)} places; they must multiply to {len(devices)} devices")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _spec(name: str, shape: tuple[int, ...], cut: Cut, mesh: Mesh) -> PartitionSpec:
    if cut and len(cut) != len(shape):
        raise UserError(f"sharding rule {cut} of {name!r} has {len(cut)} entries; the array has shape {shape}")
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(cut, shape, strict=False))
    return PartitionSpec(*fits)


def shardings(model: Any, mesh: Mesh, rules: Sequence[tuple[str, Cut]] = WAN_RULES) -> dict[str, NamedSharding]:
    """The sharding of every leaf by name; shapes are enough, nothing is moved.

    Raises:
      UserError: the rules do not fit the model's names or ranks.
    """
    leaves = named_leaves(model)
    cuts = match(rules, leaves)
    return {name: NamedSharding(mesh, _spec(name, leaf.shape, cuts[name], mesh)) for name, leaf in leaves.items()}


def shard_model(model: Any, mesh: Mesh, rules: Sequence[tuple[str, Cut]] = WAN_RULES) -> Any:
    """The model with every leaf placed on the mesh by the rules."""
    places = shardings(model, mesh, rules)
    return map_named(lambda name, leaf: jax.device_put(leaf, places[name]), model)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch over `data` and `fsdp`; every other axis whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device: keys, scalars, the negative prompt."""
    return NamedSharding(mesh, PartitionSpec())
