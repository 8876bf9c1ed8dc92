"""A stream: the same two moves as `generate`, one jitted call per block, pixels out as soon as a block is done.

Memory is constant when the blocks have a window; without one the cache holds `num_frames`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.models.cache import KVCache, init_cache
from cfjax.models.wan import KV, Wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.generate import FewStep, few_step_block


class StreamCodec(Protocol):
    """The half of a codec that streaming needs."""

    def init_state(self, batch: int) -> Any: ...

    def decode_step(self, latents_BFHWC: jax.Array, state: Any) -> tuple[jax.Array, Any]: ...


def block_noise(key: jax.Array, block: int, shape: tuple[int, ...], steps: int) -> tuple[jax.Array, jax.Array]:
    """The noise a block starts from, [B, F, H, W, C], and the fresh noise between its steps, [J, B, F, H, W, C]."""
    key_start, key_fresh = jax.random.split(jax.random.fold_in(key, block))
    fresh = jax.random.normal(key_fresh, (max(steps - 1, 1), *shape), jnp.float32)
    return jax.random.normal(key_start, shape, jnp.float32), fresh


@partial(jax.jit, static_argnames=("sigmas", "blocks"), donate_argnames="cache")
def _next_block(
    model: Wan,
    noise: jax.Array,
    fresh: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    *,
    sigmas: tuple[float, ...],
    blocks: Blocks,
) -> tuple[jax.Array, KVCache]:
    x0 = few_step_block(model, noise, fresh, sigmas, text_kv, cache, start, blocks)
    return x0, commit_block(model, x0, text_kv, cache, start, blocks)


_decode_step = jax.jit(lambda codec, latents, state: codec.decode_step(latents, state))


def stream(
    model: Wan,
    codec: StreamCodec,
    text_kv: KV,
    key: jax.Array,
    sampler: FewStep,
    blocks: Blocks,
    *,
    num_frames: int,
    latent_shape: tuple[int, int, int],
    batch: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (video_BPHWC, latents_BFHWC) block after block, on the host.

    Args:
      num_frames: latent frames in all.
      latent_shape: (H, W, C) of a latent frame.
    """
    height, width, _ = latent_shape
    cache = init_cache(model.config, batch, num_frames, model.config.tokens_per_frame(height, width), blocks)
    state = codec.init_state(batch)
    for index, (start, stop) in enumerate(blocks.spans(num_frames)):
        sigmas = sampler.first_sigmas() if index == 0 else sampler.sigmas()
        shape = (batch, stop - start, *latent_shape)
        noise, fresh = block_noise(key, index, shape, len(sigmas))
        x0, cache = _next_block(
            model, noise, fresh, text_kv, cache, jnp.int32(start), sigmas=tuple(map(float, sigmas)), blocks=blocks
        )
        video, state = _decode_step(codec, x0, state)
        yield np.asarray(video), np.asarray(x0)
