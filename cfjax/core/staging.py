"""Atomic replacement of several files and folders in a folder: all of them, or none.

They are written into a hidden folder inside the target, hence on the same disk, and nothing beside the target is
touched. A journal there lists the moves; what a killed command left half done is undone by the next one. Only one
process may do this in a folder at a time (`core.lock`).
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cfjax.core.lock import LOCK
from cfjax.core.paths import move, read_if_whole, remove, to_disk, write_atomically

STAGING, JOURNAL, REPLACED = ".staging", "journal.json", "replaced"


def contents(folder: Path) -> list[Path]:
    """The sorted entries of a folder, without locks and what a newly formatted disk holds."""
    return sorted(path for path in folder.iterdir() if path.suffix != LOCK and path.name not in (LOCK, "lost+found"))


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yields an empty hidden folder inside the existing `folder`; removed at the end, with all that was not placed."""
    roll_back(folder)
    inside = folder / STAGING
    inside.mkdir()
    try:
        (inside / "new").mkdir()
        yield inside / "new"
    finally:
        roll_back(folder)


def place(folder: Path, names: Sequence[str], *, stale: Sequence[str] = ()) -> None:
    """Moves what was staged into `folder`, in this order, replacing what has these names.

    Args:
      names: paths in the staged folder, which become the same in `folder`.
      stale: further paths in `folder` to remove.

    Raises:
      OSError: the disk is full or may not be written to; at the end of `staging` all is as it was.
    """
    inside = folder / STAGING
    (inside / REPLACED).mkdir()
    there = {name: _is_there(folder / name) for name in (*stale, *names)}
    write_atomically(inside / JOURNAL, json.dumps(there))
    for number, (name, was) in enumerate(there.items()):
        target = folder / name
        if was:
            move(target, inside / REPLACED / str(number))
        if name in names:
            target.parent.mkdir(parents=True, exist_ok=True)
            move(inside / "new" / name, target)
    for parent in {(folder / name).parent for name in names}:
        to_disk(parent)
    (inside / JOURNAL).unlink()  # from here on it is done
    to_disk(inside)


def roll_back(folder: Path) -> None:
    """Undoes the moves of a killed command, and removes its staging folder."""
    inside = folder / STAGING
    if not inside.is_dir():
        return
    there: dict[str, bool] = read_if_whole(inside / JOURNAL) or {}
    for number, (name, was) in enumerate(there.items()):
        target, replaced = folder / name, inside / REPLACED / str(number)
        for left in _partial_copies(target):
            remove(left)
        if _is_there(replaced):
            remove(target)
            move(replaced, target)
        elif not was:
            remove(target)
            if target.parent != folder and target.parent.is_dir() and not any(target.parent.iterdir()):
                target.parent.rmdir()
    shutil.rmtree(inside)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _partial_copies(target: Path) -> list[Path]:
    """What a killed `move` to another disk leaves beside its target."""
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return [file for file in beside if file.name.startswith(f".{target.name}.") and file.name.endswith(".partial")]
