"""Streamed checkpoints: like any other to read, written and read back part by part, nothing left behind on failure."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.training.checkpoint import CheckpointStore, load_role, open_role, read_meta, stored_roles
from cfjax.training.streamed import write_streamed


def lazy(array: np.ndarray, stacked: bool = False) -> LazyArray:
    parts = tuple((lambda x=x: x) for x in (array if stacked else [array]))
    return LazyArray(array.shape, array.dtype, parts, stacked)


def random(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


KERNEL, SCALE = random((3, 4, 5)), random((7,), ml_dtypes.bfloat16)
ARRAYS = {
    "params/student/blocks/kernel": lazy(KERNEL, stacked=True),
    "params/student/scale": lazy(SCALE),
    "ema/student/scale": lazy(SCALE),
    "params/critic/scale": lazy(SCALE),
}


def test_it_reads_like_any_other(tmp_path):
    write_streamed(tmp_path / "run", ARRAYS, {"stage": "dmd", "models": {"student": {"dim": 4}}})
    assert read_meta(tmp_path / "run") == {"stage": "dmd", "models": {"student": {"dim": 4}}, "step": 0}
    assert stored_roles(tmp_path / "run") == [("critic", False), ("student", False), ("student", True)]
    template = {"blocks": {"kernel": jnp.zeros((3, 4, 5))}, "scale": jnp.zeros((7,), jnp.bfloat16)}
    loaded = load_role(tmp_path / "run", "student", template, stages=("dmd",))
    np.testing.assert_array_equal(loaded["blocks"]["kernel"], KERNEL)
    np.testing.assert_array_equal(loaded["scale"], SCALE)
    with pytest.raises(UserError, match="exists"):
        write_streamed(tmp_path / "run", ARRAYS, {"stage": "dmd"})


def test_and_back_layer_by_layer(tmp_path):
    write_streamed(tmp_path, ARRAYS, {"stage": "dmd"})
    read = open_role(tmp_path, "student")
    assert read["blocks/kernel"].stacked and len(read["blocks/kernel"].parts) == 3
    np.testing.assert_array_equal(read["blocks/kernel"].read(), KERNEL)
    assert read["scale"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read["scale"].read(), SCALE)
    with pytest.raises(UserError, match="holds no 'ema/critic'"):
        open_role(tmp_path, "critic", ema=True)
    with pytest.raises(UserError, match="holds stage 'dmd', expected 'ar_diffusion'"):
        open_role(tmp_path, "student", stages=("ar_diffusion",))


def test_a_trained_checkpoint_is_read_so_too(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, {"params": {"student": {"kernel": jnp.asarray(KERNEL)}}}, {}, {"stage": "dmd"})
    store.close()
    (kernel,) = open_role(tmp_path, "student").values()
    np.testing.assert_array_equal([read() for read in kernel.entries()], KERNEL)


def test_nothing_is_left_when_a_part_cannot_be_read(tmp_path):
    def broken() -> np.ndarray:
        raise UserError("shard 2 is cut short")

    arrays = {**ARRAYS, "params/student/x": LazyArray((2, 3), np.dtype(np.float32), (broken,))}
    with pytest.raises(UserError, match="shard 2 is cut short"):
        write_streamed(tmp_path / "run", arrays, {"stage": "dmd"})
    assert not list((tmp_path / "run").iterdir())
