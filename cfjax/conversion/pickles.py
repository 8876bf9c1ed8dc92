"""torch.save's files (.pt, .pth, .bin, .ckpt), mapped into memory; nothing in them is run."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cfjax.conversion.weight_file import PICKLES, Arrays, WeightFile, listed, short
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.limits import NESTED, PICKLE_BYTES


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


def read_pickle(path: Path) -> WeightFile:
    """The state dicts of a file, at whatever depth, by their keys joined with dots.

    Raises:
      UserError: it is broken, holds anything but tensors and plain containers, or no tensors.
    """
    torch = torch_module(path)
    _check_archive(path)
    content = _loaded(torch, path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    states, ignored = _states(torch, content)
    if not states:
        raise UserError(f"{path}: holds no tensors, only {', '.join(ignored) or 'nothing'}")
    entries = {key: _tensors(torch, state, key, path, ignored) for key, state in states.items()}
    return WeightFile(path, entries, ignored)


def _loaded(torch: ModuleType, path: Path) -> Any:
    """What the file holds, tensors mapped into memory."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_classes()):
            warnings.simplefilter("ignore")  # on protocol versions
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|type (\S+)", str(error))
        what = f"holds {named[1] or named[2]}" if named else "is no file of torch.save"
        raise UserError(
            f"{path}: refused: it {what}, and what is not tensors and plain containers alone can run any code;"
            " save its state dict alone"
        ) from None
    except Exception as error:  # its reader meets damage with whatever error comes first
        raise UserError(f"{path}: broken or cut short ({short(error)}); copy it again") from None


def _plain_classes() -> list[Any]:
    """What trainers put beside weights, and what holds values alone: their flags, NumPy's random state."""
    arrays = (np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar)  # type: ignore[attr-defined]
    kinds = {type(np.dtype(kind)) for kind in ("u4", "i8", "f4", "f8", "u1", "?")}
    old = (arrays[2], "numpy.core.multiarray._reconstruct"), (arrays[3], "numpy.core.multiarray.scalar")  # of NumPy 1
    return [argparse.Namespace, *arrays, *kinds, *old]


def _states(torch: ModuleType, content: Mapping[Any, Any]) -> tuple[dict[str, Mapping[Any, Any]], list[str]]:
    """The state dicts within `content`, and the keys beside them that lead to none."""
    found: dict[str, Mapping[Any, Any]] = {}
    ignored: list[str] = []
    seen: set[int] = set()

    def walk(key: str, value: Mapping[Any, Any], depth: int) -> bool:
        """Whether there is a state dict in `value`, which may hold itself."""
        if depth > NESTED or id(value) in seen:
            return False
        seen.add(id(value))
        inside = {str(name): x for name, x in value.items() if isinstance(x, Mapping)}
        own = any(isinstance(x, torch.Tensor) and "." in str(name) for name, x in value.items())
        if own:
            found[key] = value
        below = [name for name, x in inside.items() if walk(f"{key}.{name}".lstrip("."), x, depth + 1)]
        if own or below:
            beside = inside if own else map(str, value)
            ignored.extend(f"{key}.{name}".lstrip(".") for name in beside if name not in below)
        return own or bool(below)

    if not walk("", content, 0):
        if any(isinstance(x, torch.Tensor) for x in content.values()):  # names of one word: a single layer
            return {"": content}, []
        return {}, [str(name) for name in content]
    return found, ignored


def _tensors(torch: ModuleType, state: Mapping[Any, Any], key: str, path: Path, ignored: list[str]) -> Arrays:
    """A state dict's tensors; the names of what is none go to `ignored`."""
    out, beside = {}, []
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            if not isinstance(value, Mapping):
                beside.append(f"{key}.{name}".lstrip("."))
            continue
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise UserError(
                f"{path}: {name} is a {type(value).__name__}, a piece of a tensor; save whole ones (full_tensor()), or"
                " name the folder of torch.distributed.checkpoint"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise UserError(f"{path}: {name} is a tensor of layout {value.layout}, not a plain tensor")
        if value.nbytes > (stored := value.untyped_storage().nbytes()):
            raise UserError(
                f"{path}: {name} {tuple(value.shape)} would have {value.nbytes} bytes, of which {stored} are stored: an"
                " expanded tensor; save its contiguous() copy"
            )
        out[str(name)] = LazyArray(tuple(value.shape), _numpy_dtype(value.dtype, name, path), (_reader(torch, value),))
    if beside:
        ignored.append(listed(beside))
    return out


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
        raise UserError(f"{path}: broken or cut short ({short(error)}); copy it again") from None
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), "")
    if packed:
        raise UserError(f"{path}: its entry {packed} is compressed, which torch.save never does; save it again")
    if (total := sum(entry.file_size for entry in entries)) > (size := path.stat().st_size):
        raise UserError(f"{path}: its entries have {total} bytes, the file {size}: it is broken; copy it again")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > PICKLE_BYTES:
            raise UserError(f"{path}: {entry.file_size} bytes besides its tensors; save its state dict alone")


def _numpy_dtype(dtype: Any, name: Any, path: Path) -> np.dtype:
    try:
        return np.dtype(str(dtype).removeprefix("torch."))  # ml_dtypes gives NumPy the names of the small floats
    except TypeError:
        raise UserError(f"{path}: {name} has dtype {dtype}, which is not supported") from None


def _reader(torch: ModuleType, tensor: Any) -> Callable[[], np.ndarray]:
    return lambda: as_numpy(torch, tensor)


def as_numpy(torch: ModuleType, tensor: Any) -> np.ndarray:
    """A tensor's numbers in its own dtype, copied where they are not contiguous."""
    plain = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return plain.view(torch.uint8).numpy().view(np.dtype(str(tensor.dtype).removeprefix("torch.")))
    return plain.numpy()
