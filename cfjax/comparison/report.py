"""One table for every comparison: the quantity, the errors, and the first layer that differs.

A *check* is a function from a subject (weights and test inputs, `case.Case`) to rows; each side of a comparison keeps
its checks in a dict by name, from which `--only` picks.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

from cfjax.core.errors import UserError

Subject = TypeVar("Subject")
Check = Callable[[Subject], Iterable["Row"]]
FLOOR = 1e-3  # of the largest array: the least scale on which one of many is measured


@dataclass(frozen=True)
class Row:
    """One comparison of two arrays.

    Attributes:
      part: the group it belongs to, as `--only` names it.
      what: the quantity.
      shape: of ours.
      max_abs: max |ours - theirs|; nan when the two cannot be compared.
      max_rel: max |ours - theirs| / max |theirs|: on the scale of the array, so that entries near zero do not decide.
      cosine: of the angle between the two, flattened.
      tolerance: bound of `max_rel`, for the layers too.
      first_divergent_layer: the first layer past the tolerance, "" for none or when layers were not compared.
      note: what explains a difference, or why there is nothing to compare.
      ok: everything within the tolerance; also of a row that only says why the other side has no such thing (all nan).
    """

    part: str
    what: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    cosine: float
    tolerance: float
    first_divergent_layer: str
    note: str
    ok: bool


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _defect(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Why two arrays have no distance; "" if they have one."""
    if ours.shape != theirs.shape:
        return f"shapes differ: ours {ours.shape}, theirs {theirs.shape}"
    if not ours.size:
        return "empty arrays"
    found = []
    for side, x in (("ours", ours), ("theirs", theirs)):
        nan, inf = int(np.isnan(x).sum()), int(np.isinf(x).sum())
        found += [f"{side} has {count} {name} of {x.size}" for count, name in ((nan, "NaN"), (inf, "Inf")) if count]
    return "; ".join(found)


def relative_error(ours: Any, theirs: Any) -> float:
    """max |ours - theirs| / max |theirs| in float64; nan when the two cannot be compared, inf against zeros."""
    ours, theirs = _wide(ours), _wide(theirs)
    if _defect(ours, theirs):
        return math.nan
    apart, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    return apart / scale if scale else (math.inf if apart else 0.0)


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    norms = float(np.linalg.norm(ours)) * float(np.linalg.norm(theirs))
    return float(np.dot(ours.ravel(), theirs.ravel())) / norms if norms else float(np.array_equal(ours, theirs))


def compare_arrays(
    part: str,
    what: str,
    ours: Any,
    theirs: Any,
    *,
    tolerance: float,
    layers: Mapping[str, tuple[Any, Any]] | None = None,
    note: str = "",
) -> Row:
    """One row from two arrays (anything `np.asarray` takes), measured in float64.

    Args:
      layers: (ours, theirs) of every layer's output, in the order they run; the first past the tolerance is named, and
        is a failure even where the end agrees.
      note: kept; what forbids a comparison (another shape, NaN, Inf) is put in front of it.
    """
    ours, theirs = _wide(ours), _wide(theirs)
    within = lambda error: error <= tolerance  # nan is not
    divergent = next((name for name, pair in (layers or {}).items() if not within(relative_error(*pair))), "")
    defect = _defect(ours, theirs)
    rel = relative_error(ours, theirs)
    return Row(
        part=part,
        what=what,
        shape=tuple(ours.shape),
        max_abs=math.nan if defect else float(np.abs(ours - theirs).max()),
        max_rel=rel,
        cosine=math.nan if defect else _cosine(ours, theirs),
        tolerance=tolerance,
        first_divergent_layer=divergent,
        note="; ".join(text for text in (defect, note) if text),
        ok=within(rel) and not divergent,
    )


def compare_named(
    part: str, what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], *, tolerance: float, note: str = ""
) -> Row:
    """The worst of many named arrays (all parameter gradients) as one row; its name goes into the note.

    Relative to max |theirs| of each array, but to no less than a thousandth of the largest of all: what is rounding and
    nothing else (keys' biases have no gradient) has no scale of its own.
    """
    if missing := ours.keys() ^ theirs.keys():
        raise ValueError(f"{part} {what}: names differ, {sorted(missing)[:3]}")
    largest = {name: float(np.abs(_wide(x)).max(initial=0.0)) for name, x in theirs.items()}
    floor = FLOOR * max(largest.values())
    errors = {}
    for name in theirs:
        a, b = _wide(ours[name]), _wide(theirs[name])
        apart = math.nan if _defect(a, b) else float(np.abs(a - b).max())
        errors[name] = apart / max(largest[name], floor) if apart else apart
    name = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
    text = "; ".join(filter(None, (f"worst of {len(errors)}: {name}", note)))
    row = compare_arrays(part, what, ours[name], theirs[name], tolerance=tolerance, note=text)
    return replace(row, max_rel=errors[name], ok=errors[name] <= tolerance)


def pick(checks: Mapping[str, Check[Subject]], only: str) -> dict[str, Check[Subject]]:
    """The checks that a comma-separated list names, in their own order; "" for all.

    Raises:
      UserError: an unknown name.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in checks:
            raise UserError(f"--only={only}: no check {name!r}; use {', '.join(checks)}")
    return {name: check for name, check in checks.items() if not names or name in names}


class MissingPart(UserError):
    """A part that a check needs is missing in the run."""


def run_checks(
    checks: Mapping[str, Check[Subject]], subject: Subject, log: Callable[[str], None], *, strict: bool
) -> tuple[list[Row], dict[str, float]]:
    """All rows, and the seconds of every check.

    Args:
      log: called with one line per check, before it runs.
      strict: a check whose part is absent is an error instead of being skipped.

    Raises:
      UserError: `strict`, and something is absent.
    """
    rows: list[Row] = []
    seconds = {}
    for name, check in checks.items():
        log(f"  {name} ...")
        start = time.perf_counter()
        try:
            rows += check(subject)
        except MissingPart as absent:
            if strict:
                raise UserError(f"--only={name}: {absent}") from None
            log(f"  {name} is left out: {absent}")
            continue
        seconds[name] = round(time.perf_counter() - start, 2)
    return rows, seconds


def _cells(row: Row) -> tuple[str, ...]:
    number = lambda x: "-" if math.isnan(x) else f"{x:.1e}"
    return (
        ("-" if math.isnan(row.max_rel) else "ok") if row.ok else "FAIL",
        row.part,
        row.what,
        "x".join(map(str, row.shape)) or "scalar",
        number(row.max_abs),
        number(row.max_rel),
        f"{row.tolerance:.0e}",
        "-" if math.isnan(row.cosine) else f"{row.cosine:.9f}",
        row.first_divergent_layer or "-",
        row.note,
    )


HEADER = ("", "part", "what", "shape", "max abs", "max rel", "allowed", "cosine", "first layer", "note")


def table(rows: Sequence[Row]) -> str:
    """One aligned table of all rows."""
    lines = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in aligned)


def worst(rows: Sequence[Row]) -> Row:
    """The row with the largest error relative to its tolerance; one that cannot be compared comes first."""

    def used(row: Row) -> float:
        if math.isnan(row.max_rel):
            return -1.0 if row.ok else math.inf
        return row.max_rel / row.tolerance if row.tolerance else row.max_rel and math.inf

    return max(rows, key=lambda row: (not row.ok, used(row)))


def verdict(rows: Sequence[Row]) -> str:
    """One line: how many rows agree, and which is nearest to its tolerance or exceeds it most."""
    compared = [row for row in rows if not (row.ok and math.isnan(row.max_rel))]
    if not compared:
        return "nothing was compared"
    failed, name = sum(not row.ok for row in compared), f"{worst(compared).part}, {worst(compared).what}"
    if failed:
        return f"{failed} of {len(compared)} past their tolerance, worst: {name}"
    return f"all {len(compared)} within their tolerance, nearest to it: {name}"


def exit_code(rows: Sequence[Row]) -> int:
    """0 when everything agrees, 1 when something does not or nothing was compared."""
    return 0 if rows and all(row.ok for row in rows) else 1


def to_json(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """`meta`, the verdict and the rows as JSON; a number that is not finite is null (its row's note says why)."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    records = [{key: plain(value) for key, value in asdict(row).items()} for row in rows]
    return json.dumps({**meta, "ok": exit_code(rows) == 0, "rows": records}, indent=1, ensure_ascii=False) + "\n"
