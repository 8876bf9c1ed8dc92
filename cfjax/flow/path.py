"""The straight path between data and noise (rectified flow), and the conversions between what a network may predict.

x_sigma = (1 - sigma) x0 + sigma eps, so the velocity is dx/dsigma = eps - x0. Everything is computed and returned in
float32. `sigma` may be a scalar, `[B]` or `[B, F]`: its axes are the leading axes of the array it meets.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def expand(sigma: ArrayLike, x: jax.Array) -> jax.Array:
    """Appends axes of length one to `sigma` (float32) until it has the rank of `x`.

    Raises:
      ValueError: `sigma` has more axes than `x`.
    """
    sigma = jnp.asarray(sigma, jnp.float32)
    if sigma.ndim > x.ndim:
        raise ValueError(f"sigma {sigma.shape} has more axes than the array it multiplies, {x.shape}")
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def _f32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def add_noise(x0: jax.Array, eps: jax.Array, sigma: ArrayLike) -> jax.Array:
    """x_sigma = (1 - sigma) x0 + sigma eps."""
    s = expand(sigma, x0)
    return (1.0 - s) * _f32(x0) + s * _f32(eps)


def velocity(x0: jax.Array, eps: jax.Array) -> jax.Array:
    """v = eps - x0, the regression target of flow matching."""
    return _f32(eps) - _f32(x0)


def x0_from_flow(v: jax.Array, x: jax.Array, sigma: ArrayLike) -> jax.Array:
    """x0 = x_sigma - sigma v."""
    return _f32(x) - expand(sigma, x) * _f32(v)


def eps_from_flow(v: jax.Array, x: jax.Array, sigma: ArrayLike) -> jax.Array:
    """eps = x_sigma + (1 - sigma) v."""
    return _f32(x) + (1.0 - expand(sigma, x)) * _f32(v)


def flow_from_x0(x0: jax.Array, x: jax.Array, sigma: ArrayLike) -> jax.Array:
    """v = (x_sigma - x0) / sigma; sigma must be positive (at 0 the velocity is not determined by x0)."""
    return (_f32(x) - _f32(x0)) / expand(sigma, x)
