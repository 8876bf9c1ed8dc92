"""Latent datasets are checked before use; iterators are sharded, reproducible and resume at the exact record."""

import json
from itertools import chain

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


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_of_another_size_go_on_with_the_very_next_record(dataset, threads):
    """Across epochs, from places that no multiple of the new size is, and through several changes."""
    whole = [index for (index,) in indices(make_iterator(dataset, 1, 9), 6 * RECORDS)]
    state, read = None, []
    for size, batches in [(8, 1), (4, 3), (16, 1), (8, 2), (5, 3), (23, 1), (1, 2), (7, 4)]:
        iterator = make_iterator(dataset, size, 9, num_threads=threads)
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        read += [index for batch in indices(iterator, batches) for index in batch]
        state = iterator.get_state()
    assert len(read) > 4 * RECORDS and read == whole[: len(read)]


def test_processes_deal_out_the_batches_of_another_size_too(dataset):
    first = make_iterator(dataset, 5, 1)
    indices(first, 3)
    alone = make_iterator(dataset, 6, 1)
    alone.set_state(first.get_state())
    whole = indices(alone, 5)
    for parts in ([[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]]):
        iterators = [make_iterator(dataset, 6, 1, rows=rows, num_threads=0) for rows in parts]
        for iterator in iterators:
            iterator.set_state(first.get_state())
        for batch in whole:
            read = [next(iterator)["index_B"].tolist() for iterator in iterators]
            assert [[batch[row] for row in rows] for rows in parts] == read
        assert [iterator.get_state() for iterator in iterators] == [alone.get_state()] * 2


def test_the_rest_of_a_last_epoch_is_read_in_batches_of_another_size(dataset):
    first = make_iterator(dataset, 4, 1, num_epochs=1)
    read = [index for batch in indices(first, 4) for index in batch]
    second = make_iterator(dataset, 5, 1, num_epochs=1, drop_remainder=False)
    second.set_state(first.get_state())
    rest = [batch["index_B"].tolist() for batch in second]
    assert [len(batch) for batch in rest] == [5, 2] and sorted([*read, *chain(*rest)]) == list(range(RECORDS))


def test_a_place_that_an_older_version_saved_is_the_same_place(dataset):
    """As cfjax 0.1.0 wrote it after seven batches of four, with the batches that it read from there (grain 0.2.18)."""
    settings = {"records": RECORDS, "batch_size": 4, "seed": 9, "shuffle": True}
    state = {"position": {"next_index": 7}, "settings": settings}
    expected = [[14, 9, 22, 17], [18, 16, 2, 5], [1, 21, 11, 10], [7, 15, 0, 6], [13, 4, 18, 20], [14, 21, 1, 4]]
    for size in (4, 8, 3):
        iterator = make_iterator(dataset, size, 9)
        iterator.set_state(state)
        read = [index for batch in indices(iterator, 24 // size) for index in batch]
        assert read == [*chain(*expected)]


@pytest.mark.parametrize(
    ("saved", "output"),
    [
        ({"seed": 1}, "seed 1 -> 0"),
        ({"shuffle": False}, "shuffle False -> True"),
        ({"records": 22}, "records 22 -> 23"),
    ],
)
def test_another_order_is_refused_or_begins_at_its_first_record(dataset, saved, output):
    first, settings = make_iterator(dataset, 4, 0), {"batch_size": 4, "seed": 0}
    indices(first, 3)
    state = first.get_state()
    state["order"] |= saved
    with pytest.raises(UserError, match=f"another order .*{output}; set it back, or .*accept_changes=True"):
        make_iterator(dataset, **settings).set_state(state)
    lines: list[str] = []
    iterator = make_iterator(dataset, **settings, accept_changes=True, log=lines.append)
    iterator.set_state(state)
    assert lines == [f"the data begins a new order at its first record: {output}"]
    assert indices(iterator, 8) == indices(make_iterator(dataset, **settings), 8)


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
