"""Slots of remembered frames: the base of all memory policies.

A slot holds one latent frame's keys and values of every layer, and slots are in order: protected ones first, then the
others from the oldest to the newest. After a commit they hold what the next block sees and nothing else, so a block
always sees the first `count` slots and its own frames.

Keys are stored with the space axes of RoPE rotated and the time axis not. The time axis is rotated when a block reads
them, to positions that the policy chooses: rotations add up, so these need not be frame indices. (Raw keys in
`causal_model.py` of Infinity-RoPE, Reward Forcing and LongLive's infinity variant, which rotate all axes when reading.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.errors import UserError
from cfjax.memory.codecs import Codec
from cfjax.nn.frames import attend_slots, constrain_kv, group_lengths
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks

EMPTY, MERGED = -1, -2  # in `State.frame_F`: no frame; several frames, merged
# (q, k, v [B, F, T, N, K], layer) -> attended values
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# (q, k [B, F, T, N, K], both rotated, layer) -> what a commit has to know of them, a pytree
Observe = Callable[[jax.Array, jax.Array, jax.Array], Any]


class Network(Protocol):
    """What a policy needs to know of a network; `models.wan.WanConfig` is one."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def in_dim(self) -> int: ...

    @property
    def patch(self) -> tuple[int, int]: ...

    @property
    def attention(self) -> str: ...

    @property
    def precision(self) -> Any: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a stream remembers.

    Attributes:
      k, v: stored keys (time axis not rotated) and values: [L, B, slots, T, N, K], or what a codec makes of them, with
        the same first three axes.
      frame_F: the frame in each slot, EMPTY or MERGED.
      position_F: the time position at which each slot's frame was committed.
      count: how many slots are filled.
      stop: the frame after the last committed one.
      offset: what is added to the time positions of new frames (after a cut of the scene).
      jump: the own time position of the next block, if it is not the policy's; else -1.
      extra: what a policy keeps besides.
    """

    k: Any
    v: Any
    frame_F: jax.Array
    position_F: jax.Array
    count: jax.Array
    stop: jax.Array
    offset: jax.Array
    jump: jax.Array
    extra: Any = None


class Seen(NamedTuple):
    """What one block sees, as `Memory.plan` says.

    span: its frames.  frames: in the slots that it sees (MERGED for merged ones).  positions: the time positions at
    which it reads these.  own: the time positions of its own frames.
    """

    span: tuple[int, int]
    frames: tuple[int, ...]
    positions: tuple[int, ...]
    own: tuple[int, ...]


class Labels(NamedTuple):
    """The part of a state that positions follow from; NumPy's in a plan, traced in a program."""

    frame_F: Any
    position_F: Any
    count: Any
    stop: Any
    offset: Any
    jump: Any


@dataclass(frozen=True)
class Memory:
    """A sliding window with a sink, and the base of the other policies.

    Frames keep the positions at which they were committed. Source: `local_attn_size` and `sink_size` in
    `wan/modules/causal_model.py` of Self-Forcing and LongLive.

    Attributes:
      window: frames that a block sees at most, its own included.
      sink: the first frames, which stay.
      codec: how keys and values are stored.
    """

    window: int = 21
    sink: int = 0
    codec: Codec = field(default_factory=Codec)

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise UserError(f"memory: sink={self.sink}: use 0 (none) or more")
        if self.window <= self.protected:
            raise UserError(f"memory: window={self.window} must hold {self.protected} protected frames and a block")

    # ---- what a policy may say otherwise

    @property
    def protected(self) -> int:
        """First slots that are never moved."""
        return self.sink

    def positions(self, at: Labels, start: Any, frames: int, xp: Any = jnp) -> tuple[Any, Any]:
        """Time positions: of the slots, [slots], and of the block's own frames, [frames]. `xp`: numpy or jax.numpy."""
        return at.position_F, start + at.offset + xp.arange(frames)

    def encoded(self, k_LBFTNK: jax.Array, v_LBFTNK: jax.Array) -> tuple[Any, Any]:
        """Keys (time axis not rotated) and values as they are stored."""
        return self.codec.encode_keys(k_LBFTNK), self.codec.encode_values(v_LBFTNK)

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> Any:
        """`State.extra` of an empty state; see `init`."""
        return None

    def before_commit(self, state: State, new: "Incoming") -> State:
        """The state before the new frames are put into it: merges what leaves, or writes over what is there."""
        return state

    def pictures(self, layout: Blocks, time_stride: int) -> int:
        """How many of the newest decoded pixel frames a commit needs; 0: none."""
        return 0

    def bias(self, state: State) -> jax.Array | None:
        """Added to the logits of each slot's keys, [slots]; None: nothing."""
        return None

    def check(self, network: Network) -> None:
        """Raises UserError where the policy was made for another network."""

    def observer(
        self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks
    ) -> "Observe | None":
        """What a commit has to know of every layer's queries; None: nothing, and then they are not looked at."""
        return None

    # Whether blocks can be committed again under another prompt.
    recaches = True
    # Whether the scene can be cut between blocks.
    cuts = True

    def cut(self, state: State, distance: int = 8) -> State:
        """The state after a cut of the scene: new frames are `distance` further from all before them, from now on.

        Source: `rope_temporal_offset` of LongLive 2.0.
        """
        return replace(state, offset=state.offset + distance)

    def forget(self, state: State) -> State:
        """The state before its blocks are committed again: empty, or with what is protected if something has left."""
        left = state.stop > state.count
        slot = jnp.arange(len(state.frame_F))
        count = jnp.where(left, self.protected, 0).astype(jnp.int32)
        gone = lambda x: jnp.where(slot < count, x, EMPTY)
        return replace(
            state, frame_F=gone(state.frame_F), position_F=gone(state.position_F), count=count, stop=jnp.int32(0)
        )

    def missing(self, state: State, layout: Blocks) -> int:
        """How many of the newest frames have to be committed again after `forget`."""
        return len(state.frame_F) - int(state.count)

    # ---- the interface

    def slots(self, layout: Blocks) -> int:
        """Slots of a state.

        Raises:
          UserError: the window does not hold what it has to.
        """
        slots = self.window - layout.frames
        if slots < max(self.protected, 1):
            least = max(self.protected, 1) + layout.frames
            raise UserError(
                f"memory: window={self.window} must hold the protected frames and one block: at least {least}"
            )
        return slots

    def init(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> State:
        """The state before the first block.

        Args:
          batch: rows, twice the videos for a guided sampler.  tokens: of a frame.  width: tokens of a row of a frame;
            some policies need it.
        """
        slots = self.slots(layout)
        empty = jnp.full((slots,), EMPTY, jnp.int32)
        return State(
            *self.empty_frames(network, batch, slots, tokens),
            empty,
            empty,
            jnp.int32(0),
            jnp.int32(0),
            jnp.int32(0),
            jnp.int32(-1),
            self.extra(network, batch, tokens, layout, width),
        )

    def empty_frames(self, network: Network, batch: int, frames: int, tokens: int) -> tuple[Any, Any]:
        """Keys and values of zeros, [L, B, frames, T, N, K], as they are stored.

        A codec's groups lie inside a frame, so one frame is encoded and the rest are its copies: neither does a device
        hold all of them in float32 at once, nor does XLA spend seconds on folding them. Keys and values are two
        buffers, as one cannot be donated twice.
        """
        shape = (1, 1, 1, tokens, network.num_heads, network.head_dim)
        k, v = self.encoded(*(jnp.zeros(shape, network.precision.compute) for _ in range(2)))
        rows = (network.num_layers, batch, frames)
        return jax.tree.map(lambda x: placed(jnp.broadcast_to(x, (*rows, *x.shape[3:]))), (k, v))

    def own_positions(self, state: State, start: jax.Array, frames: int) -> jax.Array:
        """Time positions of the block's own frames, [frames]."""
        return self.positions(labels(state), start, frames)[1]

    def attention(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Attend:
        """The self-attention of a block that begins at `start`, against a layer of the state. Reads only."""
        slots, rows = state.frame_F.shape[0], to_bits((state.k, state.v))
        key_F, _ = self.positions(labels(state), start, frames)
        bias_F = self.bias(state)

        def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
            def read(count: int) -> tuple[jax.Array, jax.Array]:
                keys, values = (from_bits(layer_slots(x, layer, count)) for x in rows)
                keys = rotate_time(self.codec.decode(keys, k.dtype), key_F[:count])
                return keys, self.codec.decode(values, v.dtype)

            return attend_slots(
                q,
                k,
                v,
                read,
                state.count,
                counts(slots, layout, self.protected),
                bias_F=bias_F,
                backend=network.attention,
            )

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
        """The state after a finished block; committing a block again changes nothing.

        Args:
          k_LBFTNK: rotated at the block's own positions.
          text_LBNK: the mean of the prompt's cross-attention keys, for policies that ask what fits it.
          observed: what `observer` made of every layer, stacked; None if that is None.
        """
        frames, slots = k_LBFTNK.shape[2], state.frame_F.shape[0]
        own_F = self.own_positions(state, start, frames)
        raw = jax.vmap(rotate_time, (0, None))(k_LBFTNK, -own_F)
        k, v = self.encoded(raw, v_LBFTNK)
        new = Incoming(k, v, start, frames, state, start >= state.stop, text_LBNK, observed)
        state = self.before_commit(state, new)
        order = arrangement(state.count, slots, self.protected, frames)
        order = jnp.where(new.is_new, order, jnp.arange(slots))
        pick = lambda old, own: placed(jnp.take(jnp.concatenate([old, own], axis=2), order, axis=2))
        state = self.relabelled(state, order, start, frames, new.is_new)
        return replace(state, k=jax.tree.map(pick, state.k, k), v=jax.tree.map(pick, state.v, v))

    def relabelled(self, state: State, order: jax.Array, start: jax.Array, frames: int, is_new: jax.Array) -> State:
        """The state with what it says of its slots as after a commit: `order` as of `arrangement`."""
        label = lambda old, own: jnp.concatenate([old, own.astype(jnp.int32)])[order]
        at = lambda then, now: jnp.where(is_new, then, now).astype(jnp.int32)
        return replace(
            state,
            frame_F=label(state.frame_F, start + jnp.arange(frames)),
            position_F=label(state.position_F, self.own_positions(state, start, frames)),
            count=at(jnp.minimum(state.count + frames, len(state.frame_F)), state.count),
            stop=at(start + frames, state.stop),
            jump=at(jnp.int32(-1), state.jump),
        )

    def shorter_prefixes(self, layout: Blocks) -> int:
        """How many programs `attention` has besides that for full slots, which most blocks of a long video run."""
        return len(group_lengths(counts(self.slots(layout), layout, self.protected))[0]) - 1

    def plan(self, num_frames: int, layout: Blocks) -> list[Seen]:
        """What every block of a video sees, without a network: the mirror of `attention` and `commit`."""
        slots, found = self.slots(layout), []
        empty = np.full(slots, EMPTY)
        at = Labels(empty, empty, 0, 0, 0, -1)
        for start, stop in layout.spans(num_frames):
            key_F, own_F = self.positions(at, start, stop - start, np)
            frames, positions = (tuple(int(x) for x in row[: at.count]) for row in (at.frame_F, key_F))
            found.append(Seen((start, stop), frames, positions, tuple(int(x) for x in own_F)))
            at = self.next_labels(at, start, stop, own_F)
        return found

    def next_labels(self, at: Labels, start: int, stop: int, own_F: np.ndarray) -> Labels:
        """`plan`'s commit."""
        frames, slots = stop - start, len(at.frame_F)
        order = arrangement(at.count, slots, self.protected, frames, np)
        put = lambda old, own: np.concatenate([old, own])[order]
        count = min(at.count + frames, slots)
        return Labels(put(at.frame_F, np.arange(start, stop)), put(at.position_F, own_F), count, stop, at.offset, -1)


@dataclass(frozen=True)
class Everything(Memory):
    """All frames of a video of `window` frames, which ends there."""


@dataclass(frozen=True)
class Incoming:
    """Frames that are about to be committed.

    k, v: as stored.  start: their first frame.  state: before them.  is_new: whether they are not in it yet.
    text_LBNK, observed: see `Memory.commit`.
    """

    k: Any
    v: Any
    start: jax.Array
    frames: int
    state: State
    is_new: jax.Array
    text_LBNK: Any = None
    observed: Any = None

    def leaving(self, protected: int) -> tuple[Any, Any, jax.Array, jax.Array]:
        """The frames that leave, oldest first: keys, values (as stored), their frames, and whether each does leave."""
        slots = self.state.frame_F.shape[0]
        source = protected + jnp.arange(self.frames)
        index = _in_sequence(source, self.state.count, slots)
        pick = lambda old, own: jnp.take(jnp.concatenate([old, own], axis=2), index, axis=2, mode="clip")
        k, v = jax.tree.map(pick, self.state.k, self.k), jax.tree.map(pick, self.state.v, self.v)
        own_F = self.start + jnp.arange(self.frames)
        frame_F = jnp.take(jnp.concatenate([self.state.frame_F, own_F]), index, mode="clip")
        overflow = self.state.count + self.frames - slots
        return k, v, frame_F, (jnp.arange(self.frames) < overflow) & self.is_new


def labels(state: State) -> Labels:
    """A state without keys and values."""
    return Labels(state.frame_F, state.position_F, state.count, state.stop, state.offset, state.jump)


def arrangement(count: Any, slots: int, protected: int, frames: int, xp: Any = jnp) -> Any:
    """Which of [slots, own frames] are in the slots after a commit, [slots]: behind the protected, the newest."""
    overflow = xp.maximum(0, count + frames - slots)
    slot = xp.arange(slots)
    return xp.minimum(
        _in_sequence(xp.where(slot < protected, slot, slot + overflow), count, slots, xp), slots + frames - 1
    )


def _in_sequence(number: Any, count: Any, slots: int, xp: Any = jnp) -> Any:
    """Where the frame of this number in the filled slots, followed by the own frames, is in [slots, own frames]."""
    return xp.where(number < count, number, slots + number - count)


def counts(slots: int, layout: Blocks, protected: int) -> tuple[int, ...]:
    """How many slots may be filled when a block begins, ascending; also when only the protected ones were left."""
    first = (0, 1) if layout.independent_first_frame else (0,)
    again = range(protected, slots, layout.frames)
    found = {*first, *range(first[-1], slots, layout.frames), *again, slots}
    return tuple(sorted(found))


def layer_slots(stored: Any, layer: jax.Array | int, count: int) -> Any:
    """One layer's first `count` slots, [B, count, ...]."""

    def cut(x: jax.Array) -> jax.Array:
        sizes = (1, x.shape[1], count, *x.shape[3:])
        return jax.lax.dynamic_slice(x, (layer, *(0,) * (x.ndim - 1)), sizes)[0]

    return jax.tree.map(cut, stored)


def rotate_rows(x_BFTNK: jax.Array, position_BF: jax.Array) -> jax.Array:
    """`rotate_time` with positions of every row's own."""
    return jax.vmap(lambda x, at: rotate_time(x[None], at)[0])(x_BFTNK, position_BF)


def placed(x: jax.Array) -> jax.Array:
    """A leaf of stored keys or values, sharded as keys and values are, where it has their axes."""
    return constrain_kv(x) if x.ndim == 6 and min(x.shape[3], x.shape[-1]) > 1 else x
