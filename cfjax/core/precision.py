"""Mixed precision: one policy of two dtypes, read by every layer.

Trained parameters are stored in float32; frozen ones may be stored in less (`models.weight_storage`). Matrix products
and the inputs of attention are in `compute`. Norms, softmax, the sinusoid and time embedding, modulation, RoPE, the
residual stream and the losses are in `norm`: float32 as in the original Wan2.1. The Causal Forcing trainers run these
in bfloat16 too (`norm="bfloat16"`).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp

from cfjax.core.errors import UserError

# Metadata of a field that came later: records of its default are those of before.
LATER = {"later": True}
_RECORDED = {"norm": "island"}  # field -> its key in records on disk, which keep the older name


@dataclass(frozen=True)
class Policy:
    """The dtypes of one network: `compute` of matrix products, `norm` of norms, softmax and accumulation."""

    compute: str = "float32"
    norm: str = "float32"

    def __post_init__(self) -> None:
        for field in ("compute", "norm"):
            if getattr(self, field) not in ("float32", "bfloat16"):
                raise UserError(f"precision.{field}={getattr(self, field)!r}: use 'float32' or 'bfloat16'")

    def to_compute(self, x: jax.Array) -> jax.Array:
        """`x` in the dtype of matrix products."""
        return x.astype(jnp.dtype(self.compute))

    def to_norm_dtype(self, x: jax.Array) -> jax.Array:
        """`x` in the dtype of norms and accumulation."""
        return x.astype(jnp.dtype(self.norm))

    def to_record(self) -> dict[str, str]:
        """As records on disk hold it: {"compute": ..., "island": ...}."""
        return {_RECORDED.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, values: dict[str, str]) -> "Policy":
        """Inverse of `to_record`; keys that are absent keep their defaults."""
        names = {key: name for name, key in _RECORDED.items()}
        return cls(**{names.get(key, key): value for key, value in values.items()})


def to_record(config: Any) -> dict[str, Any]:
    """`dataclasses.asdict` of a network's config as records on disk hold it: its `Policy` by `Policy.to_record`.

    Fields that came later (`LATER`) are there where they are not their default.
    """
    policies = {f.name: getattr(config, f.name) for f in fields(config)}
    policies = {name: value.to_record() for name, value in policies.items() if isinstance(value, Policy)}
    as_before = {f.name for f in fields(config) if f.metadata == LATER and getattr(config, f.name) == f.default}
    return {name: value for name, value in {**asdict(config), **policies}.items() if name not in as_before}


F32 = Policy()
BF16 = Policy(compute="bfloat16")
