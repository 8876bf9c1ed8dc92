"""Merging several sets of records into one, or writing one in parts of another size; records are copied and renumbered.

Every record keeps its name, caption and bits; item k of the new set is record k of the old ones, one after another.
Latents in LMDBs are copied too, so that the new set is self-contained. It is written by a `SetWriter`: by any number of
processes, and resumable.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import local_path
from cfjax.core.progress import Progress
from cfjax.data.latents import ClipDataset, LatentDataset
from cfjax.data.parts import Part, SetWriter
from cfjax.data.readers import BrokenRecord
from cfjax.data.records import Layout, Record, RecordDataset
from cfjax.data.sets import has_ground_truth, identity, open_dataset

CONTENT = "content"  # a part's note: of each of its items, 16 hex digits of what the record holds, "" where it has none


@dataclass(frozen=True)
class Member:
    """A set to merge: `layout` is that of its records in the new set."""

    dataset: ClipDataset
    layout: Layout

    @classmethod
    def open(cls, path: str | Path, lmdb: str | Path = "") -> "Member":
        """The set at `path`. Raises UserError as `open_dataset` does."""
        dataset = open_dataset(path, lmdb=lmdb)
        if isinstance(dataset, RecordDataset):
            kept = "records" if dataset.has_latents else "none"
            return cls(dataset, replace(dataset.layout, kept_in=kept))
        dtype = dataset.manifest["arrays"]["latents"]["dtype"]
        rows, width = dataset.text_shape
        points = dataset.trajectory_points
        keys = dataset.manifest["arrays"].get("actions", {"shape": [0]})["shape"][-1]
        layout = Layout(dataset.latent_shape, rows, width, "records", points, dtype, "float32", action_keys=keys)
        return cls(dataset, layout)

    def record(self, index: int) -> Record:
        """Record `index` with everything it holds. Raises BrokenRecord, or UserError for the machine's failures."""
        dataset = self.dataset
        if isinstance(dataset, RecordDataset):
            return dataset.whole(index)
        assert isinstance(dataset, LatentDataset)
        values = dataset[index]
        kept = {"latents": "latents_FHWC", "trajectory": "trajectory_JFHWC", "text": "text_SE"}
        kept["actions"] = "actions_FA"
        arrays = {name: values[key] for name, key in kept.items() if key in values}
        return Record(f"{dataset.path.name}/{index}", index, dataset.caption(index), arrays)

    def description(self) -> dict[str, Any]:
        """What must be equal in all members, by name."""
        manifest = self.dataset.manifest
        pairs = manifest.get("source", {}).get("pairs", {})
        out = {f"layout.{name}": value for name, value in asdict(self.layout).items()}
        out["text encoder (world)"] = manifest.get("text_encoder", {}).get("world")
        known = {"codec": manifest.get("codec"), **{f"pairs' {key}": pairs.get(key) for key in ("objective", "blocks")}}
        return out | {name: value for name, value in known.items() if value}  # not every set says these


def open_members(paths: Sequence[str | Path], lmdb: str | Path = "") -> list[Member]:
    """The sets to merge, in this order.

    Args:
      lmdb: where a single set's LMDB was moved to.

    Raises:
      UserError: one is missing, is named twice, or differs from the first in what must be equal.
    """
    paths = [local_path(path, "--merge", "sets are read from this machine") for path in paths if str(path).strip()]
    if not paths:
        raise UserError("--merge: name the sets to join, as --merge=data/a,data/b")
    if lmdb and len(paths) > 1:
        raise UserError(
            f"lmdb={str(lmdb)!r} names one LMDB; of several sets each one's is found where it was, or beside its set"
        )
    resolved = [Path(path).resolve() for path in paths]
    if twice := next((path for path, place in zip(paths, resolved, strict=True) if resolved.count(place) > 1), None):
        raise UserError(f"--merge: {twice} is named twice")
    members = [Member.open(path, lmdb) for path in paths]
    for member in members[1:]:
        _check_alike(members[0], member)
    return members


def _check_alike(first: Member, other: Member) -> None:
    one, two = first.description(), other.description()
    what = next((name for name in one if name in two and one[name] != two[name]), "")
    if not what and not np.array_equal(first.dataset.negative_text_SE, other.dataset.negative_text_SE):
        what, one, two = "negative text", {"negative text": "its rows"}, {"negative text": "other rows"}
    if what:
        raise UserError(
            f"--merge: {first.dataset.path} and {other.dataset.path} differ in {what}: {one[what]} and {two[what]}; "
            "join only sets that were made alike"
        )


def merge_writer(members: Sequence[Member], output: str | Path, part_items: int) -> SetWriter:
    """The writer of the merged set. Raises UserError when `output` is a member or holds something else."""
    for member in members:
        if member.dataset.path.resolve() == Path(output).resolve():
            raise UserError(f"output={str(output)!r} is one of the sets to join; choose another folder")
    manifests = [member.dataset.manifest for member in members]
    counts = [len(member.dataset) for member in members]
    sets = [
        {
            "path": str(member.dataset.path),
            "items": [end - count, end],
            "identity": identity(member.dataset),
            "source": manifest.get("source", {}),
        }
        for member, manifest, count, end in zip(members, manifests, counts, accumulate(counts), strict=True)
    ]
    source: dict[str, Any] = {"name": "merge", "sets": sets}
    if members[0].layout.trajectory_points:
        source["ground_truth"] = all(map(has_ground_truth, manifests))
    if pairs := next((m["source"]["pairs"] for m in manifests if m.get("source", {}).get("pairs")), None):
        source["pairs"] = pairs
    shared = ("codec",) if all("codec" in manifest for manifest in manifests) else ()
    about = {key: manifests[0][key] for key in ("text_encoder", "world_path", *shared) if key in manifests[0]}
    return SetWriter(
        output,
        items=sum(counts),
        part_items=part_items,
        layout=members[0].layout,
        job={"merge": [entry["identity"] for entry in sets]},
        description={**about, "source": source},
    )


def merge(
    writer: SetWriter, members: Sequence[Member], *, shard: int = 0, shards: int = 1, progress: bool = True
) -> tuple[bool, list[tuple[int, int]]]:
    """Copies the parts of this process that are missing.

    Returns:
      Whether the whole set is complete, and then the `duplicates`, which are also in its report.

    Raises:
      UserError: a record cannot be read because of the machine. A damaged one is skipped, which the report says.
    """
    todo = writer.todo(shard, shards)
    if todo or writer.lacks_negative():
        writer.write_negative(members[0].dataset.negative_text_SE)
    total = sum(len(writer.items_of(index)) for index in todo)
    ends = list(accumulate(len(member.dataset) for member in members))
    with Progress(total, "record", writer.path.name, shown=progress) as bar:
        for index in todo:
            with writer.part(index) as part:
                part.notes[CONTENT] = [_copy(part, members, ends, item, bar) for item in part.items]
    if not all(map(writer.done, range(writer.parts))):
        return False, []
    twice = duplicates(writer, ends)
    return writer.finish({"duplicates": [list(pair) for pair in twice]}), twice


def _place(ends: Sequence[int], item: int) -> tuple[int, int]:
    """(member, its record) of an item."""
    number = int(np.searchsorted(ends, item, side="right"))
    return number, item - (ends[number - 1] if number else 0)


def _copy(part: Part, members: Sequence[Member], ends: Sequence[int], item: int, bar: Any) -> str:
    number, index = _place(ends, item)
    bar.update()
    try:
        record = members[number].record(index)
    except BrokenRecord as error:
        part.skip(f"{members[number].dataset.path.name}/{index}", item, f"unreadable: {error}")
        return ""
    arrays = dict(record.arrays)
    stored = part.add(record.name, item, record.caption, arrays.pop("text"), **arrays)
    if stored is None:
        return ""
    hashed = hashlib.blake2b(stored.caption.encode(), digest_size=8)
    for name in sorted(stored.arrays):
        hashed.update(stored.arrays[name].tobytes())
    return hashed.hexdigest()


def duplicates(writer: SetWriter, ends: Sequence[int]) -> list[tuple[int, int]]:
    """(item, earlier item) wherever a record equals one of an earlier set; all of them are kept.

    Duplicates inside one set are not reported.
    """
    content = [digits for index in range(writer.parts) for digits in writer.notes(index)[CONTENT]]
    values = np.array([int(digits or "0", 16) for digits in content], np.uint64)
    number = np.searchsorted(ends, np.arange(len(values)), side="right")
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    earlier = first[inverse.ravel()]
    found = np.flatnonzero((values > 0) & (number[earlier] < number))
    return [(int(item), int(earlier[item])) for item in found]


def name_of(members: Sequence[Member], item: int) -> str:
    """An item's name in reports: its set and its name there. Raises UserError when its record cannot be read."""
    number, index = _place(list(accumulate(len(member.dataset) for member in members)), item)
    return f"{members[number].dataset.path}: {members[number].record(index).name}"
