"""Writing a set of records in parts: by any number of processes, each part atomically, and resumable.

A source's items are split into parts of `part_items`, by default so that there are at most 1,024; part p belongs to
process p modulo their number. A part is part-NNNNN.array_record, renamed when complete, and then part-NNNNN.json, which
records how many records it holds and what was skipped: with that file the part is done, and no later run writes it
again, whatever the number of processes. The process that finds all parts done writes the manifest; without one the
folder is not a dataset. job.json holds the settings that decide the records, items.json (of clips) the list of items.
"""

import io
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cfjax.core.checksums import FileSum, crc32, measure, write_sums
from cfjax.core.console import counted
from cfjax.core.errors import Temporary, UserError
from cfjax.core.limits import RECORDS
from cfjax.core.lock import holding
from cfjax.core.paths import read_if_whole, to_disk, write_atomically
from cfjax.core.schema import checked, several, table, text, whole
from cfjax.core.staging import contents
from cfjax.data.latents import read_json
from cfjax.data.listing import ITEMS, Item, changes, hashed, unhashed
from cfjax.data.precompute import digest
from cfjax.data.records import (
    LAYOUT_RULE,
    MANIFEST,
    NEGATIVE_TEXT,
    RECORDS_VERSION,
    REPORT,
    Layout,
    Record,
    misfit,
    pack,
    part_fault,
    storage_dtype,
    trim_text,
)

JOB = "job.json"
_JOB = table({"items": whole(1, RECORDS), "part_items": whole(1, RECORDS), "layout": LAYOUT_RULE})
_SKIPPED = table({"name": text(), "item": whole(0, RECORDS), "reason": text()}, closed=True)
_PART = table(
    {"file": text(255), "records": whole(0, RECORDS), "bytes": whole(), "skipped": several(_SKIPPED)},
    {"job": text(64), "crc32": text(8)},
)
PARTS_AT_MOST = 1024
ITEMS_AT_LEAST = 64


@dataclass(frozen=True)
class Skipped:
    """An item that was skipped; `reason` is "kind: details"."""

    name: str
    item: int
    reason: str


def part_size(items: int, at_least: int = ITEMS_AT_LEAST) -> int:
    """Default number of items per part: at least `at_least`, and so many that there are at most PARTS_AT_MOST parts.

    A killed job may lose one part per process, and every part is a file to open.
    """
    return max(at_least, -(-items // PARTS_AT_MOST))


class Part:
    """A part that is being written: every item is added or skipped.

    Attributes:
      notes: JSON-able values that are stored with the part (`SetWriter.notes`).
    """

    def __init__(self, file: Path, items: range, layout: Layout) -> None:
        self.items, self.layout, self._file = items, layout, file
        self.skipped: list[Skipped] = []
        self.notes: dict[str, Any] = {}
        self.records = 0
        self._seen: set[int] = set()
        self._writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")

    def add(self, name: str, item: int, caption: str, text_SE: np.ndarray, **arrays: np.ndarray) -> Record | None:
        """Stores one record (latents and trajectory in `arrays`) and returns it as stored.

        One that does not fit the set is skipped; None is returned then.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            stored = {key: np.asarray(a).astype(storage_dtype(self.layout.dtype)) for key, a in arrays.items()}
            stored["text"] = trim_text(np.asarray(text_SE)).astype(storage_dtype(self.layout.text_dtype))
        record = Record(name, item, caption, stored)
        if fault := misfit(record, self.layout):
            self.skip(name, item, fault)
            return None
        self._count(item)
        with self._error():
            self._writer.write(pack(record))
        self.records += 1
        return record

    def skip(self, name: str, item: int, reason: str) -> None:
        """Skips an item; the reason is in the report."""
        self._count(item)
        self.skipped.append(Skipped(name, item, reason))

    def _count(self, item: int) -> None:
        if item in self._seen or item not in self.items:
            raise ValueError(f"item {item} is not one of this part's, or came twice")
        self._seen.add(item)

    def close(self) -> None:
        """Ends the file. Raises Temporary when it could not be written whole."""
        if not self._writer.is_open():
            return
        with self._error():
            self._writer.close()
        reader = ArrayRecordReader(str(self._file))  # the writer does not report whether its last bytes were written
        found = reader.num_records()
        with suppress(RuntimeError):  # a damaged file complains when it is closed
            reader.close()
        if found != self.records:
            raise Temporary(f"{self._file}: {found} of {self.records} records arrived; is the disk full?")

    @contextmanager
    def _error(self) -> Iterator[None]:
        """Context manager: an error of the writer is raised as one line."""
        try:
            yield
        except RuntimeError as error:
            raise Temporary(f"{self._file.parent}: cannot write there ({' '.join(str(error).split())})") from None

    def missing(self) -> set[int]:
        """Items that were neither added nor skipped."""
        return set(self.items) - self._seen


class SetWriter:
    """Writes a set to `path`.

    writer = SetWriter(path, items=N, part_items=64, layout=layout, job={...}, description={...})
    writer.write_negative(text_SE)
    for index in writer.todo(shard, shards):
        with writer.part(index) as part:
            for item in part.items: part.add(...) or part.skip(...)
    writer.finish()  # True, and a manifest, once all parts of all processes are there

    Args:
      part_items: items of a part; 0 is `part_size`, or what the folder was begun with.
      at_least: see `part_size`.
      job: JSON-able values that decide what the records are; a folder begun with other values is refused.
      description: JSON-able entries for the manifest.
      listing: (name, caption or other description) of every item, so that a changed listing is reported item by item;
        job["clips"] is its digest.
      same: key of `job` -> whether the value that the folder was begun with equals this job's in another form.

    Raises:
      UserError: nothing to do, or the folder belongs to another job.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        items: int,
        part_items: int,
        layout: Layout,
        job: Mapping[str, Any],
        description: Mapping[str, Any],
        at_least: int = ITEMS_AT_LEAST,
        listing: Sequence[Item] | None = None,
        same: Mapping[str, Callable[[Any], bool]] | None = None,
    ) -> None:
        if items < 1 or part_items < 0:
            raise UserError(f"{path}: {counted(items, 'item')} in parts of part_items={part_items}; there must be some")
        self.path, self.items, self.layout = Path(path), items, layout
        self._description = dict(description)
        wanted = part_items or part_size(items, at_least)
        self._job = json.loads(json.dumps({**job, "items": items, "part_items": wanted, "layout": layout.to_json()}))
        self._began = False  # by this process
        found = self._claim(listing, dict(same or {}), free={"part_items"} if not part_items else set())
        self.part_items, self._made_by = int(found["part_items"]), digest(found)

    def _claim(
        self, listing: Sequence[Item] | None, same: Mapping[str, Callable[[Any], bool]], free: set[str]
    ) -> dict[str, Any]:
        """The record of the job that the folder was begun with, which equals this one but for the keys in `free`."""
        files = contents(self.path) if self.path.exists() else []
        others = any(not _is_partial(file) and file.name != REPORT for file in files)
        if others and not (self.path / JOB).exists():  # checked last: another process may just have begun
            raise UserError(f"output={str(self.path)!r} holds other files; choose another, or an empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if (found := read_if_whole(self.path / JOB)) is None:
            self._check_parts_are_ours()
            write_atomically(self.path / JOB, json.dumps(self._job, indent=1))
            self._began = True
            found = read_json(self.path / JOB)
        try:
            checked(_JOB, found, self.path / JOB)
        except UserError as error:
            raise UserError(f"{error}; remove the folder, or choose another output") from None

        def differs(key: str) -> bool:
            one, other = found.get(key), self._job.get(key)
            return one != other and key not in free and not (key in same and same[key](one))

        other = sorted(filter(differs, {*found, *self._job}))
        listed = read_if_whole(self.path / ITEMS) if listing is not None else None
        if listing is not None and "clips" in other and listed is not None:
            raise UserError(f"{self.path} {changes(unhashed(listed), hashed(listing), self.path)}")
        if other:
            raise UserError(
                f"{self.path} was begun with another {', '.join(other)}; remove it, or choose another output"
            )
        if listing is not None and listed is None:
            write_atomically(self.path / ITEMS, json.dumps(hashed(listing), ensure_ascii=False))
        return found

    def _check_parts_are_ours(self) -> None:
        """If job.json is absent, empty or truncated, the parts say which job they belong to.

        Raises:
          UserError: one is of another job, or of a version that did not note it.
        """
        records = map(_about, self.path.glob("part-*.json"))
        if any(record and record.get("job") != digest(self._job) for record in records):
            raise UserError(
                f"{self.path / JOB}: empty or cut, and there are parts that this command did not begin; put it back, "
                "remove the folder, or choose another output"
            )

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.items // self.part_items)

    def items_of(self, index: int) -> range:
        """The items of a part."""
        return range(index * self.part_items, min((index + 1) * self.part_items, self.items))

    def _names(self, index: int) -> tuple[Path, Path]:
        stem = f"part-{index:05d}"
        return self.path / f"{stem}.array_record", self.path / f"{stem}.json"

    def done(self, index: int) -> bool:
        """Whether a part is there, whole."""
        file, about = self._names(index)
        record = _about(about)
        if record is None or record["file"] != file.name:
            return False
        items = self.items_of(index)
        skipped = {entry["item"] for entry in record["skipped"]}
        counted = skipped <= set(items) and record["records"] + len(record["skipped"]) == len(items)
        return counted and (not record["records"] or not part_fault(file, record))

    def todo(self, shard: int = 0, shards: int = 1) -> list[int]:
        """The parts that this process still has to write.

        Raises:
          UserError: a shard out of range.
        """
        if not 0 <= shard < shards:
            raise UserError(f"shard={shard} of shards={shards}: use 0 <= shard < shards")
        return [index for index in range(shard, self.parts, shards) if not self.done(index)]

    @contextmanager
    def share(self, shard: int = 0, shards: int = 1) -> Iterator[list[int]]:
        """The parts that this process still has to write, locked against other processes.

        Shards of the same number of shards run side by side. If their number changes while others still run, a part
        may be written twice, each time atomically and with the same content.

        A job that is refused inside, before anything of it is there, leaves nothing that a corrected one would meet.

        Raises:
          UserError: a shard out of range.
          Temporary: another process writes this shard.
        """
        self.todo(shard, shards)
        try:
            with holding(self.path, f".shard-{shard}-of-{shards}.lock", each=True):
                yield self.todo(shard, shards)
        except UserError as error:
            if self._began and not isinstance(error, Temporary):
                self._withdraw()
            raise

    def _withdraw(self) -> None:
        """Removes the job unless it has led to a record of data, by this process or another; a report stays."""
        abouts = list(self.path.glob("part-*.json"))
        if any((record := _about(file)) is None or record["records"] for file in abouts):
            return
        for file in (*abouts, *(self.path / name for name in (NEGATIVE_TEXT, ITEMS, JOB))):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: the report, or another process is at work there
            self.path.rmdir()

    @contextmanager
    def part(self, index: int) -> Iterator[Part]:
        """A part to fill; leaving the block publishes it, an exception removes every trace."""
        file, about = self._names(index)
        partial = _beside(file)
        part = Part(partial, self.items_of(index), self.layout)
        try:
            yield part
            if part.missing():
                raise ValueError(f"part {index}: items {sorted(part.missing())} were neither added nor skipped")
            part.close()
            size = partial.stat().st_size
            record: dict[str, Any] = {"file": file.name, "records": part.records, "job": self._made_by}
            record |= {"bytes": size if part.records else 0, **part.notes}
            if part.records:
                to_disk(partial)
                record["crc32"] = crc32(partial)
                os.replace(partial, file)
            skipped = [asdict(s) for s in sorted(part.skipped, key=lambda s: s.item)]
            write_atomically(about, json.dumps({**record, "skipped": skipped}, ensure_ascii=False))
        finally:
            try:
                part.close()
            finally:
                partial.unlink(missing_ok=True)

    def lacks_negative(self) -> bool:
        """Whether the negative prompt's rows are absent, empty or truncated."""
        try:
            np.load(self.path / NEGATIVE_TEXT, allow_pickle=False)
        except (FileNotFoundError, EOFError, ValueError):
            return True
        return False

    def write_negative(self, text_SE: np.ndarray) -> None:
        """Stores the negative prompt's real rows, once, in float32."""
        file = self.path / NEGATIVE_TEXT
        if self.lacks_negative():
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(trim_text(text_SE), np.float32))
            write_atomically(file, buffer.getvalue())

    def notes(self, index: int) -> dict[str, Any]:
        """The record of a part that is done, with its `Part.notes`."""
        return read_json(self._names(index)[1])

    def skipped(self) -> list[Skipped]:
        """The skipped items of the parts that are done, in the source's order."""
        abouts = [self._names(index)[1] for index in range(self.parts)]
        return [Skipped(**entry) for about in map(_about, abouts) if about for entry in about["skipped"]]

    def finish(self, extra: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """Publishes the set if all its parts are there; every process may try, and may try again.

        Args:
          extra: JSON-able entries for the report.

        Raises:
          UserError: not one item could be used.
        """
        if not all(map(self.done, range(self.parts))):
            return False
        abouts = list(map(self.notes, range(self.parts)))
        parts = [{key: about[key] for key in ("file", "records", "bytes")} for about in abouts if about["records"]]
        skipped = [Skipped(**entry) for about in abouts for entry in about["skipped"]]
        kinds = Counter(s.reason.partition(":")[0] for s in skipped)
        records = sum(part["records"] for part in parts)
        report = {
            "items": self.items,
            "records": records,
            "left_out": dict(kinds),
            **extra,
            "skipped": list(map(asdict, skipped)),
        }
        write_atomically(self.path / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
        if not records:
            raise UserError(
                f"{self.path}: none of {counted(self.items, 'item')} can be used; the first: {skipped[0].reason}"
            )
        manifest = {
            "version": RECORDS_VERSION,
            "records": records,
            "items": self.items,
            "layout": self.layout.to_json(),
            "parts": parts,
            **self._description,
            "source_sha256": digest(self._description.get("source", {})),
        }
        write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for stale in filter(_is_partial, self.path.iterdir()):
            stale.unlink(missing_ok=True)
        known = {about["file"]: FileSum(about["bytes"], about["crc32"]) for about in abouts if "crc32" in about}
        write_sums(self.path, measure(self.path, lambda name: not name.startswith("."), known))
        return True


def _beside(file: Path) -> Path:
    """A temporary name that no other process of any machine uses."""
    return file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.partial")


def _is_partial(file: Path) -> bool:
    """Whether `_beside` made the name."""
    return fnmatch(file.name, ".*.partial")


def _about(file: Path) -> dict[str, Any] | None:
    """The record of a part; None if that is absent, truncated or invalid: the part is written again."""
    record = read_if_whole(file)
    return None if record is None or _PART("", record) else record
