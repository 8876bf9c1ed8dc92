"""JAX's splash attention, TPU's flash kernel that skips unseen blocks, under every visibility and for a KV cache.

One kernel call per layer, whatever the visibility: each query carries one number, the token at which its block ends,
and the kernel compares key positions with it (`Rule`). Blocks of scores that are all masked are neither fetched nor
computed. JAX's own mask processing would visit every score (minutes at the 2 x 32760 tokens of teacher forcing), so the
block tables are made here, from the few distinct rows of the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import PartitionSpec

from cfjax.core.sharding import activation_spec, active_mesh
from cfjax.nn.visibility import Visibility

LANES = 128  # blocks of scores are multiples of it
LARGEST = 1024  # block of scores: four megabytes in float32


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees: a function that the kernel calls on blocks of (end of the query's block, key's index).

    Attributes:
      kind: "full", "block_causal" or "replay", see `nn.visibility`.
      keys: number of keys; what is padded behind them is not seen.
      block: tokens of a block (the first one may be shorter).
      window, sink: in tokens; window 0 sees everything.
    """

    kind: str
    keys: int
    block: int = 0
    window: int = 0
    sink: int = 0

    def __call__(self, end: Any, key: Any) -> Any:
        """Whether a query sees `key`; `end`: token at which its block ends in the video (not in [context, noisy])."""
        if self.kind == "full":
            return key < self.keys
        recent = end - (self.window - self.sink)
        if self.kind == "block_causal":
            seen = key < end
            return seen & ((key < self.sink) | (key >= recent)) if self.window else seen
        half = self.keys // 2
        start = end - self.block  # negative in a short first block, which has no past
        past = key < start
        if self.window:
            past = past & ((key < self.sink) | (key >= recent))
        return past | ((key >= half) & (key >= half + start) & (key < half + end))


def block_size(length: int) -> int:
    """The multiple of `LANES` from half of `LARGEST` up that pads `length` least; one block if it is short."""
    if length <= LARGEST:
        return -(-length // LANES) * LANES
    sizes = range(LARGEST, LARGEST // 2 - 1, -LANES)
    return min(sizes, key=lambda size: -(-length // size) * size)


def block_ends(visibility: Visibility, num_frames: int, q_tokens: int, k_tokens: int) -> np.ndarray:
    """The token at which each query's block ends, int32 [num_frames * q_tokens]; see `Rule`."""
    spans = [(0, num_frames)] if visibility.kind == "full" else visibility.blocks.spans(num_frames)
    ends = [stop * k_tokens for start, stop in spans for _ in range(start, stop)]
    return np.repeat(np.asarray(ends, np.int32), q_tokens)


def seen_blocks(rule: Rule, ends_T: np.ndarray, q_size: int, k_size: int) -> np.ndarray:
    """Which blocks of scores hold any that is seen, bool [q blocks, k blocks]; the queries are padded already."""
    values, which = np.unique(ends_T, return_inverse=True)
    k_blocks = -(-rule.keys // k_size)
    keys = np.arange(k_blocks * k_size, dtype=np.int32)
    some = np.stack([rule(end, keys).reshape(k_blocks, k_size).any(1) for end in values])
    return np.stack([some[np.unique(rows)].any(0) for rows in which.reshape(-1, q_size)])


def _small(table: np.ndarray) -> np.ndarray:
    """In the smallest integer dtype: scalar memory is scarce."""
    kind = next(k for k in (np.int8, np.int16, np.int32) if table.max() <= np.iinfo(k).max)
    return table.astype(kind)


def _next_seen(seen: np.ndarray) -> np.ndarray:
    """The column to fetch at each step of an iteration over rows: its own if it is seen, else the next that is."""
    flat = seen.ravel()
    positions = np.flatnonzero(flat)
    following = positions[np.searchsorted(positions, np.arange(flat.size)) % positions.size]
    return (following % seen.shape[1]).reshape(seen.shape)


def _tables(seen: np.ndarray, ends_T: np.ndarray | None) -> tuple[MaskInfo, MaskInfo]:
    """Mask tables of the kernels that iterate over keys, and of the one that iterates over queries."""
    mask = _small(seen.astype(np.int32)[None])
    along_keys = _small(_next_seen(seen)[None])
    along_queries = _small(_next_seen(seen.T).T[None])
    return MaskInfo(along_keys, None, mask, None, ends_T), MaskInfo(along_queries, None, mask, None, ends_T)


def _traced_tables(mask_T: jax.Array, q_blocks: int, k_size: int) -> tuple[MaskInfo, MaskInfo]:
    """`_tables` for a traced mask of keys: blocks of keys that are all masked are skipped."""
    seen = mask_T.reshape(-1, k_size).any(1)
    shape = (1, q_blocks, seen.size)
    column = jnp.where(seen, jnp.arange(seen.size, dtype=jnp.int32), seen.size)
    following = jax.lax.cummin(column, reverse=True)
    following = jnp.where(following == seen.size, column.min(), following)
    mask, along_keys = (jnp.broadcast_to(x.astype(jnp.int32)[None, None], shape) for x in (seen, following))
    along_queries = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return MaskInfo(along_keys, None, mask, None, None), MaskInfo(along_queries, None, mask, None, None)


def _run(tables: tuple[MaskInfo, MaskInfo], q_size: int, k_size: int, rule: Rule | None, interpret: bool) -> Any:
    kernel = splash.SplashAttentionKernel(
        tables[0],
        tables[0],
        tables[1],
        # The fused backward kernel would need 30 times the memory at 32768 tokens.
        block_sizes=splash.BlockSizes(*(q_size, k_size, k_size) * 2, q_size, k_size),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=rule,
        interpret=interpret,
    )
    return jax.vmap(kernel, in_axes=(0, 0, 0, None))


def _padded(x: jax.Array, axis: int, size: int, mode: Any = "constant") -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths, mode=mode) if widths[axis][1] else x


def _on_device(
    q_BTNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array, mask_T: jax.Array | None, *, rows: Any, interpret: bool
) -> jax.Array:
    """One device's part: its samples and heads, all tokens. `rows`: (Rule, a number per query); None: see `mask_T`."""
    queries, keys = q_BTNK.shape[1], k_BTNK.shape[1]
    q_size, k_size = block_size(queries), block_size(keys)
    scaled = (q_BTNK.astype(jnp.float32) * q_BTNK.shape[-1] ** -0.5).astype(q_BTNK.dtype)  # the kernel does not
    q, k, v = (_padded(x.swapaxes(1, 2), 2, size) for x, size in ((scaled, q_size), (k_BTNK, k_size), (v_BTNK, k_size)))
    if mask_T is None:
        rule, ends = rows
        ends = np.pad(ends, (0, q.shape[2] - queries), mode="edge")
        tables, segments = _tables(seen_blocks(rule, ends, q_size, k_size), ends), None
    else:
        rule, mask = None, _padded(mask_T, 0, k_size)
        tables = _traced_tables(mask, q.shape[2] // q_size, k_size)
        segments = splash.SegmentIds(jnp.ones(q.shape[2], jnp.int32), mask.astype(jnp.int32))
    out = _run(tables, q_size, k_size, rule, interpret)(q, k, v, segments)
    return out[:, :, :queries].swapaxes(1, 2)


def _everywhere(part: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, *mask: jax.Array | None):
    """`part` on every device of the active mesh, by `shard_map`: XLA cannot partition a kernel."""
    if active_mesh() is None:
        return part(q, k, v, *mask)
    specs = [activation_spec(x.shape, ("batch", None, "heads", None)) for x in (q, k, v)]
    whole = [PartitionSpec()] * len(mask)
    return jax.shard_map(part, in_specs=(*specs, *whole), out_specs=specs[0], check_vma=False)(q, k, v, *mask)


def splash_attend(
    q_BTNK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    visibility: Visibility,
    *,
    num_frames: int,
    interpret: bool = False,
) -> jax.Array:
    """`nn.attention.attend` by the kernel: one call; two for `teacher_forced` ("block_causal", "replay")."""
    again = partial(splash_attend, num_frames=num_frames, interpret=interpret)
    if visibility.kind == "teacher_forced":
        q_half, k_half = q_BTNK.shape[1] // 2, k_BTNK.shape[1] // 2
        clean, noisy = (Visibility(kind, visibility.blocks) for kind in ("block_causal", "replay"))
        first = again(q_BTNK[:, :q_half], k_BTNK[:, :k_half], v_BTNK[:, :k_half], clean)
        return jnp.concatenate([first, again(q_BTNK[:, q_half:], k_BTNK, v_BTNK, noisy)], axis=1)
    blocks, keys = visibility.blocks, k_BTNK.shape[1]
    tokens = keys // (2 * num_frames if visibility.kind == "replay" else num_frames)
    rule = Rule(visibility.kind, keys, *(n * tokens for n in (blocks.frames, blocks.window, blocks.sink)))
    ends = block_ends(visibility, num_frames, q_BTNK.shape[1] // num_frames, tokens)
    part = partial(_on_device, mask_T=None, rows=(rule, ends), interpret=interpret)
    return _everywhere(part, q_BTNK, k_BTNK, v_BTNK)


def splash_dense(
    q_BTNK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    *,
    key_mask_T: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`nn.attention.dense` by the kernel; blocks of keys that are all masked cost nothing."""
    if key_mask_T is not None:
        part = partial(_on_device, rows=None, interpret=interpret)
        return _everywhere(part, q_BTNK, k_BTNK, v_BTNK, key_mask_T)
    keys = k_BTNK.shape[1]
    rows = (Rule("full", keys), np.full(q_BTNK.shape[1], keys, np.int32))
    part = partial(_on_device, mask_T=None, rows=rows, interpret=interpret)
    return _everywhere(part, q_BTNK, k_BTNK, v_BTNK)
