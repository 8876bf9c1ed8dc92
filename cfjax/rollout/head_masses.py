"""How the attention of every layer and head is spread over key frames, when the last block of a video is denoised."""

from functools import partial

import jax
import jax.numpy as jnp

from cfjax.flow.path import add_noise
from cfjax.memory.profile import frame_masses
from cfjax.models.cache import init_cache, write
from cfjax.models.context import clean_context, forward_observed
from cfjax.models.wan import KV, FrameKV, Wan
from cfjax.nn.visibility import Blocks


@partial(jax.jit, static_argnames="blocks")
def last_block_mass(
    model: Wan, clean_BFHWC: jax.Array, noise_BFHWC: jax.Array, sigma: jax.Array, text_kv: KV, *, blocks: Blocks
) -> jax.Array:
    """Mean attention of each of the last block's frames to every key frame, [L, B, N, F, F], float32.

    It sums to 1 over the last axis.

    The block sees all frames before it, without noise, and its own, whatever window the network was trained with.

    Args:
      clean_BFHWC: a video's latents.  noise_BFHWC: of the last block, which is brought to the level `sigma`.
    """
    config, frames = model.config, clean_BFHWC.shape[1]
    layout = Blocks(blocks.frames, independent_first_frame=blocks.independent_first_frame)
    start = layout.spans(frames)[-1][0]
    past, last = clean_BFHWC[:, :start], clean_BFHWC[:, start:]
    tokens = config.tokens_per_frame(*clean_BFHWC.shape[2:4])
    cache = init_cache(config, len(clean_BFHWC), frames, tokens, layout)
    context = clean_context(model, past, text_kv, layout) if start else None
    if context is not None:
        cache = write(cache, FrameKV(*context), jnp.int32(0), start, layout)

    def observe(q: jax.Array, k: jax.Array, layer: jax.Array) -> jax.Array:
        keys = [k] if context is None else [jax.lax.dynamic_index_in_dim(context.k_LBFTNK, layer, keepdims=False), k]
        return frame_masses(q, jnp.concatenate(keys, axis=1))

    noisy = add_noise(last, noise_BFHWC, sigma)
    sigma_BF = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), noisy.shape[:2])
    return forward_observed(model, noisy, sigma_BF, text_kv, cache, jnp.int32(start), layout, observe)[1]
