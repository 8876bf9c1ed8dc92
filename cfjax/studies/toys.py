"""Toy networks with the interface of `models.wan`, so that every objective and rollout accepts them.

A video is [B, F, 1, 1, C], a block is one frame. In place of the keys and values of the past there
are the clean frames themselves and their noise levels, in the same caches. Text is ignored.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.precision import Policy
from cfjax.models.cache import KVCache, write
from cfjax.models.context import clean_context, forward_fused, forward_kv
from cfjax.models.wan import KV, FrameKV, embed_text, forward_block, replay, teacher_forced
from cfjax.nn.layers import Init, Linear, xavier_uniform, zeros
from cfjax.nn.visibility import FULL, Blocks, Visibility
from cfjax.studies.laws import Law, joint_velocity, velocity

FRAMEWISE = Blocks(frames=1)


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a toy network, with the fields of a WanConfig that caches ask for."""

    frames: int
    width: int = 96
    num_layers: int = 1
    num_heads: int = 1
    head_dim: int = 1
    precision: Policy = field(default_factory=Policy)

    def tokens_per_frame(self, height: int, width: int) -> int:
        """A frame is one token."""
        return height * width

    def tokens_per_row(self, width: int) -> int:
        return width


class Toy:
    """A network that predicts frames given their clean past, or is called on a whole video."""

    config: ToyConfig

    def given(
        self,
        x_BFC: jax.Array,
        sigma_BF: jax.Array,
        past_BIC: jax.Array,
        past_sigma_BI: jax.Array,
        position_F: jax.Array,
    ) -> jax.Array:
        """Flow [B, F, C] of the frames at `position`, each given those of the I past frames that precede it.

        `past_sigma` is the noise level of the past: 0 when it is clean.

        Raises:
          UserError: a network that sees all frames at once.
        """
        raise UserError(f"{type(self).__name__} sees all frames at once: it has no block given a clean past")


def _given(model: Toy, x: jax.Array, sigma_BF: jax.Array, past: FrameKV, position_F: jax.Array) -> jax.Array:
    known, past_sigma = past.k_LBFTNK[0, :, :, 0, 0], past.v_LBFTNK[0, :, :, 0, 0, 0]
    return model.given(x[:, :, 0, 0], sigma_BF, known, past_sigma, position_F)[:, :, None, None]


def _frames(x_BFHWC: jax.Array, sigma_BF: jax.Array) -> FrameKV:
    """Frames as the keys of one layer, their levels as values."""
    keys = x_BFHWC[None]
    return FrameKV(keys, jnp.broadcast_to(sigma_BF[None, :, :, None, None, None], keys.shape))


def _framewise(blocks: Blocks) -> None:
    if blocks != FRAMEWISE:
        raise UserError(f"toy networks are frame-wise and see the whole past: use Blocks(frames=1), not {blocks}")


@embed_text.register
def _(model: Toy, text_BSE: jax.Array) -> KV:  # type: ignore[misc]  # a Wan is expected
    nothing = jnp.zeros((1, text_BSE.shape[0], 1, 1, 1))
    return KV(nothing, nothing)


@clean_context.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Toy, clean_BFHWC: jax.Array, text_kv: KV, blocks: Blocks, *, sigma_BF: jax.Array | None = None
) -> FrameKV:
    _framewise(blocks)
    return _frames(clean_BFHWC, jnp.zeros(clean_BFHWC.shape[:2]) if sigma_BF is None else sigma_BF)


@teacher_forced.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Toy,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    clean_BFHWC: jax.Array,
    text_kv: KV,
    blocks: Blocks,
    *,
    clean_sigma_BF: jax.Array | None = None,
) -> jax.Array:
    context = clean_context(model, clean_BFHWC, text_kv, blocks, sigma_BF=clean_sigma_BF)  # type: ignore[arg-type]
    return _given(model, noisy_BFHWC, sigma_BF, context, jnp.arange(noisy_BFHWC.shape[1]))


@replay.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Toy,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    context: FrameKV,
    blocks: Blocks,
    *,
    kv_gradient: str = "detached",
    start: jax.Array | None = None,
) -> jax.Array:
    _framewise(blocks)
    if kv_gradient != "detached":
        raise UserError(f"kv_gradient={kv_gradient!r}: toy networks have no keys to send a gradient to; use detached")
    position_F = jnp.arange(noisy_BFHWC.shape[1]) + (0 if start is None else start)
    return _given(model, noisy_BFHWC, sigma_BF, jax.lax.stop_gradient(context), position_F)


@forward_block.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Toy,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    _framewise(blocks)
    past = FrameKV(cache.k_LBFTNK, cache.v_LBFTNK)
    flow = _given(model, latents_BFHWC, sigma_BF, past, start + jnp.arange(latents_BFHWC.shape[1]))
    return flow, _frames(latents_BFHWC, sigma_BF)


@forward_kv.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Toy,
    clean_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> FrameKV:
    _framewise(blocks)
    return _frames(clean_BFHWC, sigma_BF)


@forward_fused.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Toy,
    clean_BFHWC: jax.Array,
    clean_sigma_BF: jax.Array,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    own = _frames(clean_BFHWC, clean_sigma_BF)
    known = write(cache, own, start, clean_BFHWC.shape[1], blocks)
    return forward_block(model, noisy_BFHWC, sigma_BF, text_kv, known, start + 1, blocks)[0], own  # type: ignore[arg-type]


class Student(nnx.Module, Toy):
    """v(x^i, s, past, i) by an MLP of three hidden layers on (x^i, s, masked past and its levels, one-hot i)."""

    def __init__(self, config: ToyConfig, key: jax.Array):
        self.config = config
        self.mlp = Layers(2 + 3 * config.frames, config.width, 1, key)

    def given(
        self,
        x_BFC: jax.Array,
        sigma_BF: jax.Array,
        past_BIC: jax.Array,
        past_sigma_BI: jax.Array,
        position_F: jax.Array,
    ) -> jax.Array:
        """See `Toy.given`."""
        index = jnp.arange(past_BIC.shape[1])
        before = (index[None] < position_F[:, None]).astype(jnp.float32)[None]  # [1, F, I]
        here = (index[None] == position_F[:, None]).astype(jnp.float32)[None]
        shape = (*x_BFC.shape[:2], index.shape[0])
        inputs = [
            x_BFC,
            sigma_BF[:, :, None],
            past_BIC[:, None, :, 0] * before,
            past_sigma_BI[:, None] * before,
            jnp.broadcast_to(here, shape),
        ]
        return self.mlp(jnp.concatenate(inputs, axis=-1))

    def __call__(
        self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, visibility: Visibility = FULL
    ) -> jax.Array:
        """Diffusion forcing: each frame given the earlier ones at their own levels.

        Raises:
          UserError: a full visibility, which this network has not.
        """
        if visibility.kind != "block_causal":
            raise UserError(f"a causal toy network has no visibility {visibility.kind!r}")
        _framewise(visibility.blocks)
        own = _frames(latents_BFHWC, sigma_BF)
        return _given(self, latents_BFHWC, sigma_BF, own, jnp.arange(latents_BFHWC.shape[1]))


class Critic(nnx.Module, Toy):
    """v(x, s) of a whole video by an MLP: a bidirectional network, for the fake score."""

    def __init__(self, config: ToyConfig, key: jax.Array):
        self.config = config
        self.mlp = Layers(config.frames + 1, config.width, config.frames, key)

    def __call__(
        self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, visibility: Visibility = FULL
    ) -> jax.Array:
        """Flow of every frame; the level is the first frame's, one for all."""
        inputs = jnp.concatenate([latents_BFHWC[:, :, 0, 0, 0], sigma_BF[:, :1]], axis=-1)
        return self.mlp(inputs)[:, :, None, None, None]


class Layers(nnx.Module):
    """Three hidden layers with SiLU; the last starts at zero, as Wan's head does."""

    def __init__(self, inputs: int, width: int, outputs: int, key: jax.Array):
        keys = jax.random.split(key, 4)
        layer: Any = lambda i, o, k, init: Linear(i, o, k, kernel_init=init)
        init: Init = xavier_uniform
        self.first, self.second = layer(inputs, width, keys[0], init), layer(width, width, keys[1], init)
        self.third, self.last = layer(width, width, keys[2], init), layer(width, outputs, keys[3], zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The last axis is the layers' own."""
        for layer in (self.first, self.second, self.third):
            x = jax.nn.silu(layer(x, "float32"))
        return self.last(x, "float32")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Exact(Toy):
    """A teacher whose velocity is the law's own.

    Called on a whole video it is the bidirectional teacher. Given a clean past it is the autoregressive one, or sees
    `ahead` noisy future frames as well. Those are the later frames of the same noisy video, unless the video has
    ahead + 1 channels, which then hold frame i and the frames after it, noised as frame i's own window: so solved, a
    frame's ODE carries its future along. Channels beyond the last frame are padding, whose flow is 0.
    """

    law: Law
    ahead: int = 0

    @property
    def config(self) -> ToyConfig:  # type: ignore[override]
        """One token per frame."""
        return ToyConfig(self.law.frames, head_dim=1)

    def given(
        self,
        x_BFC: jax.Array,
        sigma_BF: jax.Array,
        past_BIC: jax.Array,
        past_sigma_BI: jax.Array,
        position_F: jax.Array,
    ) -> jax.Array:
        """See `Toy.given`; all F frames of the law at once, whatever `position` says of them."""
        frames, channels = self.law.frames, x_BFC.shape[2]
        flows = []
        for i in range(frames):
            stop = min(i + self.ahead + 1, frames)
            window = x_BFC[:, i:stop, 0] if channels == 1 else x_BFC[:, i, : stop - i]
            flow = velocity(self.law, i, window, sigma_BF[:, i], past_BIC[:, :i, 0])
            flow = flow[:, :channels]
            flows.append(jnp.pad(flow, ((0, 0), (0, channels - flow.shape[1]))))
        return jnp.stack(flows, axis=1)

    def __call__(
        self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, visibility: Visibility = FULL
    ) -> jax.Array:
        """All frames together, at the first frame's level."""
        return joint_velocity(self.law, latents_BFHWC[:, :, 0, 0, 0], sigma_BF[:, 0])[:, :, None, None, None]


def windows(x_BF: jax.Array, ahead: int) -> jax.Array:
    """[B, F, 1, 1, ahead + 1]: every frame with those that follow, zeros past the end; see `Exact`."""
    padded = jnp.pad(x_BF, ((0, 0), (0, ahead)))
    stacked = jnp.stack([padded[:, c : c + x_BF.shape[1]] for c in range(ahead + 1)], axis=-1)
    return stacked[:, :, None, None]
