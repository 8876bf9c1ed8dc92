"""Wan2.2-A14B: two networks of the same sizes as one, and networks that take a picture beside the noisy latents.

A network that takes a picture is called like any other once it has one (`Conditioned`), in all uses of `models.wan` and
`models.context`: the condition of a frame is an input beside that frame's latents, clean or noisy, wherever it is.

References, of Wan2.2's release: `wan/text2video.py`, `WanT2V._prepare_model_for_timestep`; `wan/image2video.py`,
`WanI2V.generate`.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cfjax.flow.guidance import joined
from cfjax.models.cache import KVCache
from cfjax.models.clip import CLIPConfig
from cfjax.models.context import clean_context, forward_fused, forward_kv, forward_observed
from cfjax.models.wan import KV, FrameKV, KvGradient, Wan, WanConfig, embed_text, forward_block, replay, teacher_forced
from cfjax.nn.visibility import FULL, Blocks, Visibility

MASK = 4  # channels: whether each of a latent frame's pixel frames is given


def takes_picture(config: Any) -> bool:
    """Whether a network (its config) takes a mask and a picture's latents beside the noisy ones; a codec does not."""
    return isinstance(config, WanConfig) and config.in_dim == 2 * config.out_dim + MASK


def blank_picture(model: Wan, latent_shape: tuple[int, int, int, int]) -> "Conditioned":
    """A network with a condition of zeros for one video of latents [F, H, W, C], and features of as many tokens as
    ViT-H/14 makes: where it counts how long a pass takes, not what it makes.
    """
    condition = picture_condition(jnp.zeros((1, *latent_shape)))
    width = model.config.image_dim
    return Conditioned(model, condition, jnp.zeros((1, CLIPConfig().tokens, width)) if width else None)


def picture_condition(latents_BFHWC: jax.Array) -> jax.Array:
    """What it takes beside them, [B, F, H, W, 4 + C]: the mask, 1 in the first frame, then the latents.

    Args:
      latents_BFHWC: of the picture and grey frames after it, as many pixel frames as the video has.
    """
    mask = jnp.zeros((*latents_BFHWC.shape[:-1], MASK), latents_BFHWC.dtype).at[:, 0].set(1)
    return jnp.concatenate([mask, latents_BFHWC], axis=-1)


class Conditioned(nnx.Module):
    """An image-to-video network with what it takes beside the noisy latents.

    Attributes:
      network: it.
      condition: `picture_condition`, [B, F, H, W, 4 + C]; a guided batch has it once per prompt.
      image: the picture's features, [B, S, E], of a network that takes some (`models.clip`); else None.
    """

    def __init__(self, network: Wan, condition_BFHWC: jax.Array, image_BSE: jax.Array | None = None):
        self.network, self.condition = network, nnx.Variable(condition_BFHWC)
        self.image = None if image_BSE is None else nnx.Variable(image_BSE)

    @property
    def config(self) -> WanConfig:
        """The network's, as if it took the noisy latents alone."""
        return replace(self.network.config, in_dim=self.network.config.out_dim)

    def __call__(
        self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, visibility: Visibility = FULL
    ) -> jax.Array:
        """The flow of the noisy latents."""
        return self.network(self.beside(latents_BFHWC), sigma_BF, text_kv, visibility)

    def beside(self, latents_BFHWC: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """Latents of the frames from `start` on with the condition of these frames; behind its last frame, that one."""
        once, frames = self.condition[...], latents_BFHWC.shape[1]
        at = jnp.clip(start + jnp.arange(frames), 0, once.shape[1] - 1)
        times = latents_BFHWC.shape[0] // once.shape[0]
        condition = jnp.tile(jnp.take(once, at, axis=1), (times, 1, 1, 1, 1)).astype(latents_BFHWC.dtype)
        return jnp.concatenate([latents_BFHWC, condition], axis=-1)


class Experts(nnx.Module):
    """For samplers that make all frames at once; a pass runs one of the two.

    Attributes:
      low, high: the networks.
      boundary: the noise level from which on the high one is used.
      high_guidance: its scale of guidance; the low one's is the sampler's.
    """

    def __init__(self, low: Wan | Conditioned, high: Wan | Conditioned, boundary: float, high_guidance: float):
        self.low, self.high = low, high
        self.boundary, self.high_guidance = boundary, high_guidance

    @property
    def config(self) -> WanConfig:
        """The sizes of either."""
        return self.low.config

    def guidance(self, sigma: jax.Array, low_guidance: float) -> jax.Array:
        """The scale at a noise level."""
        return jnp.where(sigma >= self.boundary, self.high_guidance, low_guidance)

    def __call__(self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV) -> jax.Array:
        """The flow, by the network of the highest of the frames' noise levels."""
        layers = self.low.config.num_layers
        low, high = jax.tree.map(lambda x: x[:layers], text_kv), jax.tree.map(lambda x: x[layers:], text_kv)
        return jax.lax.cond(
            jnp.max(sigma_BF) >= self.boundary,
            lambda: self.high(latents_BFHWC, sigma_BF, high),
            lambda: self.low(latents_BFHWC, sigma_BF, low),
        )


def with_picture(
    model: Wan | Experts, condition_BFHWC: jax.Array, image_BSE: jax.Array | None = None
) -> Conditioned | Experts:
    """The network, or both of a pair, with the condition and the picture's features, for those that take some."""
    if isinstance(model, Experts):
        given = condition_BFHWC, image_BSE
        low, high = (Conditioned(one, *given) for one in (model.low, model.high))  # type: ignore[arg-type]
        return Experts(low, high, model.boundary, model.high_guidance)
    return Conditioned(model, condition_BFHWC, image_BSE)


@embed_text.register
def _(model: Conditioned, text_BSE: jax.Array) -> KV:  # type: ignore[misc]  # a Wan is expected
    """Of prompts, and of the pictures' features, which every prompt of a guided batch shares."""
    return embed_text(model.network, text_BSE, None if model.image is None else model.image[...])


@embed_text.register
def _(model: Experts, text_BSE: jax.Array) -> KV:  # type: ignore[misc]  # a Wan is expected
    """Keys and values of all layers of the low one, then of the high one."""
    low, high = embed_text(model.low, text_BSE), embed_text(model.high, text_BSE)  # type: ignore[arg-type]
    return joined(low, high)


# ---- causal uses of a network that takes a picture


@teacher_forced.register
def _(  # type: ignore[misc]  # a Wan is expected
    model: Conditioned,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    clean_BFHWC: jax.Array,
    text_kv: KV,
    blocks: Blocks,
    *,
    clean_sigma_BF: jax.Array | None = None,
) -> jax.Array:
    noisy, clean = model.beside(noisy_BFHWC), model.beside(clean_BFHWC)
    return teacher_forced(model.network, noisy, sigma_BF, clean, text_kv, blocks, clean_sigma_BF=clean_sigma_BF)


@forward_block.register
def _(  # type: ignore[misc]
    model: Conditioned,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    return forward_block(model.network, model.beside(latents_BFHWC, start), sigma_BF, text_kv, cache, start, blocks)


@replay.register
def _(  # type: ignore[misc]
    model: Conditioned,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    context: FrameKV,
    blocks: Blocks,
    *,
    kv_gradient: KvGradient = "detached",
    start: jax.Array | None = None,
) -> jax.Array:
    noisy = model.beside(noisy_BFHWC, 0 if start is None else start)
    return replay(model.network, noisy, sigma_BF, text_kv, context, blocks, kv_gradient=kv_gradient, start=start)


@clean_context.register
def _(  # type: ignore[misc]
    model: Conditioned, clean_BFHWC: jax.Array, text_kv: KV, blocks: Blocks, *, sigma_BF: jax.Array | None = None
) -> FrameKV:
    return clean_context(model.network, model.beside(clean_BFHWC), text_kv, blocks, sigma_BF=sigma_BF)


@forward_kv.register
def _(  # type: ignore[misc]
    model: Conditioned,
    clean_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> FrameKV:
    return forward_kv(model.network, model.beside(clean_BFHWC, start), sigma_BF, text_kv, cache, start, blocks)


@forward_observed.register
def _(model: Conditioned, latents_BFHWC: jax.Array, *args: Any) -> tuple[FrameKV, Any]:  # type: ignore[misc]
    start = args[3]  # behind the levels, the text and the cache
    return forward_observed(model.network, model.beside(latents_BFHWC, start), *args)


@forward_fused.register
def _(  # type: ignore[misc]
    model: Conditioned,
    clean_BFHWC: jax.Array,
    clean_sigma_BF: jax.Array,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    clean, noisy = model.beside(clean_BFHWC, start), model.beside(noisy_BFHWC, start + clean_BFHWC.shape[1])
    return forward_fused(model.network, clean, clean_sigma_BF, noisy, sigma_BF, text_kv, cache, start, blocks)
