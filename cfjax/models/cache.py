"""The KV cache: an immutable pytree with a frame index per slot. Denoising reads it; only `write` makes a new one.

A slot holds one latent frame's tokens of every layer. Without a window, slot = frame. With a window of w frames (s of
them sink) the first s slots keep the sink and the rest are a ring, so memory stays constant on endless videos. Which
slots a block sees follows from their frame indices alone, so the order of the slots never matters: keys carry their
absolute RoPE position.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from cfjax.nn.frames import constrain_kv
from cfjax.nn.visibility import Blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of clean frames, [L, B, slots, tokens, N, K], and the frame in each slot (-1: empty)."""

    k_LBFTNK: jax.Array
    v_LBFTNK: jax.Array
    frame_F: jax.Array


def init_cache(config: Any, batch: int, num_frames: int, tokens_per_frame: int, blocks: Blocks) -> KVCache:
    """An empty cache for videos of `num_frames` latent frames (only `blocks.window` slots when there is a window).

    Args:
      config: a WanConfig (layers, heads, head dim, compute dtype).
    """
    slots = min(blocks.window, num_frames) if blocks.window else num_frames
    shape = (config.num_layers, batch, slots, tokens_per_frame, config.num_heads, config.head_dim)
    # Two buffers: a cache is donated, and one buffer cannot be donated twice.
    k, v = (constrain_kv(jnp.zeros(shape, config.precision.compute)) for _ in range(2))
    return KVCache(k, v, jnp.full((slots,), -1, jnp.int32))


def visible_frames(cache: KVCache, start: jax.Array, stop: jax.Array, blocks: Blocks) -> jax.Array:
    """Which slots the block [start, stop) sees, bool [slots]: `Blocks.visible_before` for traced positions."""
    frame = cache.frame_F
    past = (frame >= 0) & (frame < start)
    if not blocks.window:
        return past
    recent = frame >= stop - (blocks.window - blocks.sink)
    return past & (recent | (frame < blocks.sink))


def slot_of(frame: jax.Array, slots: int, blocks: Blocks) -> jax.Array:
    """The slot of a frame: the sink in the first slots, the others in a ring buffer behind it."""
    ring = slots - blocks.sink
    return jnp.where(frame < blocks.sink, frame, blocks.sink + (frame - blocks.sink) % ring)


def write(cache: KVCache, kv: Any, start: jax.Array, num_frames: int, blocks: Blocks) -> KVCache:
    """The cache after committing the block [start, start + num_frames) with keys and values `kv`."""
    slots = cache.frame_F.shape[0]
    k, v, frame_F = cache.k_LBFTNK, cache.v_LBFTNK, cache.frame_F

    def put(whole: jax.Array, part: jax.Array, slot: jax.Array) -> jax.Array:
        return constrain_kv(jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), slot, axis=2))

    if not blocks.window:
        slot = start
        k, v = put(k, kv.k_LBFTNK, slot), put(v, kv.v_LBFTNK, slot)
        frame_F = jax.lax.dynamic_update_slice_in_dim(frame_F, start + jnp.arange(num_frames, dtype=jnp.int32), slot, 0)
        return replace(cache, k_LBFTNK=k, v_LBFTNK=v, frame_F=frame_F)
    for i in range(num_frames):  # the ring may wrap inside a block
        slot = slot_of(start + i, slots, blocks)
        k, v = put(k, kv.k_LBFTNK[:, :, i : i + 1], slot), put(v, kv.v_LBFTNK[:, :, i : i + 1], slot)
        frame_F = frame_F.at[slot].set(start + i)
    return replace(cache, k_LBFTNK=k, v_LBFTNK=v, frame_F=frame_F)
