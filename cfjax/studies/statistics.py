"""Means over seeds, tests between them, and measures of generated walks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import cdist, pdist

from cfjax.evaluation.paired import holm
from cfjax.studies.laws import Walk

__all__ = ["MEASURES", "energy_distance", "holm", "measure", "paired", "recorded", "summary", "welch"]

MEASURES = ("energy", "patterns", "spread", "motion", "static", "offmode")


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation of the sample, 95 % t-interval of the mean, and the values themselves."""
    array = np.asarray(values, float)
    mean, sd = float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")
    half = float(stats.t.ppf(0.975, max(len(array) - 1, 1)) * sd / np.sqrt(len(array)))
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "values": array.tolist()}


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of Welch's t-test; 1 where neither side varies and they agree, nan with fewer than two seeds."""
    if min(len(a), len(b)) < 2:
        return float("nan")
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return 1.0 if a[0] == b[0] else 0.0
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def paired(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the paired t-test, seed by seed; 1 or 0 where no gap varies, nan with fewer than two seeds."""
    if len(a) != len(b) or len(a) < 2:
        return float("nan")
    gap = np.subtract(a, b)
    if np.ptp(gap) <= 1e-12 * np.abs(gap).max():
        return 1.0 if not gap.any() else 0.0
    return float(stats.ttest_rel(a, b).pvalue)


def recorded(p: float) -> float | None:
    """A p-value for JSON, which has no nan: None is no test."""
    return p if np.isfinite(p) else None


def energy_distance(a_BF: np.ndarray, b_BF: np.ndarray) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of whole videos; unbiased, so it may be negative."""
    return float(2.0 * cdist(a_BF, b_BF).mean() - pdist(a_BF).mean() - pdist(b_BF).mean())


def _patterns(x_BF: np.ndarray) -> np.ndarray:
    """How often each left/right pattern occurs, [2^(F-1)]."""
    bits = (np.diff(x_BF, axis=1) > 0) @ (2 ** np.arange(x_BF.shape[1] - 1))
    return np.bincount(bits, minlength=2 ** (x_BF.shape[1] - 1)) / len(x_BF)


def measure(x_BF: np.ndarray, real_BF: np.ndarray, law: Walk) -> dict[str, float]:
    """Generated walks against real ones, by name (`MEASURES`).

    energy: energy distance.  patterns: total variation between the frequencies of left/right patterns.
    spread: ratio of total variances.  motion: ratio of mean |step|.  static: fraction of steps shorter than half of the
    law's.  offmode: fraction of steps further than 3 noise deviations from either sign's.
    """
    steps, real_steps = np.abs(np.diff(x_BF, axis=1)), np.abs(np.diff(real_BF, axis=1))
    return {
        "energy": energy_distance(x_BF, real_BF),
        "patterns": float(0.5 * np.abs(_patterns(x_BF) - _patterns(real_BF)).sum()),
        "spread": float(x_BF.var(axis=0).sum() / real_BF.var(axis=0).sum()),
        "motion": float(steps.mean() / real_steps.mean()),
        "static": float((steps < 0.5 * law.step).mean()),
        "offmode": float((np.abs(steps - law.step) > 3.0 * law.noise).mean()),
    }
