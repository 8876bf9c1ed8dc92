"""Curves on a disk that is full: the run goes on, and buffered points are written once there is room."""

import json
import resource
from contextlib import contextmanager

import pytest
from absl import logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cfjax.core.compile_cache import no_compile_cache
from cfjax.core.errors import Temporary
from cfjax.training import appender
from cfjax.training.appender import Appender
from cfjax.training.metrics import EventWriter
from tests.training.toy import run


@contextmanager
def full(size: int):
    """The kernel refuses bytes beyond this size of a file, as a full disk does."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    warned: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: warned.append(message % args))
    return warned


def test_what_had_no_room_is_written_later_without_a_torn_piece(tmp_path, lines):
    grown = Appender(tmp_path / "folder/file")
    grown.add(b"first\n")
    with full(10):
        for word in (b"second\n", b"third\n"):
            grown.add(word)
    grown.add(b"fourth\n")
    grown.flush(sync=True)
    assert grown.file.read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert len(lines) == 1 and "folder/file: cannot be written (OSError: [Errno 27] File too large" in lines[0]


def test_not_everything_waits(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(appender, "MOST", 20)
    grown = Appender(tmp_path / "file")
    with full(0):
        for number in range(10):
            grown.add(b"line %d\n" % number)
    grown.flush()
    assert grown.file.read_bytes() == b"line 8\nline 9\n"


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(tmp_path, lines):
    (tmp_path / "file").write_text("in the way")
    with EventWriter(tmp_path / "file") as writer:
        writer.restart(0)
        writer.scalars(1, {"loss": 1.0})
    assert 1 <= len(lines) <= 3


def test_a_run_goes_on_while_its_curves_have_no_room(tmp_path, lines):
    """Nothing but curves has met the end of the disk; the events and lines of the whole run are there in the end."""

    def room(state, step, writer):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with no_compile_cache(), full(6_000):  # half a program there would be a warning in every test that reads it
        run(tmp_path / "run", 40, log_every=1, save_every=40, sample_every=39, sample_fn=room)
    assert lines and all("cannot be written (OSError" in line for line in lines)
    warned = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert warned == list(range(40))
    points = EventAccumulator(str(tmp_path / "run/events")).Reload().Scalars("1_training/critic/loss")
    assert [point.step for point in points] == list(range(40))


def test_a_disk_that_fills_elsewhere_in_a_run_names_the_step_to_go_on_from(tmp_path):
    def sample(state, step, writer):
        raise OSError(28, "No space left on device", "some/picture")

    with pytest.raises(Temporary, match=r"some/picture: no space left on device; .*; last checkpoint: step 20$"):
        run(tmp_path, 40, sample_every=25, sample_fn=sample)
