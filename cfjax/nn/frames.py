"""Attention over frames of tokens, [B, F, T, N, K], sharded over the active mesh; without a mesh, `attend`.

Outside attention, tokens are sharded inside frames over the context axis. Self-attention needs all keys, and gets them
in one of two ways (`core.sharding.context_sharding`):

    heads    the axis changes from tokens to heads and back (all-to-all, DeepSpeed-Ulysses, arXiv 2309.14509): every
             device runs the same kernel over all tokens of some heads. The KV cache is sharded by heads, and not moved.
    tokens   where the axis does not divide the heads: keys are gathered, and every device has a shard of each frame's
             queries. The KV cache is sharded by tokens; a block's few queries attend to every shard of it, and the
             softmax is reduced over shards.

Either way all devices have the same work under every visibility.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from cfjax.core.sharding import constrain, context_sharding, token_shards, vmap_over_context
from cfjax.nn.attention import attend, dense, pick_backend
from cfjax.nn.visibility import Visibility

VISIBLE_PREFIX = "visible_prefix"  # scope of the conditional over the lengths of what a block sees
MOST_LENGTHS = 12  # of a prefix: with more, the next longer one is computed, on average less than 1/12 too much
_mask_prefixes = ContextVar("mask_prefixes", default=False)


@contextmanager
def masked_prefixes() -> Iterator[None]:
    """While a function is traced: `attend_slots` and `attend_prefix` compute the longest prefix, and mask it.

    For `jax.vmap` over videos that see prefixes of different lengths: a conditional whose index differs from row to
    row computes every branch. Enter it inside the jitted function, so that what is compiled follows from that alone.
    """
    token = _mask_prefixes.set(True)
    try:
        yield
    finally:
        _mask_prefixes.reset(token)


def _flat(x_BFTNK: jax.Array) -> jax.Array:
    """All tokens of some heads, [B, F * T, N, K]."""
    return rearrange(constrain(x_BFTNK, "batch", None, None, "heads", None), "b f t n k -> b (f t) n k")


def _framed(x_BTNK: jax.Array, frames: int) -> jax.Array:
    """Back to tokens sharded inside frames, [B, F, T, N, K]."""
    return constrain(rearrange(x_BTNK, "b (f t) n k -> b f t n k", f=frames), "batch", None, "tokens", "channels", None)


def constrain_kv(x_LBFTNK: jax.Array) -> jax.Array:
    """Keys or values of clean frames, [..., B, F, T, N, K], with the sharding of a KV cache."""
    return constrain(x_LBFTNK, *(None,) * (x_LBFTNK.ndim - 5), *kv_axes(x_LBFTNK.shape[-5:]))


def kv_axes(shape: Sequence[int]) -> tuple[str | None, ...]:
    """The logical axes of keys or values [B, F, T, N, K] in a KV cache, on the active mesh."""
    kind, _ = context_sharding(shape[-2], shape[-3])
    return ("batch", None, *(("tokens", "channels") if kind == "tokens" else (None, "heads")), None)


def attend_frames(
    q_BFTNK: jax.Array,
    k_BFTNK: jax.Array,
    v_BFTNK: jax.Array,
    visibility: Visibility,
    *,
    num_frames: int,
    backend: str = "auto",
) -> jax.Array:
    """`attend` on frames: both halves of `teacher_forced` are along F, as are `replay`'s [context, noisy] keys."""
    heads, tokens = q_BFTNK.shape[3], q_BFTNK.shape[2]
    kind, parts = context_sharding(heads, tokens)
    if kind != "tokens":
        q, k, v = _flat(q_BFTNK), _flat(k_BFTNK), _flat(v_BFTNK)
        return _framed(attend(q, k, v, visibility, num_frames=num_frames, backend=backend), q_BFTNK.shape[1])

    def attend_part(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, visibility, num_frames=num_frames, backend=backend)

    k, v = (constrain(x, "batch", None, None, "channels", None) for x in (k_BFTNK, v_BFTNK))
    k, v = (rearrange(x, "b f t n k -> b (f t) n k") for x in (k, v))
    return _by_parts(attend_part, q_BFTNK, k, v, parts)


def attend_prefix(
    q_BFTNK: jax.Array,
    read: Callable[[int], tuple[jax.Array, jax.Array]],
    visible: jax.Array,
    lengths: tuple[int, ...],
    *,
    exact: bool = False,
    backend: str = "auto",
) -> jax.Array:
    """A block's queries attend to the first `visible` frames (traced, 1 or more) of keys and values.

    Flash kernels skip the other frames. XLA's programs have static shapes: there, this is a `lax.switch` over the
    lengths that the prefix may have, each of which reads and computes no frame behind it.

    Args:
      read: a number of frames -> so many first keys and values, [B, F, T, N, K].
      lengths: ascending, in frames; the last one holds every prefix.
      exact: `visible` is one of the lengths; else the next longer one is computed, and masked.
    """
    frames, tokens, heads = q_BFTNK.shape[1:4]
    backend = pick_backend(backend, q_BFTNK.dtype)
    whole_heads = context_sharding(heads, tokens)[0] != "tokens"
    if _mask_prefixes.get():
        return attend_seen(q_BFTNK, *read(lengths[-1]), jnp.arange(lengths[-1]) < visible, backend=backend)
    skips = backend == "cudnn" or backend.startswith("splash")
    if skips and whole_heads and len(lengths) > 1:
        k, v = (_flat(x) for x in read(lengths[-1]))
        return _framed(dense(_flat(q_BFTNK), k, v, num_keys=visible * tokens, backend=backend), frames)

    def attend_first(length: int, q: jax.Array) -> jax.Array:
        return attend_seen(q, *read(length), None if exact else jnp.arange(length) < visible, backend=backend)

    branches = [partial(attend_first, length) for length in lengths]
    if len(branches) == 1:
        return branches[0](q_BFTNK)
    index = jnp.sum(jnp.asarray(lengths[:-1]) < visible)

    @jax.checkpoint  # a conditional would save the intermediate values of every branch for the backward pass
    def attend_visible(q: jax.Array) -> jax.Array:
        with jax.named_scope(VISIBLE_PREFIX):
            return jax.lax.switch(index, branches, q)

    return attend_visible(q_BFTNK)


def attend_seen(
    q_BFTNK: jax.Array, k_BFTNK: jax.Array, v_BFTNK: jax.Array, seen_F: jax.Array | None, *, backend: str = "auto"
) -> jax.Array:
    """All queries attend to the frames that are seen (bool; None: all)."""
    frames, tokens, heads = q_BFTNK.shape[1:4]
    if context_sharding(heads, tokens)[0] != "tokens":
        mask = None if seen_F is None else jnp.repeat(seen_F, tokens)
        return _framed(dense(_flat(q_BFTNK), _flat(k_BFTNK), _flat(v_BFTNK), key_mask_T=mask, backend=backend), frames)
    q = rearrange(constrain(q_BFTNK, "batch", None, None, "channels", None), "b f t n k -> b (f t) n k")
    k, v = (rearrange(constrain_kv(x), "b f t n k -> b (t f) n k") for x in (k_BFTNK, v_BFTNK))
    mask = None if seen_F is None else jnp.tile(seen_F, tokens)
    return _framed(dense(q, k, v, key_mask_T=mask, backend=backend), frames)


def group_lengths(lengths: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """At most MOST_LENGTHS of ascending lengths, the last one among them; and whether they are all of them."""
    groups = min(len(lengths), MOST_LENGTHS)
    kept = tuple(lengths[-(-(i + 1) * len(lengths) // groups) - 1] for i in range(groups))
    return kept, groups == len(lengths)


def attend_slots(
    q_BFTNK: jax.Array,
    k_BFTNK: jax.Array,
    v_BFTNK: jax.Array,
    read: Callable[[int], tuple[jax.Array, jax.Array]],
    count: jax.Array,
    counts: Sequence[int],
    *,
    bias_F: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """A block's queries attend to the first `count` (traced) of some slots, and to the own frames.

    Args:
      read: a number of slots -> the keys and values of so many first ones, [B, slots, T, N, K].
      counts: what `count` may be, ascending.
      bias_F: added to the logits of each slot's keys (-inf: not seen); then all slots are computed.
    """
    own = k_BFTNK.shape[1]
    if bias_F is not None:
        bias_F = jnp.where(jnp.arange(len(bias_F)) < count, bias_F, -jnp.inf)
        keys, values = (jnp.concatenate(x, axis=1) for x in zip(read(counts[-1]), (k_BFTNK, v_BFTNK), strict=True))
        return attend_biased(q_BFTNK, keys, values, jnp.pad(bias_F, (0, own)), backend=backend)

    if _mask_prefixes.get():  # the own frames behind all slots: none is written at a row's own place
        keys, values = (jnp.concatenate(x, axis=1) for x in zip(read(counts[-1]), (k_BFTNK, v_BFTNK), strict=True))
        seen_F = jnp.pad(jnp.arange(counts[-1]) < count, (0, own), constant_values=True)
        return attend_seen(q_BFTNK, keys, values, seen_F, backend=backend)

    def read_both(length: int) -> tuple[jax.Array, jax.Array]:
        known = read(length - own)
        both = [jnp.concatenate(x, axis=1) for x in zip(known, (k_BFTNK, v_BFTNK), strict=True)]
        if len(counts) > 1:  # fewer may be filled than are read
            both = [put_frames(x, new, count) for x, new in zip(both, (k_BFTNK, v_BFTNK), strict=True)]
        return both[0], both[1]

    lengths, exact = group_lengths([number + own for number in counts])
    return attend_prefix(q_BFTNK, read_both, count + own, lengths, exact=exact, backend=backend)


def attend_biased(
    q_BFTNK: jax.Array, k_BFTNK: jax.Array, v_BFTNK: jax.Array, bias_F: jax.Array, *, backend: str = "auto"
) -> jax.Array:
    """All queries attend to all keys, with a number added to the logits (-inf: not seen).

    Args:
      bias_F: the number of every frame, or of its every token, [F, T].
    """
    frames, tokens, heads = q_BFTNK.shape[1:4]
    bias_FT = jnp.broadcast_to(bias_F.reshape(len(bias_F), -1), (len(bias_F), tokens))
    if context_sharding(heads, tokens)[0] != "tokens":
        bias_T = bias_FT.reshape(-1)
        return _framed(
            dense(_flat(q_BFTNK), _flat(k_BFTNK), _flat(v_BFTNK), key_bias_T=bias_T, backend=backend), frames
        )
    q = rearrange(constrain(q_BFTNK, "batch", None, None, "channels", None), "b f t n k -> b (f t) n k")
    k, v = (rearrange(constrain_kv(x), "b f t n k -> b (t f) n k") for x in (k_BFTNK, v_BFTNK))
    return _framed(dense(q, k, v, key_bias_T=bias_FT.T.reshape(-1), backend=backend), frames)


def attend_masked(
    q_BFTNK: jax.Array, k_BFTNK: jax.Array, v_BFTNK: jax.Array, seen_BNF: jax.Array, *, backend: str = "auto"
) -> jax.Array:
    """All queries of a head attend to the frames that this head sees (bool)."""
    frames, tokens, heads = q_BFTNK.shape[1:4]
    if context_sharding(heads, tokens)[0] != "tokens":
        mask = jnp.repeat(seen_BNF, tokens, axis=2)
        out = dense(_flat(q_BFTNK), _flat(k_BFTNK), _flat(v_BFTNK), key_mask_T=mask, backend=backend)
        return _framed(out, frames)
    q = rearrange(constrain(q_BFTNK, "batch", None, None, "channels", None), "b f t n k -> b (f t) n k")
    k, v = (rearrange(constrain_kv(x), "b f t n k -> b (t f) n k") for x in (k_BFTNK, v_BFTNK))
    return _framed(dense(q, k, v, key_mask_T=jnp.tile(seen_BNF, (1, 1, tokens)), backend=backend), frames)


@jax.custom_vjp
def put_frames(past_BFTNK: jax.Array, own_BFTNK: jax.Array, at: jax.Array) -> jax.Array:
    """The past with frames written over those from `at` on.

    In the bits of bfloat16: XLA's CPU backend would widen the past to write into it, all layers of a cache at once.
    """
    if own_BFTNK.dtype == jnp.bfloat16:
        past, own = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (past_BFTNK, own_BFTNK))
        return jax.lax.bitcast_convert_type(put_frames(past, own, at), jnp.bfloat16)
    return jax.lax.dynamic_update_slice_in_dim(past_BFTNK, own_BFTNK, at, 1)


def _put_forward(past: jax.Array, own: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
    return put_frames(past, own, at), (own[..., :0], at)  # of which the shape is wanted


def _put_backward(kept: Any, grad_BFTNK: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    own, at = kept
    own = jax.lax.dynamic_slice_in_dim(grad_BFTNK, at, own.shape[1], 1)
    return jax.lax.dynamic_update_slice_in_dim(grad_BFTNK, jnp.zeros_like(own), at, 1), own, None


put_frames.defvjp(_put_forward, _put_backward)


def attend_text(q_BFTNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array, *, backend: str = "auto") -> jax.Array:
    """Cross-attention: every frame's tokens attend to all text rows."""

    def attend_part(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dense(q, k, v, backend=backend)

    return _by_parts(attend_part, q_BFTNK, k_BTNK, v_BTNK, token_shards(q_BFTNK.shape[2]))


def _by_parts(
    attend_part: Callable[..., jax.Array], q_BFTNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array, parts: int
) -> jax.Array:
    """All queries attend to all keys, with a shard of each frame's queries per device."""
    frames = q_BFTNK.shape[1]
    if parts == 1:
        flat = rearrange(q_BFTNK, "b f t n k -> b (f t) n k")
        return rearrange(attend_part(flat, k_BTNK, v_BTNK), "b (f t) n k -> b f t n k", f=frames)
    q = rearrange(q_BFTNK, "b f (c t) n k -> c b (f t) n k", c=parts)
    out = vmap_over_context(attend_part, (0, None, None))(
        constrain(q, "tokens", "batch", None, "channels", None), k_BTNK, v_BTNK
    )
    return rearrange(out, "c b (f t) n k -> b f (c t) n k", f=frames)
