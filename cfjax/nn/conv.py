"""Convolutions over images and videos, channels last, as immutable pytrees."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from cfjax.core.tree import map_named, named_leaves
from cfjax.nn import cpu_conv
from cfjax.nn.cpu_conv import for_cpu
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
        pads = _pads(kernel, padding)
        if for_cpu(dtype) and len(axes) == 2 and pads and (strides or (1, 1)) == (1, 1):
            return self.shift(cpu_conv.conv_pictures(x.astype(dtype), kernel, pads), dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel,
            strides or (1,) * len(axes),
            padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
        return self.shift(y, dtype)

    def shift(self, y: jax.Array, dtype: str) -> jax.Array:
        """y + bias."""
        return y if self.bias is None else y + align(self.bias[...].astype(dtype), y)


def _pads(kernel: jax.Array, padding: Padding) -> Sequence[tuple[int, int]]:
    """Zeros (before, after) per axis; of windows of odd sizes, where it is "SAME"."""
    windows = kernel.shape[:-2]
    if padding == "SAME":
        return [((n - 1) // 2, (n - 1) // 2) for n in windows] if all(n % 2 for n in windows) else []
    return [(0, 0)] * len(windows) if isinstance(padding, str) else list(padding)


def fold_frames(x_BFHWC: jax.Array) -> jax.Array:
    """Frames as pictures of a larger batch, [B F, H, W, C]."""
    return rearrange(x_BFHWC, "b f h w c -> (b f) h w c")


def conv_frames(
    conv: Conv, x_BFHWC: jax.Array, dtype: str, *, strides: tuple[int, ...] | None = None, padding: Padding = "SAME"
) -> jax.Array:
    """A 2-D convolution of every frame; see `Conv`."""
    y = conv(fold_frames(x_BFHWC), dtype, strides=strides, padding=padding)
    return y.reshape(*x_BFHWC.shape[:2], *y.shape[1:])


def pair_taps(kernel: jax.Array, axis: int) -> jax.Array:
    """A 3-tap window on doubled pixels as two 2-tap windows on the pixels: stacked first, for even and odd outputs.

    Doubled pixel 2 i + a is pixel i: the even output 2 i sees pixels i - 1, i, i; the odd one sees i, i, i + 1.
    """
    first, middle, last = jnp.split(kernel, 3, axis)
    even = jnp.concatenate([first, middle + last], axis)
    odd = jnp.concatenate([first + middle, last], axis)
    return jnp.stack([even, odd])


def conv_doubled(x_NHWC: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    """[2, 2, N, H, W, out]: 3x3 on x with height and width doubled (nearest); its even and odd pixels apart.

    One 2x2 window on the small pictures, four times the channels: 4/9 of the multiplications, the same zeros around.
    """
    cells = pair_taps(pair_taps(kernel.astype(jnp.float32), 0), 2)  # [column, row, 2, 2, in, out]
    cells = rearrange(cells, "q p h w i o -> h w i (p q o)").astype(dtype)
    around = ((1, 1), (1, 1))
    if for_cpu(dtype):
        y = cpu_conv.conv_pictures(x_NHWC.astype(dtype), cells, around)
    else:
        names = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x_NHWC.astype(dtype), cells, (1, 1), around, dimension_numbers=names)
    # Window j covers pixels j - 1 and j: pixel i's even output is in window i, its odd one in window i + 1.
    y = rearrange(y, "n h w (p q o) -> p q n h w o", p=2, q=2)
    height, width = x_NHWC.shape[1:3]
    cut = lambda p, q: y[p, q, :, p : height + p, q : width + q]
    return jnp.stack([jnp.stack([cut(p, q) for q in (0, 1)]) for p in (0, 1)])


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
