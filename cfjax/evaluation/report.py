"""The report of a run: one self-contained HTML page, and metrics.json with the same table beside it.

The page makes no network requests. Style sheet and script are in cfjax/assets.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import replacing
from cfjax.evaluation.curves import clean, curve_svg
from cfjax.evaluation.results import (
    COLUMNS,
    Column,
    Row,
    StageReport,
    get,
    metrics_table,
    number,
    percent,
    plain,
    times,
)
from cfjax.evaluation.stream_sections import long_sections, switch_sections
from cfjax.evaluation.wall import WallColumn, checked_columns, escaped, wall_of

__all__ = ["METRICS", "Report", "StageReport", "metrics_table", "write_report"]

METRICS = "metrics.json"


@dataclass(frozen=True)
class Report:
    """What the page shows; what is None or empty is left out.

    Attributes:
      real_videos: uint8 [N, P, H, W, 3], clip n for captions[n]; clips of all stages share P, H and W.
      real_summary, codec_summary: `evaluate_shapes(...)["summary"]` of real clips, and of the same through the codec.
      student, against: keys of the stages that the headline compares; one that is not there is left out.
      commands, config, environment, notes: how the run was made, a section each.
      long, switch: what `experiment.measure_streams` measured of the student.
      fps: playback frames per second of the clips.
    """

    title: str
    stages: Sequence[StageReport] = ()
    captions: Sequence[str] = ()
    real_videos: np.ndarray | None = None
    real_summary: Mapping[str, float] | None = None
    codec_summary: Mapping[str, float] | None = None
    student: str = "dmd"
    against: str = "ar"
    commands: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    long: Mapping[str, Any] | None = None
    switch: Mapping[str, Any] | None = None
    fps: float = 8.0


def section(name: str, title: str, *parts: str) -> str:
    """A part of a page under a heading; "" when all its parts are."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>' if body else ""


def _compared(new: float, old: float, less: str, more: str) -> str:
    """`new` against `old` in words, such as "5.0x fewer"; zero on either side has no ratio."""
    if new == old:
        return "the same"
    return f"{times(max(new / old, old / new))} {less if new < old else more}" if new > 0 and old > 0 else ""


def _card(label: str, big: str, *small: str) -> str:
    lines = "".join(f"<p>{escaped(line)}</p>" for line in small if line)
    return f'<div class="card"><h3>{escaped(label)}</h3><p class="big">{escaped(big)}</p>{lines}</div>'


def _interval(row: Row | None, key: str) -> str:
    low, high = get(row, f"{key}_low"), get(row, f"{key}_high")
    return "" if low is None or high is None else f"{100 * low:.1f}\u2013\u2060{100 * high:.1f}\u202f%"


def _headline(student: Row | None, teacher: Row | None, name: str) -> str:
    """Student against teacher, whose short name is given, as cards; one without a student's number is left out."""

    def against(key: str, show: Callable[[float], str]) -> str:
        old = get(teacher, key)
        return f"{name} {show(old)}" if old is not None else ""

    def ratio(key: str, less: str, more: str) -> str:
        new, old = get(student, key), get(teacher, key)
        return _compared(new, old, less, more) if new is not None and old is not None else ""

    cards = []
    if (correct := get(student, "all_correct")) is not None:
        interval = _interval(student, "all_correct")
        small = (f"95\u202f% interval {interval}" if interval else "", against("all_correct", percent))
        cards.append(_card("Captions followed", percent(correct), *small))
    if (calls := get(student, "network_calls")) is not None:
        shown, fewer = f"{calls:,.0f} per video", ratio("network_calls", "fewer", "more")
        small = (shown if fewer else "", against("network_calls", "{:,.0f}".format))
        cards.append(_card("Network calls", fewer or shown, *small))
    if (speed := get(student, "frames_per_second")) is not None:
        faster = ratio("frames_per_second", "slower", "faster")
        cards.append(_card("Frames per second", number(speed), faster, against("frames_per_second", number)))
    if (motion := get(student, "step_ratio")) is not None:
        show = "{:.2f}\u00d7".format
        cards.append(_card("Motion vs real data", show(motion), against("step_ratio", show), "real data 1.00\u00d7"))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _columns(report: Report) -> list[WallColumn]:
    stages = ((stage.short, stage.network_calls, stage.videos) for stage in report.stages)
    return checked_columns([("Real clip", None, report.real_videos), *stages])


def _best(column: Column, table: Mapping[str, Row], keys: Sequence[str]) -> set[str]:
    """Keys of the stages whose shown value is the best; none if all show the same."""
    values = {key: value for key in keys if (value := get(table.get(key), column.key)) is not None}
    if column.distance is None or len(values) < 2:
        return set()
    best = column.show(min(values.values(), key=column.distance))
    chosen = {key for key, value in values.items() if column.show(value) == best}
    return chosen if len(chosen) < len(values) else set()


def _cell(row: Row, column: Column, best: bool) -> str:
    value = get(row, column.key)
    if value is None:
        return f'<td data-column="{column.key}" class="none">\u2013</td>'
    shown = f'<data value="{value!r}">{column.show(value)}</data>'
    if best:
        shown = f"<b>{shown}</b>"
    if column.key == "all_correct" and (interval := _interval(row, column.key)):
        low, high = 100 * (get(row, "all_correct_low") or 0), 100 * (get(row, "all_correct_high") or 0)
        bar = f"--low: {low:.1f}%; --high: {high:.1f}%; --at: {100 * value:.1f}%"
        shown += f'<small>{interval}</small><span class="bar" style="{bar}"></span>'
    return f'<td data-column="{column.key}">{shown}</td>'


def _kind(key: str, student: str) -> str:
    return "student" if key == student else "ceiling" if key in ("real", "codec") else "stage"


def _table(table: Mapping[str, Row], stages: Sequence[StageReport], student: str) -> str:
    columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in table.values())]
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{c.title}<small>{c.unit}</small></th>' for c in columns)
    best = {c.key: _best(c, table, [stage.key for stage in stages]) for c in columns}
    body = "".join(
        f'<tr data-row="{escaped(key)}" class="{_kind(key, student)}"><th scope="row">{escaped(row["title"])}</th>'
        + "".join(_cell(row, c, key in best[c.key]) for c in columns)
        + "</tr>\n"
        for key, row in table.items()
    )
    meanings = "".join(f"<dt>{c.title}, {c.unit}</dt><dd>{c.help}</dd>" for c in columns)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Metrics"><table>\n<thead><tr><th></th>{head}</tr>'
        f"</thead>\n<tbody>\n{body}</tbody></table></div>\n"
        '<p class="note">Bold: the best of the generated rows, to the digits shown. Small figures and bars: 95\u202f% '
        "Wilson interval. Real data and codec round trip are the ceiling.</p>\n"
        f"<details><summary>How each number is measured</summary><dl>{meanings}</dl></details>"
    )


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _training(stages: Sequence[StageReport]) -> str:
    """One block per stage: what it is, how long it took, its command and its curves."""
    blocks = []
    for s, stage in enumerate(stages):
        panels = []
        for c, (name, points) in enumerate(stage.curves.items()):
            if svg := curve_svg(points, f"{stage.title}: {name}", f"curve{s}-{c}"):
                step, value = clean(points)[-1]
                last = f"<small>{number(value)} at step {step:,.0f}</small>"
                panels.append(f"<figure><figcaption>{escaped(name)}{last}</figcaption>{svg}</figure>")
        time = f"<small>trained in {_duration(stage.train_seconds)}</small>" if stage.train_seconds is not None else ""
        text = f"<p>{escaped(stage.text)}</p>" if stage.text else ""
        command = f"<pre><code>{escaped(stage.command)}</code></pre>" if stage.command else ""
        curves = f'<div class="curves">{"".join(panels)}</div>' if panels else ""
        if text or command or curves or time:
            blocks.append(f"<article><h3>{escaped(stage.title)}{time}</h3>{text}{command}{curves}</article>")
    if any("<figure>" in block for block in blocks):
        blocks.append('<p class="note">Pale: the curve as logged, thinned; dark: its running mean.</p>')
    return "\n".join(blocks)


def _lead(stages: Sequence[StageReport]) -> str:
    names = [stage.title for stage in stages]
    listed = " \u2192 ".join(names)
    return (
        "Causal Forcing (arXiv 2602.02214) turns a bidirectional video diffusion model, which must see a whole clip "
        "before it can show a frame, into a student that streams video block by block in a few network calls. "
        "This page is the record of one run on moving shapes with captions"
        + (f": {listed}. " if names else ". ")
        + "Every score is measured from the pixels of generated clips, against the caption each was asked for."
    )


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary><pre><code>{escaped(body)}</code></pre></details>"


def page_head(title: str, css: str) -> str:
    """The page up to its body."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escaped(title)}</title>
<style>
{css}</style>
</head>"""


def _sections(report: Report, table: Mapping[str, Row], wall: str) -> list[str]:
    """The page's sections in order; one with nothing to show is empty."""
    other = next((stage.short for stage in report.stages if stage.key == report.against), "AR teacher")
    headline = _headline(table.get(report.student), table.get(report.against), other)
    listing = "\n".join(escaped(command) for command in report.commands)
    shown_config = json.dumps(plain(report.config), indent=2, ensure_ascii=False)
    pairs = "".join(f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>" for key, value in report.environment.items())
    items = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
    return [
        section("headline", f"Student against {other}", headline),
        section("wall", "Side by side", wall),
        section("metrics", "Metrics", _table(table, report.stages, report.student)),
        section("long", "Long videos", *(long_sections(report.long, report.fps) if report.long else ())),
        section(
            "switch", "A prompt that changes", *(switch_sections(report.switch, report.fps) if report.switch else ())
        ),
        section("training", "Training", _training(report.stages)),
        section("commands", "Commands", f"<pre><code>{listing}</code></pre>" if listing else ""),
        section("config", "Configuration", _details("Show the whole config", shown_config) if report.config else ""),
        section("environment", "Environment", f"<dl>{pairs}</dl>" if pairs else ""),
        section("notes", "Notes", f"<ul>{items}</ul>" if items else ""),
    ]


def write_report(path: str | Path, report: Report) -> None:
    """Writes the page to `path` and `metrics.json` beside it, each atomically.

    metrics.json: {"title", "stages": `metrics_table(...)`, "environment", "commands", "long", "switch"}; unknown or
    non-finite is null.

    Raises:
      UserError: clips of the wrong type or of different sizes, stage keys that are not distinct, fps <= 0.
    """
    if not 0 < report.fps <= 1000:
        raise UserError(f"report: fps={report.fps} must lie in (0, 1000]")
    table = metrics_table(report.real_summary, report.codec_summary, report.stages)
    wall = wall_of(_columns(report), report.captions, report.fps)
    assets = resources.files("cfjax") / "assets"
    parts = (
        f"{page_head(report.title, (assets / 'report.css').read_text())}\n<body>",
        f"<header><h1>{escaped(report.title)}</h1><p>{escaped(_lead(report.stages))}</p></header>\n<main>",
        *_sections(report, table, wall),
        f"</main>\n<script>\n{(assets / 'report.js').read_text()}</script>\n</body>\n</html>\n",
    )
    page = "\n".join(part for part in parts if part)
    made = {"environment": report.environment, "commands": list(report.commands)}
    streams = {"long": report.long, "switch": report.switch}
    made |= {
        name: {key: value for key, value in result.items() if key != "videos"}
        for name, result in streams.items()
        if result
    }
    record = {"title": report.title, "stages": table} | made
    path = Path(path)
    with replacing(path.with_name(METRICS)) as partial:
        partial.write_text(json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
