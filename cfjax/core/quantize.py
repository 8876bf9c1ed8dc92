"""Weight-only int8: a kernel as whole numbers in [-127, 127] and one float32 scale per output channel.

    kernel[..., i, o] = int8[..., i, o] scale[..., 0, o],    scale = max_i |kernel[..., i, o]| / 127

Symmetric, rounded to the nearest, so off by half a scale at most. A matrix product needs no dequantised kernel: the
scale multiplies its *output* channels (`nn.layers.project`), and int8 values are exact in bfloat16.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 127
ROWS = 4  # of int8 in one int32 word


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Replaces a kernel [..., in, out] in a Param: two leaves, `NAME/int8` and `NAME/scale`.

    int8: the kernel's shape; or int32 words [..., in / 4, out] of four rows each (see `packed`).
    scale: float32, [..., 1, out].
    """

    int8: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        *lead, rows, columns = self.int8.shape
        return (*lead, rows * (ROWS if self.is_packed else 1), columns)

    @property
    def is_packed(self) -> bool:
        """Whether `int8` holds words."""
        return bool(self.int8.dtype == jnp.int32)


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "down", "up"], meta_fields=["factor"])
@dataclass(frozen=True)
class Adapted:
    """Replaces a kernel [..., in, out] in a Param: it, stored in any way, and beside it factor A B (`models.lora`).

    kernel: an array or a `Quantized`.  down: A [..., in, rank].  up: B [..., rank, out].
    """

    kernel: Any
    down: Any
    up: Any
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return tuple(self.kernel.shape)


def is_quantized(node: Any) -> bool:
    """For `is_leaf`: a quantised kernel counts as one leaf, by the kernel's own name."""
    return isinstance(node, Quantized)


def quantize(kernel: np.ndarray) -> Quantized:
    """The nearest int8 kernel, on the host. A channel of zeros stays zero."""
    wide = np.asarray(kernel, np.float32)
    largest = np.max(np.abs(wide), axis=-2, keepdims=True)
    scale = np.where(largest > 0, largest / LEVELS, 1.0).astype(np.float32)
    return Quantized(np.rint(wide / scale).astype(np.int8), scale)


def packed(int8: np.ndarray) -> np.ndarray:
    """Rows 4 i .. 4 i + 3 as the bytes of the words of row i, lowest first.

    For weights in host memory: TPU's layout of whole int8 arrays differs from that of their slices, so that XLA would
    copy all layers to the device and back before a scan reads the first; int32 words are read in place.
    """
    *lead, rows, columns = int8.shape
    fours = np.moveaxis(int8.reshape(*lead, rows // ROWS, ROWS, columns), -2, -1)
    return np.ascontiguousarray(fours).view("<i4")[..., 0].astype(np.int32)


def values(kernel: Quantized) -> jax.Array:
    """The int8 kernel [..., in, out], unpacked."""
    if not kernel.is_packed:
        return kernel.int8
    fours = jax.lax.bitcast_convert_type(kernel.int8, jnp.int8)
    return jnp.moveaxis(fours, -1, -2).reshape(kernel.shape)


def dequantize(kernel: Quantized) -> jax.Array:
    """The float32 kernel that `kernel` stands for."""
    return values(kernel).astype(jnp.float32) * kernel.scale


def quantized_shape(kernel: jax.ShapeDtypeStruct) -> Quantized:
    """The shapes and dtypes of `quantize` for a kernel's."""
    scale = (*kernel.shape[:-2], 1, kernel.shape[-1])
    return Quantized(kernel.update(dtype=jnp.int8), kernel.update(shape=scale, dtype=jnp.float32))


def packed_shape(kernel: Any) -> Any:
    """The shapes of a kernel whose rows are packed, if it is a quantised one and four divides them."""
    if not isinstance(kernel, Quantized) or kernel.is_packed or kernel.shape[-2] % ROWS:
        return kernel
    *lead, rows, columns = kernel.shape
    words = kernel.int8.update(shape=(*lead, rows // ROWS, columns), dtype=jnp.int32)
    return Quantized(words, kernel.scale)
