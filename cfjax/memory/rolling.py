"""Rolling Forcing's memory (arXiv 2509.25161): the first block next to the newest, for windows of several blocks.

Two kinds of passes read it (`CausalWanSelfAttention.forward` in `long_video/wan/modules/causal_model.py` of Causal
Forcing, which equals TencentARC/RollingForcing's):

    a window of blocks at several noise levels   the first block, at positions right before the newest frames that are
                                                 seen, and so many of these that at most `window` frames are seen, the
                                                 window's own included: always at consecutive positions
    a commit                                     the newest frames, at most `window` with its own, at the positions at
                                                 which they were committed; the first block only while it is among them

A memory of 21 frames thus stores 24: the first block, the 18 before a block that is committed, and that block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.errors import UserError
from cfjax.memory.slots import Attend, Labels, Memory, Network, Seen, State, labels, layer_slots
from cfjax.nn.frames import attend_prefix, group_lengths
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks


class Place(NamedTuple):
    """The frames of a pass over a window: `at` is its first one; those in [first, stop) exist. All may be traced."""

    at: Any
    first: Any
    stop: Any


class View(NamedTuple):
    """What a pass sees, in order of time.

    key_F: time position of each slot.  order: which of [slots, own frames], [window]; the first `count` are seen.
    """

    key_F: Any
    order: Any
    count: Any


@dataclass(frozen=True)
class RollingForcing(Memory):
    """See the module.

    Attributes:
      window: frames that a pass sees at most, its own included.
      sink: the first block.
      stored: frames that are stored at least; 0: those that a pass can see. More of them change no pass.
    """

    window: int = 21
    sink: int = 3
    stored: int = 0
    cuts = False  # the next blocks are half made

    def slots(self, layout: Blocks) -> int:
        """As `Memory.slots`; the sink is the first block."""
        super().slots(layout)
        if layout.independent_first_frame or self.sink != layout.frames:
            raise UserError(
                f"memory: the sink of rolling_forcing is the first block: use sink={layout.frames}, not {self.sink}, "
                "and no first frame of its own"
            )
        return max(self.sink + self.window - layout.frames, self.stored)

    # ---- the two views; `xp`: numpy or jax.numpy

    def commit_view(self, at: Labels, frames: int, xp: Any = jnp) -> View:
        """What a block of `frames` sees when it is committed."""
        past = xp.minimum(at.count, self.window - frames)
        number = xp.arange(self.window)
        order = xp.where(number < past, at.count - past + number, len(at.frame_F) + number - past)
        return View(at.position_F, xp.minimum(order, len(at.frame_F) + frames - 1), past + frames)

    def window_view(self, at: Labels, place: Place, frames: int, xp: Any = jnp) -> View:
        """What a window of `frames`, some of which exist, sees."""
        slots = len(at.frame_F)
        skipped = xp.clip(place.first - place.at, 0, frames)
        own = xp.clip(place.stop - place.at, skipped, frames) - skipped
        anchor = xp.minimum(at.count, self.sink)
        newest = xp.clip(at.count - self.sink, 0, self.window - own - self.sink)
        past, number, slot = anchor + newest, xp.arange(self.window), xp.arange(slots)
        seen = xp.where(number < anchor, number, at.count - past + number)
        order = xp.where(number < past, seen, slots + skipped + number - past)
        oldest = at.position_F[xp.clip(at.count - newest, 0, slots - 1)]
        begins = xp.where(newest > 0, oldest, place.at + skipped + at.offset)
        key_F = xp.where(slot < self.sink, begins - self.sink + slot, at.position_F)
        return View(key_F, xp.clip(order, 0, slots + frames - 1), past + own)

    # ---- attention

    def attention(self, network: Network, state: State, start: jax.Array, frames: int, layout: Blocks) -> Attend:
        """Of a commit."""
        return self._attend(network, state, self.commit_view(labels(state), frames), layout)

    def window_attention(self, network: Network, state: State, place: Place, frames: int, layout: Blocks) -> Attend:
        """Of a window that begins at `place.at`; frames that do not exist are seen by none, their own output is noise.

        Raises:
          UserError: the memory's window is too small for it.
        """
        if self.window < frames + self.sink:
            raise UserError(
                f"memory: window={self.window} must hold the first block and a joint window of {frames} frames: at "
                f"least {frames + self.sink}"
            )
        return self._attend(network, state, self.window_view(labels(state), place, frames), layout)

    def _attend(self, network: Network, state: State, view: View, layout: Blocks) -> Attend:
        slots, rows = len(state.frame_F), to_bits((state.k, state.v))
        lengths, exact = group_lengths([*range(layout.frames, self.window, layout.frames), self.window])

        def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
            past_k, past_v = (from_bits(layer_slots(x, layer, slots)) for x in rows)
            keys = jnp.concatenate([rotate_time(self.codec.decode(past_k, k.dtype), view.key_F), k], axis=1)
            values = jnp.concatenate([self.codec.decode(past_v, v.dtype), v], axis=1)

            def read(length: int) -> tuple[jax.Array, jax.Array]:
                index = view.order[:length]
                return jnp.take(keys, index, axis=1), jnp.take(values, index, axis=1)

            return attend_prefix(q, read, view.count, lengths, exact=exact, backend=network.attention)

        return self_attend

    # ---- without a network

    def plan(self, num_frames: int, layout: Blocks) -> list[Seen]:
        """What every block sees when it is committed."""
        spans = layout.spans(num_frames)
        at = self._labels(0, layout)
        found = []
        for start, stop in spans:
            view = self.commit_view(at, stop - start, np)
            found.append(_seen(at, view, (start, stop), range(start, stop)))
            at = self._labels(stop, layout)
        return found

    def plan_windows(self, num_frames: int, layout: Blocks, steps: int, given: int = 0) -> list[Seen]:
        """What every window of `steps` blocks sees, one after another; `span` and `own` are the frames that exist.

        Args:
          given: frames at the beginning that are not generated.
        """
        frames, found = layout.frames, list[Seen]()
        for number in range(len(layout.spans(num_frames - given)) + steps - 1):
            at = given + (number - steps + 1) * frames
            span = max(at, given), min(at + steps * frames, num_frames)
            known = self._labels(span[0], layout)
            view = self.window_view(known, Place(at, given, num_frames), steps * frames, np)
            found.append(_seen(known, view, span, range(*span)))
        return found

    def _labels(self, stop: int, layout: Blocks) -> Labels:
        """The slots' labels once all frames before `stop` are committed."""
        slots = self.slots(layout)
        kept: Sequence[int] = range(stop)
        if stop > slots:
            kept = [*range(self.sink), *range(stop - (slots - self.sink), stop)]
        frame_F = np.full(slots, -1)
        frame_F[: len(kept)] = kept
        return Labels(frame_F, frame_F, len(kept), stop, 0, -1)


def _seen(at: Labels, view: View, span: tuple[int, int], own: range) -> Seen:
    past = view.order[: int(view.count) - len(own)]
    frames, positions = (tuple(int(x) for x in row[past]) for row in (at.frame_F, view.key_F))
    return Seen(span, frames, positions, tuple(own))
