"""How a network's weights rest between uses: in which dtype, and in whose memory.

Trained roles rest in float32 on the device (`core.precision`). A frozen one may rest in bfloat16 or int8, and in the
host's memory; a network with such weights is called like any other, see `nn.layers.project`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.offload import resting_place
from cfjax.core.quantize import Quantized, is_quantized, packed, packed_shape, quantize, quantized_shape
from cfjax.core.sharding import place, shardings
from cfjax.core.tree import check_fit, map_named, match, named_leaves

M = TypeVar("M")
STORAGES = ("float32", "bfloat16", "int8")

# Weights that enter the network in its compute dtype anyway may rest in it: same numbers, half the memory in bfloat16.
RESTING: tuple[tuple[str, str], ...] = (
    (r"(patch_embedding|head|text_embedding/(up|down))/(kernel|bias)", "compute"),
    (r"blocks/(self_attn|cross_attn)/([qkvo]/(kernel|bias)|norm_[qk]/scale)", "compute"),
    (r"blocks/ffn/(up|down)/(kernel|bias)", "compute"),
    (r"(time_embedding/(up|down)|time_projection)/(kernel|bias)", "float32"),
    (r"blocks/(modulation|norm3/(scale|bias))|head_modulation", "float32"),
)
# What int8 touches: the matrices of the blocks, 98 % of the weights. Everything else rests as `RESTING` says.
QUANTIZED: tuple[tuple[str, bool], ...] = (
    (r"blocks/((self_attn|cross_attn)/[qkvo]|ffn/(up|down))/kernel", True),
    (r".*/(kernel|bias|scale)|blocks/modulation|head_modulation", False),
)
# What offloading moves: every matrix. The rest is read all over the network, and small.
OFFLOADED: tuple[tuple[str, bool], ...] = (
    (r".*/kernel(/int8)?", True),
    (r".*/(bias|scale)|blocks/modulation|head_modulation", False),
)


def resting(template: M, storage: str, compute: str) -> M:
    """The network's shapes, each in the dtype that it rests in.

    Args:
      template: of `jax.ShapeDtypeStruct`s.
      storage: "float32"; "bfloat16" for every weight that `RESTING` lets; "int8" for the kernels of `QUANTIZED`, the
        others in the `compute` dtype where `RESTING` lets them.

    Raises:
      UserError: an unknown storage.
    """
    if storage not in STORAGES:
        raise UserError(f"storage={storage!r}: use {', '.join(STORAGES[:-1])} or {STORAGES[-1]}")
    if storage == "float32":
        return template
    names = named_leaves(template)
    dtypes = {"float32": "float32", "compute": compute if storage == "int8" else storage}
    rest, matrix = match(RESTING, names), match(QUANTIZED, names)

    def leaf(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | Quantized:
        if storage == "int8" and matrix[name]:
            return quantized_shape(x)
        return x.update(dtype=jnp.dtype(dtypes[rest[name]]))

    return map_named(leaf, template)


def placed(template: M, mesh: Mesh | None, *, offload: bool) -> M:
    """The shapes with their shardings: on the mesh (None: the default device, which has none), matrices on the host.

    int8 kernels on the host are packed (`core.quantize.packed`).
    """
    if offload:
        template = jax.tree.map(packed_shape, template, is_leaf=is_quantized)
    names = named_leaves(template)
    places: Mapping[str, Any] = shardings(template, mesh) if mesh else dict.fromkeys(names)
    if offload:
        moved = match(OFFLOADED, names)
        places = {name: resting_place(where) if moved[name] else where for name, where in places.items()}
    return map_named(lambda name, x: x.update(sharding=places[name]), template)


def fill(template: M, arrays: Mapping[str, LazyArray]) -> M:
    """The network of `template`'s shapes, dtypes and places; of the arrays, one is read and converted at a time.

    The host holds one array in its resting dtype, and one part of it (a layer, if stacked) as it was read.

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
