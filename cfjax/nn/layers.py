"""Linear, norms and small MLPs as immutable pytrees; every dtype decision comes from `core.precision.Policy`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cfjax.core.offload import on_device
from cfjax.core.precision import Policy
from cfjax.core.quantize import Adapted, Quantized, values
from cfjax.core.sharding import active_mesh

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def xavier_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Xavier-uniform for a [fan_in, fan_out] kernel (Wan2.1's default for linear layers)."""
    return jax.nn.initializers.xavier_uniform()(key, shape, jnp.float32)


def normal(stddev: float) -> Init:
    """N(0, stddev^2)."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All zeros (Wan2.1's output head)."""
    return jnp.zeros(shape, jnp.float32)


def align(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Gives `vector` leading axes of size one up to the rank of `like` (implicit rank promotion is an error here)."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def _dot(x: jax.Array, y: jax.Array, dimensions: Any = None) -> jax.Array:
    """A product in the dtype of its arguments, summed in float32.

    XLA's CPU backend widens bfloat16 arguments, unless the result is asked for in float32: that is twice as fast, and
    makes no float32 copy of the weights. Not on a mesh, where the partial sums of tensor parallelism would be larger.
    """
    wide = x.dtype == jnp.bfloat16 and active_mesh() is None
    dimensions = dimensions or (((x.ndim - 1,), (0,)), ((), ()))
    out = jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32 if wide else None)
    return out.astype(x.dtype)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x[..., i] @ kernel[i, o] whose weight gradient is one dot in kernel layout.

    JAX's transpose rule computes the transposed gradient and turns it around, which costs 2.3 times as much on CPU.
    """
    return _dot(x, kernel)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dot(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    batch_axes = tuple(range(x.ndim - 1))
    grad_kernel = _dot(x, grad, ((batch_axes, batch_axes), ((), ())))
    return _dot(grad, kernel.T), grad_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def project(x: jax.Array, kernel: jax.Array | Quantized | Adapted) -> jax.Array:
    """x[..., i] @ kernel[i, o] in x's dtype, of a kernel that may be stored in int8, or in host memory, or both.

    Of one with an adapter beside it, x W + s (x A) B.
    """
    if isinstance(kernel, Adapted):
        narrow = matmul(x, kernel.down.astype(x.dtype))
        return project(x, kernel.kernel) + kernel.factor * matmul(narrow, kernel.up.astype(x.dtype))
    own: jax.Array | Quantized = on_device(kernel)
    if not isinstance(own, Quantized):
        return matmul(x, own.astype(x.dtype))
    y = matmul(x, values(own).astype(x.dtype))
    return (y * align(own.scale[0], y)).astype(x.dtype)  # the scale is float32, so is this product


class Linear(nnx.Module):
    """y = x W + b with kernel [in, out], computed in `dtype`."""

    def __init__(self, in_dim: int, out_dim: int, key: jax.Array, *, kernel_init: Init = xavier_uniform):
        self.kernel = nnx.Param(kernel_init(key, (in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32))

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        y = project(x.astype(dtype), self.kernel.get_value())
        return y + align(self.bias[...].astype(dtype), y)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        dims: tuple[int, int, int],
        activation: Callable[[jax.Array], jax.Array],
        key: jax.Array,
        *,
        kernel_init: Init = xavier_uniform,
    ):
        key_up, key_down = jax.random.split(key)
        self.up = Linear(dims[0], dims[1], key_up, kernel_init=kernel_init)
        self.down = Linear(dims[1], dims[2], key_down, kernel_init=kernel_init)
        self.activation = activation

    def __call__(self, x: jax.Array, dtype: str) -> jax.Array:
        return self.down(self.activation(self.up(x, dtype)), dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU, as Wan2.1 and UMT5 use it."""
    return jax.nn.gelu(x, approximate=True)


def layer_norm(x: jax.Array, eps: float, policy: Policy) -> jax.Array:
    """Affine-free LayerNorm over the last axis, in the norm dtype."""
    x = policy.to_norm_dtype(x)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: jax.Array, eps: float, policy: Policy) -> jax.Array:
        y = layer_norm(x, eps, policy)
        return y * align(policy.to_norm_dtype(self.scale[...]), y) + align(policy.to_norm_dtype(self.bias[...]), y)


class RMSNorm(nnx.Module):
    """x rsqrt(mean(x^2) + eps) in float32, cast back to the input's dtype, then times the scale.

    Reference: `wan/modules/model.py`, `WanRMSNorm`.
    """

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array, eps: float) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
        return normed.astype(x.dtype) * align(self.scale[...].astype(x.dtype), x)
