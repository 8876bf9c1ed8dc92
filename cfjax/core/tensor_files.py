"""The only writer of .safetensors files, because the library ignores the strides of an array."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def save_tensors(path: str | Path, named: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays of any memory layout (NumPy's, jax's, numbers) as one .safetensors file, values as they are.

    `safetensors` 0.8 writes consecutive bytes from an array's first one on, whatever its strides are: a transposed
    array is read back scrambled, a broadcast one with whatever followed it in memory. On TPU and GPU, `np.asarray` of a
    jax.Array has such strides where the array's layout on the device is not row-major.

    Args:
      path: on this machine; not replaced atomically.
      metadata: text for the file's header.
    """
    # not ascontiguousarray, which makes a vector of a number
    rows = {name: np.asarray(array, order="C") for name, array in named.items()}
    save_file(rows, path, metadata=dict(metadata) if metadata else None)
