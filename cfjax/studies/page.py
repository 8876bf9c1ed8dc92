"""The study's page: verdicts, figures as inline SVG, tables, the command, commit, versions and seeds; and its JSON."""

import html
import io
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cfjax.core.paths import replacing
from cfjax.studies.findings import Table, tables
from cfjax.studies.results import Results, after_dmd, quality, settled
from cfjax.studies.statistics import summary
from cfjax.studies.students import dmd_stage
from cfjax.studies.verdicts import LEVEL, Verdict, verdicts
from cfjax.studies.walk import TEACHER_OF

BI, AR, GREY = "#c0392b", "#2471a3", "#7f8c8d"
COLOURS = {"causal_ode": AR, "causal_cd": "#16a085", "bi_ode": BI, "asym_cd": "#8e44ad", "bi_ode_cp": "#e67e22"}

WELCH = (
    "p: Welch's test over seeds, the paired test where both numbers are the same network's or it stands alone; "
    "Holm-corrected over all claims of this page. Tables below are corrected each by itself."
)
PAIRED = "p: the paired t-test, seed by seed; Holm-corrected over the claims of this list."


def commit() -> str:
    """The commit of the code that ran, marked where the tree differs; "unknown" outside a clone."""
    try:
        asked = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def provenance(parts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Commit and versions that parts were made with: one value where all agree, else each with its parts' names."""
    out = {}
    for key in dict.fromkeys(key for made in parts.values() for key in made):
        names: dict[str, list[str]] = {}
        for part, made in parts.items():
            names.setdefault(made.get(key, "unknown"), []).append(part)
        listed = "; ".join(f"{value} ({', '.join(of)})" for value, of in names.items())
        out[key] = next(iter(names)) if len(names) == 1 else listed
    return out


def error_bars(values: Sequence[Sequence[float]], *, interval: bool = False) -> tuple[list[float], list[float]]:
    """Means over seeds, and standard deviations (or half of the 95 % interval), 0 where there is one seed."""
    found = [summary(v) for v in values]
    reach = [s["high"] - s["mean"] if interval else s["sd"] for s in found]
    return [s["mean"] for s in found], [r if np.isfinite(r) else 0.0 for r in reach]


def _bars(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    means, sd = error_bars(values)
    axes.bar(range(len(names)), means, yerr=sd, color=colours, capsize=3)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)


def _collisions(axes: Axes, results: Results) -> None:
    rng = np.random.default_rng(0)
    for row in results["collisions"]["rows"]:
        at = row["frame"]
        axes.scatter(at + rng.uniform(-0.15, 0.15, len(row["ends"])), row["ends"], s=8, color=BI)
        axes.hlines(row["causal"], at - 0.35, at + 0.35, color=AR, lw=2.5)
    axes.set(title="same noisy frame, same past", xlabel="frame i", ylabel="clean frame i")
    axes.plot([], [], "o", ms=4, color=BI, label="bidirectional, future noise resampled")
    axes.plot([], [], color=AR, lw=2.5, label="AR: one value")
    axes.legend(fontsize=7)


def _settling(axes: Axes, results: Results) -> None:
    sigma, frames = results["plan"]["levels"][0], range(1, results["plan"]["frames"] + 1)
    for k, (init, what) in enumerate((i, w) for i in reversed(TEACHER_OF) for w in ("dist_map", "dist_mean")):
        if init not in results["plan"]["inits"]:
            continue
        values = [float(np.mean(settled(results, init, sigma, what, [f]))) for f in frames]
        colour, alpha = BI if init == "bi_ode" else AR, 1.0 if what == "dist_map" else 0.45
        label = f"{init}: to the {'flow map' if what == 'dist_map' else 'conditional mean'}"
        axes.bar([f + 0.2 * k - 0.3 for f in frames], values, 0.19, label=label, color=colour, alpha=alpha)
    truth = [r["central"] for r in results["truth"]["rows"] if (r["teacher"], r["sigma"]) == ("bidirectional", sigma)]
    axes.plot(frames, truth, "k_", ms=22, label="E Var, bidirectional teacher")
    axes.set(title=f"squared distances, s = {sigma:g}", xlabel="frame i", yscale="log")
    axes.set_ylim(top=30.0 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=6.5)


def _dose(axes: Axes, results: Results) -> None:
    plan = results["plan"]
    linear = results["linear"]["by_ahead"]
    axes.plot(
        [int(k) for k in linear], [v["w2"] for v in linear.values()], "--", color=GREY, label="W2, linear-Gaussian"
    )
    axes.set(title="future frames that the teacher sees", xlabel="k (clean past)", xticks=[int(k) for k in linear])
    if not results["seeds"]:
        axes.legend(fontsize=7)
        return
    names = {0: "causal_ode", **{k: f"ahead_{k}" for k in plan["ahead"]}, plan["frames"] - 1: "bi_ode_cp"}
    seen = [k for k in sorted(names) if names[k] in results["seeds"][0]["quality"]]
    for measure, colour in (("spread", AR), ("motion", "#e67e22"), ("static", BI)):
        means, sd = error_bars([quality(results, names[k], measure) for k in seen])
        axes.errorbar(seen, means, sd, marker="o", capsize=3, color=colour, label=measure)
    axes.legend(fontsize=7)


def _consistency(axes: Axes, results: Results) -> None:
    styles = {"causal": (AR, "-"), "clean_past": ("#e67e22", "--"), "joint": (BI, "-")}
    for name, found in results["linear"]["consistency"].items():
        colour, line = styles[name]
        axes.loglog([int(n) for n in found], list(found.values()), line, marker="o", color=colour, label=name)
    levels = list(results["linear"]["consistency"]["causal"])
    axes.set_xticks([int(n) for n in levels], levels)
    axes.minorticks_off()
    axes.set(title="consistency distillation, exact (linear-Gaussian)", xlabel="levels N", ylabel="W2")
    axes.legend(fontsize=7)


def _correlation(axes: Axes, results: Results) -> None:
    found = results["linear"]["by_correlation"]
    at = [float(a) for a in found]
    first = [row["ambiguity"][0] for row in found.values()]
    axes.plot(at, first, "k-", marker="o", label="V_1(1), bidirectional teacher")
    for teacher, colour in (("bidirectional", BI), ("causal", AR)):
        values = [row[teacher]["w2"] for row in found.values()]
        axes.plot(at, values, "--", marker="o", color=colour, label=f"W2, {teacher} teacher")
    axes.set(title="correlation is the cause (linear-Gaussian)", xlabel="a, of neighbouring frames")
    axes.legend(fontsize=7)


def _dmd(axes: Axes, results: Results, measure: str) -> None:
    at, cycle = results["plan"]["dmd_at"], dmd_stage().cadence["student"]
    for init in results["plan"]["dmd"]:
        means, sd = error_bars([quality(results, init, measure), *(after_dmd(results, init, n, measure) for n in at)])
        points = [0, *(n // cycle for n in at)]
        axes.errorbar(points, means, sd, marker="o", capsize=3, color=COLOURS.get(init, GREY), label=init)
    axes.set(title=f"{measure} during DMD", xlabel="updates of the student")
    axes.legend(fontsize=7)


def figures(results: Results) -> str:
    """All panels as one inline SVG."""
    inits, trained = results["plan"]["inits"], bool(results["seeds"])
    dmd = trained and bool(results["plan"]["dmd"])
    figure = Figure(figsize=(16, 3.5 + 3.6 * (trained + dmd)), layout="constrained")
    axes = figure.subplots(1 + trained + dmd, 4).ravel()
    _collisions(axes[0], results)
    _dose(axes[1], results)
    _consistency(axes[2], results)
    _correlation(axes[3], results)
    if trained:
        _settling(axes[4], results)
        for panel, measure in zip(axes[5:], ("energy", "spread", "motion"), strict=False):
            names = ["real", *inits]
            _bars(panel, names, [quality(results, n, measure) for n in names], [COLOURS.get(n, GREY) for n in names])
            panel.set_title(f"{measure}, 4-step rollout before DMD")
        axes[5].set_yscale("symlog", linthresh=1e-3)
    for panel, measure in zip(axes[8:], ("energy", "static", "spread", "motion"), strict=False):
        _dmd(panel, results, measure)
    for panel in axes:
        panel.title.set_fontsize(10)
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as inline SVG, without a date."""
    with io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def table_html(table: Table) -> str:
    """A table with its title and note."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    note = f'<p class="note">{html.escape(table.text)}</p>' if table.text else ""
    title = html.escape(table.title)
    if table.folded:
        return f"<details><summary>{title}</summary>{body}{note}</details>"
    return f"<section><h3>{title}</h3>{body}{note}</section>"


def verdict_list(found: Sequence[Verdict], title: str = "What holds", tests: str = WELCH) -> str:
    """The section that says which claims hold, and by which tests."""
    rows = (f"<li><b>{html.escape(v.claim)}</b> {html.escape(v.numbers)} <em>{v.outcome}.</em></li>" for v in found)
    rule = (
        f"A claim holds here if its direction is seen with p < {LEVEL:g}, it is reversed if the opposite is, and else "
        f"it is not significant. {tests}"
    )
    note = f'<p class="note">{html.escape(rule)}</p>'
    return f"<section><h2>{html.escape(title)}</h2>{note}<ul>{''.join(rows)}</ul></section>"


def page(title: str, lead: str, parts: Sequence[str], about: Mapping[str, Any]) -> str:
    """A self-contained page in the style of `evaluation.report`'s."""
    style = (resources.files("cfjax") / "assets" / "report.css").read_text()
    pairs = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in about.items())
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{style}\nsvg {{ max-width: 100%; height: auto; background: #fff; border-radius: 10px; }}</style>\n"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p></header>\n{body}\n"
        f"<section><h2>How it was made</h2><dl>{pairs}</dl></section>\n</html>\n"
    )


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_study(page_file: Path, numbers_file: Path, results: Results, *, command: str) -> None:
    """The page, and every raw number as JSON; commit and versions are those that each part was made with."""
    parts = {name: results[name]["made"] for name in ("linear", "collisions", "truth")}
    parts |= {f"seed{n}": seed["made"] for n, seed in enumerate(results["seeds"])}
    about = {"command": command, **provenance(parts), "seeds": len(results["seeds"])}
    found = verdicts(results)
    record = {**about, **results, "verdicts": [vars(v) for v in found]}
    settings = html.escape(json.dumps(results["plan"], indent=1))
    shown = [
        verdict_list(found),
        f"<section><h2>Figures</h2>{figures(results)}</section>",
        "<section><h2>Numbers</h2></section>",
        *map(table_html, tables(results, found)),
        f"<details><summary>Settings</summary><pre>{settings}</pre></details>",
    ]
    lead = (
        "Video laws whose scores are closed form, so that the teacher is exact and its teaching alone is judged. Mean "
        "± standard deviation over seeds; every student has the same budget, and starts from the same AR network."
    )
    write(page_file, page("Does the initialisation's teacher matter?", lead, shown, about))
    write(numbers_file, json.dumps(record, indent=1) + "\n")
