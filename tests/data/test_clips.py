"""A folder's clips and captions, whatever form the captions have."""

import json

import pytest

from cfjax.core.errors import UserError
from cfjax.data.clips import list_clips


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.webm", "deep/c.GIF", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def listed(folder, **options):
    return {clip.name: clip.caption or clip.fault for clip in list_clips(folder, **options)}


TABLES = {
    "captions.csv": 'file,caption\nb.mp4,"a cat, asleep"\ndeep/c.GIF,ein Haus \u2028 im Süden\n',
    "captions.jsonl": '{"file": "b.mp4", "caption": "a cat, asleep"}\n\n'
    '{"file": "deep/c.GIF", "caption": "ein Haus \u2028 im Süden"}\n',
    "captions.json": json.dumps({"b.mp4": "a cat, asleep", "deep/c.GIF": "ein Haus \u2028 im Süden"}),
    "metadata.csv": '\ufeffseed,file_name,text\n1,b.mp4,"a cat, asleep"\n2,./deep/c.GIF,ein Haus \u2028 im Süden\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_says_the_same(folder, name):
    (folder / name).write_text(TABLES[name], encoding="utf-8")
    (folder / "a.txt").write_text("from beside\n")
    assert listed(folder) == {
        "a.webm": "from beside",
        "b.mp4": "a cat, asleep",
        "deep/c.GIF": "ein Haus \u2028 im Süden",
    }
    assert [clip.name for clip in list_clips(folder)] == ["a.webm", "b.mp4", "deep/c.GIF"]


def test_a_table_may_lie_elsewhere(folder, tmp_path_factory):
    table = tmp_path_factory.mktemp("tables") / "mine.csv"
    table.write_text("path,prompt\nb.mp4,mine\n")
    assert listed(folder, captions=table)["b.mp4"] == "mine"


def test_what_cannot_be_used_says_why(folder):
    (folder / "a.txt").write_text("  \n")
    (folder / "captions.csv").write_text("file,caption\nb.mp4,one\nb.mp4,two\nlost.mp4,three\n")
    faults = [(clip.name, clip.fault.partition(":")[0]) for clip in list_clips(folder)]
    assert faults == [
        ("a.webm", "no caption"),
        ("b.mp4", ""),
        ("b.mp4", "named twice"),
        ("deep/c.GIF", "no caption"),
        ("lost.mp4", "missing"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "clip,caption\nb.mp4,x\n", r"captions\.csv, line 2: needs one of the columns file"),
        ("captions.csv", "file,path,caption\nb.mp4,b.mp4,x\n", "needs one of the columns file"),
        ("captions.jsonl", '{"file": "b.mp4", "caption": "x"}\n{"file"', r"captions\.jsonl, line 2: no JSON"),
        ("captions.jsonl", "[1]", "expected an object, found list"),
        ("captions.json", "{", "no JSON"),
    ],
)
def test_a_broken_table_is_named(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        list_clips(folder)


def test_no_folder_no_clips_no_table_of_that_kind(folder, tmp_path_factory):
    with pytest.raises(UserError, match="no such folder"):
        list_clips(folder / "nowhere")
    with pytest.raises(UserError, match="no clips in it"):
        list_clips(tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match=r"use a \.csv"):
        list_clips(folder, captions=folder / "notes.md")
