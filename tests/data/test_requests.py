"""Prompts, seeds and file names; pictures, videos and latents to begin with."""

import json

import numpy as np
import pytest
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.data.requests import (
    Request,
    read_image,
    read_latents,
    read_requests,
    read_video_end,
    video_frames,
)
from cfjax.evaluation.video import write_mp4


def pairs(requests):
    return [(request.prompt, request.seed) for request in requests]


def test_prompts_of_the_flag():
    assert pairs(read_requests("a cat | a dog|", "", seed=3, videos=2)) == [
        ("a cat", 3),
        ("a cat", 4),
        ("a dog", 3),
        ("a dog", 4),
    ]
    assert pairs(read_requests("a cat", "", seeds=(7, 1), videos=5)) == [("a cat", 7), ("a cat", 1)]


def test_prompt_files(tmp_path):
    text, lines, table = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.csv"
    text.write_text("a cat  \n\n一只猫\n", encoding="utf-8")
    assert pairs(read_requests("ignored", str(text))) == [("a cat", 0), ("一只猫", 0)]
    rows = [{"prompt": "a cat", "seed": 5, "image": "x.png"}, {"prompt": "a dog"}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    requests = read_requests("", str(lines), image="y.png", videos=2)
    assert pairs(requests) == [("a cat", 5), ("a cat", 6), ("a dog", 0), ("a dog", 1)]
    assert [request.image for request in requests] == ["x.png", "x.png", "y.png", "y.png"]
    table.write_text('prompt,seed\n"a cat, surfing",9\na dog,\n')
    assert pairs(read_requests("", str(table))) == [("a cat, surfing", 9), ("a dog", 0)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "\n\n", "no prompts"),
        ("a.yaml", "- a", "use a .txt, .jsonl or .csv file"),
        ("a.jsonl", '{"prompt": "a"}\n{', "line 2: not JSON"),
        ("a.jsonl", '{"prompt": "a", "cfg": 3}', "row 1: needs a prompt, and may have seed and image; nothing else"),
        ("a.jsonl", '{"prompt": 3}', "row 1: needs a prompt"),
        ("a.csv", "text\na cat\n", "row 1: needs a prompt"),
        ("a.csv", "prompt,seed\na cat,x\n", "row 1: seed='x' is no whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', "seed=-1: use 0 to 4294967295"),
    ],
)
def test_broken_prompt_files_are_told(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        read_requests("", str(tmp_path / name))


def test_missing_files_are_told():
    for read in (lambda: read_requests("", "none.txt"), lambda: read_image("none.png", 8, 8)):
        with pytest.raises(UserError, match="none"):
            read()
    with pytest.raises(UserError, match=r"none\.mp4"):
        video_frames("none.mp4", 16)
    with pytest.raises(UserError, match=r"none\.npz"):
        read_latents("none.npz")


def test_names_are_safe_and_tell_prompts_apart():
    assert Request("A cat, surfing!", 3).slug() == "a_cat_surfing_seed3"
    chinese = [Request(text, 0).slug() for text in ("一只猫", "一只狗", "../一只狗")]
    long = [Request("word " * 30 + end, 0).slug() for end in ("a", "b")]
    for slugs in (chinese, long):
        assert len(set(slugs)) == len(slugs)
    assert all(slug.isascii() and "/" not in slug and len(slug) < 80 for slug in chinese + long)


def test_a_picture_is_cut_to_cover_or_stretched(tmp_path):
    """A wide picture, red in its outer quarters and blue within: cover keeps the middle, stretch keeps all."""
    picture = np.zeros((20, 80, 3), np.uint8)
    picture[:, :20, 0] = picture[:, 60:, 0] = 255
    picture[:, 20:60, 2] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    covered = read_image(tmp_path / "wide.png", 20, 40)
    assert covered.shape == (1, 20, 40, 3) and covered.dtype == np.float32
    np.testing.assert_allclose(covered[0, :, 2:-2].mean(axis=(0, 1)), [-1, -1, 1], atol=0.01)
    stretched = read_image(tmp_path / "wide.png", 20, 40, "stretch")
    np.testing.assert_allclose(stretched[0, 10, [2, 20, 37]], [[1, -1, -1], [-1, -1, 1], [1, -1, -1]], atol=0.01)


def test_the_end_of_a_video(tmp_path):
    """Frame i is grey of level 20 i; 8 per second read at 4 shows every other one, ending with the very last."""
    levels = np.arange(12, dtype=np.uint8) * 20
    write_mp4(tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (12, 16, 32, 3)), fps=8)
    assert (video_frames(tmp_path / "a.mp4", 8), video_frames(tmp_path / "a.mp4", 4)) == (12, 6)
    end = read_video_end(tmp_path / "a.mp4", 3, 16, 32, 8)
    np.testing.assert_allclose((end.mean(axis=(1, 2, 3)) + 1) * 127.5, levels[-3:], atol=2)
    slow = read_video_end(tmp_path / "a.mp4", 2, 16, 32, 4)
    np.testing.assert_allclose((slow.mean(axis=(1, 2, 3)) + 1) * 127.5, levels[[9, 11]], atol=2)
    with pytest.raises(UserError, match="too short: 12 of 13 frames at 8 per second"):
        read_video_end(tmp_path / "a.mp4", 13, 16, 32, 8)


def test_latents_are_one_array(tmp_path):
    latents = np.random.default_rng(0).standard_normal((3, 2, 2, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", latents=latents)
    np.testing.assert_array_equal(read_latents(tmp_path / "a.npz"), latents)
    np.savez(tmp_path / "b.npz", a=latents, b=latents)
    with pytest.raises(UserError, match=r"needs one array \[F, H, W, C\], found a \(3, 2, 2, 4\), b"):
        read_latents(tmp_path / "b.npz")
