"""Keys that steer a live stream: what is held from a block on, and what was held in the frames before it.

    session.set_actions([1, 0, 0, 0])       # a number for each key; from the next block on, until it is called again

What was held in the latest frames is kept with the stream's state, for commits that come later, and for networks whose
actions reach back in time. So a snapshot remembers it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from cfjax.core.errors import UserError
from cfjax.memory.policies import ContextRecompute
from cfjax.models.steered import steered
from cfjax.models.wan import Wan, WanConfig
from cfjax.rollout.generate import FewStep, ManyStep

KEPT = 512  # frames; more than any memory commits again, and the windows of actions before them


@dataclass(frozen=True)
class Held:
    """The keys of a stream.

    Attributes:
      first: the frame of the first row.  rows_FA: what was held in the latest frames, float32.
      now_A: what is held from now on.
    """

    first: int
    rows_FA: np.ndarray
    now_A: np.ndarray

    @classmethod
    def none_of(cls, config: WanConfig) -> "Held | None":
        """Nothing is held; None for a network that cannot be steered."""
        if config.actions is None:
            return None
        return cls(0, np.zeros((0, config.actions.keys), np.float32), np.zeros(config.actions.keys, np.float32))

    def went_on(self, start: int, frames: int) -> "Held":
        """After a block of so many frames from `start` on."""
        rows = np.concatenate([self.rows_FA, np.repeat(self.now_A[None], frames, axis=0)])
        first = self.first if len(self.rows_FA) else start
        return replace(self, first=first + max(0, len(rows) - KEPT), rows_FA=rows[-KEPT:])

    def rows(self, start: int, frames: int, context: int) -> np.ndarray:
        """Of the frames from `start` - context on, [1, context + F, A]; the first known one again before it."""
        every = np.concatenate([self.rows_FA, self.now_A[None]])
        numbers = np.arange(start - context, start + frames) - self.first
        return every[np.clip(numbers, 0, len(every) - 1)][None]


def rows_of(config: WanConfig, held: Held | None, start: int, frames: int) -> np.ndarray | None:
    """What a network is told of a block; None for one that cannot be steered."""
    if held is None or config.actions is None:
        return None
    return held.rows(start, frames, config.actions.context)


def steered_block(network: Wan, rows_BFA: Any, start: jax.Array | int) -> Wan:
    """The network for the block from `start` on, told these rows (`rows_of`); as it is for None."""
    told: Wan = steered(network, rows_BFA, start, padded=True)
    return told


def steered_at(network: Wan, held: Held | None, start: int, frames: int) -> Wan:
    """The network for the block of so many frames from `start` on."""
    return steered_block(network, rows_of(network.config, held, start, frames), start)


def changed(held: Held | None, keys: Sequence[float], sampler: FewStep | ManyStep, memory: Any) -> Held:
    """With other keys from now on.

    Raises:
      UserError: a model that cannot be steered, or not with this sampler or memory; another number of keys.
    """
    if held is None:
        raise UserError("actions: this model cannot be steered (docs/actions.md)")
    if isinstance(sampler, FewStep) and sampler.rolling:
        raise UserError("actions: not with sampler.kind='rolling', which has begun later blocks; use few_step")
    if isinstance(memory, ContextRecompute):
        raise UserError("actions: not with memory=context_recompute, whose frames have other numbers; use another")
    now = np.asarray(keys, np.float32)
    if now.shape != held.now_A.shape or not np.isfinite(now).all():
        raise UserError(f"actions={keys!r}: give {len(held.now_A)} numbers, 1 for a key that is held and 0 for others")
    return replace(held, now_A=now)
