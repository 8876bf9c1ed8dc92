"""Files are replaced together or not at all, whenever a command is killed, on any disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cfjax.core import staging as module
from cfjax.core.paths import move
from cfjax.core.staging import place, roll_back, staging

MEMORY = Path("/dev/shm")


class Killed(BaseException):
    """In place of SIGKILL."""


def tree(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def write(folder: Path, word: str) -> None:
    """Two files, and a folder of two."""
    for name in ("a", "b", "world/part/c", "world/part/d"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(word)


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Raises before the given move, counted from 0; `staging` does not get to clean up either."""
    left = [call]

    def counted(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        move(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "move", counted)
        patch.setattr(module, "roll_back", lambda _: None)
        yield


def put(folder: Path, word: str) -> None:
    with staging(folder) as new:
        write(new, word)
        place(folder, ["a", "b", "world/part"], stale=["old"])


@pytest.mark.parametrize("before", [{}, {"a": "1", "old": "1", "mine": "1", "world/part/c": "1", "world/mine": "1"}])
def test_all_or_what_was_there(tmp_path, before):
    def fresh() -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, text in before.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return folder

    whole = fresh()
    put(whole, "2")
    expected = {name: "2" for name in ("a", "b", "world/part/c", "world/part/d")}
    expected |= {name: text for name, text in before.items() if "mine" in name}
    assert tree(whole) == expected
    moves = 0
    while True:
        folder = fresh()
        try:
            with killed_at(moves):
                put(folder, "2")
        except Killed:
            roll_back(folder)
            assert tree(folder) == before
            assert [path.name for path in folder.iterdir()].count(".staging") == 0
            put(folder, "2")
            assert tree(folder) == expected
            moves += 1
            continue
        break
    assert moves >= 3


@pytest.fixture
def other_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder on another file system: in memory; where there is none, renames out of `tmp_path` fail as if."""
    if MEMORY.is_dir() and os.stat(MEMORY).st_dev != os.stat(tmp_path).st_dev:
        folder = MEMORY / f"cfjax-test-{os.getpid()}"
        folder.mkdir()
        yield folder
        module.remove(folder)
        return
    folder, replace = tmp_path / "disk", os.replace
    folder.mkdir()

    def crossing(source: Path, target: Path) -> None:
        if (folder in Path(source).parents) != (folder in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crossing)
    yield folder


def test_a_folder_that_is_a_link_to_another_disk(tmp_path, other_disk):
    """What lies there goes over by copies; the disk of the link gets nothing but the staging."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "world").symlink_to(other_disk)
    (other_disk / "mine").write_text("1")
    put(folder, "1")
    put(folder, "2")
    assert tree(other_disk) == {"mine": "1", "part/c": "2", "part/d": "2"}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "world"]
    with pytest.raises(Killed), killed_at(3):
        put(folder, "3")
    roll_back(folder)
    assert tree(other_disk) == {"mine": "1", "part/c": "2", "part/d": "2"} and tree(folder)["a"] == "2"


def test_moving_across_disks_replaces_whole_files(tmp_path, other_disk):
    (tmp_path / "file").write_text("new")
    (other_disk / "file").write_text("old")
    move(tmp_path / "file", other_disk / "file")
    assert tree(other_disk) == {"file": "new"} and not (tmp_path / "file").exists()
