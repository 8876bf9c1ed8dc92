"""Anchor, wave and veil heads: three ways to keep the frames between the sink and the newest ones.

| heads | label | sink | frames between | of these a query sees |
|---|---|---|---|---|
| anchor | 1 | `sink` | every `period`-th, the last `capacity` | all |
| wave | -1 | 1 | the last `capacity` of each remainder by `period` | those with the remainder of its own frame |
| veil | 2 | `sink` | means of `merged` frames in a row, the last `capacity` | all |

Sink and frames between are read as if they were `far` frames before the query's own (while it is below that, at 0);
the newest frames stay where they are. Source: Pyramid Forcing, arXiv 2605.13111, `configs/pyramid-forcing.yaml`,
`headkv/_mega_state_ref.py`, `headkv/csrc/mega_plan.cc`, and `map_sink_time` with its mode "window_clamp".

That code takes the first block's own frames for sink, so that they are read at 0; here a block's frames always have
their own positions. Its CUDA planner shows frames twice that are between and still among the newest, which its Python
planner leaves out, as is done here; and it reads means at the middle of their frames although the configuration asks
for the sink's position, which they have here.

A mean is over `merged` frames and over the `patch` x `patch` tokens of a square of each, as in its `MergeStrategy`:
squares begin at the top left, those at the edges may be smaller, and a mean has the place of its first token. Its keys
are not rotated when they are averaged; here they are rotated to that place first, which is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.errors import UserError
from cfjax.memory.heads import Groups, attend_groups, heads_of, sort_heads
from cfjax.memory.profile import LABELS, HeadLabels
from cfjax.memory.slots import EMPTY, MERGED, Attend, Incoming, Memory, Network, Seen, State, layer_slots, placed
from cfjax.nn.frames import attend_biased, constrain_kv
from cfjax.nn.rope import rotate_space, rotate_time
from cfjax.nn.visibility import Blocks

KINDS = tuple(LABELS)


class Between(NamedTuple):
    """Keys and values of one kind of heads, stored as in the slots, [L, B, frames, ...]; each one's (last) frame."""

    k: Any
    v: Any
    frame_F: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Middle:
    """What lies between sink and newest frames.

    kept: of anchor, wave and veil heads.  sums: of the veil heads' keys and values that are being merged, float32.
    first: the first frame of the stream, or -1 before it.  newest: the last frame that was taken in.  width: tokens of
    a row of a frame.
    """

    kept: tuple[Between, Between, Between]
    sums: tuple[jax.Array, jax.Array]
    first: jax.Array
    newest: jax.Array
    width: int = field(metadata={"static": True})


class Squares(NamedTuple):
    """The squares of a frame's tokens: each token's square, and its place there, [T]; how many tokens each has."""

    square: np.ndarray
    row: np.ndarray
    column: np.ndarray
    sizes: np.ndarray


def squares_of(tokens: int, width: int, patch: int) -> Squares:
    """Squares in rows from the top left."""
    row, column = np.divmod(np.arange(tokens), max(width, 1))
    square = row // patch * -(-width // patch) + column // patch if patch > 1 else np.arange(tokens)
    return Squares(square, row % patch, column % patch, np.bincount(square))


@dataclass(frozen=True)
class PyramidHeads(Memory):
    """See the module.

    Attributes:
      window: frames that a head sees at most: its sink, `capacity`, newest ones, and the block's own.
      profile: every head's label.
      period, capacity, merged, patch: see above.  near, far: bounds of the distance from a query to what is before the
        newest frames.
    """

    window: int = 11
    sink: int = 3
    profile: HeadLabels = field(default_factory=HeadLabels)
    period: int = 6
    capacity: int = 4
    merged: int = 4
    near: int = 18
    far: int = 21
    patch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sink", "period", "capacity", "merged", "patch"):
            if getattr(self, name) < 1:
                raise UserError(f"memory: {name}={getattr(self, name)}: use 1 or more")
        if not 0 <= self.near <= self.far:
            raise UserError(f"memory: near={self.near}: use 0 or more, at most far={self.far}")

    def check(self, network: Network) -> None:
        self.profile.check(network)

    @cached_property
    def groups(self) -> Groups:
        """Anchor, wave and veil heads."""
        label_LN = np.array(self.profile.label_LN)
        return sort_heads(np.argmax([label_LN == label for label in LABELS.values()], axis=0), 3)

    def slots(self, layout: Blocks) -> int:
        """Slots of the sink and the newest frames."""
        if not self.profile.path:
            raise UserError("memory: pyramid needs profile=FILE.csv, a table that cfjax profile_heads writes")
        if layout.independent_first_frame:
            raise UserError("memory: pyramid needs blocks of one size; it takes no independent first frame")
        slots, least = self.window - layout.frames - self.capacity, self.sink + 1
        if slots < least:
            raise UserError(
                f"memory: window={self.window} must hold the sink, capacity={self.capacity}, a newest frame and one "
                f"block: at least {least + self.capacity + layout.frames}"
            )
        return slots

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> Middle:
        self.check(network)
        if self.patch > 1 and (width < 1 or tokens % width):
            raise ValueError(f"width={width}: patch={self.patch} needs the tokens of a row, of {tokens}")
        merged = len(squares_of(tokens, width, self.patch).sizes)

        def empty(frames: int, kind: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
            heads = self.groups.heads[kind].shape[1]
            number = merged if KINDS[kind] == "veil" else tokens
            shape = (network.num_layers, batch, frames, number, heads, network.head_dim)
            k, v = (constrain_kv(jnp.zeros(shape, dtype)) for _ in range(2))
            return k, v

        sizes = (self.capacity, self.period * self.capacity, self.capacity)
        anchor, wave, veil = (
            Between(*self.encoded(*empty(size, kind, network.precision.compute)), jnp.full((size,), EMPTY, jnp.int32))
            for kind, size in enumerate(sizes)
        )
        return Middle((anchor, wave, veil), empty(1, 2, jnp.float32), jnp.int32(-1), jnp.int32(-1), width)

    # ---- what a query sees

    def far_position(self, position: Any, xp: Any = jnp) -> Any:
        """The time position of sink and frames between for a query at `position`."""
        return xp.maximum(0, position - xp.clip(position, self.near, self.far))

    def sink_of(self, kind: str) -> int:
        """First frames that the heads of a kind always see."""
        return 1 if kind == "wave" else self.sink

    def attention(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Attend:
        """A call per kind of heads and frame of the block, as each frame has positions and frames of its own."""
        rows, kept = to_bits((state.k, state.v)), [to_bits((x.k, x.v)) for x in state.extra.kept]
        own_F, decode = self.own_positions(state, start, frames), self.codec.decode

        def of_kind(kind: str, layer: jax.Array) -> Callable[..., jax.Array]:
            number = KINDS.index(kind)

            def attend(q: jax.Array, k: jax.Array, v: jax.Array, pick: Any) -> jax.Array:
                read = lambda x, count: decode(from_bits(layer_slots(x, layer, count)), k.dtype)
                past = [pick(read(x, len(state.frame_F))) for x in rows]
                middle = [read(x, len(state.extra.kept[number].frame_F)) for x in kept[number]]
                squares = squares_of(k.shape[2], state.extra.width, self.patch if kind == "veil" else 1)
                # A mean is there for each token of its square, all together as heavy as one.
                middle = [jnp.take(x, squares.square, axis=2) for x in middle] if kind == "veil" else middle
                light_T = jnp.asarray(-np.log(squares.sizes)[squares.square], jnp.float32)

                def one(i: int) -> jax.Array:
                    chosen, seen, position_F = self._view(kind, state, start, start + i, own_F[i])
                    parts = [jnp.take(x, chosen, axis=1) for x in middle]
                    keys = rotate_time(jnp.concatenate([past[0], parts[0]], axis=1), position_F)
                    keys, values = jnp.concatenate([keys, k], axis=1), jnp.concatenate([past[1], parts[1], v], axis=1)
                    means = (jnp.arange(len(seen)) >= len(state.frame_F))[:, None]
                    bias_FT = jnp.where(seen[:, None], jnp.where(means, light_T, 0.0), -jnp.inf)
                    bias_FT = jnp.pad(bias_FT, ((0, frames), (0, 0)))
                    return attend_biased(q[:, i : i + 1], keys, values, bias_FT, backend=network.attention)

                return jnp.concatenate([one(i) for i in range(frames)], axis=1)

            return attend

        def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
            return attend_groups(self.groups, q, k, v, layer, [of_kind(kind, layer) for kind in KINDS])

        return self_attend

    def _view(
        self, kind: str, state: State, start: Any, frame: Any, position: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For a query's frame: which frames between are read; of slots and these, which are seen, and where."""
        slots, sink = len(state.frame_F), self.sink_of(kind)
        newest = slots - self.sink
        slot = jnp.arange(slots)
        seen = (slot < state.count) & ((slot < sink) | (slot >= state.count - newest))
        if kind != "wave":
            seen = slot < state.count
        between = state.extra.kept[KINDS.index(kind)].frame_F
        chosen = jnp.arange(self.capacity)
        if kind == "wave":
            chosen = frame % self.period * self.capacity + chosen
        frame_F = between[chosen]
        at = self.far_position(position)
        position_F = jnp.concatenate(
            [jnp.where(slot < sink, at, state.position_F), jnp.broadcast_to(at, (self.capacity,))]
        )
        return chosen, jnp.concatenate([seen, (frame_F >= 0) & (frame_F < start - newest)]), position_F

    # ---- what is kept

    def before_commit(self, state: State, new: Incoming) -> State:
        """Takes the block's frames in, one after another; none of them twice."""
        (anchor, wave, veil), sums, newest = state.extra.kept, state.extra.sums, state.extra.newest
        first = jnp.where(new.is_new & (state.extra.first < 0), new.start, state.extra.first).astype(jnp.int32)
        own = [[heads_of(x, heads_LN) for x in (new.k, new.v)] for heads_LN in self.groups.heads]
        merging = [self.codec.decode(x, jnp.float32) for x in own[2]]
        squares = squares_of(merging[0].shape[3], state.extra.width, self.patch)
        merging = [merge_tokens(x, squares, state.extra.width, self.patch, keys=i == 0) for i, x in enumerate(merging)]
        for i in range(new.frames):
            frame, cut = new.start + i, slice(i, i + 1)
            takes, number = new.is_new & (frame > newest), frame - first
            anchors, waves = (jax.tree.map(lambda x, cut=cut: x[:, :, cut], kind) for kind in own[:2])
            veils = [x[:, :, cut] for x in merging]
            anchor = _pushed(anchor, anchors, frame, takes & (frame % self.period == 0) & (number >= self.sink))
            place = frame % self.period * self.capacity + frame // self.period % self.capacity
            wave = _put(wave, waves, frame, takes & (number >= self.sink_of("wave")), place)
            begins, ends = frame % self.merged == 0, (frame + 1) % self.merged == 0
            added = [jnp.where(begins, 0.0, s) + x for s, x in zip(sums, veils, strict=True)]
            sums = (jnp.where(takes, added[0], sums[0]), jnp.where(takes, added[1], sums[1]))
            means = list(self.encoded(sums[0] / self.merged, sums[1] / self.merged))
            veil = _pushed(veil, means, frame, takes & ends & (number + 1 - self.merged >= self.sink))
        last = (new.start + new.frames - 1).astype(jnp.int32)
        newest = jnp.where(new.is_new, jnp.maximum(newest, last), newest)
        anchor, wave, veil = (
            Between(jax.tree.map(placed, x.k), jax.tree.map(placed, x.v), x.frame_F) for x in (anchor, wave, veil)
        )
        return replace(state, extra=Middle((anchor, wave, veil), sums, first, newest, state.extra.width))

    # ---- the same without a network

    def kept_between(self, kind: str, stop: int) -> list[int]:
        """Frames that are kept of [0, stop), oldest first; of a mean its last one."""
        past = range(self.sink_of(kind), stop)
        if kind == "anchor":
            return [t for t in past if t % self.period == 0][-self.capacity :]
        if kind == "wave":
            phases = ([t for t in past if t % self.period == phase][-self.capacity :] for phase in range(self.period))
            return sorted(t for phase in phases for t in phase)
        return [t for t in past if (t + 1) % self.merged == 0 and t + 1 - self.merged >= self.sink][-self.capacity :]

    def plan(self, num_frames: int, layout: Blocks, kind: str = "anchor", frame: int = 0) -> list[Seen]:
        """What a block's `frame`-th frame sees by heads of a kind, frames between last; MERGED are means."""
        found, newest = [], self.slots(layout) - self.sink
        for told in super().plan(num_frames, layout):
            start, sink = told.span[0], self.sink_of(kind)
            at = int(self.far_position(told.own[frame], np))
            frames = [t for t in told.frames if kind != "wave" or t < sink or t >= start - newest]
            between = [t for t in self.kept_between(kind, start) if t < start - newest]
            if kind == "wave":
                between = [t for t in between if t % self.period == (start + frame) % self.period]
            positions = [at if t < sink else t for t in frames] + [at] * len(between)
            frames += [MERGED] * len(between) if kind == "veil" else between
            found.append(told._replace(frames=tuple(frames), positions=tuple(positions)))
        return found


def merge_tokens(x: jax.Array, squares: Squares, width: int, patch: int, *, keys: bool) -> jax.Array:
    """Means over a frame's squares, [..., T, N, K] -> [..., squares, N, K]; keys at the place of the first token."""
    if patch == 1:
        return x
    *lead, tokens, heads, channels = x.shape
    turned = rotate_space(x, -squares.row, -squares.column) if keys else x
    rows = turned.reshape(prod(lead), tokens // width, width, heads * channels)  # there may be no heads
    full = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % patch), (0, -width % patch), (0, 0)))
    sums = reduce(full, "f (h a) (w b) c -> f (h w) c", "sum", a=patch, b=patch)
    means = sums / jnp.asarray(squares.sizes, x.dtype)[None, :, None]
    return means.reshape(*lead, len(squares.sizes), heads, channels)


def _pushed(kept: Between, own: Any, frame: jax.Array, takes: jax.Array) -> Between:
    """With a frame behind the others, and without the oldest."""

    def push(old: jax.Array, new: jax.Array, axis: int = 2) -> jax.Array:
        behind = jnp.concatenate([jax.lax.slice_in_dim(old, 1, None, axis=axis), new.astype(old.dtype)], axis)
        return jnp.where(takes, behind, old)

    k, v = (jax.tree.map(push, old, new) for old, new in zip((kept.k, kept.v), own, strict=True))
    return Between(k, v, push(kept.frame_F, frame[None], 0))


def _put(kept: Between, own: Any, frame: jax.Array, takes: jax.Array, place: jax.Array) -> Between:
    """With a frame in a place."""

    def put(old: jax.Array, new: jax.Array, axis: int = 2) -> jax.Array:
        there = jax.lax.dynamic_slice_in_dim(old, place, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(takes, new.astype(old.dtype), there), place, axis)

    k, v = (jax.tree.map(put, old, new) for old, new in zip((kept.k, kept.v), own, strict=True))
    return Between(k, v, put(kept.frame_F, frame[None], 0))
