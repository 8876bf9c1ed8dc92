"""A folder of video files and what is said in them: a CSV, JSONL or JSON table, or a text file beside each clip."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError

SUFFIXES = {".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".m4v"}
TABLES = ("captions.csv", "captions.jsonl", "captions.json", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "path", "video", "video_path")
CAPTION_COLUMNS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class ClipFile:
    """A clip in the folder's listing: `name` is its path in the folder; `fault` says why it cannot be used."""

    name: str
    caption: str
    fault: str = ""


def list_clips(folder: str | Path, captions: str | Path = "") -> list[ClipFile]:
    """Every clip under `folder` and every clip that its table names, by name.

    Args:
      captions: the table (.csv, .jsonl, or .json {file: caption}); "" takes one of TABLES in the folder. Clips that the
        table does not name, or all without one, take their caption from NAME.txt beside NAME.mp4.

    Raises:
      UserError: no folder, no clips, or a table that cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"source={str(folder)!r}: no such folder")
    table = Path(captions) if captions else next((root / n for n in TABLES if (root / n).is_file()), None)
    rows = list(_rows(table)) if table else []
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()}
    if not files:
        raise UserError(f"source={str(folder)!r}: no clips in it (looked for {' '.join(sorted(SUFFIXES))})")
    out, seen = [], set()
    for name, caption in rows:
        if name in seen:
            out.append(ClipFile(name, caption, f"named twice: {table} has another caption for it"))
        elif name not in files:
            out.append(ClipFile(name, caption, f"missing: {table} names it, but {root} has no such file"))
        else:
            out.append(_clip(name, caption))
        seen.add(name)
    out += [_clip(name, _sidecar(file)) for name, file in files.items() if name not in seen]
    return sorted(out, key=lambda clip: (clip.name, bool(clip.fault)))


def _clip(name: str, caption: str) -> ClipFile:
    caption = caption.strip()
    return ClipFile(name, caption, "" if caption else "no caption: neither in a table nor in a .txt beside it")


def _sidecar(file: Path) -> str:
    try:
        return file.with_suffix(".txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """(file, caption) of a table's rows. Raises UserError, naming the line, when it cannot be read."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".json": _json}
    if table.suffix not in readers:
        raise UserError(f"captions={str(table)!r}: use a .csv, .jsonl or .json table")
    try:
        for line, row in readers[table.suffix](table):
            name, caption = (_column(table, line, row, names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
            yield Path(name.strip()).as_posix(), caption
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: cannot read it ({error})") from None


def _column(table: Path, line: int, row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    found = [name for name in names if name in row]
    if len(found) != 1:
        raise UserError(f"{table}, line {line}: needs one of the columns {', '.join(names)}; it has {', '.join(row)}")
    return str(row[found[0]] or "")


def _csv(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, {str(key): value for key, value in row.items()}


def _jsonl(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _mapping(table, number, line)


def _json(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for name, caption in _mapping(table, 1, table.read_text(encoding="utf-8-sig")).items():
        yield 1, {"file": name, "caption": caption}


def _mapping(table: Path, line: int, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{table}, line {line}: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{table}, line {line}: expected an object, found {type(value).__name__}")
    return value
