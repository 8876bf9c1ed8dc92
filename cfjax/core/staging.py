"""Several files and folders that take their places in a folder together: all of them, or what was there before.

They are written into a hidden folder inside the target, so on its disk, be it a mount point, and nothing beside it is
touched. A journal there says what is being put where; what a killed command left is undone by the next one. Only one
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
    """What lies in a folder, in order, but for locks and what a new disk holds."""
    return sorted(path for path in folder.iterdir() if path.suffix != LOCK and path.name not in (LOCK, "lost+found"))


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yields an empty hidden folder inside `folder`, which is there; gone at the end, with all that was not placed."""
    roll_back(folder)
    inside = folder / STAGING
    inside.mkdir()
    try:
        (inside / "new").mkdir()
        yield inside / "new"
    finally:
        roll_back(folder)


def place(folder: Path, names: Sequence[str], *, stale: Sequence[str] = ()) -> None:
    """Puts what was staged in its place, in this order; what is there under these names goes.

    Args:
      names: paths in the staged folder, which become the same in `folder`.
      stale: paths in `folder` that go, too.

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
    """Undoes what a killed command had begun to place, and removes its staging."""
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
    """What `move` leaves beside a place on another disk when it is killed."""
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return [file for file in beside if file.name.startswith(f".{target.name}.") and file.name.endswith(".partial")]
