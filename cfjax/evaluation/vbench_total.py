"""VBench's quality, semantic and total scores from its own results, with every dimension's share of them.

A dimension's score s is scaled to (s - low) / (high - low) of its range; quality is the mean over seven dimensions
(dynamic degree weighs a half), semantic the mean over nine, total (4 quality + semantic) / 5. Ranges and weights:
Vchitect/VBench `scripts/constant.py`, the sums `scripts/cal_final_score.py`. That script counts a dimension that is
missing as 0 and goes on; here there is no total then.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cfjax.core.errors import UserError
from cfjax.core.limits import LIST_BYTES
from cfjax.core.paths import local_path, one_line
from cfjax.core.schema import load_json

RESULT = "vbench.json"
RESULTS = "*_eval_results.json"  # as `VBench.evaluate` names them
QUALITY_WEIGHT = 4.0  # in the total, semantic's being 1


@dataclass(frozen=True)
class Dimension:
    """Its range, in which scores are scaled to 0 to 1, and its weight in its group's mean."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
    "dynamic_degree": Dimension(weight=0.5),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
DIMENSIONS = QUALITY | SEMANTIC


def group_score(scores: Mapping[str, float], group: Mapping[str, Dimension]) -> float | None:
    """The weighted mean of a group's scaled scores; None if one is missing."""
    if group.keys() - scores.keys():
        return None
    scaled = [one.weight * (scores[name] - one.low) / (one.high - one.low) for name, one in group.items()]
    return sum(scaled) / sum(one.weight for one in group.values())


def summary(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Quality, semantic and total, 0 to 1; None where a dimension that it needs is missing."""
    quality, semantic = group_score(scores, QUALITY), group_score(scores, SEMANTIC)
    both = None if quality is None or semantic is None else (QUALITY_WEIGHT * quality + semantic) / (QUALITY_WEIGHT + 1)
    return {"quality": quality, "semantic": semantic, "total": both}


def read_results(place: str) -> dict[str, float]:
    """The score of every dimension in VBench's results: a file, or a folder of files, each of some dimensions.

    Raises:
      UserError: none there, a file that is no such result, a dimension that there is none of, or one with two scores.
    """
    path = local_path(place, "--config.vbench", "results are read from this machine")
    files = sorted(path.rglob(RESULTS)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--config.vbench={place}: no {RESULTS} in it; VBench.evaluate writes one into its output_path")
    scores: dict[str, float] = {}
    whose: dict[str, Path] = {}
    for file in files:
        for name, score in _scores_of(file).items():
            if name in scores and scores[name] != score:
                raise UserError(f"{file}: {name} is {score:g}, in {whose[name]} {scores[name]:g}; leave one of them")
            scores[name], whose[name] = score, file
    return scores


def _scores_of(file: Path) -> dict[str, float]:
    try:
        content = load_json(file, LIST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: broken or cut short ({one_line(error)}); copy it again") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: no results of VBench: a JSON object of dimensions, each [score, videos]")
    out = {}
    for name, value in content.items():
        own = name.replace(" ", "_")
        if own not in DIMENSIONS:
            raise UserError(f"{file}: {name!r:.60} is no dimension of VBench; those are {', '.join(DIMENSIONS)}")
        score = value[0] if isinstance(value, list) and value else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise UserError(f"{file}: {name}: its score must be a number from 0 to 1, in a list [score, videos]")
        out[own] = float(score)
    return out


def missing_of(scores: Mapping[str, float]) -> list[str]:
    """The dimensions without a score."""
    return [name for name in DIMENSIONS if name not in scores]


def total_lines(scores: Mapping[str, float]) -> list[str]:
    """The table, in per cent as publications have it."""
    lines = []
    for title, group in (("quality", QUALITY), ("semantic", SEMANTIC)):
        lines += [f"  {name:24s} {100 * scores[name]:6.2f}" for name in group if name in scores]
        lines.append(f"{title:26s} {_percent(summary(scores)[title])}")
    lines.append(f"{'total':26s} {_percent(summary(scores)['total'])}")
    if missing := missing_of(scores):
        lines.append(f"missing: {', '.join(missing)}; VBench's own script would count them as 0")
    return lines


def _percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:6.2f}"


def total_json(scores: Mapping[str, float], place: str) -> str:
    """vbench.json: the scores as read, and what they amount to."""
    about = {**summary(scores), "missing": missing_of(scores)}
    return json.dumps({"vbench": place, "scores": dict(scores), **about}, indent=1) + "\n"
