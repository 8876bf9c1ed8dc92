"""bfloat16 arrays as their bits, uint16, where XLA's CPU backend would widen them.

The backend has no bfloat16 slices: it widens the array that a loop slices, and hoists that out of the loop. So a scan
over stacked bfloat16 weights (or a KV cache) first makes a float32 copy of the whole stack. It cannot where the loop
slices integers. Elsewhere a change of type costs nothing.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from cfjax.core.sharding import active_mesh

T = TypeVar("T")


def to_bits(tree: T) -> T:
    """The pytree with the bits of its bfloat16 leaves, uint16; as it is on a mesh. No gradient passes through them."""
    if active_mesh() is not None:
        return tree

    def leaf(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(leaf, tree)


def from_bits(tree: T) -> T:
    """Inverse of `to_bits`."""

    def leaf(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    return jax.tree.map(leaf, tree)
