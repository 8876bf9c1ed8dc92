"""Optimisers by name, over the dict of a model's named leaves: clip, AdamW or Muon, decoupled decay, one schedule."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from cfjax.core.errors import UserError
from cfjax.core.tree import match

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "wsd")
MUON_EXCLUDE = r".*(embed|head|modulation).*"
_CORE, _SCHEDULE = 1, 3  # positions in the chain of what has a state: moments, and the count of updates


@dataclass(frozen=True)
class OptimizerConfig:
    """One role's optimiser and its learning-rate schedule.

    Attributes:
      name: "adamw", or "muon": Muon for kernels [..., in, out], each layer of a stack by itself; Adam for the rest.
      lr: peak learning rate.  adam_lr: peak for Muon's Adam leaves (None: `lr`).
      b1, b2, eps: Adam's.
      weight_decay: decoupled, `lr * weight_decay * p`.
      decay_rules: ordered (regex, factor) table over all leaf names; by default everything decays, as in the reference.
      clip: bound on the global gradient norm; None or 0 turns it off.
      schedule, warmup, decay_fraction: see `make_schedule`.
      momentum: Muon's.  muon_exclude: regex of kernels that Adam keeps.
    """

    lr: float
    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_rules: Sequence[tuple[str, float]] = ((".*", 1.0),)
    clip: float | None = 1.0
    schedule: str = "constant"
    warmup: int = 0
    decay_fraction: float = 0.2
    momentum: float = 0.95
    adam_lr: float | None = None
    muon_exclude: str = MUON_EXCLUDE


def make_schedule(
    name: str, lr: float, *, steps: int, warmup: int = 0, decay_fraction: float = 0.2, key: str = "optim"
) -> optax.Schedule:
    """Learning rate by update count: a linear warm-up to `lr` over `warmup` updates, then the named schedule.

    constant: stays.  cosine: falls to 0 at `steps`.  wsd (warm-up, stable, decay): stays, then falls linearly to 0 over
    the last `decay_fraction` of `steps`.  `steps` counts this role's updates, not iterations.  `key`: for messages.

    Raises:
      UserError: unknown name, or `steps` is not positive.
    """
    if name not in SCHEDULES:
        raise UserError(f"{key}.schedule={name!r} is unknown; use one of {', '.join(SCHEDULES)}")
    if steps < 1:
        raise UserError(f"{key}.steps={steps}: use 1 or more")

    def schedule(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        if name == "cosine":
            done = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            fall = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif name == "wsd":
            fall = jnp.clip((steps - count) / max(decay_fraction * steps, 1.0), 0.0, 1.0)
        else:
            fall = jnp.ones_like(count)
        return lr * rise * fall

    return schedule


def is_muon_leaf(name: str, leaf: jax.Array, exclude: str = MUON_EXCLUDE) -> bool:
    """Whether Muon takes this leaf: a (stacked) kernel [..., in, out] whose name `exclude` does not match."""
    return name.rpartition("/")[2] == "kernel" and leaf.ndim >= 2 and re.fullmatch(exclude, name) is None


def _scale_by_width() -> optax.GradientTransformation:
    """sqrt(max(1, out / in)) per kernel, as in Keller Jordan's Muon."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates)
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    adam_ratio = 1.0 if config.adam_lr is None else config.adam_lr / config.lr

    def labels(params: Mapping[str, jax.Array]) -> dict[str, str]:
        exclude = config.muon_exclude
        return {name: "muon" if is_muon_leaf(name, leaf, exclude) else "adam" for name, leaf in params.items()}

    def dimension_numbers(updates):
        return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)

    orthogonal = scale_by_muon(beta=config.momentum, eps=config.eps, weight_dimension_numbers=dimension_numbers)
    return optax.partition(
        {
            "muon": optax.chain(orthogonal, _scale_by_width()),
            "adam": optax.chain(_adam(config), optax.scale(adam_ratio)),
        },
        labels,
    )


def _decay(weight_decay: float, rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Adds `weight_decay * factor * p`, the factor by the first rule that matches the leaf's name."""

    def update(updates: Mapping[str, jax.Array], params: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
        assert params is not None
        factor = match(rules, params)
        return {name: u + weight_decay * factor[name] * params[name] for name, u in updates.items()}

    return optax.stateless(update)


def make_optimizer(config: OptimizerConfig, *, steps: int, key: str = "optim") -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or Muon, then decoupled decay, then the schedule.

    The transformation works on the dict of named leaves of a model (`core.tree.named_leaves`), see `init_state`.

    Args:
      steps: of this role's updates, see `make_schedule`.
      key: of these settings in a config, for messages.

    Raises:
      UserError: an unknown optimiser or schedule, or a rate that is not positive; a decay table that misses a leaf or
        holds an unused rule (at use).
    """
    if config.name not in OPTIMIZERS:
        raise UserError(f"{key}.name={config.name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    for rate, value in (("lr", config.lr), ("adam_lr", config.adam_lr)):
        if value is not None and not value > 0:
            raise UserError(f"{key}.{rate}={value}: use more than 0")
    warmup, decay_fraction = config.warmup, config.decay_fraction
    rate_of = make_schedule(
        config.schedule, config.lr, key=key, steps=steps, warmup=warmup, decay_fraction=decay_fraction
    )
    decay = _decay(config.weight_decay, tuple(config.decay_rules)) if config.weight_decay else optax.identity()
    return optax.chain(  # in positions that do not depend on what is turned off: `_CORE` and `_SCHEDULE` have a state
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _adam(config) if config.name == "adamw" else _muon(config),
        decay,
        optax.scale_by_learning_rate(rate_of),
    )


def current_names(saved: Iterable[str]) -> dict[str, str]:
    """The names of saved leaves -> those of today's `make_optimizer`.

    cfjax 0.1.0 left out the clip and the decay where they were turned off, and numbered the others without them.
    """
    names = list(saved)
    found = {name: parts for name in names if (parts := re.fullmatch(r"(opt/[^/]+/)(\d+)(/.*)", name))}
    positions: dict[str, set[int]] = {}
    for parts in found.values():
        positions.setdefault(parts[1], set()).add(int(parts[2]))
    out = dict(zip(names, names, strict=True))
    for name, (head, place, tail) in ((name, parts.groups()) for name, parts in found.items()):
        if len(positions[head]) == 2:
            out[name] = f"{head}{_CORE if int(place) == min(positions[head]) else _SCHEDULE}{tail}"
    return out
