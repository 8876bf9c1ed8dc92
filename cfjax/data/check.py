"""Looking at every record of a dataset, of any kind, and saying of each bad one where it is and what is wrong."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from cfjax.core.errors import UserError
from cfjax.data.latents import read_json
from cfjax.data.lmdb_rows import LmdbRows, is_lmdb
from cfjax.data.parts import JOB
from cfjax.data.precompute import MANIFEST_VERSION
from cfjax.data.records import (
    MANIFEST,
    NEGATIVE_TEXT,
    RECORDS_VERSION,
    Layout,
    manifest_layout,
    misfit,
    part_fault,
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
    progress: bool = True,
) -> Iterator[Fault]:
    """Every fault of the dataset at `path`, in order; reads each record whole and goes on after a bad one.

    Args:
      ground_truth, fallback_shape: of an LMDB, see `LmdbRows`.

    Raises:
      UserError: there is no dataset at all.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        try:
            manifest = read_json(path / MANIFEST)
            version = manifest["version"]
        except (UserError, KeyError, TypeError) as error:
            yield Fault(path / MANIFEST, None, f"cannot be read ({error})")
            return
        kinds = {RECORDS_VERSION: _check_records, MANIFEST_VERSION: _check_arrays}
        if version not in kinds:
            yield Fault(path / MANIFEST, None, f"version {version} is not known")
            return
        yield from kinds[version](path, manifest, progress)
    elif (path / JOB).is_file():
        yield Fault(path, None, "unfinished: no manifest yet")
    elif is_lmdb(path):
        yield from _check_lmdb(path, ground_truth, fallback_shape, progress)
    else:
        raise UserError(f"{path}: no dataset there (no {MANIFEST}, no LMDB)")


def _bar(items: Iterable[Any], what: Path, progress: bool, total: int | None = None) -> Iterable[Any]:
    return tqdm(items, desc=f"check {what.name}", total=total, unit="record", disable=not progress, dynamic_ncols=True)


def _constant(name: str, array: np.ndarray) -> str:
    return f"constant: {name} is {float(array.flat[0]):g} everywhere" if (array == array.flat[0]).all() else ""


# ---- records


def _check_records(path: Path, manifest: dict[str, Any], progress: bool) -> Iterator[Fault]:
    try:
        layout, parts = manifest_layout(path, manifest), manifest["parts"]
        records, items = manifest["records"], manifest["items"]
    except (UserError, KeyError) as error:
        yield Fault(path / MANIFEST, None, str(error))
        return
    if sum(part["records"] for part in parts) != records:
        yield Fault(path / MANIFEST, None, f"its parts have {sum(p['records'] for p in parts)} records, not {records}")
    yield from _check_negative(path, layout)
    seen: dict[int, str] = {}
    with tqdm(total=records, desc=f"check {path.name}", unit="record", disable=not progress, dynamic_ncols=True) as bar:
        for about in parts:
            yield from _check_part(path / about["file"], about, layout, range(items), seen, bar)
    if layout.kept_in == "lmdb":
        about = manifest.get("lmdb", {})
        if not {"path", "ground_truth"} <= about.keys():
            yield Fault(path / MANIFEST, None, "does not say which LMDB holds its latents")
            return
        yield from _check_lmdb(Path(about["path"]), about["ground_truth"], layout.latent_shape, progress, set(seen))


def _check_negative(path: Path, layout: Layout) -> Iterator[Fault]:
    try:
        rows = np.load(path / NEGATIVE_TEXT, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        yield Fault(path / NEGATIVE_TEXT, None, f"cannot be read ({error})")
        return
    if rows.ndim != 2 or not 0 < len(rows) <= layout.text_rows or rows.shape[1] != layout.text_width:
        yield Fault(path / NEGATIVE_TEXT, None, f"wrong shape: {rows.shape}")
    elif not np.isfinite(rows).all():
        yield Fault(path / NEGATIVE_TEXT, None, "not finite")


def _check_part(
    file: Path, about: dict[str, Any], layout: Layout, items: range, seen: dict[int, str], bar: Any
) -> Iterator[Fault]:
    if fault := part_fault(file, about):
        yield Fault(file, None, fault)
        if fault == "missing":
            return
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
    try:
        if reader.num_records() != about["records"]:
            yield Fault(file, None, f"{reader.num_records()} records can be found instead of {about['records']}")
        for index in range(reader.num_records()):
            what = _record_fault(reader, index, layout, items, seen, f"{file.name}, record {index}")
            if what:
                yield Fault(file, index, what)
            bar.update()
    finally:
        with suppress(RuntimeError):  # a damaged file complains once more when it is closed
            reader.close()


def _record_fault(reader: Any, index: int, layout: Layout, items: range, seen: dict[int, str], here: str) -> str:
    try:
        record = unpack(reader.read([index])[0])
    except (ValueError, RuntimeError, IndexError) as error:
        return f"cannot be read: {' '.join(str(error).split())}"
    if record.item not in items:
        return f"its item {record.item} is none of the source's {len(items)}"
    if record.item in seen:
        return f"item {record.item} ({record.name}) is in {seen[record.item]} already"
    seen[record.item] = here
    if fault := misfit(record, layout):
        return fault
    return next(filter(None, (_constant(name, record.arrays[name]) for name in layout.arrays())), "")


# ---- the toy's arrays


def _check_arrays(path: Path, manifest: dict[str, Any], progress: bool) -> Iterator[Fault]:
    arrays: dict[str, np.ndarray] = {}
    for name, spec in manifest.get("arrays", {}).items():
        file = path / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
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
    only: set[int] | None = None,
) -> Iterator[Fault]:
    """Rows of an LMDB: `only` those with these numbers, or all."""
    try:
        rows = LmdbRows(path, ground_truth=ground_truth, fallback_shape=fallback_shape)
    except UserError as error:
        yield Fault(path, None, str(error))
        return
    for index in _bar(range(len(rows)), path, progress):
        if only is not None and index not in only:
            continue
        file, row = rows.locate(index)
        for read in (_caption_fault, _latents_fault):
            if what := read(rows, index):
                yield Fault(file, row, what)


def _caption_fault(rows: LmdbRows, index: int) -> str:
    try:
        rows.caption(index)
    except UserError as error:
        return str(error).partition(": ")[2]
    return ""


def _latents_fault(rows: LmdbRows, index: int) -> str:
    try:
        arrays = rows.arrays(index)
    except UserError as error:
        return str(error).partition(": ")[2]
    if not all(np.isfinite(array).all() for array in arrays.values()):
        return "not finite"
    return next(filter(None, (_constant(name, array) for name, array in arrays.items())), "")
