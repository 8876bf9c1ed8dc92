"""Wan2.1's causal 3-D video autoencoder: whole clips, streams and tiles with one set of layers.

Reference: `wan/modules/vae.py`, `WanVAE_`.

Every layer is causal in time, so a clip may be coded in pieces: every layer is `step(x, past)`, where `past` holds the
frames before x that are in the layer's receptive field, and None is the start of a clip. A whole clip is one step with
past None. The first frame is special: it is never resampled in time and does not enter temporal upsampling, so
1 + 4 k pixel frames are 1 + k latent frames.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.fingerprint import fingerprint
from cfjax.core.precision import Policy
from cfjax.nn.attention import dense
from cfjax.nn.conv import Conv, conv_doubled, conv_frames, draw_kernels, fold_frames
from cfjax.nn.cpu_conv import causal_conv, for_cpu, strided_in_time
from cfjax.nn.layers import Linear, align

# Mean and standard deviation of Wan2.1's latent channels (reference: `utils/wan_wrapper.py`, `WanVAEWrapper`).
# fmt: off
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on
MEMORY = 2  # frames before the current one in a temporal window of three

Past = Any  # nested tuples of arrays, one per layer that remembers; None before the first frame


@dataclass(frozen=True)
class VAEConfig:
    """Sizes and static choices.

    Attributes:
      base_dim: channels at pixel resolution; level i has `multipliers[i]` times as many.
      z_dim: latent channels.
      res_blocks: residual blocks per level of the encoder; the decoder has one more.
      temporal_downsample: whether the encoder also halves time after level i; one entry per level but the last.
      latents_mean, latents_std: of each latent channel; latents outside are (z - mean) / std.
      precision: `compute` for convolutions and activations between layers, `norm` for norms and softmax.
    """

    base_dim: int = 96
    z_dim: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD
    precision: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.multipliers) - 1:
            raise UserError(f"vae.temporal_downsample needs {len(self.multipliers) - 1} entries, one per downsampling")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise UserError(f"vae.latents_mean and vae.latents_std need {self.z_dim} entries, one per latent channel")

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent along time, height, width."""
        side = 2 ** len(self.temporal_downsample)
        return 2 ** sum(self.temporal_downsample), side, side


PRESETS = {"wan": VAEConfig()}


class _Stage(Protocol):
    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]: ...


def _chain(stages: Iterable[_Stage], x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
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
        y, past = _chain((self.first, self.second), x, past, policy)
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
    """Doubles height and width and halves the channels; doubles time too where it has a `time_conv`.

    The first frame of all stays one frame, and later ones do not see it in `time_conv`.
    """

    def __init__(self, dim: int, key: jax.Array, *, temporal: bool):
        keys = jax.random.split(key)
        self.conv = Conv(dim, dim // 2, (3, 3), keys[0])
        self.time_conv = Conv(dim, 2 * dim, (3, 1, 1), keys[1]) if temporal else None

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """x [B, F, H, W, D] -> [B, G, 2 H, 2 W, D/2]; G = 2 F - 1 without a past, else 2 F."""
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


def _middle(dim: int, key: jax.Array) -> nnx.List:
    keys = jax.random.split(key, 3)
    return nnx.List([Residual(dim, dim, keys[0]), FrameAttention(dim, keys[1]), Residual(dim, dim, keys[2])])


class Encoder(nnx.Module):
    """Video [B, P, H, W, 3] -> two numbers per latent channel [B, F, H/8, W/8, 2 C], before the last linear map."""

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 64))
        dim = config.base_dim
        stages: nnx.List = nnx.List([])
        self.conv_in = CausalConv(3, dim, next(keys))
        for i, multiplier in enumerate(config.multipliers):
            for _ in range(config.res_blocks):
                stages.append(Residual(dim, multiplier * config.base_dim, next(keys)))
                dim = multiplier * config.base_dim
            if i < len(config.temporal_downsample):
                stages.append(Downsample(dim, next(keys), temporal=config.temporal_downsample[i]))
        self.down = stages
        self.middle = _middle(dim, next(keys))
        self.head = NormConv(dim, 2 * config.z_dim, next(keys))

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """1 + 4 k frames without a past, else 4 k."""
        return _chain((self.conv_in, *self.down, *self.middle, self.head), x.astype(policy.compute), past, policy)


class Decoder(nnx.Module):
    """Latents [B, F, H/8, W/8, C] -> video [B, P, H, W, 3], not clamped."""

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 64))
        dim = config.multipliers[-1] * config.base_dim
        stages: nnx.List = nnx.List([])
        self.conv_in = CausalConv(config.z_dim, dim, next(keys))
        self.middle = _middle(dim, next(keys))
        temporal = config.temporal_downsample[::-1]
        for i, multiplier in enumerate(config.multipliers[::-1]):
            for _ in range(config.res_blocks + 1):
                stages.append(Residual(dim, multiplier * config.base_dim, next(keys)))
                dim = multiplier * config.base_dim
            if i < len(temporal):
                stages.append(Upsample(dim, next(keys), temporal=temporal[i]))
                dim //= 2
        self.up = stages
        self.head = NormConv(dim, 3, next(keys))

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """Any number of frames; F give 1 + 4 (F - 1) without a past, else 4 F."""
        return _chain((self.conv_in, *self.middle, *self.up, self.head), x.astype(policy.compute), past, policy)


class StreamState(NamedTuple):
    """State of a stream: latent frames so far, int32 [B], and each layer's past (None before the first)."""

    frames_B: jax.Array
    past: Past


class WanVAE(nnx.Module):
    """The autoencoder. Immutable: use with plain jax.jit and jax.tree.

    Whole clips need memory in proportion to their frames and pixels; for long or large ones see `models.vae_tiling`.
    """

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.config = config
        self.encoder = Encoder(config, keys[0])
        self.moments = Linear(2 * config.z_dim, 2 * config.z_dim, keys[1])
        self.unmix = Linear(config.z_dim, config.z_dim, keys[2])
        self.decoder = Decoder(config, keys[3])

    @property
    def latent_channels(self) -> int:
        return self.config.z_dim

    @property
    def stride(self) -> tuple[int, int, int]:
        return self.config.stride

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        """Normalised mean latents_BFHWC, float32; P = 1 + 4 (F - 1). Raises UserError on other frames or sides."""
        return self.encode_step(video_BPHWC, self.init_encode_state(video_BPHWC.shape[0]))[0]

    def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
        """video_BPHWC float32 in [-1, 1], P = 1 + 4 (F - 1). Raises UserError on another number of channels."""
        return self.decode_step(latents_BFHWC, self.init_state(latents_BFHWC.shape[0]))[0]

    def init_state(self, batch: int) -> StreamState:
        """The decoder before the first frame. Its structure differs from later states': jit compiles two programs."""
        return StreamState(jnp.zeros((batch,), jnp.int32), None)

    def init_encode_state(self, batch: int) -> StreamState:
        """The encoder before the first frame."""
        return StreamState(jnp.zeros((batch,), jnp.int32), None)

    def decode_step(self, latents_BFHWC: jax.Array, state: StreamState) -> tuple[jax.Array, StreamState]:
        """Decodes the next F >= 1 latent frames: 1 + 4 (F - 1) pixel frames at first, then 4 F. The state is donatable.

        Raises:
          UserError: another number of channels, or a batch that is not the state's.
        """
        raw, state = self.decode_step_raw(latents_BFHWC, state)
        return jnp.clip(raw, -1.0, 1.0), state

    def decode_step_raw(self, latents_BFHWC: jax.Array, state: StreamState) -> tuple[jax.Array, StreamState]:
        """`decode_step` before the clamp to [-1, 1] (tiles are blended first)."""
        shape, channels = latents_BFHWC.shape, self.config.z_dim
        if len(shape) != 5 or shape[1] < 1 or shape[-1] != channels:
            raise UserError(f"vae: latents {shape} need [B,F,H,W,{channels}] with F >= 1")
        _check_batch(shape[0], state)
        mean, std = (align(jnp.asarray(x), latents_BFHWC) for x in self._statistics())
        z = self.unmix(latents_BFHWC.astype(jnp.float32) * std + mean, self.config.precision.compute)
        raw, past = self.decoder.step(z, state.past, self.config.precision)
        return raw.astype(jnp.float32), StreamState(state.frames_B + shape[1], past)

    def encode_step(self, video_BPHWC: jax.Array, state: StreamState) -> tuple[jax.Array, StreamState]:
        """Encodes the next pixel frames, 1 + 4 k at first and 4 k later, to normalised mean latents. Donatable.

        Raises:
          UserError: another number of frames, sides that the stride does not divide, or another batch.
        """
        shape, (time, height, width) = video_BPHWC.shape, self.stride
        lone = 1 if state.past is None else 0
        if len(shape) != 5 or shape[-1] != 3 or shape[2] % height or shape[3] % width:
            raise UserError(f"vae: video {shape} needs [B,P,H,W,3], H a multiple of {height} and W of {width}")
        if shape[1] < 1 or (shape[1] - lone) % time:
            raise UserError(f"vae: {shape[1]} frames do not encode; use {f'1 + {time} k' if lone else f'{time} k'}")
        _check_batch(shape[0], state)
        hidden, past = self.encoder.step(video_BPHWC, state.past, self.config.precision)
        moments = self.moments(hidden, self.config.precision.compute).astype(jnp.float32)
        mean, std = (align(jnp.asarray(x), moments) for x in self._statistics())
        latents = (moments[..., : self.config.z_dim] - mean) / std
        return latents, StreamState(state.frames_B + latents.shape[1], past)

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.config.latents_mean, np.float32), np.asarray(self.config.latents_std, np.float32)

    def describe(self) -> dict[str, Any]:
        """The codec's description in a manifest; its fingerprint covers all weights."""
        config = self.config
        return {
            "name": "wan_vae",
            "base_dim": config.base_dim,
            "channels": config.z_dim,
            "multipliers": list(config.multipliers),
            "stride": list(config.stride),
            "fingerprint": fingerprint(self, config.latents_mean, config.latents_std),
        }


def _check_batch(batch: int, state: StreamState) -> None:
    if state.frames_B.shape != (batch,):
        raise UserError(f"vae: a batch of {batch} does not continue a stream of {state.frames_B.shape[0]}")


def abstract_vae(config: VAEConfig) -> WanVAE:
    """The autoencoder's structure with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda key: WanVAE(config, key), jax.random.key(0))


@partial(jax.jit, static_argnames="config")
def make_vae(config: VAEConfig, key: jax.Array) -> WanVAE:
    """A random autoencoder in one compiled program: kernels U(-1/sqrt(n), 1/sqrt(n)) for n inputs per output."""
    return draw_kernels(abstract_vae(config), key)
