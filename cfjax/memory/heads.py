"""Memory policies in which groups of attention heads see different frames.

| policy | groups | source |
|---|---|---|
| `ForcingKV` | static and dynamic heads, by an offline table | Forcing-KV |
| `DummyForcing` | heads that look at the sink, at the newest frames, at neither, grouped on the way | Dummy Forcing |

With a table, a layer's heads are brought into the order of their groups where attention begins, and back where it
ends, so that a group is one call with one set of frames. Groups have the same size in all layers: in those with fewer
heads, some are computed that nobody reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.errors import UserError
from cfjax.memory.bank import CHOSEN
from cfjax.memory.codecs import cut_frames, over_heads
from cfjax.memory.profile import HeadTable, attention_mass
from cfjax.memory.slots import (
    Attend,
    Incoming,
    Memory,
    Network,
    Observe,
    Seen,
    State,
    counts,
    labels,
    layer_slots,
    placed,
    rotate_rows,
)
from cfjax.nn.frames import attend_masked, attend_slots, constrain_kv
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks

# (q, k, v [B, F, T, N of the group, K], what picks the group's heads from [..., N, K]) -> attended values
AttendGroup = Callable[[jax.Array, jax.Array, jax.Array, Callable[[jax.Array], jax.Array]], jax.Array]


class Groups(NamedTuple):
    """Every layer's heads, sorted into groups.

    heads: of each group, [L, N of the group]; a layer with fewer has head 0 in the last places.
    place_LN: where each head is among the groups' heads, one group behind the other.
    """

    heads: tuple[np.ndarray, ...]
    place_LN: np.ndarray


def sort_heads(group_LN: np.ndarray, groups: int) -> Groups:
    """Groups from every head's number of its group."""
    place_LN, heads, first = np.zeros(group_LN.shape, np.int32), [], 0
    for group in range(groups):
        rows = [np.flatnonzero(row == group) for row in group_LN]
        found = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for layer, row in enumerate(rows):
            found[layer, : len(row)] = row
            place_LN[layer, row] = first + np.arange(len(row))
        heads.append(found)
        first += found.shape[1]
    return Groups(tuple(heads), place_LN)


def attend_groups(
    groups: Groups, q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, attend: Sequence[AttendGroup]
) -> jax.Array:
    """Self-attention of one layer, [B, F, T, N, K], a call per group."""
    pick = lambda x, table_LN: jnp.take(x, jnp.asarray(table_LN)[layer], axis=-2, mode="clip")
    outputs = [
        one(pick(q, heads_LN), pick(k, heads_LN), pick(v, heads_LN), partial(pick, table_LN=heads_LN))
        for heads_LN, one in zip(groups.heads, attend, strict=True)
        if heads_LN.shape[1]
    ]
    return pick(jnp.concatenate(outputs, axis=-2), groups.place_LN)


def heads_of(stored: Any, heads_LN: np.ndarray) -> Any:
    """The keys or values of some of every layer's heads, stored as those of all, [L, B, F, ...]."""

    def pick(x: jax.Array, axis: int) -> jax.Array:
        shape = [1] * x.ndim
        shape[0], shape[axis] = heads_LN.shape
        return jnp.take_along_axis(x, jnp.asarray(heads_LN).reshape(shape), axis=axis)

    return over_heads(stored, pick)


class Runs(NamedTuple):
    """The dynamic heads' runs of tokens, [L, B, runs, tokens of a run, dynamic heads, K], keys not rotated in time.

    k, v: stored as in the slots, with the same first three axes.  position_BF: of every run.  filled: whether there are
    any.  first: the first frame of the stream's first block, or -1 before it.
    """

    k: Any
    v: Any
    position_BF: jax.Array
    filled: jax.Array
    first: jax.Array


@dataclass(frozen=True)
class ForcingKV(Memory):
    """Static heads see the sink and the newest frames; dynamic heads besides what changed most before these.

    When a block is committed, as many frames leave the newest ones. Each is cut into `runs` of consecutive tokens, a
    run's tokens are compared with those of the next frame (cosine of the dynamic heads' keys, mean over the run), and
    the most dissimilar runs, as many as fill `dynamic` frames, take the place of those before. All heads of the first
    layer are static. Source: Forcing-KV, `wan/modules/causal_model_forcingkv.py`, and its configuration for Causal
    Forcing; its `ring` of one frame is here what the window leaves beside the rest.

    As in that code, the choice is made in one layer (here the first that has dynamic heads; there number 1) for all,
    of equally similar runs the earlier ones are kept, and nothing is chosen before the block after `warmup`. Otherwise
    than there, every video of a batch has its own choice (there the first one's is everybody's, and outlives its
    video), and keys are compared without the rotation of the time axis, so that what does not move has similarity 1.

    Attributes:
      window: frames that a dynamic head sees at most, the block's own included.
      profile: which heads are static (`cfjax profile_heads`).
      dynamic: frames' worth of runs.  runs: of a frame, or fewer, as many as divide its tokens.
      warmup: number of the last block at whose commit nothing is chosen.
    """

    window: int = 6
    sink: int = 1
    profile: HeadTable = field(default_factory=HeadTable)
    dynamic: int = 1
    runs: int = 6
    warmup: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dynamic", 1), ("runs", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"memory: {name}={getattr(self, name)}: use {least} or more")

    def check(self, network: Network) -> None:
        self.profile.check(network)

    @cached_property
    def groups(self) -> Groups:
        """Static heads and dynamic ones."""
        dynamic_LN = ~np.array(self.profile.static_LN)
        dynamic_LN[0] = False
        return sort_heads(dynamic_LN.astype(np.int32), 2)

    @cached_property
    def compared(self) -> tuple[int, int]:
        """The layer in which runs are compared, and how many dynamic heads it has."""
        numbers = (~np.array(self.profile.static_LN)).sum(axis=1)
        numbers[0] = 0
        layer = int(np.argmax(numbers > 0))
        return layer, int(numbers[layer])

    def slots(self, layout: Blocks) -> int:
        """Slots of what all heads see: the sink and the newest frames."""
        if not self.profile.path:
            raise UserError("memory: forcing_kv needs profile=FILE, a table that cfjax profile_heads writes")
        if layout.independent_first_frame:
            raise UserError("memory: forcing_kv needs blocks of one size; it takes no independent first frame")
        if self.dynamic > layout.frames:
            raise UserError(f"memory: dynamic={self.dynamic}: use at most {layout.frames}, the frames of a block")
        slots, least = self.window - layout.frames - self.dynamic, self.sink + 1
        if slots < least:
            raise UserError(
                f"memory: window={self.window} must hold the sink, a frame, dynamic={self.dynamic} and one block: at "
                f"least {least + self.dynamic + layout.frames}"
            )
        return slots

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> Runs:
        self.check(network)
        runs, heads = max(n for n in range(1, self.runs + 1) if tokens % n == 0), self.groups.heads[1].shape[1]
        shape = (network.num_layers, batch, self.dynamic, tokens, heads, network.head_dim)
        whole = self.encoded(*(constrain_kv(jnp.zeros(shape, network.precision.compute)) for _ in range(2)))
        k, v = (jax.tree.map(placed, cut_frames(x, runs)) for x in whole)
        return Runs(k, v, jnp.zeros((batch, self.dynamic * runs), jnp.int32), jnp.bool_(False), jnp.int32(-1))

    def attention(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Attend:
        """As `Memory.attention`, a call per group."""
        slots, runs = len(state.frame_F), state.extra
        rows, run_rows = to_bits((state.k, state.v)), to_bits((runs.k, runs.v))
        key_F, _ = self.positions(labels(state), start, frames)
        filled, backend, decode = counts(slots, layout, self.protected), network.attention, self.codec.decode

        def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
            def newest(count: int, pick: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
                keys, values = (decode(from_bits(layer_slots(x, layer, count)), k.dtype) for x in rows)
                return rotate_time(pick(keys), key_F[:count]), pick(values)

            def with_runs(count: int, pick: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
                if count <= slots:
                    return newest(count, pick)
                number = runs.position_BF.shape[1]
                keys, values = (decode(from_bits(layer_slots(x, layer, number)), k.dtype) for x in run_rows)
                own = (rotate_rows(keys, runs.position_BF), values)
                whole = (rearrange(x, "b (f r) t n k -> b f (r t) n k", r=number // self.dynamic) for x in own)
                both = [jnp.concatenate(x, axis=1) for x in zip(newest(slots, pick), whole, strict=True)]
                return both[0], both[1]

            def static(q: jax.Array, k: jax.Array, v: jax.Array, pick: Any) -> jax.Array:
                read = lambda count: newest(count, pick)
                return attend_slots(q, k, v, read, state.count, filled, backend=backend)

            def dynamic(q: jax.Array, k: jax.Array, v: jax.Array, pick: Any) -> jax.Array:
                read = lambda count: with_runs(count, pick)
                count = jnp.where(runs.filled, slots + self.dynamic, state.count)
                return attend_slots(q, k, v, read, count, (*filled, slots + self.dynamic), backend=backend)

            return attend_groups(self.groups, q, k, v, layer, (static, dynamic))

        return self_attend

    def before_commit(self, state: State, new: Incoming) -> State:
        """Chooses runs among the frames that leave the newest ones."""
        extra, number = state.extra, state.extra.position_BF.shape[1]
        runs = number // self.dynamic
        first = jnp.where(extra.first < 0, new.start, extra.first).astype(jnp.int32)
        full = state.count == len(state.frame_F)
        fills = new.is_new & full & ((new.start - first) // new.frames > self.warmup)
        behind = lambda old, own: jnp.concatenate([old[:, :, self.sink :], own], axis=2)
        both = (jax.tree.map(behind, state.k, new.k), jax.tree.map(behind, state.v, new.v))
        k, v = (heads_of(x, self.groups.heads[1]) for x in both)
        own_F = self.own_positions(state, new.start, new.frames)
        position_F = jnp.concatenate([state.position_F[self.sink :], own_F.astype(jnp.int32)])
        layer, compared = self.compared
        keys = self.codec.decode(jax.tree.map(lambda x: x[layer], k), jnp.float32)
        chosen_BF = most_changed(keys[..., :compared, :], new.frames, runs, number)

        def take(stored: Any, old: Any) -> Any:
            def one(x: jax.Array, old: jax.Array) -> jax.Array:
                found = jnp.take_along_axis(x, chosen_BF.reshape(1, *chosen_BF.shape, *(1,) * (x.ndim - 3)), axis=2)
                return placed(jnp.where(fills, found, old))

            leaving = jax.tree.map(lambda x: x[:, :, : new.frames], stored)
            return jax.tree.map(one, cut_frames(leaving, runs), old)

        chosen = Runs(
            take(k, extra.k),
            take(v, extra.v),
            jnp.where(fills, position_F[chosen_BF // runs], extra.position_BF),
            extra.filled | fills,
            jnp.where(new.is_new, first, extra.first),
        )
        return replace(state, extra=chosen)

    def forget(self, state: State) -> State:
        return replace(super().forget(state), extra=state.extra._replace(filled=jnp.bool_(False)))

    def missing(self, state: State, layout: Blocks) -> int:
        """The newest frames, and those that were newest before the last block: its runs are chosen among them."""
        return len(state.frame_F) - self.sink + layout.frames

    def plan(self, num_frames: int, layout: Blocks, group: str = "dynamic") -> list[Seen]:
        """What the heads of a group see, "static" or "dynamic"; CHOSEN are the runs, of `candidates`."""
        found, slots = super().plan(num_frames, layout), self.slots(layout)
        if group == "static":
            return found
        runs = (CHOSEN,) * self.dynamic
        full = lambda number: number >= 0 and len(found[number].frames) == slots
        return [
            seen._replace(frames=(*seen.frames, *runs), positions=(*seen.positions, *runs))
            if number > self.warmup + 1 and full(number - 1)
            else seen
            for number, seen in enumerate(found)
        ]

    def candidates(self, start: int, layout: Blocks) -> tuple[int, ...]:
        """The frames of which a block that begins at `start` may see runs."""
        stop = start - (self.slots(layout) - self.sink)
        return tuple(range(stop - layout.frames, stop))


class Roles(NamedTuple):
    """Which group every layer's, video's and head's is: one of `GROUPS`' numbers, 0 before they are known.

    first: the first frame of the stream's first block, or -1 before it.
    """

    group_LBN: jax.Array
    first: jax.Array


@dataclass(frozen=True)
class DummyForcing(Memory):
    """Of what the window holds, some heads see the sink alone, some the newest frames, and dummy heads the newest one.

    All heads see everything until the block `warmup` is committed. Then, from the attention of that block's queries to
    the sink (p0) and to the other frames before the block (p1), each divided by its sum over all layers and heads, the
    share `dummies` of the heads with the lowest max(p0, p1) are dummies; of the rest, those with p0 >= p1 see the sink,
    the others the newest frames. Source: Dummy Forcing, `online_head_classification` in `wan/modules/dummyforcing.py`,
    and `wan/modules/causal_model.py`.

    As groups are each video's own and known only as it streams, all heads keep and compute the same frames, and a mask
    hides those that a head does not see: the same videos, but not the public code's speed. That code takes a random
    third of a frame's queries, the first video's groups for all, and, where `warmup` is not 1, a whole block's tokens
    as the sink's; here all queries count, each video has its groups, and the sink's tokens are the sink's.

    Attributes:
      warmup: number of the block at whose commit heads are grouped.  dummies: the share of dummy heads.
    """

    window: int = 7
    sink: int = 1
    warmup: int = 1
    dummies: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 1 or not self.sink:
            raise UserError(
                f"memory: warmup={self.warmup}, sink={self.sink}: dummy_forcing compares the attention to what was "
                "seen; use 1 or more"
            )
        if not 0.0 <= self.dummies <= 1.0:
            raise UserError(f"memory: dummies={self.dummies}: use a number from 0 to 1")

    def slots(self, layout: Blocks) -> int:
        if layout.independent_first_frame:
            raise UserError("memory: dummy_forcing needs blocks of one size; it takes no independent first frame")
        slots = super().slots(layout)
        if slots == self.sink:
            raise UserError(f"memory: window={self.window} must hold a frame besides the sink and one block")
        return slots

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> Roles:
        return Roles(jnp.zeros((network.num_layers, batch, network.num_heads), jnp.int32), jnp.int32(-1))

    def seen(self, group: Any, count: Any, slots: int, xp: Any = jnp) -> Any:
        """Which slots the heads of some groups see, [..., slots]."""
        slot = xp.arange(slots).reshape((1,) * group.ndim + (-1,))
        group, sinks = group[..., None], slot < self.sink
        own = xp.where(group == 1, sinks, xp.where(group == 2, ~sinks, slot == count - 1))
        return (slot < count) & (own | (group == 0))

    def attention(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Attend:
        """As `Memory.attention`, with a mask of every head's own."""
        rows, slots = to_bits((state.k, state.v)), len(state.frame_F)
        key_F, _ = self.positions(labels(state), start, frames)
        seen_LBNF = self.seen(state.extra.group_LBN, state.count, slots)

        def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
            past = self._read(rows, key_F, layer, k.dtype)
            keys, values = (jnp.concatenate(x, axis=1) for x in zip(past, (k, v), strict=True))
            seen_BNF = jnp.pad(seen_LBNF[layer], ((0, 0), (0, 0), (0, frames)), constant_values=True)
            return attend_masked(q, keys, values, seen_BNF, backend=network.attention)

        return self_attend

    def _read(
        self, rows: tuple[Any, Any], key_F: jax.Array, layer: jax.Array, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """A layer's keys, rotated, and values, [B, slots, T, N, K]."""
        keys, values = (from_bits(layer_slots(x, layer, len(key_F))) for x in rows)
        return rotate_time(self.codec.decode(keys, dtype), key_F), self.codec.decode(values, dtype)

    def observer(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Observe | None:
        """Attention to the sink, to other frames before the block, and to its own, [B, N, 3]; 0 but in `warmup`."""
        rows, slots = to_bits((state.k, state.v)), len(state.frame_F)
        key_F, _ = self.positions(labels(state), start, frames)
        seen_F = jnp.pad(jnp.arange(slots) < state.count, (0, frames), constant_values=True)

        def observe(q: jax.Array, k: jax.Array, layer: jax.Array) -> jax.Array:
            def masses() -> jax.Array:
                keys = jnp.concatenate([self._read(rows, key_F, layer, k.dtype)[0], k], axis=1)
                mass_BNF = attention_mass(q, keys, seen_F)
                parts = (slice(self.sink), slice(self.sink, slots), slice(slots, None))
                return jnp.stack([mass_BNF[..., part].sum(-1) for part in parts], axis=-1)

            none = lambda: jnp.zeros((q.shape[0], q.shape[3], 3), jnp.float32)
            return jax.lax.cond(self._groups_now(state, start, frames), masses, none)

        return observe

    def _groups_now(self, state: State, start: jax.Array, frames: int) -> jax.Array:
        number = (start - jnp.where(state.extra.first < 0, start, state.extra.first)) // frames
        return (start >= state.stop) & (number == self.warmup)

    def before_commit(self, state: State, new: Incoming) -> State:
        extra, now = state.extra, self._groups_now(state, new.start, new.frames)
        first = jnp.where(new.is_new & (extra.first < 0), new.start, extra.first).astype(jnp.int32)
        groups = jnp.where(now, group_heads(new.observed, self.dummies), extra.group_LBN)
        return replace(state, extra=Roles(groups, first))

    def plan(self, num_frames: int, layout: Blocks, group: str = "") -> list[Seen]:
        """What the heads of a group of `GROUPS` see; "": what any head sees."""
        found = []
        for number, told in enumerate(super().plan(num_frames, layout)):
            if group and number > self.warmup:
                count = len(told.frames)
                kept = np.flatnonzero(self.seen(np.array(GROUPS.index(group) + 1), count, count, np))
                frames, positions = (tuple(x[i] for i in kept) for x in (told.frames, told.positions))
                told = told._replace(frames=frames, positions=positions)
            found.append(told)
        return found


GROUPS = ("sink", "newest", "dummy")  # of DummyForcing, numbered from 1


def group_heads(mass_LBNI: jax.Array, dummies: float) -> jax.Array:
    """Every head's number in `GROUPS`, [L, B, N], for each video; of equal ones, earlier heads are dummies.

    Args:
      mass_LBNI: attention to the sink, to other frames before the block, and to its own.
    """
    layers, batch, heads = mass_LBNI.shape[:3]
    sums = jnp.sum(mass_LBNI, axis=(0, 2), keepdims=True)
    share = mass_LBNI / jnp.maximum(sums, jnp.finfo(jnp.float32).tiny)
    to_sink, to_newest = share[..., 0], share[..., 1]
    cost = jnp.maximum(to_sink, to_newest).swapaxes(0, 1).reshape(batch, layers * heads)
    rank = jnp.argsort(jnp.argsort(cost, axis=1), axis=1).reshape(batch, layers, heads).swapaxes(0, 1)
    return jnp.where(rank < round(dummies * layers * heads), 3, jnp.where(to_sink >= to_newest, 1, 2))


def most_changed(k_BFTNK: jax.Array, frames: int, runs: int, number: int) -> jax.Array:
    """The runs of the first frames that are least like the same run of the next frame, [B, number], ascending.

    Args:
      k_BFTNK: more than `frames` frames' keys.  runs: of a frame; all are numbered one frame behind the other.
    """
    k = k_BFTNK[:, : frames + 1].astype(jnp.float32)
    then, after = k[:, :-1], k[:, 1:]
    dot = lambda a, b: jnp.sum(a * b, axis=(-2, -1))
    # The root of a square is exact: equal keys have similarity 1, and tie.
    lengths = jnp.sqrt(dot(then, then) * dot(after, after))
    similarity_BFT = dot(then, after) / jnp.maximum(lengths, 1e-20)
    mean_BF = jnp.mean(rearrange(similarity_BFT, "b f (r t) -> b (f r) t", r=runs), axis=-1)
    return jnp.sort(jnp.argsort(mean_BF, axis=1)[:, :number], axis=1)
