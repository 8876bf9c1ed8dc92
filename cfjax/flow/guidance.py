"""Classifier-free guidance in the two conventions of the reference (quirk Q7), both prompts in one network call."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from cfjax.core.errors import UserError

CONVENTIONS = ("sampling", "dmd")
T = TypeVar("T")  # an array, or a pytree of arrays


def guide(pos: jax.Array, neg: jax.Array, scale: float | jax.Array, convention: str = "sampling") -> jax.Array:
    """Extrapolates from the negative to the positive prediction (velocities or x0, same shape).

    "sampling" (samplers, ODE pairs, consistency teacher): neg + w (pos - neg); w = 1 is the conditional prediction.
    "dmd" (distribution matching's real score): pos + w (pos - neg), which is "sampling" with w + 1; w = 0 is the
    conditional prediction.

    Raises:
      UserError: unknown convention.
    """
    if convention not in CONVENTIONS:
        raise UserError(f"guidance convention {convention!r}: use one of {', '.join(CONVENTIONS)}")
    base = neg if convention == "sampling" else pos
    return base + scale * (pos - neg)


def joined(positive: T, negative: T, *, axis: int = 0) -> T:
    """Two pytrees of the same shapes as one of twice the batch: the positive half, then the negative.

    `axis` is the batch's.
    """
    return jax.tree.map(lambda p, n: jnp.concatenate([p, n], axis=axis), positive, negative)


def doubled(x: T) -> T:
    """`joined` of the same arrays [B, ...]: what the halves of a guided batch share, [2 B, ...]."""
    return joined(x, x)


def guided(call: Callable[[T], jax.Array], x: T, scale: float | jax.Array, convention: str = "sampling") -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598) by one network call of twice the batch: the prediction [B, ...].

    Args:
      call: the network on `doubled(x)`; it conditions the batch's first half on the positive prompts and its second on
        the negative ones (`joined` of their embeddings, caches and whatever else differs), and returns [2 B, ...].
      x: what it takes for either prompt, with the batch as every array's first axis; several inputs are a tuple.
      scale, convention: see `guide`.

    Raises:
      UserError: unknown convention.
    """
    positive, negative = jnp.split(call(doubled(x)), 2)
    return guide(positive, negative, scale, convention)
