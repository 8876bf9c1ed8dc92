"""Tables of the exact part's raw numbers: all that were measured, whatever the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cfjax.studies.results import Results, after_dmd, early, every, number, quality, settled, spread_of, truth
from cfjax.studies.statistics import MEASURES, holm, paired, welch
from cfjax.studies.students import INITS, dmd_stage
from cfjax.studies.verdicts import WORSE, Verdict, gaps, washed_out
from cfjax.studies.walk import TEACHER_OF, TEACHERS

SIDE_BY_SIDE = (
    ("bi_ode", "causal_ode"),
    ("asym_cd", "causal_cd"),
    ("bi_ode_cp", "bi_ode"),
    ("asym_cd_cp", "causal_cd"),
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, with what they show; `folded` ones are opened on request."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    folded: bool = False


def comparisons(results: Results) -> dict[str, float]:
    """Welch's p of every pair and measure side by side, Holm-corrected as one table: "a vs b: measure" -> p."""
    inits = results["plan"]["inits"]
    raw = {
        f"{a} vs {b}: {m}": welch(quality(results, a, m), quality(results, b, m))
        for a, b in SIDE_BY_SIDE
        if a in inits and b in inits
        for m in MEASURES
    }
    return holm(raw)


def tables(results: Results, verdicts: Sequence[Verdict]) -> list[Table]:
    """All tables that the results have numbers for; `verdicts` are those of the same page."""
    found = [*_exact_tables(results), *_correlation_tables(results)]
    if results["seeds"]:
        found += [*_settling_tables(results), _kept_table(results), *_quality_tables(results)]
        found += _dmd_tables(results, verdicts)
    return [table for table in found if table.rows]


def _walk_rows(results: Results) -> list[list[str]]:
    """A teacher at a level per row: the ambiguity of every frame, and the least monotone frame."""
    return [
        [
            f"{teacher}, s = {s:g}",
            *(number(truth(results, teacher, s, [f], "of_prior")) for f in every(results)),
            f"{min(truth(results, teacher, s, [f], 'monotone') for f in every(results)):.4f}",
        ]
        for teacher in TEACHERS
        for s in results["plan"]["levels"]
    ]


def _collision_rows(results: Results) -> list[list[str]]:
    """A frame per row: how many collisions were solved, how well, and where they end."""
    return [
        [
            str(row["frame"]),
            f"{len(row['ends'])} of {row['asked']}",
            number(row["residual"]),
            f"{min(row['ends']):.3f} … {max(row['ends']):.3f}" if row["ends"] else "-",
            number(float(np.std(row["ends"])) if row["ends"] else float("nan")),
            f"{row['causal']:.3f}",
        ]
        for row in results["collisions"]["rows"]
    ]


def _exact_tables(results: Results) -> list[Table]:
    exact, frames = results["linear"], range(1, 6)
    linear_rows = [[f"s = {float(s):.4g}", *(number(v) for v in values)] for s, values in exact["ambiguity"].items()]
    prior = [f"{v / q:.3f}" for v, q in zip(exact["ambiguity"]["1.0"], exact["innovation"], strict=True)]
    errors = ", ".join(f"{number(e)} with {n} steps" for n, e in results["truth"]["round_trip"].items())
    cd = [[name, *(number(v) for v in exact["consistency"][name].values())] for name in exact["consistency"]]
    ahead = [["W2", *(number(v["w2"]) for v in exact["by_ahead"].values())]]
    return [
        Table(
            "Linear-Gaussian videos, closed form: V_i(s) under the bidirectional teacher",
            ["", *(f"frame {i}" for i in frames)],
            [*linear_rows, ["V(1) / innovation", *prior]],
            "a = 0.9, five frames. Under the AR teacher every entry is exactly 0.",
        ),
        Table(
            "Branching walk: E Var[x0 | noisy frame, clean past] / prior variance",
            ["", *(f"frame {i}" for i in every(results)), "monotone"],
            _walk_rows(results),
            "First differences of neighbours; the estimator's own bias is what the causal rows show. Monotone: the "
            "fraction of neighbouring noisy frames whose end points are in the same order, of the worst frame. "
            f"Data → noise → data by rk4, float64, rms: {errors}.",
        ),
        Table(
            "Exact collisions: the same noise of frame i, the same clean past, another future noise",
            ["frame", "solved", "past differs by", "end points", "sd", "AR teacher"],
            _collision_rows(results),
            "float64; an existence proof, not samples of a law.",
        ),
        Table(
            "Linear-Gaussian W2 of the 4-step rollout, by the future frames that the ODE teacher sees (clean past)",
            ["", *exact["by_ahead"]],
            ahead,
        ),
        Table(
            "Linear-Gaussian W2 after consistency distillation to its optimum, by its number of levels",
            ["teacher", *exact["consistency"]["causal"]],
            cd,
            "Given the clean past, a teacher that sees future noise averages to the AR velocity (tower property): its "
            "consistency optimum is the causal one. With the noisy past the bias does not vanish.",
        ),
    ]


def _correlation_tables(results: Results) -> list[Table]:
    exact = results["linear"]
    by_correlation = [
        [
            f"a = {a}",
            *(number(v) for v in row["ambiguity"]),
            *(number(row[teacher][what]) for what in ("w2", "spread") for teacher in TEACHERS),
        ]
        for a, row in exact["by_correlation"].items()
    ]
    lengths = exact["first_frame_by_length"]
    kinds = [f"{what}, {short}" for what in ("W2", "spread") for short in ("bi", "AR")]
    return [
        Table(
            "Linear-Gaussian videos by correlation of neighbouring frames: V_i(1), and the 4-step rollout",
            ["", *(f"frame {i}" for i in range(1, 6)), *kinds],
            by_correlation,
            "V_i(1) under the bidirectional teacher. Without correlation there is nothing to confuse.",
        ),
        Table(
            "Linear-Gaussian V_1(1) by the number of frames",
            ["", *(f"F = {n}" for n in lengths)],
            [["V_1(1)", *(number(v) for v in lengths.values())]],
            "a = 0.9.",
        ),
    ]


def _settling_tables(results: Results) -> list[Table]:
    """Each student's two distances, and the two students' distances, pooled over frames and by frame."""
    plan = results["plan"]
    students = [i for i in TEACHER_OF if i in plan["inits"]]
    pooled = [(f"frames 1 to {early(results)[-1]}", early(results))]
    groups = [*pooled, *((f"frame {f}", [f]) for f in every(results))]
    points = [(f"{label}, s = {s:g}", s, frames) for label, frames in groups for s in plan["levels"]]
    own = [(f"{label}, {init}", init, s, frames) for label, s, frames in points for init in students]
    of = lambda init, s, frames: [settled(results, init, s, k, frames) for k in ("dist_map", "dist_mean")]
    p = holm({name: paired(*of(*where)) for name, *where in own})
    rows = []
    for name, init, s, frames in own:
        near, mean = of(init, s, frames)
        known = [truth(results, TEACHER_OF[init], s, frames, k) for k in ("floor_map", "floor_mean", "central")]
        rows.append([name, spread_of(near), spread_of(mean), *map(number, known), number(p[name])])
    head = ["", "to the flow map", "to the conditional mean", "floor, map", "floor, mean", "E Var", "p, paired"]
    text = (
        "Squared distances over the central 96 % of the noisy frame, E Var over the same. Floors: the solver's error; "
        "and the kernel fit's, whose bias is measured on AR pairs, where mean and map are one function. So an AR row's "
        "two distances are to the same thing but for that bias: between its branches the map is steep, fit and network "
        "both smooth it, and the student may be nearer to the smoothed fit. p: paired test of the two distances over "
        "seeds, Holm-corrected over this table and the folded one."
    )
    first = len(plan["levels"]) * len(students)
    out = [
        Table("Where the students end", head, rows[:first], text),
        Table("The same by frame", head, rows[first:], text, folded=True),
    ]
    if len(students) == 2:
        out.append(_between(results, points, of))
    return out


def _between(
    results: Results,
    points: Sequence[tuple[str, float, Sequence[int]]],
    of: Callable[[str, float, Sequence[int]], list[list[float]]],
) -> Table:
    """Welch's test between the two students, on either distance."""
    raw: dict[str, float] = {}
    for name, s, frames in points:
        for what, bi, ar in zip(("map", "mean"), of("bi_ode", s, frames), of("causal_ode", s, frames), strict=True):
            raw[f"{name} {what}"] = welch(bi, ar)
    p = holm(raw)
    rows = [[name, *(number(p[f"{name} {what}"]) for what in ("map", "mean"))] for name, *_ in points]
    return Table(
        "bi_ode against causal_ode: p of Welch's test on either distance, Holm-corrected over this table",
        ["", "to the flow map", "to the conditional mean"],
        rows,
        folded=True,
    )


def _kept_table(results: Results) -> Table:
    plan, top = results["plan"], results["plan"]["levels"][0]
    frames = every(results)
    rows = []
    for init, teacher in TEACHER_OF.items():
        if init in plan["inits"]:
            rows.append([f"{init}, measured", *(spread_of(settled(results, init, top, "kept", [f])) for f in frames)])
            left = (truth(results, teacher, top, [f], "of_prior") for f in frames)
            rows.append(["1 - E Var / prior", *(number(1.0 - v) for v in left)])
    return Table(
        f"Variance of a frame given its clean past that one prediction keeps, s = {top:g}",
        ["", *(f"frame {f}" for f in frames)],
        rows,
        "By the law of total variance a conditional mean keeps what its teacher's pairs do not leave open.",
    )


def _quality_tables(results: Results) -> list[Table]:
    plan = results["plan"]
    names = ["real", *plan["inits"], *(f"ahead_{k}" for k in plan["ahead"])]
    rows = [[n, INITS.get(n, ""), *(spread_of(quality(results, n, m)) for m in MEASURES)] for n in names]
    p = comparisons(results)
    tests = [
        [f"{a} vs {b}", *(number(p[f"{a} vs {b}: {m}"]) for m in MEASURES)]
        for a, b in SIDE_BY_SIDE
        if f"{a} vs {b}: {MEASURES[0]}" in p
    ]
    forcing = [
        [kind, spread_of([seed["flow_error"][kind] for seed in results["seeds"]])]
        for kind in ("teacher", "diffusion")
        if plan["forcing"]
    ]
    return [
        Table(
            "Walks by 4-step self-rollout, before DMD", ["", "", *MEASURES], rows, "energy is unbiased: it may be < 0."
        ),
        Table(
            "The same side by side: p of Welch's test, Holm-corrected over this table",
            ["", *MEASURES],
            tests,
            "For orientation; the pre-stated tests are the verdicts', a family of their own.",
        ),
        Table(
            "Stage 1: squared error of the flow given a clean past, s = 0.625, by what the past was in training",
            ["forcing", "error"],
            forcing,
        ),
    ]


def _dmd_tables(results: Results, verdicts: Sequence[Verdict]) -> list[Table]:
    plan, cycle = results["plan"], dmd_stage().cadence["student"]
    by_update = [
        [init, str(at), str(at // cycle), *(spread_of(after_dmd(results, init, at, m)) for m in MEASURES)]
        for init in plan["dmd"]
        for at in plan["dmd_at"]
    ]
    out = [Table("After DMD", ["", "iterations", "of them the student's", *MEASURES], by_update)]
    if {"bi_ode", "causal_ode"} <= set(plan["dmd"]):
        points = [0, *plan["dmd_at"]]
        rows = [[m, *(spread_of(gaps(results, m, at)) for at in points), washed_out(verdicts, m)] for m in WORSE]
        columns = [f"{at // cycle} student updates" for at in points[1:]]
        note = (
            "bi_ode's excess over causal_ode in the direction that is worse. Washed out: DMD narrows the gap, and the "
            "rest is not significant; in part: the rest is significant; over-corrected: the start ends better by it. "
            "By the verdicts, so p < 0.05 after their correction."
        )
        head = ["", "before DMD", *columns, "washed out?"]
        out.append(Table("What DMD leaves of the bidirectional start's harm", head, rows, note))
    return out
