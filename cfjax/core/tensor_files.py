"""Writing .safetensors: the one door, because the library takes an array's memory for its values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def save_tensors(path: str | Path, named: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays of any memory layout (NumPy's, jax's, numbers) as one .safetensors file, values as they are.

    `safetensors` 0.8 writes the bytes that lie from an array's first one on, in row-major order whatever the array's
    strides say: a transposed one comes back scrambled, a broadcast one with whatever lay behind it in memory. On TPU
    and GPU jax.Array becomes such an array of NumPy where its layout on the device is another.

    Args:
      path: on this machine; not replaced atomically.
      metadata: text for the file's header.
    """
    # not ascontiguousarray, which makes a vector of a number
    rows = {name: np.asarray(array, order="C") for name, array in named.items()}
    save_file(rows, path, metadata=dict(metadata) if metadata else None)
