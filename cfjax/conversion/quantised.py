"""Weights that rest in fewer bits than they are used in: float8 and int8 with their scales, read as floats.

    weight = stored scale,    one scale per tensor, per output channel, or per block

Names of scales: ComfyUI's `scaled_fp8_ops` (`comfy/ops.py`: `scale_weight`, `scale_input`, and the mark `scaled_fp8`)
and its later mixed-precision files (`weight_scale`, `input_scale`, `comfy_quant`: JSON that names the format),
compressed-tensors (`weight_scale`), and DeepSeek's and transformers' `FineGrainedFP8` (`weight_scale_inv`, one per
block of 128 x 128; multiplied too, in spite of its name).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from cfjax.conversion.prefixes import MARKER
from cfjax.conversion.weight_file import Arrays
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.schema import shown

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
INT8 = np.dtype(np.int8)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
BLOCK = 128
# Scales of what a layer takes: its weights do not need them.
ACTIVATIONS = re.compile(r".*(^|\.)(scale_input|input_scale|activation_scale|scale_output|output_scale)")
FORMAT = "comfy_quant"
NO_WEIGHTS = re.compile(rf".*(_scale|_scale_inv|\.scale_weight)|(.*\.)?({FORMAT}|{MARKER})|{ACTIVATIONS.pattern}")
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}  # keys of `comfy_quant`
FORMAT_BYTES = 4096
LOOKED_UP = 2**16  # numbers at a time: NumPy widens their indices to eight bytes


@dataclass(frozen=True)
class Quantised(LazyArray):
    """An array that rests in fewer bits than its `dtype`, which it is read in.

    Attributes:
      stored: what it rests in, for a message.
    """

    stored: str = ""


def dequantised(arrays: Mapping[str, LazyArray], dtype: str, *, unscaled: bool = False) -> tuple[Arrays, list[str]]:
    """A state dict in floats: stored numbers times their scales, tensor by tensor as they are read.

    Args:
      arrays: by the names of their file, scales and marks among them.
      dtype: of what was quantised, a key of `DTYPES`.
      unscaled: float8 without any scale is the weight itself (a plain cast).

    Returns:
      the arrays, as many as before less scales and marks; and notes of what was widened and left out.

    Raises:
      UserError: a scale is missing or does not fit; a format that is not known.
    """
    if dtype not in DTYPES:
        raise UserError(f"--config.dequantize={dtype}: use one of {', '.join(DTYPES)}")
    _check_formats(arrays)
    marks = [name for name in arrays if _last(name) in (FORMAT, MARKER) or ACTIVATIONS.fullmatch(name)]
    scales = {name: scale for name in arrays if (scale := _scale_of(name, arrays))}
    rest = {name: x for name, x in arrays.items() if name not in {*marks, *scales.values()}}
    bare = [name for name, x in rest.items() if x.dtype in (*FLOAT8, INT8) and x.size > 1 and name not in scales]
    scaled = bool(scales) or any(_last(name) == MARKER for name in arrays)
    whole = [name for name in bare if rest[name].dtype == INT8]
    if bare and (scaled or whole or not unscaled):
        raise UserError(_without_scales(bare, rest, scaled or bool(whole)))
    out = {name: _widened(name, x, arrays[scales[name]] if name in scales else None) for name, x in rest.items()}
    return _levelled(out, DTYPES[dtype]), _notes(out, marks, dtype)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _scale_of(name: str, arrays: Mapping[str, LazyArray]) -> str:
    """The name of a weight's scale, "" where it has none."""
    layer = name.removesuffix(".weight")
    names = (f"{name}_scale", f"{name}_scale_inv", f"{layer}.scale_weight")
    return next((scale for scale in names if scale in arrays and scale != name), "")


def _without_scales(bare: list[str], arrays: Arrays, scaled: bool) -> str:
    kinds = "/".join(sorted({arrays[name].dtype.name for name in bare}))
    some = f"{bare[0]} and {len(bare) - 1} more" if len(bare) > 1 else bare[0]
    if scaled:
        layer = bare[0].removesuffix(".weight")
        return (
            f"{some} are {kinds} (fp8 or int8) without their scales ({layer}.scale_weight or .weight_scale), which such"
            " a file needs: it is not whole; copy it again, or take the bf16 or fp16 file"
        )
    return (
        f"{some} are {kinds} (fp8) and no tensor has a scale: a plain cast, or a scaled file that has lost its scales;"
        " if it is a plain cast, say --config.unscaled=True, else take the file with scales, or the bf16 or fp16 one"
    )


def _check_formats(arrays: Mapping[str, LazyArray]) -> None:
    """UserError for a format of ComfyUI's that is more than numbers times scales."""
    seen: set[bytes] = set()
    for name, array in arrays.items():
        if _last(name) != FORMAT:
            continue
        if array.size > FORMAT_BYTES:
            raise UserError(f"{name} has {array.size} bytes; ComfyUI's name of a format is short")
        if (text := array.read().tobytes()) in seen:
            continue
        seen.add(text)
        try:
            about = json.loads(text)
            known = about["format"] in FORMATS and set(about) <= HARMLESS
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            what = shown(text.decode("utf-8", "replace"))
            raise UserError(f"{name}: {what} is a format that is not known here; known are {', '.join(FORMATS)}")


def _widened(name: str, stored: LazyArray, scale: LazyArray | None) -> LazyArray:
    """The float32 array that a stored one and its scale stand for; others as they are."""
    if scale is None and stored.dtype not in FLOAT8:
        return stored
    expand = _expander(name, stored.shape, scale) if scale is not None else None

    def read() -> np.ndarray:
        values = _as_float32(stored.read())
        if expand is not None:
            expand(values)
        return values

    return Quantised(stored.shape, np.dtype(np.float32), (read,), stored=stored.dtype.name)


def _as_float32(stored: np.ndarray) -> np.ndarray:
    """A new float32 array; of float8 by a table of all 256 numbers, faster than a cast."""
    if stored.dtype not in FLOAT8:
        return stored.astype(np.float32)
    every = np.arange(256, dtype=np.uint8).view(stored.dtype).astype(np.float32)
    flat, out = np.ascontiguousarray(stored).view(np.uint8).reshape(-1), np.empty(stored.size, np.float32)
    for start in range(0, flat.size, LOOKED_UP):
        piece = slice(start, start + LOOKED_UP)
        np.take(every, flat[piece], out=out[piece], mode="clip")  # which checks no index
    return out.reshape(stored.shape)


def _expander(name: str, shape: tuple[int, ...], scale: LazyArray) -> Callable[[np.ndarray], None]:
    """Multiplies an array of this shape by its scale in place.

    Raises:
      UserError: the scale is neither one number, nor one per channel or block.
    """
    if scale.size == 1:

        def one(values: np.ndarray) -> None:
            values *= np.float32(scale.read().reshape(()))

        return one
    parts = scale.shape if len(scale.shape) == len(shape) else (*scale.shape, *(1,) * (len(shape) - len(scale.shape)))
    blocks = tuple(_block(size, count) for size, count in zip(shape, parts, strict=False))
    if len(parts) != len(shape) or 0 in blocks:
        raise UserError(f"{name} {shape} has a scale of shape {scale.shape}, neither per tensor, channel nor block")

    def each(values: np.ndarray) -> None:
        factors = scale.read().astype(np.float32).reshape(parts)
        step = blocks[0]
        for start in range(0, shape[0], step):  # a row of blocks at a time: the expanded scale stays small
            row = factors[start // step]
            for axis, block in enumerate(blocks[1:]):
                row = np.repeat(row, block, axis)[(slice(None),) * axis + (slice(0, shape[axis + 1]),)]
            values[start : start + step] *= row

    return each


def _block(size: int, count: int) -> int:
    """Entries of an axis that share a scale; 0 where `count` scales do not fit."""
    if count == -(-size // BLOCK) and count > 1:
        return BLOCK
    return size // count if count and size % count == 0 else 0


def _levelled(arrays: Arrays, dtype: np.dtype) -> Arrays:
    """What was quantised in `dtype`, and with it what has the same name in other layers, which are stacked."""
    layer = lambda name: re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
    groups = {layer(name) for name, x in arrays.items() if isinstance(x, Quantised)}
    return {name: _cast(x, dtype) if layer(name) in groups else x for name, x in arrays.items()}


def _cast(array: LazyArray, dtype: np.dtype) -> LazyArray:
    if array.dtype == dtype:
        return array

    def cast(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        return lambda: read().astype(dtype)

    return replace(array, dtype=dtype, parts=tuple(map(cast, array.parts)))


def _notes(arrays: Arrays, marks: list[str], dtype: str) -> list[str]:
    stored = [x.stored for x in arrays.values() if isinstance(x, Quantised)]
    kinds = ", ".join(f"{stored.count(kind)} of {kind}" for kind in sorted(set(stored)))
    notes = [f"dequantised to {dtype}: {kinds}"] if stored else []
    inputs = [name for name in marks if ACTIVATIONS.fullmatch(name)]
    return notes + ([f"left out: scales of {len(inputs)} layers' inputs"] if inputs else [])
