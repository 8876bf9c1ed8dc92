"""Who computes in which dtype: one policy, read by every layer.

Trained parameters rest in float32 (frozen ones also in less, see `models.resting`). Matrix products and attention
inputs run in `compute`; the *islands* (sinusoid and time embedding, modulation, norms, RoPE, softmax, the residual
stream's gates, every loss) run in `island`, which is float32 as in the original Wan2.1 (the Causal Forcing trainers run
the islands in bfloat16 too; pass `island=bfloat16`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cfjax.core.errors import UserError


@dataclass(frozen=True)
class Policy:
    """The dtypes of one network: `compute` for matrix products, `island` for numerically delicate parts."""

    compute: str = "float32"
    island: str = "float32"

    def __post_init__(self) -> None:
        for field in ("compute", "island"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise UserError(f"precision.{field}={getattr(self, field)!r}: use 'float32' or 'bfloat16'")

    def to_compute(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.dtype(self.compute))

    def to_island(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.dtype(self.island))


F32 = Policy()
BF16 = Policy(compute="bfloat16")
