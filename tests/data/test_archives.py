"""Archives of arrays: sizes are those of their headers, and small files do not become large arrays."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from cfjax.data import archives
from cfjax.data.archives import open_array, read_archive


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("latents.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, save):
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "names": np.array(["x", "yz"]), "n": np.float32(3)}
    save(tmp_path / "x.npz", **arrays)
    for name, array in read_archive(tmp_path / "x.npz").items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header((10**12,)) + bytes(8), "4000000000000 bytes; 8 are stored"),
        (header((-4,)) + bytes(16), "no array of numbers"),
        (header((2,), "|O") + bytes(16), "no array of numbers"),
        (header((1001,)) + bytes(4004), "4004 bytes, more than the 4000"),
        (b"nothing of NumPy", "latents.npy: "),
    ],
    ids=["more than stored", "negative", "objects", "packed", "other"],
)
def test_headers_are_held_against_what_is_stored(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(archives, "ARRAY_BYTES", 4000)
    with pytest.raises(ValueError, match=words):
        read_archive(archive(tmp_path / "x.npz", content))


def test_a_single_array_is_no_longer_than_its_file(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3.0))
    np.testing.assert_array_equal(open_array(tmp_path / "x.npy"), np.arange(3.0))
    for content in (header((10**12,)) + bytes(8), b"PK\x03\x04", b"\x93NUMPY\x01\x00\x02\x00{\n"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"."):
            open_array(tmp_path / "x.npy")
