"""What a folder of clips amounts to: means with intervals, diversity over seeds, and what could not be measured."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.limits import LIST_BYTES
from cfjax.core.paths import write_atomically
from cfjax.core.schema import anything, checked, each_of, load_json, number, several, table, text, whole
from cfjax.evaluation.clip_identity import Identity, identities
from cfjax.evaluation.clip_score import SCORE, ClipScore, Settings, score_of, without_pictures
from cfjax.evaluation.clip_source import SourceClip, find_source_clips
from cfjax.evaluation.clip_table import metrics_of
from cfjax.evaluation.paired import interval

VIDEOS = "videos.json"
_OTHERS = 2000  # pairs of clips of different prompts that diversity is compared with


@dataclass(frozen=True)
class Scored:
    """A folder whose clips were measured.

    Attributes:
      videos: the folder.  found_by: how prompts and seeds were found, in words.
      identity: of each clip, in the order of `scores`.
      notes: lines to be told.
      scorers: what decided each scorer's numbers, and its numbers of the whole folder.
      prompts: the list of prompts that was given; {} for none.
    """

    videos: str
    found_by: str
    scores: Sequence[ClipScore]
    identity: Sequence[Identity]
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str = ""
    notes: tuple[str, ...] = ()
    scorers: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)

    def measured(self) -> list[tuple[Identity, ClipScore]]:
        """Those that could be measured."""
        return [(one, score) for one, score in zip(self.identity, self.scores, strict=True) if not score.fault]


def references(clips: Sequence[SourceClip], others: Sequence[SourceClip]) -> dict[str, SourceClip]:
    """The reference of each clip that has one, by name: of the same name, with or without the suffix."""
    by_name = {clip.name: clip for clip in others}
    by_stem = {clip.stem: clip for clip in others}
    pairs = ((clip.name, by_name.get(clip.name) or by_stem.get(clip.stem)) for clip in clips)
    return {name: other for name, other in pairs if other is not None}


def find_references(clips: Sequence[SourceClip], against: str) -> tuple[dict[str, SourceClip], tuple[str, ...]]:
    """`references` in a folder, and a line on the clips and the references that are left over.

    Raises:
      UserError: no clip has one.
    """
    if not against:
        return {}, ()
    others = find_source_clips(against, "against")
    found = references(clips, others)
    if not found:
        raise UserError(
            f"--config.against={against}: no clip there has the name of one of the videos, such as {clips[0].name}"
        )
    alone = [clip.name for clip in clips if clip.name not in found]
    used = {clip.name for clip in found.values()}
    spare = [clip.name for clip in others if clip.name not in used]
    return found, (*_left_over("videos without a reference", alone), *_left_over("references without a video", spare))


def _left_over(what: str, names: Sequence[str]) -> list[str]:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(names)} {what}: {shown}"] if names else []


def gathered(
    folder: Path, clips: Sequence[SourceClip], scores: Sequence[ClipScore], settings: Settings, notes: Sequence[str]
) -> Scored:
    """Scores with their prompts and seeds, and lines on what was not measured.

    Raises:
      UserError: not one clip could be measured.
    """
    found, how = identities(folder, clips)
    faults = [f"not measured: {score.file}: {score.fault}" for score in scores if score.fault]
    if len(faults) == len(scores):
        raise UserError(f"{folder}: none of its clips could be measured; {faults[0].removeprefix('not measured: ')}")
    said = [f"{score.file}: {score.note}" for score in scores if score.note]
    return Scored(
        str(folder), how, scores, [found[clip.name] for clip in clips], asdict(settings), notes=(*notes, *faults, *said)
    )


def by_prompt(rows: Sequence[tuple[Identity, float]]) -> dict[str, float]:
    """Means over the clips of each prompt, by the prompt's key."""
    values: dict[str, list[float]] = {}
    for identity, value in rows:
        values.setdefault(identity.key(), []).append(value)
    return {key: float(np.mean(found)) for key, found in values.items()}


def summary(scored: Scored) -> dict[str, dict[str, float | int]]:
    """By metric: mean over the prompts, its 95 % bootstrap interval where there are two or more, and the clips."""
    out = {}
    for metric in metrics_of(name for _, score in scored.measured() for name in score.values):
        rows = [(i, score.values[metric.name]) for i, score in scored.measured() if metric.name in score.values]
        if rows:
            means = np.array(list(by_prompt(rows).values()))
            low, high = interval(means)
            found: dict[str, float | int] = {"mean": float(means.mean()), "clips": len(rows), "prompts": len(means)}
            out[metric.name] = found | ({"low": low, "high": high} if math.isfinite(low) else {})
    return out


def diversity(scored: Scored) -> dict[str, float]:
    """How clips of one prompt differ over its seeds, as `evaluation.guard` defines it, on 8 frames of 16 x 16 pixels.

    Returns:
      seed_distance, mean absolute difference in grey levels of 255 over the pairs of one prompt's clips, the mean over
      prompts; diversity, that over the mean for pairs of clips of different prompts, 2,000 at most, drawn with a fixed
      seed: 0 when every seed gives one clip. {} where no prompt has two seeds.
    """
    small: dict[str, list[np.ndarray]] = {}
    for identity, score in scored.measured():
        if (pictures := score.pictures()) is not None:
            small.setdefault(identity.key(), []).append(pictures.astype(np.float32))
    within = []
    for clips in small.values():
        gaps = [float(np.abs(a - b).mean()) for i, a in enumerate(clips) for b in clips[i + 1 :]]
        within += [float(np.mean(gaps))] if gaps else []
    if not within:
        return {}
    out = {"seed_distance": float(np.mean(within)), "diversity_prompts": float(len(within))}
    if len(small) > 1:
        rng, groups = np.random.default_rng(0), list(small.values())
        drawn = [rng.choice(len(groups), 2, replace=False) for _ in range(_OTHERS)]
        pairs = ((groups[i], groups[j]) for i, j in drawn)
        apart = [float(np.abs(a[rng.integers(len(a))] - b[rng.integers(len(b))]).mean()) for a, b in pairs]
        between = float(np.mean(apart))
        out["diversity"] = out["seed_distance"] / between if between > 0 else 0.0
    return out


def save_scored(workdir: Path, scored: Scored) -> dict[str, Any]:
    """Writes videos.json and returns its content."""
    packages = {name: version(name) for name in ("av", "numpy", "scipy", "opencv-python-headless") if _installed(name)}
    content = {
        "videos": scored.videos,
        "against": scored.against,
        "settings": scored.settings,
        "packages": packages,
        "prompts_by": scored.found_by,
        "notes": scored.notes,
        "summary": summary(scored),
        "diversity": diversity(scored),
        **({"scorers": scored.scorers} if scored.scorers else {}),
        **({"prompts": scored.prompts} if scored.prompts else {}),
        "clips": [
            {"prompt": one.prompt, "seed": one.seed, **_plain(score)}
            for one, score in zip(scored.identity, scored.scores, strict=True)
        ],
    }
    write_atomically(workdir / VIDEOS, json.dumps(content, indent=1) + "\n")
    return content


def _plain(score: ClipScore) -> dict[str, Any]:
    values = asdict(without_pictures(score))
    del values["small"]
    return values


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


_SCORER = table(
    {
        "version": text(4096),
        "weights": each_of(text(64)),
        "options": each_of(text(2**16)),
        "folder": each_of(number(-1e300, 1e300)),
        "clips": whole(),
        "against": whole(),
    }
)
_CLIPS = several(table({"prompt": text(100_000), "seed": whole(-1, 10**10)}), 1)
_SCORED = table(
    {"videos": text(4096), "prompts_by": text(4096), "clips": _CLIPS},
    {
        "settings": each_of(anything),
        "notes": several(text(2**14)),
        "scorers": each_of(_SCORER),
        "prompts": each_of(anything),
        "against": text(4096),
    },
)


def load_scored(workdir: Path) -> Scored:
    """What `save_scored` wrote, without the small frames.

    Raises:
      UserError: it is not there, or damaged.
    """
    file = workdir / VIDEOS
    try:
        content = checked(_SCORED, load_json(file, LIST_BYTES), file)
        known = content.get("scorers", {}).keys()
        clips = enumerate(content["clips"])
        scores = [score_of(checked(SCORE, clip, f"{file}: clips[{n}]"), known) for n, clip in clips]
    except FileNotFoundError:
        raise UserError(f"{file}: is not there; cfjax evaluate --config.videos=FOLDER writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); cfjax evaluate --config.videos writes it again") from None
    identity = [Identity(clip["prompt"], clip["seed"]) for clip in content["clips"]]
    return Scored(
        content["videos"],
        content["prompts_by"],
        scores,
        identity,
        content.get("settings", {}),
        content.get("against", ""),
        tuple(content.get("notes", ())),
        content.get("scorers", {}),
        content.get("prompts", {}),
    )


def named(scored: Scored, against: str) -> Scored:
    """The same with the folder of its references."""
    return replace(scored, against=against)
