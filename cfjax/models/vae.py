"""Wan's causal 3-D video autoencoders, 2.1's and TI2V-5B's: whole clips, streams and tiles with one set of layers.

References: `wan/modules/vae.py`, `WanVAE_`; in Wan2.2's release `wan/modules/vae2_2.py`, `WanVAE_`, to which patches of
2 x 2 pixels are one, and whose levels have shortcuts (`vae_layers.Level`).

Every layer is causal in time, so a clip may be coded in pieces: every layer is `step(x, past)`, where `past` holds the
frames before x that are in the layer's receptive field, and None is the start of a clip. A whole clip is one step with
past None. The first frame is special: it is never resampled in time and does not enter temporal upsampling, so
1 + 4 k pixel frames are 1 + k latent frames.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.fingerprint import fingerprint
from cfjax.core.precision import Policy
from cfjax.models.vae_layers import (
    CausalConv,
    Downsample,
    Level,
    NormConv,
    Past,
    Residual,
    Upsample,
    chain,
    means_of_groups,
    middle,
    repeated,
)
from cfjax.nn.conv import draw_kernels
from cfjax.nn.layers import Linear, align

# Mean and standard deviation of Wan2.1's latent channels (reference: `utils/wan_wrapper.py`, `WanVAEWrapper`).
# fmt: off
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# Of Wan2.2-TI2V-5B's (`wan/modules/vae2_2.py`, `Wan2_2_VAE`).
LATENTS_MEAN_48 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENTS_STD_48 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class VAEConfig:
    """Sizes and static choices.

    Attributes:
      base_dim: channels at pixel resolution; level i has `multipliers[i]` times as many.
      decoder_base_dim: the same of the decoder; 0 for `base_dim`.
      z_dim: latent channels.
      res_blocks: residual blocks per level of the encoder; the decoder has one more.
      temporal_downsample: whether the encoder also halves time after level i; one entry per level but the last.
      residual: Wan2.2's levels, with a shortcut beside each.
      patch: sides of the squares of pixels that are one pixel to encoder and decoder.
      latents_mean, latents_std: of each latent channel; latents outside are (z - mean) / std.
      precision: `compute` for convolutions and activations between layers, `norm` for norms and softmax.
    """

    base_dim: int = 96
    decoder_base_dim: int = 0
    z_dim: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    residual: bool = False
    patch: int = 1
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
        side = self.patch * 2 ** len(self.temporal_downsample)
        return 2 ** sum(self.temporal_downsample), side, side


WAN_2_2 = VAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    residual=True,
    patch=2,
    latents_mean=LATENTS_MEAN_48,
    latents_std=LATENTS_STD_48,
)
PRESETS = {"wan": VAEConfig(), "wan_2_2": WAN_2_2}


def published_vae(channels: int) -> VAEConfig:
    """The released autoencoder of latents of so many channels; Wan2.1's where there is none."""
    return next((config for config in PRESETS.values() if config.z_dim == channels), PRESETS["wan"])


class Encoder(nnx.Module):
    """Video [B, P, H, W, 3] -> two numbers per latent channel [B, F, H/8, W/8, 2 C], before the last linear map."""

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 64))
        dim = config.base_dim
        levels: nnx.List = nnx.List([])
        self.conv_in = CausalConv(3 * config.patch**2, dim, next(keys))
        for i, multiplier in enumerate(config.multipliers):
            stages: list[Any] = []
            for _ in range(config.res_blocks):
                stages.append(Residual(dim, multiplier * config.base_dim, next(keys)))
                dim = multiplier * config.base_dim
            times, sides = 1, 1
            if i < len(config.temporal_downsample):
                stages.append(Downsample(dim, next(keys), temporal=config.temporal_downsample[i]))
                times, sides = 1 + config.temporal_downsample[i], 2
            levels.extend([Level(stages, means_of_groups, dim, times, sides)] if config.residual else stages)
        self.down = levels
        self.middle = middle(dim, next(keys))
        self.head = NormConv(dim, 2 * config.z_dim, next(keys))

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """1 + 4 k frames without a past, else 4 k."""
        return chain((self.conv_in, *self.down, *self.middle, self.head), x.astype(policy.compute), past, policy)


class Decoder(nnx.Module):
    """Latents [B, F, H/8, W/8, C] -> video [B, P, H, W, 3], not clamped."""

    def __init__(self, config: VAEConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 64))
        base = config.decoder_base_dim or config.base_dim
        dim = config.multipliers[-1] * base
        levels: nnx.List = nnx.List([])
        self.conv_in = CausalConv(config.z_dim, dim, next(keys))
        self.middle = middle(dim, next(keys))
        temporal = config.temporal_downsample[::-1]
        for i, multiplier in enumerate(config.multipliers[::-1]):
            stages: list[Any] = []
            for _ in range(config.res_blocks + 1):
                stages.append(Residual(dim, multiplier * base, next(keys)))
                dim = multiplier * base
            times, sides, shortcut = 1, 1, None
            if i < len(temporal):
                out_dim = dim if config.residual else dim // 2
                stages.append(Upsample(dim, out_dim, next(keys), temporal=temporal[i]))
                dim, times, sides, shortcut = out_dim, 1 + temporal[i], 2, repeated
            levels.extend([Level(stages, shortcut, dim, times, sides)] if config.residual else stages)
        self.up = levels
        self.head = NormConv(dim, 3 * config.patch**2, next(keys))

    def step(self, x: jax.Array, past: Past, policy: Policy) -> tuple[jax.Array, Past]:
        """Any number of frames; F give 1 + 4 (F - 1) without a past, else 4 F."""
        return chain((self.conv_in, *self.middle, *self.up, self.head), x.astype(policy.compute), past, policy)


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
        raw = rearrange(raw, "b f h w (c r q) -> b f (h q) (w r) c", q=self.config.patch, r=self.config.patch)
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
        hidden, past = self.encoder.step(self.in_patches(video_BPHWC), state.past, self.config.precision)
        moments = self.moments(hidden, self.config.precision.compute).astype(jnp.float32)
        mean, std = (align(jnp.asarray(x), moments) for x in self._statistics())
        latents = (moments[..., : self.config.z_dim] - mean) / std
        return latents, StreamState(state.frames_B + latents.shape[1], past)

    def in_patches(self, video_BPHWC: jax.Array) -> jax.Array:
        """What the encoder takes: each `patch` x `patch` pixels as one of 3 patch^2 channels."""
        patch = self.config.patch
        return rearrange(video_BPHWC, "b f (h q) (w r) c -> b f h w (c r q)", q=patch, r=patch)

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
