"""The paper's Table 2 in a world with an uncertain future: measures, claims, tables and the page's figure.

Claims are of two families, each Holm-corrected by itself: the decisive ones, of ODE regression before DMD, which were
named before anything was measured, and all others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cfjax.evaluation.turns import Past
from cfjax.studies.findings import Table as Shown
from cfjax.studies.page import AR, BI, GREY, error_bars, svg
from cfjax.studies.statistics import energy_distance, summary
from cfjax.studies.verdicts import Claim

# measure, what the page calls it, decimals, +1 where a bidirectional teacher makes more of it according to the theory
MEASURES = (
    ("sharpness", "sharpness at turns, of real", 3, -1),
    ("motion", "motion, of real", 3, -1),
    ("turns", "turns, of the data's", 3, -1),
    ("between", "neither straight nor turned", 3, 1),
    ("energy", "energy distance given the past, px", 4, 1),
    ("spread", "spread given the past, of real", 3, -1),
)
TITLES = {
    "real": "real futures, through the codec",
    "ar_solver": "AR teacher, many steps",
    "ode": "causal ODE",
    "bi_ode": "bidirectional ODE (Self Forcing)",
    "bi_pairs_ode": "bidirectional pairs",
    "cd": "causal CD",
    "asymmetric_cd": "asymmetric CD",
    "ar": "none",
}
BEFORE = ("ode", "bi_ode", "bi_pairs_ode", "cd", "asymmetric_cd", "ar")
AFTER = ("dmd", "bi_ode_dmd", "bi_pairs_ode_dmd", "cd_dmd", "asymmetric_cd_dmd", "ar_dmd")
TITLES |= {after: f"{TITLES[before]}, DMD" for before, after in zip(BEFORE, AFTER, strict=True)}
TITLES |= {f"{name}_one": f"{TITLES[name]}, one step" for name in BEFORE[:-1]}
# network -> what it is compared with: its causal counterpart, by the same sampler
REFERENCE = {
    **dict.fromkeys(("bi_ode", "bi_pairs_ode", "ar"), "ode"),
    **dict.fromkeys(("bi_ode_one", "bi_pairs_ode_one"), "ode_one"),
    **dict.fromkeys(("bi_ode_dmd", "bi_pairs_ode_dmd", "ar_dmd"), "dmd"),
    "asymmetric_cd": "cd",
    "asymmetric_cd_one": "cd_one",
    "asymmetric_cd_dmd": "cd_dmd",
}
COLOURS = {"ode": AR, "bi_ode": BI, "bi_pairs_ode": "#e67e22", "real": GREY, "ar_solver": "#16a085"}
DECISIVE = ("sharpness", "motion", "turns")

# layout -> network -> measure -> seed -> value
Numbers = Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]


def summarise(
    table: Mapping[str, Any], real: Mapping[str, Any], pasts: Sequence[Past], *, given: int, shows: slice
) -> dict[str, Any]:
    """Measurements of equally many videos of each past, in the order of the pasts, against the law of what may follow.

    sharpness: mean over the frames in which a turn can first show; `by_frame`: of all.  motion: see `measure_turns`.
    turns: share of turned videos over the chance of a turn, means over pasts.  between: share.  energy: unbiased energy
    distance of the paths after the past (px), mean over pasts.  spread: variance of the last place given the past, over
    that of the law.

    Args:
      real: the same measurements of real futures, so that what a measurement adds is in both.
      shows: these frames, counted from the first one.
    """
    size = table["centres"].shape[1:]
    by_past = (of["centres"].reshape(len(pasts), -1, *size) for of in (table, real))
    energies, made, law = [], [], []
    for past, mine, drawn in zip(pasts, *by_past, strict=True):
        energies.append(energy_distance(*(x[:, given:].reshape(len(x), -1) for x in (mine, drawn))))
        made.append(mine[:, -1].var(axis=0, ddof=1).sum())
        last = past.centres_KP2[:, -1]
        law.append((past.chance_K @ np.square(last) - np.square(past.chance_K @ last)).sum())
    sharp = table["sharpness"]
    return {
        "sharpness": float(sharp[:, shows.start - given : shows.stop - given].mean()),
        "motion": float(table["motion"].mean()),
        "turns": float(table["turned"].mean() / np.mean([past.turns for past in pasts])),
        "between": float(table["between"].mean()),
        "energy": float(np.mean(energies)),
        "spread": float(np.mean(made) / np.mean(law)),
        "by_frame": sharp.mean(axis=0).tolist(),
    }


def relative(found: Mapping[str, Any], real: Mapping[str, Any]) -> dict[str, Any]:
    """Sharpness (frame by frame too) and motion over those of real futures through the codec; all else as it is."""
    by_frame = [a / b for a, b in zip(found["by_frame"], real["by_frame"], strict=True)]
    ratios = {name: found[name] / real[name] for name in ("sharpness", "motion")}
    return {**found, **ratios, "by_frame": by_frame}


def common(numbers: Numbers, layout: str, networks: Sequence[str], measure: str) -> list[list[float]]:
    """A measure of several networks by seed, of the seeds that all of them were measured with."""
    of = [numbers.get(layout, {}).get(network, {}).get(measure, {}) for network in networks]
    seeds = sorted(set.intersection(*map(set, of)))
    return [[values[seed] for seed in seeds] for values in of]


def _shown(title: str, digits: int, a: Sequence[float], b: Sequence[float]) -> str:
    return f"{title}: {np.mean(a):.{digits}f} against {np.mean(b):.{digits}f}, {len(a)} seeds"


def _worse(numbers: Numbers, layout: str, worse: str, better: str, measures: Sequence[str]) -> list[Claim]:
    """Claims that one network is worse than another, where both were measured."""
    claims = []
    for measure, title, digits, sign in MEASURES:
        if measure not in measures:
            continue
        a, b = common(numbers, layout, (worse, better), measure)
        if len(a) > 1:
            more = "more" if sign > 0 else "less"
            text = f"{layout}: {TITLES[worse]}, against {TITLES[better]}: {more} of {title.partition(',')[0]}."
            claims.append(Claim(text, _shown(title, digits, a, b), *((a, b) if sign > 0 else (b, a)), test="paired"))
    return claims


def decisive(numbers: Numbers) -> list[Claim]:
    """That bidirectional ODE loses sharpness, motion and turns, against causal ODE; and whether causal ODE does so,
    against real futures: before DMD.
    """
    claims, measures = [], DECISIVE
    for layout in numbers:
        for worse in ("bi_ode", "bi_pairs_ode"):
            claims += _worse(numbers, layout, worse, "ode", measures)
        for measure, title, digits, _ in MEASURES:
            (ode,) = common(numbers, layout, ("ode",), measure)
            if measure in measures and len(ode) > 1:
                real, name = [1.0] * len(ode), title.partition(",")[0]
                text = f"{layout}: {TITLES['ode']}, against real futures: less of {name}."
                claims.append(Claim(text, _shown(title, digits, ode, real), real, ode, test="paired"))
    return claims


def others(numbers: Numbers) -> list[Claim]:
    """All other comparisons with the causal counterpart, before and after DMD."""
    claims, every = [], [measure for measure, *_ in MEASURES]
    for layout in numbers:
        for worse, better in REFERENCE.items():
            named = DECISIVE if worse in ("bi_ode", "bi_pairs_ode") else ()
            claims += _worse(numbers, layout, worse, better, [m for m in every if m not in named])
    return claims


def tables(numbers: Numbers, exact: Sequence[Mapping[str, Any]]) -> list[Shown]:
    """Mean [95 % interval] over seeds of every network and layout; then the exact part."""
    head = ["", "seeds", *(title for _, title, *_ in MEASURES)]
    out = []
    for layout, networks in numbers.items():
        rows = []
        for network in (name for name in TITLES if name in networks):
            cells, count = [], 0
            for measure, _, digits, _ in MEASURES:
                s = summary(list(networks[network][measure].values()))
                count = len(s["values"])
                tail = f" [{s['low']:.{digits}f}, {s['high']:.{digits}f}]" if count > 1 else ""
                cells.append(f"{s['mean']:.{digits}f}{tail}")
            rows.append([TITLES[network], str(count), *cells])
        out.append(Shown(f"Measured, {layout}", head, rows))
    rows = [
        [f"{row['turn']:g}", str(row["frames"]), str(row["behind"]), f"{row['one_step']['left']:.3f}"]
        + [f"{row[kind][what]:.3f}" for what in DECISIVE for kind in ("one_step", "four_steps", "causal")]
        for row in exact
    ]
    title = "Exact: a student that knows the law, in the block that begins where a turn can first show"
    note = (
        "Left open: E Var of the block given its noise and past, over its variance given the past, of bidirectional "
        "pairs; the causal teacher leaves 0. Then the mean that a student of bidirectional pairs learns, in one "
        "step, in four, and in four of causal pairs, whose loss is the estimator's own (means of nearest pairs)."
    )
    kinds = [f"{what}: {kind}" for what in DECISIVE for kind in ("1 step", "4 steps", "causal")]
    names = ["chance of a turn", "frames of the block", "behind it", "left open", *kinds]
    return [*out, Shown(title, names, rows, note)]


def _by_frame(axes: Axes, numbers: Numbers, layout: str, first: int) -> None:
    for network, colour in COLOURS.items():
        found = numbers[layout].get(network, {}).get("by_frame")
        if found:
            means, reach = error_bars(list(zip(*found.values(), strict=True)), interval=True)
            frames = range(first, first + len(means))
            axes.errorbar(frames, means, reach, marker="o", capsize=3, color=colour, label=TITLES[network])
    axes.set(xlabel="frame", ylim=(0, None))
    axes.set_title(f"sharpness of real, {layout}", fontsize=10)
    axes.legend(fontsize=6)


def _bars(axes: Axes, numbers: Numbers, measure: str) -> None:
    names = [f"{layout} {name}" for layout in numbers for name in TITLES if name in numbers[layout]]
    found = [list(numbers[layout][name][measure].values()) for layout, name in map(str.split, names)]
    means, reach = error_bars(found, interval=True)
    colours = [
        COLOURS.get(name.split()[1].removesuffix("_one").removesuffix("_dmd").replace("dmd", "ode"), "#8e44ad")
        for name in names
    ]
    axes.barh(range(len(names)), means, xerr=reach, color=colours, capsize=2)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_title(next(title for key, title, *_ in MEASURES if key == measure), fontsize=10)


def _dose(axes: Axes, exact: Sequence[Mapping[str, Any]]) -> None:
    for turn in sorted({row["turn"] for row in exact}):
        rows = [row for row in exact if row["turn"] == turn]
        axes.plot(
            [row["frames"] for row in rows],
            [row["one_step"]["left"] for row in rows],
            marker="o",
            label=f"turns: {turn:g}",
        )
    axes.set(xlabel="frames of the block", ylim=(0, None))
    axes.set_title("exact: share left open by bidirectional pairs", fontsize=10)
    axes.legend(fontsize=7)


def figure(numbers: Numbers, exact: Sequence[Mapping[str, Any]], *, first: int) -> str:
    """Inline SVG: sharpness by frame, every measure of every network, and the exact dose-response.

    Args:
      first: the number of the first generated frame.
    """
    drawing = Figure(figsize=(15, 11), layout="constrained")
    panels = drawing.subplots(3, 3).ravel()
    for axes, layout in zip(panels, list(numbers)[:2], strict=False):
        _by_frame(axes, numbers, layout, first)
    _dose(panels[2], exact)
    for axes, (measure, *_) in zip(panels[3:], MEASURES, strict=True):
        if any(numbers.values()):
            _bars(axes, numbers, measure)
    return svg(drawing)
