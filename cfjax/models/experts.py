"""Wan2.2-A14B: two networks of the same sizes as one, and networks that take a picture beside the noisy latents.

References, of Wan2.2's release: `wan/text2video.py`, `WanT2V._prepare_model_for_timestep`; `wan/image2video.py`,
`WanI2V.generate`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from cfjax.models.wan import KV, Wan, WanConfig, embed_text

MASK = 4  # channels: whether each of a latent frame's pixel frames is given


def takes_picture(config: WanConfig) -> bool:
    """Whether a network takes a mask and a picture's latents beside the noisy ones."""
    return config.in_dim == 2 * config.out_dim + MASK


def picture_condition(latents_BFHWC: jax.Array) -> jax.Array:
    """What it takes beside them, [B, F, H, W, 4 + C]: the mask, 1 in the first frame, then the latents.

    Args:
      latents_BFHWC: of the picture and grey frames after it, as many pixel frames as the video has.
    """
    mask = jnp.zeros((*latents_BFHWC.shape[:-1], MASK), latents_BFHWC.dtype).at[:, 0].set(1)
    return jnp.concatenate([mask, latents_BFHWC], axis=-1)


class Conditioned(nnx.Module):
    """An image-to-video network with what it takes beside the noisy latents, for samplers that make all frames at once.

    Attributes:
      network: it.
      condition: `picture_condition`, [B, F, H, W, 4 + C]; a guided batch has it once per prompt.
    """

    def __init__(self, network: Wan, condition_BFHWC: jax.Array):
        self.network, self.condition = network, nnx.Variable(condition_BFHWC)

    @property
    def config(self) -> WanConfig:
        """The network's, as if it took the noisy latents alone."""
        return replace(self.network.config, in_dim=self.network.config.out_dim)

    def __call__(self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV) -> jax.Array:
        """The flow of the noisy latents."""
        once = self.condition[...]
        condition = jnp.tile(once, (latents_BFHWC.shape[0] // once.shape[0], 1, 1, 1, 1))
        return self.network(jnp.concatenate([latents_BFHWC, condition], axis=-1), sigma_BF, text_kv)


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
        low, high = (KV(*(x[part] for x in text_kv)) for part in (slice(layers), slice(layers, None)))
        return jax.lax.cond(
            jnp.max(sigma_BF) >= self.boundary,
            lambda: self.high(latents_BFHWC, sigma_BF, high),
            lambda: self.low(latents_BFHWC, sigma_BF, low),
        )


def with_picture(model: Wan | Experts, condition_BFHWC: jax.Array) -> Conditioned | Experts:
    """The network, or both of a pair, with the condition."""
    if isinstance(model, Experts):
        low, high = (Conditioned(one, condition_BFHWC) for one in (model.low, model.high))  # type: ignore[arg-type]
        return Experts(low, high, model.boundary, model.high_guidance)
    return Conditioned(model, condition_BFHWC)


@embed_text.register
def _(model: Conditioned, text_BSE: jax.Array) -> KV:  # type: ignore[misc]  # a Wan is expected
    return embed_text(model.network, text_BSE)


@embed_text.register
def _(model: Experts, text_BSE: jax.Array) -> KV:  # type: ignore[misc]  # a Wan is expected
    """Keys and values of all layers of the low one, then of the high one."""
    low, high = embed_text(model.low, text_BSE), embed_text(model.high, text_BSE)  # type: ignore[arg-type]
    return KV(*(jnp.concatenate(pair) for pair in zip(low, high, strict=True)))
