"""Folders of torch.distributed.checkpoint (`.metadata` and `*.distcp`), as FSDP's trainers and accelerate write them.

PyTorch's own reader unpickles `.metadata` whatever it holds (`FileSystemReader.read_metadata`); here a name of a class
that is not among the metadata's own is refused. Tensors are read one at a time, from the pieces that each was saved in.
"""

import io
import math
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cfjax.conversion.pickles import as_numpy, torch_module
from cfjax.conversion.weight_file import WeightFile, listed, short
from cfjax.core.errors import UserError
from cfjax.core.inside import inside
from cfjax.core.lazy import LazyArray
from cfjax.core.limits import PICKLE_BYTES

METADATA, SUFFIX = ".metadata", ".distcp"
TITLE = "a torch distributed checkpoint (.metadata and *.distcp)"
FIX = (
    "copy all of its files, or make one file of it where it was written:"
    " python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt"
)
OWN = "torch.distributed.checkpoint."
# What `.metadata` is made of, besides the classes of `OWN`: name -> where it is.
PLAIN = {
    "builtins": {"set", "dict", "list", "tuple", "int", "str", "bytes"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path", "WindowsPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
}
CLASSES = {
    *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo"),
}


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    return (folder / METADATA).is_file() or any(folder.glob(f"*{SUFFIX}"))


def read_distributed(folder: Path) -> WeightFile:
    """The tensors of such a folder, by their names.

    Raises:
      UserError: a part is missing or broken, or `.metadata` holds anything but a checkpoint's description.
    """
    torch = torch_module(folder)
    meta = _metadata(torch, folder)
    try:
        arrays = {str(name): _array(torch, folder, meta, name) for name in meta.state_dict_metadata}
    except UserError:
        raise
    except Exception as error:  # what the description says may be of any kind
        raise UserError(f"{folder}: {TITLE}, whose {METADATA} makes no sense ({short(error)}); {FIX}") from None
    out = {name: array for name, array in arrays.items() if array is not None}
    if not out:
        raise UserError(f"{folder}: {TITLE} without tensors; {FIX}")
    ignored = [name for name in arrays if name not in out]
    return WeightFile(folder, {"": out}, [listed(ignored)] if ignored else [], TITLE)


def _array(torch: ModuleType, folder: Path, meta: Any, name: Any) -> LazyArray | None:
    """A tensor; None for what is none."""
    about = meta.state_dict_metadata[name]
    if not hasattr(about, "chunks"):
        return None
    dtype, shape = np.dtype(str(about.properties.dtype).removeprefix("torch.")), tuple(map(int, about.size))
    pieces = [_piece(folder, meta, name, chunk) for chunk in about.chunks]
    if sum(math.prod(sizes) for _, sizes, *_ in pieces) != math.prod(shape):
        raise UserError(f"{folder}: {TITLE} without all pieces of {name}; {FIX}")
    return LazyArray(shape, dtype, (partial(_read, torch, shape, dtype, pieces),))


class _Unpickler(pickle.Unpickler):
    """Of `.metadata`: its own classes, and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        """A class by its name, if it is one of those."""
        own = module.startswith(OWN) and name in CLASSES
        dtype = module == "torch" and name in ("float32", "float16", "bfloat16", "float64")
        if not (own or dtype or name in PLAIN.get(module, ())):
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def _metadata(torch: ModuleType, folder: Path) -> Any:

    file = folder / METADATA
    if not file.is_file():
        raise UserError(f"{folder}: {TITLE}, whose {METADATA} is missing; {FIX}")
    try:
        if file.stat().st_size > PICKLE_BYTES:
            raise ValueError(f"more than {PICKLE_BYTES} bytes")
        meta = _Unpickler(io.BytesIO(file.read_bytes())).load()
        assert isinstance(meta.state_dict_metadata, Mapping) and isinstance(meta.storage_data, Mapping)
    except Exception as error:  # a pickle that is none meets whatever comes first
        raise UserError(f"{folder}: {TITLE}, whose {METADATA} cannot be read ({short(error)}); {FIX}") from None
    return meta


Piece = tuple[tuple[int, ...], tuple[int, ...], Path, int, int]  # offsets, sizes, file, its bytes' start and number


def _piece(folder: Path, meta: Any, name: str, chunk: Any) -> Piece:
    """Where a piece of a tensor is; its file must be there, and long enough."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    stored = meta.storage_data.get(MetadataIndex(name, chunk.offsets))
    if stored is None:
        raise UserError(f"{folder}: {TITLE} that does not say where {name} is; {FIX}")
    if getattr(stored, "transform_descriptors", None):
        raise UserError(f"{folder}: {TITLE} whose pieces are packed; {FIX}")
    file = inside(folder, stored.relative_path, folder / METADATA)
    if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
        raise UserError(f"{folder}: {TITLE}, whose {file.name} is missing or cut short; {FIX}")
    offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
    return offsets, sizes, file, int(stored.offset), int(stored.length)


def _read(torch: ModuleType, shape: tuple[int, ...], dtype: np.dtype, pieces: list[Piece]) -> np.ndarray:
    out = np.empty(shape, dtype)
    for offsets, sizes, file, start, length in pieces:
        with file.open("rb") as opened:
            opened.seek(start)
            data = io.BytesIO(opened.read(length))
        try:
            part = torch.load(data, map_location="cpu", weights_only=True)
            values = as_numpy(torch, part)
        except Exception as error:  # its reader meets damage with whatever error comes first
            raise UserError(f"{file}: broken ({short(error)}); {FIX}") from None
        if values.shape != sizes or values.dtype != dtype:
            raise UserError(f"{file}: holds {values.dtype} {values.shape} in place of {dtype} {sizes}; {FIX}")
        out[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] = values
    return out
