"""However many files a set has, few are open; and only a damaged record is a broken one."""

import os
import pickle
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from cfjax.core.errors import Temporary, UserError
from cfjax.data import readers
from cfjax.data.parts import SetWriter
from cfjax.data.readers import BrokenRecord, Pool, max_open_readers
from cfjax.data.records import Layout, RecordDataset
from cfjax.data.tolerant import TolerantDataset

SHAPE, PARTS = (1, 2, 2, 4), 150


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A set of 150 parts of one record, which holds its number."""
    folder = tmp_path_factory.mktemp("sets") / "many"
    writer = SetWriter(
        folder, items=PARTS, part_items=1, layout=Layout(SHAPE, 1, 4), job={}, description={"source": {}}
    )
    writer.write_negative(np.ones((1, 4)))
    for index in writer.todo():
        with writer.part(index) as part:
            part.add(f"n{index}", index, str(index), np.ones((1, 4)), latents=np.full(SHAPE, index))
    assert writer.finish()
    return folder


def value(dataset, index):
    return int(dataset[index]["latents_FHWC"].flat[0])


def open_parts() -> int:
    """Files of a set that this process holds open, by the system's own account."""
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).endswith(".array_record") for link in links)


@pytest.fixture
def few(monkeypatch):
    """A process that may hold eight times five files open."""
    monkeypatch.setattr(readers, "open_file_limit", lambda: 40)
    assert max_open_readers() == 5


def test_opening_a_set_opens_none_of_its_parts(path, monkeypatch):
    made = []
    monkeypatch.setattr(readers, "ArrayRecordReader", lambda *_: made.append(1))
    assert len(RecordDataset(path)) == PARTS and not made


def test_readers_and_files_are_bounded_and_every_record_is_read(path, few):
    dataset, before = RecordDataset(path), open_parts()
    order = np.random.default_rng(0).permutation(PARTS)
    assert [value(dataset, int(i)) for i in order] == order.tolist()
    assert dataset.files.open_readers == 5 and open_parts() - before == 5
    del dataset
    assert open_parts() == before, "a set that is gone holds nothing"


def test_no_reader_has_threads_of_its_own(path):
    """The library starts one pool at the first reader of a process; a hundred more add nothing."""
    count = lambda: len(os.listdir("/proc/self/task"))
    dataset = RecordDataset(path)
    value(dataset, 0)
    before = count()
    assert [value(dataset, i) for i in range(PARTS)] == list(range(PARTS))
    assert count() == before and dataset.files.open_readers == min(max_open_readers(), PARTS)


@pytest.mark.parametrize(("limit", "most"), [(64, 8), (256, 32), (1024, 128), (1 << 20, 128), (16, 4)])
def test_the_bound_follows_the_processs_limit(monkeypatch, limit, most):
    monkeypatch.setattr(readers, "open_file_limit", lambda: limit)
    assert max_open_readers() == most


def test_threads_read_at_once_what_is_closed_and_opened_under_them(path, few):
    dataset, wrong = RecordDataset(path), []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, PARTS, 300):
            if value(dataset, int(i)) != i:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and dataset.files.open_readers <= 6


def test_what_is_in_use_stays_open(few):
    closed = []
    pool = Pool(closed.append)
    with pool.borrow("a", lambda: "a"):
        for key in "bcdefg":
            with pool.borrow(key, lambda key=key: key):
                pass
        assert closed == ["b", "c"]  # the least recently used that nobody uses
    with pool.borrow("d", lambda: "again") as held:
        assert held == "d"
    with pool.borrow("h", lambda: "h"):
        assert closed == ["b", "c", "a"]


@pytest.mark.filterwarnings("ignore:.*fork")  # of threads, which this child never uses
def test_sets_travel_to_other_processes(path):
    """By pickle, and across a fork, where the child opens files of its own."""
    dataset = RecordDataset(path)
    assert value(dataset, 3) == 3
    assert value(pickle.loads(pickle.dumps(dataset)), 4) == 4
    child = os.fork()
    if not child:
        os._exit([value(dataset, i) for i in (3, 140)] != [3, 140] or dataset.files.open_readers != 2)
    assert os.waitpid(child, 0)[1] == 0 and value(dataset, 3) == 3


def test_records_are_counted_from_either_side_of_a_part(path):
    files = RecordDataset(path).files
    assert files.locate(PARTS - 1) == (path / f"part-{PARTS - 1:05d}.array_record", 0)
    for index in (-1, PARTS):
        with pytest.raises(IndexError):
            files.locate(index)


# ---- whose fault it is


def test_too_many_open_files_break_no_record(path):
    """The limit is reached while training goes on; nothing is left out, and the line says what to raise."""
    dataset, lines = TolerantDataset(RecordDataset(path), 0.5, lambda line: lines.append(line)), []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(UserError, match=r"part-00007.*record 0: too many open files.*ulimit -n") as caught:
            dataset[7]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(caught.value, BrokenRecord) and not dataset.corrupt and not lines
    assert value(dataset, 7) == 7, "with room again, the same record is there"


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("pread() failed: Input/output error; reading part; at byte 5"), Temporary),
        (MemoryError("std::bad_alloc"), Temporary),
        (RuntimeError("pread() failed: Stale file handle; reading part; at byte 5"), Temporary),
        (RuntimeError("open() failed: Permission denied; opening part"), UserError),
    ],
)
def test_what_the_disk_or_the_memory_refuses_breaks_no_record(path, monkeypatch, raised, kind):
    class Refuses:
        def __init__(self, file, options):
            assert file.endswith("part-00000.array_record")

        def ok(self):
            return True

        def read(self, positions):
            raise raised

    monkeypatch.setattr(readers, "ArrayRecordReader", Refuses)
    dataset = TolerantDataset(RecordDataset(path), 0.5, lambda line: None)
    with pytest.raises(kind) as caught:
        dataset[0]
    assert type(caught.value) is kind and not dataset.corrupt


def test_a_part_that_vanishes_while_it_is_trained_on_ends_the_run(path, tmp_path):
    """As all do when a mount goes; one that was gone before is told when the set is opened."""
    dataset = TolerantDataset(RecordDataset(path), 0.5, lambda line: None)
    gone = path / "part-00009.array_record"
    gone.rename(tmp_path / "aside")
    try:
        with pytest.raises(Temporary, match=r"part-00009\.array_record, record 0: cannot be reached"):
            dataset[9]
    finally:
        (tmp_path / "aside").rename(gone)
    assert not dataset.corrupt and value(dataset, 9) == 9
