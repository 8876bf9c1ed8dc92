"""Validation of JSON files: size limits, and a schema that is checked before any value is used.

A rule returns what is wrong with a value. Each kind of file has one table of rules, next to the code that reads it:

    RECORD = table({"fps": number(0, 1000, above=True)}, {"prompt": text()})
    values = checked(RECORD, load_json(file), file)

`true` is not a number, `1.0` and `"1"` are not integers, and nothing is converted.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.limits import DIGITS, JSON_BYTES, JSON_DEPTH, WIDTH

Rule = Callable[[str, Any], str]  # (what the value is called, the value) -> what is wrong with it, "" if nothing
SHOWN = 60  # characters of a value in a message


def load_json(file: Path, most: int = JSON_BYTES) -> Any:
    """The content of a JSON file.

    Args:
      most: maximum size in bytes.

    Raises:
      OSError: it cannot be read.
      ValueError: it is too long, or see `parse_json`.
    """
    return parse_json(load_bytes(file, most))


def load_bytes(file: Path, most: int) -> bytes:
    """A whole file. Raises OSError, or ValueError when it has more than `most` bytes; no more than these are read."""
    with file.open("rb") as opened:
        data = opened.read(min(most, _size(file)) + 1)
    if len(data) > most:
        raise ValueError(f"it has more than the {most:,} bytes that such a file may have")
    return data


def _size(file: Path) -> int:
    """Bytes, as far as they are known: reading asks for no more memory than that."""
    return getattr(file.stat(), "st_size", JSON_BYTES)


def parse_json(data: bytes | str) -> Any:
    """What JSON in UTF-8 says.

    Raises:
      ValueError: it is none; one key stands twice in an object; NaN, Infinity or a number too large for a float; a text
        with NUL or half a surrogate pair; nested too deeply.
    """
    try:
        value = json.loads(
            data if isinstance(data, str) else data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _walk(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} stands in one object twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is too large a number")
    return value


def _short(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _walk(value: Any) -> None:
    """Checks every string and the depth, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > JSON_DEPTH:
            raise ValueError(f"nested more than {JSON_DEPTH} levels deep")
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _whole_text(one)
            elif isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
        level, depth = below, depth + 1


def _whole_text(value: str) -> None:
    if "\0" in value:
        raise ValueError(f"{shown(value)} holds NUL, which is no character of a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(value)} holds half of a surrogate pair, which is no character") from None


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    printed = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return printed if len(printed) <= SHOWN else f"{printed[:SHOWN]}..."


# ---- rules


def checked(rule: Rule, value: Any, where: object) -> Any:
    """The value, if it satisfies the rule.

    Args:
      where: the file, for the message.

    Raises:
      UserError: it does not; the line names the file, the key, the value and what is allowed.
    """
    if fault := rule("", value):
        raise UserError(f"{where}: {fault}")
    return value


def _must(name: str, value: Any, allowed: str) -> str:
    return f"{name} is {shown(value)}; it must be {allowed}" if name else f"{shown(value)}: it must be {allowed}"


def whole(low: int = 0, high: int = 2**53) -> Rule:
    """An integer from `low` to `high`."""

    def rule(name: str, value: Any) -> str:
        fits = type(value) is int and low <= value <= high
        return "" if fits else _must(name, value, f"a whole number from {low} to {high}")

    return rule


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """An integer or finite float from `low` to `high`; `above`: more than `low`."""

    def rule(name: str, value: Any) -> str:
        fits = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        span = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        return "" if fits else _must(name, value, f"a number {span}")

    return rule


def text(most: int = 2**20) -> Rule:
    """A string of at most so many characters."""

    def rule(name: str, value: Any) -> str:
        fits = type(value) is str and len(value) <= most
        return "" if fits else _must(name, value, f"a text of at most {most} characters")

    return rule


def flag(name: str, value: Any) -> str:
    """True or false."""
    return "" if type(value) is bool else _must(name, value, "true or false")


def one_of(*values: Any) -> Rule:
    """One of these, of the same type."""

    def rule(name: str, value: Any) -> str:
        fits = any(type(value) is type(other) and value == other for other in values)
        return "" if fits else _must(name, value, " or ".join(map(shown, values)))

    return rule


def several(rule: Rule, least: int = 0, most: int = 2**20) -> Rule:
    """A list of `least` to `most` values of one rule."""

    def each(name: str, value: Any) -> str:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            return _must(name, value, f"a list of {count} entries")
        return next(filter(None, (rule(f"{name}[{i}]", one) for i, one in enumerate(value))), "")

    return each


def row(*rules: Rule) -> Rule:
    """A list with one value of each rule."""

    def each(name: str, value: Any) -> str:
        if not isinstance(value, list | tuple) or len(value) != len(rules):
            return _must(name, value, f"a list of {len(rules)} entries")
        pairs = enumerate(zip(rules, value, strict=True))
        return next(filter(None, (rule(f"{name}[{i}]", one) for i, (rule, one) in pairs)), "")

    return each


def either(*rules: Rule) -> Rule:
    """A value that satisfies one of several rules."""

    def rule(name: str, value: Any) -> str:
        faults = [other(name, value) for other in rules]
        return "" if "" in faults else faults[0]

    return rule


def anything(name: str, value: Any) -> str:
    """Every value."""
    return ""


def each_of(rule: Rule, most: int = 2**20) -> Rule:
    """An object whose values all are of one rule."""

    def rows(name: str, value: Any) -> str:
        if not isinstance(value, dict) or len(value) > most:
            return _must(name, value, f"an object of at most {most} entries")
        return next(filter(None, (rule(_under(name, key), one) for key, one in value.items())), "")

    return rows


def table(required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None, *, closed: bool = False) -> Rule:
    """An object with these keys.

    Args:
      closed: other keys are an error, because they would be ignored silently.
    """
    rules = {**required, **(optional or {})}

    def rule(name: str, value: Any) -> str:
        if not isinstance(value, Mapping):
            return _must(name, value, "an object")
        for key in required:
            if key not in value:
                return f"{_under(name, key)} is missing"
        if closed and (unknown := [key for key in value if key not in rules]):
            return f"{_under(name, str(unknown[0]))} is unknown; known are {', '.join(rules)}"
        pairs = ((key, value[key]) for key in rules if key in value)
        return next(filter(None, (rules[key](_under(name, key), one) for key, one in pairs)), "")

    return rule


def _under(name: str, key: str) -> str:
    key = key if key.isprintable() and len(key) <= SHOWN else shown(key)
    return f"{name}.{key}" if name else key


SIZE = whole(1, WIDTH)  # of a network's layers
EPS = number(0, 0.1, above=True)  # of its norms
