"""Self-rollout with a memory policy: what its rollout keeps, and the gradient of its exit steps.

Under a policy a block sees a state (`memory.slots.State`) that no later block sees again: there is no one context
against which all exit steps could be replayed in one pass. The rollout keeps the keys and values of every committed
block, as it does without a policy, and the replay commits them again, block by block: the states come back bit for bit
without a call of the network, and one state is in memory at a time. Remembered keys carry no gradient, so the gradient
is a sum over blocks of the exit step's own.

The value of the replay is that of the rollout, which has computed it; only the gradient's passes run again.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim

from cfjax.core.errors import UserError
from cfjax.core.sharding import constrain_parameters
from cfjax.flow.path import x0_from_flow
from cfjax.memory.policies import ContextRecompute
from cfjax.models.cache import KVCache, init_cache, write
from cfjax.models.context import forward_kv
from cfjax.models.wan import KV, FrameKV, Wan, forward_block
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import COMMIT

REBUILT = "remembered_before_window"  # scope of the loop over the blocks before a window
REPLAYED = "replayed_blocks"  # scope of the loop over the blocks whose exit steps are differentiated


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Remembered:
    """A policy's state, and the keys and values of all committed blocks, each rotated at its own positions."""

    state: Any
    kept: KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Begin:
    """Where a rollout begins that goes on from another one.

    Attributes:
      state: the policy's, after the frames before.
      origin: the number of this rollout's frame 0 in the whole video, int32.
      first: the first block that is made; the others are in the state already.
    """

    state: Any
    origin: jax.Array
    first: jax.Array


def check_trains(blocks: Blocks, *, kv_gradient: str, save_activations: bool) -> None:
    """A memory policy that self-rollout trains with, and how.

    Raises:
      UserError: a policy whose keys no commit makes, gradient into remembered keys, or saved activations.
    """
    if blocks.memory is None:
        return
    if isinstance(blocks.memory, ContextRecompute):
        raise UserError(
            "blocks.memory='context_recompute' is for generation: the network makes its keys again for every block, "
            "and a rollout keeps none that could be replayed; use another policy"
        )
    if kv_gradient != "detached":
        raise UserError(
            f"objective.kv_gradient={kv_gradient!r}: a memory policy's keys are moved and merged, without gradient; "
            "use detached"
        )
    if save_activations:
        raise UserError("objective.save_activations=True: not with blocks.memory, whose replay is block by block")


def empty(config: Any, shape: tuple[int, ...], blocks: Blocks, state: Any = None) -> Remembered:
    """Before the first block of latents of `shape` [B, F, H, W, C]; `state`: where another rollout ended."""
    batch, num_frames, height, width, _ = shape
    tokens = config.tokens_per_frame(height, width)
    kept = init_cache(config, batch, num_frames, tokens, Blocks(blocks.frames))
    return Remembered(
        init_cache(config, batch, num_frames, tokens, blocks, config.tokens_per_row(width)) if state is None else state,
        kept,
    )


def commit_if(
    condition: Any,
    model: Wan,
    clean_BFHWC: jax.Array,
    text_kv: KV,
    past: Remembered,
    start: jax.Array,
    blocks: Blocks,
    *,
    origin: Any = 0,
) -> Remembered:
    """With the block that starts at `start` of this rollout committed, if so; `origin` as of `Begin`."""
    frames = clean_BFHWC.shape[1]

    def commit(past: Remembered) -> Remembered:
        sigma_BF = jnp.zeros(clean_BFHWC.shape[:2], jnp.float32)
        kv = forward_kv(model, clean_BFHWC, sigma_BF, text_kv, past.state, origin + start, blocks)
        state = write(past.state, kv, origin + start, frames, blocks, text_kv=text_kv)
        return Remembered(state, write(past.kept, kv, start, frames, Blocks(blocks.frames)))

    if condition is True:
        return commit(past)
    with jax.named_scope(COMMIT):
        return jax.lax.cond(condition, commit, lambda past: past, past)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Exits:
    """What the gradient of the exit steps needs besides the weights and the text.

    Attributes:
      x_BFHWC, sigma_BF, x0_BFHWC: inputs, levels and results of the exit steps.
      context: keys and values of all frames of the rollout.
      start: the frame of the rollout with which these exit steps begin; None: the first.
      begin: where the rollout began.
    """

    x_BFHWC: jax.Array
    sigma_BF: jax.Array
    x0_BFHWC: jax.Array
    context: FrameKV
    start: jax.Array | None
    begin: Begin | None


def replay_remembered(model: Wan, text_kv: KV, exits: Exits, blocks: Blocks) -> jax.Array:
    """x0_BFHWC of the exit steps, with gradient to the network and the text of each block's own exit step alone.

    Of a stretch that begins inside a block, the frames of that block carry none.
    """
    return _x0(blocks, model, text_kv, jax.lax.stop_gradient(exits))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _x0(blocks: Blocks, model: Wan, text_kv: KV, exits: Exits) -> jax.Array:
    return exits.x0_BFHWC


def _forward(blocks: Blocks, model: Wan, text_kv: KV, exits: Exits) -> tuple[jax.Array, tuple]:
    return exits.x0_BFHWC, (model, text_kv, exits)


def _backward(blocks: Blocks, residuals: tuple, cotangent_BFHWC: jax.Array) -> tuple:
    model, text_kv, exits = residuals
    peel = 1 if blocks.independent_first_frame else 0
    whole = (exits.x_BFHWC.shape[1] - peel) // blocks.frames  # blocks that are no single first frame
    replay = _Replay(model, text_kv, exits, cotangent_BFHWC, blocks)
    gradient = _placed(jax.tree.map(jnp.zeros_like, (model, text_kv)))
    begin, start = exits.begin, 0 if exits.start is None else exits.start
    batch, _, height, width, _ = exits.x_BFHWC.shape
    tokens = model.config.tokens_per_frame(height, width)
    state = (
        blocks.memory.init(model.config, batch, tokens, blocks, model.config.tokens_per_row(width))
        if begin is None
        else begin.state
    )
    carry = (state, gradient)
    if peel:
        first_block = lambda gradient: lambda carry: replay.block(jnp.int32(0), 1, carry, gradient=gradient)
        if exits.start is None:
            carry = first_block(True)(carry)
        else:
            carry = jax.lax.cond(start == 0, first_block(True), first_block(False), carry)
    before = start // blocks.frames
    at = lambda number: jnp.int32(peel) + jnp.asarray(number, jnp.int32) * blocks.frames
    if exits.start is not None:
        with jax.named_scope(REBUILT):
            rebuild = lambda n, carry: replay.block(at(n), blocks.frames, carry, gradient=False)
            carry = jax.lax.fori_loop(0, before, rebuild, carry)
    with jax.named_scope(REPLAYED):
        step = lambda n, carry: replay.block(at(before + n), blocks.frames, carry)
        carry = jax.lax.fori_loop(0 if begin is None else begin.first, whole, step, carry)
    return (*carry[1], None)


_x0.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Replay:
    """Blocks in order: adds the gradient of an exit step, and commits the block to the state."""

    model: Wan
    text_kv: KV
    exits: Exits
    cotangent_BFHWC: jax.Array
    blocks: Blocks

    def block(self, at: Any, frames: int, carry: tuple[Any, Any], *, gradient: bool = True) -> tuple[Any, Any]:
        """The carry (state, gradient so far) after the block that starts at frame `at` of the rollout."""
        (state, total), exits, blocks = carry, self.exits, self.blocks
        origin = 0 if exits.begin is None else exits.begin.origin
        if gradient:
            local = at - (0 if exits.start is None else exits.start)
            given = (exits.x_BFHWC, exits.sigma_BF, self.cotangent_BFHWC)
            x, sigma_BF, cotangent = (dynamic_slice_in_dim(leaf, local, frames, axis=1) for leaf in given)

            def x0_of(model: Wan, text_kv: KV) -> jax.Array:
                flow = forward_block(model, x, sigma_BF, text_kv, state, origin + at, blocks)[0]
                return x0_from_flow(flow, x, sigma_BF)

            _, pull = jax.vjp(x0_of, self.model, self.text_kv)
            total = _placed(jax.tree.map(jnp.add, total, pull(cotangent)))
        kv = FrameKV(*(dynamic_slice_in_dim(leaf, at, frames, axis=2) for leaf in exits.context))
        return write(state, kv, origin + at, frames, blocks, text_kv=self.text_kv), total


def _placed(gradient: tuple[Wan, KV]) -> tuple[Wan, KV]:
    """Sharded as the weights are, while it is summed up."""
    model, text_kv = gradient
    return constrain_parameters(model), text_kv
