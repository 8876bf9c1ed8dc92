"""A deep sink with participative compression: when the window is full, the tokens that recent queries look at stay.

    score of a token = < sum of the queries of the last `recent` frames, its key > / (sqrt(K) N), over all heads

Source: Deep Forcing, arXiv 2512.05081, section 4, and `_mkv_select_indices`, `_mkv_prune_cache` of its
`causal_model.py` with the fusion "sum" and without a bound on how often a token is chosen again. There the queries are
those of any call, so that the first, noisiest pass over a block chooses by its own; here they are the finished blocks',
as what a block sees is settled when the one before it is committed. Keys are compared at the positions at which they
were committed, at which the chosen tokens stay.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.errors import UserError
from cfjax.memory.bank import CHOSEN
from cfjax.memory.policies import DeepSink
from cfjax.memory.slots import Attend, Labels, Network, Observe, State, counts, labels, layer_slots, placed
from cfjax.nn.frames import attend_slots
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks


class Participation(NamedTuple):
    """Time positions of all slots' tokens, [L, B, slots, T], and every recent frame's sum of queries, oldest first."""

    position_LBFT: jax.Array
    query_LBFNK: jax.Array


@dataclass(frozen=True)
class DeepForcing(DeepSink):
    """See the module. Where blocks are committed again under another prompt, the chosen tokens are not among them.

    Attributes:
      capacity: frames that a block sees once tokens have been chosen, the sink and its own included.
      recent: the newest of these, which stay whole, the block's own included; and the frames whose queries count.
    """

    capacity: int = 16
    recent: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sink + self.recent < self.capacity <= self.window:
            raise UserError(
                f"memory: capacity={self.capacity} must be more than sink={self.sink} and recent={self.recent} "
                f"together, and at most window={self.window}"
            )

    @property
    def chosen(self) -> int:
        """Frames' worth of tokens that are chosen."""
        return self.capacity - self.sink - self.recent

    def slots(self, layout: Blocks) -> int:
        if self.recent < layout.frames or layout.independent_first_frame:
            raise UserError(
                f"memory: deep_forcing needs recent={layout.frames} or more, the frames of a block, and no first frame "
                f"of its own; recent={self.recent}"
            )
        return super().slots(layout)

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> Participation:
        rows = (network.num_layers, batch)
        positions = jnp.zeros((*rows, self.slots(layout), tokens), jnp.int32)
        return Participation(positions, jnp.zeros((*rows, self.recent, network.num_heads, network.head_dim)))

    def encoded(self, k_LBFTNK: jax.Array, v_LBFTNK: jax.Array) -> tuple[Any, Any]:
        """Keys as values are stored: single tokens move, and take their scales along."""
        return self.codec.encode_values(k_LBFTNK), self.codec.encode_values(v_LBFTNK)

    def observer(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Observe | None:
        """Sums of each frame's queries, [B, F, N, K]."""
        return lambda q, k, layer: jnp.sum(q.astype(jnp.float32), axis=2)

    def attention(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Attend:
        """As `Memory.attention`, with positions of every token's own behind the sink."""
        slots, rows = len(state.frame_F), to_bits((state.k, state.v))
        key_F, _ = self.positions(labels(state), start, frames)
        moved = (jnp.arange(slots) < self.sink)[:, None]
        position_LBFT = jnp.where(moved, key_F[:, None], state.extra.position_LBFT)
        filled = {*counts(slots, layout, self.protected), *range(self.capacity - layout.frames, slots, layout.frames)}

        def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
            def read(count: int) -> tuple[jax.Array, jax.Array]:
                keys, values = (self.codec.decode(from_bits(layer_slots(x, layer, count)), k.dtype) for x in rows)
                return _rotate_tokens(keys, layer_slots(position_LBFT, layer, count)), values

            return attend_slots(q, k, v, read, state.count, tuple(sorted(filled)), backend=network.attention)

        return self_attend

    def commit(
        self,
        state: State,
        k_LBFTNK: jax.Array,
        v_LBFTNK: jax.Array,
        start: jax.Array,
        text_LBNK: jax.Array | None = None,
        observed: Any = None,
    ) -> State:
        """As `Memory.commit`; where the slots do not hold the block, it leaves `capacity` less a block."""
        frames, tokens = k_LBFTNK.shape[2:4]
        slots, is_new = len(state.frame_F), start >= state.stop
        own_F = self.own_positions(state, start, frames)
        raw = jax.vmap(rotate_time, (0, None))(k_LBFTNK, -own_F)
        own = jnp.broadcast_to(own_F[:, None], (*raw.shape[:3], tokens)).astype(jnp.int32)
        both = lambda old, new: jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), old, new)
        whole = both((state.k, state.v, state.extra.position_LBFT), (*self.encoded(raw, v_LBFTNK), own))
        query_LBFNK = both(state.extra.query_LBFNK, observed)[:, :, frames:]

        total = state.count + frames
        prunes = total > slots
        order = self.order(state.count, slots, frames)
        kept = jax.tree.map(lambda x: jnp.take(x, order, axis=2), whole)
        kept = jax.lax.cond(
            prunes & is_new, lambda: self._pruned(kept, whole, query_LBFNK, state.count, frames), lambda: kept
        )
        put = lambda old, new: jnp.where(is_new, new, old)
        store = lambda old, new: jax.tree.map(lambda a, b: placed(put(a, b)), old, new)
        frame_F = both_labels(state.frame_F, start + jnp.arange(frames), order, prunes, self)
        position_F = both_labels(state.position_F, own_F, order, prunes, self)
        count = jnp.where(prunes, self.capacity - frames, total).astype(jnp.int32)
        return replace(
            state,
            k=store(state.k, kept[0]),
            v=store(state.v, kept[1]),
            frame_F=put(state.frame_F, frame_F),
            position_F=put(state.position_F, position_F),
            count=put(state.count, count),
            stop=put(state.stop, (start + frames).astype(jnp.int32)),
            jump=put(state.jump, jnp.int32(-1)),
            extra=Participation(put(state.extra.position_LBFT, kept[2]), put(state.extra.query_LBFNK, query_LBFNK)),
        )

    def order(self, count: Any, slots: int, frames: int, xp: Any = jnp) -> Any:
        """Which of [slots, own frames] are in the slots after a commit, but for the chosen tokens, [slots]."""
        slot, whole = xp.arange(slots), self.recent - frames
        total, first = count + frames, self.sink + self.chosen
        pruned = xp.where(slot < self.sink, slot, total - whole + slot - first)
        number = xp.clip(xp.where(total > slots, pruned, slot), 0, total - 1)
        return xp.where(number < count, number, slots + number - count)

    def _pruned(
        self,
        kept: tuple[Any, Any, jax.Array],
        whole: tuple[Any, Any, jax.Array],
        query_LBFNK: jax.Array,
        count: jax.Array,
        frames: int,
    ) -> tuple[Any, Any, jax.Array]:
        """`kept`, with the tokens that are chosen of the `whole` in their slots."""
        slots, tokens = whole[2].shape[2] - frames, whole[2].shape[3]
        place = jnp.arange(slots + frames)
        number = jnp.where(place < slots, place, count + place - slots)
        may = (number >= self.sink) & (number < count + 2 * frames - self.recent)
        may &= (place < count) | (place >= slots)

        def choose(layer: tuple[Any, Any, jax.Array, jax.Array]) -> tuple[Any, Any, jax.Array]:
            stored, _, position, queries = layer
            k = self.codec.decode(stored, queries.dtype)
            scores_BFT = participation(k, position, jnp.sum(queries, axis=1))
            flat = jnp.where(may[:, None], scores_BFT, -jnp.inf).reshape(len(k), -1)
            chosen = jnp.sort(jax.lax.top_k(flat, self.chosen * tokens)[1], axis=1)

            def take(x: jax.Array) -> jax.Array:
                rows = x.reshape(len(x), -1, *x.shape[3:])
                found = jnp.take_along_axis(rows, chosen.reshape(*chosen.shape, *(1,) * (rows.ndim - 2)), axis=1)
                return found.reshape(len(x), self.chosen, *x.shape[2:])

            return jax.tree.map(take, layer[:3])

        found = jax.lax.map(choose, (*whole, query_LBFNK))
        behind = slice(self.sink, self.sink + self.chosen)
        return jax.tree.map(lambda x, new: x.at[:, :, behind].set(new), kept, found)

    def next_labels(self, at: Labels, start: int, stop: int, own_F: np.ndarray) -> Labels:
        frames, slots = stop - start, len(at.frame_F)
        prunes, order = at.count + frames > slots, self.order(at.count, slots, frames, np)
        put = lambda old, own: np.asarray(both_labels(old, own, order, prunes, self, np))
        count = self.capacity - frames if prunes else at.count + frames
        return Labels(put(at.frame_F, np.arange(start, stop)), put(at.position_F, own_F), count, stop, at.offset, -1)


def both_labels(old_F: Any, own_F: Any, order: Any, prunes: Any, memory: DeepForcing, xp: Any = jnp) -> Any:
    """A number of every slot after a commit; CHOSEN where tokens were."""
    slot = xp.arange(len(old_F))
    chosen = (slot >= memory.sink) & (slot < memory.sink + memory.chosen) & prunes
    return xp.where(chosen, CHOSEN, xp.concatenate([old_F, own_F])[order]).astype(xp.int32)


def participation(k_BFTNK: jax.Array, position_BFT: jax.Array, query_BNK: jax.Array) -> jax.Array:
    """Every token's score, [B, F, T]; see the module.

    Args:
      k_BFTNK: keys, not rotated in time.  query_BNK: the sum of rotated queries.
    """
    keys = _rotate_tokens(k_BFTNK, position_BFT).astype(jnp.float32)
    heads, channels = query_BNK.shape[1:]
    return jnp.einsum("bftnk,bnk->bft", keys, query_BNK) / (channels**0.5 * heads)


def _rotate_tokens(x_BFTNK: jax.Array, position_BFT: jax.Array) -> jax.Array:
    """`rotate_time` with a position for every token."""
    batch, frames, tokens = position_BFT.shape
    rows = x_BFTNK.reshape(batch, frames * tokens, 1, *x_BFTNK.shape[3:])
    turn = lambda x, at: rotate_time(x[None], at)[0]
    return jax.vmap(turn)(rows, position_BFT.reshape(batch, -1)).reshape(x_BFTNK.shape)
