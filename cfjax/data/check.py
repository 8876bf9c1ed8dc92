"""Checking every record of a dataset, of any kind, and reporting where each bad one is and what is wrong with it."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from cfjax.core.errors import Temporary, UserError
from cfjax.core.inside import inside
from cfjax.core.machine import machine_failure
from cfjax.core.progress import Progress, followed
from cfjax.data.archives import open_array
from cfjax.data.latents import read_json
from cfjax.data.lmdb_files import is_lmdb
from cfjax.data.lmdb_paths import open_lmdb_of
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.parts import JOB
from cfjax.data.precompute import MANIFEST_VERSION
from cfjax.data.readers import READER_OPTIONS, BrokenRecord
from cfjax.data.records import (
    MANIFEST,
    NEGATIVE_TEXT,
    RECORDS_VERSION,
    Layout,
    Record,
    lmdb_misfit,
    manifest_layout,
    manifest_lmdb,
    misfit,
    part_fault,
    read_negative,
    unpack,
)


@dataclass(frozen=True)
class Fault:
    """A bad record: its file, its place in that file (None: the file itself) and what is wrong with it."""

    file: Path
    index: int | None
    what: str

    def __str__(self) -> str:
        place = "" if self.index is None else f", record {self.index}"
        return f"{self.file}{place}: {self.what}"


def check_dataset(
    path: str | Path,
    *,
    ground_truth: bool = True,
    fallback_shape: tuple[int, int, int, int] | None = None,
    lmdb: str | Path = "",
    progress: bool = True,
) -> Iterator[Fault]:
    """Every fault of the dataset at `path`, in order; reads each record whole and goes on after a bad one.

    Args:
      ground_truth, fallback_shape: of an LMDB, see `LmdbRows`.
      lmdb: where the LMDB with a set's latents was moved to; "": the recorded path, or beside the set.

    Raises:
      UserError: there is no dataset at all, or the machine (its open files, memory, disk) does not let it be read.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        try:
            manifest = read_json(path / MANIFEST)
            version = manifest["version"]
        except (UserError, KeyError, TypeError) as error:
            yield Fault(path / MANIFEST, None, f"cannot be read ({error})")
            return
        if version == RECORDS_VERSION:
            yield from _check_records(path, manifest, lmdb, progress)
        elif version == MANIFEST_VERSION:
            yield from _check_arrays(path, manifest, progress)
        else:
            yield Fault(path / MANIFEST, None, f"version {version} is not known")
    elif (path / JOB).is_file():
        yield Fault(path, None, "unfinished: no manifest yet")
    elif is_lmdb(path):
        yield from _check_lmdb(path, ground_truth, fallback_shape, progress)
    else:
        raise UserError(f"{path}: no dataset there (no {MANIFEST}, no LMDB)")


def _bar(items: Sequence[Any], what: Path, progress: bool) -> Iterator[Any]:
    return followed(items, len(items), "record", f"check {what.name}", shown=progress)


def _constant(name: str, array: np.ndarray) -> str:
    return f"constant: {name} is {float(array.flat[0]):g} everywhere" if (array == array.flat[0]).all() else ""


# ---- records


class _Set:
    """What the records of a set are checked against, and which of them holds each item: 8 MB for a million.

    Args:
      rows: the LMDB with their latents, if they are in one.
    """

    def __init__(self, layout: Layout, parts: list[dict[str, Any]], items: int, rows: LmdbRows | None) -> None:
        self.layout, self.rows = layout, rows
        self.holder = np.zeros(items, np.int64)  # 1 + the record, counted through all parts; 0 for none
        self.before = 0  # records of the parts that were checked already
        self._parts = [(part["file"], part["records"]) for part in parts]
        self._ends = list(accumulate(records for _, records in self._parts))

    def fault(self, record: Record, index: int) -> str:
        """What is wrong with record `index` of this part, "" if nothing."""
        if not 0 <= record.item < len(self.holder):
            return f"its item {record.item} is none of the source's {len(self.holder)}"
        if found := int(self.holder[record.item]):
            return f"item {record.item} ({record.name}) is in {self._place(found - 1)} already"
        self.holder[record.item] = 1 + self.before + index
        if fault := misfit(record, self.layout):
            return fault
        if self.rows is not None and not _same_prompt(self.rows, record):
            return f"its caption {record.caption[:60]!r} is not the prompt of row {record.item} of {self.rows.path}"
        return next(filter(None, (_constant(name, record.arrays[name]) for name in self.layout.arrays())), "")

    def _place(self, index: int) -> str:
        number = bisect_right(self._ends, index)
        file, records = self._parts[number]
        return f"{file}, record {index - self._ends[number] + records}"


def _same_prompt(rows: LmdbRows, record: Record) -> bool:
    try:
        return rows.caption(record.item) == record.caption
    except BrokenRecord:  # reported for the LMDB
        return True


def _check_records(path: Path, manifest: dict[str, Any], lmdb: str | Path, progress: bool) -> Iterator[Fault]:
    try:
        layout, parts = manifest_layout(path, manifest), manifest["parts"]
        records, items = manifest["records"], manifest["items"]
    except (UserError, KeyError) as error:
        yield Fault(path / MANIFEST, None, str(error))
        return
    if sum(part["records"] for part in parts) != records:
        yield Fault(path / MANIFEST, None, f"its parts have {sum(p['records'] for p in parts)} records, not {records}")
    yield from _check_negative(path, layout)
    rows = None
    if layout.kept_in == "lmdb":
        try:
            about, misfits = manifest_lmdb(path, manifest), partial(lmdb_misfit, layout=layout, manifest=manifest)
            rows = open_lmdb_of(path, about, layout.latent_shape, misfits, given=lmdb)
        except Temporary:
            raise
        except UserError as error:
            yield Fault(path / MANIFEST, None, str(error).removeprefix(f"{path / MANIFEST}: "))
    known = _Set(layout, parts, items, rows)
    with Progress(records, "record", f"check {path.name}", shown=progress) as bar:
        for about in parts:
            try:
                file = inside(path, about["file"], path / MANIFEST)
            except UserError as error:
                yield Fault(path / MANIFEST, None, str(error).removeprefix(f"{path / MANIFEST}: "))
                continue
            yield from _check_part(file, about, known, bar)
            known.before += about["records"]
    if rows is not None:
        yield from _check_rows(rows, progress, known.holder > 0)


def _check_negative(path: Path, layout: Layout) -> Iterator[Fault]:
    try:
        rows = read_negative(path)
    except BrokenRecord as error:
        yield Fault(path / NEGATIVE_TEXT, None, str(error).partition(": ")[2])
        return
    if rows.ndim != 2 or not 0 < len(rows) <= layout.text_rows or rows.shape[1] != layout.text_width:
        yield Fault(path / NEGATIVE_TEXT, None, f"wrong shape: {rows.shape}")
    elif not np.isfinite(rows).all():
        yield Fault(path / NEGATIVE_TEXT, None, "not finite")


def _check_part(file: Path, about: dict[str, Any], known: _Set, bar: Any) -> Iterator[Fault]:
    if fault := part_fault(file, about):
        yield Fault(file, None, fault)
        if fault == "missing":
            return
    reader = ArrayRecordReader(str(file), READER_OPTIONS)
    try:
        if reader.num_records() != about["records"]:
            _stop_for_the_machine(file, reader)
            yield Fault(file, None, f"{reader.num_records()} records can be found instead of {about['records']}")
        for index in range(reader.num_records()):
            what = _record_fault(reader, index, known, file)
            if what:
                yield Fault(file, index, what)
            bar.update()
    finally:
        with suppress(RuntimeError):  # a damaged file complains once more when it is closed
            reader.close()


def _stop_for_the_machine(file: Path, reader: Any) -> None:
    """Raises the machine's error when the file could not be opened; returns when the file is damaged."""
    try:
        reader.read([0])
    except RuntimeError as error:
        if failure := machine_failure(file, error):
            raise failure from None


def _record_fault(reader: Any, index: int, known: _Set, file: Path) -> str:
    try:
        record = unpack(reader.read([index])[0])
    except (ValueError, RuntimeError, IndexError, MemoryError) as error:
        if failure := machine_failure(f"{file}, record {index}", error):
            raise failure from None
        return f"cannot be read: {' '.join(str(error).split())}"
    return known.fault(record, index)


# ---- the toy's arrays


def _check_arrays(path: Path, manifest: dict[str, Any], progress: bool) -> Iterator[Fault]:
    arrays: dict[str, np.ndarray] = {}
    for name, spec in manifest.get("arrays", {}).items():
        file = path / f"{name}.npy"
        try:
            array = open_array(file)
        except (OSError, ValueError) as error:
            failure = machine_failure(file, error)
            if failure and not isinstance(error, FileNotFoundError):
                raise failure from None
            yield Fault(file, None, f"cannot be read ({error})")
            continue
        if list(array.shape) != spec["shape"] or str(array.dtype) != spec["dtype"]:
            yield Fault(file, None, f"holds {array.dtype} {list(array.shape)}, the manifest says {spec}")
        else:
            arrays[name] = array
    for name in {"latents", "caption_id", "text", "negative_text"} - manifest.get("arrays", {}).keys():
        yield Fault(path / MANIFEST, None, f"does not list {name}")
    captions: Any = None
    try:
        captions = read_json(path / "captions.json")
    except UserError as error:
        yield Fault(path / "captions.json", None, str(error))
    for name, array in arrays.items():
        for index in _bar(range(len(array)), path / name, progress):
            what = _array_fault(name, array[index], captions)
            if what:
                yield Fault(path / f"{name}.npy", index, what)


def _array_fault(name: str, row: np.ndarray, captions: Any) -> str:
    if name == "caption_id":
        known = len(captions) if isinstance(captions, list) else None
        inside = row >= 0 and (known is None or row < known)
        return "" if inside else f"caption {int(row)} is none of the {known}"
    if not np.isfinite(row).all():
        return "not finite"
    return _constant(name, row) if name in ("latents", "trajectory") else ""


# ---- LMDBs


def _check_lmdb(
    path: Path,
    ground_truth: bool,
    fallback_shape: tuple[int, int, int, int] | None,
    progress: bool,
) -> Iterator[Fault]:
    """Rows of an LMDB."""
    try:
        rows = LmdbRows(path, ground_truth=ground_truth, fallback_shape=fallback_shape)
    except Temporary:
        raise
    except UserError as error:
        yield Fault(path, None, str(error))
        return
    yield from _check_rows(rows, progress)


def _check_rows(rows: LmdbRows, progress: bool, only: np.ndarray | None = None) -> Iterator[Fault]:
    """Rows of an LMDB: those that `only` marks, or all."""
    for index in _bar(range(len(rows)), rows.path, progress):
        if only is not None and not only[index]:
            continue
        file, row = rows.locate(index)
        for read in (_caption_fault, _latents_fault):
            if what := read(rows, index):
                yield Fault(file, row, what)


def _caption_fault(rows: LmdbRows, index: int) -> str:
    try:
        rows.caption(index)
    except BrokenRecord as error:
        return str(error).partition(": ")[2]
    return ""


def _latents_fault(rows: LmdbRows, index: int) -> str:
    try:
        arrays = rows.arrays(index)
    except BrokenRecord as error:
        return str(error).partition(": ")[2]
    if not all(np.isfinite(array).all() for array in arrays.values()):
        return "not finite"
    return next(filter(None, (_constant(name, array) for name, array in arrays.items())), "")
