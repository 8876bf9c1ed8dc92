"""Tables of every kind say the same, row by row; what cannot be taken whole is refused with its line."""

import json
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow.parquet import write_table

from cfjax.core.errors import UserError
from cfjax.data.tables import read_table

ROWS = [
    {"prompt": "a cat, asleep", "note": "1"},
    {"prompt": 'two lines\nof "one" text', "note": ""},
    {"prompt": "ein Haus \u2028 im Süden \x85 一只猫", "note": "3"},
]
CSV = 'prompt,note\n"a cat, asleep",1\n"two lines\nof ""one"" text",\nein Haus \u2028 im Süden \x85 一只猫,3\n'


def write_parquet(path: Path, rows: list[dict]) -> Path:
    write_table(arrow.Table.from_pylist(rows), path)
    return path


def values(path: Path, encoding: str = "") -> list[dict]:
    return [dict(row.values) for row in read_table(path, encoding)]


def positions(path: Path) -> list[str]:
    return [row.place for row in read_table(path)]


def test_every_kind_of_table_says_the_same(tmp_path):
    for name, text in {
        "a.csv": CSV,
        "crlf.csv": CSV.replace("\n", "\r\n").replace("lines\r\nof", "lines\nof"),
        "a.TSV": CSV.replace('"a cat, asleep",', "a cat, asleep\t").replace("note", "note").replace(",", "\t", 1)
        .replace('text",\n', 'text"\t\n').replace("猫,3", "猫\t3"),
        "a.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "a.json": json.dumps(ROWS, indent=1),
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert values(tmp_path / name) == ROWS, name
    assert values(write_parquet(tmp_path / "a.parquet", ROWS)) == ROWS


def test_a_row_knows_its_place(tmp_path):
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    assert positions(tmp_path / "a.csv") == ["line 2", "line 3", "line 5"]  # where it begins: one takes two lines
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert positions(tmp_path / "a.jsonl") == ["line 1", "line 3"]
    (tmp_path / "a.json").write_text('["x", {"a": 1}]')
    assert positions(tmp_path / "a.json") == ["entry 1", "entry 2"]
    assert positions(write_parquet(tmp_path / "a.parquet", ROWS)) == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_lines(tmp_path, separator):
    text = f"a cat{separator}soft light"
    (tmp_path / "a.txt").write_text(f"{text}\r\nb\n\nlast", encoding="utf-8", newline="")
    assert values(tmp_path / "a.txt") == [{"prompt": text}, {"prompt": "b"}, {"prompt": ""}, {"prompt": "last"}]
    if separator != "\x0b" and separator >= " ":
        (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
        assert values(tmp_path / "a.jsonl") == [{"prompt": text}]
    (tmp_path / "a.csv").write_text(f"prompt\n{text}\n", encoding="utf-8")
    assert values(tmp_path / "a.csv") == [{"prompt": text}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_known_by_its_mark(tmp_path, encoding):
    for name, text in (("a.txt", "一只猫\nEin Café\n"), ("a.csv", "prompt\n一只猫\nEin Café\n"),
                       ("a.json", '["一只猫", "Ein Café"]'), ("a.jsonl", '"一只猫"\n"Ein Café"\n')):  # fmt: skip
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert values(tmp_path / name) == [{"prompt": "一只猫"}, {"prompt": "Ein Café"}]


@pytest.mark.parametrize(("encoding", "text"), [("gbk", "一只猫在冲浪"), ("cp1252", "Café"), ("shift_jis", "猫の波")])
def test_other_encodings_are_read_by_their_names_and_reported_without(tmp_path, encoding, text):
    for name, content in (("a.txt", f"first\n{text}\n"), ("a.json", json.dumps(["first", text], ensure_ascii=False))):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert values(tmp_path / name, encoding)[1] == {"prompt": text}
        with pytest.raises(UserError, match=r"it is not UTF-8 \(byte \d+\); save it as UTF-8, or name its own with"):
            values(tmp_path / name)
        with pytest.raises(UserError, match="encoding='klingon': Python knows no such encoding"):
            values(tmp_path / name, "klingon")


def test_text_of_another_encoding_that_happens_to_be_utf8_is_reported(tmp_path):
    """Three Chinese characters in GBK are a Cyrillic letter, a Hebrew point and a Latin letter in UTF-8."""
    (tmp_path / "a.txt").write_bytes("一只猫".encode("gbk"))
    with pytest.raises(UserError, match=r"line 1: as UTF-8 it reads .*--config.encoding=utf-8, else its own"):
        values(tmp_path / "a.txt")
    assert values(tmp_path / "a.txt", "gbk") == [{"prompt": "一只猫"}]
    for text in ("Привет, мир: naïve café", "Δt of αβγ", "Straße 5 µm", "שָׁלוֹם", "e\u0301te\u0301"):
        (tmp_path / "b.txt").write_text(text, encoding="utf-8")
        assert values(tmp_path / "b.txt") == [{"prompt": text}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "- a", r"no table of a known kind; use \.txt, \.csv"),
        ("a.txt", "a\rb\rc", "line 1: a carriage return alone ends no line"),
        ("a.txt", "a\0b\0", "line 1: it holds NUL characters, as UTF-16 without a byte order mark"),
        ("a.json", '["a\0"]', "it holds NUL characters"),
        ("a.csv", "a,b\n1,2\n\n3,4,5\n", r"line 4: 3 fields for 2 columns \(a, b\); quote texts that hold a comma"),
        ("a.csv", "a,b\n1\n", "line 2: 1 fields for 2 columns"),
        ("a.tsv", "a\tb\n1\t2\t3\n", "line 2: 3 fields for 2 columns .*; quote texts that hold a tab"),
        ("a.csv", "a,b, a\n1,2,3\n", "line 1: two columns are called 'a'; rename one"),
        ("a.csv", 'a,b\n1,"open\n2,3\n', "line 3: unexpected end of data"),
        ("a.csv", 'a,b\n1,"x"y\n', "line 2: ',' expected after '\"'"),
        ("a.jsonl", '{"a": 1}\n{"a"', "line 2: no JSON"),
        ("a.jsonl", '{"a": 1, "a": 2}', "line 1: no JSON .'a' stands in one object twice"),
        ("a.jsonl", "[1]", "line 1: expected an object or a string, found list"),
        ("a.jsonl", "[" * 100_000, "line 1: nested too deeply"),
        ("a.json", "{", "no JSON"),
        ("a.json", "3", "expected a list of objects or strings, or an object {file: caption}"),
        ("a.json", "[[1]]", "entry 1: expected an object or a string, found list"),
        ("a.parquet", "no parquet", "cannot read it"),
    ],
)
def test_what_cannot_be_taken_whole_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(UserError, match=message) as error:
        values(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_a_missing_table_is_reported(tmp_path):
    for suffix in ("txt", "csv", "json", "jsonl", "parquet"):
        with pytest.raises(UserError, match="No such file"):
            values(tmp_path / f"none.{suffix}")


def test_a_spreadsheets_nameless_column_is_no_column(tmp_path):
    (tmp_path / "a.csv").write_text(",prompt\n0,a cat\n1,a dog\n")
    assert values(tmp_path / "a.csv") == [{"prompt": "a cat"}, {"prompt": "a dog"}]


def test_an_object_is_of_files_or_one_row(tmp_path):
    (tmp_path / "a.json").write_text('{"a.mp4": "a cat", "b.mp4": ["x", "y"], "c.mp4": {"caption": "z", "fps": 16}}')
    assert values(tmp_path / "a.json") == [
        {"file": "a.mp4", "caption": "a cat"},
        {"file": "b.mp4", "caption": ["x", "y"]},
        {"file": "c.mp4", "caption": "z", "fps": 16},
    ]
    (tmp_path / "b.json").write_text('{"prompt": "a cat", "seed": 3}')
    assert values(tmp_path / "b.json") == [{"prompt": "a cat", "seed": 3}]


def test_bytes_in_a_parquet_table_are_not_read(tmp_path):
    rows = [{"video": {"bytes": b"x" * 99, "path": "a.mp4"}, "file": "a.mp4", "caption": ["a", "b"]}]
    assert values(write_parquet(tmp_path / "a.parquet", rows)) == [{"file": "a.mp4", "caption": ["a", "b"]}]
