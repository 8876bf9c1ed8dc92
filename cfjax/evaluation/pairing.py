"""Clips of two systems that were made for the same prompt and seed, and what is compared of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cfjax.core.errors import UserError
from cfjax.evaluation.clip_identity import Identity
from cfjax.evaluation.clip_score import ClipScore
from cfjax.evaluation.clip_summary import Scored
from cfjax.evaluation.clip_table import Metric, metrics_of

Clip = tuple[Identity, ClipScore]


@dataclass(frozen=True)
class Pair:
    """Two clips of one prompt, or all of a prompt's clips where the systems have no seed in common."""

    prompt: str
    seed: int
    a: tuple[ClipScore, ...]
    b: tuple[ClipScore, ...]

    def key(self) -> str:
        """The prompt's."""
        return Identity(self.prompt).key()

    def values(self, name: str, size: bool) -> tuple[float, float]:
        """A metric on both sides, means over the clips; NaN where none has it."""
        found = [np.array([score.values[name] for score in side if name in score.values]) for side in (self.a, self.b)]
        a, b = (float((np.abs(x) if size else x).mean()) if len(x) else math.nan for x in found)
        return a, b


@dataclass(frozen=True)
class Paired:
    """All pairs; how they were found, in words; what was left over on each side, by file."""

    pairs: Sequence[Pair]
    how: str
    alone_a: Sequence[str]
    alone_b: Sequence[str]


def pair_clips(a: Scored, b: Scored) -> Paired:
    """Pairs clips by prompt and seed; by prompt alone, each with the mean over its seeds, where no seed is shared.

    A prompt and seed that one side has several times is left over, as nothing says which is meant.

    Raises:
      UserError: no prompt is on both sides.
    """
    sides = [_keyed(scored, with_seed=True) for scored in (a, b)]
    how = f"prompt and seed (A: {a.found_by}; B: {b.found_by})"
    if not (shared := sides[0].keys() & sides[1].keys()):
        sides = [_keyed(scored, with_seed=False) for scored in (a, b)]
        how = f"prompt alone, means over seeds, as no seed is shared (A: {a.found_by}; B: {b.found_by})"
        shared = sides[0].keys() & sides[1].keys()
    else:
        shared = {key for key in shared if len(sides[0][key]) == len(sides[1][key]) == 1}
    if not shared:
        raise UserError(
            f"--config.compare: no prompt is in both folders; A has {a.measured()[0][0].prompt!r} ({a.found_by}), B "
            f"{b.measured()[0][0].prompt!r} ({b.found_by}); name clips alike, or list file, prompt and seed in a "
            "manifest.csv of each folder"
        )
    pairs = [
        Pair(sides[0][key][0][0].prompt, key[1], *(tuple(score for _, score in side[key]) for side in sides))
        for key in sorted(shared)
    ]
    alone = [
        [score.file for key, clips in sorted(side.items()) if key not in shared for _, score in clips] for side in sides
    ]
    return Paired(pairs, how, *alone)


def _keyed(scored: Scored, *, with_seed: bool) -> dict[tuple[str, int], list[Clip]]:
    out: dict[tuple[str, int], list[Clip]] = {}
    for identity, score in scored.measured():
        out.setdefault((identity.key(), identity.seed if with_seed else -1), []).append((identity, score))
    return out


def _compared(pairs: Sequence[Pair]) -> list[Metric]:
    """The metrics that some clip of the pairs has and that systems are compared by."""
    clips = (score for pair in pairs for side in (pair.a, pair.b) for score in side)
    return [metric for metric in metrics_of(name for score in clips for name in score.values) if metric.compared]


def values_of(pairs: Sequence[Pair]) -> tuple[dict[str, tuple[list[float], list[float]]], str]:
    """A's and B's values by metric, unit by unit, and what a unit is: "prompt", or "seed" where there is one prompt.

    A prompt has the mean over its pairs that have the metric on both sides. Metrics that no unit has are left out.
    """
    prompts = {pair.key() for pair in pairs}
    unit = "prompt" if len(prompts) > 1 or len(pairs) == 1 else "seed"
    out = {}
    for metric in _compared(pairs):
        groups: dict[object, list[tuple[float, float]]] = {}
        for number, pair in enumerate(pairs):
            found = pair.values(metric.name, metric.size)
            if all(map(math.isfinite, found)):
                groups.setdefault(pair.key() if unit == "prompt" else number, []).append(found)
        if groups:
            means = np.array([np.mean(rows, axis=0) for rows in groups.values()])
            out[metric.name] = means[:, 0].tolist(), means[:, 1].tolist()
    return out, unit


def most_different(pairs: Sequence[Pair], count: int) -> list[tuple[Pair, str]]:
    """The pairs that differ most, and by what: the mean over metrics of |difference| over its root mean square.

    The metric named is the one with the largest term.
    """
    metrics = _compared(pairs)
    gaps = np.full((len(pairs), len(metrics)), math.nan)
    for m, metric in enumerate(metrics):
        for n, pair in enumerate(pairs):
            a, b = pair.values(metric.name, metric.size)
            gaps[n, m] = abs(b - a)
    known = np.isfinite(gaps)
    squares = np.where(known, gaps, 0.0) ** 2
    scale = np.sqrt(squares.sum(0) / np.maximum(known.sum(0), 1))
    terms = np.where(known & (scale > 0), gaps / np.where(scale > 0, scale, 1.0), 0.0)
    totals = terms.sum(1) / np.maximum(known.sum(1), 1)
    order = np.argsort(-totals, kind="stable")[:count]
    return [(pairs[n], metrics[int(terms[n].argmax())].title) for n in order]


def alike(a: Scored, b: Scored) -> tuple[Scored, Scored, list[str]]:
    """Both sides without the numbers of scorers that ran in another version, with other weights or options.

    Returns:
      the sides, and a line for each scorer that was left out.
    """
    lines, out = [], set()
    for name in a.scorers.keys() & b.scorers.keys():
        ours, theirs = a.scorers[name], b.scorers[name]
        for part in ("version", "weights", "options"):
            if ours[part] != theirs[part]:
                lines.append(f"not compared: {name}, whose {part} differ: A {ours[part]}, B {theirs[part]}")
                out.add(name)
                break
    return _without(a, out), _without(b, out), sorted(lines)


def _without(scored: Scored, names: set[str]) -> Scored:
    """A side without the numbers of some scorers."""
    if not names:
        return scored
    scores = [
        replace(score, values={n: x for n, x in score.values.items() if n.partition(".")[0] not in names})
        for score in scored.scores
    ]
    return replace(scored, scores=scores, scorers={n: x for n, x in scored.scorers.items() if n not in names})


def whole_folders(a: Scored, b: Scored) -> dict[str, tuple[float, float]]:
    """Scorers' numbers of whole folders that both sides have; those against a reference for equal references."""
    out: dict[str, tuple[float, float]] = {}
    for name in sorted(a.scorers.keys() & b.scorers.keys()):
        sides = a.scorers[name], b.scorers[name]
        if any(side["against"] for side in sides) and a.against != b.against:
            continue
        shared = (key for key in sides[0]["folder"] if key in sides[1]["folder"])
        out |= {key: (sides[0]["folder"][key], sides[1]["folder"][key]) for key in shared}
    return out
