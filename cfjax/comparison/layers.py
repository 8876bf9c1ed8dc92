"""Outputs of every layer of the video network, to find the first at which two implementations differ."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import ArrayLike

from cfjax.models.ends import embed_time
from cfjax.models.wan import KV, Wan, attend_by, backbone, embed_text
from cfjax.nn.visibility import FULL, Visibility


@partial(jax.jit, static_argnames=("visibility", "frames"))
def _streams(
    model: Wan,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    position_F: jax.Array,
    visibility: Visibility,
    frames: int,
) -> jax.Array:
    """The stream that leaves every block, [L, B, F, T, D]."""
    self_attend = attend_by(visibility, frames, model.config)
    leaving = lambda stream, _: stream
    return backbone(model, latents_BFHWC, sigma_BF, text_kv, position_F, self_attend, tap=leaving)[1]


@jax.jit
def _before_blocks(
    model: Wan, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_BSE: jax.Array, image_BSE: jax.Array | None
) -> tuple[dict[str, jax.Array], KV]:
    """The embeddings by name, and the text's keys and values of all blocks."""
    config = model.config
    ph, pw = config.patch
    patches = rearrange(latents_BFHWC, "b f (h p) (w q) c -> b f (h w) (c p q)", p=ph, q=pw)
    e_BFD, e0_BF6D = embed_time(model, sigma_BF)
    embeddings = {
        "patch_embedding": config.precision.to_norm_dtype(model.patch_embedding(patches, config.precision.compute)),
        "time_embedding": e_BFD,
        "time_projection": e0_BF6D,
        "text_embedding": model.text_embedding(text_BSE, config.precision.compute),
    }
    return embeddings, embed_text(model, text_BSE, image_BSE)


def layer_outputs(
    model: Wan,
    latents_BFHWC: ArrayLike,
    sigma_BF: ArrayLike,
    text_BSE: ArrayLike,
    visibility: Visibility = FULL,
    clean_BFHWC: ArrayLike | None = None,
    image_BSE: ArrayLike | None = None,
) -> dict[str, np.ndarray]:
    """Outputs in the order they are computed: the four embeddings, then "blocks.0", "blocks.1" ...

    Shapes: patch_embedding and blocks [B, F, T, D], time_embedding [B, F, D], time_projection [B, F, 6, D],
    text_embedding [B, S, D].

    Args:
      image_BSE: a picture's features, of networks that take some.
      clean_BFHWC: the clean half of a teacher-forced pass, at sigma 0; F is then that of [clean, noisy].
    """
    latents_BFHWC, sigma_BF, text_BSE = (jnp.asarray(x, jnp.float32) for x in (latents_BFHWC, sigma_BF, text_BSE))
    frames = latents_BFHWC.shape[1]
    position_F = jnp.arange(frames)
    if clean_BFHWC is not None:
        latents_BFHWC = jnp.concatenate([jnp.asarray(clean_BFHWC), latents_BFHWC], axis=1)
        sigma_BF = jnp.concatenate([jnp.zeros_like(sigma_BF), sigma_BF], axis=1)
        position_F = jnp.tile(position_F, 2)
    image = None if image_BSE is None else jnp.asarray(image_BSE)
    outputs, text_kv = _before_blocks(model, latents_BFHWC, sigma_BF, text_BSE, image)
    streams = _streams(model, latents_BFHWC, sigma_BF, text_kv, position_F, visibility, frames)
    outputs |= {f"blocks.{layer}": stream for layer, stream in enumerate(streams)}
    return {name: np.asarray(x) for name, x in outputs.items()}
