"""Reading tables row by row: .csv, .tsv, .jsonl, .json, .parquet and plain .txt, with the position of each row.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one; any other encoding has to be named. Only
\\n and \\r\\n end a line. Nothing is guessed: a file that cannot be read completely is an error, which names the line.
"""

import codecs
import csv
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cfjax.core.errors import UserError
from cfjax.core.limits import COLUMNS, LINE, LIST_BYTES
from cfjax.core.schema import load_bytes

TEXT = "prompt"  # the column that the lines of a .txt file, and bare strings of a JSON list, are in
CAPTIONS = ("caption", "captions", "cap", "text", "prompt")  # columns that hold what a clip or a video shows
HALVES = "surrogatepass"  # half a surrogate pair is read, so that it costs its own row alone
MARKS = {  # longest first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Row:
    """One row: its columns, and its position in the file ("line 3", "entry 2")."""

    place: str
    values: Mapping[str, Any]


def read_table(path: str | Path, encoding: str = "") -> Iterator[Row]:
    """The rows of a table in order, read as they are asked for.

    A .txt file has one column, "prompt": its lines, blank ones too. A .json file is a list of objects or strings, or an
    object {file: caption}, whose rows have the columns "file" and "caption" (or those of an object {file: {...}}).

    Args:
      encoding: of a text file without a byte order mark, "" for UTF-8.

    Raises:
      UserError: another kind of file, or it cannot be read whole; names the file and the line.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str], Iterator[Row]]] = {
        ".txt": _txt,
        ".csv": _csv,
        ".tsv": _tsv,
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".parquet": _parquet,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{path}: no table of a known kind; use {', '.join(readers)}")
    yield from readers[suffix](path, encoding)


# ---- text


def decode(data: bytes, encoding: str = "") -> str:
    """The text of a small file. Raises ValueError, with a guess at the encoding, when it is not in that encoding."""
    name = _encoding_of(data, encoding)
    try:
        text = data.decode(name, HALVES)
    except UnicodeDecodeError as error:
        raise ValueError(_not_in(name, error)) from None
    _check_text(text, sure=name != "utf-8" or bool(encoding))
    return text


def _encoding_of(begin: bytes, asked: str) -> str:
    return next((name for mark, name in MARKS.items() if begin.startswith(mark)), asked or "utf-8")


def _check_text(text: str, *, sure: bool) -> None:
    """Raises ValueError for text that was read in a wrong encoding without an error; `sure`: the encoding was given."""
    if "\0" in text:
        raise ValueError("it holds NUL characters, as UTF-16 without a byte order mark does; save it as UTF-8")
    if sure or text.isascii() or max(text) > "\u07ff":
        return
    for word in re.findall(r"[^\W\d_\x00-\x7f](?:[^\W\d_]|[\u0300-\u0483\u0591-\u05c7\u0610-\u065f])+", text):
        # Short GBK texts can be valid UTF-8: then they are of letters that no word has together.
        alphabets = {unicodedata.name(letter, "?").split()[0] for letter in word if not letter.isascii()}
        if len(alphabets - {"COMBINING", "MODIFIER"}) > 1:
            raise ValueError(f"as UTF-8 it reads {word!r}; if it is, say --config.encoding=utf-8, else its own, as gbk")


def _not_in(name: str, error: UnicodeError) -> str:
    """What to say of text in another encoding."""
    where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
    return f"it is not {name.upper()}{where}; save it as UTF-8, or name its own with --config.encoding=gbk, cp1252 ..."


@contextmanager
def _lines(path: Path, encoding: str) -> Iterator[Iterator[str]]:
    """The lines of a text file with their ends; errors are raised as one line."""
    number = 0

    def checked(lines: TextIO) -> Iterator[str]:
        nonlocal number
        while line := lines.readline(LINE + 1):
            number += 1
            if len(line) > LINE:
                raise ValueError(f"a line of more than {LINE} characters, which no table has")
            _check_text(line, sure=name != "utf-8" or bool(encoding))
            yield line

    try:
        with path.open("rb") as file:
            begin = file.read(4)
        name = _encoding_of(begin, encoding)
        with path.open(encoding=name, newline="\n", errors=HALVES) as lines:
            yield checked(lines)
    except UnicodeError as error:
        raise UserError(f"{path}, after line {number}: {_not_in(name, error)}") from None
    except LookupError:
        raise UserError(f"encoding={encoding!r}: Python knows no such encoding; use utf-8, gbk, cp1252 ...") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: {error}") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}, line {number}: {error}" if number else f"{path}: cannot read it ({error})") from None


def _txt(path: Path, encoding: str) -> Iterator[Row]:
    with _lines(path, encoding) as lines:
        for number, line in enumerate(lines, 1):
            text = line.removesuffix("\n").removesuffix("\r")
            if "\r" in text:
                raise ValueError("a carriage return alone ends no line here; end lines with \\n")
            yield Row(f"line {number}", {TEXT: text})


# ---- comma or tab


def _csv(path: Path, encoding: str) -> Iterator[Row]:
    yield from _separated(path, encoding, ",")


def _tsv(path: Path, encoding: str) -> Iterator[Row]:
    yield from _separated(path, encoding, "\t")


def _separated(path: Path, encoding: str, delimiter: str) -> Iterator[Row]:
    with _lines(path, encoding) as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        before = 0
        for fields in reader:
            place, before = f"line {before + 1}", reader.line_num
            if not fields:
                continue
            if header is None:
                header = _header(path, place, fields)
            elif len(fields) != len(header):
                wrong = f"{len(fields)} fields for {len(header)} columns ({', '.join(header)})"
                raise UserError(
                    f"{path}, {place}: {wrong}; quote texts that hold a {'comma' if delimiter == ',' else 'tab'}"
                )
            else:
                yield Row(place, {name: field for name, field in zip(header, fields, strict=True) if name})


def _header(path: Path, place: str, fields: Sequence[str]) -> list[str]:
    names = [field.strip() for field in fields]
    if len(names) > COLUMNS:
        raise UserError(f"{path}, {place}: {len(names)} columns; a table has {COLUMNS} at most")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path}, {place}: two columns are called {twice[0]!r}; rename one")
    return names


# ---- JSON


def _jsonl(path: Path, encoding: str) -> Iterator[Row]:
    with _lines(path, encoding) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _entry(path, f"line {number}", _parsed(path, f"line {number}", line))


def _json(path: Path, encoding: str) -> Iterator[Row]:
    try:
        data = load_bytes(path, LIST_BYTES)
        content = _parsed(path, "", decode(data, encoding))
    except LookupError:
        raise UserError(f"encoding={encoding!r}: Python knows no such encoding; use utf-8, gbk, cp1252 ...") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if isinstance(content, list):
        for number, value in enumerate(content, 1):
            yield _entry(path, f"entry {number}", value)
    elif isinstance(content, dict) and any(isinstance(content.get(name), str) for name in CAPTIONS):
        yield Row("entry 1", content)
    elif isinstance(content, dict):
        for name, value in content.items():
            yield Row(f"entry {name!r}", _named(name, value))
    else:
        raise UserError(f"{path}: expected a list of objects or strings, or an object {{file: caption}}")


def _parsed(path: Path, place: str, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in one object twice")
        return found

    where = f"{path}, {place}" if place else str(path)
    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be a table") from None
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error})") from None


def _entry(path: Path, place: str, value: Any) -> Row:
    if isinstance(value, str):
        return Row(place, {TEXT: value})
    if not isinstance(value, dict):
        raise UserError(f"{path}, {place}: expected an object or a string, found {type(value).__name__}")
    return Row(place, value)


def _named(name: str, value: Any) -> dict[str, Any]:
    """The columns of an entry of {file: caption}, or of {file: {column: value}} where one of these is a caption."""
    if isinstance(value, dict) and any(name in value for name in CAPTIONS):
        return {"file": name, **value}
    return {"file": name, "caption": value}


# ---- Parquet


def _parquet(path: Path, encoding: str) -> Iterator[Row]:
    """Columns of bytes (videos inside the table) are left out of the rows: no one reads a caption from them."""
    try:
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        with ParquetFile(path) as table:
            schema = table.schema_arrow
            names = [name for name in schema.names if not _holds_bytes(arrow, schema.field(name).type)]
            _check_pages(path, table.metadata, set(names))
            number = 0
            for batch in table.iter_batches(columns=names, batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
    except UserError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{path}: cannot read it ({' '.join(str(error).split())})") from None


def _check_pages(path: Path, metadata: Any, names: set[str]) -> None:
    """Raises UserError where these columns of a group of rows unpack to more than a table's whole text may have."""
    for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
        read = (column for column in columns if column.path_in_schema.partition(".")[0] in names)
        sizes = [column.total_uncompressed_size for column in read]
        if sum(sizes) > 4 * LIST_BYTES:
            raise UserError(f"{path}: texts of {sum(sizes)} bytes in one group of rows; write it in smaller groups")


def _holds_bytes(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(arrow, kind.field(i).type) for i in range(kind.num_fields))
