"""Evaluations side by side: one row per recipe or run, mean and standard deviation over its seeds."""

import glob
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.paths import path_of, write_atomically
from cfjax.core.schema import checked, each_of, either, load_json, number, one_of, table
from cfjax.evaluation.results import plain

EVALUATION = "evaluation.json"

_NUMBER = either(number(-1e30, 1e30), one_of(None))
_EVALUATION = table({"summary": each_of(_NUMBER), "network_calls": _NUMBER})

# what is shown: key, title, factor, digits
COLUMNS = (
    ("all_correct", "caption all right, %", 100.0, 1),
    ("step", "motion, px/frame", 1.0, 2),
    ("jerkiness", "jerkiness, px", 1.0, 2),
    ("residual", "residual", 1.0, 4),
    ("diversity", "diversity", 1.0, 2),
    ("network_calls", "network calls", 1.0, 0),
)


def gather(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Folder name -> the evaluations found under that name, in the order of their paths.

    Args:
      pattern: a glob pattern of folders; those without an evaluation are passed over.

    Raises:
      UserError: there is no evaluation, or a file that is none.
    """
    out: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted(glob.glob(pattern)):
        file = Path(folder) / EVALUATION
        if not file.exists():
            continue
        try:
            result = checked(_EVALUATION, load_json(file), "what it says")
        except ValueError as error:
            raise UserError(f"{file} is no evaluation ({error}); run cfjax evaluate again") from None
        out.setdefault(file.parent.name, []).append(result)
    if not out:
        raise UserError(f"evaluations={pattern!r}: no folder with an {EVALUATION}; run cfjax evaluate first")
    return out


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {**result["summary"], "network_calls": result["network_calls"]}


def summarise_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Number -> {"mean", "sd" (of the sample, None for one seed), "values"} over those evaluations that have it."""
    every = [_numbers(result) for result in results]
    out = {}
    for name in every[0]:
        values = [float(numbers[name]) for numbers in every if numbers.get(name) is not None]
        if not values:
            continue
        sd = statistics.stdev(values) if len(values) > 1 else None
        out[name] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
    return out


def _cell(value: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if value is None or not math.isfinite(value["mean"]):
        return ""
    mean = f"{factor * value['mean']:.{digits}f}"
    return f"{mean} ± {factor * value['sd']:.{digits}f}" if value["sd"] is not None and digits else mean


def markdown(rows: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """The rows as a markdown table, by `COLUMNS`; `titles` names a row where its key would not do."""
    lines = [
        "| | seeds | " + " | ".join(title for _, title, _, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for key, row in rows.items():
        cells = [_cell(row["numbers"].get(name), factor, digits) for name, _, factor, digits in COLUMNS]
        lines.append(f"| {titles.get(key, key)} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(
    folder: str | Path, evaluations: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str] | None = None
) -> str:
    """Writes table.json (every number of every seed) and table.md to `folder`; returns the latter."""
    rows = {key: {"seeds": len(found), "numbers": summarise_seeds(found)} for key, found in evaluations.items()}
    text, folder = markdown(rows, titles or {}), path_of(folder)
    for name, content in (("table.json", json.dumps(plain(rows), indent=1)), ("table.md", text)):
        write_atomically(folder / name, content + "\n")
    return text
