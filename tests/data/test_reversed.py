"""The captions of clips that are played backwards, beside their own."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.latents import make_iterator
from cfjax.data.reversed import backwards, encoded, joined


class Captions:
    """A set of prompts; a caption's rows say its letters."""

    path, manifest, has_latents, latent_shape, trajectory_points = "set", {}, True, (1, 1, 1, 1), 0
    negative_text_SE, text_shape = np.zeros((1, 9), np.float32), (1, 9)

    def __init__(self, *captions: str) -> None:
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, index: int) -> str:
        return self.captions[index]

    def __getitem__(self, index: int):
        text = letters([self.captions[index]])[0]
        return {"latents_FHWC": np.ones((1, 1, 1, 1)), "text_SE": text, "index": np.int32(index)}


def letters(captions):
    return np.array([[[float(ord(c)) for c in caption.ljust(9)[:9]]] for caption in captions], np.float32)


def test_a_caption_played_backwards_turns_its_directions_round():
    assert backwards("a red circle moving left") == "a red circle moving right"
    assert backwards("a left-handed cat going up then down") == "a left-handed cat going down then up"


def test_batches_hold_both_captions():
    dataset = encoded(Captions("go up", "go left", "go up"), letters)
    batch = next(make_iterator(dataset, 3, 0, shuffle=False))
    expected = letters(["go down", "go right", "go down"])
    np.testing.assert_array_equal(batch["reversed_text_BSE"], expected)
    np.testing.assert_array_equal(batch["text_BSE"], letters(["go up", "go left", "go up"]))


def test_a_dataset_of_reversed_captions_is_joined_by_record():
    dataset = joined(Captions("a", "b"), Captions("a backwards", "b backwards"))
    np.testing.assert_array_equal(dataset[1]["reversed_text_SE"], letters(["b backwards"])[0])
    with pytest.raises(UserError, match=r"data.reversed_name: set holds 1 caption"):
        joined(Captions("a", "b"), Captions("a"))
