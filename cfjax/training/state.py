"""The state of a training run: weights, optimiser states and averages by role, a step, a key; all of it is saved."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.objectives.stage import Stage


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The whole of a run that a checkpoint must hold; frozen models are an argument of the step instead.

    step: int32 scalar, completed iterations.  key: typed PRNG key, never advanced (folded with the step instead).
    params: role -> model.  opt: role -> optax state over the model's named leaves.  ema: role -> float32 averages.
    rollout: what the losses of a stage that `goes_on` carry from one update to the next; else None.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, Any]
    opt: dict[str, Any]
    ema: dict[str, Any]
    rollout: Any = None


def init_state(
    stage: Stage,
    models: Mapping[str, Any],
    txs: Mapping[str, optax.GradientTransformation],
    seed: int,
    *,
    rollout: Any = None,
) -> TrainState:
    """A state at step 0 for the roles of `stage`, which owns copies of the models (the step donates its state).

    Args:
      models: role -> initial weights; exactly the roles of `stage.losses`.
      txs: role -> optimiser, as `make_optimizer` builds it.
      seed: any integer; 0 means 0.
      rollout: of a stage that `goes_on`, before its first update.

    Raises:
      UserError: a role has no model or no optimiser, or an averaged role is not trained.
    """
    roles = sorted(stage.losses)
    for what, given in (("model", models), ("optimiser", txs)):
        if set(given) != set(stage.losses):
            raise UserError(f"stage {stage.name!r} trains {roles}, a {what} is given for {sorted(given)}")
    for field, table in (("ema", stage.ema), ("cadence", stage.cadence)):
        if unknown := sorted(set(table) - set(stage.losses)):
            raise UserError(f"stage {stage.name!r}: {field} names {unknown}, which are not among {roles}")
    params = {role: jax.tree.map(jnp.copy, models[role]) for role in stage.losses}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
        params=params,
        opt={role: txs[role].init(named_leaves(params[role])) for role in stage.losses},
        ema={role: jax.tree.map(lambda x: jnp.array(x, jnp.float32), params[role]) for role in stage.ema},
        rollout=rollout,
    )


def advance(state: TrainState) -> TrainState:
    """Ends an iteration: called once, after the last role's update."""
    return replace(state, step=state.step + 1)
