"""Memory policies: which frames stay, and at which positions they are read.

| policy | what stays | positions | source |
|---|---|---|---|
| `slots.Memory` | sink, recent frames | their own | Self-Forcing, LongLive |
| `SlotRelative` | sink, recent frames | slot numbers | Infinity-RoPE, LongLive (infinity) |
| `DeepSink` | a long sink, recent frames | the sink's abut the recent frames' | Deep Forcing, arXiv 2512.05081 |
| `EmaSink` | a sink that takes in what leaves, recent frames | slot numbers | Reward Forcing |
| `MemoryTokens` | sink, two means of what left, recent frames | slot numbers | MemRoPE, arXiv 2603.12513 |
| `RollingSink` | early frames over again, the block before | their new ones | Rolling Sink, arXiv 2602.07775 |
| `ContextRecompute` | latents of the sink and recent frames | slot numbers | Krea's realtime video |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.memory.slots import MERGED, Incoming, Labels, Memory, Network, State, arrangement
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks


@dataclass(frozen=True)
class SlotRelative(Memory):
    """Positions are slot numbers: they never exceed the window, however long the video.

    Source: `block_relativistic_rope` in `wan/modules/causal_model.py` of Infinity-RoPE (window 6, sink 1), and
    `causal_model_infinity.py` of LongLive (window 12, sink 3). In Infinity-RoPE's code, the queries of windows above 6
    are at frame indices while their keys are at slot numbers until the window is full, and the first frame's keys are
    rotated before they are stored; here all are at slot numbers from the start.
    """

    window: int = 6
    sink: int = 1

    def positions(self, at: Labels, start: Any, frames: int, xp: Any = jnp) -> tuple[Any, Any]:
        first = xp.where(at.jump >= 0, at.jump, at.count)
        return xp.arange(len(at.frame_F)), first + xp.arange(frames)

    def cut(self, state: State, distance: int = 45) -> State:
        """The next block's own frames are at positions from `distance` on, once: RoPE cut (`transition_from`)."""
        if distance < self.window:
            raise UserError(f"memory: a cut to position {distance} is inside the window of {self.window} frames")
        return replace(state, jump=jnp.int32(distance))


@dataclass(frozen=True)
class DeepSink(Memory):
    """Half of the window is sink, read at positions right before those of the recent frames.

    Source: Deep Forcing, arXiv 2512.05081, section 4, and `_rope_time_delta_mul_` in its `causal_model.py`, which
    leaves a gap of one block between the sink and the recent frames (the sum that places it counts the own frames on
    one side only): `gap=3` is that. The code also adds up rotations in bfloat16; here every read rotates once.
    """

    window: int = 21
    sink: int = 10
    gap: int = 0

    def positions(self, at: Labels, start: Any, frames: int, xp: Any = jnp) -> tuple[Any, Any]:
        left = start + at.offset - at.count  # how many frames have left the window
        slot = xp.arange(len(at.frame_F))
        moved = slot + xp.maximum(0, left - self.gap)
        return xp.where(slot < self.sink, moved, at.position_F), start + at.offset + xp.arange(frames)


@dataclass(frozen=True)
class EmaSink(SlotRelative):
    """Frames that leave go into the sink as an exponential moving average, token by token.

        sink <- alpha sink + (1 - alpha) leaving

    The frame that leaves goes into slot `frame % sink`. Source: `incremental_update` in `wan/modules/causal_model.py`
    of Reward Forcing, which updates at the first step of the next block; the end of a commit gives the same. Where a
    block is not as long as the sink, its code overwrites the sink instead.
    """

    window: int = 9
    sink: int = 3
    alpha: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("alpha", self.alpha)
        if not self.sink:
            raise UserError("memory: an EMA sink needs sink=1 or more; sink=0 has nothing to average into")

    def before_commit(self, state: State, new: Incoming) -> State:
        k, v, frame_F, leaves_F = new.leaving(self.protected)
        cut = lambda x: jax.tree.map(lambda y: y[:, :, : self.sink], x)
        decode = lambda x: self.codec.decode(x, jnp.float32)
        sink_k, sink_v, gone_k, gone_v = (decode(x) for x in (cut(state.k), cut(state.v), k, v))
        for i in range(new.frames):
            into = (jnp.arange(self.sink) == frame_F[i] % self.sink) & leaves_F[i]
            share = jnp.where(into, 1 - self.alpha, 0.0).reshape(1, 1, -1, 1, 1, 1)
            merge = lambda old, gone, i=i, share=share: old + share * (gone[:, :, i : i + 1] - old)
            sink_k, sink_v = merge(sink_k, gone_k), merge(sink_v, gone_v)
        return _with_first(state, self, sink_k, sink_v, jnp.any(leaves_F))


@dataclass(frozen=True)
class MemoryTokens(SlotRelative):
    """Two slots behind the sink hold a slow and a fast moving average of what left the window.

        slow <- slow_rate leaving + (1 - slow_rate) slow;    fast likewise; leaving: the mean of the frames that leave

    Until something leaves, these slots hold ordinary frames; both averages begin with the first mean, of which these
    frames are a part. Source: MemRoPE, arXiv 2603.12513, `wan/modules/causal_model.py` (long and short memory).
    """

    window: int = 12
    sink: int = 3
    slow_rate: float = 0.01
    fast_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slow_rate", "fast_rate"):
            _fraction(name, getattr(self, name))

    @property
    def protected(self) -> int:
        return self.sink + 2

    def before_commit(self, state: State, new: Incoming) -> State:
        k, v, _, leaves_F = new.leaving(self.protected)
        cut = lambda x: jax.tree.map(lambda y: y[:, :, : self.protected], x)
        decode = lambda x: self.codec.decode(x, jnp.float32)
        first, leaving = state.frame_F[self.sink] != MERGED, jnp.any(leaves_F)

        def merged(slots: jax.Array, gone: jax.Array) -> jax.Array:
            memories = slots[:, :, self.sink :]
            weights = leaves_F.astype(jnp.float32).reshape(1, 1, -1, 1, 1, 1)
            plain = jnp.where(first, 1.0, 0.0)  # the frames in the memories' slots leave too
            total = jnp.sum(gone * weights, axis=2) + plain * jnp.sum(memories, axis=2)
            mean = total[:, :, None] / jnp.maximum(jnp.sum(weights) + 2 * plain, 1.0)
            rates = jnp.where(first, 1.0, jnp.array([self.slow_rate, self.fast_rate])).reshape(1, 1, -1, 1, 1, 1)
            rates = jnp.where(leaving, rates, 0.0)
            return jnp.concatenate([slots[:, :, : self.sink], memories + rates * (mean - memories)], axis=2)

        k, v = merged(decode(cut(state.k)), decode(k)), merged(decode(cut(state.v)), decode(v))
        state = _with_first(state, self, k, v, leaving)
        slot = jnp.arange(len(state.frame_F))
        memory = (slot >= self.sink) & (slot < self.protected)
        return replace(state, frame_F=jnp.where(memory & leaving, MERGED, state.frame_F))

    def next_labels(self, at: Labels, start: int, stop: int, own_F: np.ndarray) -> Labels:
        if at.count + stop - start > len(at.frame_F):
            frame_F = at.frame_F.copy()
            frame_F[self.sink : self.protected] = MERGED
            at = at._replace(frame_F=frame_F)
        return super().next_labels(at, start, stop, own_F)


class Early(NamedTuple):
    """The first frames of a video, stored as in the slots, [L, B, F, ...]."""

    k: Any
    v: Any


@dataclass(frozen=True)
class RollingSink(Memory):
    """All but the newest block of the window are replays of the video's first frames, forwards and backwards in turn.

    A block that was the newest is overwritten when the next one is committed. Source: Rolling Sink, arXiv 2602.07775,
    `wan/modules/causal_model.py` (`k_original`, `v_original`), which is written for blocks of 3 frames.
    """

    window: int = 21
    recaches = False  # what is replayed was made under the first prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink:
            raise UserError(f"memory: a rolling sink has no fixed one: leave sink={self.sink} out")

    def slots(self, layout: Blocks) -> int:
        return _whole_blocks("a rolling sink", super().slots(layout), self.window, layout)

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> Early:
        return Early(*self.empty_frames(network, batch, self.slots(layout), tokens))

    @staticmethod
    def replayed(start: Any, frames: int, slots: int, xp: Any = jnp) -> Any:
        """The early frames that take the place of the block before `start`, [frames]."""
        before = start - frames
        turn, phase = before // slots, before % slots
        return xp.where(turn % 2 == 0, phase + xp.arange(frames), slots - phase - 1 - xp.arange(frames))

    def before_commit(self, state: State, new: Incoming) -> State:
        slots, early = len(state.frame_F), state.extra
        # While the first frames come in, they are put aside; `start` is then below `slots`, a multiple of the block.
        put = lambda kept, own: jax.lax.dynamic_update_slice_in_dim(kept, own, new.start, axis=2)
        keep = (new.start < slots) & new.is_new
        store = lambda kept, own: jax.tree.map(lambda a, b: jnp.where(keep, put(a, b), a), kept, own)
        early = Early(store(early.k, new.k), store(early.v, new.v))

        replay = (new.start >= slots + new.frames) & new.is_new
        frame_F = self.replayed(new.start, new.frames, slots)
        write = lambda old, kept: jnp.where(
            replay, old.at[:, :, slots - new.frames :].set(jnp.take(kept, frame_F, axis=2)), old
        )
        shown = jnp.where(replay, state.frame_F.at[slots - new.frames :].set(frame_F), state.frame_F)
        k, v = jax.tree.map(write, state.k, early.k), jax.tree.map(write, state.v, early.v)
        return replace(state, k=k, v=v, frame_F=shown, extra=early)

    def next_labels(self, at: Labels, start: int, stop: int, own_F: np.ndarray) -> Labels:
        slots, frames = len(at.frame_F), stop - start
        if start >= slots + frames:
            frame_F = at.frame_F.copy()
            frame_F[slots - frames :] = self.replayed(start, frames, slots, np)
            at = at._replace(frame_F=frame_F)
        return super().next_labels(at, start, stop, own_F)


@dataclass(frozen=True)
class ContextRecompute(SlotRelative):
    """Latents stay, not keys: with every commit, all slots' keys and values are made again, in one block-causal pass.

    So a change of the prompt reaches what is remembered with the next block, and no slot holds keys of a frame that saw
    others than these. Source: `recompute_kv_cache` in Krea's `release_server.py` (before every block; the end of a
    commit gives the same), `kv_cache_attention_bias` of Scope.

    Attributes:
      weight: the attention to remembered frames but the first is multiplied by it before it is normalised; 1: off.
      reencode: the first frame, once it is no longer next to the others, is the last pixel frame before these, encoded
        as one picture: the context is the beginning of a video, as the autoencoder knows them (Krea's default; False is
        its `keep_first_frame`). Needs the decoded pixels, which a session has.
    """

    window: int = 6
    sink: int = 1
    weight: float = 1.0
    reencode: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.weight <= 1.0:
            raise UserError(f"memory: weight={self.weight}: use a number above 0, at most 1 (as it is)")
        if self.reencode and self.sink != 1:
            raise UserError(f"memory: reencode=True is of one first frame: use sink=1, not {self.sink}")

    def slots(self, layout: Blocks) -> int:
        return _whole_blocks("context_recompute", super().slots(layout), self.window, layout)

    def extra(self, network: Network, batch: int, tokens: int, layout: Blocks, width: int = 0) -> jax.Array:
        """The slots' latents, [B, slots, H W C], float32."""
        numbers = tokens * network.patch[0] * network.patch[1] * network.in_dim
        return jnp.zeros((batch, self.slots(layout), numbers), jnp.float32)

    def bias(self, state: State) -> jax.Array | None:
        if self.weight == 1.0:
            return None
        return jnp.where(jnp.arange(len(state.frame_F)) < self.sink, 0.0, float(np.log(self.weight)))

    def pictures(self, layout: Blocks, time_stride: int) -> int:
        """As `Memory.pictures`: of the slots behind the first, and the one before them."""
        return 1 + (self.slots(layout) - 1) * time_stride if self.reencode else 0

    def next_labels(self, at: Labels, start: int, stop: int, own_F: np.ndarray) -> Labels:
        found = super().next_labels(at, start, stop, own_F)
        if self.reencode and stop > len(at.frame_F):
            found.frame_F[0] = stop - len(at.frame_F)
        return found

    def commit_latents(
        self,
        state: State,
        clean_BFHWC: jax.Array,
        start: jax.Array,
        context: Callable[[jax.Array], Any],
        picture_BFHWC: jax.Array | None = None,
    ) -> State:
        """The state after a finished block.

        Args:
          context: latents of all slots, [B, slots, H, W, C] -> their keys, at positions from 0 on, and values.
          picture_BFHWC: with `reencode`, the oldest of `pictures`, encoded; any numbers before something has left.

        Raises:
          UserError: there is none.
        """
        if self.reencode and picture_BFHWC is None:
            raise UserError("memory: reencode=True needs the decoded pixels: make the video in a session")
        frames, slots = clean_BFHWC.shape[1], len(state.frame_F)
        is_new = start >= state.stop
        order = jnp.where(is_new, arrangement(state.count, slots, self.protected, frames), jnp.arange(slots))
        own = clean_BFHWC.astype(jnp.float32).reshape(*clean_BFHWC.shape[:2], -1)
        latents = jnp.take(jnp.concatenate([state.extra, own], axis=1), order, axis=1)
        first = start + frames - slots  # that is not among the others any more
        anew = is_new & (first > 0)
        if self.reencode and picture_BFHWC is not None:
            picture = picture_BFHWC.astype(jnp.float32).reshape(len(latents), -1)
            latents = latents.at[:, 0].set(jnp.where(anew, picture, latents[:, 0]))
        k, v = context(latents.reshape(len(latents), slots, *clean_BFHWC.shape[2:]))
        raw = jax.vmap(rotate_time, (0, None))(k, -jnp.arange(slots))
        state = self.relabelled(state, order, start, frames, is_new)
        if self.reencode:
            state = replace(state, frame_F=state.frame_F.at[0].set(jnp.where(anew, first, state.frame_F[0])))
        return replace(state, k=self.codec.encode_keys(raw), v=self.codec.encode_values(v), extra=latents)


def _whole_blocks(name: str, slots: int, window: int, layout: Blocks) -> int:
    """The slots, if they hold whole blocks, all of one size; else a UserError."""
    if slots % layout.frames or layout.independent_first_frame:
        raise UserError(
            f"memory: {name} needs a window of whole blocks of {layout.frames} frames, and no first frame of its own; "
            f"window={window}"
        )
    return slots


def _with_first(state: State, memory: Memory, k: jax.Array, v: jax.Array, changes: jax.Array) -> State:
    """The state with new keys and values in its protected slots, where `changes`; else bit for bit as it is."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(changes, old.at[:, :, : new.shape[2]].set(new.astype(old.dtype)), old)

    codec = memory.codec
    return replace(
        state,
        k=jax.tree.map(put, state.k, codec.encode_keys(k)),
        v=jax.tree.map(put, state.v, codec.encode_values(v)),
    )


def _fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"memory: {name}={value}: use a number from 0 to 1")
