"""One of several processes makes a file; the others wait for it, and take over when it fails."""

import subprocess
import sys

import pytest

from tests.commands import ROOT

PROGRAM = """
import sys, time
from pathlib import Path
from cfjax.core.once import make_once

folder, fails = Path(sys.argv[1]), sys.argv[2] == "fails"

def write():
    (folder / "busy").mkdir()  # fails if another is at it
    (folder / "tries").open("a").write("x")
    time.sleep(0.2)
    (folder / "busy").rmdir()
    if fails:
        raise OSError("disk full")
    (folder / "target").write_text("made")

time.sleep(float(sys.argv[3]))
make_once(folder / "target", write)
"""


def codes(folder, how: str, count: int) -> list[int]:
    """Exit codes of `count` processes, each a little later than the one before: some come when others have failed."""
    command = [sys.executable, "-c", PROGRAM, str(folder), how]
    delays = (str(0.1 * n) for n in range(count))
    started = [subprocess.Popen([*command, delay], cwd=ROOT, stderr=subprocess.DEVNULL) for delay in delays]
    return [process.wait() for process in started]


@pytest.mark.parametrize("failing", [0, 1, 6])
def test_one_makes_it_and_nothing_else_is_left(tmp_path, failing):
    """Those that fail try one after another, each of them."""
    assert codes(tmp_path, "fails", failing) == [1] * failing
    assert codes(tmp_path, "works", 4) == [0] * 4
    assert (tmp_path / "tries").read_text() == "x" * (failing + 1)
    assert {path.name for path in tmp_path.iterdir()} == {"tries", "target"}
