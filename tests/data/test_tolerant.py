"""A few broken records do not end a run: reported once with file and index, counted, replaced, up to a fraction."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.ingest import PromptSource, ingest
from cfjax.data.latents import make_iterator
from cfjax.data.parts import SetWriter
from cfjax.data.records import Layout, RecordDataset
from cfjax.data.tolerant import TolerantDataset

SHAPE = (1, 2, 2, 8)


class Numbers:
    def __len__(self):
        return 20

    def name(self, index):
        return f"n{index}"

    def caption(self, index):
        return str(index)

    def load(self, index):
        return {"latents": np.full(SHAPE, index, np.float32)}


@pytest.fixture
def path(tmp_path):
    """Twenty records in parts of five; the bytes of records 7 and 8 are damaged on disk."""
    folder = tmp_path / "set"
    layout = Layout(SHAPE, 1, 4, dtype="float32")
    writer = SetWriter(folder, items=20, part_items=5, layout=layout, job={}, description={"source": {}})
    text = lambda captions: np.ones((len(captions), 1, 4), np.float32)
    writer.write_negative(text(["no"])[0])
    ingest(writer, Numbers(), encode_text=text, batch_size=5, progress=False)
    part = sorted(folder.glob("*.array_record"))[1]
    data = bytearray(part.read_bytes())
    for index in (7, 8):
        place = bytes(data).index(f'"name": "n{index}"'.encode())
        data[place] ^= 0xFF
    part.write_bytes(data)
    return folder


def test_broken_records_are_reported_once_and_replaced(path):
    lines = []
    dataset = TolerantDataset(RecordDataset(path), 0.1, lines.append)
    for _ in range(2):
        seen = [int(dataset[i]["latents_FHWC"][0, 0, 0, 0]) for i in range(20)]
        assert seen == [0, 1, 2, 3, 4, 5, 6, 9, 9, 9, *range(10, 20)]
    assert [int(dataset[i]["index"]) for i in (7, 8)] == [9, 9]
    assert sorted(dataset.corrupt) == [7, 8] and len(lines) == 2
    part = sorted(path.glob("*.array_record"))[1]
    assert str(part) in lines[0] and "record 2" in lines[0] and lines[0].endswith("left out (1 of at most 2)")
    batches = make_iterator(TolerantDataset(RecordDataset(path), 0.1, lines.append), 4, 0, num_epochs=1)
    assert sum(len(batch["index_B"]) for batch in batches) == 20  # batches stay whole


def test_more_than_the_fraction_is_an_error(path):
    dataset = TolerantDataset(RecordDataset(path), 0.05, lambda line: None)
    with pytest.raises(UserError, match=r"2 of 20 records are broken, more than data.max_corrupt allows"):
        [dataset[i] for i in range(20)]
    with pytest.raises(UserError, match="record 2"):
        RecordDataset(path)[7]


@pytest.mark.parametrize("name", ["latents_FHWC", "trajectory_JFHWC", "text_SE"])
def test_numbers_that_are_not_finite_count_as_broken(name):
    class Nan:
        path, manifest, negative_text_SE, has_latents = "set", {}, np.zeros((1, 4)), True

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"latents_FHWC": np.ones(SHAPE), name: np.full(SHAPE, [np.nan, 1.0][index]), "index": index}

    dataset = TolerantDataset(Nan(), 0.5, lambda line: None)
    assert dataset[0]["index"] == 1 and dataset.corrupt == {
        0: f"set, record 0: {name} holds numbers that are not finite"
    }
    with pytest.raises(UserError, match=r"max_corrupt=1\.0"):
        TolerantDataset(Nan(), 1.0)


def test_prompts_alone_are_whole_though_their_latents_are_nan(tmp_path):
    layout = Layout(SHAPE, 1, 4, kept_in="none")
    writer = SetWriter(tmp_path, items=2, part_items=2, layout=layout, job={}, description={"source": {}})
    text = lambda captions: np.ones((len(captions), 1, 4), np.float32)
    writer.write_negative(text(["no"])[0])
    prompts = tmp_path.parent / "prompts.txt"
    prompts.write_text("a\nb\n")
    ingest(writer, PromptSource.read(prompts), encode_text=text, batch_size=2, progress=False)
    dataset = TolerantDataset(RecordDataset(tmp_path), 0.0)
    assert [int(dataset[i]["index"]) for i in range(2)] == [0, 1] and not dataset.corrupt
    assert np.isnan(dataset[0]["latents_FHWC"]).all()
