"""A hash of a set of weights, the same on every device."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from cfjax.core.tree import named_leaves


def fingerprint(tree: Any, *constants: Any) -> str:
    """16 hex digits from every leaf's name, shape, dtype and bits, and from some JSON-able constants.

    One pass over the weights on their devices; only a number per leaf is copied to the host.
    """
    named = named_leaves(tree)
    sums = map(int, _checksums(list(named.values())))
    leaves = {name: (total, list(x.shape), str(x.dtype)) for (name, x), total in zip(named.items(), sums, strict=True)}
    return hashlib.sha256(json.dumps([leaves, constants], sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    """uint32 of each leaf: its bits, weighted by position, modulo 2^32, which is the same in any order of summation."""

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.ravel(), f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [checksum(x) for x in leaves]
