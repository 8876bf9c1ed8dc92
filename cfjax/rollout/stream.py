"""Streaming: `generate`'s two operations, a jitted call or two per block, pixels as soon as a block is done.

Memory is constant when the blocks have a window; without one the cache holds `num_frames`. Every sampler streams:
few-step, many-step with both prompts' caches side by side, and a bidirectional one as a single block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.models.cache import KVCache, init_cache
from cfjax.models.wan import KV, Wan, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import (
    FusedCommit,
    commit_block,
    commit_given,
    fuses,
    given_blocks,
    last_block_of,
    layout_from,
)
from cfjax.rollout.generate import (
    FewStep,
    ManyStep,
    both_prompts,
    few_step_block,
    fused_block,
    generate_bidirectional,
    layout_of,
    many_step_block,
)
from cfjax.rollout.rolling import Place, Window, empty_window, roll

# (absolute block index, shape [B, F, H, W, C], steps) -> (starting noise, fresh noise [steps - 1, B, F, H, W, C])
Noise = Callable[[int, tuple[int, ...], int], tuple[jax.Array, jax.Array]]
# Calls a jitted function; `core.programs.Programs` measures what compiling it costs.
Call = Callable[..., Any]


class StreamCodec(Protocol):
    """The part of a codec that streaming needs."""

    def init_state(self, batch: int) -> Any: ...

    def decode_step(self, latents_BFHWC: jax.Array, state: Any) -> tuple[jax.Array, Any]: ...


@dataclass(frozen=True)
class Pipeline:
    """From text to video: network, decoder, sampler and block layout (None: bidirectional, one block).

    `fused_commit`: whether a few-step block's first pass commits the block before it; "auto" is by platform.
    """

    model: Wan
    codec: StreamCodec
    sampler: FewStep | ManyStep
    blocks: Blocks | None
    fused_commit: FusedCommit = "auto"


def block_noise(
    key: jax.Array, block: int | jax.Array, shape: tuple[int, ...], steps: int
) -> tuple[jax.Array, jax.Array]:
    """The noise a block starts from, [B, F, H, W, C], and the fresh noise between its steps, [steps - 1, B, ...]."""
    key_start, key_fresh = jax.random.split(jax.random.fold_in(key, block))
    fresh = jax.random.normal(key_fresh, (steps - 1, *shape), jnp.float32)
    return jax.random.normal(key_start, shape, jnp.float32), fresh


@partial(jax.jit, static_argnames=("shape", "steps"))
def _seeded(seeds_B: jax.Array, block: jax.Array, *, shape: tuple[int, ...], steps: int) -> tuple[jax.Array, jax.Array]:
    def one(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block_noise(jax.random.key(seed), block, shape, steps)

    return jax.vmap(one, out_axes=(0, 1))(seeds_B)


def plain(function: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """Calls the function as it is."""
    return function(*args, **static)


def seeded_noise(seeds_B: np.ndarray, call: Call = plain) -> Noise:
    """Noise in which every video follows its own seed (uint32) alone, whatever it is batched with."""
    seeds = jnp.asarray(seeds_B, jnp.uint32)
    return lambda block, shape, steps: call(_seeded, seeds, jnp.int32(block), shape=shape[1:], steps=steps)


def levels_of(sampler: FewStep, first: bool) -> np.ndarray:
    """A block's noise levels; `first`: those of the first generated one."""
    return sampler.first_sigmas() if first else sampler.sigmas()


def per_prompt(clean: jax.Array, text_kv: KV) -> jax.Array:
    """The frames as often as each video has prompts: twice for a guided sampler."""
    return jnp.concatenate([clean] * (text_kv.k_LBSNK.shape[1] // clean.shape[0]))


@partial(jax.jit, static_argnames=("sampler", "first", "blocks"))
def next_block(
    model: Wan,
    noise: jax.Array,
    fresh: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    *,
    sampler: FewStep | ManyStep,
    first: bool,
    blocks: Blocks,
) -> jax.Array:
    """A block from its noise, by whichever sampler. Reads the cache."""
    if isinstance(sampler, FewStep):
        return few_step_block(model, noise, fresh, levels_of(sampler, first), text_kv, cache, start, blocks)
    return many_step_block(model, noise, text_kv, cache, start, sampler, blocks)


@partial(jax.jit, static_argnames=("sampler", "blocks"))
def next_window(
    model: Wan,
    window: Window,
    own: Window,
    text_kv: KV,
    cache: Any,
    place: Place,
    *,
    sampler: FewStep,
    blocks: Blocks,
) -> tuple[Window, jax.Array]:
    """The window one pass further, and the block that is done. Reads the cache."""
    window, _, x0 = roll(model, window, own, sampler.sigmas(), text_kv, cache, place, blocks)
    return window, x0[:, : blocks.frames]


@partial(jax.jit, static_argnames="blocks", donate_argnames="cache")
def _commit(model: Wan, clean: jax.Array, text_kv: KV, cache: KVCache, start: jax.Array, *, blocks: Blocks) -> KVCache:
    """The cache with the block before `start`."""
    return commit_block(model, per_prompt(clean, text_kv), text_kv, cache, start - clean.shape[1], blocks)


@partial(jax.jit, static_argnames="blocks", donate_argnames="cache")
def _commit_given(model: Wan, given: jax.Array, text_kv: KV, cache: KVCache, *, blocks: Blocks) -> KVCache:
    return commit_given(model, per_prompt(given, text_kv), text_kv, cache, blocks)


@partial(jax.jit, static_argnames=("sampler", "first", "blocks"), donate_argnames="cache")
def _commit_and_next_block(
    model: Wan,
    clean: jax.Array,
    noise: jax.Array,
    fresh: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    *,
    sampler: FewStep,
    first: bool,
    blocks: Blocks,
) -> tuple[jax.Array, KVCache]:
    return fused_block(model, clean, noise, fresh, levels_of(sampler, first), text_kv, cache, start, blocks)


def rolled(
    pipeline: Pipeline,
    window: Window | None,
    new_block: Callable[[int], tuple[jax.Array, jax.Array]],
    work: tuple[KV, Any],
    span: tuple[int, int],
    *,
    blocks: Blocks,
    call: Call = plain,
) -> tuple[Window, jax.Array]:
    """The next block of a rolling sampler and the window after it: one pass, or one per step for the very first block.

    Args:
      window: None before the first block.
      new_block: the noise, as of `Noise`, of the block so many after this one.
      work: keys and values of the prompts, and the cache.
      span: the block's first frame, and the frame that the video ends before.
    """
    sampler, (start, stop) = pipeline.sampler, span
    assert isinstance(sampler, FewStep)
    steps, x0 = len(sampler.steps), None
    for ahead in range(0 if window is None else steps - 1, steps):
        own = Window(*new_block(ahead))
        window = empty_window(own.x_BFHWC.shape, steps, blocks) if window is None else window
        place = Place(*(jnp.int32(x) for x in (start + (ahead - steps + 1) * blocks.frames, start, stop)))
        window, x0 = call(next_window, pipeline.model, window, own, *work, place, sampler=sampler, blocks=blocks)
    assert window is not None and x0 is not None
    return window, x0


def _begun(
    model: Wan,
    given_BFHWC: jax.Array | None,
    text_kv: KV,
    shape: tuple[int, ...],
    *,
    fused: bool,
    blocks: Blocks,
    call: Call,
) -> tuple[Any, jax.Array | None]:
    """The cache before the first generated block of latents of `shape`, and the block that this one is to commit."""
    rows, num_frames, height, width, _ = shape
    cache = call(
        _empty_cache,
        config=model.config,
        batch=rows,
        num_frames=num_frames,
        tokens_per_frame=model.config.tokens_per_frame(height, width),
        width=model.config.tokens_per_row(width),
        blocks=blocks,
    )
    if given_BFHWC is None:
        return cache, None
    committed, clean = last_block_of(given_BFHWC, blocks) if fused else (given_BFHWC, None)
    if committed.shape[1]:
        cache = call(_commit_given, model, committed, text_kv, cache, blocks=blocks)
    return cache, clean


def _all_at_once(
    pipeline: Pipeline, noise_BFHWC: jax.Array, given_BFHWC: jax.Array | None, text_kv: KV, call: Call
) -> jax.Array:
    """What follows the given frames, of a bidirectional network; the prompts' keys come before the negative ones'."""
    batch = noise_BFHWC.shape[0]
    positive, negative = (jax.tree.map(cut, text_kv) for cut in (lambda x: x[:, :batch], lambda x: x[:, batch:]))
    work = (pipeline.model, noise_BFHWC, positive, negative)
    if given_BFHWC is None:
        return call(_bidirectional, *work, sampler=pipeline.sampler)
    return call(_bidirectional_from, *work, given_BFHWC, sampler=pipeline.sampler)


def _rolled_blocks(
    pipeline: Pipeline,
    text_kv: KV,
    noise: Noise,
    cache: Any,
    frames: tuple[int, int],
    shape: tuple[int, ...],
    *,
    blocks: Blocks,
    call: Call,
) -> Iterator[jax.Array]:
    """`stream_latents` of a rolling sampler, with the given frames in the cache, for blocks of latents of `shape`."""
    sampler, window, clean, (first, stop) = pipeline.sampler, None, None, frames
    assert isinstance(sampler, FewStep)
    for start in range(first, stop, blocks.frames):
        if clean is not None:
            cache = call(_commit, pipeline.model, clean, text_kv, cache, jnp.int32(start), blocks=blocks)

        def new_block(ahead: int, start: int = start) -> tuple[jax.Array, jax.Array]:
            number, steps = start // blocks.frames + ahead, len(sampler.steps)
            if number * blocks.frames < stop:
                return noise(number, shape, steps)
            return jnp.zeros(shape), jnp.zeros((steps - 1, *shape))  # it does not exist

        work = (text_kv, cache)
        window, clean = rolled(pipeline, window, new_block, work, (start, stop), blocks=blocks, call=call)
        yield clean


_empty_cache = jax.jit(
    init_cache, static_argnames=("config", "batch", "num_frames", "tokens_per_frame", "blocks", "width")
)
_bidirectional = jax.jit(generate_bidirectional, static_argnames="sampler")


@partial(jax.jit, static_argnames="sampler")
def _bidirectional_from(
    model: Wan, noise: jax.Array, positive: KV, negative: KV, given: jax.Array, *, sampler: ManyStep
) -> jax.Array:
    return generate_bidirectional(model, noise, positive, negative, sampler, given_BFHWC=given)


_embed = jax.jit(embed_text)
decode_step = jax.jit(lambda codec, latents, state: codec.decode_step(latents, state))


@jax.jit
def _both(positive: KV, negative: KV) -> KV:
    """Every prompt beside the one negative prompt."""
    return both_prompts(positive, jax.tree.map(lambda p, n: jnp.broadcast_to(n, p.shape), positive, negative))


def prompt_kv(
    model: Wan, text_BSE: jax.Array, negative_SE: jax.Array, sampler: FewStep | ManyStep, call: Call = plain
) -> KV:
    """Keys and values of the prompts for all layers; for a guided sampler the negative prompt's are behind them."""
    positive = call(_embed, model, text_BSE)
    if not isinstance(sampler, ManyStep):
        return positive
    return call(_both, positive, call(_embed, model, negative_SE[None]))


def stream_latents(
    pipeline: Pipeline,
    text_kv: KV,
    noise: Noise,
    *,
    num_frames: int,
    latent_shape: tuple[int, int, int],
    batch: int = 1,
    given_BFHWC: jax.Array | None = None,
    call: Call = plain,
) -> Iterator[jax.Array]:
    """Yields the latents_BFHWC of one generated block after another; `given` frames are committed, not yielded.

    A block is yielded before its commit, which begins when the next block is asked for; the last one has none.

    Args:
      text_kv: see `prompt_kv`.
      noise: by absolute block index, so that an extended video has the noise of a longer one. A
        bidirectional sampler takes block 0 of all frames.
      num_frames: latent frames to generate, after the given ones.
      latent_shape: (H, W, C) of a latent frame.
    """
    model, sampler, blocks = pipeline.model, pipeline.sampler, pipeline.blocks
    if blocks is None:
        assert isinstance(sampler, ManyStep)
        whole, _ = noise(0, (batch, num_frames, *latent_shape), 1)
        yield _all_at_once(pipeline, whole, given_BFHWC, text_kv, call)
        return
    blocks = layout_of(sampler, blocks)
    assert blocks is not None
    given = 0 if given_BFHWC is None else given_BFHWC.shape[1]
    before, layout = given_blocks(blocks, given), layout_from(blocks, given)
    fused = isinstance(sampler, FewStep) and fuses(pipeline.fused_commit, memory=blocks.memory)
    shape = (text_kv.k_LBSNK.shape[1], given + num_frames, *latent_shape)
    cache, clean = _begun(model, given_BFHWC, text_kv, shape, fused=fused, blocks=blocks, call=call)
    if isinstance(sampler, FewStep) and sampler.rolling:
        frames = (given, given + num_frames)
        shape = (batch, blocks.frames, *latent_shape)
        yield from _rolled_blocks(pipeline, text_kv, noise, cache, frames, shape, blocks=blocks, call=call)
        return
    for index, (start, stop) in enumerate(layout.spans(num_frames)):
        first = isinstance(sampler, FewStep) and index == 0 and bool(sampler.first_steps)
        steps = len(levels_of(sampler, first)) if isinstance(sampler, FewStep) else 1
        own, fresh = noise(before + index, (batch, stop - start, *latent_shape), max(steps, 1))
        at, make_block = jnp.int32(given + start), partial(call, sampler=sampler, first=first, blocks=blocks)
        if fused and clean is not None:
            x0, cache = make_block(_commit_and_next_block, model, clean, own, fresh, text_kv, cache, at)
        else:
            if clean is not None:
                cache = call(_commit, model, clean, text_kv, cache, at, blocks=blocks)
            x0 = make_block(next_block, model, own, fresh, text_kv, cache, at)
        clean = x0
        yield x0


def stream(
    pipeline: Pipeline,
    text_kv: KV,
    noise: Noise,
    *,
    num_frames: int,
    latent_shape: tuple[int, int, int],
    batch: int = 1,
    given_BFHWC: jax.Array | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (video_BPHWC, latents_BFHWC) block after block, on the host; given frames first, when there are any.

    Args:
      num_frames, latent_shape, given_BFHWC: as in `stream_latents`.
      noise: `partial(block_noise, key)`, or `seeded_noise`.
    """
    state = pipeline.codec.init_state(batch)
    if given_BFHWC is not None:
        video, state = decode_step(pipeline.codec, given_BFHWC, state)
        yield np.asarray(video), np.asarray(given_BFHWC)
    for x0 in stream_latents(
        pipeline,
        text_kv,
        noise,
        num_frames=num_frames,
        latent_shape=latent_shape,
        batch=batch,
        given_BFHWC=given_BFHWC,
    ):
        video, state = decode_step(pipeline.codec, x0, state)
        yield np.asarray(video), np.asarray(x0)
