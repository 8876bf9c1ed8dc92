"""The text cache: rows come back as they were, the encoder is loaded only when needed, broken entries are remade."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.models.text import TextEncoder
from cfjax.models.text_cache import TextCache, encode_cached, fill, read_rows

LENGTH = 8
CAPTIONS = ["a red circle", "a blue square moves left", "", "a red circle moves left fast"]


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.build(CAPTIONS, LENGTH)


@pytest.fixture(scope="module")
def text_BSE(encoder):
    return encoder.encode(CAPTIONS)


@pytest.fixture
def cache(encoder, tmp_path):
    return TextCache(tmp_path / "text", encoder.fingerprint(), LENGTH)


def never():
    raise AssertionError("the encoder was loaded")


def files(cache):
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def test_rows_come_back_and_the_encoder_is_loaded_once(encoder, text_BSE, cache):
    loads = []

    def load():
        loads.append(1)
        return encoder

    np.testing.assert_array_equal(encode_cached(load, cache, [*CAPTIONS, CAPTIONS[0]])[:4], text_BSE)
    assert len(loads) == 1 and len(files(cache)) == 4
    again = TextCache(cache.folder, encoder.fingerprint(), LENGTH)
    rows = encode_cached(never, again, CAPTIONS[::-1])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, text_BSE[::-1])
    assert fill(never, again, CAPTIONS) == 0
    assert fill(load, again, [*CAPTIONS, "red", "red "]) == 1


def test_rows_are_read_a_few_at_a_time_once_they_are_there(encoder, text_BSE, cache):
    fill(lambda: encoder, cache, CAPTIONS)
    np.testing.assert_array_equal(read_rows(cache, [CAPTIONS[3], CAPTIONS[1]]), text_BSE[[3, 1]])
    cache.path(CAPTIONS[1]).unlink()
    with pytest.raises(UserError, match="text cache entries vanish or break"):
        read_rows(cache, CAPTIONS)


def test_only_real_rows_are_kept(text_BSE, cache):
    cache.put_many(CAPTIONS, text_BSE)
    width = text_BSE.shape[2]
    for caption, rows in zip(CAPTIONS, (4, 6, 1, 7), strict=True):  # words and EOS
        assert 0 <= cache.path(caption).stat().st_size - rows * width * 4 < 120
        assert cache.path(caption).parent.parent == cache.folder


def test_bfloat16_rows(encoder, text_BSE, tmp_path):
    cache = TextCache(tmp_path, encoder.fingerprint(), LENGTH, "bfloat16")
    rows = encode_cached(lambda: encoder, cache, CAPTIONS)
    np.testing.assert_array_equal(rows, text_BSE.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert 0 < np.abs(rows - text_BSE).max() < 0.02


def test_what_the_key_depends_on(encoder, cache, tmp_path):
    path = cache.path("a red circle")
    assert cache.path("  a  red&nbsp;circle\n") == path, "the caption counts as cleaned"
    others = [
        cache.path("A red circle"),
        TextCache(cache.folder, "another encoder", LENGTH).path("a red circle"),
        TextCache(cache.folder, cache.fingerprint, LENGTH + 1).path("a red circle"),
        TextCache(cache.folder, cache.fingerprint, LENGTH, "bfloat16").path("a red circle"),
    ]
    assert len({path, *others}) == 5
    with pytest.raises(UserError, match="use bfloat16 or float32"):
        TextCache(tmp_path, "", LENGTH, "float16")


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "other"])
def test_a_broken_entry_is_reported_and_remade(harm, encoder, text_BSE, cache, caplog):
    cache.put_many(CAPTIONS, text_BSE)
    path = cache.path(CAPTIONS[1])
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"cut": content[:-9], "bit": content, "empty": b"", "other": b"\x93NUMPY\n{}"}[harm])
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(encode_cached(lambda: encoder, cache, CAPTIONS), text_BSE)
    assert caplog.text.count("a broken text cache entry ('a blue square moves left')") == 1
    np.testing.assert_array_equal(encode_cached(never, cache, CAPTIONS), text_BSE)


def test_an_encoder_that_is_not_the_caches(encoder, cache):
    other = TextEncoder.build(CAPTIONS, LENGTH, seed=1)
    with pytest.raises(UserError, match="for another text encoder"):
        encode_cached(lambda: other, cache, CAPTIONS)
    assert not cache.folder.exists()


def test_a_folder_that_cannot_be_written(encoder, tmp_path):
    (tmp_path / "text").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the text cache"):
        TextCache(tmp_path / "text", encoder.fingerprint(), LENGTH).put_many(["a"], np.ones((1, LENGTH, 4)))


WRITER = """
import sys, numpy as np
from cfjax.models.text_cache import TextCache
cache = TextCache(sys.argv[1], "f", 4)
for turn in range(40):
    for i in range(8):
        cache.put_many([str(i)], np.full((1, 4, 50), i + 1, np.float32))
        assert (cache.get(str(i)) == i + 1).all()
"""


def test_processes_and_threads_share_a_folder(tmp_path):
    """Several writers of the same entries, and readers: everyone sees whole entries, and nothing is left over."""
    command, root = [sys.executable, "-c", WRITER, str(tmp_path)], Path(__file__).parents[2]
    cache = TextCache(tmp_path, "f", 4)

    def work(i):
        for _ in range(40):
            cache.put_many([str(i)], np.full((1, 4, 50), i + 1, np.float32))
            assert (cache.get(str(i)) == i + 1).all()

    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(subprocess.run, command, cwd=root, capture_output=True, text=True) for _ in range(2)]
        list(pool.map(work, [*range(8)] * 2))
    for other in others:
        assert other.result().returncode == 0, other.result().stderr
    assert {path.name for path in files(cache)} == {cache.path(str(i)).name for i in range(8)}
