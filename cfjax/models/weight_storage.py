"""Weight storage: the dtype of a network's stored weights, and whether they are in device or host memory.

Trained roles are stored in float32 on the device (`core.precision`). A frozen one may be stored in bfloat16 or int8,
and in host memory; a network with such weights is called like any other, see `nn.layers.project`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.offload import host_sharding
from cfjax.core.quantize import Quantized, is_quantized, packed, packed_shape, quantize, quantized_shape
from cfjax.core.sharding import place, shardings
from cfjax.core.tree import check_fit, map_named, match, named_leaves

M = TypeVar("M")
STORAGES = ("float32", "bfloat16", "int8")

# Weights that are cast to the compute dtype anyway may be stored in it: same numbers, half the memory in bfloat16.
STORAGE_DTYPES: tuple[tuple[str, str], ...] = (
    (r"(patch_embedding|head|(text|image)_embedding/(up|down))/(kernel|bias)", "compute"),
    (r"blocks/(self|cross|action)_attn/(([qkvo]|[kv]_img)/(kernel|bias)|norm_(q|k|k_img)/scale)", "compute"),
    (r"blocks/(ffn|action_attn/embed)/(up|down)/(kernel|bias)", "compute"),
    (r"((time|action)_embedding/(up|down)|time_projection)/(kernel|bias)", "float32"),
    (r"(blocks/norm3|image_embedding/norm_(in|out))/(scale|bias)|blocks/modulation|head_modulation", "float32"),
)
# What int8 applies to: the matrices of the blocks, 98 % of the weights. Everything else: see `STORAGE_DTYPES`.
QUANTIZED: tuple[tuple[str, bool], ...] = (
    (r"blocks/((self|cross)_attn/([qkvo]|[kv]_img)|ffn/(up|down))/kernel", True),
    (r".*/(kernel|bias|scale)|blocks/modulation|head_modulation", False),
)
# What is offloaded: every matrix. The other weights are small, and read all over the network.
OFFLOADED: tuple[tuple[str, bool], ...] = (
    (r".*/kernel(/int8)?", True),
    (r".*/(bias|scale)|blocks/modulation|head_modulation", False),
)


def with_storage_dtypes(template: M, storage: str, compute: str) -> M:
    """The network's shapes, each in the dtype that it is stored in.

    Args:
      template: of `jax.ShapeDtypeStruct`s.
      storage: "float32"; "bfloat16" for every weight that `STORAGE_DTYPES` allows; "int8" for the kernels of
        `QUANTIZED`, the others in the `compute` dtype where `STORAGE_DTYPES` allows it.

    Raises:
      UserError: an unknown storage.
    """
    if storage not in STORAGES:
        raise UserError(f"storage={storage!r}: use {', '.join(STORAGES[:-1])} or {STORAGES[-1]}")
    if storage == "float32":
        return template
    names = named_leaves(template)
    dtypes = {"float32": "float32", "compute": compute if storage == "int8" else storage}
    stored, matrix = match(STORAGE_DTYPES, names), match(QUANTIZED, names)

    def leaf(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | Quantized:
        if storage == "int8" and matrix[name]:
            return quantized_shape(x)
        return x.update(dtype=jnp.dtype(dtypes[stored[name]]))

    return map_named(leaf, template)


def with_shardings(template: M, mesh: Mesh | None, *, offload: bool) -> M:
    """The shapes with their shardings: on the mesh (None: the default device); with `offload`, matrices on the host.

    int8 kernels on the host are packed (`core.quantize.packed`).
    """
    if offload:
        template = jax.tree.map(packed_shape, template, is_leaf=is_quantized)
    names = named_leaves(template)
    where: Mapping[str, Any] = shardings(template, mesh) if mesh else dict.fromkeys(names)
    if offload:
        moved = match(OFFLOADED, names)
        where = {name: host_sharding(own) if moved[name] else own for name, own in where.items()}
    return map_named(lambda name, x: x.update(sharding=where[name]), template)


def fill(template: M, arrays: Mapping[str, LazyArray]) -> M:
    """The network with `template`'s shapes, dtypes and shardings; arrays are read and converted one at a time.

    The host holds one array in its storage dtype, and one part of it (a layer, if stacked) as it was read.

    Raises:
      UserError: a weight is missing, left over, or of another shape.
    """
    check_fit(named_leaves(template, is_quantized), arrays)
    return map_named(lambda name, like: _filled(like, arrays[name]), template, is_quantized)


def _filled(like: Any, array: LazyArray) -> Any:
    if not isinstance(like, Quantized):
        whole = np.empty(like.shape, like.dtype)
        for i, part in enumerate(array):
            whole[i if array.stacked else ...] = part
        return _put(whole, like)
    int8, scale = np.empty(like.int8.shape, like.int8.dtype), np.empty(like.scale.shape, np.float32)
    for i, entry in enumerate(array.entries()):
        layer = quantize(entry())
        int8[i], scale[i] = packed(layer.int8) if like.is_packed else layer.int8, layer.scale
    return Quantized(_put(int8, like.int8), _put(scale, like.scale))


def _put(whole: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.asarray(whole) if like.sharding is None else place(whole, like.sharding)
