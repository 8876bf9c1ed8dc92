"""Convolutions over images and videos, channels last, as immutable pytrees."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from cfjax.core.tree import map_named, named_leaves
from cfjax.nn.layers import align

M = TypeVar("M")
Padding = str | Sequence[tuple[int, int]]
AXES = {2: "HW", 3: "DHW"}  # `lax.conv_general_dilated`'s letters for our H, W and (time first) P, H, W


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """U(-1/sqrt(n), 1/sqrt(n)) for n inputs per output of a [*window, in, out] kernel (PyTorch's default)."""
    fan_in = 1
    for size in shape[:-1]:
        fan_in *= size
    return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


class Conv(nnx.Module):
    """y = x * kernel + bias over 2 (height, width) or 3 (time, height, width) axes, computed in `dtype`.

    Args:
      in_dim, out_dim: channels.
      window: size along each axis; its length says how many axes there are.
      use_bias: without it `bias` is None.
    """

    def __init__(self, in_dim: int, out_dim: int, window: tuple[int, ...], key: jax.Array, *, use_bias: bool = True):
        self.kernel = nnx.Param(fan_in_uniform(key, (*window, in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32)) if use_bias else None

    def __call__(
        self, x: jax.Array, dtype: str, *, strides: tuple[int, ...] | None = None, padding: Padding = "SAME"
    ) -> jax.Array:
        """Convolves x [B, *axes, in]; strides default to 1. Padding is "SAME", "VALID" or (before, after) per axis."""
        kernel = self.kernel[...].astype(dtype)
        axes = AXES[kernel.ndim - 2]
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel,
            strides or (1,) * len(axes),
            padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
        return y if self.bias is None else y + align(self.bias[...].astype(dtype), y)


def fold_frames(x_BFHWC: jax.Array) -> jax.Array:
    """Frames as pictures of a larger batch, [B F, H, W, C]."""
    return rearrange(x_BFHWC, "b f h w c -> (b f) h w c")


def conv_frames(
    conv: Conv, x_BFHWC: jax.Array, dtype: str, *, strides: tuple[int, ...] | None = None, padding: Padding = "SAME"
) -> jax.Array:
    """A 2-D convolution of every frame; see `Conv`."""
    y = conv(fold_frames(x_BFHWC), dtype, strides=strides, padding=padding)
    return y.reshape(*x_BFHWC.shape[:2], *y.shape[1:])


def draw_kernels(template: M, key: jax.Array) -> M:
    """A random network in the shape of `template`: kernels as `fan_in_uniform`, scales 1, biases 0, all float32.

    All kernels are cut from one draw; a draw for each, as constructors make them, compiles ten times as long.
    """
    kernels = {name: leaf for name, leaf in named_leaves(template).items() if name.endswith("kernel")}
    ends = np.cumsum([leaf.size for leaf in kernels.values()])
    pieces = jnp.split(jax.random.uniform(key, (int(ends[-1]),), jnp.float32, -1.0, 1.0), ends[:-1])
    drawn = dict(zip(kernels, pieces, strict=True))

    def leaf(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        if name in drawn:
            return drawn[name].reshape(like.shape) * (like.size // like.shape[-1]) ** -0.5
        return jnp.full(like.shape, name.endswith("scale"), jnp.float32)

    return map_named(leaf, template)
