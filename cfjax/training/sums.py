"""Checksums of a checkpoint: computed from its files before it is committed, compared before its arrays are used."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from cfjax.core.checksums import SUMS, differing, measure, read_sums, write_sums
from cfjax.core.paths import files_below, path_of

STATE, RECORD = "state", "record"
# Orbax writes these after everything else; nothing of them reaches a run.
_NOTES = ("commit_success.txt", "_CHECKPOINT_METADATA")
_UNFINISHED = ".orbax-checkpoint-tmp"
_checked: set[tuple[Any, ...]] = set()  # folders and their files, as they were when all was well
_warned: set[str] = set()  # folders of checkpoints without sums


class Damaged(Exception):
    """A checkpoint whose files are not those that were written."""


class RecordHandler(ocp.JsonCheckpointHandler):
    """Orbax's handler of the record, the item that is finalised last; it then computes the checksums of all files.

    Args:
      checksums: False leaves the sums away.
    """

    def __init__(self, *, checksums: bool) -> None:
        super().__init__()
        self._checksums = checksums

    def finalize(self, directory: Path) -> None:
        """Writes `SUMS` beside the items, before Orbax commits the checkpoint; on the first process only."""
        if self._checksums:
            step = path_of(str(directory.parent))
            found = measure(step, lambda name: not name.endswith(_NOTES))
            write_sums(step, {name.replace(_UNFINISHED, "", 1): about for name, about in found.items()})


@ocp.args.register_with_handler(RecordHandler, for_save=True)
@dataclass
class RecordSave(ocp.args.JsonSave):
    """Orbax's arguments for saving the record."""


@ocp.args.register_with_handler(RecordHandler, for_restore=True)
@dataclass
class RecordRestore(ocp.args.JsonRestore):
    """Orbax's arguments for restoring the record."""


def faults(step_folder: Path, *, part: int = 0, parts: int = 1, items: tuple[str, ...] = ()) -> Iterator[str]:
    """A line for each file of a checkpoint that is not as it was written, "NAME: what is wrong".

    A checkpoint without sums has none.

    Args:
      part, parts: which share of the files is checked, of how many.  items: of these items alone.

    Raises:
      Temporary: the machine does not let a file be read.  UserError: the sums are damaged.
    """
    sums = read_sums(step_folder)
    if sums is None:
        return
    chosen = {name: about for name, about in sums.items() if not items or name.partition("/")[0] in items}
    mine = sorted(chosen)[part::parts]
    yield from differing(step_folder, {name: chosen[name] for name in mine})
    if not items and part == 0:
        yield from _unreadable_metadata(step_folder)


def _unreadable_metadata(folder: Path) -> Iterator[str]:
    """Orbax's metadata files, which have no checksums: those that cannot be parsed."""
    for name in sorted(files_below(folder)):
        if name.rpartition("/")[2] in _NOTES:
            try:
                text = (folder / name).read_bytes().decode()
                if name.endswith(_NOTES[1]):
                    json.loads(text)
            except ValueError:
                yield f"{name}: is not what Orbax writes"


def verify(step_folder: Path, *, together: bool = False, items: tuple[str, ...] = ()) -> None:
    """Compares a checkpoint's files with their checksums, unless this process did and they have not changed since.

    Args:
      together: all processes do so, each for its share of the files.  items: see `faults`.

    Raises:
      Damaged: a file is not what was written; which one.  Temporary: the machine does not let it be read.
    """
    try:
        sums = read_sums(step_folder)
    except ValueError as error:
        raise Damaged(f"{SUMS} is damaged") from error
    if sums is None:
        _warn_unchecked(step_folder)
        return
    share = (jax.process_index(), jax.process_count()) if together else (0, 1)
    key = (str(step_folder), share, items, _file_states(step_folder))
    if key in _checked:
        return
    found = list(faults(step_folder, part=share[0], parts=share[1], items=items))
    if found:
        raise Damaged(found[0] + (f" (and {len(found) - 1} more)" if found[1:] else ""))
    _checked.add(key)


def _file_states(folder: Path) -> tuple[Any, ...]:
    """The state of a folder's files: differs once one of them has changed."""
    out = []
    for name, (size, md5) in sorted(files_below(folder).items()):
        out.append((name, size, md5 or (folder / name).stat().st_mtime_ns))
    return tuple(out)


def _warn_unchecked(step_folder: Path) -> None:
    place = str(step_folder.parent)
    if place not in _warned:
        _warned.add(place)
        logging.warning("%s has no checksums (an older version's, or checksums=False): taken as it is", step_folder)
