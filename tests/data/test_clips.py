"""A folder's clips and captions, whatever form the captions have."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cfjax.core.errors import UserError
from cfjax.data.captions import Columns
from cfjax.data.clips import ClipFile, list_clips, read_listing


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "clips"
    for name in ("b.mp4", "a.webm", "deep/c.GIF", "notes.md"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).touch()
    return root


def listed(folder, **options):
    return {clip.name: clip.caption or clip.fault for clip in list_clips(folder, **options)}


def faults(folder, rows: list[str], **options) -> dict[str, str]:
    """What becomes of the rows of a table that names these files: name -> fault."""
    table = folder.parent / "table.csv"
    table.write_text("file,caption\n" + "".join(f"{row},a cat\n" for row in rows))
    return {clip.name: clip.fault for clip in read_listing(folder, table, **options).clips}


TABLES = {
    "captions.csv": 'file,caption\nb.mp4,"a cat, asleep"\ndeep/c.GIF,ein Haus \u2028 im Süden\n',
    "captions.jsonl": '{"file": "b.mp4", "caption": "a cat, asleep"}\n\n'
    '{"file": "deep/c.GIF", "caption": "ein Haus \u2028 im Süden"}\n',
    "captions.json": json.dumps({"b.mp4": "a cat, asleep", "deep/c.GIF": "ein Haus \u2028 im Süden"}),
    "metadata.json": json.dumps(
        [{"path": "b.mp4", "cap": ["a cat, asleep"]}, {"path": "deep/c.GIF", "cap": ["ein Haus \u2028 im Süden"]}]
    ),
    "metadata.csv": '\ufeffseed,file_name,text\n1,b.mp4,"a cat, asleep"\n2,./deep/c.GIF,ein Haus \u2028 im Süden\n',
    "captions.tsv": "video\tprompt\nb.mp4\ta cat, asleep\ndeep/c.GIF\tein Haus \u2028 im Süden\n",
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
    assert read_listing(folder).table == folder / name


def test_a_table_may_lie_elsewhere(folder, tmp_path_factory):
    table = tmp_path_factory.mktemp("tables") / "mine.csv"
    table.write_text("path,prompt\nb.mp4,mine\n")
    assert listed(folder, captions=table)["b.mp4"] == "mine"


def test_of_two_tables_one_is_chosen(folder):
    for name in ("captions.csv", "metadata.csv"):
        (folder / name).write_text(f"file,caption\nb.mp4,{name}\n")
    with pytest.raises(
        UserError, match=r"captions\.csv and metadata\.csv are both there; choose with --config.captions"
    ):
        list_clips(folder)
    assert listed(folder, captions=folder / "metadata.csv")["b.mp4"] == "metadata.csv"


def test_what_cannot_be_used_says_why(folder):
    (folder / "a.txt").write_text("  \n")
    (folder / "captions.csv").write_text("file,caption\nb.mp4,one\nb.mp4,two\nlost.mp4,three\n,four\n")
    faults = [(clip.name, clip.fault.partition(":")[0]) for clip in list_clips(folder)]
    assert faults == [
        ("a.webm", "no caption"),
        ("b.mp4", ""),
        ("b.mp4", "named twice"),
        ("captions.csv, line 5", "no file name"),
        ("deep/c.GIF", "no caption"),
        ("lost.mp4", "missing"),
    ]


# ---- how tables name files


def test_files_are_found_by_every_usual_name(folder, tmp_path):
    (folder / "disk").symlink_to(tmp_path / "other")
    for name in ("other/d.mp4", "other/deeper/e.mp4", "clips/-9aID.f_1.mkv", "clips/odd.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    for asked, found in {
        "b.mp4": "b.mp4",
        "./deep/../deep/c.GIF": "deep/c.GIF",
        "deep\\c.GIF": "deep/c.GIF",
        "clips/deep/c.GIF": "deep/c.GIF",  # with the folder's own name
        "c.GIF": "deep/c.GIF",  # the only one of that name
        "c": "deep/c.GIF",
        "-9aID.f_1": "-9aID.f_1.mkv",  # an ID, with dots
        str(folder / "b.mp4"): "b.mp4",
        str(folder / "deep" / "c.GIF").replace("/", "\\"): "deep/c.GIF",
        "disk/d.mp4": "disk/d.mp4",
        "d.mp4": "disk/d.mp4",
        "odd.bin": "odd.bin",  # what a table names is tried, whatever it is called
    }.items():
        assert faults(folder, [asked]).get(found) == "", asked


def test_a_table_beside_the_folder_may_name_files_from_where_it_lies(folder, tmp_path):
    (tmp_path / "lists").mkdir()
    (table := tmp_path / "lists" / "t.csv").write_text("file,caption\n../clips/deep/c.GIF,a cat\n")
    assert [clip.name for clip in list_clips(folder, table) if not clip.fault] == ["deep/c.GIF"]


def test_a_file_that_is_there_is_never_called_missing(folder, tmp_path):
    (tmp_path / "else.mp4").touch()
    (folder / "deep" / "b.mp4").touch()
    (folder / "x" / "y").mkdir(parents=True)
    (folder / "x" / "twice.mp4").touch()
    (folder / "x" / "y" / "twice.mp4").touch()
    found = faults(folder, [str(tmp_path / "else.mp4"), "twice.mp4", "x/c.GIF", "B.MP4", "lost.mp4"])
    assert found[str(tmp_path / "else.mp4")].startswith("outside: it is there, but not under")
    assert found["twice.mp4"] == ("ambiguous: 2 files are called so, as x/twice.mp4 and x/y/twice.mp4; name the folder")
    assert found["x/c.GIF"].endswith("is called so; there is deep/c.GIF")
    assert found["B.MP4"].endswith("is called so; there is b.mp4")
    assert found["lost.mp4"].startswith("missing: ") and found["lost.mp4"].endswith("is called so")
    assert faults(folder, ["b.mp4"])["b.mp4"] == ""  # a path is taken before a bare name


def test_linked_folders_are_walked_once(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "a.mp4").touch()
    (tmp_path / "disk" / "a.txt").write_text("a cat")
    (tmp_path / "disk" / "deep" / "back").symlink_to(tmp_path / "disk")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "linked").symlink_to(tmp_path / "disk")
    assert list_clips(tmp_path / "clips") == [ClipFile("linked/a.mp4", "a cat")]


# ---- texts beside the clips


@pytest.mark.parametrize("name", ["b.txt", "b.TXT", "b.mp4.txt", "b.caption", "b.mp4.caption"])
def test_a_caption_beside_a_clip_is_found_by_its_usual_names(folder, name):
    (folder / name).write_bytes("\ufeffein Café\r\n".encode())
    assert listed(folder)["b.mp4"] == "ein Café"


@pytest.mark.parametrize(("encoding", "text"), [("utf-16", "一只猫在冲浪"), ("utf-8-sig", "一只猫在冲浪")])
def test_a_caption_with_a_byte_order_mark_is_read(folder, encoding, text):
    (folder / "b.txt").write_bytes(text.encode(encoding))
    assert listed(folder)["b.mp4"] == text


@pytest.mark.parametrize(("encoding", "text"), [("gbk", "一只猫在冲浪"), ("cp1252", "Café"), ("utf-16-le", "a cat")])
def test_a_caption_of_another_encoding_is_reported_or_read_by_name(folder, encoding, text):
    (folder / "b.txt").write_bytes(text.encode(encoding))
    assert listed(folder)["b.mp4"].startswith("unreadable caption: b.txt: it ")
    assert {c.name: c.caption for c in read_listing(folder, encoding=encoding).clips}["b.mp4"] == text.replace(
        "a cat", "a cat" if encoding == "utf-16-le" else text
    )


def test_two_captions_beside_a_clip_must_agree(folder):
    (folder / "b.txt").write_text("a cat")
    (folder / "b.mp4.txt").write_text("a cat\n")
    assert listed(folder)["b.mp4"] == "a cat"
    (folder / "b.caption").write_text("a dog")
    assert listed(folder)["b.mp4"] == "several captions: b.mp4.txt and b.txt and b.caption differ; remove one"


# ---- what else lies there


def test_every_file_that_is_passed_over_is_counted(folder):
    for name in ("b.txt", "lonely.txt", "deep/x.jpg", "y.jpg", "LICENSE", "._b.mp4", ".DS_Store", "captions.csv"):
        (folder / name).write_text("file,caption\na.webm,a cat\n")
    listing = read_listing(folder)
    assert [clip.name for clip in listing.clips] == ["a.webm", "b.mp4", "deep/c.GIF"]
    assert listing.passed_over == Counter({".jpg": 2, "no suffix": 2, ".md": 1, ".txt": 1, "._*": 1})
    assert listing.columns == {"file": "file", "caption": "caption"}
    assert listing.notes() == {
        "table": f"{folder / 'captions.csv'}: columns: caption by 'caption', file by 'file'",
        "passed over": "passed over, as neither clips nor their captions: 2 .jpg, 2 no suffix, 1 ._*, 1 .md, 1 .txt",
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "clip,caption\nb.mp4,x\n", r"captions\.csv, line 2: needs one of the columns file"),
        ("captions.csv", "file,path,caption\nb.mp4,b.mp4,x\n", "file and path may be meant"),
        ("captions.csv", "file,caption\nb.mp4,x,y\n", "line 2: 3 fields for 2 columns"),
        ("captions.jsonl", '{"file": "b.mp4", "caption": "x"}\n{"file"', r"captions\.jsonl, line 2: no JSON"),
        (
            "captions.jsonl",
            '{"file": "b.mp4", "caption": "x"}\n{"file": "b"}',
            "line 2: no column 'caption', which the",
        ),
        ("captions.jsonl", "[1]", "expected an object or a string, found list"),
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
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="no clips in it"):
        list_clips(empty)
    with pytest.raises(UserError, match=r"use \.txt, \.csv"):
        list_clips(folder, captions=folder / "notes.md")


def test_clips_without_a_caption_hear_of_tables_that_lie_there(folder):
    (folder / "OpenVid-1M.csv").write_text("video,caption\nb.mp4,a cat\n")
    assert listed(folder)["b.mp4"] == (
        "no caption: neither in a table nor in a .txt beside it; OpenVid-1M.csv lies there: --config.captions=TABLE"
    )


# ---- several captions, parts of files


PANDA = (
    "videoID,url,timestamp,caption,matching_score\n"
    "b,http,\"[['0:00:01.000', '0:00:02.500'], ['0:00:10', '0:01:00']]\",\"['a cat', 'a dog']\",\"[0.5, 0.4]\"\n"
)


def test_several_captions_are_chosen_from_by_a_rule(folder):
    (folder / "captions.jsonl").write_text(
        '{"file": "b.mp4", "caption": ["a cat", "a black cat"]}\n'
        '{"file": "c.GIF", "caption": {"short": "a dog", "long": "a big dog"}}\n'
    )
    by = {rule: {c.name: c.caption or c.fault for c in read_listing(folder, columns=Columns(choice=rule)).clips}
          for rule in ("", "first", "longest", "long")}  # fmt: skip
    assert by["first"]["b.mp4"] == "a cat" and by["longest"]["b.mp4"] == "a black cat"
    assert by["long"]["deep/c.GIF"] == "a big dog"
    assert by[""]["b.mp4"].startswith("several captions: 2") and by[""]["deep/c.GIF"].startswith(
        "several captions: short"
    )


def test_parts_of_a_file_are_clips_of_their_own(folder):
    (folder / "captions.csv").write_text(PANDA)
    found = [clip for clip in read_listing(folder, parts=True).clips if clip.name == "b.mp4"]
    assert found == [ClipFile("b.mp4", "a cat", "", 1.0, 2.5), ClipFile("b.mp4", "a dog", "", 10.0, 60.0)]
    assert [clip.label() for clip in found] == ["b.mp4[1-2.5]", "b.mp4[10-60]"]
    whole = listed(folder)["b.mp4"]
    assert whole == "several captions: one for each part of the file; --config.parts=True cuts it by the timestamps"
    (folder / "captions.csv").write_text(PANDA.replace("'0:01:00'", "'soon'"))
    assert {c.name: c.fault for c in read_listing(folder, parts=True).clips}["b.mp4"].startswith("no part: ")
