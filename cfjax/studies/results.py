"""What the exact part of the study measured, picked out by name: by seed, level and frames."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfjax.studies.statistics import summary

Results = Mapping[str, Any]


def number(value: float, digits: int = 4) -> str:
    """Short, with at most `digits` decimals; tiny ones by their power of ten."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10.0**-digits else f"{value:.0e}"


def spread_of(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation over seeds."""
    s = summary(values)
    return number(s["mean"], digits) + (f" ± {number(s['sd'], digits)}" if len(values) > 1 else "")


def quality(results: Results, init: str, measure: str) -> list[float]:
    """A measure of an initialisation's rollouts, by seed."""
    return [seed["quality"][init][measure] for seed in results["seeds"]]


def settled(results: Results, init: str, sigma: float, what: str, frames: Sequence[int]) -> list[float]:
    """A distance of one student, by seed: its mean over these frames."""
    return [
        float(
            np.mean(
                [
                    row[what]
                    for row in seed["settling"]
                    if row["init"] == init and row["sigma"] == sigma and row["frame"] in frames
                ]
            )
        )
        for seed in results["seeds"]
    ]


def truth(results: Results, teacher: str, sigma: float, frames: Sequence[int], key: str = "ambiguity") -> Any:
    """A number (or numbers by past) of the walk's exact pairs, see `walk.facts`: its mean over these frames."""
    found = [
        row[key]
        for row in results["truth"]["rows"]
        if (row["teacher"], row["sigma"]) == (teacher, sigma) and row["frame"] in frames
    ]
    return np.mean(found, axis=0)


def early(results: Results) -> list[int]:
    """All frames but the last, whose future is empty."""
    return list(range(1, results["plan"]["frames"]))


def every(results: Results) -> list[int]:
    """All frames."""
    return [*early(results), results["plan"]["frames"]]


def after_dmd(results: Results, init: str, at: int, measure: str) -> list[float]:
    """A measure of an initialisation's rollouts after `at` iterations of DMD, by seed."""
    return [seed["dmd"][init][str(at)][measure] for seed in results["seeds"]]
