"""What is before and after a network's blocks: patches, time embedding and rotary table; the head."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from einops import rearrange

from cfjax.core.sharding import constrain
from cfjax.models.actions import rows_of
from cfjax.nn import layers
from cfjax.nn.rope import rope_table, sinusoid

if TYPE_CHECKING:
    from cfjax.models.wan import Wan


def embed_time(model: "Wan", sigma_BF: jax.Array, text_kv: Any = None) -> tuple[jax.Array, jax.Array]:
    """e [B, F, D] (head) and e0 [B, F, 6, D] (blocks); the only place where sigma becomes t = 1000 sigma.

    Args:
      text_kv: with the actions of a network whose embedding of them is added (`models.actions`).
    """
    config = model.config
    norm_dtype = config.precision.norm
    embedding = sinusoid(1000.0 * sigma_BF, config.freq_dim)
    e = model.time_embedding(embedding, norm_dtype)
    if config.actions is not None and config.actions.form == "embedding":
        e = e + model.action_embedding(rows_of(text_kv, config.actions, *sigma_BF.shape)[:, :, -1], norm_dtype)
    e0 = model.time_projection(jax.nn.silu(e), norm_dtype)
    return e, rearrange(e0, "b f (m d) -> b f m d", m=6)


def embed_frames(
    model: "Wan", latents_BFHWC: jax.Array, sigma_BF: jax.Array, position_F: jax.Array, text_kv: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """What the blocks take: the stream [B, F, T, D], `embed_time`'s two, and the rotary table [F, T, K/2] of each."""
    config = model.config
    ph, pw = config.patch
    height, width = latents_BFHWC.shape[2] // ph, latents_BFHWC.shape[3] // pw
    config.tokens_per_frame(*latents_BFHWC.shape[2:4])
    patches = rearrange(latents_BFHWC, "b f (h p) (w q) c -> b f (h w) (c p q)", p=ph, q=pw)
    patches = constrain(patches, "batch", None, "tokens", None)
    stream = config.precision.to_norm_dtype(model.patch_embedding(patches, config.precision.compute))
    e_BFD, e0_BF6D = embed_time(model, sigma_BF, text_kv)
    flat_table = rope_table(position_F, height, width, config.head_dim)
    table = tuple(rearrange(x, "(f t) k -> f t k", f=position_F.shape[0]) for x in flat_table)
    return stream, e_BFD, e0_BF6D, table


@jax.named_scope("head")
def flow_of(model: "Wan", stream_BFTD: jax.Array, e_BFD: jax.Array, height: int, width: int) -> jax.Array:
    """The head: from the last stream to the flow of latents of this height and width, float32."""
    config = model.config
    head_modulation = config.precision.to_norm_dtype(model.head_modulation[...])[None, None] + e_BFD[:, :, None]
    shift, scale = jnp.split(head_modulation, 2, axis=2)
    h = layers.layer_norm(stream_BFTD, config.eps, config.precision) * (1 + scale) + shift
    out = constrain(model.head(h, config.precision.compute).astype(jnp.float32), "batch", None, None, None)
    ph, pw = config.patch
    return rearrange(out, "b f (h w) (p q c) -> b f (h p) (w q) c", h=height // ph, w=width // pw, p=ph, q=pw)
