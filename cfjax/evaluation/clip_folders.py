"""Whole folders: measured into a workdir, and compared."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cfjax.core.errors import UserError
from cfjax.core.paths import local_path, write_atomically
from cfjax.core.progress import Progress
from cfjax.evaluation.clip_score import Settings, score_clips
from cfjax.evaluation.clip_source import find_source_clips
from cfjax.evaluation.clip_summary import VIDEOS, Scored, find_references, gathered, load_scored, save_scored
from cfjax.evaluation.clip_table import known_groups, metric_of, metrics_of
from cfjax.evaluation.compare_page import SHOWN, comparison_json, comparison_page, shown_needed, shown_number, shown_p
from cfjax.evaluation.opencv import opencv
from cfjax.evaluation.paired import Comparison, as_json, compare
from cfjax.evaluation.pairing import Paired, alike, most_different, pair_clips, values_of, whole_folders
from cfjax.evaluation.prompt_lists import PromptList, apply_list, read_prompt_list
from cfjax.evaluation.scorer_runs import (
    ScorerJob,
    ScorerResult,
    check_scorers,
    result_notes,
    run_scorers,
    with_numbers,
)
from cfjax.evaluation.scorers import ScoredClip, ScorerSettings

PAGE, RESULT = "compare.html", "compare.json"
SIDES = ("a", "b")


@dataclass(frozen=True)
class Scoring:
    """What is asked beside the metrics that need no weights: scorers, and a list of prompts (`prompt_lists`)."""

    scorers: Sequence[ScorerSettings] = ()
    prompts: str = ""


def check_choice(settings: Settings) -> None:
    """Raises UserError for metrics that are not known, or without OpenCV."""
    if fault := known_groups(settings.metrics):
        raise UserError(fault)
    if settings.first_block and not settings.block:
        raise UserError(f"--config.first_block={settings.first_block}: give the others' length too, --config.block=12")
    opencv()


def score_folder(
    videos: str, against: str, settings: Settings, workdir: Path, *, workers: int, scoring: Scoring = Scoring()
) -> Scored:
    """Measures all clips of a folder into a workdir, and writes videos.json there.

    Raises:
      UserError: no folder, no clips, none that can be read, no clip has a reference, or a scorer cannot be run.
    """
    check_choice(settings)
    listed = read_prompt_list(scoring.prompts) if scoring.prompts else None
    check_scorers(scoring.scorers, workdir, against)
    folder = local_path(videos, "--config.videos", "videos are read from this machine")
    clips = find_source_clips(folder, "videos")
    found, notes = find_references(clips, against)
    with Progress(len(clips), "clip", folder.name) as bar:
        scores = score_clips(clips, found, settings, workdir, workers=workers, done=bar.update)
    scored = replace(gathered(folder, clips, scores, settings, notes), against=against)
    if listed:
        scored = with_list(scored, listed)
    if scoring.scorers:
        others = find_source_clips(against, "against") if against else []
        jobs = [
            ScoredClip(clip, one.prompt, one.seed, found.get(clip.name), settings.fps)
            for clip, one, score in zip(clips, scored.identity, scores, strict=True)
            if not score.fault
        ]
        scored = with_results(scored, run_scorers(scoring.scorers, ScorerJob(jobs, others, workdir, folder.name)))
    save_scored(workdir, scored)
    return scored


def with_list(scored: Scored, listed: PromptList) -> Scored:
    """The same with prompts as a list spells them, and lines on what is left over."""
    found = apply_list(listed, [score.file for score in scored.scores], scored.identity)
    about = listed.as_json(len(scored.scores) - len(found.unlisted), found.seen)
    notes = (*scored.notes, *found.notes())
    return replace(scored, identity=found.identity, prompts=about, notes=notes)


def with_results(scored: Scored, results: Sequence[ScorerResult]) -> Scored:
    """The same with what scorers found."""
    return replace(
        scored,
        scores=with_numbers(scored.scores, results),
        scorers={result.name: result.as_json() for result in results},
        notes=(*scored.notes, *result_notes(results)),
    )


def summary_lines(workdir: Path) -> list[str]:
    """The table of videos.json, line by line."""
    content = json.loads((workdir / VIDEOS).read_text(encoding="utf-8"))
    count = sum(not clip["fault"] for clip in content["clips"])
    lines = [f"{content['videos']}: {count} clips; prompts by {content['prompts_by']}"]
    for name, row in content["summary"].items():
        metric = metric_of(name)
        bounds = f"  [{row['low']:.{metric.digits}f}, {row['high']:.{metric.digits}f}]" if "low" in row else ""
        lines.append(f"  {name:22s} {row['mean']:10.{metric.digits}f}{bounds} {metric.unit}".rstrip())
    lines += [f"  {name:22s} {value:10.3f}" for name, value in content["diversity"].items()]
    for scorer in content.get("scorers", {}).values():
        for name, value in scorer["folder"].items():
            sides = f"{scorer['clips']} clips" + (f" against {scorer['against']}" if scorer["against"] else "")
            lines.append(f"  {name:22s} {value:10.4f}  of {sides}")
    return lines + [f"  {note}" for note in content["notes"]]


def _side(place: str, workdir: Path, settings: Settings, workers: int, scoring: Scoring) -> Scored:
    """A folder that was measured before, or is measured now."""
    folder = local_path(place, "--config.compare", "it is read from this machine")
    if (folder / VIDEOS).is_file():
        if scoring.scorers or scoring.prompts:
            asked = "score" if scoring.scorers else "prompts"
            raise UserError(
                f"--config.{asked}: {folder} was measured before; give {asked} where its clips are measured, beside "
                "--config.videos, or name the folder of its clips here"
            )
        scored = load_scored(folder)
        if not scored.measured():
            raise UserError(f"{folder / VIDEOS}: none of its clips could be measured; it has nothing to compare")
        return scored
    return score_folder(place, "", settings, workdir, workers=workers, scoring=scoring)


def compare_folders(
    places: tuple[str, ...],
    settings: Settings,
    workdir: Path,
    *,
    workers: int,
    tell: Callable[[str], None],
    scoring: Scoring = Scoring(),
) -> None:
    """Compares two folders of clips, or workdirs of such; writes compare.json and, last, compare.html.

    Args:
      tell: takes the lines of the table.

    Raises:
      UserError: not two folders, or nothing in common.
    """
    if len(places) != 2:
        raise UserError(f"--config.compare={','.join(places)}: name two folders, as --config.compare=A,B")
    check_choice(settings)
    a, b = (_side(place, workdir / side, settings, workers, scoring) for place, side in zip(places, SIDES, strict=True))
    a, b, apart = alike(a, b)
    paired = pair_clips(a, b)
    values, unit = values_of(paired.pairs)
    if not values:
        raise UserError("--config.compare: the clips of the two folders have no metric in common")
    rows, chosen = compare(values), most_different(paired.pairs, SHOWN)
    result = comparison_json({n: as_json(row) for n, row in rows.items()}, unit, paired, a, b, chosen)
    write_atomically(workdir / RESULT, json.dumps(result, indent=1) + "\n")
    write_atomically(workdir / PAGE, comparison_page(rows, unit, paired, a, b, chosen))
    _tell_comparison(rows, paired, a, b, tell)
    for line in (*apart, *whole_lines(a, b)):
        tell(f"  {line}")


def _tell_comparison(
    rows: Mapping[str, Comparison], paired: Paired, a: Scored, b: Scored, tell: Callable[[str], None]
) -> None:
    tell(f"{len(paired.pairs)} pairs, by {paired.how}")
    for side, names in (("A", paired.alone_a), ("B", paired.alone_b)):
        if names:
            tell(f"  {len(names)} of {side} without a partner: {', '.join(names[:3])}{', ...' * (len(names) > 3)}")
    if a.settings and b.settings and (asked := [json.dumps(side.settings) for side in (a, b)])[0] != asked[1]:
        tell(f"  measured with different settings: A {asked[0]}, B {asked[1]}")
    sides = [{name for score in scored.scores for name in score.values} for scored in (a, b)]
    if alone := [metric.name for metric in metrics_of(sides[0] ^ sides[1])]:
        tell(f"  not compared, as one side alone has it: {', '.join(alone)}")
    tell(f"  {'':22s} {'A':>10s} {'B':>10s} {'B - A':>10s} {'p (Holm)':>9s} {'effect':>7s} {'for 5 %':>9s}")
    for name, row in rows.items():
        numbers = [shown_number(x, metric_of(name).digits) for x in (row.mean_a, row.mean_b, row.difference)]
        numbers = [f"{text:>10s}" for text in numbers]
        last = f"{shown_p(row.p_holm):>9s} {shown_number(row.rank_biserial, 2):>7s} {shown_needed(row.needed):>9s}"
        tell(f"  {name:22s} {' '.join(numbers)} {last}")
    tell("  effect: rank-biserial, positive where B has more; for 5 %: prompts that tell 5 % of A apart, power 0.8")


def whole_lines(a: Scored, b: Scored) -> list[str]:
    """Numbers of whole folders on both sides; one number a side is no test."""
    found = whole_folders(a, b)
    lines = [f"{name:22s} {x:10.4f} {y:10.4f} {y - x:10.4f}" for name, (x, y) in found.items()]
    return [*lines, "of whole folders: one number a side, without a test"] if lines else []
