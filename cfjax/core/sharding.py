"""Sharding: one mesh of four named axes, rule tables for parameters, logical axes for activations.

    data     data parallelism: the network is replicated, the batch sharded
    fsdp     the batch too, and the parameters: gathered layer by layer where they are used
    context  the tokens *inside* every frame; in self-attention the heads, if the axis divides them (see `nn.frames`)
    tensor   heads and hidden channels: tensor parallelism of the matrix products

The shardings of the arguments decide everything: the same jitted function runs on one device or on a pod, and XLA
derives the collectives. Code that runs on a mesh does so inside `on_mesh(mesh)`; functions traced there find the mesh
by `active_mesh`, and `constrain` fixes the sharding of an activation or a cache. Without a mesh, `constrain` is the
identity. A mesh axis that does not divide a dimension is dropped. No other file names a mesh axis: activations are
described by the logical axes of `LOGICAL_AXIS_RULES`.

Tokens are sharded inside frames, because under a causal mask the last frames see most and whole frames would leave the
devices with unequal work. A part of *every* frame is the same work under every visibility, with the same static shapes.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cfjax.core.errors import UserError
from cfjax.core.tree import map_named, match, named_leaves

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis of an activation -> mesh axes that may shard it: the first entry whose axes divide the dimension.
LOGICAL_AXIS_RULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "batch": (("data", "fsdp"),),
    "tokens": (("context",),),  # of each frame
    "heads": (("tensor", "context"), ("tensor",)),  # of queries, keys and values inside self-attention
    "channels": (("tensor",),),  # hidden ones; also heads outside self-attention
}

# Mesh axis of each array dimension, or None. A pair of matrices (q k v -> o, up -> down) is sharded over `tensor` along
# its inner dimension, so that one reduction per pair suffices (Megatron-LM, arXiv 1909.08053).
MeshAxes = tuple[str | None, ...]
Rules = Sequence[tuple[str, MeshAxes]]
WAN_RULES: tuple[tuple[str, MeshAxes], ...] = (
    (r"blocks/((self|cross)_attn/([qkv]|[kv]_img)|ffn/up)/kernel(/int8)?", (None, "fsdp", "tensor")),
    (r"blocks/((self|cross)_attn/o|ffn/down)/kernel(/int8)?", (None, "tensor", "fsdp")),
    (r"(text|time|image)_embedding/down/kernel|head/kernel", ("tensor", "fsdp")),
    (r"((text|time|image)_embedding/up|time_projection|patch_embedding)/kernel", ("fsdp", "tensor")),
    (r".*/(bias|scale)|blocks/modulation|head_modulation", ()),
)
BRANCH_RULES: tuple[tuple[str, MeshAxes], ...] = (  # of a discriminator
    (r"branch/blocks/(cross_attn/[qkv]|ffn/up)/kernel", (None, "fsdp", "tensor")),
    (r"branch/blocks/(cross_attn/o|ffn/down)/kernel", (None, "tensor", "fsdp")),
    (r"branch/classifier/up/kernel", ("fsdp", "tensor")),
    (r"branch/classifier/down/kernel", ("tensor", None)),
    (r"branch/(registers|.*/(bias|scale))", ()),
)
ACTION_RULES: tuple[tuple[str, MeshAxes], ...] = ((r".*", ()),)  # small
# (leaves, their table): a leaf belongs to the first entry that matches it. A table must match its leaves exactly, and
# is skipped when there are none, so that a network with extra leaves needs one more entry here.
PARAMETER_RULES: tuple[tuple[str, Rules], ...] = (
    (r"branch/.*", BRANCH_RULES),
    (r"(blocks/action_attn|action_embedding)/.*", ACTION_RULES),
    (r".*", WAN_RULES),
)


def make_mesh(
    *, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `AXES` over all devices (or the given ones), with automatic sharding propagation.

    Several TPU slices (joined by DCN, which is slower than ICI) are laid out along data, then fsdp.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the slices do not divide data x fsdp.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = (data, fsdp, context, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        named = " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh {named} has size {math.prod(sizes)}; its axes must multiply to {len(devices)} devices")
    kinds = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        return Mesh(_over_slices(sizes, devices, slices), AXES, axis_types=kinds)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # no whole rings of the torus for every axis, as 8 x 2 on a 4 x 4 slice: share one
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=kinds)


def _over_slices(sizes: tuple[int, ...], devices: Sequence[jax.Device], slices: int) -> np.ndarray:
    data, fsdp, *within = sizes
    across = math.gcd(data, slices)
    rest = slices // across
    if fsdp % rest:
        raise UserError(
            f"mesh data={data} fsdp={fsdp}: {slices} slices need mesh.data x mesh.fsdp to divide by {slices}; "
            "context and tensor stay within a slice"
        )
    own = (data // across, fsdp // rest, *within)
    return mesh_utils.create_hybrid_device_mesh(own, (across, rest, 1, 1), devices, allow_split_physical_axes=True)


def abstract_mesh(*, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh without devices, for shapes and shardings alone."""
    return AbstractMesh((data, fsdp, context, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_choices(devices: int, batch: int, heads: Sequence[int]) -> Iterator[tuple[dict[str, int], int]]:
    """(mesh sizes, microbatches) that use all devices, one sample per microbatch and shard; fewest microbatches first.

    A sample is sharded over 1 to 16 devices: its heads over 4 at most, if that divides those of every network, and its
    tokens over the rest.
    """
    for parts in (1, 2, 4, 8, 16):
        samples, rest = divmod(devices, parts)
        if rest or not samples or batch % samples:
            continue
        for tensor in (1, 2, 4):
            if parts % tensor == 0 and all(number % tensor == 0 for number in heads):
                yield dict(zip(AXES, (1, samples, parts // tensor, tensor), strict=True)), batch // samples


# ---- activations


@contextmanager
def on_mesh(mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """Makes `mesh` the active mesh of functions traced inside (JAX's abstract-mesh context); moves no array."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh):
        yield


def active_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `on_mesh`, or None, also inside a `shard_map`, where every array is one device's part.

    `jax.shard_map` finds the mesh by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


# Axes that an enclosing `vmap_over_context` maps over: an array inside is one shard already.
_mapped: ContextVar[tuple[str, ...]] = ContextVar("_mapped", default=())


def activation_spec(shape: Sequence[int], logical_axes: Sequence[str | None], *, free: Any = None) -> PartitionSpec:
    """The PartitionSpec of an activation on the active mesh, for `shard_map` and `constrain`; all None without a mesh.

    Args:
      logical_axes: a key of `LOGICAL_AXIS_RULES` per dimension, or None for a dimension that is not sharded.
      free: entry of a dimension that the mesh axes of its logical axis do not divide.
    """
    mesh = active_mesh()
    if len(logical_axes) != len(shape):
        raise ValueError(f"{len(logical_axes)} logical axes {tuple(logical_axes)} for shape {tuple(shape)}")

    def entry(size: int, logical_axis: str | None) -> Any:
        if mesh is None or logical_axis is None:
            return None
        choices = [
            tuple(axis for axis in axes if axis not in _mapped.get()) for axes in LOGICAL_AXIS_RULES[logical_axis]
        ]
        sizes = [(axes, math.prod(mesh.shape[axis] for axis in axes)) for axes in choices]
        return next((axes or None for axes, parts in sizes if size % parts == 0), free)

    return PartitionSpec(*(entry(size, logical_axis) for size, logical_axis in zip(shape, logical_axes, strict=True)))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x` with a sharding constraint by logical axes, one per dimension; the identity without a mesh.

    A dimension that the mesh axes do not divide is left to XLA.
    """
    if active_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, logical_axes, free=PartitionSpec.UNCONSTRAINED))


def context_sharding(heads: int, tokens: int) -> tuple[str, int]:
    """How self-attention is sharded over the context axis of the active mesh.

    Returns:
      ("heads", 1): every device has all tokens of some heads; also without a mesh. ("tokens", shards): the axis does
      not divide the heads, so every device has all heads and a shard of each frame's query tokens. ("whole", 1): it
      divides neither.
    """
    mesh = active_mesh()
    parts = 1 if mesh is None else mesh.shape["context"]
    if parts == 1 or mesh is None or heads % (parts * mesh.shape["tensor"]) == 0:
        return "heads", 1
    return ("tokens", parts) if tokens % parts == 0 else ("whole", 1)


def token_shards(tokens: int) -> int:
    """Number of shards of the tokens of a frame, outside self-attention."""
    mesh = active_mesh()
    return mesh.shape["context"] if mesh is not None and tokens % mesh.shape["context"] == 0 else 1


def vmap_over_context(fn: Callable[..., jax.Array], in_axes: Any, out_axes: int = 0) -> Callable[..., jax.Array]:
    """`jax.vmap` of `fn` over an array axis that is sharded over the context axis, also for a `shard_map` in `fn`."""
    if active_mesh() is None:
        return jax.vmap(fn, in_axes=in_axes, out_axes=out_axes)

    def one_part(*args: jax.Array) -> jax.Array:
        token = _mapped.set((*_mapped.get(), "context"))
        try:
            return fn(*args)
        finally:
            _mapped.reset(token)

    return jax.vmap(one_part, in_axes=in_axes, out_axes=out_axes, spmd_axis_name="context")


# ---- parameters


def _spec(name: str, shape: tuple[int, ...], axes: MeshAxes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    if axes and len(axes) != len(shape):
        raise UserError(f"sharding rule {axes} of {name!r} has {len(axes)} entries; the array has shape {shape}")
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=False))
    return PartitionSpec(*fits)


def _parameter_axes(names: Sequence[str], rules: Rules | None) -> dict[str, MeshAxes]:
    """The mesh axes of every name's dimensions, by `rules` or else by its entry of `PARAMETER_RULES`."""
    if rules is not None:
        return match(rules, names)
    out: dict[str, MeshAxes] = {name: found for name in names if (found := _lora_axes(name)) is not None}
    for pattern, table in PARAMETER_RULES:
        own = [name for name in names if name not in out and re.fullmatch(pattern, name)]
        out |= match(table, own) if own else {}
    return out


def _lora_axes(name: str) -> MeshAxes | None:
    """Of an adapter's leaf (`models.lora`): its layer's axes, the rank's own is not sharded; None of any other leaf."""
    found = re.fullmatch(r"lora/(.+)/(down|up)", name)
    if not found:
        return None
    axes = next((axes for pattern, axes in WAN_RULES if re.fullmatch(pattern, f"{found[1]}/kernel")), None)
    if axes is None:
        raise UserError(f"no rule matches {name!r}; add one for {found[1]}/kernel to the table")
    return (*axes[:-1], None) if found[2] == "down" else (*axes[:-2], None, axes[-1])


def shardings(model: Any, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> dict[str, NamedSharding]:
    """The sharding of every leaf by name; shapes are enough, nothing is moved. `rules`: instead of `PARAMETER_RULES`.

    Raises:
      UserError: the rules do not fit the model's names or ranks.
    """
    leaves = named_leaves(model)
    axes_of = _parameter_axes(list(leaves), rules)
    return {name: NamedSharding(mesh, _spec(name, leaf.shape, axes_of[name], mesh)) for name, leaf in leaves.items()}


def constrain_parameters(model: Any, rules: Rules | None = None) -> Any:
    """Inside jit: constrains weights, or gradients of the same names, to the shardings of the rule tables."""
    mesh = active_mesh()
    if mesh is None:
        return model
    leaves = named_leaves(model)
    axes_of = _parameter_axes(list(leaves), rules)
    spec = {name: _spec(name, leaf.shape, axes_of[name], mesh) for name, leaf in leaves.items()}
    return map_named(lambda name, leaf: jax.lax.with_sharding_constraint(leaf, spec[name]), model)


def shard_model(model: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """The model with every leaf put on the mesh by the rules; each process provides its own shards."""
    by_name = shardings(model, mesh, rules)
    return map_named(lambda name, leaf: place(leaf, by_name[name]), model)


def place(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`leaf`, which every process holds whole (or which is on the mesh already), on the mesh; PRNG keys too.

    With several processes, `jax.device_put` would leave replicated arrays that Orbax does not save.
    """
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # there already, with an equivalent sharding
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch over `data` and `fsdp`; every other axis replicated."""
    return NamedSharding(mesh, PartitionSpec(*LOGICAL_AXIS_RULES["batch"]))


def batch_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of a global batch that are on this process's devices, ascending: the ones that it must read.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    if batch_size % batch_shards(mesh):
        raise UserError(f"data.batch_size={batch_size} must divide by mesh.data * mesh.fsdp = {batch_shards(mesh)}")
    spans: Any = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (span,) in spans for row in range(*span.indices(batch_size))})


def place_rows(rows: Sequence[int], local: np.ndarray, mesh: Mesh, batch_size: int) -> jax.Array:
    """The global array, sharded by `batch_sharding`, of which this process holds the given rows."""
    position = {row: i for i, row in enumerate(rows)}

    def part(index: Any) -> np.ndarray:
        return local[[position[row] for row in range(*index[0].indices(batch_size))]]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), batch_sharding(mesh), part)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch under `batch_sharding`."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXIS_RULES["batch"][0])


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Replicated on every device: PRNG keys, scalars, the negative prompt."""
    return NamedSharding(mesh, PartitionSpec())
