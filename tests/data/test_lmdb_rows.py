"""The reference's LMDB layouts, against what its own dataset classes return (their rule, written out here)."""

import pickle

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.lmdb_files import is_lmdb
from cfjax.data.lmdb_rows import LmdbRows
from tests.data.lmdbs import damage, rows_of, write_lmdb

PROMPTS = ["eins", "zwei  ", "三"]


def channels_last(torch_array):
    """[..., C, H, W] to [..., H, W, C]."""
    return np.moveaxis(torch_array, -3, -1)


@pytest.mark.parametrize("entries", [1, 6])
def test_clean_and_ode_sets(tmp_path, entries):
    rows = rows_of(3, entries)
    opened = LmdbRows(write_lmdb(tmp_path / "set", rows, PROMPTS))
    assert len(opened) == 3 and opened.latent_shape == (3, 4, 4, 16)
    assert opened.trajectory_points == {1: 0, 6: 5}[entries]
    for i in range(3):
        arrays = opened.arrays(i)
        np.testing.assert_array_equal(arrays["latents"], channels_last(rows[i, -1]))
        assert opened.caption(i) == PROMPTS[i] and (entries == 6) == ("trajectory" in arrays)
        if entries == 6:  # four levels and the ODE's end; the clean clip is the last
            np.testing.assert_array_equal(arrays["trajectory"], channels_last(rows[i, :5]))


def test_rows_of_four_axes_are_clean_latents(tmp_path):
    rows = rows_of(3, 1)
    opened = LmdbRows(write_lmdb(tmp_path / "set", rows[:, 0], PROMPTS))
    np.testing.assert_array_equal(opened.arrays(1)["latents"], channels_last(rows[1, 0]))
    assert opened.trajectory_points == 0


def test_pairs_without_ground_truth_end_in_the_clip(tmp_path):
    rows = rows_of(3, 5)
    opened = LmdbRows(write_lmdb(tmp_path / "set", rows, PROMPTS), ground_truth=False)
    assert opened.trajectory_points == 5
    np.testing.assert_array_equal(opened.arrays(2)["latents"], channels_last(rows[2, 4]))
    np.testing.assert_array_equal(opened.arrays(2)["trajectory"], channels_last(rows[2]))


def test_a_folder_of_lmdbs_is_one_set_in_the_order_of_names(tmp_path):
    first, second = rows_of(2, 1, 1), rows_of(3, 1, 2)
    write_lmdb(tmp_path / "set_1", second, ["c", "d", "e"])
    write_lmdb(tmp_path / "set_0", first, ["a", "b"])
    opened = LmdbRows(tmp_path)
    assert [opened.caption(i) for i in range(5)] == list("abcde")
    np.testing.assert_array_equal(opened.arrays(4)["latents"], channels_last(second[2, 0]))
    assert opened.locate(3) == (tmp_path / "set_1", 1)
    with pytest.raises(IndexError):
        opened.caption(5)


def test_a_set_that_lost_its_shape_is_read_with_one_given(tmp_path):
    """Quirk Q32: when the last file added nothing, latents_shape is the number of rows alone."""
    rows = rows_of(3, 6)
    path = write_lmdb(tmp_path / "set", rows, PROMPTS, shape="3")
    with pytest.raises(UserError, match="give latent_shape"):
        LmdbRows(path)
    opened = LmdbRows(path, fallback_shape=(3, 4, 4, 16))
    np.testing.assert_array_equal(opened.arrays(2)["latents"], channels_last(rows[2, -1]))
    with pytest.raises(UserError, match="no fp16 latent of"):
        LmdbRows(path, fallback_shape=(5, 4, 4, 16))


def test_readers_share_a_file_and_travel(tmp_path):
    path = write_lmdb(tmp_path / "set", rows_of(3, 1), PROMPTS)
    first, second = LmdbRows(path), LmdbRows(path)
    assert first.caption(0) == second.caption(0) == pickle.loads(pickle.dumps(first)).caption(0)


def test_what_is_none_is_reported(tmp_path):
    assert not is_lmdb(tmp_path) and not is_lmdb(tmp_path / "none")
    with pytest.raises(UserError, match="no LMDB here"):
        LmdbRows(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"no database")
    with pytest.raises(UserError, match="cannot read this LMDB"):
        LmdbRows(tmp_path / "broken")
    path = write_lmdb(tmp_path / "set", rows_of(1, 1), ["a"])
    damage(path, "latents_shape", None)
    with pytest.raises(UserError, match="no key latents_shape"):
        LmdbRows(path)
    write_lmdb(tmp_path / "mixed" / "a", rows_of(1, 1), ["a"])
    write_lmdb(tmp_path / "mixed" / "b", rows_of(1, 6), ["b"])
    with pytest.raises(UserError, match="rows of different shapes"):
        LmdbRows(tmp_path / "mixed")
