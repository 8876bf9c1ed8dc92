"""Limits of the machine are checked, and its failures are distinguished from faults of a file."""

import errno
import os
import resource

import pytest

from cfjax.__main__ import main
from cfjax.core.errors import Temporary, UserError
from cfjax.core.machine import FILES_AT_LEAST, FILES_WANTED, ensure_open_files, machine_failure, open_file_limit


@pytest.fixture
def limits(monkeypatch):
    """Limits of open files that stand for the process's own: [soft, hard]."""
    held = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(held))
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: held.__setitem__(slice(None), values))
    return held


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (256, 4096, 4096),
        (1024, 1 << 20, FILES_WANTED),
        (1024, resource.RLIM_INFINITY, FILES_WANTED),
        (20000, 20000, 20000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_is_sensible(limits, soft, hard, expected):
    limits[:] = [soft, hard]
    ensure_open_files()
    assert limits == [expected, hard]
    assert open_file_limit() >= min(hard, FILES_WANTED) or hard == resource.RLIM_INFINITY


def test_a_limit_that_is_too_low_is_one_line_before_anything_is_done(limits, capsys):
    limits[:] = [64, 64]
    assert main(["plan", "--help"]) == 2
    message = capsys.readouterr().err
    assert (
        "64 files open" in message
        and str(FILES_AT_LEAST) in message
        and "ulimit -n" in message
        and message.count("\n") == 1
    )


def test_a_system_that_does_not_raise_it_is_no_error(limits, monkeypatch):
    def refuses(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuses)
    ensure_open_files()
    assert limits == [1024, 4096]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.EMFILE, "x"), UserError, "ulimit -n"),
        (RuntimeError("open() failed: Too many open files; opening a/part"), UserError, "ulimit -n"),
        (
            RuntimeError("pread() failed: Input/output error; reading a/part; at byte 7"),
            Temporary,
            "Input/output error",
        ),
        (RuntimeError("open() failed: No such file or directory; opening a"), Temporary, "its disk or mount"),
        (OSError(errno.ESTALE, "x"), Temporary, os.strerror(errno.ESTALE)),
        (RuntimeError("pread() failed: a word of another system; at byte 7"), Temporary, "a word of another system"),
        (MemoryError(), Temporary, "no memory left"),
        (PermissionError(errno.EACCES, "x"), UserError, "its rights"),
    ],
)
def test_the_machines_failures_come_with_their_own_fix(error, kind, message):
    failure = machine_failure("a/part", error)
    assert type(failure) is kind and str(failure).startswith("a/part: ") and message in str(failure)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not a record of this format"),
        RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch (computed 0x5, stored 0x1)"),
        OSError("cannot be read as an array"),
        EOFError("No data left in file"),
    ],
)
def test_a_files_own_faults_are_not_the_machines(error):
    assert machine_failure("a", error) is None
