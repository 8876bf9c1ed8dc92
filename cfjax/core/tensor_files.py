"""The only writer of .safetensors files, because the library ignores the strides of an array."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save, save_file


def save_tensors(path: str | Path, named: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays of any memory layout (NumPy's, jax's, numbers) as one .safetensors file, values as they are.

    `safetensors` 0.8 writes consecutive bytes from an array's first one on, whatever its strides are: a transposed
    array is read back scrambled, a broadcast one with whatever followed it in memory. On TPU and GPU, `np.asarray` of a
    jax.Array has such strides where the array's layout on the device is not row-major.

    Args:
      path: in a folder of this machine that is removed whole if the process dies: the library writes a file of its own
        naming there (`.tmpXXXXXX`, safetensors 0.8), and renames it. Elsewhere, see `tensor_bytes`.
      metadata: text for the file's header.
    """
    save_file(_row_major(named), path, metadata=dict(metadata) if metadata else None)


def tensor_bytes(named: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """What `save_tensors` would write, for a small file that `write_atomically` puts among others."""
    return save(_row_major(named), metadata=dict(metadata) if metadata else None)


def _row_major(named: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # not ascontiguousarray, which makes a vector of a number
    return {name: np.asarray(array, order="C") for name, array in named.items()}
