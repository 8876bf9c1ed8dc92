"""Checksums of files: damage is reported by file, and so is an invalid list of checksums."""

import json
import os

import pytest

from cfjax.core.checksums import SUMS, FileSum, differing, measure, read_sums, write_sums
from cfjax.core.errors import UserError

CONTENT = b"some bytes of a file" * 100


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/one", "two", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else CONTENT)
    write_sums(tmp_path)
    return tmp_path


def test_an_untouched_folder_is_as_it_was(folder):
    sums = read_sums(folder)
    assert sums.keys() == {"a/one", "two", "empty"} and sums["two"] == FileSum(len(CONTENT), crc32="b345420e")
    assert not list(differing(folder, sums)) and measure(folder) == sums
    known = {"two": FileSum(1, crc32="0")}
    assert measure(folder, lambda name: not name.startswith("a/"), known) == {
        "two": known["two"],
        "empty": sums["empty"],
    }


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda file: file.write_bytes(CONTENT[:-1] + b"!"), "its bytes are not those that were written"),
        (lambda file: os.truncate(file, 7), f"7 bytes, and was written with {len(CONTENT)}"),
        (lambda file: file.unlink(), "missing"),
    ],
)
def test_a_changed_file_is_reported_by_its_name(folder, damage, line):
    damage(folder / "a/one")
    assert list(differing(folder, read_sums(folder))) == [f"a/one: {line}"]


def test_an_md5_that_a_bucket_reported_holds_for_a_copy_on_this_machine(folder):
    sums = {"two": FileSum(len(CONTENT), md5="MHUZ5EZ89DSETYFWwCesgQ==")}
    assert not list(differing(folder, sums))
    (folder / "two").write_bytes(CONTENT[::-1])
    assert list(differing(folder, sums)) == ["two: its bytes are not those that were written"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 1, "files": {"two": {"bytes": 1}}}',
        '{"version": 1, "files": {"two": {"bytes": "1", "crc32": "0"}}}',
        '{"version": 1, "files": {"../two": {"bytes": 1, "crc32": "0"}}}',
        '{"version": 1, "files": {"two": {"bytes": 1, "crc32": "0", "more": 1}}}',
    ],
)
def test_what_is_no_list_of_sums_is_reported(tmp_path, content):
    (tmp_path / SUMS).write_text(content)
    with pytest.raises(UserError, match=f"{SUMS}: is damaged, or no list of checksums"):
        read_sums(tmp_path)


def test_no_list_and_a_list_of_a_newer_version(tmp_path):
    assert read_sums(tmp_path) is None
    (tmp_path / SUMS).write_text(json.dumps({"version": 2, "files": {}}))
    with pytest.raises(UserError, match="version 2 is not known"):
        read_sums(tmp_path)
