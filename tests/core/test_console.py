"""Output that nobody reads, or that has no room, ends no command."""

import errno
import os
import sys
import types
from contextlib import contextmanager

import pytest
from tqdm import tqdm

import cfjax.__main__ as entry
from cfjax.core.console import complain, say, tolerate_output_errors
from tests.training.toy import run


@contextmanager
def unread():
    """Standard output and error are pipes whose reader has gone, as behind `| head`."""
    before, streams = (sys.stdout, sys.stderr), []
    for _ in before:
        reader, writer = os.pipe()
        os.close(reader)
        streams.append(os.fdopen(writer, "w"))
    sys.stdout, sys.stderr = streams
    try:
        yield
        assert [sys.stdout, sys.stderr] == streams
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:  # as the interpreter does at its end
            stream.close()


def verb(monkeypatch, main) -> None:
    module = types.ModuleType("cfjax.plan")
    module.main = main
    monkeypatch.setitem(sys.modules, "cfjax.plan", module)


def test_a_reader_that_has_gone_ends_nothing(monkeypatch):
    done = []

    def much(argv):
        for number in range(10_000):
            say(f"line {number}")
        complain("and more")
        done.append(argv)

    verb(monkeypatch, much)
    with unread():
        assert entry.main(["plan", "--x"]) == 0 and done == [["--x"]]
        assert entry.main(["--help"]) == 0 and entry.main(["no such verb"]) == 2


def test_a_run_trains_on_unseen(tmp_path):
    with unread(), tolerate_output_errors():
        state = run(tmp_path, 6, progress=True)
        for _ in tqdm(range(3)):
            say()
    assert int(state.step) == 6


def test_a_log_on_a_full_disk_ends_nothing(monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        verb(monkeypatch, lambda _: [say("x" * 1000) for _ in range(20)] and 0)
        assert entry.main(["plan"]) == 0
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "exit_code", "fix"),
    [
        (errno.ENOSPC, 75, "no space left on device; see to the room"),
        (errno.EDQUOT, 75, "disk quota exceeded; see to the room"),
        (errno.EROFS, 75, "read-only file system; see to the room"),
        (errno.EIO, 75, "input/output error; see to the room"),
        (errno.EACCES, 2, "permission denied; change its rights"),
    ],
)
def test_what_any_file_may_meet_is_reported_in_one_line(monkeypatch, capsys, code, exit_code, fix):
    def fail(_):
        raise OSError(code, os.strerror(code), "some/file")

    verb(monkeypatch, fail)
    assert entry.main(["plan"]) == exit_code
    message = capsys.readouterr().err
    assert message.startswith(f"cfjax plan: some/file: {fix}") and message.count("\n") == 1


def test_what_is_none_of_the_storages_stays_an_error(monkeypatch):
    def fail(_):
        raise FileNotFoundError(errno.ENOENT, "gone", "some/file")

    verb(monkeypatch, fail)
    with pytest.raises(FileNotFoundError):
        entry.main(["plan"])


def test_what_libraries_say_of_a_full_disk(monkeypatch, capsys):
    for text in ("I/O error: No space left on device (os error 28)", "write() failed: No space left on device"):
        verb(monkeypatch, lambda _, text=text: (_ for _ in ()).throw(RuntimeError(text)))
        assert entry.main(["plan"]) == 75 and text in capsys.readouterr().err
