"""Weight files as named lazy arrays: safetensors, sharded safetensors with an index, torch pickles.

Files are memory-mapped, so an array takes memory only while it is used. Everything in names and headers is checked at
once: shards, the index, truncation, prefixes of wrappers. PyTorch is needed for .pt and .pth alone.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cfjax.core.errors import UserError
from cfjax.core.inside import inside
from cfjax.core.lazy import LazyArray
from cfjax.core.limits import NESTED, PICKLE_BYTES
from cfjax.core.schema import checked, each_of, load_json, table, text, whole

Arrays = dict[str, LazyArray]

SAFETENSORS, INDEX = ".safetensors", ".safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# What FSDP, activation checkpointing and torch.compile put into names, anywhere; the pipelines' wrapper puts `model.`
# in front.
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
PREFIX = "model."
# An index of shards: array -> its file, and how many bytes all of them have.
SHARDS = table({"weight_map": each_of(text())}, {"metadata": table({}, {"total_size": whole()})})
POINTER = b"version https://git-lfs"
ST_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64, "I64": np.int64}
ST_DTYPES |= {"I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
ST_DTYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


@dataclass(frozen=True)
class WeightFile:
    """The content of one file (or one set of shards).

    Attributes:
      path: the file, or the index of the shards.
      entries: state dicts by their key in the file; "" where the file is one state dict.
      ignored: keys of the file that are no state dicts (step counts, optimizer states).
    """

    path: Path
    entries: dict[str, Arrays]
    ignored: list[str] = field(default_factory=list)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: it cannot be read or is something else.
    """
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def read_weights(path: str | Path) -> WeightFile:
    """Opens a .safetensors file, a .safetensors.index.json with its shards, or a .pt/.pth file.

    Raises:
      UserError: the file is missing, broken, cut short or of another kind; a shard is missing or disagrees with the
        index; a pickle holds anything but tensors and plain containers; two names become one without their prefixes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if path.name.endswith(INDEX):
        return WeightFile(path, {"": stripped(_read_shards(path), path)})
    if path.name.endswith(SAFETENSORS):
        return WeightFile(path, {"": stripped(_read_safetensors(path), path)})
    if path.suffix in PICKLES:
        return _read_pickle(path)
    raise UserError(f"{path}: not a weight file; give {SAFETENSORS}, {INDEX} or {', '.join(PICKLES)}")


def stripped(arrays: Mapping[str, LazyArray], path: Path) -> Arrays:
    """Arrays by their names without wrappers' parts (`WRAPPERS` at any depth) and a leading `model.`.

    Raises:
      UserError: two names become one.
    """
    out: Arrays = {}
    origin: dict[str, str] = {}
    for name, array in arrays.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix(PREFIX)
        if bare in out:
            raise UserError(f"{path}: {origin[bare]} and {name} are both {bare} without their prefixes")
        out[bare], origin[bare] = array, name
    return out


def _read_safetensors(path: Path) -> Arrays:
    try:
        file = safe_open(path, "np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, a file is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: broken or cut short ({_one_line(error)}); copy it again") from None
    out = {}
    for name, part in slices.items():
        dtype = part.get_dtype()
        if dtype not in ST_DTYPES:
            raise UserError(f"{path}: {name} has dtype {dtype}, which is not supported")
        read = partial(file.get_tensor, name)
        out[name] = LazyArray(tuple(part.get_shape()), np.dtype(ST_DTYPES[dtype]), (read,))
    return out


def read_index(path: Path) -> dict[str, Any]:
    """An index of shards. Raises UserError when it is none."""
    index = checked(SHARDS, read_json(path), path)
    if not index["weight_map"]:
        raise UserError(f"{path}: its weight_map is empty")
    return index


def _read_shards(path: Path) -> Arrays:
    index = read_index(path)
    where = index["weight_map"]
    shards: dict[str, Arrays] = {}
    for shard in sorted(set(where.values())):
        file = inside(path.parent, shard, path)
        if not file.is_file():
            raise UserError(f"{file} is missing, but {path.name} names it; copy all shards")
        shards[shard] = _read_safetensors(file)
    for name, shard in where.items():
        if name not in shards[shard]:
            raise UserError(f"{path}: {name} should be in {shard}, which does not hold it")
    for shard, arrays in shards.items():
        for name in arrays:
            if where.get(name) != shard:
                raise UserError(f"{path.parent / shard}: {name} is not in the index {path.name}, or in another shard")
    out = {name: shards[shard][name] for name, shard in where.items()}
    total, stated = sum(x.nbytes for x in out.values()), index.get("metadata", {}).get("total_size")
    if stated is not None and stated != total:
        raise UserError(
            f"{path}: the index says {stated} bytes, the shards hold {total}; they belong to different files"
        )
    return out


def torch_module(path: Path) -> ModuleType:
    """PyTorch.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: {'/'.join(PICKLES[:2])} files need PyTorch; install it with: pip install torch"
        ) from None
    return torch


def _read_pickle(path: Path) -> WeightFile:
    torch = torch_module(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on protocol versions
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|type (\S+)", str(error))
        what = f"holds {named[1] or named[2]}" if named else "is no file of torch.save"
        raise UserError(
            f"{path}: refused: it {what}, and what is not tensors and plain containers alone can run any code;"
            " save its state dict alone"
        ) from None
    except Exception as error:  # its reader meets damage with whatever error comes first
        raise UserError(f"{path}: broken or cut short ({_one_line(error)}); copy it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    is_state = lambda x: isinstance(x, Mapping) and any(isinstance(v, torch.Tensor) for v in x.values())
    if is_state(content):
        return WeightFile(path, {"": stripped(_tensors(torch, content, path), path)})
    entries, ignored = {}, []
    for key, value in content.items():
        for _ in range(NESTED):
            if not isinstance(value, Mapping) or is_state(value):
                break
            value = value.get("model") or value.get("state_dict")
        if is_state(value):
            entries[str(key)] = value
        else:
            ignored.append(str(key))
    if not entries:
        raise UserError(f"{path}: holds no tensors, only {', '.join(ignored) or 'nothing'}")
    return WeightFile(path, {key: stripped(_tensors(torch, x, path), path) for key, x in entries.items()}, ignored)


def _check_archive(path: Path) -> None:
    """Sizes in a .pt, before anything of it is unpacked: torch.save compresses nothing, so each is at most the file's.

    Raises:
      UserError: a compressed entry, more bytes than the file has, or too many for names and numbers.
    """
    if not zipfile.is_zipfile(path):  # from before PyTorch 1.6
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: broken or cut short ({_one_line(error)}); copy it again") from None
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), "")
    if packed:
        raise UserError(f"{path}: its entry {packed} is compressed, which torch.save never does; save it again")
    if (total := sum(entry.file_size for entry in entries)) > (size := path.stat().st_size):
        raise UserError(f"{path}: its entries have {total} bytes, the file {size}: it is broken; copy it again")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > PICKLE_BYTES:
            raise UserError(f"{path}: {entry.file_size} bytes besides its tensors; save its state dict alone")


def _tensors(torch: ModuleType, state: Mapping[str, Any], path: Path) -> Arrays:
    """A state dict's tensors; anything else in it is an error."""
    out = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            kind = (
                f"a tensor of layout {value.layout}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            )
            raise UserError(f"{path}: {name} is {kind}, not a plain tensor")
        if value.nbytes > (stored := value.untyped_storage().nbytes()):
            raise UserError(
                f"{path}: {name} {tuple(value.shape)} would have {value.nbytes} bytes, of which {stored} are stored: an"
                " expanded tensor; save its contiguous() copy"
            )
        out[str(name)] = LazyArray(tuple(value.shape), _numpy_dtype(value.dtype), (_torch_reader(torch, value),))
    return out


def _numpy_dtype(dtype: Any) -> np.dtype:
    return np.dtype(str(dtype).removeprefix("torch."))  # ml_dtypes gives NumPy the names of the small floats


def _torch_reader(torch: ModuleType, tensor: Any) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        plain = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return plain.numpy()

    return read


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:120]}..."
