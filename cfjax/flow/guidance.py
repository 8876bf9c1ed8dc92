"""Classifier-free guidance in the two conventions of the reference (quirk Q7)."""

import jax

from cfjax.core.errors import UserError

CONVENTIONS = ("sampling", "dmd")


def guide(pos: jax.Array, neg: jax.Array, scale: float, convention: str = "sampling") -> jax.Array:
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
