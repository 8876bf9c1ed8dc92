"""Weight files as named lazy arrays: safetensors, torch pickles, GGUF, shards with an index, distributed checkpoints.

Files are memory-mapped, so an array takes memory only while it is used. Everything in names and headers is checked at
once: shards, the index, truncation, prefixes of wrappers. PyTorch is needed for .pt, .pth and .bin alone.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cfjax.conversion.dcp import is_distributed, read_distributed
from cfjax.conversion.gguf_files import read_gguf
from cfjax.conversion.pickles import read_pickle
from cfjax.conversion.prefixes import entry_name, split, summary
from cfjax.conversion.weight_file import GGUF, INDEX, PICKLES, SAFETENSORS, Arrays, WeightFile, read_json, short
from cfjax.core.errors import UserError
from cfjax.core.inside import inside
from cfjax.core.lazy import LazyArray
from cfjax.core.limits import JSON_BYTES
from cfjax.core.schema import anything, checked, each_of, table, text

SUFFIXES = (SAFETENSORS, *PICKLES, GGUF)
# An index of shards: array -> its file. What its metadata says of their bytes is of the network before a cast as often
# as not, or 0: all names and shards are there, or they are not.
SHARDS = table({"weight_map": each_of(text())}, {"metadata": anything})
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.\w+")  # stem, number, of how many
SHARDS_MOST = 10_000
POINTER = b"version https://git-lfs"
ST_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64, "I64": np.int64}
ST_DTYPES |= {"I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_, "C64": np.complex64}
ST_DTYPES |= {"U16": np.uint16, "U32": np.uint32, "U64": np.uint64}
RAW = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}  # the library does not read them


def read_weights(path: str | Path) -> WeightFile:
    """Opens a file, an index with its shards, or a distributed checkpoint's folder.

    Raises:
      UserError: the file is missing, broken, cut short or of another kind; a shard is missing or disagrees with the
        index; a pickle holds anything but tensors and plain containers; two names become one without their wrappers.
    """
    path = Path(path)
    if path.is_dir() and is_distributed(path):
        return _by_network(read_distributed(path))
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if path.name.endswith(INDEX):
        return _by_network(_read_shards(path))
    if (shards := shards_of(path)) and not path.with_name(f"{shards[0]}{path.suffix}{INDEX}").is_file():
        return _by_network(_read_unindexed(path, shards[1]))
    if path.suffix in SUFFIXES:
        return _by_network(_read_one(path))
    raise UserError(f"{path}: not a weight file; give {', '.join(SUFFIXES)} or an index of shards ({INDEX})")


def shards_of(path: Path) -> tuple[str, list[str]] | None:
    """(what the names of a file's set of shards begin with, all of them), None if its own is not a shard's."""
    found = SHARD.fullmatch(path.name)
    if not found or int(found[3]) > SHARDS_MOST:
        return None
    count, width = int(found[3]), len(found[3])
    return found[1], [f"{found[1]}-{i + 1:0{width}d}-of-{found[3]}{path.suffix}" for i in range(count)]


def _by_network(file: WeightFile) -> WeightFile:
    """The file with an entry for each network, its names without what others put around them."""
    entries: dict[str, Arrays] = {}
    ignored = list(file.ignored)
    for key, arrays in file.entries.items():
        found, left = split(arrays, file.path)
        ignored += summary(left)
        for prefix, some in found.items():
            name = entry_name(key, prefix if len(found) > 1 or not key else "")
            entries[f"{key}.{prefix}".strip(".") if name in entries else name] = some
    return replace(file, entries=entries, ignored=ignored)


def _read_one(path: Path) -> WeightFile:
    """A file as it is."""
    if path.suffix == SAFETENSORS:
        return WeightFile(path, {"": _read_safetensors(path)})
    return read_gguf(path) if path.suffix == GGUF else read_pickle(path)


def _read_safetensors(path: Path) -> Arrays:
    try:
        file = safe_open(path, "np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, a file is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: broken or cut short ({short(error)}); copy it again") from None
    out, raw = {}, _raw_places(path) if any(x.get_dtype() in RAW for x in slices.values()) else {}
    for name, part in slices.items():
        kind, shape = part.get_dtype(), tuple(part.get_shape())
        if kind in RAW:
            dtype = np.dtype(RAW[kind])
            out[name] = LazyArray(shape, dtype, (partial(_raw, path, dtype, raw[name], shape),))
        elif kind in ST_DTYPES:
            out[name] = LazyArray(shape, np.dtype(ST_DTYPES[kind]), (partial(file.get_tensor, name),))
        else:
            raise UserError(f"{path}: {name} has dtype {kind}, which is not supported; take the bf16 or fp16 file")
    return out


def _raw_places(path: Path) -> dict[str, int]:
    """Where each array begins in a file whose header the library has checked."""
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > JSON_BYTES:
            raise UserError(f"{path}: broken (a header of {length} bytes); copy it again")
        header: Mapping[str, Any] = json.loads(opened.read(length))
    return {name: 8 + length + x["data_offsets"][0] for name, x in header.items() if name != "__metadata__"}


def _raw(path: Path, dtype: np.dtype, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array of bytes, mapped."""
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(path, np.uint8, "r", start, shape or (1,))).reshape(shape).view(dtype)


def read_index(path: Path) -> dict[str, Any]:
    """An index of shards. Raises UserError when it is none."""
    index = checked(SHARDS, read_json(path), path)
    if not index["weight_map"]:
        raise UserError(f"{path}: its weight_map is empty")
    return index


def _read_unindexed(path: Path, shards: list[str]) -> WeightFile:
    """A set of shards that has lost its index: their names say how many there are."""
    arrays: Arrays = {}
    for shard in shards:
        for name, array in _read_shard(path.parent, shard, path).items():
            if name in arrays:
                raise UserError(f"{path.parent / shard}: {name} is in another shard too; they are of different files")
            arrays[name] = array
    return WeightFile(path, {"": arrays}, about=f"{len(shards)} shards without their index")


def _read_shard(folder: Path, shard: Any, named_in: Path) -> Arrays:
    file = inside(folder, shard, named_in)
    if not file.is_file():
        raise UserError(f"{file} is missing, but {named_in.name} names it; copy all shards")
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: not a weight file, but {named_in.name} names it as a shard")
    entries = _read_one(file).entries
    if len(entries) != 1:
        raise UserError(f"{file}: a shard is one state dict, this one has {', '.join(entries)}")
    (arrays,) = entries.values()
    return arrays


def _read_shards(path: Path) -> WeightFile:
    index = read_index(path)
    where = index["weight_map"]
    shards = {shard: _read_shard(path.parent, shard, path) for shard in sorted(set(where.values()))}
    for name, shard in where.items():
        if name not in shards[shard]:
            raise UserError(f"{path}: {name} should be in {shard}, which does not hold it")
    for shard, arrays in shards.items():
        for name in arrays:
            if where.get(name) != shard:
                raise UserError(f"{path.parent / shard}: {name} is not in the index {path.name}, or in another shard")
    out = {name: shards[shard][name] for name, shard in where.items()}
    return WeightFile(path, {"": out}, _other_size(index, sum(x.nbytes for x in out.values())))


def _other_size(index: Mapping[str, Any], total: int) -> list[str]:
    """A note where the index says another number of bytes than the shards have."""
    about = index.get("metadata")
    stated = about.get("total_size") if isinstance(about, Mapping) else None
    try:
        same = stated is None or float(stated) in (0, total)
    except (TypeError, ValueError, OverflowError):
        same = False
    return [] if same else [f"the index's total_size, {stated!r:.40}: the shards hold {total} bytes"]
