"""Prompts, seeds and file names; pictures, videos and latents to begin with."""

import json

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cfjax.core.errors import UserError
from cfjax.data.captions import Columns
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
    rows = [{"prompt": "a cat", "seed": 5, "image": "/x.png"}, {"prompt": "a dog"}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    requests = read_requests("", str(lines), image="y.png", videos=2)
    assert pairs(requests) == [("a cat", 5), ("a cat", 6), ("a dog", 0), ("a dog", 1)]
    assert [request.image for request in requests] == ["/x.png", "/x.png", "y.png", "y.png"]
    table.write_text('prompt,seed\n"a cat, surfing",9\na dog,\n')
    assert pairs(read_requests("", str(table))) == [("a cat, surfing", 9), ("a dog", 0)]


def test_pictures_are_found_beside_the_file_and_then_here(tmp_path, monkeypatch):
    job, here = tmp_path / "job", tmp_path / "here"
    for folder, names in ((job, ("both.png", "beside.png")), (here, ("both.png", "here.png"))):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    monkeypatch.chdir(here)
    names = ["both.png", "beside.png", "here.png", "none.png", str(here / "both.png")]
    (job / "a.jsonl").write_text("".join(json.dumps({"prompt": "a", "image": name}) + "\n" for name in names))
    found = [request.image for request in read_requests("", str(job / "a.jsonl"))]
    assert found == [*(str(job / n) for n in names[:2]), "here.png", str(job / "none.png"), names[4]]


@pytest.mark.parametrize("seed", ["42.0", 42.0, "42", 42, "4.2e1", " 42 "])
def test_a_seed_may_be_what_a_spreadsheet_makes_of_it(tmp_path, seed):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "seed": seed}))
    assert pairs(read_requests("", str(tmp_path / "a.jsonl"))) == [("a", 42)]


def test_a_published_table_is_read_by_the_column_of_its_prompts(tmp_path):
    file = tmp_path / "VBench_full_info.json"
    file.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["color"]}, {"prompt_en": "a dog"}]))
    with pytest.raises(UserError, match=r"entry 1: unknown column 'dimension'; .*--config.prompt_column=prompt_en"):
        read_requests("", str(file))
    assert pairs(read_requests("", str(file), columns=Columns(caption="prompt_en"))) == [("a cat", 0), ("a dog", 0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n\n", "no prompts"),
        ("a.yaml", "- a", r"no table of a known kind; use \.txt, \.csv"),
        ("a.jsonl", '{"prompt": "a"}\n{', "line 2: no JSON"),
        ("a.jsonl", '{"prompt": "a", "cfg": 3}', "line 1: unknown column 'cfg'; prompt, seed and image are read"),
        ("a.jsonl", '{"prompt": 3}', "line 1: no caption: 3 is no text"),
        ("a.jsonl", '{"prompt": ["a", "b"]}', "line 1: several captions: 2; choose with"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "line 2: no caption: it is empty"),
        ("a.csv", "title\na cat\n", "line 2: needs one of the columns caption"),
        ("a.csv", "prompt,seed\na cat,x\n", "line 2: seed='x' is no whole number"),
        ("a.csv", "prompt,seed\na cat,4.5\n", "line 2: seed='4.5' is no whole number"),
        ("a.csv", "prompt,seed\na cat,inf\n", "line 2: seed='inf' is no whole number"),
        ("a.csv", "prompt,seed\na cat\n", "line 2: 1 fields for 2 columns"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed=True is no whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed=-1: use 0 to 4294967295"),
    ],
)
def test_broken_prompt_files_are_reported(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_requests("", str(tmp_path / name))


def test_missing_files_are_reported():
    for read in (lambda: read_requests("", "none.txt"), lambda: read_image("none.png", 8, 8)):
        with pytest.raises(UserError, match="none"):
            read()
    with pytest.raises(UserError, match=r"none\.mp4"):
        video_frames("none.mp4", 16)
    with pytest.raises(UserError, match=r"none\.npz"):
        read_latents("none.npz")


def test_names_are_safe_and_differ_between_prompts():
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


LATENTS = np.random.default_rng(0).standard_normal((3, 2, 2, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_latents_are_one_array_of_any_float(tmp_path, dtype):
    """NumPy stores bfloat16 as two plain bytes."""
    stored = LATENTS.astype(dtype)
    np.savez(tmp_path / "a.npz", latents=stored)
    np.testing.assert_array_equal(read_latents(tmp_path / "a.npz"), stored.astype(np.float32))
    save_file({"latents": stored}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_latents(tmp_path / "a.safetensors"), stored.astype(np.float32))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": LATENTS, "b": LATENTS}, r"needs one array \[F, H, W, C\], found a \(3, 2, 2, 4\), b"),
        ({"a": LATENTS[0]}, r"needs one array \[F, H, W, C\], found a \(2, 2, 4\)"),
        ({"a": LATENTS.astype(np.int32)}, "holds int32, no floating-point latents"),
        ({"a": np.zeros((1, 1, 1, 1), "V1")}, r"holds \|V1, no floating-point latents"),
        ({"a": LATENTS * np.nan}, "not finite"),
        ({"a": np.array([[[[None]]]], object)}, "cannot read the latents"),
    ],
)
def test_other_latents_are_reported(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_latents(tmp_path / "a.npz")


def test_a_cut_archive_of_latents_is_reported(tmp_path):
    np.savez(tmp_path / "a.npz", a=LATENTS)
    data = (tmp_path / "a.npz").read_bytes()
    for part in (0, 10, len(data) // 2):
        (tmp_path / "a.npz").write_bytes(data[:part])
        with pytest.raises(UserError, match=r"a\.npz'?: cannot read the latents"):
            read_latents(tmp_path / "a.npz")
