"""Whole folders: measured into a workdir, and compared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cfjax.core.errors import UserError
from cfjax.core.paths import local_path, write_atomically
from cfjax.core.progress import Progress
from cfjax.evaluation.clip_score import Settings, score_clips
from cfjax.evaluation.clip_source import find_source_clips
from cfjax.evaluation.clip_summary import VIDEOS, Scored, find_references, gathered, load_scored, save_scored
from cfjax.evaluation.clip_table import BY_NAME, known_groups
from cfjax.evaluation.compare_page import SHOWN, comparison_json, comparison_page, shown_needed, shown_number, shown_p
from cfjax.evaluation.opencv import opencv
from cfjax.evaluation.paired import as_json, compare
from cfjax.evaluation.pairing import most_different, pair_clips, values_of

PAGE, RESULT = "compare.html", "compare.json"
SIDES = ("a", "b")


def check_choice(settings: Settings) -> None:
    """Raises UserError for metrics that are not known, or without OpenCV."""
    if fault := known_groups(settings.metrics):
        raise UserError(fault)
    if settings.first_block and not settings.block:
        raise UserError(f"--config.first_block={settings.first_block}: give the others' length too, --config.block=12")
    opencv()


def score_folder(videos: str, against: str, settings: Settings, workdir: Path, *, workers: int) -> Scored:
    """Measures all clips of a folder into a workdir, and writes videos.json there.

    Raises:
      UserError: no folder, no clips, none that can be read, or no clip has a reference.
    """
    check_choice(settings)
    folder = local_path(videos, "--config.videos", "videos are read from this machine")
    clips = find_source_clips(folder, "videos")
    found, notes = find_references(clips, against)
    with Progress(len(clips), "clip", folder.name) as bar:
        scores = score_clips(clips, found, settings, workdir, workers=workers, done=bar.update)
    scored = replace(gathered(folder, clips, scores, settings, notes), against=against)
    save_scored(workdir, scored)
    return scored


def summary_lines(workdir: Path) -> list[str]:
    """The table of videos.json, line by line."""
    content = json.loads((workdir / VIDEOS).read_text(encoding="utf-8"))
    count = sum(not clip["fault"] for clip in content["clips"])
    lines = [f"{content['videos']}: {count} clips; prompts by {content['prompts_by']}"]
    for name, row in content["summary"].items():
        metric = BY_NAME[name]
        bounds = f"  [{row['low']:.{metric.digits}f}, {row['high']:.{metric.digits}f}]" if "low" in row else ""
        lines.append(f"  {name:22s} {row['mean']:10.{metric.digits}f}{bounds} {metric.unit}".rstrip())
    lines += [f"  {name:22s} {value:10.3f}" for name, value in content["diversity"].items()]
    return lines + [f"  {note}" for note in content["notes"]]


def _side(place: str, workdir: Path, settings: Settings, workers: int) -> Scored:
    """A folder that was measured before, or is measured now."""
    folder = local_path(place, "--config.compare", "it is read from this machine")
    if (folder / VIDEOS).is_file():
        scored = load_scored(folder)
        if not scored.measured():
            raise UserError(f"{folder / VIDEOS}: none of its clips could be measured; it has nothing to compare")
        return scored
    return score_folder(place, "", settings, workdir, workers=workers)


def compare_folders(
    places: tuple[str, ...], settings: Settings, workdir: Path, *, workers: int, tell: Callable[[str], None]
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
    a, b = (_side(place, workdir / side, settings, workers) for place, side in zip(places, SIDES, strict=True))
    paired = pair_clips(a, b)
    values, unit = values_of(paired.pairs)
    if not values:
        raise UserError("--config.compare: the clips of the two folders have no metric in common")
    rows, chosen = compare(values), most_different(paired.pairs, SHOWN)
    result = comparison_json({n: as_json(row) for n, row in rows.items()}, unit, paired, a, b, chosen)
    write_atomically(workdir / RESULT, json.dumps(result, indent=1) + "\n")
    write_atomically(workdir / PAGE, comparison_page(rows, unit, paired, a, b, chosen))
    tell(f"{len(paired.pairs)} pairs, by {paired.how}")
    for side, names in (("A", paired.alone_a), ("B", paired.alone_b)):
        if names:
            tell(f"  {len(names)} of {side} without a partner: {', '.join(names[:3])}{', ...' * (len(names) > 3)}")
    if a.settings and b.settings and (asked := [json.dumps(side.settings) for side in (a, b)])[0] != asked[1]:
        tell(f"  measured with different settings: A {asked[0]}, B {asked[1]}")
    sides = [{name for score in scored.scores for name in score.values} for scored in (a, b)]
    if alone := [name for name in BY_NAME if (name in sides[0]) != (name in sides[1])]:
        tell(f"  not compared, as one side alone has it: {', '.join(alone)}")
    tell(f"  {'':22s} {'A':>10s} {'B':>10s} {'B - A':>10s} {'p (Holm)':>9s} {'effect':>7s} {'for 5 %':>9s}")
    for name, row in rows.items():
        numbers = [shown_number(x, BY_NAME[name].digits) for x in (row.mean_a, row.mean_b, row.difference)]
        numbers = [f"{text:>10s}" for text in numbers]
        last = f"{shown_p(row.p_holm):>9s} {shown_number(row.rank_biserial, 2):>7s} {shown_needed(row.needed):>9s}"
        tell(f"  {name:22s} {' '.join(numbers)} {last}")
    tell("  effect: rank-biserial, positive where B has more; for 5 %: prompts that tell 5 % of A apart, power 0.8")
