"""Two systems on the same prompts: differences with intervals, tests over all metrics, effect sizes, and power.

The unit is the prompt: clips of one prompt with several seeds are not independent, so each prompt counts once, with the
mean over its seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

LEVEL, POWER, APART = 0.05, 0.8, 0.05  # of tests; of the power line; the relative difference that it asks for
RESAMPLES = 9999


@dataclass(frozen=True)
class Comparison:
    """One metric of B against A, over prompts; NaN where it is not defined.

    Attributes:
      prompts: how many have it on both sides.
      mean_a, mean_b: means over the prompts.
      difference: mean of B - A, and `low`, `high` its 95 % bootstrap interval (BCa).
      relative: difference over |mean_a|.
      p: Wilcoxon's signed-rank test, two-sided; p_holm: by Holm's procedure over all metrics.
      rank_biserial: (sum of ranks in favour of B - of A) / their sum, -1 to 1.
      cohen_d: mean of the differences over their standard deviation.
      needed: prompts with which a paired t-test tells 5 % of |mean_a| apart with power 0.8, given the differences'
        standard deviation; before any correction for several metrics.
    """

    prompts: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    relative: float
    p: float
    p_holm: float
    rank_biserial: float
    cohen_d: float
    needed: float


def interval(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of a mean by the bias-corrected and accelerated bootstrap (Efron 1987; SciPy).

    NaN for fewer than two values, the value itself where all are equal.
    """
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, batch=1000, method="BCa", random_state=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def signed_rank(differences: np.ndarray) -> tuple[float, float]:
    """(p, rank-biserial correlation) of Wilcoxon's signed-rank test; differences of zero are left out (Wilcoxon 1945).

    p is 1 where all are zero, NaN without differences. The correlation: Kerby 2014.
    """
    if not len(differences):
        return math.nan, math.nan
    apart = differences[differences != 0]
    if not len(apart):
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(apart))
    correlation = float((ranks[apart > 0].sum() - ranks[apart < 0].sum()) / ranks.sum())
    return float(stats.wilcoxon(apart).pvalue), correlation


def needed_prompts(deviation: float, apart: float) -> float:
    """Pairs for a two-sided paired t-test of level 0.05 to find a difference of `apart` with power 0.8.

    From the noncentral t distribution, without rounding; 2 is the least. NaN where either number is not known.
    """
    if not (math.isfinite(deviation) and math.isfinite(apart)) or apart == 0:
        return math.nan
    if deviation < abs(apart) / 20:  # two pairs have more power than that, and SciPy's distribution gives NaN
        return 2.0
    effect = abs(apart) / deviation

    def missing(pairs: float) -> float:
        edge = stats.t.ppf(1 - LEVEL / 2, pairs - 1)
        shift = effect * math.sqrt(pairs)
        beyond, below = stats.nct.sf(edge, pairs - 1, shift), stats.nct.cdf(-edge, pairs - 1, shift)
        return float(np.nan_to_num(beyond, nan=1.0) + np.nan_to_num(below)) - POWER  # SciPy's NaN: far out in a tail

    normal = ((stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)) / effect) ** 2
    if normal > 1000:  # within 2 pairs of the t-test's
        return float(normal + 2)
    return 2.0 if missing(2.0) >= 0 else float(optimize.brentq(missing, 2.0, normal + 20))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction over one family of tests; a nan is no test, and stays nan."""
    known = sorted((value, name) for name, value in p.items() if np.isfinite(value))
    out, worst = dict.fromkeys(p, float("nan")), 0.0
    for rank, (value, name) in enumerate(known):
        worst = max(worst, min(1.0, (len(known) - rank) * value))
        out[name] = worst
    return out


def compare(values: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> dict[str, Comparison]:
    """Compares A with B in every metric.

    Args:
      values: by metric, A's and B's values prompt by prompt; a pair with a NaN is left out.
    """
    rows = {name: _compared(np.asarray(a, float), np.asarray(b, float), seed) for name, (a, b) in values.items()}
    corrected = holm({name: row["p"] for name, row in rows.items()})
    return {name: Comparison(**row, p_holm=corrected[name]) for name, row in rows.items()}


def _compared(a: np.ndarray, b: np.ndarray, seed: int) -> dict[str, Any]:
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    gap = b - a
    count = len(gap)
    mean_a = float(a.mean()) if count else math.nan
    difference = float(gap.mean()) if count else math.nan
    deviation = float(gap.std(ddof=1)) if count > 1 else math.nan
    low, high = interval(gap, seed=seed)
    p, correlation = signed_rank(gap)
    return {
        "prompts": count,
        "mean_a": mean_a,
        "mean_b": float(b.mean()) if count else math.nan,
        "difference": difference,
        "low": low,
        "high": high,
        "relative": difference / abs(mean_a) if mean_a else math.nan,
        "p": p,
        "rank_biserial": correlation,
        "cohen_d": difference / deviation if deviation > 0 else (0.0 if difference == 0 else math.nan),
        "needed": needed_prompts(deviation, APART * mean_a),
    }


def as_json(row: Comparison) -> dict[str, float | None]:
    """A comparison for JSON, which has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(row).items()}
