"""Latent datasets are checked before use; iterators are sharded, reproducible and resume at the exact record."""

import json

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.latents import LatentDataset, make_iterator
from cfjax.data.precompute import LatentWriter

RECORDS, SHAPE = 23, (2, 2, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sets") / "tiny"
    latents = np.arange(RECORDS, dtype=np.float32)[:, None, None, None, None] * np.ones((1, *SHAPE))
    with LatentWriter(path, records=RECORDS, latent_shape=SHAPE) as writer:
        writer.append(latents, np.arange(RECORDS) % 3)
        writer.write_text(["a", "b", "c"], np.arange(3)[:, None, None] * np.ones((1, 4, 5)), -np.ones((4, 5)))
    return path


@pytest.fixture
def dataset(folder):
    return LatentDataset(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A private copy that a test may damage."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def indices(iterator, count):
    return [next(iterator)["index_B"].tolist() for _ in range(count)]


def test_batches_are_stacked_and_belong_together(dataset):
    batch = next(make_iterator(dataset, 4, 0))
    assert batch["latents_BFHWC"].shape == (4, *SHAPE) and batch["latents_BFHWC"].dtype == np.float32
    assert batch["text_BSE"].shape == (4, 4, 5) and batch["negative_text_SE"].shape == (4, 5)
    np.testing.assert_array_equal(batch["latents_BFHWC"][:, 0, 0, 0, 0], batch["index_B"])
    np.testing.assert_array_equal(batch["text_BSE"][:, 0, 0], batch["index_B"] % 3)


@pytest.mark.parametrize("threads", [0, 2])
def test_resume_gives_the_very_next_records_also_mid_epoch_and_across_epochs(dataset, threads):
    whole = indices(make_iterator(dataset, 4, 9, num_threads=threads), 20)
    for stop in (0, 3, 11):
        first = make_iterator(dataset, 4, 9, num_threads=threads)
        assert indices(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.get_state()))
        second = make_iterator(dataset, 4, 9, num_threads=threads)
        next(second)
        second.set_state(state)
        assert indices(second, 20 - stop) == whole[stop:]


def test_rows_of_processes_make_up_the_same_batches_whatever_their_number(dataset):
    """Disjoint, complete, in order; a place taken by one process is the place of any other."""
    whole = indices(make_iterator(dataset, 6, 1), 8)
    for parts in ([[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]):
        iterators = [make_iterator(dataset, 6, 1, rows=rows, num_threads=0) for rows in parts]
        for step, batch in enumerate(whole):
            read = [next(iterator)["index_B"] for iterator in iterators]
            assert [batch[row] for rows in parts for row in rows] == np.concatenate(read).tolist()
            if step == 3:
                states = [iterator.get_state() for iterator in iterators]
                assert states == [states[0]] * len(states)
                iterators = [make_iterator(dataset, 6, 1, rows=rows, num_threads=0) for rows in parts]
                for iterator in iterators:
                    iterator.set_state(states[0])
    other = make_iterator(dataset, 6, 1)
    other.set_state(states[0])
    assert indices(other, 4) == whole[4:]


def test_an_epoch_that_ends_inside_a_batch(dataset):
    iterator = make_iterator(dataset, 4, 1, num_epochs=1, drop_remainder=False, num_threads=0)
    assert sorted(index for batch in iterator for index in batch["index_B"].tolist()) == list(range(RECORDS))


def test_an_epoch_visits_every_record_once_and_epochs_differ(dataset):
    flat = [index for (index,) in indices(make_iterator(dataset, 1, 5), 2 * RECORDS)]
    first, second = flat[:RECORDS], flat[RECORDS:]
    assert sorted(first) == sorted(second) == list(range(RECORDS)) and first != second


def test_seed_decides_the_order(dataset):
    orders = [indices(make_iterator(dataset, 4, seed), 5) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert indices(make_iterator(dataset, 4, 0, shuffle=False), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_state_of_other_settings_is_refused(dataset):
    state = make_iterator(dataset, 4, 0).get_state()
    with pytest.raises(UserError, match="batch_size was 4, now 5"):
        make_iterator(dataset, 5, 0).set_state(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 24}, "holds 23 records"),
        ({"rows": [2, 4]}, r"rows \[2, 4\] are not of a batch of 4"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_pipelines_are_refused(dataset, options, message):
    with pytest.raises(UserError, match=message):
        make_iterator(dataset, **({"batch_size": 4, "seed": 0} | options))


def test_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"version": 999}', '{"version": 1}', '{"version": 1, "arrays": {}}']
)
def test_corrupt_manifest_is_named(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        LatentDataset(copy)


def test_arrays_that_contradict_the_manifest_are_named(copy):
    np.save(copy / "latents.npy", np.zeros((RECORDS, 2, 2, 2, 4), np.float16))
    with pytest.raises(UserError, match=r"latents\.npy: holds"):
        LatentDataset(copy)


@pytest.mark.parametrize("name", ["latents.npy", "text.npy", "caption_id.npy", "captions.json"])
def test_truncated_and_missing_files_are_named(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        LatentDataset(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        LatentDataset(copy)


def test_caption_ids_outside_the_table_are_refused(copy):
    np.save(copy / "caption_id.npy", np.full(RECORDS, 3, np.int32))
    with pytest.raises(UserError, match="outside the 3 captions"):
        LatentDataset(copy)
