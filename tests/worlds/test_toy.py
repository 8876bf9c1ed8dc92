"""Worlds: the same on every machine that loads them, and captions that training never sees."""

from collections import Counter

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.shapes import ShapesConfig, all_captions
from cfjax.worlds.toy import SplitSource, ToyWorld, evaluation_clips, held_out_captions, make_world

SHAPES = ShapesConfig(frames=4)


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return make_world(SHAPES, channels=8, text_length=8)


def test_a_saved_world_is_the_same_world(world, tmp_path):
    world.save(tmp_path / "world")
    again = ToyWorld.load(tmp_path / "world")
    assert again.fingerprint() == world.fingerprint()
    assert again.shapes == world.shapes
    text = ["a red circle moving left"]
    np.testing.assert_allclose(again.text.encode(text), world.text.encode(text), atol=1e-5)


def test_another_world_has_another_fingerprint(world):
    assert make_world(SHAPES, channels=9, text_length=8).fingerprint() != world.fingerprint()


def test_training_never_sees_a_held_out_caption():
    held = set(held_out_captions(SHAPES))
    everything = set(all_captions(SHAPES))
    assert 0.1 * len(everything) < len(held) < 0.3 * len(everything)
    train = {SplitSource(SHAPES, 0, 600)[i]["caption"] for i in range(600)}
    test = {SplitSource(SHAPES, 0, 100, held_out=True)[i]["caption"] for i in range(100)}
    assert train <= everything - held and test <= held
    # every word of a held-out caption is trained on, in other company
    assert {word for text in held for word in text.split()} <= {word for text in train for word in text.split()}


def test_evaluation_covers_each_caption_equally():
    captions = held_out_captions(SHAPES)
    counts = Counter(clip["caption"] for clip in evaluation_clips(SHAPES, 3 * len(captions)))
    assert set(counts) == set(captions) and set(counts.values()) == {3}


def test_records_do_not_depend_on_the_length_or_order():
    a, b = SplitSource(SHAPES, 5, 10), SplitSource(SHAPES, 5, 1000)
    np.testing.assert_array_equal(a[7]["video_PHWC"], b[7]["video_PHWC"])
    with pytest.raises(IndexError):
        a[10]


def test_a_broken_world_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a world"):
        ToyWorld.load(tmp_path)
