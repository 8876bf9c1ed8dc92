"""Lists of prompts that users have: their formats, and clips by them."""

import hashlib
import json
from pathlib import Path

import pytest

from cfjax.core.errors import UserError
from cfjax.evaluation.clip_identity import Identity
from cfjax.evaluation.clip_summary import VIDEOS, load_scored
from cfjax.evaluation.prompt_lists import apply_list, read_prompt_list
from tests.evaluation.test_scorers import evaluate, system

FULL = [
    {"prompt_en": "A cat, sitting.", "dimension": ["color", "scene"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a dog", "dimension": "scene"},
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("movie_gen.txt", "A cat, sitting.\n\na dog\n"),
        ("demos.txt", "A cat, sitting.\r\na dog"),
        ("VBench_full_info.json", json.dumps(FULL)),
        ("list.json", json.dumps(["A cat, sitting.", "a dog"])),
        ("list.csv", 'prompt,seed\n"A cat, sitting.",1\na dog,2\n'),
        ("list.jsonl", '{"text": "A cat, sitting."}\n{"text": "a dog"}\n'),
    ],
)
def test_lists_of_the_family_are_read(name, text, tmp_path):
    (tmp_path / name).write_text(text, newline="")
    listed = read_prompt_list(str(tmp_path / name))
    assert listed.prompts == ("A cat, sitting.", "a dog")
    assert listed.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert listed.dimensions == ((("color", "scene"), ("scene",)) if name.startswith("VBench") else ())


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.txt", "\n", "no prompts in it"),
        ("a.json", '[{"name": "a cat"}]', "no list of prompts: it has name, and one column must be prompt"),
        ("a.json", '{"results": [1', "no JSON"),
        ("a.json", '[{"prompt_en": "a cat", "dimension": 3}]', "dimension is 3; VBench's are lists of names"),
        ("a.json", '[{"prompt_en": 3}]', "3 is no text"),
        ("a.mp4", "x", "no table of a known kind"),
        (".", "", "no such file; beside --config.videos"),
    ],
)
def test_a_wrong_file_is_one_line(name, text, line, tmp_path):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as told:
        read_prompt_list(str(tmp_path / name))
    assert line in str(told.value) and "\n" not in str(told.value)


def test_extended_prompts_become_the_list_s(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    (tmp_path / "b.txt").write_text("A fluffy cat sits, at dusk.\nA dog runs along the shore.\n")
    listed = read_prompt_list(f"{tmp_path / 'a.txt'}|{tmp_path / 'b.txt'}")
    one = Identity("a dog runs along the shore", 3)
    assert apply_list(listed, ["x.mp4"], [one]).identity == [Identity("a dog", 3)]
    (tmp_path / "b.txt").write_text("A fluffy cat\n")
    with pytest.raises(UserError, match="2 prompts and 1 extended one; both lists need the same"):
        read_prompt_list(f"{tmp_path / 'a.txt'}|{tmp_path / 'b.txt'}")
    with pytest.raises(UserError, match="name a file, or a list and its extended one"):
        read_prompt_list("a.txt|")


def test_clips_are_found_by_the_list(tmp_path, capsys):
    videos = system(tmp_path / "v", {"000_a_cat_sitting_seed0": 0, "001_a_cow_seed0": 4})
    list_file: Path = tmp_path / "list.json"
    list_file.write_text(json.dumps(FULL))
    assert evaluate(tmp_path / "w", videos=videos, prompts=list_file) == 0
    output = capsys.readouterr().out
    assert "1 clip of no prompt in the list: 001_a_cow_seed0.mp4" in output
    assert "1 of 2 prompts without a clip: 'a dog'" in output
    record = json.loads((tmp_path / "w" / VIDEOS).read_text())["prompts"]
    assert record == {
        "file": str(list_file), "sha256": hashlib.sha256(list_file.read_bytes()).hexdigest(), "prompts": 2,
        "clips": 1, "prompts_with_clips": 1,
    }  # fmt: skip
    assert [one.prompt for one in load_scored(tmp_path / "w").identity] == ["A cat, sitting.", "a_cow"]
    list_file.write_text('["a horse"]')
    assert evaluate(tmp_path / "w", videos=videos, prompts=list_file) == 2
    assert "no clip is of a prompt in it; the first clip's is 'a_cat_sitting'" in capsys.readouterr().err
