"""Arrays of NumPy's .npz archives, each held against its own header before it is unpacked."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from cfjax.core.limits import ARRAY_BYTES, RANK

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_archive(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an archive by its name.

    A few bytes can be packed so that they become many: an array may have ARRAY_BYTES, or as many as the file.

    Raises:
      OSError, zipfile.BadZipFile: it cannot be read.
      ValueError: an entry is no array of plain numbers or letters, has other bytes than its header says, or too many.
    """
    out = {}
    with zipfile.ZipFile(path) as archive:
        most = max(ARRAY_BYTES, Path(path).stat().st_size)
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            try:
                with archive.open(entry) as file:
                    _check_header(file, entry.file_size, most)
                with archive.open(entry) as file:
                    out[name] = np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            except (NotImplementedError, RuntimeError, EOFError, SyntaxError, TypeError, OverflowError) as error:
                raise ValueError(f"{name}: {type(error).__name__}: {error}") from None
    return out


def _check_header(file: IO[bytes], size: int, most: int) -> None:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array of version {version}")
    shape, _, dtype = _HEADERS[version](file)
    told = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or len(shape) > RANK or any(length < 0 for length in shape):
        raise ValueError(f"{dtype} {shape} is no array of numbers")
    if told != (stored := size - file.tell()):
        raise ValueError(f"its header says {dtype} {shape}, {told} bytes; {stored} are stored")
    if told > most:
        raise ValueError(f"{told} bytes, more than the {most} that an array of this file may have")
