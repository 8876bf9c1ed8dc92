"""Datasets of self-contained records: the binary format of a record, the manifest of a set, and reading it.

A record is `cfj1`, the length of its header (uint32, little-endian), a JSON header {"name", "item", "caption",
"arrays": [[name, dtype, shape], ...]} and the arrays' bytes in that order. It holds `text`, only a caption's real rows,
and, if the set keeps them, `latents` [F, H, W, C], `trajectory` [J, F, H, W, C], `picture` [F, H, W, C] and `actions`
[F, A]. No other file is needed to read it.

A set is a folder: manifest.json, part-*.array_record (uncompressed, one record per Riegeli chunk, so that reading at
random is one read and every chunk is checked by its hash), negative_text.npy, report.json (what was left out and why).
`cfjax.data.parts` writes it. Latents may also stay in the LMDB they came from, or be absent (prompts for stage 3).
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.inside import inside
from cfjax.core.limits import FRAMES, LATENT_NUMBERS, RANK, RECORDS, SIDE, STATES, TEXT_NUMBERS, TEXT_ROWS
from cfjax.core.machine import machine_failure
from cfjax.core.schema import SIZE, checked, flag, one_of, parse_json, row, several, table, text, whole
from cfjax.data.archives import open_array
from cfjax.data.latents import Batch, read_json
from cfjax.data.lmdb_paths import open_lmdb_of
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.readers import BrokenRecord, RecordFiles, reading_failure

RECORDS_VERSION = 2
MANIFEST, NEGATIVE_TEXT, REPORT = "manifest.json", "negative_text.npy", "report.json"
KEPT_IN = ("records", "lmdb", "none")
_MAGIC = b"cfj1"
ACTION_KEYS = 256  # most of a record's
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


_DTYPE = one_of(*_DTYPES)
LAYOUT_RULE = table(
    {
        "latent_shape": row(whole(1, FRAMES), whole(1, SIDE), whole(1, SIDE), SIZE),
        "text_rows": whole(1, TEXT_ROWS),
        "text_width": SIZE,
    },
    {
        "kept_in": one_of(*KEPT_IN),
        "trajectory_points": whole(0, STATES),
        "action_keys": whole(0, ACTION_KEYS),
        "dtype": _DTYPE,
        "text_dtype": _DTYPE,
        "pictures": flag,
    },
    closed=True,
)
_NUMBERS = {"records": whole(1, RECORDS), "bytes": whole()}
MANIFEST_RULE = table(
    {
        "version": one_of(RECORDS_VERSION),
        "records": whole(1, RECORDS),
        "items": whole(1, RECORDS),
        "layout": LAYOUT_RULE,
        "parts": several(table({"file": text(255), **_NUMBERS}), 1),
    },
    {
        "lmdb": table(
            {"path": text(4096), "ground_truth": flag}, {"relative": text(4096), "fingerprint": text(64)}, closed=True
        ),
        "text_encoder": table({}, {"world": text(64)}),
        "world_path": text(4096),
        "source": table({}, {"ground_truth": flag, "pairs": table({})}),
        "codec": table({}),
    },
)


@dataclass(frozen=True)
class Layout:
    """What every record of a set holds.

    Attributes:
      latent_shape: (F, H, W, C) of a clip, also where no latents are kept.
      text_rows, text_width: S and E that a caption's rows are padded to when read.
      kept_in: where latents are: in the "records", in the "lmdb" of the manifest, or nowhere ("none").
      trajectory_points: J of an ODE set, else 0.
      action_keys: A of steered clips, whose records say which keys are held in each latent frame; else 0.
      pictures: whether a record also has the latents of its first pixel frame and grey frames after it, which
        image-to-video networks take.
    """

    latent_shape: tuple[int, int, int, int]
    text_rows: int
    text_width: int
    kept_in: str = "records"
    trajectory_points: int = 0
    dtype: str = "float16"
    text_dtype: str = "bfloat16"
    action_keys: int = 0
    pictures: bool = False

    def __post_init__(self) -> None:
        for name in (self.dtype, self.text_dtype):
            storage_dtype(name)
        if self.kept_in not in KEPT_IN or len(self.latent_shape) != 4:
            raise ValueError(f"not a layout: {self}")
        if self.kept_in != "records" and self.action_keys:
            raise ValueError(f"actions without latents in the records: {self}")
        if self.kept_in == "none" and self.trajectory_points:
            raise ValueError(f"trajectories without latents: {self}")
        if math.prod(self.latent_shape) > LATENT_NUMBERS or self.text_rows * self.text_width > TEXT_NUMBERS:
            raise ValueError(f"too many numbers for one record: {self}")

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the latents, trajectory, actions and picture that a record holds."""
        if self.kept_in != "records":
            return {}
        trajectory = {"trajectory": (self.trajectory_points, *self.latent_shape)} if self.trajectory_points else {}
        actions = {"actions": (self.latent_shape[0], self.action_keys)} if self.action_keys else {}
        picture = {"picture": self.latent_shape} if self.pictures else {}
        return {"latents": self.latent_shape, **trajectory, **actions, **picture}

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields; sets without actions or pictures are described as before there were any."""
        values = {**asdict(self), "latent_shape": list(self.latent_shape)}
        return {key: value for key, value in values.items() if value or key not in ("action_keys", "pictures")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Layout":
        """Inverse of `to_json`. Raises ValueError for anything else."""
        checked(LAYOUT_RULE, values, "layout")
        return cls(**{**values, "latent_shape": tuple(values["latent_shape"])})


RECORD_RULE = table(
    {
        "name": text(),
        "item": whole(0, RECORDS),
        "caption": text(),
        "arrays": several(row(text(64), _DTYPE, several(whole(), 0, RANK)), 0, 8),
    }
)


@dataclass(frozen=True)
class Record:
    """One record in memory: `item` is its index in the source, `name` its name there."""

    name: str
    item: int
    caption: str
    arrays: Mapping[str, np.ndarray]


def trim_text(text_SE: np.ndarray) -> np.ndarray:
    """A caption's real rows [rows, E]: beyond them the encoder writes exact zeros (`models.umt5.zero_padding`)."""
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
        header = parse_json(data[8:start])
        if wrong := RECORD_RULE("", header):
            raise ValueError(wrong)
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
    """Why a record does not fit a set of this layout, "" if it does: shapes, dtypes, numbers that are not finite."""
    if wrong := misshapen(record, layout):
        return wrong
    for name, array in record.arrays.items():
        if not np.isfinite(array).all():
            return f"not finite: {name}"
    return ""


def misshapen(record: Record, layout: Layout) -> str:
    """The first of a record's arrays without the shape and dtype of its set, "" if there is none."""
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
    return ""


class RecordDataset:
    """Random access to a set of records; the same interface as `LatentDataset`.

    `dataset[i]` is {"latents_FHWC", "text_SE": float32, "index": int32} and, for ODE sets, "trajectory_JFHWC", for sets
    with pictures "picture_FHWC". Where a set keeps no latents, `latents_FHWC` is NaN everywhere: stage 3 uses only its
    shape, nothing else can train on it.

    Opening reads the manifest and asks for the parts' sizes; no part is opened before a record of it is read, and few
    are open at a time. It may be pickled, and read from after a fork.

    Args:
      lmdb: path of the LMDB that holds the latents; "": the manifest's path, or beside the set.

    Raises:
      UserError: the manifest is missing, broken or of another version, a part is missing or of another size, or the
        LMDB is not found.
    """

    def __init__(self, path: str | Path, *, lmdb: str | Path = "") -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST)
        self.layout = manifest_layout(self.path, self.manifest)
        self.files = RecordFiles(manifest_parts(self.path, self.manifest))
        if len(self.files) != self.manifest["records"]:
            raise UserError(
                f"{self.path}: its parts hold {counted(len(self.files), 'record')}, not {self.manifest['records']}"
            )
        self._lmdb: LmdbRows | None = None
        if self.layout.kept_in == "lmdb":
            about = manifest_lmdb(self.path, self.manifest)
            self._lmdb = open_lmdb_of(self.path, about, self.latent_shape, self._lmdb_misfit, given=lmdb)
        elif lmdb:
            raise UserError(f"lmdb={str(lmdb)!r}: {self.path} keeps its latents in no LMDB; leave the key empty")
        negative = read_negative(self.path)
        if not 0 < len(negative) <= self.layout.text_rows or negative.shape[1] != self.layout.text_width:
            raise UserError(
                f"{self.path / NEGATIVE_TEXT}: {negative.shape} are no text rows of this set; precompute it again"
            )
        self.negative_text_SE = pad_text(negative, self.layout.text_rows)

    def _lmdb_misfit(self, rows: LmdbRows) -> str:
        """Why these are not the rows that the set was made of, "" if they are."""
        if wrong := lmdb_misfit(rows, self.layout, self.manifest):
            return wrong
        if "fingerprint" in self.manifest["lmdb"]:
            return ""
        for index in sorted({int(i) for i in np.linspace(0, len(self) - 1, 8)}):  # an older set: by its prompts
            record = self.record(index)
            try:
                same = rows.caption(record.item) == record.caption
            except BrokenRecord:
                same = False
            if not same:
                return f"an LMDB of other prompts: row {record.item} is not {record.caption[:60]!r}"
        return ""

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"RecordDataset({self.path}, {len(self)} records)"

    def record(self, index: int) -> Record:
        """Record `index` as it is stored.

        Raises:
          IndexError: there is none.
          BrokenRecord: it is damaged; the line names the file.
          UserError: it cannot be read because of the machine.
        """
        try:
            record = unpack(self.files.read(int(index)))
            if wrong := misshapen(record, self.layout):
                raise ValueError(wrong)
            return record
        except (ValueError, RuntimeError, MemoryError) as error:
            file, place = self.files.locate(int(index))
            fix = f"; see cfjax precompute --check={self.path}"
            raise reading_failure(f"{file}, record {place}", error, fix) from None

    def whole(self, index: int) -> Record:
        """Record `index` with its latents, wherever they are kept. Raises what `record` does."""
        record = self.record(index)
        return (
            record
            if self._lmdb is None
            else replace(record, arrays={**record.arrays, **self._lmdb.arrays(record.item)})
        )

    def __getitem__(self, index: int) -> Batch:
        record = self.whole(index)
        arrays = record.arrays
        if self.layout.kept_in == "none":
            arrays = {"latents": np.broadcast_to(np.float32(np.nan), self.latent_shape)}
        out = {
            "latents_FHWC": np.asarray(arrays["latents"], np.float32),
            "text_SE": pad_text(record.arrays["text"], self.layout.text_rows),
            "index": np.asarray(index, np.int32),
        }
        if self.trajectory_points:
            out["trajectory_JFHWC"] = np.asarray(arrays["trajectory"], np.float32)
        if self.layout.action_keys:
            out["actions_FA"] = np.asarray(arrays["actions"], np.float32)
        if self.layout.pictures:
            out["picture_FHWC"] = np.asarray(arrays["picture"], np.float32)
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
        checked(MANIFEST_RULE, manifest, "what it says")
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
        file = inside(path, part["file"], path / MANIFEST)
        if fault := part_fault(file, part):
            raise UserError(f"{file}: {fault}; remove {path / MANIFEST} and run the same cfjax precompute again")
        out.append((file, part["records"]))
    return out


def part_fault(file: Path, about: Mapping[str, Any]) -> str:
    """How a part's file differs from its record, "" if it does not."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        raise machine_failure(file, error) or error from None
    return "" if size == about["bytes"] else f"{size} bytes instead of {about['bytes']}"


def read_negative(path: Path) -> np.ndarray:
    """The real rows of a set's negative prompt, float32 [rows, E].

    Raises:
      BrokenRecord: they are missing or damaged.
      UserError: they cannot be read because of the machine.
    """
    file = path / NEGATIVE_TEXT
    try:
        rows = open_array(file)  # a header that says more than the file has is an error then
        if rows.ndim != 2 or rows.dtype.kind != "f":
            raise ValueError(f"{rows.dtype} {rows.shape} are no text rows")
        return np.array(rows)
    except FileNotFoundError:
        raise BrokenRecord(f"{file}: missing; precompute it again") from None
    except (OSError, ValueError) as error:
        broken = BrokenRecord(f"{file}: cannot be read ({error}); precompute it again")
        raise machine_failure(file, error) or broken from None


def manifest_lmdb(path: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest's description of the LMDB with the latents. Raises UserError when there is none."""
    about = manifest.get("lmdb", {})
    if not isinstance(about, Mapping) or not {"path", "ground_truth"} <= about.keys():
        raise UserError(f"{path / MANIFEST}: does not say which LMDB holds its latents; precompute it again")
    return about


def lmdb_misfit(rows: LmdbRows, layout: Layout, manifest: Mapping[str, Any]) -> str:
    """Why an LMDB is not the one that holds a set's latents, "" if no difference is known."""
    found = (len(rows), rows.latent_shape, rows.trajectory_points)
    wanted = (manifest["items"], layout.latent_shape, layout.trajectory_points)
    if found != wanted:
        words = "{} rows of latents {} with {} states"
        return f"{words.format(*found)}, not {words.format(*wanted)}"
    known = manifest["lmdb"].get("fingerprint", "")
    return "an LMDB of other rows" if known and rows.fingerprint() != known else ""
