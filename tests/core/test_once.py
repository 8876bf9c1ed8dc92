"""One of several processes makes a file; the others wait for it, and take over when it fails."""

import multiprocessing
import time

import pytest

from cfjax.core.once import make_once


def _make(folder, fails):
    def write():
        (folder / "tries").open("a").write("x")
        time.sleep(0.2)
        if fails:
            raise OSError("disk full")
        (folder / "target").write_text("made")

    make_once(folder / "target", write)


@pytest.mark.parametrize(("failing", "tries"), [(0, 1), (2, 3)])
def test_one_makes_it_and_nothing_else_is_left(tmp_path, failing, tries):
    context = multiprocessing.get_context("fork")
    first = [context.Process(target=_make, args=(tmp_path, True)) for _ in range(failing)]
    for process in first:
        process.start()
    for process in first:
        process.join()
    rest = [context.Process(target=_make, args=(tmp_path, False)) for _ in range(4)]
    for process in rest:
        process.start()
    for process in rest:
        process.join()
    assert [process.exitcode for process in first + rest] == [1] * failing + [0] * 4
    assert (tmp_path / "tries").read_text() == "x" * tries
    assert {path.name for path in tmp_path.iterdir()} == {"tries", "target"}
