"""The passes of `models.wan` that make keys and values of clean frames: the context that later blocks attend to.

    clean_context(model, clean, ...)         of all frames, in one block-causal pass
    forward_kv(model, clean, ..., cache)     of one block, against a KV cache
    forward_observed(model, clean, ..., observe) the same, and what is asked of every layer's queries and keys
    forward_fused(model, clean, noisy, ...)  of one block, and the flow of the next: one pass over [clean, noisy]

Nobody reads the last layer's output for clean frames: its attention, its feed-forward and the head are left out. So
only the noisy half of a fused pass goes through them.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.sharding import constrain
from cfjax.models.cache import KVCache
from cfjax.models.ends import embed_frames, flow_of
from cfjax.models.wan import (
    KV,
    Block,
    FrameKV,
    SelfAttend,
    Wan,
    WanConfig,
    apply_block,
    attend_by,
    attend_cached,
    frame_positions,
)
from cfjax.nn import layers
from cfjax.nn.frames import constrain_kv
from cfjax.nn.rope import rotate
from cfjax.nn.visibility import Blocks, Visibility

Table = tuple[jax.Array, ...]


@singledispatch
@jax.named_scope("clean_context")
def clean_context(
    model: Wan, clean_BFHWC: jax.Array, text_kv: KV, blocks: Blocks, *, sigma_BF: jax.Array | None = None
) -> FrameKV:
    """Keys and values of all frames in one block-causal pass: equal to committing block after block."""
    frames = clean_BFHWC.shape[1]
    visibility = Visibility("block_causal", blocks)
    sigma = jnp.zeros(clean_BFHWC.shape[:2], jnp.float32) if sigma_BF is None else sigma_BF
    self_attend = attend_by(visibility, frames, model.config)
    return _keys_and_values(model, clean_BFHWC, sigma, text_kv, jnp.arange(frames), self_attend, None)


@singledispatch
def forward_kv(
    model: Wan,
    clean_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> FrameKV:
    """The keys and values that `forward_block` returns besides the flow, which is not computed."""
    frames = clean_BFHWC.shape[1]
    self_attend, numbers = attend_cached(model.config, cache, start, frames, blocks)
    positions = frame_positions(cache, start, frames, blocks)
    return _keys_and_values(model, clean_BFHWC, sigma_BF, text_kv, positions, self_attend, numbers)


# (q, k [B, F, T, N, K], both rotated, layer) -> a pytree
Observe = Callable[[jax.Array, jax.Array, jax.Array], Any]


@singledispatch
def forward_observed(
    model: Wan,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    blocks: Blocks,
    observe: Observe,
) -> tuple[FrameKV, Any]:
    """`forward_kv`, and what `observe` makes of the block's own queries and keys, layer by layer, stacked: [L, ...]."""
    frames, config = latents_BFHWC.shape[1], model.config
    self_attend, numbers = attend_cached(config, cache, start, frames, blocks)
    stream, _, e0, table = embed_frames(model, latents_BFHWC, sigma_BF, frame_positions(cache, start, frames, blocks))

    def watch(block: Block, stream_BFTD: jax.Array, kv: FrameKV, layer: jax.Array) -> tuple[FrameKV, Any]:
        return kv, observe(block_query(block, stream_BFTD, e0, table, config), kv.k_LBFTNK, layer)

    last, stacks = config.num_layers - 1, to_bits((model.blocks, numbers))

    def layer(stream: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[FrameKV, Any]]:
        weights, text = layer_of((stacks, text_kv), index)
        block, past = from_bits(weights)
        after, kv = apply_block(block, stream, e0, text, past, table, self_attend, config)
        return after, watch(block, stream, kv, index)

    stream, (kv, observed) = jax.lax.scan(layer, stream, jnp.arange(last))
    block = layer_of(model.blocks, -1)
    own, newest = watch(block, stream, block_kv(block, stream, e0, table, config), jnp.int32(last))
    return _appended(kv, own), jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), observed, newest)


@singledispatch
def forward_fused(
    model: Wan,
    clean_BFHWC: jax.Array,
    clean_sigma_BF: jax.Array,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    """`forward_kv` of the clean block from `start` on and `forward_block` of the noisy one after it, in one pass.

    Block-causal: the noisy block sees the clean one as if that were in the cache, as far as a window lets it.

    Returns:
      The noisy block's flow, and the clean block's keys and values for `cache.write`. Reads the cache alone.
    """
    config, frames = model.config, clean_BFHWC.shape[1]
    attend_clean, attend_noisy = _views(config, cache, start, frames, noisy_BFHWC.shape[1], blocks)

    def attend_both(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
        own = FrameKV(k[:, :frames], v[:, :frames])
        clean = attend_clean(q[:, :frames], *own, layer)
        noisy = attend_noisy(q[:, frames:], k[:, frames:], v[:, frames:], own, layer)
        return jnp.concatenate([clean, noisy], axis=1)

    stream, e_BFD, e0, table = embed_frames(
        model,
        jnp.concatenate([clean_BFHWC, noisy_BFHWC], axis=1),
        jnp.concatenate([clean_sigma_BF, sigma_BF], axis=1),
        start + jnp.arange(frames + noisy_BFHWC.shape[1]),
    )
    cut = lambda kv: FrameKV(*(x[:, :frames] for x in kv))
    stream, kv = _but_last(model, stream, e0, text_kv, table, attend_both, jnp.arange(config.num_layers), cut)

    block, text = layer_of((model.blocks, text_kv), -1)
    (e0_clean, *table_clean), (e0_noisy, *table_noisy) = (
        (e0[:, part], *(x[part] for x in table)) for part in (slice(frames), slice(frames, None))
    )
    own = block_kv(block, stream[:, :frames], e0_clean, tuple(table_clean), config)
    last = lambda q, k, v, layer: attend_noisy(q, k, v, own, layer)
    noisy, _ = apply_block(
        block, stream[:, frames:], e0_noisy, text, jnp.int32(config.num_layers - 1), tuple(table_noisy), last, config
    )
    return flow_of(model, noisy, e_BFD[:, frames:], *noisy_BFHWC.shape[2:4]), _appended(kv, own)


def _views(
    config: WanConfig, cache: KVCache, start: jax.Array, frames: int, following: int, blocks: Blocks
) -> tuple[SelfAttend, Callable[..., jax.Array]]:
    """One layer's attention of a clean block, and of the `following` noisy frames (which takes the clean keys too)."""
    attend_clean, _ = attend_cached(config, cache, start, frames, blocks)
    attend_own, _ = attend_cached(config, cache, start, frames + following, blocks)

    def attend_noisy(q: jax.Array, k: jax.Array, v: jax.Array, own: FrameKV, layer: jax.Array) -> jax.Array:
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(own, (k, v), strict=True))
        return attend_own(q, keys, values, layer)

    return attend_clean, attend_noisy


def block_kv(block: Block, stream_BFTD: jax.Array, e0_BF6D: jax.Array, table: Table, config: WanConfig) -> FrameKV:
    """The keys and values that `apply_block` would return, of one layer, [B, F, T, N, K], and nothing else of it."""
    with jax.named_scope("self_attention"):
        k, v = block.self_attn.key_value(_modulated(block, stream_BFTD, e0_BF6D, config), config)
        return FrameKV(constrain_kv(rotate(k, table)), constrain_kv(v))


def block_query(block: Block, stream_BFTD: jax.Array, e0_BF6D: jax.Array, table: Table, config: WanConfig) -> jax.Array:
    """The rotated queries of `apply_block`'s self-attention, [B, F, T, N, K]; one product where both are computed."""
    with jax.named_scope("self_attention"):
        q = block.self_attn.query(_modulated(block, stream_BFTD, e0_BF6D, config), config)
        return rotate(constrain(q, "batch", None, "tokens", "channels", None), table)


def _modulated(block: Block, stream_BFTD: jax.Array, e0_BF6D: jax.Array, config: WanConfig) -> jax.Array:
    """What a layer's self-attention projects."""
    policy = config.precision
    modulation = policy.to_norm_dtype(block.modulation[:2])[None, None] + e0_BF6D[:, :, :2]
    shift, scale = jnp.split(modulation, 2, axis=2)
    return (layers.layer_norm(stream_BFTD, config.eps, policy) * (1 + scale) + shift).astype(policy.compute)


def _keys_and_values(
    model: Wan,
    clean_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    position_F: jax.Array,
    self_attend: SelfAttend,
    layer_input: Any,
) -> FrameKV:
    """`models.wan.backbone` up to the last layer's keys and values."""
    stream, _, e0, table = embed_frames(model, clean_BFHWC, sigma_BF, position_F)
    stream, kv = _but_last(model, stream, e0, text_kv, table, self_attend, layer_input, lambda kv: kv)
    return _appended(kv, block_kv(layer_of(model.blocks, -1), stream, e0, table, model.config))


def _but_last(
    model: Wan,
    stream_BFTD: jax.Array,
    e0_BF6D: jax.Array,
    text_kv: KV,
    table: Table,
    self_attend: SelfAttend,
    layer_input: Any,
    keep: Callable[[FrameKV], FrameKV],
) -> tuple[jax.Array, FrameKV]:
    """The stream after all layers but the last, and what `keep` leaves of the keys and values of each."""

    stacks = to_bits((model.blocks, layer_input)), text_kv

    def layer(stream: jax.Array, index: jax.Array) -> tuple[jax.Array, FrameKV]:
        # By index, not as inputs of the scan: all layers but the last would be a copy of the weights.
        weights, text = layer_of(stacks, index)
        block, past = from_bits(weights)
        stream, kv = apply_block(block, stream, e0_BF6D, text, past, table, self_attend, model.config)
        return stream, keep(kv)

    return jax.lax.scan(layer, stream_BFTD, jnp.arange(model.config.num_layers - 1))


def layer_of(stacked: Any, index: Any) -> Any:
    """One layer of pytrees with a leading layer axis."""
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return jax.tree.map(pick if isinstance(index, jax.Array) else lambda x: x[index], stacked)


def _appended(stacked: FrameKV, last: FrameKV) -> FrameKV:
    """The layers' keys and values, [L - 1, B, F, T, N, K], with the last layer's behind them."""
    both = (jnp.concatenate([x, y[None]]) for x, y in zip(stacked, last, strict=True))
    return FrameKV(*(constrain_kv(x) for x in both))
