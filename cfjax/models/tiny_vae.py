"""TAEHV, the tiny autoencoder that real-time servers decode Wan's latents with (github.com/madebyollin/taehv).

A stack of 2-D convolutions. Time enters in two ways: a *memory block* also sees its own input of the frame before, and
1x1 convolutions merge (encoder) or split (decoder) consecutive frames. Latents are the diffusion model's own, that is
normalised as `WanVAE` normalises them: TAEHV has no mean or standard deviation of its own. Its pixels are in [0, 1];
ours, outside, in [-1, 1].

Decoding yields 4 frames per latent, of which the first 3 of a clip are dropped: F latents, 1 + 4 (F - 1) frames.
Encoding groups frames from the first on, so latent k sees frames up to 4 k + 3, where Wan's own sees up to 4 k: a
stream's latents come 3 frames later, and the end of a clip is filled up with copies of its last frame.

What is fast in XLA: frames folded into the batch of a 2-D convolution, the past concatenated on channels (a 3-D window
or two convolutions are slower), and `Grow` as one convolution of small frames.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.fingerprint import fingerprint
from cfjax.core.precision import Policy
from cfjax.nn.conv import Conv, conv_doubled, conv_frames, draw_kernels, fold_frames

BLOCKS = 3  # memory blocks per stage
SPACE = 8  # three stages, each halving or doubling height and width
AROUND = ((1, 1), (1, 1))  # padding of a 3x3 window, also at stride 2, where "SAME" would pad one side only
# The frame before this one at every memory block, in order, each [B, H, W, C]; () when nothing was seen yet.
Memory = tuple[jax.Array, ...]


@dataclass(frozen=True)
class TinyVAEConfig:
    """Sizes; the defaults are those of the published taew2_1.

    Attributes:
      latent_channels: C of the latents.
      encoder_width: channels of every encoder layer.
      decoder_widths: channels of the decoder's three stages and of its output layer.
      time_pool: frames that each encoder stage merges into one.
      time_grow: frames that each decoder stage makes of one; as many as the encoder merges, in all.
      patch: sides of the squares of pixels that are one pixel to encoder and decoder; 2 in taew2_2.
      precision: dtypes; the memory is in `compute`.
    """

    latent_channels: int = 16
    encoder_width: int = 64
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    time_pool: tuple[int, int, int] = (2, 2, 1)
    time_grow: tuple[int, int, int] = (1, 2, 2)
    patch: int = 1
    precision: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        sizes = (
            self.latent_channels,
            self.encoder_width,
            *self.decoder_widths,
            *self.time_pool,
            *self.time_grow,
            self.patch,
        )
        if min(sizes) < 1:
            raise UserError(f"tiny VAE: sizes must be 1 or more, got {self}")
        if math.prod(self.time_pool) != math.prod(self.time_grow):
            raise UserError(f"tiny VAE: time_pool={self.time_pool}, time_grow={self.time_grow}: products must be equal")

    @property
    def time(self) -> int:
        """Pixel frames per latent frame."""
        return math.prod(self.time_grow)

    @property
    def side(self) -> int:
        """Pixels per latent in height and width."""
        return SPACE * self.patch


class EncodeState(NamedTuple):
    """State of `encode_step`: frames that do not complete a latent yet, [B, 0 to 3, H, W, 3], and the memory."""

    pending_BPHWC: jax.Array | None
    memory: Memory


class MemoryBlock(nnx.Module):
    """relu(x + conv relu conv relu conv [x, x of the frame before])."""

    def __init__(self, dim: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.conv_in = Conv(2 * dim, dim, (3, 3), keys[0])
        self.conv_mid = Conv(dim, dim, (3, 3), keys[1])
        self.conv_out = Conv(dim, dim, (3, 3), keys[2])

    def __call__(self, x_BFHWC: jax.Array, before_BHWC: jax.Array, dtype: str) -> jax.Array:
        past = jnp.concatenate([before_BHWC[:, None], x_BFHWC[:, :-1]], axis=1)
        y = jax.nn.relu(self.conv_in(fold_frames(jnp.concatenate([x_BFHWC, past], axis=-1)), dtype))
        y = self.conv_out(jax.nn.relu(self.conv_mid(y, dtype)), dtype)
        return jax.nn.relu(y.reshape(x_BFHWC.shape) + x_BFHWC)


class MemoryBlocks(nnx.Module):
    """A stage's memory blocks, one after the other."""

    def __init__(self, dim: int, key: jax.Array):
        self.layers = nnx.List([MemoryBlock(dim, k) for k in jax.random.split(key, BLOCKS)])

    def __call__(self, x_BFHWC: jax.Array, memory: Memory, dtype: str) -> tuple[jax.Array, Memory]:
        """x after all blocks, and the last frame that each block was given."""
        kept = []
        for block, before_BHWC in zip(self.layers, memory or (jnp.zeros_like(x_BFHWC[:, 0]),) * BLOCKS, strict=True):
            kept.append(x_BFHWC[:, -1])
            x_BFHWC = block(x_BFHWC, before_BHWC, dtype)
        return x_BFHWC, tuple(kept)


class Shrink(nnx.Module):
    """Merges `time` frames into one (1x1), then halves height and width (3x3, stride 2); both linear."""

    def __init__(self, dim: int, time: int, key: jax.Array):
        key_pool, key_down = jax.random.split(key)
        self.time = time
        self.pool = Conv(time * dim, dim, (1, 1), key_pool, use_bias=False)
        self.down = Conv(dim, dim, (3, 3), key_down, use_bias=False)

    def __call__(self, x_BFHWC: jax.Array, dtype: str) -> jax.Array:
        groups = rearrange(x_BFHWC, "b (f t) h w c -> b f h w (t c)", t=self.time)
        return conv_frames(self.down, conv_frames(self.pool, groups, dtype), dtype, strides=(2, 2), padding=AROUND)


class Grow(nnx.Module):
    """Doubles height and width (nearest), makes `time` frames of one (1x1), then mixes channels (3x3); all linear.

    The original does this in that order, on large frames. Composed into one 2x2 window on the small frames, with an
    output channel for every new frame and every pixel of a 2x2 cell, it is the same map (padding too) for 4/9 of the
    multiplications and without the large intermediates: 2 to 3 times as fast on a CPU.
    """

    def __init__(self, in_dim: int, out_dim: int, time: int, key: jax.Array):
        key_grow, key_up = jax.random.split(key)
        self.time = time
        self.grow = Conv(in_dim, time * in_dim, (1, 1), key_grow, use_bias=False)
        self.up = Conv(in_dim, out_dim, (3, 3), key_up, use_bias=False)

    def kernel(self) -> jax.Array:
        """[3, 3, in, time * out], float32: of the doubled frames."""
        grow = rearrange(self.grow.kernel[...].astype(jnp.float32), "1 1 i (t c) -> i t c", t=self.time)
        composed = jnp.einsum("itc,hwco->hwito", grow, self.up.kernel[...].astype(jnp.float32))
        return rearrange(composed, "h w i t o -> h w i (t o)")

    def __call__(self, x_BFHWC: jax.Array, dtype: str) -> jax.Array:
        y = conv_doubled(fold_frames(x_BFHWC), self.kernel(), dtype)
        b, t = x_BFHWC.shape[0], self.time
        return rearrange(y, "p q (b f) h w (t o) -> b (f t) (h p) (w q) o", b=b, t=t)


class EncoderStage(nnx.Module):
    """Shrink, then memory blocks."""

    def __init__(self, dim: int, time: int, key: jax.Array):
        key_shrink, key_blocks = jax.random.split(key)
        self.shrink = Shrink(dim, time, key_shrink)
        self.blocks = MemoryBlocks(dim, key_blocks)


class DecoderStage(nnx.Module):
    """Memory blocks, then grow."""

    def __init__(self, in_dim: int, out_dim: int, time: int, key: jax.Array):
        key_blocks, key_grow = jax.random.split(key)
        self.blocks = MemoryBlocks(in_dim, key_blocks)
        self.grow = Grow(in_dim, out_dim, time, key_grow)


class Encoder(nnx.Module):
    """Frames in [0, 1] to latents."""

    def __init__(self, config: TinyVAEConfig, key: jax.Array):
        key_in, key_out, *keys = jax.random.split(key, 5)
        width = config.encoder_width
        self.conv_in = Conv(3 * config.patch**2, width, (3, 3), key_in)
        self.stages = nnx.List([EncoderStage(width, t, k) for t, k in zip(config.time_pool, keys, strict=True)])
        self.conv_out = Conv(width, config.latent_channels, (3, 3), key_out)


class Decoder(nnx.Module):
    """Latents to frames in [0, 1], before clipping."""

    def __init__(self, config: TinyVAEConfig, key: jax.Array):
        key_in, key_out, *keys = jax.random.split(key, 5)
        widths = config.decoder_widths
        self.conv_in = Conv(config.latent_channels, widths[0], (3, 3), key_in)
        sizes = zip(widths[:-1], widths[1:], config.time_grow, keys, strict=True)
        self.stages = nnx.List([DecoderStage(*size) for size in sizes])
        self.conv_out = Conv(widths[-1], 3 * config.patch**2, (3, 3), key_out)


def _of_stage(memory: Memory, stage: int) -> Memory:
    return memory[BLOCKS * stage : BLOCKS * (stage + 1)]


class TinyVAE(nnx.Module):
    """The tiny autoencoder; a `models.codec.Codec` whose whole-clip passes are one step from the empty state.

    Args:
      config: sizes and dtypes.
      key: weights start as PyTorch's would, with zero biases.
    """

    def __init__(self, config: TinyVAEConfig, key: jax.Array):
        key_encoder, key_decoder = jax.random.split(key)
        self.config = config
        self.encoder = Encoder(config, key_encoder)
        self.decoder = Decoder(config, key_decoder)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def stride(self) -> tuple[int, int, int]:
        return (self.config.time, self.config.side, self.config.side)

    def init_state(self, batch: int) -> Memory:
        """Nothing seen yet; frame size and batch are the first latents'."""
        return ()

    def init_encode_state(self, batch: int) -> EncodeState:
        """Nothing seen yet; frame size and batch are the first frames'."""
        return EncodeState(None, ())

    def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
        """video_BPHWC float32 in [-1, 1], P = 1 + 4 (F - 1), all frames at once; steps need less memory."""
        return self.decode_step(latents_BFHWC, self.init_state(latents_BFHWC.shape[0]))[0]

    def decode_step(self, latents_BFHWC: jax.Array, state: Memory) -> tuple[jax.Array, Memory]:
        """The next F latent frames of a stream as 4 F pixel frames; 1 + 4 (F - 1) on the first step.

        Raises:
          UserError: no frames, or another number of channels.
        """
        if latents_BFHWC.ndim != 5 or latents_BFHWC.shape[-1] != self.latent_channels or not latents_BFHWC.shape[1]:
            raise UserError(f"tiny VAE: latents {latents_BFHWC.shape} need [B,F,H,W,{self.latent_channels}], F > 0")
        dtype, decoder = self.config.precision.compute, self.decoder
        x = jnp.tanh(self.config.precision.to_norm_dtype(latents_BFHWC) / 3) * 3
        x = jax.nn.relu(conv_frames(decoder.conv_in, x, dtype))
        # The first step's frames that nobody sees are left out as soon as no memory needs them.
        early, late = (0, 0) if state else divmod(self.config.time - 1, self.config.time_grow[-1])
        kept: Memory = ()
        for i, stage in enumerate(decoder.stages):
            x, memory = stage.blocks(x, _of_stage(state, i), dtype)
            x = stage.grow(x[:, early:] if i == len(decoder.stages) - 1 else x, dtype)
            kept += memory
        y = conv_frames(decoder.conv_out, jax.nn.relu(x[:, late:]), dtype)
        patch = self.config.patch
        y = rearrange(y.astype(jnp.float32), "b f h w (c p q) -> b f (h p) (w q) c", p=patch, q=patch)
        return jnp.clip(y, 0, 1) * 2 - 1, kept

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        """Normalised latents_BFHWC float32 of a whole clip in [-1, 1], F = 1 + (P - 1) / 4.

        Raises:
          UserError: P is not 1 + 4 n, or what `encode_step` raises.
        """
        if video_BPHWC.ndim != 5 or (video_BPHWC.shape[1] - 1) % self.config.time:
            raise UserError(f"tiny VAE: video {video_BPHWC.shape} needs [B,P,H,W,3], P = 1 + {self.config.time} n")
        filled = self._fill(video_BPHWC)
        return self.encode_step(filled, self.init_encode_state(filled.shape[0]))[0]

    def encode_step(self, video_BPHWC: jax.Array, state: EncodeState) -> tuple[jax.Array, EncodeState]:
        """The next pixel frames of a stream, any number; gives one latent per 4 frames so far, [B, F >= 0, H, W, C].

        Raises:
          UserError: other than 3 channels, or height or width no multiple of 8 (taew2_2: 16).
        """
        shape, side = video_BPHWC.shape, self.config.side
        if len(shape) != 5 or shape[-1] != 3 or any(n % side for n in shape[2:4]):
            raise UserError(f"tiny VAE: video {shape} needs [B,P,H,W,3], H and W multiples of {side}")
        if state.pending_BPHWC is not None:
            video_BPHWC = jnp.concatenate([state.pending_BPHWC, video_BPHWC], axis=1)
        whole = video_BPHWC.shape[1] // self.config.time * self.config.time
        latents, memory = self._encode_groups(video_BPHWC[:, :whole], state.memory)
        return latents, EncodeState(video_BPHWC[:, whole:], memory)

    def encode_end(self, state: EncodeState) -> jax.Array:
        """The last latent of a clip that ends here, [B, 1, H, W, C]; none if no frame is pending.

        Raises:
          UserError: nothing was encoded yet.
        """
        if state.pending_BPHWC is None:
            raise UserError("tiny VAE: no frame was encoded yet; call encode_step first")
        return self._encode_groups(self._fill(state.pending_BPHWC), state.memory)[0]

    def _fill(self, video_BPHWC: jax.Array) -> jax.Array:
        """Copies of the last frame up to a multiple of 4 frames, as the original has it."""
        copies = -video_BPHWC.shape[1] % self.config.time
        return jnp.concatenate([video_BPHWC, jnp.repeat(video_BPHWC[:, -1:], copies, axis=1)], axis=1)

    def _encode_groups(self, video_BPHWC: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        """A multiple of 4 frames."""
        batch, frames, height, width, _ = video_BPHWC.shape
        if not frames:
            side = self.config.side
            return jnp.zeros((batch, 0, height // side, width // side, self.latent_channels), jnp.float32), memory
        dtype, encoder, patch = self.config.precision.compute, self.encoder, self.config.patch
        patches = rearrange((video_BPHWC + 1) / 2, "b f (h p) (w q) c -> b f h w (c p q)", p=patch, q=patch)
        x = jax.nn.relu(conv_frames(encoder.conv_in, patches, dtype))
        kept: Memory = ()
        for i, stage in enumerate(encoder.stages):
            x, last = stage.blocks(stage.shrink(x, dtype), _of_stage(memory, i), dtype)
            kept += last
        return conv_frames(encoder.conv_out, x, dtype).astype(jnp.float32), kept

    def describe(self) -> dict[str, Any]:
        """The codec's description in a manifest; its fingerprint covers all weights."""
        return {
            "name": "tiny_vae",
            "channels": self.latent_channels,
            "stride": list(self.stride),
            "fingerprint": fingerprint(self),
        }


def published_tiny_vae(channels: int) -> TinyVAEConfig:
    """The released one for latents of so many channels: taew2_2's for 48, else taew2_1's."""
    return TinyVAEConfig(latent_channels=48, patch=2) if channels == 48 else TinyVAEConfig()


def abstract_tiny_vae(config: TinyVAEConfig) -> TinyVAE:
    """The tiny autoencoder's structure with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda key: TinyVAE(config, key), jax.random.key(0))


@partial(jax.jit, static_argnames="config")
def make_tiny_vae(config: TinyVAEConfig, key: jax.Array) -> TinyVAE:
    """A random tiny autoencoder in one compiled program."""
    return draw_kernels(abstract_tiny_vae(config), key)
