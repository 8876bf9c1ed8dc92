"""The page of a comparison: every metric with its interval and test, and the clips where A and B differ most.

One self-contained file that makes no network requests.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.data.pictures import Unusable
from cfjax.evaluation.clip_score import ClipScore
from cfjax.evaluation.clip_source import SourceClip, find_source_clips, reading
from cfjax.evaluation.clip_summary import Scored
from cfjax.evaluation.clip_table import metric_of
from cfjax.evaluation.paired import LEVEL, Comparison
from cfjax.evaluation.pairing import Pair, Paired, whole_folders
from cfjax.evaluation.report import page_head, section
from cfjax.evaluation.video import spread
from cfjax.evaluation.wall import WallColumn, escaped, wall_of

SHOWN, STEPS, WIDTH = 6, 24, 320  # pairs of clips, frames of each, px
_REACH = 3.0  # standard deviations at the ends of a row's interval drawing


def shown_number(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point, with a true minus sign; a dash for none."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def shown_p(p: float) -> str:
    """A p-value in two digits."""
    if not math.isfinite(p):
        return "\u2013"
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def shown_needed(needed: float) -> str:
    """A number of prompts, rounded up."""
    if not math.isfinite(needed):
        return "\u2013"
    return f"{math.ceil(needed - 1e-9):,}" if needed < 1e6 else "> 1,000,000"


def _drawing(row: Comparison) -> str:
    """The interval in standard deviations of the differences, as an <svg>; nothing where they do not vary."""
    if not (math.isfinite(row.low) and row.cohen_d and math.isfinite(row.cohen_d)):
        return ""
    scale = row.difference / row.cohen_d

    def place(value: float) -> float:
        return 60 + 54 * max(-1.0, min(1.0, value / scale / _REACH))

    colour = "var(--accent)" if row.p_holm < LEVEL else "var(--muted)"
    low, high, at = place(row.low), place(row.high), place(row.difference)
    label = f"{row.cohen_d:.2f} standard deviations"
    return (
        f'<svg viewBox="0 0 120 14" width="120" height="14" role="img" aria-label="{label}">'
        '<line x1="60" y1="0" x2="60" y2="14" stroke="var(--line)" stroke-width="2"/>'
        f'<line x1="{low:.1f}" y1="7" x2="{high:.1f}" y2="7" stroke="{colour}" stroke-width="3"/>'
        f'<circle cx="{at:.1f}" cy="7" r="4" fill="{colour}"/></svg>'
    )


def _table(rows: Mapping[str, Comparison], unit: str) -> str:
    heads = (
        *("", "A", "B", "B \u2212 A<small>95\u202f% interval</small>", "of A", "Interval<small>in deviations</small>"),
        *("p<small>Holm</small>", "Effect<small>rank-biserial</small>", "Effect<small>Cohen's d</small>"),
        f"{unit.capitalize()}s<small>in the test</small>",
        f"{unit.capitalize()}s<small>to tell 5\u202f% apart</small>",
    )
    body = []
    for name, row in rows.items():
        metric = metric_of(name)
        digits = metric.digits
        title = f"|{metric.title}|" if metric.size else metric.title
        bounds = f"{shown_number(row.low, digits)} to {shown_number(row.high, digits)}"
        percent = "\u2013" if not math.isfinite(row.relative) else f"{shown_number(100 * row.relative, 1)}\u202f%"
        sure = row.p_holm < LEVEL
        p = shown_p(row.p_holm)
        cells = (
            shown_number(row.mean_a, digits),
            shown_number(row.mean_b, digits),
            f"{shown_number(row.difference, digits)}<small>{bounds}</small>",
            percent,
            _drawing(row),
            f"<b>{p}</b>" if sure else p,
            shown_number(row.rank_biserial, 2),
            shown_number(row.cohen_d, 2),
            str(row.prompts),
            shown_needed(row.needed),
        )
        kind = ' class="student"' if sure else ""
        unit_of = f"<small>{escaped(metric.unit)}</small>" if metric.unit else ""
        body.append(
            f'<tr data-row="{name}"{kind}><th scope="row">{escaped(title)}{unit_of}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    named = map(metric_of, rows)
    meanings = "".join(f"<dt>{escaped(metric.title)}</dt><dd>{escaped(metric.help)}</dd>" for metric in named)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Metrics"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>\n"
        f'<p class="note">Each {unit} counts once. Intervals: BCa bootstrap of the mean difference. p: Wilcoxon\'s '
        "signed-rank test, two-sided, corrected by Holm's procedure over all rows; bold below 0.05. The last column: "
        f"how many {unit}s a paired t-test needs to tell 5\u202f% of A's mean apart with power 0.8, given how much the "
        "differences vary here, for one metric alone.</p>\n"
        f"<details><summary>What each row is</summary><dl>{meanings}</dl></details>"
    )


def _clips(scored: Scored) -> dict[str, SourceClip]:
    """The clips of a side by name, where they still are."""
    with suppress(UserError):
        return {clip.name: clip for clip in find_source_clips(scored.videos, "compare")}
    return {}


def _pictures(clip: SourceClip, score: ClipScore, steps: int, size: tuple[int, int]) -> np.ndarray | None:
    """`steps` frames of a clip in a box of height and width, uint8; None where it cannot be read any more."""
    wanted, kept = set(spread(score.frames, steps).tolist()), []
    try:
        with reading(clip, score.fps) as opened:
            kept = [_boxed(frame, size) for number, frame in enumerate(opened.frames) if number in wanted]
    except (Unusable, OSError):
        return None
    return np.stack(kept) if len(kept) == steps else None


def _boxed(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame made to fit into a box, with black beside it."""
    height, width = size
    scale = min(height / frame.shape[0], width / frame.shape[1])
    down, across = (max(1, round(scale * side)) for side in frame.shape[:2])
    small = Image.fromarray(frame)
    if (down, across) != frame.shape[:2]:
        small = small.resize((across, down), Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
    out = np.zeros((height, width, 3), np.uint8)
    y, x = (height - down) // 2, (width - across) // 2
    out[y : y + down, x : x + across] = np.asarray(small)
    return out


def clip_wall(chosen: Sequence[tuple[Pair, str]], a: Scored, b: Scored) -> str:
    """Pairs side by side; a note where none can be read any more."""
    clips = _clips(a), _clips(b)
    firsts = [pair.a[0] for pair, _ in chosen]
    steps = min([STEPS, *(side[0].frames for pair, _ in chosen for side in (pair.a, pair.b))])
    width = min(WIDTH, max((score.width for score in firsts), default=1))
    height = max(1, round(width * firsts[0].height / firsts[0].width)) if firsts else 1
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    captions = []
    for pair, why in chosen:
        found = [
            _pictures(there[side[0].file], side[0], steps, (height, width)) if side[0].file in there else None
            for side, there in zip((pair.a, pair.b), clips, strict=True)
        ]
        if found[0] is not None and found[1] is not None:
            rows.append((found[0], found[1]))
            seed = f", seed {pair.seed}" if pair.seed >= 0 else ""
            captions.append(f"{pair.prompt}{seed} \u2013 {why}")
    if not rows:
        return '<p class="note">The clips are no longer where they were measured.</p>'
    columns: list[WallColumn] = [(name, None, np.stack([row[n] for row in rows])) for n, name in enumerate("AB")]
    return wall_of(columns, captions, steps * firsts[0].fps / firsts[0].frames, lossy=True)


def _whole(a: Scored, b: Scored) -> str:
    """Scorers' numbers of whole folders; "" where there are none."""
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th>'
        + "".join(f"<td>{shown_number(x, 4)}</td>" for x in (ours, theirs, theirs - ours))
        + "</tr>"
        for name, (ours, theirs) in whole_folders(a, b).items()
    )
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{text}</th>' for text in ("", "A", "B", "B \u2212 A"))
    return (
        f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table>\n"
        '<p class="note">One number a side: there is nothing to test.</p>'
    )


def _without_partner(side: str, names: Sequence[str]) -> str:
    more = ", \u2026" if len(names) > 8 else ""
    return f"{len(names)} of {side} without a partner: {escaped(', '.join(names[:8]))}{more}"


def comparison_page(
    rows: Mapping[str, Comparison], unit: str, paired: Paired, a: Scored, b: Scored, chosen: Sequence[tuple[Pair, str]]
) -> str:
    """The whole page."""
    title = f"{Path(a.videos).name} against {Path(b.videos).name}"
    sure = [metric_of(name).title for name, row in rows.items() if row.p_holm < LEVEL]
    verdict = f"A and B differ in: {', '.join(sure)}." if sure else "No difference is beyond chance after correction."
    count = max((row.prompts for row in rows.values()), default=1)
    if (least := min(1.0, len(rows) * 2.0 ** (1 - count))) > LEVEL:  # all differences of one sign
        verdict += f" With {count} {unit}s none could be: the least corrected p is {shown_p(least)}."
    lead = (
        f"A is {a.videos}, B is {b.videos}. {len(paired.pairs)} pairs of clips, by {paired.how}. {len(rows)} metrics, "
        f"Holm's correction over all of them. {verdict}"
    )
    sides = (("A", paired.alone_a, a), ("B", paired.alone_b, b))
    left = [f"<li>{_without_partner(side, names)}</li>" for side, names, _ in sides if names]
    notes = [f"<li>{side}: {escaped(note)}</li>" for side, _, scored in sides for note in scored.notes[:20]]
    assets = resources.files("cfjax") / "assets"
    return "\n".join(
        (
            f"{page_head(title, (assets / 'report.css').read_text())}\n<body>",
            f"<header><h1>{escaped(title)}</h1><p>{escaped(lead)}</p></header>\n<main>",
            section("metrics", "Metrics", _table(rows, unit)),
            section("folders", "Whole folders", _whole(a, b)),
            section("wall", "Where they differ most", clip_wall(chosen, a, b)),
            section("left", "Left over", f"<ul>{''.join([*left, *notes])}</ul>" if left or notes else ""),
            f"</main>\n<script>\n{(assets / 'report.js').read_text()}</script>\n</body>\n</html>\n",
        )
    )


def comparison_json(
    rows: Mapping[str, Any], unit: str, paired: Paired, a: Scored, b: Scored, chosen: Sequence[tuple[Pair, str]]
) -> dict[str, Any]:
    """The same as values for JSON."""
    return {
        "a": a.videos,
        "b": b.videos,
        "paired_by": paired.how,
        "pairs": len(paired.pairs),
        "unit": unit,
        "alone_a": list(paired.alone_a),
        "alone_b": list(paired.alone_b),
        "metrics": rows,
        "folders": {name: {"a": ours, "b": theirs} for name, (ours, theirs) in whole_folders(a, b).items()},
        "scorers": {name: about["version"] for name, about in a.scorers.items() if name in b.scorers},
        "most_different": [
            {"prompt": pair.prompt, "seed": pair.seed, "by": why, "a": pair.a[0].file, "b": pair.b[0].file}
            for pair, why in chosen
        ],
    }
