"""Convolutions of stride 1 in the form that XLA's CPU backend runs fastest; the same maps as `nn.conv`'s.

What was measured (AVX-512, two cores, float32; matrix products reach 215 GFLOP/s there): a 3-D convolution 80 to 150
GFLOP/s, a 2-D one over [N, H, W, C] 130, over one wide picture 180 to 190, since one core idles where a row holds fewer
than about 25,000 numbers; a 1x1 window runs on one core, and without any padding at the far side of W everything takes
four times as long. Hence pictures side by side, with a column of zeros between neighbours, and rows in blocks.

A window of three along time is Cook-Toom (Winograd) filtering, arXiv 1509.09308: m frames for m + 2 convolutions of
sums of frames, where frame by frame it would be 3 m. It adds 2 to 3 times the rounding error of a direct sum.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.sharding import active_mesh

WIDE = 24576  # numbers in a row that keep two cores busy
FEWEST_ROWS = 8  # of a block: two more are computed for nothing
POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)  # m + 1 of them, and infinity, for m frames: these have the least rounding error
FEW_CHANNELS = 32  # for so few a pass over the frames costs more than the products
FEWEST_PIXELS = 1024  # below, sums of kernels cost more than they save
Pads = Sequence[tuple[int, int]]

_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced inside is meant for "cpu", "gpu" or "tpu", whatever this process runs on."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def for_cpu(dtype: str) -> bool:
    """Whether convolutions take the forms of this module: on a CPU, in float32, and not on a mesh."""
    here = (_PLATFORM.get() or jax.default_backend()) == "cpu"
    return here and jnp.dtype(dtype) == jnp.float32 and active_mesh() is None


def conv_pictures(x_NHWC: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """A 2-D convolution of stride 1 with kernel [h, w, in, out]; `pads` are zeros (before, after) along H and W."""
    (batch, height, width, channels), (tall, broad) = x_NHWC.shape, kernel.shape[:2]
    if tall == broad == 1:
        return x_NHWC @ kernel[0, 0].reshape((1,) * 2 + kernel.shape[2:])
    (top, bottom), (left, right) = pads
    out_height, out_width = height + top + bottom - tall + 1, width + left + right - broad + 1
    between = max(left, right)  # a picture's right padding is the next one's left
    pitch = between + width
    blocks = max(1, min(out_height // FEWEST_ROWS, -(-WIDE // (batch * pitch * channels))))
    rows = -(-out_height // blocks)
    below = blocks * rows - out_height + bottom
    x = jnp.pad(x_NHWC, ((0, 0), (top, below), (left, between - left), (0, 0)))
    x = jnp.stack([x[:, i * rows : i * rows + rows + tall - 1] for i in range(blocks)], axis=1)
    x = x.transpose(2, 0, 1, 3, 4).reshape(1, rows + tall - 1, batch * blocks * pitch, channels)
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((0, 0), (0, broad - 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = y.reshape(rows, batch, blocks, pitch, -1)[:, :, :, :out_width].transpose(1, 2, 0, 3, 4)
    return y.reshape(batch, blocks * rows, out_width, -1)[:, :out_height]


def conv_frames(x_BFHWC: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """`conv_pictures` of every frame."""
    y = conv_pictures(x_BFHWC.reshape(-1, *x_BFHWC.shape[2:]), kernel, pads)
    return y.reshape(*x_BFHWC.shape[:2], *y.shape[1:])


def causal_conv(x_BFHWC: jax.Array, past_BFHWC: jax.Array | None, kernel: jax.Array) -> jax.Array:
    """A window of three frames that ends at the present one, "SAME" in space.

    Args:
      past_BFHWC: the two frames before x; None are zeros, with which nothing is multiplied where that saves time.
      kernel: [3, h, w, in, out], h and w odd.
    """
    if past_BFHWC is not None:
        return _three_frames(jnp.concatenate([past_BFHWC, x_BFHWC], axis=1), kernel)
    first = conv_frames(x_BFHWC[:, :1], _tap(kernel, 2, x_BFHWC), _same(kernel))
    if x_BFHWC.shape[1] == 1:
        return first
    seen = jnp.pad(x_BFHWC, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    return jnp.concatenate([first, _three_frames(seen, kernel)], axis=1)


def strided_in_time(seen_BFHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Every second window of three frames, no padding; kernel [3, 1, 1, in, out]."""
    last = seen_BFHWC.shape[1] - 2
    taps = jnp.concatenate([seen_BFHWC[:, i : last + i : 2] for i in range(3)], axis=-1)
    return conv_frames(taps, kernel.reshape(1, 1, -1, kernel.shape[-1]), ())


def _same(kernel: jax.Array) -> Pads:
    return [((n - 1) // 2, (n - 1) // 2) for n in kernel.shape[1:3]]


def _three_frames(seen_BFHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of F + 2 frames, as F; which form is chosen by sizes alone."""
    frames, pads = seen_BFHWC.shape[1] - 2, _same(kernel)
    inputs, outputs = kernel.shape[3:]
    if inputs < FEW_CHANNELS:
        taps = jnp.concatenate([seen_BFHWC[:, i : i + frames] for i in range(3)], axis=-1)
        return conv_frames(taps, jnp.concatenate(list(kernel), axis=2), pads)
    if outputs < FEW_CHANNELS:
        y = conv_frames(seen_BFHWC, jnp.concatenate(list(kernel), axis=3), pads)
        return reduce(add, (y[:, i : i + frames, ..., i * outputs : (i + 1) * outputs] for i in range(3)))
    pixels = frames * seen_BFHWC[:, 0, ..., 0].size
    tile = next(m for m in (4, 3, 2, 1) if frames % m == 0 and (m == 1 or pixels >= FEWEST_PIXELS))
    if tile == 1:
        y = conv_frames(seen_BFHWC[:, :frames], _tap(kernel, 0, seen_BFHWC), pads)
        for i in (1, 2):
            y = y + conv_frames(seen_BFHWC[:, i : i + frames], _tap(kernel, i, y), pads)
        return y
    return _filter_time(seen_BFHWC, kernel, tile)


@cache
def filter_matrices(frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cook-Toom: y = after ((kernels k) * (inputs x)), y [m], k [3], x [m + 2]; float32 [m, p], [p, 3], [p, m + 2].

    The product of two polynomials, transposed: it is evaluated at m + 1 points and at infinity, p = m + 2 in all.
    """
    points = np.asarray(POINTS[: frames + 1])
    others = [np.delete(points, i) for i in range(len(points))]
    after = np.zeros((frames, frames + 2))
    after[:, :-1], after[-1, -1] = points[None] ** np.arange(frames)[:, None], 1
    kernels = np.zeros((frames + 2, 3))
    kernels[:-1] = points[:, None] ** np.arange(3)[None]
    kernels[:-1] /= np.array([np.prod(p - rest) for p, rest in zip(points, others, strict=True)])[:, None]
    kernels[-1, -1] = 1
    inputs = np.zeros((frames + 2, frames + 2))
    for row, rest in enumerate([*others, points]):
        inputs[row, : len(rest) + 1] = np.poly(rest)[::-1]
    return after.astype(np.float32), kernels.astype(np.float32), inputs.astype(np.float32)


def _filter_time(seen_BFHWC: jax.Array, kernel: jax.Array, tile: int) -> jax.Array:
    after, kernels, inputs = filter_matrices(tile)
    batch, frames = seen_BFHWC.shape[0], seen_BFHWC.shape[1] - 2
    cut = [seen_BFHWC[:, i : i + frames - tile + 1 : tile] for i in range(tile + 2)]
    products: list[jax.Array] = []
    for i, row in enumerate(inputs):
        weights = _tap(jnp.asarray(kernels), i, products[-1] if products else seen_BFHWC)
        summed = reduce(add, (weights[t] * kernel[t] for t in range(3)))
        products.append(conv_frames(_sum(row, cut), summed, _same(kernel)))
    y = jnp.stack([_sum(row, products) for row in after], axis=2)
    return y.reshape(batch, frames, *y.shape[3:])


def _tap(table: jax.Array, index: int, after: jax.Array) -> jax.Array:
    """table[index], cut out when `after` is known: XLA would begin with such copies of all kernels, and keep them.

    (`optimization_barrier` is gone before XLA's CPU backend schedules.)
    """
    zero = jax.lax.stop_gradient(after[(0,) * after.ndim]) * 0  # as an integer, 0 for NaN and infinity, too
    return jax.lax.dynamic_index_in_dim(table, index + zero.astype(jnp.int32), keepdims=False)


def _sum(weights: np.ndarray, terms: Sequence[jax.Array]) -> jax.Array:
    """The weighted sum, without the terms of weight zero and without products by one."""
    kept = [(w, x) for w, x in zip(weights, terms, strict=True) if w]
    return reduce(add, (x if w == 1 else -x if w == -1 else w * x for w, x in kept))
