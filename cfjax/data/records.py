"""Datasets of self-contained records: what one record is in bytes, what a set's manifest says, and reading it.

A record is `cfj1`, the length of its header (uint32, little-endian), a JSON header {"name", "item", "caption",
"arrays": [[name, dtype, shape], ...]} and the arrays' bytes in that order. It holds `text`, only a caption's real rows,
and, if the set keeps them, `latents` [F, H, W, C] and `trajectory` [J, F, H, W, C]. No other file is needed to read it.

A set is a folder: manifest.json, part-*.array_record (uncompressed, one record per Riegeli chunk, so that reading at
random is one read and every chunk is checked by its hash), negative_text.npy, report.json (what was left out and why).
`cfjax.data.parts` writes it. Latents may also stay in the LMDB they came from, or be absent (prompts for stage 3).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.latents import Batch, read_json
from cfjax.data.lmdb_rows import LmdbRows

RECORDS_VERSION = 2
MANIFEST, NEGATIVE_TEXT, REPORT = "manifest.json", "negative_text.npy", "report.json"
KEPT_IN = ("records", "lmdb", "none")
_MAGIC = b"cfj1"
_DTYPES = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def storage_dtype(name: str) -> np.dtype:
    """The numpy dtype of a stored array. Raises UserError for an unknown one."""
    if name not in _DTYPES:
        raise UserError(f"dtype={name!r}: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


@dataclass(frozen=True)
class Layout:
    """What every record of a set holds.

    Attributes:
      latent_shape: (F, H, W, C) of a clip, also where no latents are kept.
      text_rows, text_width: S and E that a caption's rows are padded to when read.
      kept_in: where latents are: in the "records", in the "lmdb" of the manifest, or nowhere ("none").
      trajectory_points: J of an ODE set, else 0.
    """

    latent_shape: tuple[int, int, int, int]
    text_rows: int
    text_width: int
    kept_in: str = "records"
    trajectory_points: int = 0
    dtype: str = "float16"
    text_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in (self.dtype, self.text_dtype):
            storage_dtype(name)
        if self.kept_in not in KEPT_IN or len(self.latent_shape) != 4:
            raise ValueError(f"not a layout: {self}")

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the latents and trajectory that a record holds."""
        if self.kept_in != "records":
            return {}
        trajectory = {"trajectory": (self.trajectory_points, *self.latent_shape)} if self.trajectory_points else {}
        return {"latents": self.latent_shape, **trajectory}

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {**asdict(self), "latent_shape": list(self.latent_shape)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Layout":
        """Inverse of `to_json`. Raises TypeError, KeyError or ValueError for anything else."""
        return cls(**{**values, "latent_shape": tuple(map(int, values["latent_shape"]))})


@dataclass(frozen=True)
class Record:
    """One record in memory: `item` is its place in the source, `name` what the source calls it."""

    name: str
    item: int
    caption: str
    arrays: Mapping[str, np.ndarray]


def trim_text(text_SE: np.ndarray) -> np.ndarray:
    """A caption's real rows: the encoder writes exact zeros beyond them (PyTorch reference)."""
    used = np.flatnonzero(np.asarray(text_SE).any(axis=-1))
    return text_SE[: used[-1] + 1 if len(used) else 0]


def pad_text(rows: np.ndarray, length: int) -> np.ndarray:
    """float32 [length, E]: the rows, then zeros."""
    out = np.zeros((length, rows.shape[-1]), np.float32)
    out[: len(rows)] = rows
    return out


def pack(record: Record) -> bytes:
    """The bytes of a record."""
    arrays = {name: np.ascontiguousarray(array) for name, array in record.arrays.items()}
    specs = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    about = {"name": record.name, "item": record.item, "caption": record.caption, "arrays": specs}
    header = json.dumps(about, ensure_ascii=False).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(header)), header, *(a.tobytes() for a in arrays.values())])


def unpack(data: bytes) -> Record:
    """Inverse of `pack`. Raises ValueError, saying what is wrong, for anything else."""
    if data[:4] != _MAGIC or len(data) < 8:
        raise ValueError("not a record of this format")
    start = 8 + struct.unpack("<I", data[4:8])[0]
    try:
        header = json.loads(data[8:start].decode())
        name, item, caption, specs = (header[key] for key in ("name", "item", "caption", "arrays"))
        arrays = {}
        for key, dtype, shape in specs:
            count = int(np.prod(shape, dtype=np.int64))
            arrays[key] = np.frombuffer(data, _DTYPES[dtype], count, start).reshape(shape)
            start += arrays[key].nbytes
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"broken record ({' '.join(str(error).split())})") from None
    if start != len(data):
        raise ValueError(f"broken record ({len(data) - start} bytes too many)")
    return Record(name, item, caption, arrays)


def misfit(record: Record, layout: Layout) -> str:
    """What keeps a record out of a set of this layout, "" if nothing: shapes, dtypes, numbers that are not finite."""
    wanted = layout.arrays()
    if record.arrays.keys() != {*wanted, "text"}:
        return f"wrong contents: {sorted(record.arrays)}, expected {sorted([*wanted, 'text'])}"
    for name, shape in wanted.items():
        array = record.arrays[name]
        if array.shape != shape or array.dtype.name != layout.dtype:
            return f"wrong shape: {name} {array.dtype} {array.shape}, expected {layout.dtype} {shape}"
    text = record.arrays["text"]
    if text.ndim != 2 or text.shape[1] != layout.text_width or text.dtype.name != layout.text_dtype:
        return f"wrong shape: text {text.dtype} {text.shape}, expected {layout.text_dtype} [rows, {layout.text_width}]"
    if not 0 < len(text) <= layout.text_rows:
        return f"wrong shape: {len(text)} text rows, expected 1 to {layout.text_rows}"
    for name, array in record.arrays.items():
        if not np.isfinite(array).all():
            return f"not finite: {name}"
    return ""


class RecordDataset:
    """Random access to a set of records; the same interface as `LatentDataset`.

    `dataset[i]` is {"latents_FHWC", "text_SE": float32, "index": int32} and, for ODE sets, "trajectory_JFHWC". Where a
    set keeps no latents, `latents_FHWC` is NaN everywhere: stage 3 uses only its shape, nothing else can train on it.

    Raises:
      UserError: the manifest is missing, broken or of another version, or a part is missing or of another size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST)
        self.layout = manifest_layout(self.path, self.manifest)
        self._parts = manifest_parts(self.path, self.manifest)
        self._source = grain.sources.ArrayRecordDataSource([str(file) for file, _ in self._parts])
        if len(self._source) != self.manifest["records"]:
            raise UserError(f"{self.path}: its parts hold {len(self._source)} records, not {self.manifest['records']}")
        self._lmdb: LmdbRows | None = None
        if self.layout.kept_in == "lmdb":
            about = self.manifest["lmdb"]
            self._lmdb = LmdbRows(about["path"], ground_truth=about["ground_truth"], fallback_shape=self.latent_shape)
            found = (self._lmdb.latent_shape, self._lmdb.trajectory_points, len(self._lmdb))
            if found != (self.latent_shape, self.trajectory_points, self.manifest["items"]):
                raise UserError(f"{about['path']} is not what it was when {self.path} was made; precompute it again")
        try:
            negative = np.load(self.path / NEGATIVE_TEXT, allow_pickle=False)
            self.negative_text_SE = pad_text(negative, self.layout.text_rows)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.path / NEGATIVE_TEXT}: cannot read it ({error}); precompute it again") from None

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"RecordDataset({self.path}, {len(self)} records)"

    def record(self, index: int) -> Record:
        """Record `index` as it is stored. Raises UserError, naming the file, if it cannot be read."""
        try:
            return unpack(self._source[int(index)])
        except (ValueError, RuntimeError) as error:
            file, place = locate(self._parts, int(index))
            reason = " ".join(str(error).split())
            raise UserError(f"{file}, record {place}: {reason}; see cfjax precompute --check={self.path}") from None

    def __getitem__(self, index: int) -> Batch:
        record = self.record(index)
        arrays = record.arrays
        if self._lmdb is not None:
            arrays = self._lmdb.arrays(record.item)
        if self.layout.kept_in == "none":
            arrays = {"latents": np.broadcast_to(np.float32(np.nan), self.latent_shape)}
        out = {
            "latents_FHWC": np.asarray(arrays["latents"], np.float32),
            "text_SE": pad_text(record.arrays["text"], self.layout.text_rows),
            "index": np.asarray(index, np.int32),
        }
        if self.trajectory_points:
            out["trajectory_JFHWC"] = np.asarray(arrays["trajectory"], np.float32)
        return out

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of a record."""
        return self.layout.latent_shape

    @property
    def has_latents(self) -> bool:
        """Whether there are clips, not only prompts."""
        return self.layout.kept_in != "none"

    @property
    def trajectory_points(self) -> int:
        """J, the stored states per record; 0 when this is no ODE set."""
        return self.layout.trajectory_points

    @property
    def text_shape(self) -> tuple[int, int]:
        """(S, E) of a caption's rows."""
        return self.layout.text_rows, self.layout.text_width

    def caption(self, index: int) -> str:
        """The caption of record `index`."""
        return self.record(index).caption


def manifest_layout(path: Path, manifest: Any) -> Layout:
    """The layout that a manifest describes. Raises UserError when it is none of this version."""
    try:
        if manifest["version"] != RECORDS_VERSION:
            raise ValueError(f"version {manifest['version']}")
        return Layout.from_json(manifest["layout"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / MANIFEST}: not a version {RECORDS_VERSION} record set ({error}); precompute it again"
        ) from None


def manifest_parts(path: Path, manifest: Mapping[str, Any]) -> list[tuple[Path, int]]:
    """(file, records) of every part that holds any.

    Raises:
      UserError: a file is missing or not of its size.
    """
    out = []
    for part in manifest["parts"]:
        file = path / part["file"]
        if fault := part_fault(file, part):
            raise UserError(f"{file}: {fault}; remove {path / MANIFEST} and run the same cfjax precompute again")
        out.append((file, part["records"]))
    return out


def part_fault(file: Path, about: Mapping[str, Any]) -> str:
    """Why a part's file is not the one its record describes, "" if it is."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return "missing"
    return "" if size == about["bytes"] else f"{size} bytes instead of {about['bytes']}"


def locate(parts: list[tuple[Path, int]], index: int) -> tuple[Path, int]:
    """The file of record `index` of a set, and its place therein."""
    for file, records in parts:
        if index < records:
            return file, index
        index -= records
    raise IndexError(index)
