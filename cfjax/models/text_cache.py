"""A content-addressed cache of text rows on disk, so that an encoder of 11 GB is only loaded for new captions.

    <folder>/ab/cdef...   rows of the caption whose key begins with "abcdef", its real ones; those of padding are zero

The key is a hash of the cleaned caption, the encoder's fingerprint (weights, sizes, tokenizer, precision), the text
length and the dtype that rows are kept in. Entries are written under another name and renamed, so that processes may
share a folder; each carries a checksum, and a broken one counts as absent.
"""

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from absl import logging

from cfjax.core.errors import UserError
from cfjax.models.tokenizer import clean

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
MAGIC = b"cfjax text rows 1\n"
FILL_AT_ONCE = 32  # captions encoded before their rows are written


class Encoder(Protocol):
    """The encoder that fills the cache; see `models.text.TextEncoder`."""

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Text rows, float32 [n, S, E], zero beyond each caption's tokens."""

    def fingerprint(self) -> str:
        """Equal for two encoders that give the same rows."""


class TextCache:
    """Rows of captions in `folder`, of one encoder at one text length.

    Args:
      folder: made when the first entry is written.
      fingerprint: the encoder's; entries of other encoders may be in the same folder.
      length: S, the rows of a caption.
      dtype: of stored rows: "float32" as computed, or "bfloat16", half the size.
    """

    def __init__(self, folder: str | Path, fingerprint: str, length: int, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise UserError(f"text cache dtype {dtype!r}: use {' or '.join(DTYPES)}")
        self.folder, self.fingerprint, self.length, self.dtype = Path(folder), fingerprint, length, dtype

    def path(self, caption: str) -> Path:
        """Where the caption's rows are, or would be."""
        about = json.dumps([clean(caption), self.fingerprint, self.length, self.dtype])
        key = hashlib.sha256(about.encode()).hexdigest()
        return self.folder / key[:2] / key[2:]

    def get(self, caption: str) -> np.ndarray | None:
        """text_SE, float32; None when it is absent, or broken, which is logged."""
        path = self.path(caption)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        rows = _unpacked(content, DTYPES[self.dtype])
        if rows is None or len(rows) > self.length:
            logging.warning("%s: a broken text cache entry (%r); it will be made again", path, caption[:60])
            return None
        return np.pad(rows.astype(np.float32), ((0, self.length - len(rows)), (0, 0)))

    def get_many(self, captions: Sequence[str]) -> list[np.ndarray | None]:
        """`get` of each."""
        return [self.get(caption) for caption in captions]

    def put_many(self, captions: Sequence[str], text_BSE: np.ndarray) -> None:
        """Writes each caption's rows; what was there is replaced.

        Raises:
          UserError: an entry cannot be written.
        """
        for caption, text_SE in zip(captions, text_BSE, strict=True):
            if len(text_SE) != self.length:
                raise ValueError(f"{len(text_SE)} rows for a cache of text length {self.length}")
            (real,) = np.nonzero(text_SE.any(axis=1))
            rows = text_SE[: real[-1] + 1 if len(real) else 0]
            _write(self.path(caption), _packed(rows.astype(DTYPES[self.dtype])))


def _packed(rows: np.ndarray) -> bytes:
    header = json.dumps({"shape": rows.shape, "dtype": rows.dtype.name, "crc": zlib.crc32(rows.tobytes())})
    return MAGIC + header.encode() + b"\n" + rows.tobytes()


def _unpacked(content: bytes, dtype: np.dtype) -> np.ndarray | None:
    """The rows of an entry; None when it is not whole."""
    try:
        header, data = content.removeprefix(MAGIC).split(b"\n", 1)
        about = json.loads(header)
        if not content.startswith(MAGIC) or about["dtype"] != dtype.name or about["crc"] != zlib.crc32(data):
            return None
        return np.frombuffer(data, dtype).reshape(about["shape"])
    except (ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write the text cache ({error.strerror})") from None


def fill(load: Callable[[], Encoder], cache: TextCache, captions: Sequence[str]) -> int:
    """Encodes the captions that the cache has not, and returns how many those were.

    Args:
      load: gives the encoder; called at most once, and not at all when every caption is there.

    Raises:
      UserError: the encoder is not the one that the cache is for, or an entry cannot be written.
    """
    absent = {cache.path(c): c for c in captions if cache.get(c) is None}
    missing = list(absent.values())
    if not missing:
        return 0
    encoder = load()
    if encoder.fingerprint() != cache.fingerprint:
        raise UserError(f"{cache.folder}: this text cache is for another text encoder than the one that was loaded")
    for start in range(0, len(missing), FILL_AT_ONCE):
        some = missing[start : start + FILL_AT_ONCE]
        cache.put_many(some, encoder.encode(some))
    return len(missing)


def encode_cached(load: Callable[[], Encoder], cache: TextCache, captions: Sequence[str]) -> np.ndarray:
    """Text rows, float32 [n, S, E], through the cache; as `TextEncoder.encode`, but for the dtype they are kept in.

    Args:
      load: gives the encoder; called at most once, and not at all when every caption is there.
      captions: at least one.

    Raises:
      UserError: see `fill`.
    """
    fill(load, cache, captions)
    return read_rows(cache, captions)


def read_rows(cache: TextCache, captions: Sequence[str]) -> np.ndarray:
    """Text rows, float32 [n, S, E], of captions that the cache was filled with.

    Raises:
      UserError: one of them is not there any more.
    """
    rows = cache.get_many(captions)
    if any(row is None for row in rows):
        raise UserError(f"{cache.folder}: text cache entries vanish or break while they are read; is the disk full?")
    return np.stack([row for row in rows if row is not None])
