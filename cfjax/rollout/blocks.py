"""The two operations of block-autoregressive generation, denoise and commit, and the scan over blocks.

Everything that generates block by block (samplers, self-forcing, ODE pairs, the streaming session) is `scan_blocks`
over a function of one block that calls `denoise_block` any number of times and `commit_block` at most once. Where the
two are fused, a block begins by `commit_and_denoise`: one pass that commits the block before it and is its first step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from cfjax.core.errors import UserError
from cfjax.memory.policies import ContextRecompute
from cfjax.models.cache import KVCache, init_cache, write
from cfjax.models.context import clean_context, forward_fused, forward_kv, forward_observed
from cfjax.models.experts import Conditioned
from cfjax.models.wan import KV, Wan, forward_block
from cfjax.nn.visibility import Blocks

COUNTED_BLOCKS = "counted_blocks"  # scope of the loop over a traced number of blocks
COMMIT = "commit_unless_last"  # scope of the conditional that spares the last block's commit

FusedCommit = Literal["auto", "on", "off"]
# Where "auto" fuses a commit with the next block's first step; elsewhere it is off.
FUSED_ON = ("gpu", "tpu")

# step(cache, start, inputs of this block) -> (cache, outputs of this block)
BlockStep = Callable[[KVCache, jax.Array, Any], tuple[KVCache, Any]]


@jax.named_scope("denoise_block")
def denoise_block(
    model: Wan, x_BFHWC: jax.Array, sigma: jax.Array, text_kv: KV, cache: KVCache, start: jax.Array, blocks: Blocks
) -> jax.Array:
    """Flow of one block at a scalar noise level, given the committed past. Reads the cache only."""
    sigma_BF = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x_BFHWC.shape[:2])
    return forward_block(model, x_BFHWC, sigma_BF, text_kv, cache, start, blocks)[0]


@jax.named_scope("commit_block")
def commit_block(
    model: Wan,
    clean_BFHWC: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    blocks: Blocks,
    *,
    sigma: float | jax.Array = 0.0,
    picture_BFHWC: jax.Array | None = None,
) -> Any:
    """The cache with a finished block added: its keys and values of one more forward pass, at timestep 0.

    Reference: the cache update in `pipeline/causal_inference.py`, `CausalInferencePipeline.inference`. `sigma` is the
    level that the network is conditioned on: 0 but for context noise. `picture_BFHWC`: see
    `ContextRecompute.commit_latents`.
    """
    if isinstance(blocks.memory, ContextRecompute):
        if isinstance(model, Conditioned):
            raise UserError("this memory computes its window anew, whose picture's latents are not kept; use another")
        layout = Blocks(blocks.frames)
        return blocks.memory.commit_latents(
            cache, clean_BFHWC, start, lambda latents: clean_context(model, latents, text_kv, layout), picture_BFHWC
        )
    sigma_BF = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), clean_BFHWC.shape[:2])
    frames, observe, observed = clean_BFHWC.shape[1], None, None
    if blocks.memory is not None:
        observe = blocks.memory.observer(model.config, cache, start, frames, blocks)
    if observe is None:
        kv = forward_kv(model, clean_BFHWC, sigma_BF, text_kv, cache, start, blocks)
    else:
        kv, observed = forward_observed(model, clean_BFHWC, sigma_BF, text_kv, cache, start, blocks, observe)
    return write(cache, kv, start, frames, blocks, text_kv=text_kv, observed=observed)


@jax.named_scope("commit_and_denoise")
def commit_and_denoise(
    model: Wan,
    clean_BFHWC: jax.Array,
    x_BFHWC: jax.Array,
    sigma: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
    *,
    commit_sigma: float | jax.Array = 0.0,
) -> tuple[jax.Array, KVCache]:
    """`commit_block` of the clean block before `start`, and `denoise_block` of the block there, as one pass over both.

    Returns:
      The flow of `x`, and the cache with the clean block added.
    """
    frames = clean_BFHWC.shape[1]
    before = start - frames
    levels = [(commit_sigma, clean_BFHWC), (sigma, x_BFHWC)]
    clean_sigma, sigma_BF = (jnp.broadcast_to(jnp.asarray(s, jnp.float32), x.shape[:2]) for s, x in levels)
    flow, kv = forward_fused(model, clean_BFHWC, clean_sigma, x_BFHWC, sigma_BF, text_kv, cache, before, blocks)
    return flow, write(cache, kv, before, frames, blocks)


def fuses(choice: FusedCommit, platform: str | None = None, *, memory: Any = None) -> bool:
    """Resolves "auto" by platform; never with a memory policy, whose commits decide what the next block sees.

    Raises:
      UserError: none of the three, or "on" with a memory policy.
    """
    if choice not in get_args(FusedCommit):
        raise UserError(f"fused_commit={choice!r}: use one of {', '.join(get_args(FusedCommit))}")
    if memory is not None:
        if choice == "on":
            raise UserError("fused_commit='on': not with a memory policy; use auto or off")
        return False
    return (platform or jax.default_backend()) in FUSED_ON if choice == "auto" else choice == "on"


def commit_unless_last(
    model: Wan,
    clean_BFHWC: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
    last: jax.Array | int,
    *,
    sigma: float | jax.Array = 0.0,
) -> KVCache:
    """`commit_block`, but for the block that starts at `last`: nothing reads its keys and values."""
    commit = lambda cache: commit_block(model, clean_BFHWC, text_kv, cache, start, blocks, sigma=sigma)
    with jax.named_scope(COMMIT):
        return jax.lax.cond(start < last, commit, lambda cache: cache, cache)


def empty_cache(config: Any, shape: Sequence[int], blocks: Blocks) -> KVCache:
    """The cache of a network with this config before the first block of latents of `shape` [B, F, H, W, C]."""
    batch, num_frames, height, width, _ = shape
    tokens = config.tokens_per_frame(height, width)
    return init_cache(config, batch, num_frames, tokens, blocks, config.tokens_per_row(width))


def layout_from(blocks: Blocks, start: int) -> Blocks:
    """The layout of the frames from `start` on: an independent first frame exists only at 0."""
    return blocks if start == 0 else replace(blocks, independent_first_frame=False)


def given_blocks(blocks: Blocks, given: int) -> int:
    """How many blocks `given` frames (an encoded image, the end of another video) fill; 0 for none.

    Raises:
      UserError: they end inside a block.
    """
    if not given:
        return 0
    try:
        return len(blocks.spans(given))
    except UserError:
        first = "1 + " if blocks.independent_first_frame else ""
        raise UserError(
            f"{given} given latent frames end inside a block: give {first}a multiple of {blocks.frames}"
            + ("" if first else ", or --config.independent_first_frame=True, which takes 1 + a multiple")
        ) from None


def last_block_of(given_BFHWC: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """The given frames before their last block, perhaps none, and that block. Raises as `given_blocks` does."""
    given_blocks(blocks, given_BFHWC.shape[1])
    first = blocks.spans(given_BFHWC.shape[1])[-1][0]
    return given_BFHWC[:, :first], given_BFHWC[:, first:]


def commit_given(model: Wan, given_BFHWC: jax.Array, text_kv: KV, cache: KVCache, blocks: Blocks) -> KVCache:
    """The cache after frames that were not generated here, committed block by block from frame 0, without noise."""
    given_blocks(blocks, given_BFHWC.shape[1])

    def step(cache: KVCache, start: jax.Array, inputs: Any) -> tuple[KVCache, tuple[()]]:
        return commit_block(model, inputs[0], text_kv, cache, start, blocks), ()

    return scan_blocks(step, cache, given_BFHWC, None, given_BFHWC.shape[1], blocks)[0]


def scan_blocks(
    step: BlockStep, cache: KVCache, per_frame: Any, per_block: Any, num_frames: int, blocks: Blocks, *, start: int = 0
) -> tuple[KVCache, Any]:
    """Runs `step` over the blocks of `num_frames` frames; one compiled body (two with an independent first frame).

    Args:
      step: the work of one block; gets `(frames of this block, per-block inputs)`.
      cache: what `step` takes and returns first: a cache, or a pytree with one.
      per_frame: pytree of arrays [B, F, ...], cut into blocks along F.
      per_block: pytree of arrays with a leading block axis.
      start: absolute index of the first frame, after given ones.

    Returns:
      The last cache, and the outputs with blocks joined along axis 1 (outputs of `step` are [B, F_block, ...]).
    """
    layout = layout_from(blocks, start)
    spans = layout.spans(num_frames)
    peel = 1 if layout.independent_first_frame else 0
    outputs = []
    if peel:
        first = jax.tree.map(lambda x: x[:, :1], per_frame), jax.tree.map(lambda x: x[0], per_block)
        cache, out = step(cache, jnp.int32(start), first)
        outputs.append(out)
    count = len(spans) - peel
    if count:
        split = lambda x: rearrange(x[:, peel:], "b (n f) ... -> n b f ...", n=count)
        starts = start + jnp.asarray([a for a, _ in spans[peel:]], jnp.int32)
        xs = (starts, jax.tree.map(split, per_frame), jax.tree.map(lambda x: x[peel:], per_block))
        cache, rest = jax.lax.scan(lambda c, x: step(c, x[0], x[1:]), cache, xs)
        outputs.append(jax.tree.map(lambda x: rearrange(x, "n b f ... -> b (n f) ..."), rest))
    if len(outputs) == 1:
        return cache, outputs[0]
    return cache, jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *outputs)


def loop_blocks(
    step: BlockStep,
    cache: KVCache,
    per_frame: Any,
    per_block: Any,
    num_frames: int,
    blocks: Blocks,
    count: jax.Array | int,
    *,
    first: jax.Array | int = 0,
) -> tuple[KVCache, Any]:
    """`scan_blocks` over the first `count` blocks alone, a traced number: one program, and no work for the others.

    Outputs have the length of `num_frames`, with zeros where no block was made. Not differentiable in reverse.
    `first`: the first block that is made, traced, for layouts without an independent first frame.
    """
    spans = blocks.spans(num_frames)
    peel = 1 if blocks.independent_first_frame else 0

    def inputs_at(number: Any, start: Any, frames: int) -> Any:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, frames, axis=1)
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
        return jax.tree.map(cut, per_frame), jax.tree.map(pick, per_block)

    def one(number: Any, start: Any, frames: int, carry: tuple[KVCache, Any]) -> tuple[KVCache, Any]:
        cache, made = step(carry[0], start, inputs_at(number, start, frames))
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
        return cache, jax.tree.map(put, carry[1], made)

    _, shapes = jax.eval_shape(lambda c: step(c, jnp.int32(0), inputs_at(0, 0, blocks.frames)), cache)
    outputs = jax.tree.map(lambda s: jnp.zeros((s.shape[0], num_frames, *s.shape[2:]), s.dtype), shapes)
    carry = (cache, outputs)
    if peel:
        carry = one(0, jnp.int32(0), 1, carry)

    def body(number: jax.Array, carry: tuple[KVCache, Any]) -> tuple[KVCache, Any]:
        start = jnp.int32(peel) + (number - peel).astype(jnp.int32) * blocks.frames
        return one(number, start, blocks.frames, carry)

    with jax.named_scope(COUNTED_BLOCKS):
        return jax.lax.fori_loop(peel or first, jnp.minimum(count, len(spans)), body, carry)
