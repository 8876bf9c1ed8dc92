"""Comparison of the toy world's networks: tables, the paper's orderings as tests, residual variance of ODE pairs."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cfjax.core.errors import UserError
from cfjax.evaluation.tables import COLUMNS
from cfjax.flow.path import x0_from_flow
from cfjax.models.wan import Wan, embed_text, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.studies.findings import Table
from cfjax.studies.page import error_bars, svg
from cfjax.studies.results import number, spread_of
from cfjax.studies.statistics import holm, paired, recorded, summary, welch
from cfjax.studies.verdicts import Claim, Verdict, judge

Numbers = Mapping[str, Mapping[str, Any]]  # network -> measure -> {"values": by seed, ...}
Opened = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]  # network -> "left", "shuffled" -> by seed, by block
# number of an evaluation, what it says, factor, decimals: of the tables' columns, those that are measured of videos
MEASURED = tuple(
    (key, title, factor, max(digits, 3) if factor == 1.0 else digits)
    for key, title, factor, digits in COLUMNS
    if key != "network_calls"
)
# what the paper says or implies, and diversity, of which it says nothing:
# claim, the worse network, the better one, by which number
CLAIMS = (
    ("Before DMD, the bidirectional teacher's pairs cost captions.", "bi_pairs_ode", "ode", "all_correct"),
    ("Before DMD, they cost motion.", "bi_pairs_ode", "ode", "step"),
    ("After DMD, they still cost captions.", "bi_pairs_ode_dmd", "dmd", "all_correct"),
    ("After DMD, they still cost motion.", "bi_pairs_ode_dmd", "dmd", "step"),
    ("Before DMD, they cost diversity.", "bi_pairs_ode", "ode", "diversity"),
    ("After DMD, they still cost diversity.", "bi_pairs_ode_dmd", "dmd", "diversity"),
    ("Self Forcing's own stage 2 costs captions before DMD.", "bi_ode", "ode", "all_correct"),
    ("Self Forcing's own stage 2 costs captions after DMD.", "bi_ode_dmd", "dmd", "all_correct"),
    ("Asymmetric CD is worse than causal CD, in captions.", "asymmetric_cd", "cd", "all_correct"),
    ("Asymmetric CD moves less than causal CD.", "asymmetric_cd", "cd", "step"),
    ("Asymmetric CD is less diverse than causal CD.", "asymmetric_cd", "cd", "diversity"),
    ("After DMD, asymmetric CD is still worse than causal CD.", "asymmetric_cd_dmd", "cd_dmd", "all_correct"),
    ("After DMD, asymmetric CD is still less diverse.", "asymmetric_cd_dmd", "cd_dmd", "diversity"),
    ("DMD without an initialisation ends worse.", "ar_dmd", "dmd", "all_correct"),
    ("Diffusion forcing makes a worse AR network than teacher forcing.", "diffusion_forcing", "ar", "all_correct"),
)
GREEN, GREY = "#16a085", "#95a5a6"


def values(numbers: Numbers, network: str, measure: str) -> list[float]:
    """A measure of a network, by seed."""
    return numbers[network][measure]["values"]


def compare_networks(
    numbers: Numbers, compared: Mapping[str, Sequence[tuple[str, str]]], titles: Mapping[str, str]
) -> tuple[list[Table], list[dict[str, Any]]]:
    """A table per stage: mean [95 % interval] over seeds, and Holm-corrected p against each row's reference network.

    Returns:
      the tables, and every test: stage, network, reference, measure, Welch's p, the same after Holm, the paired p.
    """
    tables, tests = [], []
    for stage, pairs in compared.items():
        both = {(a, b, m): [values(numbers, n, m) for n in (a, b)] for a, b in pairs if a != b for m, *_ in MEASURED}
        p_welch = {f"{a} {m}": welch(*of) for (a, _, m), of in both.items()}
        p = holm(p_welch)
        rows = []
        for a, b in pairs:
            cells = []
            for m, _, factor, digits in MEASURED:
                s = summary([factor * v for v in values(numbers, a, m)])
                interval = f" [{s['low']:.{digits}f}, {s['high']:.{digits}f}]" if len(s["values"]) > 1 else ""
                tail = f", p {number(p[f'{a} {m}'])}" if a != b and interval else ""
                cells.append(f"{s['mean']:.{digits}f}{interval}{tail}")
            seeds = len(values(numbers, a, MEASURED[0][0]))
            rows.append([titles[a], titles[b] if a != b else "", str(seeds), *cells])
        tables.append(Table(stage, ["", "against", "seeds", *(title for _, title, *_ in MEASURED)], rows))
        for (a, b, m), of in both.items():
            known = {"welch": p_welch[f"{a} {m}"], "welch_holm": p[f"{a} {m}"], "paired": paired(*of)}
            found = {kind: recorded(value) for kind, value in known.items()}
            tests.append({"stage": stage, "network": a, "reference": b, "measure": m, **found})
    return tables, tests


def verdicts(numbers: Numbers, opened: Opened) -> list[Verdict]:
    """Every claim whose networks were measured, judged as one family."""
    found = []
    for text, a, b, m in CLAIMS:
        if {a, b} <= numbers.keys():
            _, title, factor, digits = next(row for row in MEASURED if row[0] == m)
            worse, better = values(numbers, a, m), values(numbers, b, m)
            shown = (f"{factor * np.mean(of):.{digits}f}" for of in (worse, better))
            found.append(Claim(text, f"{title}: {' against '.join(shown)}", better, worse))
    return judge([*found, *_opened_claims(opened)])


def _opened_claims(opened: Opened) -> list[Claim]:
    """Claims on residual variance: bidirectional against AR teacher's pairs, in the first block and in later ones."""
    if not {"bi_pairs_ode", "ode"} <= opened.keys():
        return []
    texts = {
        "The bidirectional teacher's pairs leave more open in the first block, which has no past.": slice(0, 1),
        "They leave more open in the later blocks, too.": slice(1, None),
    }
    claims = []
    for text, blocks in texts.items():
        both = [np.mean(np.asarray(opened[k]["left"])[:, blocks], axis=1) for k in ("bi_pairs_ode", "ode")]
        shown = " against ".join(f"{of.mean():.3f}" for of in both)
        claims.append(Claim(text, f"share of the end points' variance: {shown}", *(of.tolist() for of in both)))
    return claims


@partial(jax.jit, static_argnames="blocks")
def _squares(
    model: Wan, noise: jax.Array, end: jax.Array, past: jax.Array, text_BSE: jax.Array, blocks: Blocks
) -> jax.Array:
    sigma_BF = jnp.ones(noise.shape[:2])
    v = teacher_forced(model, noise, sigma_BF, past, embed_text(model, text_BSE), blocks)
    return jnp.mean(jnp.square(x0_from_flow(v, noise, sigma_BF) - end), axis=(0, 2, 3, 4))


def left_open(
    model: Wan, pairs: Sequence[Mapping[str, np.ndarray]], blocks: Blocks, *, past: str, batch: int = 64
) -> dict[str, list[float]]:
    """The fraction of the end points' variance that a student's prediction leaves unexplained, by block.

    left: E|f(x_1, past) - x_end|^2 over the variance of x_end over all pairs: an upper bound of the share that noise,
    past and text do not determine (E Var), as training error is included.
    shuffled: the same with x_1 of another pair, so what past and text alone predict. Where it is hardly more than
    `left`, the noise determines nothing, and a small `left` is no evidence against ambiguity. For
    f = E[x_end | x_1, past] and noise independent of the past, (left + shuffled) / 2 is the variance given past and
    text, by the law of total variance.

    Args:
      past: "clip" or "endpoint", as in `objectives.ode_regression.Regression`.
      batch: pairs at once at the most; all are used.

    Raises:
      UserError: fewer than two pairs.
    """
    if len(pairs) < 2:
        raise UserError(f"pairs={len(pairs)}: what is left open is compared with another pair's noise; make 2 or more")
    ends, errors, sizes = [], [], []
    for part in np.array_split(np.arange(len(pairs)), math.ceil(len(pairs) / batch)):
        records = [pairs[i] for i in part]
        stacked = {name: np.stack([r[name] for r in records]).astype(np.float32) for name in _NAMES}
        noise, end = stacked["trajectory_JFHWC"][:, 0], stacked["trajectory_JFHWC"][:, -1]
        clean = stacked["latents_FHWC"] if past == "clip" else end
        own_and_other = (noise, np.roll(noise, 1, axis=0))
        errors.append([np.asarray(_squares(model, x, end, clean, stacked["text_SE"], blocks)) for x in own_and_other])
        ends.append(end)
        sizes.append(len(part))
    prior_F = np.var(np.concatenate(ends), axis=0).mean(axis=(1, 2, 3))
    spans = blocks.spans(len(prior_F))
    return {
        kind: [float(error_F[a:b].mean() / prior_F[a:b].mean()) for a, b in spans]
        for kind, error_F in zip(("left", "shuffled"), np.average(errors, axis=0, weights=sizes), strict=True)
    }


_NAMES = ("trajectory_JFHWC", "latents_FHWC", "text_SE")


def _before_and_after(axes: Axes, numbers: Numbers, rows: Sequence[tuple[str, str]], measure: str) -> None:
    _, title, factor, _ = next(row for row in MEASURED if row[0] == measure)
    for shift, column, colour, label in ((-0.2, 0, GREY, "before DMD"), (0.2, 1, GREEN, "after DMD")):
        by_seed = [[factor * v for v in values(numbers, row[column], measure)] for row in rows]
        means, reach = error_bars(by_seed, interval=True)
        positions = np.arange(len(rows)) + shift
        axes.bar(positions, means, 0.38, yerr=reach, color=colour, capsize=3, label=label)
    axes.set_xticks(range(len(rows)), [before for before, _ in rows], rotation=30, ha="right", fontsize=8)
    axes.set_title(title, fontsize=10)


def figure(numbers: Numbers, rows: Sequence[tuple[str, str]], opened: Opened) -> str:
    """Inline SVG: every recipe before and after DMD with 95 % intervals, and what each teacher's pairs leave open.

    Args:
      rows: (network before DMD, network after it) of each recipe.
      opened: see `left_open`.
    """
    drawing = Figure(figsize=(13, 7.5), layout="constrained")
    panels = drawing.subplots(2, 3).ravel()
    for axes, (measure, *_) in zip(panels, MEASURED, strict=False):
        _before_and_after(axes, numbers, rows, measure)
    panels[0].legend(fontsize=7, loc="lower left")
    for network, kinds in opened.items():
        for kind, style in (("left", "-"), ("shuffled", "--")):
            if kind in kinds:
                means, reach = error_bars(list(zip(*kinds[kind], strict=True)), interval=True)
                label = network if kind == "left" else f"{network}, another pair's noise"
                colour = GREEN if network == "ode" else "#c0392b"
                blocks = range(1, len(means) + 1)
                panels[5].errorbar(blocks, means, reach, marker="o", capsize=3, label=label, color=colour, ls=style)
                panels[5].set_xticks(blocks)
    panels[5].set(xlabel="block", ylim=(0, None))
    panels[5].set_title("share of the teacher's end points left open", fontsize=10)
    if opened:
        panels[5].legend(fontsize=7)
    return svg(drawing)


def open_table(opened: Opened, titles: Mapping[str, str]) -> Table:
    """`left_open` as a table: what was measured of each network, and what is left of what the past leaves to decide."""
    blocks = len(next(iter(opened.values()))["left"][0])
    rows = []
    for network, kinds in opened.items():
        shown = {"left open": np.asarray(kinds["left"])}
        if "shuffled" in kinds:
            shown["the same with another pair's noise"] = other = np.asarray(kinds["shuffled"])
            shown["ratio of the two"] = shown["left open"] / other
        for what, by_seed in shown.items():
            cells = [spread_of(list(block), 3) for block in by_seed.T]
            rows.append([titles[network], what, str(len(by_seed)), *cells])
    return Table(
        "What the student leaves of its teacher's end points, from pure noise and the clean past",
        ["", "", "seeds", *(f"block {i}" for i in range(1, blocks + 1))],
        rows,
        "Squared error over the variance of the end points over all pairs, on the pairs that it was trained on: an "
        "upper bound of the share that noise, past and text do not determine. Small where a pair's own noise decides, "
        "and also where past and text leave nothing to decide; with another pair's noise it is large in the first case "
        "alone.",
    )
