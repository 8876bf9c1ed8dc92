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

from cfjax.core.bits import from_bits
from cfjax.nn.frames import attend_prefix, constrain_kv, group_lengths, put_frames
from cfjax.nn.visibility import Blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of clean frames, [L, B, slots, tokens, N, K], and the frame in each slot (-1: empty)."""

    k_LBFTNK: jax.Array
    v_LBFTNK: jax.Array
    frame_F: jax.Array


def init_cache(config: Any, batch: int, num_frames: int, tokens_per_frame: int, blocks: Blocks, width: int = 0) -> Any:
    """An empty cache for videos of `num_frames` latent frames (only `blocks.window` slots when there is a window).

    With a memory policy, its state.

    Args:
      config: a WanConfig (layers, heads, head dim, compute dtype).
      width: tokens of a row of a frame, for memory policies that need it.
    """
    if blocks.memory is not None:
        return blocks.memory.init(config, batch, tokens_per_frame, blocks, width)
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


@dataclass(frozen=True)
class View:
    """What one block reads: a layer's slots with the block's own frames written into them, visible up to a point.

    With its own frames in their slots (those of frames that no later block sees), a block sees a prefix of the slots,
    whatever the window: no mask (unless lengths are grouped), no concatenation. See `nn.frames.attend_prefix`.

    Attributes:
      stop: the frame that the block ends before, traced.
      slots: of the cache.
      blocks: layout and window.
      lengths: every length that the visible prefix may have, in frames, ascending; grouped if they are many.
      exact: whether they are not grouped.
    """

    stop: jax.Array
    slots: int
    blocks: Blocks
    lengths: tuple[int, ...]
    exact: bool

    @property
    def oldest(self) -> jax.Array:
        """First frame behind the sink that is read: not 0 where more frames than the window are kept (self-rollout)."""
        blocks = self.blocks
        if not blocks.window or self.slots <= blocks.window:
            return jnp.int32(blocks.sink)
        return jnp.maximum(blocks.sink, self.stop - (blocks.window - blocks.sink))

    @property
    def visible(self) -> jax.Array:
        """Number of first frames of `read`'s result that the block sees."""
        return jnp.minimum(self.stop - (self.oldest - self.blocks.sink), self.lengths[-1])

    def read(self, past_LBFTNK: jax.Array, layer: jax.Array | int, own_BFTNK: jax.Array, length: int) -> jax.Array:
        """The first `length` frames of a layer's keys or values, [B, length, T, N, K]: past ones and own.

        Args:
          own_BFTNK: the frames before `stop`. There may be more than the block's: those of the block before it, which
            is not in the cache yet.
          length: one of `lengths` that is no less than `visible`.
        """
        blocks, oldest = self.blocks, self.oldest
        own = own_BFTNK[:, -length:]  # a shorter prefix is the first, single frame's, which no longer block reads

        def cut(start: jax.Array | int, frames: int) -> jax.Array:
            sizes = (1, past_LBFTNK.shape[1], frames, *past_LBFTNK.shape[3:])
            return jax.lax.dynamic_slice(past_LBFTNK, (layer, 0, start, 0, 0, 0), sizes)[0]

        kept_whole = bool(blocks.window) and self.slots > blocks.window
        if kept_whole:
            parts = [cut(0, min(blocks.sink, length)), cut(oldest, max(length - blocks.sink, 0))]
            past = jnp.concatenate(parts, axis=1) if blocks.sink else parts[1]
        else:
            past = cut(0, length)
        past = from_bits(past).astype(own.dtype)
        if not blocks.window:
            return put_frames(past, own, self.stop - own.shape[1])
        for i in range(own.shape[1]):  # a ring may wrap inside a block
            frame, last = self.stop - own.shape[1] + i, own[:, i : i + 1]
            if kept_whole:
                slot = jnp.where(frame < blocks.sink, frame, frame - (oldest - blocks.sink))
            else:
                slot = slot_of(frame, self.slots, blocks)
            if i < own.shape[1] - (blocks.window - blocks.sink):  # outside the window, unless it is of the sink
                slot = jnp.minimum(frame, max(blocks.sink - 1, 0))
                known = jax.lax.dynamic_slice_in_dim(past, slot, 1, 1)
                last = jnp.where(frame < blocks.sink, last, known)
            past = put_frames(past, last, slot)
        return past


def view(slots: int, stop: jax.Array, blocks: Blocks, *, first_stop: int = 0) -> View:
    """What the block that ends before frame `stop` (traced, where a block of `blocks` ends) reads of a cache.

    Args:
      slots: of the cache: all frames, or `blocks.window` (a ring).
      first_stop: the least `stop` that occurs.
    """
    capacity = min(slots, blocks.window) if blocks.window else slots
    first = 1 if blocks.independent_first_frame else blocks.frames
    stops = [stop for stop in range(first, capacity, blocks.frames) if stop >= min(first_stop, capacity)]
    return View(stop, slots, blocks, *group_lengths([*stops, capacity]))


def longest_share(num_frames: int, blocks: Blocks) -> float:
    """Share of the blocks of a video that see the longest prefix of its cache; the others see each of the rest."""
    number = len(blocks.spans(num_frames))
    if blocks.memory is not None:
        shorter = blocks.memory.shorter_prefixes(blocks)
        return (number - shorter) / number if number > shorter else 1 / (shorter + 1)
    shorter = len(view(num_frames, jnp.int32(0), blocks).lengths) - 1
    return (number - shorter) / number if number > shorter and blocks.window else 1 / (shorter + 1)


def attend_past(
    q_BFTNK: jax.Array,
    k_BFTNK: jax.Array,
    v_BFTNK: jax.Array,
    past: tuple[Any, Any, jax.Array | int],
    seen: View,
    *,
    backend: str = "auto",
) -> jax.Array:
    """A block's queries attend to what they see of the past, and to the own frames.

    Args:
      past: keys and values of all layers, [L, B, F, T, N, K] (their bits: `core.bits`), and the layer.
    """
    keys, values, layer = past

    def read(length: int) -> tuple[jax.Array, jax.Array]:
        return seen.read(keys, layer, k_BFTNK, length), seen.read(values, layer, v_BFTNK, length)

    return attend_prefix(q_BFTNK, read, seen.visible, seen.lengths, exact=seen.exact, backend=backend)


def slot_of(frame: jax.Array, slots: int, blocks: Blocks) -> jax.Array:
    """The slot of a frame: the sink in the first slots, the others in a ring buffer behind it."""
    ring = slots - blocks.sink
    return jnp.where(frame < blocks.sink, frame, blocks.sink + (frame - blocks.sink) % ring)


def write(
    cache: KVCache,
    kv: Any,
    start: jax.Array,
    num_frames: int,
    blocks: Blocks,
    *,
    text_kv: Any = None,
    observed: Any = None,
) -> KVCache:
    """The cache after committing the block [start, start + num_frames) with keys and values `kv`.

    `text_kv`: the prompt's keys and values, of which some memory policies take the mean. `observed`: what they ask of
    the block's queries.
    """
    if blocks.memory is not None:
        text_LBNK = None if text_kv is None else jnp.mean(text_kv.k_LBSNK, axis=2)
        return blocks.memory.commit(cache, kv.k_LBFTNK, kv.v_LBFTNK, start, text_LBNK, observed)
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
