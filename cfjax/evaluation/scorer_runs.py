"""Scorers over the clips of a folder: one after the other, a record for each clip, numbers into the clips' scores.

scorers/NAME/clips/CLIP.json     numbers or features of one clip; kept by the next command if the clip, its reference,
                                 prompt, the scorer's version, weights and options are the same
scorers/NAME/against/CLIP.json   features of a reference
scorers/NAME/run_HASH/           of a scorer with a loop of its own: what it has done of these clips in its version;
                                 what else decides, it has to compare itself
scorers/weights.json             SHA-256 of weights by path, size and time
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import files_below, local_path, one_line, read_if_whole, write_atomically
from cfjax.core.progress import Progress
from cfjax.core.schema import each_of, number, one_of, several, table, text, whole
from cfjax.data.pictures import Unusable
from cfjax.evaluation.clip_score import ClipScore, record_name
from cfjax.evaluation.clip_source import SourceClip
from cfjax.evaluation.scorers import (
    ClipScorer,
    FolderScorer,
    ScoredClip,
    ScorerSettings,
    SetScorer,
    checked_values,
    make_scorer,
)

SCORERS = "scorers"
VERSION = 1
_FLOAT = number(-1e300, 1e300)
_RECORD = table(
    {
        "version": one_of(VERSION),
        "made_of": text(2**16),
        "fault": text(4096),
        "values": each_of(_FLOAT),
        "features": several(several(_FLOAT, most=2**16), most=2**12),
    }
)
_SUMS = each_of(table({"size": whole(), "time": whole(-(2**62), 2**62), "sha256": text(64)}))


@dataclass(frozen=True)
class ScorerResult:
    """What a scorer says of a folder.

    Attributes:
      version, weights, options: what decided its numbers; weights are SHA-256 by file name.
      clips: numbers by clip and metric.  folder: numbers of the whole folder by metric.
      against: clips on the other side, of numbers of a whole folder.
      faults: why clips have no number, by name.
    """

    name: str
    version: str
    weights: Mapping[str, str]
    options: Mapping[str, str]
    clips: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    folder: Mapping[str, float] = field(default_factory=dict)
    against: int = 0
    faults: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """What videos.json keeps besides the clips' numbers."""
        return {
            "version": self.version,
            "weights": dict(self.weights),
            "options": dict(self.options),
            "folder": dict(self.folder),
            "clips": len(self.clips),
            "against": self.against,
        }


@dataclass(frozen=True)
class ScorerJob:
    """Clips, the whole other folder, and where records go."""

    clips: Sequence[ScoredClip]
    others: Sequence[SourceClip]
    workdir: Path
    title: str = ""


def check_scorers(asked: Sequence[ScorerSettings], workdir: Path, against: str) -> None:
    """Makes every scorer once, so that what is missing is told before anything is measured.

    Raises:
      UserError: a package, weights or a reference is missing, or the workdir is in a bucket.
    """
    for settings in _placed(asked, workdir):
        local_path(workdir, "--workdir", "scorers write to this machine")
        with closing(make_scorer(settings)) as scorer:
            if "reference" in scorer.needs and not against:
                raise UserError(
                    f"--config.score: {scorer.name} compares with a reference: give --config.against=FOLDER beside "
                    "--config.videos; two folders that were measured so are compared by their workdirs"
                )


def _placed(asked: Sequence[ScorerSettings], workdir: Path) -> list[ScorerSettings]:
    return [replace(one, folder=workdir / SCORERS / one.name) for one in asked]


def run_scorers(asked: Sequence[ScorerSettings], job: ScorerJob) -> list[ScorerResult]:
    """Runs scorers one after the other, each made when its turn comes.

    Raises:
      UserError: a scorer fails, or no clip has what it needs; what was scored before is kept.
    """
    return [_run(settings, job) for settings in _placed(asked, job.workdir)]


def _run(settings: ScorerSettings, job: ScorerJob) -> ScorerResult:
    settings.folder.mkdir(parents=True, exist_ok=True)
    with closing(make_scorer(settings)) as scorer:
        sums = weight_sums(scorer.weights(), Path(settings.weights), settings.folder.parent / "weights.json")
        result = ScorerResult(settings.name, scorer.version, sums, dict(settings.options))
        decided = [scorer.version, sums, sorted(settings.options.items())]
        if isinstance(scorer, ClipScorer):
            return _clip_numbers(scorer, settings, job, decided, result)
        if isinstance(scorer, SetScorer):
            return _set_numbers(scorer, settings, job, decided, result)
        assert isinstance(scorer, FolderScorer)
        return _folder_numbers(scorer, settings, job, result)


def _clip_numbers(
    scorer: ClipScorer, settings: ScorerSettings, job: ScorerJob, decided: Sequence[Any], result: ScorerResult
) -> ScorerResult:
    clips = [clip for clip in job.clips if clip.reference or "reference" not in scorer.needs]
    if not clips:
        raise UserError(f"--config.score: {scorer.name}: no clip has a reference of its name in --config.against")
    missing = {clip.name: "no reference" for clip in job.clips if not clip.reference and "reference" in scorer.needs}

    def measure(clip: ScoredClip) -> dict[str, Any]:
        return {"values": checked_values(scorer.name, clip.name, scorer.score(clip)), "features": []}

    records = _records(clips, settings.folder / "clips", decided, measure, job.title, scorer.name)
    found = {name: one["values"] for name, one in records.items() if not one["fault"]}
    faults = {name: one["fault"] for name, one in records.items() if one["fault"]}
    return replace(result, clips=found, faults=missing | faults)


def _set_numbers(
    scorer: SetScorer, settings: ScorerSettings, job: ScorerJob, decided: Sequence[Any], result: ScorerResult
) -> ScorerResult:
    def measure(clip: ScoredClip) -> dict[str, Any]:
        features_NC = np.asarray(scorer.features(clip), np.float64)
        if features_NC.ndim != 2 or not np.isfinite(features_NC).all():
            raise UserError(f"scorer {scorer.name}, {clip.name}: features must be finite [N, C]")
        return {"values": {}, "features": features_NC.tolist()}

    ours = [replace(clip, reference=None, prompt="", seed=-1) for clip in job.clips]
    theirs = [ScoredClip(source, fps=ours[0].fps) for source in job.others]
    sides, faults = [], dict[str, str]()
    for clips, place in ((ours, "clips"), (theirs, "against")):
        records = _records(clips, settings.folder / place, decided, measure, job.title, scorer.name)
        faults |= {f"{name} ({place})": one["fault"] for name, one in records.items() if one["fault"]}
        sides.append({name: one["features"] for name, one in records.items() if not one["fault"]})
    if not all(sides):
        raise UserError(f"scorer {scorer.name}: no clip could be measured; {next(iter(faults.values()), '')}")
    a_NC, b_NC = (np.concatenate([np.array(rows, np.float64) for rows in side.values()]) for side in sides)
    numbers = checked_values(scorer.name, "the folder", scorer.distance(a_NC, b_NC))
    return replace(result, folder=numbers, clips={name: {} for name in sides[0]}, against=len(sides[1]), faults=faults)


def _folder_numbers(
    scorer: FolderScorer, settings: ScorerSettings, job: ScorerJob, result: ScorerResult
) -> ScorerResult:
    made_of = json.dumps([scorer.version, [[clip.name, _made_of(clip, [])] for clip in job.clips]])
    folder = settings.folder / f"run_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    for other in settings.folder.glob("run_*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(scorer.steps(), "step", f"{job.title}, {scorer.name}".lstrip(", ")) as bar:
        found = _guarded(scorer.name, "", lambda: scorer.score_folder(job.clips, folder, bar.update))
    clips = {name: checked_values(scorer.name, name, values) for name, values in found.clips.items()}
    numbers = checked_values(scorer.name, "the folder", found.folder)
    return replace(result, clips=clips, folder=numbers, faults=dict(found.faults), notes=tuple(found.notes))


def _records(
    clips: Sequence[ScoredClip],
    folder: Path,
    decided: Sequence[Any],
    measure: Callable[[ScoredClip], dict[str, Any]],
    title: str,
    scorer: str,
) -> dict[str, dict[str, Any]]:
    """The record of every clip by name, read, or measured and written."""
    out = {}
    with Progress(len(clips), "clip", f"{title}, {scorer}".lstrip(", ")) as bar:
        for clip in clips:
            file, made_of = folder / record_name(clip.name), _made_of(clip, decided)
            found = read_if_whole(file)
            if found is None or _RECORD("", found) or found["made_of"] != made_of:
                found = {"version": VERSION, "made_of": made_of, "fault": "", "values": {}, "features": []}
                try:
                    found |= _guarded(scorer, clip.name, lambda clip=clip: measure(clip))  # type: ignore[misc]
                except Unusable as error:
                    found["fault"] = str(error)
                write_atomically(file, json.dumps(found) + "\n")
            out[clip.name] = found
            bar.update()
    return out


def _guarded(scorer: str, clip: str, call: Callable[[], Any]) -> Any:
    """What a scorer gives; any error of it is one line. What was scored before it is kept."""
    try:
        return call()
    except (UserError, Unusable):
        raise
    except Exception as error:
        where = f", {clip}" if clip else ""
        raise UserError(f"scorer {scorer}{where}: {one_line(error)[:400]}") from error


def _made_of(clip: ScoredClip, decided: Sequence[Any]) -> str:
    """A line that is another one when the numbers may be."""
    try:
        sums = [clip.source.checksum(), clip.reference.checksum() if clip.reference else ""]
    except OSError as error:
        raise UserError(f"{clip.source.path}: cannot be read ({error.strerror or error})") from None
    return json.dumps([*sums, clip.prompt, clip.fps, *decided])


def weight_sums(files: Sequence[Path], root: Path, cache: Path) -> dict[str, str]:
    """The SHA-256 of weights by their names below `root`.

    Sums are kept in `cache`, and read again for a file whose size and time are those of before.

    Raises:
      UserError: a file cannot be read.
    """
    known = read_if_whole(cache)
    known = known if known is not None and not _SUMS("", known) else {}
    try:
        asked = {}
        for file in files:
            about = file.stat()
            asked[file] = {"size": about.st_size, "time": about.st_mtime_ns}
        new = [file for file in files if not asked[file].items() <= known.get(str(file.resolve()), {}).items()]
        with Progress(sum(asked[file]["size"] for file in new), "B", "SHA-256 of weights", shown=bool(new)) as bar:
            for file in new:
                known[str(file.resolve())] = {**asked[file], "sha256": sha256(file, bar.update)}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror or error})") from None
    if new:
        write_atomically(cache, json.dumps(known, indent=1) + "\n")
    inside = root if root.is_dir() else root.parent
    names = {file: str(file.relative_to(inside)) if file.is_relative_to(inside) else file.name for file in files}
    return {name: known[str(file.resolve())]["sha256"] for file, name in names.items()}


def sha256(file: Path, done: Callable[[int], Any] = lambda count: None) -> str:
    """Of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            done(len(piece))
    return digest.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """A file itself, or all files below a folder but hidden ones."""
    if path.is_file():
        return [path]
    names = [name for name in files_below(path) if not any(part.startswith(".") for part in name.split("/"))]
    return [path / name for name in sorted(names)]


def with_numbers(scores: Sequence[ClipScore], results: Sequence[ScorerResult]) -> list[ClipScore]:
    """The clips' scores with what scorers say of them."""
    out = []
    for score in scores:
        more = {name: x for result in results for name, x in result.clips.get(score.file, {}).items()}
        out.append(replace(score, values={**score.values, **more}))
    return out


def result_notes(results: Sequence[ScorerResult]) -> list[str]:
    """Lines on what scorers could not score, the first few of each."""
    lines = []
    for result in results:
        shown = [f"{result.name}: {name}: {why}" for name, why in list(result.faults.items())[:3]]
        more = len(result.faults) - len(shown)
        lines += [*shown, *([f"{result.name}: {more} more without a number"] if more > 0 else [])]
        lines += [f"{result.name}: {note}" for note in result.notes]
    return lines
