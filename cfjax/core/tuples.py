"""Tuples on the command line: `red,green`, `1000,500`, `('a','b')`, `(1000,)`, `()`; anything else is an error.

`ml_collections` alone would read unquoted words with a comma between them as one string.
"""

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from cfjax.core.errors import UserError

QUOTED = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)
SEPARATORS = "\\s,;|'\"()\\[\\]{}\uff0c\u3001\uff1b\uff08\uff09"  # the last ones are those of Chinese keyboards
WORD = re.compile(f"[^{SEPARATORS}]+")
PHRASE = re.compile(f"{WORD.pattern}( {WORD.pattern})*")  # an entry where the default has such, as prompts are


class NoTuple(ValueError):
    """A text is not a tuple; the message says why."""


def parse_tuple(flag: str, text: str, default: Sequence[Any], kind: type | None = None) -> tuple[Any, ...]:
    """The tuple that `text` spells; its entries are of the kind of the default's.

    Args:
      flag: what the text was given for, as `--config.dims`; for the message.
      kind: of the entries where the default has none; None there: all numbers, all words or all bool.

    Raises:
      UserError: it spells none; the line holds the right spelling.
    """
    kind = type(default[0]) if default else kind
    bare = PHRASE if any(" " in entry for entry in default if isinstance(entry, str)) else WORD
    try:
        return _parsed(text, kind, bare)
    except NoTuple as error:
        problem = f"{flag}={text}: needs a value of type tuple, as the default {tuple(default)!r}"
        raise UserError(f"{problem}: {error}; write {flag}={_spelling(text, default, kind, bare)}") from None


def _parsed(text: str, kind: type | None, bare: re.Pattern[str]) -> tuple[Any, ...]:
    if kind not in (None, str, bool, int, float):
        return _literal(text, kind)
    body = text.strip()
    enclosed = (body[:1], body[-1:]) in (("(", ")"), ("[", "]"))
    items = _items(body[1:-1] if enclosed else body)
    if not "".join(items).strip():
        if len(items) == 1 and enclosed:
            return ()
        raise NoTuple("there is nothing in it")
    ended = not items[-1].strip()
    if ended:  # by a comma, as Python writes a tuple of one
        items = items[:-1]
    if len(items) == 1 and not ended and QUOTED.fullmatch(items[0]) and "," in items[0]:
        raise NoTuple("one word with a comma in it")
    values = tuple(_value(item.strip(), kind, bare) for item in items)
    if {type(value) for value in values} == {int, float}:
        return tuple(map(float, values))
    if len({type(value) for value in values}) > 1:
        raise NoTuple("its entries are of several kinds")
    return values


def _items(body: str) -> list[str]:
    """The texts between the commas that stand outside quotes."""
    out, start = [], 0
    while True:
        quoted = QUOTED.match(body, start)
        end = quoted.end() if quoted else start
        comma = body.find(",", end)
        out.append(body[start : comma if comma >= 0 else len(body)])
        if comma < 0:
            return out
        start = comma + 1


def _value(item: str, kind: type | None, bare: re.Pattern[str]) -> Any:
    """One entry, quoted or as `bare` has it; without a kind its type is inferred."""
    if QUOTED.fullmatch(item):
        if kind not in (None, str):
            raise NoTuple(f"{item} is a word")
        return ast.literal_eval(item)
    if not bare.fullmatch(item):
        raise NoTuple(f"{item!r} is no entry" if item else "nothing stands between two commas")
    try:
        value = ast.literal_eval(item)
    except (ValueError, SyntaxError):
        value = item
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):  # the reader of configs would take it for a word
        raise NoTuple(f"{item} is no finite number")
    if value is None or (kind is not None and type(value) is not kind):
        raise NoTuple(f"{item} is not of type {kind.__name__}" if kind else f"{item} is no entry")
    return value


def _literal(text: str, kind: type | None) -> tuple[Any, ...]:
    """A tuple of tuples and such, as Python writes it."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        raise NoTuple("not as Python writes it") from None
    if not isinstance(value, (tuple, list)) or not all(type(item) is kind for item in value):
        raise NoTuple("its entries are of another kind")
    return tuple(value)


def _spelling(text: str, default: Sequence[Any], kind: type | None, bare: re.Pattern[str]) -> str:
    """The right way to write what was meant, or what the default would be."""
    found = [entry[0] for entry in bare.finditer(text)]
    for words in (found, default):
        spelled = ",".join(map(str, words))
        try:
            _parsed(spelled, kind, bare)
        except NoTuple:
            continue
        return spelled
    if default:
        return repr(tuple(default)).replace(" ", "")
    return f"{'1,2' if kind in (int, float) else 'A,B'}, or () for none"
