"""Costs of opening a Wan world."""

import numpy as np

from cfjax.models.text_cache import TextCache
from cfjax.worlds import wan as wan_world
from cfjax.worlds.wan import WanWorld


def test_the_cache_is_opened_once_however_often_a_caption_is_asked_for(tmp_path, monkeypatch):
    """Opening it reads the tokenizer, a second for umT5's: more than all else that a known caption costs."""
    TextCache(tmp_path, "f", 8).put_many(["a", "b"], np.ones((2, 8, 4), np.float32))
    opened = []
    monkeypatch.setattr(
        wan_world, "open_cache", lambda path, folder, length: opened.append(path) or TextCache(folder, "f", length)
    )
    world = WanWorld(tmp_path, None, None, 8, 4, "b", 16.0, text_cache=str(tmp_path))
    for captions in (["a"], ["b"], ["a", "b"]):
        assert world.encode_prompts(captions).shape == (len(captions), 8, 4)
    assert world.negative_text_SE().shape == (8, 4)
    assert len(opened) == 1
