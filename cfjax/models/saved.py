"""`replay` from saved activations: each layer's output, kept by the passes that computed it first.

A replay recomputes, with all blocks at once, what the passes of a rollout's exit steps have computed. If these save
their streams, [B, F, L, T, D] (what `remat="full"` holds between forward and backward pass), the replay has no forward
pass of its own: its value is the saved flow, and its gradient recomputes a layer at a time from the saved input.
"""

from dataclasses import dataclass
from functools import partial, singledispatch

import jax
import jax.numpy as jnp

from cfjax.core.sharding import constrain
from cfjax.models.cache import KVCache
from cfjax.models.context import layer_of
from cfjax.models.ends import embed_frames, flow_of
from cfjax.models.wan import (
    KV,
    Block,
    FrameKV,
    KvGradient,
    Wan,
    apply_block,
    attend_cached,
    backbone,
    frame_positions,
    replay_attend,
)
from cfjax.nn.visibility import Blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """What a pass leaves for its gradient: every layer's output stream, in the dtype of the norms, and the flow."""

    stream_BFLTD: jax.Array
    flow_BFHWC: jax.Array


@singledispatch
def forward_saving(
    model: Wan,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> Saved:
    """`models.wan.forward_block` without its keys and values, but with every layer's output."""
    frames = latents_BFHWC.shape[1]
    self_attend, numbers = attend_cached(model.config, cache, start, frames, blocks)
    positions = frame_positions(cache, start, frames, blocks)
    leaving = lambda stream, _: stream
    work = (model, latents_BFHWC, sigma_BF, text_kv, positions, self_attend)
    flow, stream_LBFTD = backbone(*work, layer_input=numbers, tap=leaving)
    return Saved(_placed(jnp.moveaxis(stream_LBFTD, 0, 2)), flow)


def _placed(stream_BFLTD: jax.Array) -> jax.Array:
    """Sharded as a stream is."""
    return constrain(stream_BFLTD, "batch", None, None, "tokens", None)


@singledispatch
def replay_saved(
    model: Wan,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    context: FrameKV,
    saved: Saved,
    blocks: Blocks,
    *,
    kv_gradient: KvGradient = "detached",
    start: jax.Array | None = None,
) -> jax.Array:
    """`models.wan.replay` whose value is the saved flow; its gradient reaches the network and the text alone."""
    first = jnp.int32(0) if start is None else start
    saved = Saved(_placed(saved.stream_BFLTD), saved.flow_BFHWC)
    given = (noisy_BFHWC, sigma_BF, context, saved, first)
    return _flow((blocks, kv_gradient, start is None), model, model.blocks, text_kv, jax.lax.stop_gradient(given))


Given = tuple[jax.Array, jax.Array, FrameKV, Saved, jax.Array]
Static = tuple[Blocks, KvGradient, bool]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flow(static: Static, model: Wan, layers: Block, text_kv: KV, given: Given) -> jax.Array:
    return given[3].flow_BFHWC


def _forward(static: Static, model: Wan, layers: Block, text_kv: KV, given: Given) -> tuple[jax.Array, tuple]:
    return given[3].flow_BFHWC, (model, layers, text_kv, given)


def _backward(static: Static, residuals: tuple, cotangent: jax.Array) -> tuple:
    (blocks, kv_gradient, whole), (model, layers, text_kv, given) = static, residuals
    noisy, sigma_BF, context, saved, start = given
    config, frames = model.config, noisy.shape[1]
    self_attend = replay_attend(config, frames, blocks, kv_gradient, None if whole else start)

    def enter(model: Wan) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        stream, e, e0, table = embed_frames(model, noisy, sigma_BF, start + jnp.arange(frames), text_kv)
        return (stream, e, e0), table

    (first, e_BFD, e0_BF6D), pull_enter, table = jax.vjp(enter, model, has_aux=True)
    leave = lambda model, stream, e: flow_of(model, stream, e, *noisy.shape[2:4])
    _, pull_leave = jax.vjp(leave, model, saved.stream_BFLTD[:, :, -1], e_BFD)
    d_head, d_stream, d_e = pull_leave(cotangent)

    def layer(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple, tuple[Block, KV]]:
        d_stream, d_e0 = carry
        block, text, past = layer_of((layers, text_kv, context), index)
        before = jax.lax.dynamic_index_in_dim(saved.stream_BFLTD, jnp.maximum(index - 1, 0), 2, keepdims=False)
        before = jnp.where(index == 0, first, before)
        run = lambda block, stream, e0, text: apply_block(block, stream, e0, text, past, table, self_attend, config)[0]
        _, pull = jax.vjp(run, block, before, e0_BF6D, text)
        d_block, d_stream, own_e0, d_text = pull(d_stream)
        return (d_stream, d_e0 + own_e0), (d_block, d_text)

    carry, (d_layers, d_text) = jax.lax.scan(
        layer, (d_stream, jnp.zeros_like(e0_BF6D)), jnp.arange(config.num_layers), reverse=True
    )
    (d_embed,) = pull_enter((carry[0], d_e, carry[1]))
    return jax.tree.map(jnp.add, d_head, d_embed), d_layers, d_text, None


_flow.defvjp(_forward, _backward)
