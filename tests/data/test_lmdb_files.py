"""LMDBs are mapped only when they are as long as their own header says; few of many are open at a time.

What is cut off here is shown to the check alone: LMDB itself would take the process down.
"""

import os
from pathlib import Path

import lmdb
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data import readers
from cfjax.data.check import check_dataset
from cfjax.data.lmdb_files import check_whole, lmdb_files
from cfjax.data.lmdb_rows import LmdbRows
from tests.data.lmdbs import damage, rows_of, write_lmdb

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def path(tmp_path) -> Path:
    return write_lmdb(tmp_path / "set", rows_of(6, 6), list("abcdef"))


@pytest.fixture
def never_opened(monkeypatch):
    """Ends the test rather than the process when a file that is cut off is to be mapped."""

    def refuse(*_, **__):
        raise AssertionError("an LMDB that is cut off must not be opened")

    monkeypatch.setattr(lmdb, "open", refuse)


def cut(path: Path, size: int) -> int:
    """Cuts an LMDB's file to so many bytes (negative: off its end); its size before."""
    file = path / "data.mdb"
    before = file.stat().st_size
    os.truncate(file, size if size >= 0 else before + size)
    return before


def test_whole_files_pass_whatever_was_done_to_them(path):
    check_whole(path)
    damage(path, "latents_2_data", b"short")  # pages that are free now
    damage(path, "prompts_3_data", None)
    check_whole(path)
    with (path / "data.mdb").open("ab") as file:
        file.write(bytes(PAGE * 3))  # room for more is no fault
    check_whole(path)
    check_whole(path / "data.mdb")


@pytest.mark.parametrize("size", [-1, -PAGE, 3 * PAGE, 2 * PAGE, PAGE + 200, PAGE, 200])
def test_files_shorter_than_their_header_shows_are_refused_unopened(path, never_opened, size):
    before = cut(path, size)
    found = (path / "data.mdb").stat().st_size
    with pytest.raises(UserError, match="cut off, or is still being copied; copy it again") as caught:
        check_whole(path)
    assert f"data.mdb: {found} bytes, but its header says " in str(caught.value)
    if found > 2 * PAGE:  # then the newer of both headers is there
        assert f"says {before}:" in str(caught.value)


def test_every_way_to_an_lmdb_passes_the_check(path, never_opened):
    cut(path, -1)
    with pytest.raises(UserError, match="cut off"):
        LmdbRows(path)
    (fault,) = check_dataset(path, progress=False)
    assert "cut off" in fault.what and fault.index is None


def test_the_newer_header_counts(path):
    """Transactions write the two headers in turn; the older one tells of a shorter file."""
    first = (path / "data.mdb").stat().st_size
    for number in range(2):
        with lmdb.open(str(path), map_size=1 << 24) as env, env.begin(write=True) as transaction:
            transaction.put(b"more%d" % number, bytes(40 * PAGE))
        check_whole(path)
        with (path / "data.mdb").open("rb") as file:
            whole = file.read()
        cut(path, first + PAGE)
        with pytest.raises(UserError, match=f"says {len(whole)}:"):
            check_whole(path)
        (path / "data.mdb").write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"no database", bytes(PAGE * 4), b"\xff" * PAGE])
def test_what_has_no_such_header_is_left_to_lmdb_which_refuses_it(tmp_path, content):
    (tmp_path / "data.mdb").write_bytes(content)
    check_whole(tmp_path)
    with pytest.raises(UserError, match=r"cannot (read this LMDB|be reached)"):
        LmdbRows(tmp_path)


def test_a_folder_of_many_lmdbs_holds_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "open_file_limit", lambda: 40)
    for number in range(12):
        write_lmdb(tmp_path / f"set_{number:02d}", rows_of(2, 1, number), [f"{number}a", f"{number}b"])
    rows = LmdbRows(tmp_path)
    opened = lambda: sum(
        os.readlink(f"/proc/self/fd/{name}").endswith("data.mdb")
        for name in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{name}")
    )
    assert len(lmdb_files(tmp_path)) == 12 and len(rows) == 24
    assert [rows.caption(i) for i in (23, 0, 11, 10)] == ["11b", "0a", "5b", "5a"] and opened() == 5
    np.testing.assert_array_equal(rows.arrays(23)["latents"], np.moveaxis(rows_of(2, 1, 11)[1, 0], -3, -1))
    del rows
    assert opened() == 0


@pytest.mark.filterwarnings("ignore:.*fork")  # of threads, which this child never uses
def test_a_forked_process_opens_its_own(path):
    rows = LmdbRows(path)
    assert rows.caption(0) == "a"
    child = os.fork()
    if not child:
        os._exit(rows.caption(1) != "b" or LmdbRows(path).caption(2) != "c")
    assert os.waitpid(child, 0)[1] == 0 and rows.caption(3) == "d"


def test_an_lmdb_is_identified_by_its_rows(path, tmp_path):
    known = LmdbRows(path).fingerprint()
    path.rename(tmp_path / "moved")
    assert LmdbRows(tmp_path / "moved").fingerprint() == known
    for key, value in (("prompts_5_data", b"other"), ("latents_0_data", b"\x01" * 9216)):
        damage(tmp_path / "moved", key, value)
        assert LmdbRows(tmp_path / "moved").fingerprint() != known
        known = LmdbRows(tmp_path / "moved").fingerprint()
