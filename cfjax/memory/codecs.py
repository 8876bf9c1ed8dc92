"""Keys and values of remembered frames in fewer bits: quantised once, when a block is committed.

Keys (time axis not rotated, so that every channel keeps its own outliers) have a scale per head and channel, values per
token and head, as in KIVI (arXiv 2402.02750). No group crosses the border of a frame: a frame that is moved, or leaves,
takes its scales along. (LightX2V's `kvcache/quant.py` groups 64 tokens across frames and quantises neighbours again.)

| codec | an element is | scale and offset for |
|---|---|---|
| none | the network's dtype | - |
| bf16 | bfloat16 | - |
| fp8 | float8_e4m3fn, 1 byte | keys: a channel of a frame; values: a head of a token (scale alone) |
| int8 | 1 byte | the same |
| int4 | half a byte | at most 64 tokens of a channel, at most 64 channels of a token |
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from cfjax.core.errors import UserError

CodecName = Literal["none", "bf16", "fp8", "int8", "int4"]
MOST_IN_GROUP = 64  # of int4
FP8, FP8_MAX = jnp.float8_e4m3fn, 448.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Codes [..., F, T, N, K] (int4: [..., K / 2], a byte holds two), and what they are multiplied by and added to.

    scale, low: float32, [..., F, T / group, 1, N, K] for keys and [..., F, T, N, K / group, 1] for values; fp8 has no
    `low`.
    """

    codes: jax.Array
    scale: jax.Array
    low: jax.Array | None
    keys: bool = field(metadata={"static": True})


@dataclass(frozen=True)
class Codec:
    """How keys and values are stored; see the table above.

    Raises:
      UserError: no such codec.
    """

    name: CodecName = "none"

    def __post_init__(self) -> None:
        if self.name not in get_args(CodecName):
            raise UserError(f"memory: codec={self.name!r}: use one of {', '.join(get_args(CodecName))}")

    def encode_keys(self, k: jax.Array) -> Any:
        """Keys [..., F, T, N, K], time axis not rotated."""
        return self._encode(k, keys=True)

    def encode_values(self, v: jax.Array) -> Any:
        """Values [..., F, T, N, K]."""
        return self._encode(v, keys=False)

    def _encode(self, x: jax.Array, *, keys: bool) -> Any:
        if self.name == "none":
            return x
        if self.name == "bf16":
            return x.astype(jnp.bfloat16)
        axis = -3 if keys else -1
        group = group_size(x.shape[axis], self.name)
        split = _split(x.astype(jnp.float32), keys, group)
        over = -3 if keys else -1
        if self.name == "fp8":
            scale = jnp.max(jnp.abs(split), axis=over, keepdims=True) / FP8_MAX
            scale = jnp.where(scale > 0, scale, 1.0)
            return Quantized((split / scale).reshape(x.shape).astype(FP8), scale, None, keys)
        low = jnp.min(split, axis=over, keepdims=True)
        levels = 255 if self.name == "int8" else 15
        scale = (jnp.max(split, axis=over, keepdims=True) - low) / levels
        scale = jnp.where(scale > 0, scale, 1.0)
        codes = jnp.clip(jnp.rint((split - low) / scale), 0, levels).reshape(x.shape).astype(jnp.uint8)
        if self.name == "int4":
            codes = codes[..., ::2] | (codes[..., 1::2] << 4)
        return Quantized(codes, scale, low, keys)

    def decode(self, stored: Any, dtype: jnp.dtype) -> jax.Array:
        """What was stored, in the dtype."""
        if not isinstance(stored, Quantized):
            return stored.astype(dtype)
        codes = stored.codes
        if self.name == "int4":
            codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        shape, groups = codes.shape, stored.scale.shape[-4] if stored.keys else stored.scale.shape[-2]
        group = shape[-3 if stored.keys else -1] // groups
        wide = _split(codes.astype(jnp.float32), stored.keys, group) * stored.scale
        return (wide if stored.low is None else wide + stored.low).reshape(shape).astype(dtype)

    def bytes_per_frame(self, tokens: int, heads: int, head_dim: int, dtype: Any) -> int:
        """Of one layer's keys and values of one frame."""
        x = jax.ShapeDtypeStruct((1, tokens, heads, head_dim), dtype)
        stored = jax.eval_shape(lambda x: (self.encode_keys(x), self.encode_values(x)), x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))


def over_heads(stored: Any, pick: Callable[[jax.Array, int], jax.Array]) -> Any:
    """`pick(x, axis of the heads)` of every array that keys or values [..., F, T, N, K] are stored in."""
    if not isinstance(stored, Quantized):
        return pick(stored, stored.ndim - 2)
    beside = lambda x: pick(x, x.ndim - (2 if stored.keys else 3))
    low = None if stored.low is None else beside(stored.low)
    return replace(stored, codes=pick(stored.codes, stored.codes.ndim - 2), scale=beside(stored.scale), low=low)


def cut_frames(stored: Any, pieces: int) -> Any:
    """Every frame [..., F, T, N, K] in pieces, [..., F pieces, T / pieces, N, K], each with its scales: the same codes.

    A scale that is for tokens of several pieces is kept with each of them.
    """
    cut = lambda x: rearrange(x, "... f (r t) n k -> ... (f r) t n k", r=pieces)
    if not isinstance(stored, Quantized):
        return cut(stored)
    tokens = stored.codes.shape[-3]

    def beside(x: jax.Array) -> jax.Array:
        if not stored.keys:
            return rearrange(x, "... f (r t) n g o -> ... (f r) t n g o", r=pieces)
        group = tokens // x.shape[-4]
        fine = jnp.repeat(x, group // gcd(group, tokens // pieces), axis=x.ndim - 4)
        return rearrange(fine, "... f (r g) o n k -> ... (f r) g o n k", r=pieces)

    low = None if stored.low is None else beside(stored.low)
    return replace(stored, codes=cut(stored.codes), scale=beside(stored.scale), low=low)


def group_size(length: int, name: CodecName) -> int:
    """How many tokens of a channel (keys) or channels of a token (values) share a scale: a divisor of their number."""
    if name != "int4":
        return length
    return max(size for size in range(1, min(length, MOST_IN_GROUP) + 1) if length % size == 0)


def _split(x: jax.Array, keys: bool, group: int) -> jax.Array:
    """Groups on an axis of their own: [..., T / group, group, N, K] or [..., T, N, K / group, group]."""
    if keys:
        *lead, tokens, heads, channels = x.shape
        return x.reshape(*lead, tokens // group, group, heads, channels)
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
