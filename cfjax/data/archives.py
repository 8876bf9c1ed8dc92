"""Arrays of NumPy's .npz archives, each checked against its own header before it is unpacked."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from cfjax.core.limits import ARRAY_BYTES, RANK

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_archive(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an archive by its name.

    A few compressed bytes can become many: an array may have ARRAY_BYTES, or as many as the file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no archive or damaged, or an entry is no array of plain numbers or letters, has other bytes than
        its header says, or too many.
    """
    most = max(ARRAY_BYTES, Path(path).stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            return {entry.filename.removesuffix(".npy"): _read(archive, entry, most) for entry in archive.infolist()}
    except (OSError, ValueError):
        raise
    except Exception as error:  # Python's unpackers raise all kinds of errors for damaged data
        raise ValueError(_one_line(error)) from None


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> np.ndarray:
    try:
        with archive.open(entry) as file:
            _check_header(file, entry.file_size, most)
        with archive.open(entry) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{entry.filename}: {error}") from None


def open_array(file: Path) -> np.ndarray:
    """A .npy file's array, not yet read; `np.load` would take an archive, or a pickle, too.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no array of plain numbers, or shorter than its header says.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError):
        raise
    except Exception as error:  # its header is parsed as Python
        raise ValueError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_header(file: IO[bytes], size: int, most: int) -> None:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array of version {version}")
    shape, _, dtype = _HEADERS[version](file)
    expected = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or len(shape) > RANK or any(length < 0 for length in shape):
        raise ValueError(f"{dtype} {shape} is no array of numbers")
    if expected != (stored := size - file.tell()):
        raise ValueError(f"its header says {dtype} {shape}, {expected} bytes; {stored} are stored")
    if expected > most:
        raise ValueError(f"{expected} bytes, more than the {most} that an array of this file may have")
