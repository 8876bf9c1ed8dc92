"""GGUF files (ComfyUI-GGUF's of transformers, llama.cpp's of T5) as named lazy arrays, dequantised piece by piece.

The header is read here, every count and size checked against the file before anything is allocated (format: ggml,
`docs/gguf.md`); what quantised blocks mean is the `gguf` package's. Axes are in reverse order in the file. ComfyUI-GGUF
keeps the shape of a tensor that it had to fold as `comfy.gguf.orig_shape.NAME` (`loader.py`, `get_orig_shape`), and
llama.cpp has short names for T5 (`loader.py`, `T5_SD_MAP`).
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cfjax.conversion.quantised import Quantised
from cfjax.conversion.weight_file import Arrays, WeightFile
from cfjax.core.errors import UserError
from cfjax.core.lazy import PIECE, LazyArray
from cfjax.core.limits import AXIS, RANK

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, SHAPE = "general.alignment", "comfy.gguf.orig_shape."
ARCHITECTURE, T5 = "general.architecture", ("t5", "t5encoder")
# Of values beside the tensors, by their number: u8, i8, u16, i16, u32, i32, f32, bool; text; list; u64, i64, f64.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
KEPT = 64  # entries of a list that are kept: shapes are, vocabularies are not
# Tensors that are plain numbers, by their kind's number: name, dtype.
PLAIN = {0: ("F32", np.dtype("<f4")), 1: ("F16", np.dtype("<f2")), 30: ("BF16", np.dtype(ml_dtypes.bfloat16))}
# llama.cpp's name of a part of T5 -> transformers'; in this order, each wherever it stands.
T5_NAMES = {
    "enc.output_norm.": "encoder.final_layer_norm.",
    "enc.blk.": "encoder.block.",
    "token_embd.": "shared.",
    "attn_rel_b.": "layer.0.SelfAttention.relative_attention_bias.",
    "attn_norm.": "layer.0.layer_norm.",
    **{f"attn_{part}.": f"layer.0.SelfAttention.{part}." for part in "qkvo"},
    "ffn_norm.": "layer.1.layer_norm.",
    "ffn_gate.": "layer.1.DenseReluDense.wi_0.",
    "ffn_up.": "layer.1.DenseReluDense.wi_1.",
    "ffn_down.": "layer.1.DenseReluDense.wo.",
}


class _Header:
    """Reads numbers and texts one after another, within the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        """`count` numbers of a `struct` form; ValueError beyond the file's end."""
        size = struct.calcsize(f"<{form}") * count
        if size > len(self.data) - self.at:
            raise ValueError("its header ends beyond the file")
        out = struct.unpack_from(f"<{count}{form}", self.data, self.at) if count else ()
        self.at += size
        return out

    def skip(self, form: str, count: int) -> None:
        """Passes over numbers."""
        self.at += struct.calcsize(f"<{form}") * count
        if self.at > len(self.data):
            raise ValueError("its header ends beyond the file")

    def text(self) -> str:
        """A text in UTF-8."""
        (length,) = self.numbers("Q")
        if length > len(self.data) - self.at:
            raise ValueError("its header ends beyond the file")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of this kind; the first entries of a list."""
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == TEXT:
            return self.text()
        if kind != LIST or depth:
            raise ValueError(f"a value of unknown kind {kind}")
        inner, count = self.numbers("I")[0], self.numbers("Q")[0]
        if inner in SCALARS:
            first = self.numbers(SCALARS[inner], min(count, KEPT))
            self.skip(SCALARS[inner], count - len(first))
            return list(first)
        if count > len(self.data):
            raise ValueError("its header ends beyond the file")
        kept = [self.value(inner, depth + 1) for _ in range(min(count, KEPT))]
        for _ in range(count - len(kept)):
            self.value(inner, depth + 1)
        return kept


@dataclass(frozen=True)
class _Tensor:
    """What the header says of one tensor."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_gguf(path: Path) -> WeightFile:
    """The tensors of a file, quantised ones as float32.

    Raises:
      UserError: it is broken or cut short; a kind of tensor that is not known; the `gguf` package is missing.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError("it does not begin with GGUF")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        about, tensors, start = _header(data)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: broken or cut short ({error}); copy it again") from None
    named = _t5_name if about.get(ARCHITECTURE) in T5 else str
    out: Arrays = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.offset != end:  # as ggml itself demands
            raise UserError(f"{path}: broken ({name} begins at {tensor.offset}, not at {end}); copy it again")
        shape = about.get(f"{SHAPE}{name}", tensor.shape)
        out[named(name)], stored = _array(path, data, name, tensor, shape, start)
        end += -(-stored // about[ALIGNMENT]) * about[ALIGNMENT]
    if len(data) - start - end >= about[ALIGNMENT]:
        raise UserError(f"{path}: broken ({len(data) - start - end} bytes behind its last tensor); copy it again")
    return WeightFile(path, {"": out})


def _header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, _Tensor], int]:
    """The values, the tensors, and where their numbers begin; ValueError where these cannot be."""
    header = _Header(data)
    header.skip("B", len(MAGIC))
    (version,) = header.numbers("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; {' and '.join(map(str, VERSIONS))} are read")
    count, values = header.numbers("Q", 2)
    if 24 * count + 12 * values > len(data):
        raise ValueError(f"{count} tensors and {values} values do not fit into {len(data)} bytes")
    about = {header.text(): header.value(*header.numbers("I")) for _ in range(values)}
    tensors: dict[str, _Tensor] = {}
    for _ in range(count):
        name, (rank,) = header.text(), header.numbers("I")
        if rank > RANK or name in tensors:
            raise ValueError(f"{name!r} has {rank} axes, or stands there twice")
        shape = tuple(reversed(header.numbers("Q", rank)))
        if not all(0 < size <= AXIS for size in shape):
            raise ValueError(f"{name!r} has shape {shape}")
        tensors[name] = _Tensor(shape, *header.numbers("I"), *header.numbers("Q"))
    alignment = about.setdefault(ALIGNMENT, 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise ValueError(f"{ALIGNMENT} is {alignment!r}")
    return about, tensors, -(-header.at // alignment) * alignment


def _array(path: Path, data: mmap.mmap, name: str, tensor: _Tensor, shape: Any, start: int) -> tuple[LazyArray, int]:
    """One tensor, checked against the file's size, and its bytes there."""
    if tensor.kind in PLAIN:
        block, block_bytes, label = 1, PLAIN[tensor.kind][1].itemsize, PLAIN[tensor.kind][0]
    else:
        block, block_bytes, label = _blocks(path, name, tensor.kind)
    size, row = math.prod(tensor.shape), tensor.shape[-1] if tensor.shape else 1
    stored = size // block * block_bytes
    if row % block:
        raise UserError(f"{path}: {name} {tensor.shape} is {label}, in blocks of {block}; it is broken, copy it again")
    plain = isinstance(shape, list | tuple) and len(shape) <= RANK and all(type(x) is int and x > 0 for x in shape)
    if not plain or math.prod(shape) != size:
        raise UserError(f"{path}: {name} has {tensor.shape}, and should be {shape!r:.60}; it is broken, copy it again")
    shape = tuple(shape)
    if start + tensor.offset + stored > len(data):
        raise UserError(f"{path}: broken or cut short ({name} ends beyond the file's {len(data)} bytes); copy it again")
    raw = partial(np.frombuffer, data, np.uint8, stored, start + tensor.offset)
    if tensor.kind in PLAIN:
        dtype = PLAIN[tensor.kind][1]
        return LazyArray(shape, dtype, (lambda: raw().view(dtype).reshape(shape),)), stored
    rows = (size // row, row // block * block_bytes)
    read = partial(_dequantised, raw, tensor.kind, rows, row, shape)
    return Quantised(shape, np.dtype(np.float32), (read,), stored=label), stored


def _blocks(path: Path, name: str, kind: int) -> tuple[int, int, str]:
    """Numbers and bytes of a block, and what its kind is called."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError:
        raise UserError(
            f"{path}: its quantised tensors need the gguf package; install it with: pip install gguf"
        ) from None
    try:
        found = GGMLQuantizationType(kind)
    except ValueError:
        raise UserError(f"{path}: {name} is of kind {kind}, which the installed gguf package does not know") from None
    block, block_bytes = GGML_QUANT_SIZES[found]
    try:
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), found)
    except NotImplementedError:
        raise UserError(f"{path}: {name} is {found.name}, which the gguf package cannot dequantise") from None
    return block, block_bytes, found.name


def _dequantised(raw: Any, kind: int, rows: tuple[int, int], row: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32, some rows at a time: the package needs several times their memory."""
    from gguf import GGMLQuantizationType, quants

    stored, out = raw().reshape(rows), np.empty((rows[0], row), np.float32)
    step = max(1, PIECE // row)
    for start in range(0, rows[0], step):
        some = np.ascontiguousarray(stored[start : start + step])
        out[start : start + step] = quants.dequantize(some, GGMLQuantizationType(kind))
    return out.reshape(shape)


def _t5_name(name: str) -> str:
    for theirs, ours in T5_NAMES.items():
        name = name.replace(theirs, ours)
    return name
