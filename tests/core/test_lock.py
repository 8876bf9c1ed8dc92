"""One command at a time writes into a folder; the lock of one that died, here or on another machine, expires."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cfjax.core import lock
from cfjax.core.errors import Temporary, UserError
from cfjax.core.lock import LOCK, holding
from tests.commands import ROOT

PROGRAM = """
import sys, time
from pathlib import Path
from cfjax.core import lock
lock.TOUCH_SECONDS, lock.LEASE_SECONDS = 0.1, 60.0
with lock.holding(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path / "run"`."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def elsewhere(pid: int = 7) -> str:
    """What a process of another machine leaves behind."""
    return f"filelock/2\npid={pid}\nhost=node-3\nmode=lease\ntoken=abc\nduration={lock.LEASE_SECONDS!r}\n"


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.1)


def test_a_second_command_is_refused_until_the_first_is_gone(holder, tmp_path, caplog):
    with (
        pytest.raises(Temporary, match=f"process {holder.pid} on .* writes there; wait for its end"),
        holding(tmp_path / "run"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with caplog.at_level(logging.WARNING), holding(tmp_path / "run"):
        assert f"taken over from process {holder.pid} on " in caplog.text
    assert not list((tmp_path / "run").iterdir())


def test_one_that_was_taken_over_ends(holder, tmp_path):
    """As after it had stood still: it must not go on writing beside its successor."""
    other = tmp_path / "other"
    other.write_text(elsewhere())
    other.replace(tmp_path / "run" / LOCK)
    assert holder.wait(30) == Temporary.exit_code
    assert "taken over by another process" in holder.stderr.read()


def test_another_process_with_the_same_number_is_not_taken_for_it(tmp_path, caplog):
    with holding(tmp_path):
        mine = (tmp_path / LOCK).read_text()
    start = next(line for line in mine.splitlines() if line.startswith("start="))
    (tmp_path / LOCK).write_text(mine.replace(start, f"start={int(start[6:]) - 1}"))
    with caplog.at_level(logging.WARNING), holding(tmp_path):
        assert f"taken over from process {os.getpid()}" in caplog.text


def test_another_machines_is_taken_over_when_it_shows_no_life(brief, tmp_path, caplog):
    (tmp_path / LOCK).write_text(elsewhere())
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING), holding(tmp_path):
        assert time.monotonic() - begun >= lock.LEASE_SECONDS
        assert "process 7 on node-3 held it last; waiting" in caplog.text
        assert "taken over from process 7 on node-3" in caplog.text


def test_another_machines_is_left_alone_while_it_lives(brief, tmp_path):
    (tmp_path / LOCK).write_text(elsewhere())
    ends = threading.Event()

    def live() -> None:
        while not ends.wait(0.1):
            os.utime(tmp_path / LOCK)

    with pytest.raises(Temporary, match="process 7 on node-3 writes there"):
        threading.Thread(target=live, daemon=True).start()
        try:
            with holding(tmp_path):
                pass
        finally:
            ends.set()
    assert (tmp_path / LOCK).read_text() == elsewhere()


@pytest.mark.parametrize("content", ["", "filelock/2\npid="])
def test_an_empty_or_cut_lock_bars_nobody_for_ever(brief, tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with holding(tmp_path):
        assert f"pid={os.getpid()}" in (tmp_path / LOCK).read_text()


def test_folders_that_were_made_in_vain_go_again(tmp_path):
    with pytest.raises(UserError, match="a mistake"), holding(tmp_path / "some" / "deep" / "run"):
        raise UserError("a mistake")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="is a file; name a folder"), holding(Path(__file__) / "run"):
        pass


def test_shares_of_a_job_are_held_side_by_side(tmp_path):
    with holding(tmp_path, ".shard-0-of-2.lock", each=True), holding(tmp_path, ".shard-1-of-2.lock", each=True):
        assert len(list(tmp_path.iterdir())) == 2
