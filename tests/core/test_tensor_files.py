"""Arrays of any memory layout come back from .safetensors as they are."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from safetensors import safe_open
from safetensors.numpy import load_file

from cfjax.core.tensor_files import save_tensors, tensor_bytes
from cfjax.models.codec import PatchCodec

ROWS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = {
    "row-major": ROWS,
    "transposed": ROWS.transpose(2, 0, 1),
    "column-major": np.asfortranarray(ROWS),
    "strided": ROWS[:, :, ::2],
    "backwards": ROWS[::-1],
    "broadcast": np.broadcast_to(ROWS[:1], (5, 3, 4)),
    "a column": ROWS[0, :, 1],
    "bfloat16, transposed": ROWS.astype(ml_dtypes.bfloat16).T,
    "float16, transposed": ROWS.astype(np.float16).T,
    "int8, transposed": ROWS.astype(np.int8).T,
    "bool, transposed": (ROWS > 9).T,
    "no elements": ROWS[:, :0].T,
    "no axes": np.array(3.0, np.float32),
    "a number of NumPy": np.float32(3.0),
    "bfloat16 number": np.array(3.0, ml_dtypes.bfloat16),
    "jax": jnp.asarray(ROWS).T,
    "jax, bfloat16": jnp.asarray(ROWS, jnp.bfloat16).swapaxes(0, 2),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_written_comes_back(name, tmp_path):
    given = ARRAYS[name]
    save_tensors(tmp_path / "x.safetensors", {"before": ROWS, "x": given, "after": ROWS})
    read = load_file(tmp_path / "x.safetensors")
    expected = np.asarray(given)
    assert (read["x"].shape, read["x"].dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(read["x"], expected)
    for other in ("before", "after"):
        np.testing.assert_array_equal(read[other], ROWS)
    assert tensor_bytes({"before": ROWS, "x": given, "after": ROWS}) == (tmp_path / "x.safetensors").read_bytes()


def test_the_layout_on_the_device_does_not_matter(tmp_path):
    """A matrix that lies column by column on its device, as on a GPU after a transposed product."""
    there = Format(Layout(major_to_minor=(1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    given = jax.jit(lambda x: x * 2.0, out_shardings=there)(jnp.asarray(ROWS[0]))
    assert not np.asarray(given).flags.c_contiguous, "the array is as any other: nothing is tried here"
    save_tensors(tmp_path / "x.safetensors", {"x": given})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["x"], ROWS[0] * 2)


def test_metadata_stands_in_the_header(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"x": ROWS}, {"format": "pt"})
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_row_major_arrays_are_written_from_where_they_are(tmp_path):
    """A network may be larger than half the memory."""
    given = np.zeros((1 << 21,), np.float32)
    tracemalloc.start()
    save_tensors(tmp_path / "x.safetensors", {"x": given})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < given.nbytes / 8


def test_a_codec_of_transposed_arrays_is_the_codec(tmp_path):
    rng = np.random.default_rng(0)
    basis = np.asfortranarray(np.linalg.qr(rng.standard_normal((12, 4)))[0].astype(np.float32))
    codec = PatchCodec(rng.standard_normal(12).astype(np.float32), basis, np.ones(4, np.float32))
    codec.save(tmp_path / "codec.safetensors")
    again = PatchCodec.load(tmp_path / "codec.safetensors")
    np.testing.assert_array_equal(again.basis, basis)
