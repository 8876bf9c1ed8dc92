"""One role's update, compiled once: the only place with `value_and_grad`."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cfjax.core.errors import UserError
from cfjax.core.sharding import constrain_parameters
from cfjax.core.tree import map_named, named_leaves
from cfjax.objectives.stage import Batch, Ema, Models, Stage
from cfjax.training.state import TrainState

Metrics = dict[str, jax.Array]
ROLLOUT = "rollout"  # among a loss's metrics, until its update is done
Update = Callable[[TrainState, Models, Batch], tuple[TrainState, Metrics]]


def role_key(state: TrainState, role: str) -> jax.Array:
    """The key of one role at one iteration: the run's key folded with the step, then with the role's name."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), np.uint32(zlib.crc32(role.encode())))


def has_batch_axis(name: str) -> bool:
    """Whether a batch leaf is split over microbatches: `latents_BFHWC` is, `negative_text_SE` is not."""
    return name.rpartition("_")[2].startswith("B")


def split_batch(batch: Batch, parts: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(leaves with a batch axis as [parts, B // parts, ...], leaves without one).

    Microbatch i takes samples i, i + parts, ...: with the batch axis sharded over devices no sample changes its device.

    Raises:
      UserError: B does not divide into `parts`.
    """
    split, shared = {}, {}
    for name, leaf in batch.items():
        if not has_batch_axis(name):
            shared[name] = leaf
            continue
        if leaf.shape[0] % parts:
            raise UserError(f"batch leaf {name} holds {leaf.shape[0]} samples; accumulate={parts} must divide that")
        split[name] = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
    return split, shared


def _grads(
    loss_fn: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
    key: jax.Array,
    accumulate: int,
) -> tuple[jax.Array, Metrics, Any]:
    """Loss, metrics and gradient, averaged over `accumulate` microbatches in float32."""

    def value_and_grad(*args: Any) -> tuple[tuple[jax.Array, Metrics], Any]:
        loss_and_metrics, grads = jax.value_and_grad(loss_fn, has_aux=True)(*args)
        return loss_and_metrics, constrain_parameters(grads)

    if accumulate == 1:
        (loss, metrics), grads = value_and_grad(params, batch, key)
        return loss, metrics, grads
    split, shared = split_batch(batch, accumulate)

    def one(index: jax.Array, part: Batch) -> tuple[jax.Array, Metrics, Any]:
        (loss, metrics), grads = value_and_grad(params, {**part, **shared}, jax.random.fold_in(key, index))
        return jax.tree.map(lambda x: x.astype(jnp.float32), (loss, metrics, grads))

    def body(total: Any, xs: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*xs)), None

    shapes = jax.eval_shape(one, jnp.int32(0), jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(accumulate), split))
    loss, metrics, grads = jax.tree.map(lambda x: x / accumulate, total)
    return loss, metrics, grads


def _updated_ema(ema: Any, params: Any, rule: Ema, step: jax.Array) -> Any:
    """A float32 copy of the new weights before iteration `start`, their running average from there on."""
    keep = jnp.where(step < rule.start, 0.0, rule.decay).astype(jnp.float32)
    return jax.tree.map(lambda e, p: keep * e + (1.0 - keep) * p.astype(jnp.float32), ema, params)


def _loss(
    stage: Stage, role: str, models: Models, batch: Batch, key: jax.Array, rollout: Any
) -> tuple[jax.Array, Metrics]:
    """A role's loss and metrics; the rollout after it is among these where the stage `goes_on`."""
    loss_of: Any = stage.losses[role]
    if not stage.goes_on:
        return loss_of(models, batch, key)
    loss, metrics, rollout = loss_of(models, batch, key, rollout)
    return loss, {**metrics, ROLLOUT: rollout}


def make_update(
    stage: Stage, role: str, tx: optax.GradientTransformation, *, accumulate: int = 1, placement: Any = None
) -> Update:
    """The jitted update of one role: `(state, frozen, batch) -> (state, metrics)`; `state` is donated, its step kept.

    The loss sees `{**frozen, **state.params, "{role}_ema": average}`. The update is skipped, and metrics["finite"] is
    False, when the loss or the gradient's norm is not finite. Other metrics: "loss", "grad_norm" (before clipping) and
    the loss's own, all float32 scalars on the device.

    Args:
      tx: an optax transformation over the dict of named leaves (`core.tree.named_leaves`), as `init_state` uses it.
      accumulate: number of microbatches the batch axis is split into; each has a key of its own.
      placement: the state's shardings, a `TrainState` of them, that the new one keeps; None leaves it to XLA.

    Raises:
      UserError: `role` is not of this stage, or `accumulate` is not positive.
    """
    if role not in stage.losses:
        raise UserError(f"stage {stage.name!r} has no role {role!r}; it trains {sorted(stage.losses)}")
    if accumulate < 1:
        raise UserError(f"accumulate={accumulate}: use 1 or more")
    if accumulate > 1 and stage.goes_on:
        raise UserError(f"optim.{role}.accumulate={accumulate}: a rollout that goes on is one batch; use 1")

    @partial(jax.jit, donate_argnums=0, out_shardings=None if placement is None else (placement, None))
    def update(state: TrainState, frozen: Models, batch: Batch) -> tuple[TrainState, Metrics]:
        averages = {f"{name}_ema": average for name, average in state.ema.items()}
        others: Mapping[str, Any] = {**frozen, **state.params, **averages}

        def loss_fn(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
            with jax.named_scope(f"{role}_loss"):
                return _loss(stage, role, {**others, role: params}, part, key, state.rollout)

        old = state.params[role]
        loss, metrics, grads = _grads(loss_fn, old, batch, role_key(state, role), accumulate)
        named_grads, named = named_leaves(grads), named_leaves(old)
        rollout = metrics.pop(ROLLOUT, None)
        grad_norm = optax.tree.norm(named_grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            deltas, opt = tx.update(named_grads, state.opt[role], named)
            moved = optax.apply_updates(named, deltas)
        new = map_named(lambda name, _: moved[name], old)
        ema = {}
        if role in stage.ema:
            ema = {role: _updated_ema(state.ema[role], new, stage.ema[role], state.step)}
        fresh = (new, opt, ema, rollout)
        stale = (old, state.opt[role], {name: state.ema[name] for name in ema}, state.rollout)
        new, opt, ema, rollout = jax.tree.map(lambda a, b: jnp.where(finite, a, b), fresh, stale)
        state = replace(
            state,
            params={**state.params, role: new},
            opt={**state.opt, role: opt},
            ema={**state.ema, **ema},
            rollout=rollout,
        )
        return state, {**metrics, "loss": loss, "grad_norm": grad_norm, "finite": finite}

    return update
