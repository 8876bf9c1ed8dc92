"""The layers of Wan's causal 3-D video autoencoders, each a `step(x, past)`; see `models.vae`.

References: `wan/modules/vae.py` (Wan2.1), and of Wan2.2's release `wan/modules/vae2_2.py` for `Level`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from cfjax.core.precision import Policy
from cfjax.nn.attention import dense
from cfjax.nn.conv import Conv, conv_doubled, conv_frames, fold_frames
from cfjax.nn.cpu_conv import causal_conv, for_cpu, strided_in_time
from cfjax.nn.layers import Linear, align

MEMORY = 2  # frames before the current one in a temporal window of three

Past = Any  # nested tuples of arrays, one per layer that remembers; None before the first frame
Shortcut = Callable[[jax.Array, int, int, int, Past], jax.Array]


class Stage(Protocol):
    """A layer, or layers one after another."""

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """The frames after those in the past, and the past of the next ones."""


def chain(stages: Iterable[Stage], x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
    """Runs stages one after another, each with its own part of the past."""
    stages, kept = tuple(stages), []
    for stage, before in zip(stages, past or (None,) * len(stages), strict=True):
        x, after = stage.step(x, before, policy)
        kept.append(after)
    return x, tuple(kept)


def _causal(conv: Conv, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
    """A window of three in time that ends at the present frame, as one 3-D convolution; zeros before the first frame.

    Without a past the zeros are the convolution's own padding and x is not copied.
    """
    seen = x if past is None else jnp.concatenate([past, x], axis=1)
    if for_cpu(policy.compute):
        y = causal_conv(x, past, conv.kernel[...].astype(policy.compute))
        return conv.shift(y, policy.compute), _last_frames(seen)
    before = MEMORY if past is None else 0
    sides = [((n - 1) // 2, (n - 1) // 2) for n in conv.kernel.shape[1:3]]
    y = conv(seen, policy.compute, padding=[(before, 0), *sides])
    return y, _last_frames(seen)


def _last_frames(x: jax.Array) -> jax.Array:
    missing = max(0, MEMORY - x.shape[1])
    return jnp.pad(x[:, -MEMORY:], ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))


class ChannelNorm(nnx.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * scale, |x| over the channels; in the norm dtype, cast back."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        wide = policy.to_norm_dtype(x)
        square = jnp.sum(jnp.square(wide.astype(jnp.float32)), axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.maximum(square, 1e-24)).astype(wide.dtype)
        scale = policy.to_norm_dtype(self.scale[...]) * x.shape[-1] ** 0.5
        return (wide * inverse * align(scale, x)).astype(x.dtype)


class CausalConv(Conv):
    """A 3x3x3 convolution that sees this frame and the two before it."""

    def __init__(self, in_dim: int, out_dim: int, key: jax.Array):
        super().__init__(in_dim, out_dim, (3, 3, 3), key)

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """x [B, F, H, W, in] -> [B, F, H, W, out]; the past is the two frames before x."""
        return _causal(self, x, past, policy)


class NormConv(nnx.Module):
    """Norm, SiLU, causal convolution: half a residual block, and the head of encoder and decoder."""

    def __init__(self, in_dim: int, out_dim: int, key: jax.Array):
        self.norm = ChannelNorm(in_dim)
        self.conv = CausalConv(in_dim, out_dim, key)

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """Like `CausalConv.step`."""
        return self.conv.step(jax.nn.silu(self.norm(x, policy)), past, policy)


class Residual(nnx.Module):
    """Twice norm, SiLU, convolution, beside the input (through a linear map where the width changes)."""

    def __init__(self, in_dim: int, out_dim: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.first, self.second = NormConv(in_dim, out_dim, keys[0]), NormConv(out_dim, out_dim, keys[1])
        self.shortcut = Linear(in_dim, out_dim, keys[2]) if in_dim != out_dim else None

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """x [B, F, H, W, in] -> [B, F, H, W, out]."""
        y, past = chain((self.first, self.second), x, past, policy)
        return y + (x if self.shortcut is None else self.shortcut(x, policy.compute)), past


class FrameAttention(nnx.Module):
    """Single-head attention among the pixels of each frame, added to its input; it has no past."""

    def __init__(self, dim: int, key: jax.Array):
        keys = jax.random.split(key)
        self.norm = ChannelNorm(dim)
        self.qkv, self.out = Linear(dim, 3 * dim, keys[0]), Linear(dim, dim, keys[1])

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """x [B, F, H, W, D], kept in shape. One frame at a time: a frame's scores have (H W)^2 entries."""
        qkv = self.qkv(self.norm(x, policy), policy.compute)

        def frame(qkv_HWC: jax.Array) -> jax.Array:
            q, k, v = jnp.split(rearrange(qkv_HWC, "h w c -> 1 (h w) 1 c"), 3, axis=-1)
            return dense(q, k, v, backend="xla")[0, :, 0]  # cuDNN's kernel ends at 256 channels per head

        y = jax.lax.map(frame, rearrange(qkv, "b f h w c -> (b f) h w c"))
        return x + self.out(y.reshape(x.shape), policy.compute), ()


class Downsample(nnx.Module):
    """Halves height and width, and time too where it has a `time_conv`; the first frame of all keeps its own time."""

    def __init__(self, dim: int, key: jax.Array, *, temporal: bool):
        keys = jax.random.split(key)
        self.conv = Conv(dim, dim, (3, 3), keys[0])
        self.time_conv = Conv(dim, dim, (3, 1, 1), keys[1]) if temporal else None

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """x [B, F, H, W, D] -> [B, G, H/2, W/2, D]; F = 2 G - 1 without a past, else 2 G. The past is one frame."""
        x = conv_frames(self.conv, x, policy.compute, strides=(2, 2), padding=[(0, 1), (0, 1)])
        if self.time_conv is None:
            return x, ()
        seen = x if past is None else jnp.concatenate([past, x], axis=1)
        parts = [x[:, :1]] if past is None else []
        if seen.shape[1] > 1:
            if for_cpu(policy.compute):
                y = strided_in_time(seen, self.time_conv.kernel[...])
                parts.append(self.time_conv.shift(y, policy.compute))
            else:
                parts.append(self.time_conv(seen, policy.compute, strides=(2, 1, 1), padding="VALID"))
        return jnp.concatenate(parts, axis=1), x[:, -1:]


class Upsample(nnx.Module):
    """Doubles height and width, to `out_dim` channels; doubles time too where it has a `time_conv`.

    The first frame of all stays one frame, and later ones do not see it in `time_conv`.
    """

    def __init__(self, dim: int, out_dim: int, key: jax.Array, *, temporal: bool):
        keys = jax.random.split(key)
        self.conv = Conv(dim, out_dim, (3, 3), keys[0])
        self.time_conv = Conv(dim, 2 * dim, (3, 1, 1), keys[1]) if temporal else None

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """x [B, F, H, W, D] -> [B, G, 2 H, 2 W, out]; G = 2 F - 1 without a past, else 2 F."""
        x, past = (x, ()) if self.time_conv is None else self._double_time(self.time_conv, x, past, policy)
        if for_cpu(policy.compute):  # elsewhere it was not measured
            y = conv_doubled(fold_frames(x), self.conv.kernel[...], policy.compute)
            y = rearrange(y, "p q (b f) h w o -> b f (h p) (w q) o", b=x.shape[0])
            return self.conv.shift(y, policy.compute), past
        wide = repeat(x, "b f h w c -> b f (h 2) (w 2) c")
        return conv_frames(self.conv, wide, policy.compute, padding=[(1, 1), (1, 1)]), past

    def _double_time(self, conv: Conv, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        parts, rest = ([x[:, :1]], x[:, 1:]) if past is None else ([], x)
        if rest.shape[1] == 0:
            return x, _last_frames(rest)
        y, past = _causal(conv, rest, past, policy)
        parts.append(rearrange(y, "b f h w (two c) -> b (f two) h w c", two=2))
        return jnp.concatenate(parts, axis=1), past


def means_of_groups(x: jax.Array, out_dim: int, times: int, sides: int, past: Past) -> jax.Array:
    """Halved where a factor is 2, without weights: each output channel is the mean of a group of neighbouring numbers.

    A number is at (channel, frame, row, column) of its 2 x 2 x 2 pixels, in this order. Before the first frame of all
    are zeros, which count (Wan2.2: `AvgDown3D`).

    Args:
      x: [B, F, H, W, D].  times, sides: 1 or 2, in time and in height and width.
      past: None at the start of a clip.

    Returns:
      [B, ceil(F / times), H / sides, W / sides, out_dim].
    """
    if past is None:
        x = jnp.pad(x, ((0, 0), (-x.shape[1] % times, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (f t) (h p) (w q) c -> b f h w (c t p q)", t=times, p=sides, q=sides)
    return x.reshape(*x.shape[:-1], out_dim, -1).mean(axis=-1)


def repeated(x: jax.Array, out_dim: int, times: int, sides: int, past: Past) -> jax.Array:
    """Doubled where a factor is 2, without weights: what `means_of_groups` would average to x again, all of it equal.

    The first frame of all stays one frame: the last of those that it would be (Wan2.2: `DupUp3D`).

    Args:
      as `means_of_groups`.

    Returns:
      [B, F times, H sides, W sides, out_dim], times - 1 frames fewer at the start of a clip.
    """
    wide = jnp.repeat(x, out_dim * times * sides * sides // x.shape[-1], axis=-1)
    y = rearrange(wide, "b f h w (c t p q) -> b (f t) (h p) (w q) c", t=times, p=sides, q=sides)
    return y[:, times - 1 :] if past is None else y


class Level(nnx.Module):
    """Wan2.2's level: residual blocks and a resampling, beside a resampling of its input without weights.

    Args:
      stages: the blocks, and last the resampling if it has one.
      shortcut: `means_of_groups` or `repeated`; None for a level with nothing beside it.
      out_dim, times, sides: for the shortcut.
    """

    def __init__(self, stages: Iterable[Any], shortcut: Shortcut | None, out_dim: int, times: int, sides: int):
        self.stages = nnx.List(stages)
        self.shortcut, self.out_dim, self.times, self.sides = shortcut, out_dim, times, sides

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """Like the steps of its resampling."""
        y, after = chain(self.stages, x, past, policy)
        if self.shortcut is None:
            return y, after
        return y + self.shortcut(x, self.out_dim, self.times, self.sides, past), after


def middle(dim: int, key: jax.Array) -> nnx.List:
    """What is between the levels of encoder and decoder: residual block, attention, residual block."""
    keys = jax.random.split(key, 3)
    return nnx.List([Residual(dim, dim, keys[0]), FrameAttention(dim, keys[1]), Residual(dim, dim, keys[2])])
