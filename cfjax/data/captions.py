"""Columns of caption tables: the one with the file name, the one with the caption, and the choice among several.

Column names of published sets are recognised: OpenVid-1M (video, caption), Panda-70M (videoID, timestamp, caption),
Koala-36M (videoID, timestamp, caption), MiraData (file_path, dense_caption), video2dataset, Hugging Face's folders
(file_name, text), FastVideo's and Open-Sora-Plan's JSON (path, cap).
"""

import ast
import io
import json
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION, LINE
from cfjax.core.schema import SHOWN, shown
from cfjax.data.pictures import Unusable
from cfjax.data.tables import CAPTIONS, Row

# Names of a column by rank: a name of the first row is preferred to those of the next; two of one row are ambiguous, an
# error.
FILES = (
    (
        "file",
        "file_name",
        "filename",
        "file_path",
        "filepath",
        "path",
        "video",
        "video_path",
        "video_file",
        "clip_path",
    ),
    ("videoid", "video_id", "clip_id"),
)
TEXTS = (CAPTIONS, ("dense_caption", "prompt_en"), ("short_caption", "long_caption", "detailed_caption"))
TIMES = ("timestamp", "timestamps")
RULES = ("first", "longest")


@dataclass(frozen=True)
class Columns:
    """How a table is read; "" chooses by the names of its columns.

    Attributes:
      file, caption: names of columns.
      choice: of several captions the "first" or the "longest"; of captions with names, the one of this name.
    """

    file: str = ""
    caption: str = ""
    choice: str = ""

    def of(self, path: Path, row: Row, *, clips: bool) -> dict[str, str]:
        """The columns of a row by their part: "caption", with `clips` also "file" and, where there is one, "times".

        Raises:
          UserError: there is no such column, or several candidates, which the message names.
        """
        found = {"caption": _column(path, row, self.caption, TEXTS, "caption_column")}
        if clips:
            found["file"] = _column(path, row, self.file, FILES, "file_column")
            if times := [name for name in row.values if name.strip().casefold() in TIMES]:
                found["times"] = times[0]
        return found


def field_of(path: Path, row: Row, column: str) -> Any:
    """A row's field. Raises UserError, naming the row, when it has no such column, which earlier rows had."""
    if column not in row.values:
        raise UserError(f"{path}, {row.place}: no column {column!r}, which the rows before it have")
    return row.values[column]


def _column(path: Path, row: Row, asked: str, ranks: Sequence[Sequence[str]], key: str) -> str:
    has = ", ".join(row.values) or "none"
    if asked:
        if asked in row.values:
            return asked
        raise UserError(f"{path}, {row.place}: no column {asked!r} (--config.{key}); it has {has}")
    for rank in ranks:
        found = [name for name in row.values if name.strip().casefold() in rank]
        if len(found) > 1:
            raise UserError(f"{path}, {row.place}: {' and '.join(found)} may be meant; choose with --config.{key}=NAME")
        if found:
            return found[0]
    known = ", ".join(ranks[0])
    raise UserError(
        f"{path}, {row.place}: needs one of the columns {known}; it has {has}: name one, --config.{key}=NAME"
    )


def caption_of(value: Any, choice: str = "") -> str:
    """The caption in a table's field: a text, or one of several as `choice` (see `Columns`) says.

    Raises:
      Unusable: there is none, or several and no rule; its message begins with "no caption" or "several captions".
    """
    if isinstance(value, str) and len(value) <= LINE:
        value = printed(value)
    if isinstance(value, Mapping):
        value = _named(value, choice)
    elif isinstance(value, list | tuple):
        value = _chosen([one for one in value if one not in (None, "")], choice)
    if value is None or value == "":
        raise Unusable("no caption: it is empty")
    if not isinstance(value, str):
        raise Unusable(f"no caption: {shown(value)} is no text")
    check_characters(value)
    if not value.strip():
        raise Unusable("no caption: it is empty")
    if len(value) > CAPTION:
        raise Unusable(f"no caption: {len(value)} characters, more than {CAPTION}")
    return value.strip()


def check_characters(value: str) -> None:
    """Raises Unusable for NUL and for half a surrogate pair, which no text can be written with."""
    if "\0" in value:
        raise Unusable("no caption: it holds NUL characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("no caption: it holds half of a surrogate pair, which is no character") from None


def _chosen(values: Sequence[Any], choice: str) -> Any:
    if len(values) <= 1:
        return values[0] if values else None
    if not all(isinstance(value, str) for value in values):
        raise Unusable(f"no caption: a list of {', '.join(sorted({type(value).__name__ for value in values}))}")
    if choice not in RULES:
        raise Unusable(f"several captions: {len(values)}; choose with --config.caption_choice={' or '.join(RULES)}")
    return values[0] if choice == "first" else max(values, key=len)


def _named(values: Mapping[str, Any], choice: str) -> Any:
    if choice in values:
        return values[choice]
    if len(values) == 1 and not choice:
        return next(iter(values.values()))
    raise Unusable(
        f"several captions: {', '.join(map(str, [*values][:SHOWN]))}; choose with --config.caption_choice=NAME"
    )


def printed(text: str) -> Any:
    """The value of a CSV field: a list or dict that Python, NumPy or a JSON writer printed, else the text itself.

    Strings of a printed NumPy array follow each other without commas, which Python would read as one string.
    """
    bare = text.strip()
    if bare[:1] == "{" and bare[-1:] == "}":
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(bare)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            return found if isinstance(found, dict) and found else text
        return text
    if bare[:1] != "[" or bare[-1:] != "]":
        return text
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(bare).readline))
        strings = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    except (tokenize.TokenError, SyntaxError, ValueError):
        return text
    marks = {token.string for token in tokens if token.type == tokenize.OP}
    others = {token.type for token in tokens} - {tokenize.STRING, tokenize.OP, *_LAYOUT}
    return strings if strings and marks <= {"[", "]", ","} and not others else text


_LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT}


# ---- parts of a video


def spans_of(value: Any) -> list[tuple[float, float]]:
    """The (start, stop) seconds in a table's field: one pair or a list of them, as numbers or as "H:MM:SS.sss".

    Raises:
      Unusable: it holds something else.
    """
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
        pairs = found if found and isinstance(found[0], list | tuple) else [found]
        out = [(_seconds(start), _seconds(stop)) for start, stop in pairs]
        if all(0 <= start < stop for start, stop in out):
            return out
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        pass
    shown = str(value)[:60]
    raise Unusable(f"no part: {shown!r} is no [start, stop] in seconds or as H:MM:SS.sss")


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) > 3:
            raise ValueError(value)
        return sum(float(part) * 60**place for place, part in enumerate(reversed(parts)))
    return float(value)


def parts_of(times: Any, captions: Any) -> list[tuple[Any, tuple[float, float]]]:
    """(caption field, (start, stop)) of every part of a video that a row describes, from its two fields.

    Raises:
      Unusable: the times cannot be read, or there is not one caption for each.
    """
    spans = spans_of(times)
    captions = printed(captions) if isinstance(captions, str) else captions
    if isinstance(captions, list | tuple) and len(captions) == len(spans):
        return list(zip(captions, spans, strict=True))
    if len(spans) > 1:
        count = len(captions) if isinstance(captions, list | tuple) else 1
        raise Unusable(f"several captions: {count} for {len(spans)} parts of the file; there must be one for each")
    return [(captions, spans[0])]
