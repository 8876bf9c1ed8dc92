"""Weight-only int8: a kernel as whole numbers in [-127, 127] and one float32 scale per output channel.

    kernel[..., i, o] = int8[..., i, o] scale[..., 0, o],    scale = max_i |kernel[..., i, o]| / 127

Symmetric, rounded to the nearest, so off by half a scale at most. A matrix product needs no dequantised kernel: the
scale multiplies its *output* channels (`nn.layers.project`), and int8 values are exact in bfloat16.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """What stands in a Param in place of a kernel [..., in, out]: two leaves, `NAME/int8` and `NAME/scale`.

    int8: the kernel's shape.  scale: float32, [..., 1, out].
    """

    int8: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return tuple(self.int8.shape)


def is_quantized(node: Any) -> bool:
    """For `is_leaf`: a quantised kernel counts as one leaf, by the kernel's own name."""
    return isinstance(node, Quantized)


def quantize(kernel: np.ndarray) -> Quantized:
    """The nearest int8 kernel, on the host. A channel of zeros stays zero."""
    wide = np.asarray(kernel, np.float32)
    largest = np.max(np.abs(wide), axis=-2, keepdims=True)
    scale = np.where(largest > 0, largest / LEVELS, 1.0).astype(np.float32)
    return Quantized(np.rint(wide / scale).astype(np.int8), scale)


def dequantize(kernel: Quantized) -> jax.Array:
    """The float32 kernel that `kernel` stands for."""
    return kernel.int8.astype(jnp.float32) * kernel.scale


def quantized_shape(kernel: jax.ShapeDtypeStruct) -> Quantized:
    """The shapes and dtypes of `quantize` for a kernel's."""
    scale = (*kernel.shape[:-2], 1, kernel.shape[-1])
    return Quantized(kernel.update(dtype=jnp.int8), kernel.update(shape=scale, dtype=jnp.float32))
