"""The toy world's networks compared: tables, the paper's orderings as verdicts, what a teacher's pairs leave open."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cfjax.flow.path import x0_from_flow
from cfjax.models.wan import Wan, embed_text, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.studies.findings import Table, Verdict, number
from cfjax.studies.page import svg
from cfjax.studies.statistics import holm, summary, welch

Numbers = Mapping[str, Mapping[str, Any]]  # network -> measure -> {"values": by seed, ...}
# number of an evaluation, what it says, factor, decimals
COMPARED = (
    ("all_correct", "caption all right, %", 100.0, 1),
    ("residual", "residual", 1.0, 4),
    ("jerkiness", "jerkiness, px", 1.0, 3),
    ("step", "motion, px/frame", 1.0, 3),
    ("diversity", "diversity", 1.0, 3),
)
# what the paper says or implies: claim, the worse network, the better one, by which number
CLAIMS = (
    ("Before DMD, the bidirectional teacher's pairs cost captions.", "bi_pairs_ode", "ode", "all_correct"),
    ("Before DMD, they cost motion.", "bi_pairs_ode", "ode", "step"),
    ("After DMD, they still cost captions.", "bi_pairs_ode_dmd", "dmd", "all_correct"),
    ("After DMD, they still cost motion.", "bi_pairs_ode_dmd", "dmd", "step"),
    ("Self Forcing's own stage 2 costs captions before DMD.", "bi_ode", "ode", "all_correct"),
    ("Self Forcing's own stage 2 costs captions after DMD.", "bi_ode_dmd", "dmd", "all_correct"),
    ("Asymmetric CD is worse than causal CD, in captions.", "asymmetric_cd", "cd", "all_correct"),
    ("Asymmetric CD moves less than causal CD.", "asymmetric_cd", "cd", "step"),
    ("After DMD, asymmetric CD is still worse than causal CD.", "asymmetric_cd_dmd", "cd_dmd", "all_correct"),
    ("DMD without an initialisation ends worse.", "ar_dmd", "dmd", "all_correct"),
    ("Diffusion forcing makes a worse AR network than teacher forcing.", "diffusion_forcing", "ar", "all_correct"),
)
GREEN, GREY = "#16a085", "#95a5a6"


def values(numbers: Numbers, network: str, measure: str) -> list[float]:
    """A measure of a network, by seed."""
    return numbers[network][measure]["values"]


def compare_networks(
    numbers: Numbers, compared: Mapping[str, Sequence[tuple[str, str]]], titles: Mapping[str, str]
) -> list[Table]:
    """A table per stage: mean [95 % interval] over seeds, and Holm-corrected p against the reference network."""
    tables = []
    for stage, pairs in compared.items():
        raw = {
            f"{a} {m}": welch(values(numbers, a, m), values(numbers, b, m))
            for a, b in pairs
            for m, *_ in COMPARED
            if a != b
        }
        p, rows = holm(raw), []
        for a, b in pairs:
            cells = []
            for m, _, factor, digits in COMPARED:
                s = summary([factor * v for v in values(numbers, a, m)])
                interval = f" [{s['low']:.{digits}f}, {s['high']:.{digits}f}]" if len(s["values"]) > 1 else ""
                tail = f", p {number(p[f'{a} {m}'])}" if a != b and interval else ""
                cells.append(f"{s['mean']:.{digits}f}{interval}{tail}")
            rows.append([titles[a], *cells])
        tables.append(Table(stage, ["", *(title for _, title, *_ in COMPARED)], rows))
    return tables


def verdicts(numbers: Numbers) -> list[Verdict]:
    """Every claim whose networks were measured: it holds if its direction is seen with p < 0.05, Holm over all."""
    found = [claim for claim in CLAIMS if {claim[1], claim[2]} <= numbers.keys()]
    p = holm({text: welch(values(numbers, a, m), values(numbers, b, m)) for text, a, b, m in found})
    out = []
    for text, a, b, m in found:
        _, title, factor, digits = next(row for row in COMPARED if row[0] == m)
        mean_a, mean_b = (factor * float(np.mean(values(numbers, network, m))) for network in (a, b))
        shown = f"{title}: {mean_a:.{digits}f} against {mean_b:.{digits}f}, p {number(p[text])} (Holm)."
        out.append(Verdict(text, shown, bool(mean_a < mean_b and p[text] < 0.05)))
    return out


def opened_verdicts(opened: Mapping[str, Sequence[Sequence[float]]]) -> list[Verdict]:
    """Whether the bidirectional teacher's pairs leave more open than the AR teacher's: without a past, and with one."""
    if not {"bi_pairs_ode", "ode"} <= opened.keys():
        return []
    bi, ar = (np.asarray(opened[network]) for network in ("bi_pairs_ode", "ode"))
    pairs = {
        "The bidirectional teacher's pairs leave more open in the first block, which has no past.": (
            bi[:, 0],
            ar[:, 0],
        ),
        "They leave more open in the later blocks, too.": (bi[:, 1:].mean(axis=1), ar[:, 1:].mean(axis=1)),
    }
    p = holm({text: welch(list(a), list(b)) for text, (a, b) in pairs.items()})
    return [
        Verdict(
            text,
            f"share of the end points' variance: {a.mean():.3f} against {b.mean():.3f}, p {number(p[text])} (Holm).",
            bool(a.mean() > b.mean() and p[text] < 0.05),
        )
        for text, (a, b) in pairs.items()
    ]


@partial(jax.jit, static_argnames="blocks")
def _squares(
    model: Wan, noise: jax.Array, end: jax.Array, past: jax.Array, text_BSE: jax.Array, blocks: Blocks
) -> jax.Array:
    sigma_BF = jnp.ones(noise.shape[:2])
    v = teacher_forced(model, noise, sigma_BF, past, embed_text(model, text_BSE), blocks)
    return jnp.mean(jnp.square(x0_from_flow(v, noise, sigma_BF) - end), axis=(0, 2, 3, 4))


def left_open(
    model: Wan, pairs: Sequence[Mapping[str, np.ndarray]], blocks: Blocks, *, past: str, batch: int = 64
) -> list[float]:
    """What a student's prediction from pure noise and the clean past leaves of the end points, by block.

    E|f(x_1, past) - x_end|^2 over the variance of x_end: at best the share that noise and past do not determine
    (E Var), so an upper bound of it, with what training has not reached yet on top.

    Args:
      past: "clip" or "endpoint", as in `objectives.ode_regression.Regression`.
    """
    ends, errors = [], []
    for start in range(0, len(pairs) - batch + 1, batch):
        records = [pairs[i] for i in range(start, start + batch)]
        stacked = {name: np.stack([r[name] for r in records]).astype(np.float32) for name in _NAMES}
        noise, end = stacked["trajectory_JFHWC"][:, 0], stacked["trajectory_JFHWC"][:, -1]
        clean = stacked["latents_FHWC"] if past == "clip" else end
        errors.append(np.asarray(_squares(model, noise, end, clean, stacked["text_SE"], blocks)))
        ends.append(end)
    error_F = np.mean(errors, axis=0)
    prior_F = np.var(np.concatenate(ends), axis=0).mean(axis=(1, 2, 3))
    return [float(error_F[a:b].mean() / prior_F[a:b].mean()) for a, b in blocks.spans(len(error_F))]


_NAMES = ("trajectory_JFHWC", "latents_FHWC", "text_SE")


def _before_and_after(axes: Axes, numbers: Numbers, rows: Sequence[tuple[str, str]], measure: str) -> None:
    _, title, factor, _ = next(row for row in COMPARED if row[0] == measure)
    for shift, column, colour, label in ((-0.2, 0, GREY, "before DMD"), (0.2, 1, GREEN, "after DMD")):
        found = [summary([factor * v for v in values(numbers, row[column], measure)]) for row in rows]
        reach = [s["high"] - s["mean"] if np.isfinite(s["high"]) else 0.0 for s in found]
        places = np.arange(len(rows)) + shift
        axes.bar(places, [s["mean"] for s in found], 0.38, yerr=reach, color=colour, capsize=3, label=label)
    axes.set_xticks(range(len(rows)), [before for before, _ in rows], rotation=30, ha="right", fontsize=8)
    axes.set_title(title, fontsize=10)


def figure(numbers: Numbers, rows: Sequence[tuple[str, str]], opened: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Inline SVG: every recipe before and after DMD with 95 % intervals, and what each teacher's pairs leave open.

    Args:
      rows: (network before DMD, network after it) of each recipe.
      opened: network -> by seed, by block, the figures of `left_open`.
    """
    drawing = Figure(figsize=(13, 7.5), layout="constrained")
    panels = drawing.subplots(2, 3).ravel()
    for axes, (measure, *_) in zip(panels, COMPARED, strict=False):
        _before_and_after(axes, numbers, rows, measure)
    panels[0].legend(fontsize=7, loc="lower left")
    for network, by_seed in opened.items():
        found = [summary(list(block)) for block in zip(*by_seed, strict=True)]
        reach = [s["high"] - s["mean"] if np.isfinite(s["high"]) else 0.0 for s in found]
        panels[5].errorbar(
            range(1, len(found) + 1), [s["mean"] for s in found], reach, marker="o", capsize=3, label=network
        )
        panels[5].set_xticks(range(1, len(found) + 1))
    panels[5].set(xlabel="block", ylim=(0, None))
    panels[5].set_title("share of the teacher's end points left open", fontsize=10)
    if opened:
        panels[5].legend(fontsize=7)
    return svg(drawing)


def open_table(opened: Mapping[str, Sequence[Sequence[float]]], titles: Mapping[str, str]) -> Table:
    """`left_open` as a table."""
    blocks = len(next(iter(opened.values()))[0])
    rows = []
    for network, by_seed in opened.items():
        found = [summary(list(block)) for block in zip(*by_seed, strict=True)]
        cells = [f"{s['mean']:.3f}" + (f" ± {s['sd']:.3f}" if len(s["values"]) > 1 else "") for s in found]
        rows.append([titles[network], *cells])
    return Table(
        "What the student leaves of its teacher's end points, from pure noise and the clean past",
        ["", *(f"block {i}" for i in range(1, blocks + 1))],
        rows,
        "Squared error over the variance of the end points, on the pairs that it was trained on: an upper bound of the "
        "share that noise and past do not determine. This is the dose: a bidirectional teacher can do harm only where "
        "it leaves more open than the AR teacher does; where the past says what the future noise would, it does not.",
    )
