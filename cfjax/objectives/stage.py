"""A stage of training: roles, losses and a cadence; objectives provide nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from cfjax.core.errors import UserError

Models = Mapping[str, Any]
Batch = Mapping[str, jax.Array]
# loss(models, batch, key) -> (scalar float32, metrics: name -> scalar)
Loss = Callable[[Models, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
# Of a stage whose rollout goes on: loss(models, batch, key, rollout) -> (scalar, metrics, rollout after it)
RolloutLoss = Callable[[Models, Batch, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array], Any]]


@dataclass(frozen=True)
class Ema:
    """An exponential moving average in float32: a copy of the weights until iteration `start`, then with `decay`."""

    decay: float = 0.99
    start: int = 0


@dataclass(frozen=True)
class Stage:
    """One stage: which roles are trained, by which loss, how often, and which are averaged.

    Role r is updated at iteration n iff `n % cadence[r] == 0` (default 1), in the order of `losses`; each update takes
    a batch of its own. A loss sees every model: frozen ones, trained ones, and `{role}_ema`. With `goes_on`, all losses
    are `RolloutLoss`es of one rollout, which is part of the training state.

    Raises:
      UserError: a cadence or an average that no iteration can have.
    """

    name: str
    losses: Mapping[str, Loss | RolloutLoss]
    cadence: Mapping[str, int] = field(default_factory=dict)
    ema: Mapping[str, Ema] = field(default_factory=dict)
    goes_on: bool = False

    def __post_init__(self) -> None:
        for role, every in self.cadence.items():
            if every < 1:
                raise UserError(f"cadence.{role}={every}: use 1 (every iteration) or more")
        for role, average in self.ema.items():
            if not 0.0 <= average.decay < 1.0:
                raise UserError(f"ema.{role}.decay={average.decay}: use 0 or more and less than 1")
            if average.start < 0:
                raise UserError(f"ema.{role}.start={average.start}: an iteration, 0 or later")

    def roles_at(self, iteration: int) -> list[str]:
        """The roles that are updated at this iteration, in order."""
        return [role for role in self.losses if iteration % self.cadence.get(role, 1) == 0]
