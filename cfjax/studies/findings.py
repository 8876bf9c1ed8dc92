"""From raw numbers to tables and verdicts; nothing here is shown unless it was measured, whichever way it falls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfjax.studies.statistics import MEASURES, holm, summary, welch
from cfjax.studies.students import INITS

Results = Mapping[str, Any]
COMPARED = (("bi_ode", "causal_ode"), ("asym_cd", "causal_cd"), ("bi_ode_cp", "bi_ode"), ("asym_cd_cp", "causal_cd"))


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, with what they show; `folded` ones are opened on request."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Verdict:
    """One claim, the numbers that bear on it, and whether it holds here."""

    claim: str
    numbers: str
    holds: bool


def number(value: float, digits: int = 4) -> str:
    """Short, with at most `digits` decimals; tiny ones by their power of ten."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10.0**-digits else f"{value:.0e}"


def spread_of(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation over seeds."""
    s = summary(values)
    return number(s["mean"], digits) + (f" ± {number(s['sd'], digits)}" if len(values) > 1 else "")


def quality(results: Results, init: str, measure: str) -> list[float]:
    """A measure of an initialisation's rollouts, by seed."""
    return [seed["quality"][init][measure] for seed in results["seeds"]]


def settled(results: Results, init: str, sigma: float, what: str, frames: Sequence[int]) -> list[float]:
    """A distance of one student, by seed: its mean over these frames."""
    return [
        float(
            np.mean(
                [
                    row[what]
                    for row in seed["settling"]
                    if row["init"] == init and row["sigma"] == sigma and row["frame"] in frames
                ]
            )
        )
        for seed in results["seeds"]
    ]


def ambiguity(results: Results, teacher: str, sigma: float, frames: Sequence[int], key: str = "ambiguity") -> float:
    """E Var of the walk, its mean over these frames."""
    found = [
        row[key]
        for row in results["truth"]["rows"]
        if (row["teacher"], row["sigma"]) == (teacher, sigma) and row["frame"] in frames
    ]
    return float(np.mean(found))


def early(results: Results) -> list[int]:
    """All frames but the last, whose future is empty."""
    return list(range(1, results["plan"]["frames"]))


def comparisons(results: Results) -> dict[str, float]:
    """Welch's p of every compared pair and measure, Holm-corrected as one family: "a vs b: measure" -> p."""
    inits = results["plan"]["inits"]
    raw = {
        f"{a} vs {b}: {m}": welch(quality(results, a, m), quality(results, b, m))
        for a, b in COMPARED
        if a in inits and b in inits
        for m in MEASURES
    }
    return holm(raw)


def tables(results: Results) -> list[Table]:
    """All tables that the results have numbers for."""
    found = _exact_tables(results)
    if results["seeds"]:
        found += [*_settling_tables(results), *_quality_tables(results)]
    return [table for table in found if table.rows]


def _exact_tables(results: Results) -> list[Table]:
    exact, frames, levels = results["linear"], range(1, 6), results["plan"]["levels"]
    linear_rows = [[f"s = {float(s):.4g}", *(number(v) for v in values)] for s, values in exact["ambiguity"].items()]
    prior = [f"{v / q:.3f}" for v, q in zip(exact["ambiguity"]["1.0"], exact["innovation"], strict=True)]
    walk = [
        [
            f"{teacher}, s = {s:g}",
            *(
                number(ambiguity(results, teacher, s, [f], "of_prior"))
                for f in (*early(results), len(early(results)) + 1)
            ),
        ]
        for teacher in ("bidirectional", "causal")
        for s in levels
    ]
    collisions = [
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
            ["", *(f"frame {i}" for i in (*early(results), len(early(results)) + 1))],
            walk,
            "First differences of neighbours; the estimator's own bias is what the causal rows show. "
            f"Data → noise → data by rk4, float64, rms: {errors}.",
        ),
        Table(
            "Exact collisions: the same noise of frame i, the same clean past, another future noise",
            ["frame", "solved", "past differs by", "end points", "sd", "AR teacher"],
            collisions,
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


def _settling_tables(results: Results) -> list[Table]:
    plan = results["plan"]
    out: list[list[str]] = []
    every: list[list[str]] = []
    students = [i for i in ("causal_ode", "bi_ode") if i in plan["inits"]]
    teacher_of = {"causal_ode": "causal", "bi_ode": "bidirectional"}
    groups = [("frames 1 to " + str(early(results)[-1]), early(results))]
    groups += [(f"frame {f}", [f]) for f in (*early(results), plan["frames"])]
    raw: dict[str, float] = {}
    for label, frames in groups:
        for sigma in plan["levels"]:
            for init in students:
                near, mean = (settled(results, init, sigma, k, frames) for k in ("dist_map", "dist_mean"))
                name = f"{label}, s = {sigma:g}, {init}"
                raw[name] = welch(near, mean)
                row = [
                    name,
                    spread_of(near),
                    spread_of(mean),
                    spread_of(settled(results, init, sigma, "floor_mean", frames)),
                ]
                row.append(number(ambiguity(results, teacher_of[init], sigma, frames)))
                (out if len(frames) > 1 else every).append(row)
    corrected = holm(raw)
    for row in (*out, *every):
        row.append(number(corrected[row[0]]))
    head = [
        "",
        "distance² to the flow map",
        "distance² to the conditional mean",
        "floor of the latter",
        "E Var",
        "p, Holm",
    ]
    text = "Central 96 % of the noisy frame. p: Welch's test between the two distances, over seeds."
    return [
        Table("Where the students end", head, out, text),
        Table("The same by frame", head, every, text, folded=True),
    ]


def _quality_tables(results: Results) -> list[Table]:
    plan = results["plan"]
    names = ["real", *plan["inits"], *(f"ahead_{k}" for k in plan["ahead"])]
    rows = [[n, INITS.get(n, ""), *(spread_of(quality(results, n, m)) for m in MEASURES)] for n in names]
    p = comparisons(results)
    tests = [
        [f"{a} vs {b}", *(number(p[f"{a} vs {b}: {m}"]) for m in MEASURES)]
        for a, b in COMPARED
        if f"{a} vs {b}: {MEASURES[0]}" in p
    ]
    forcing = [
        [kind, spread_of([seed["flow_error"][kind] for seed in results["seeds"]])]
        for kind in ("teacher", "diffusion")
        if plan["forcing"]
    ]
    dmd = [
        [f"{init}, {at}", *(spread_of([seed["dmd"][init][at][m] for seed in results["seeds"]]) for m in MEASURES)]
        for init in plan["dmd"]
        for at in map(str, plan["dmd_at"])
    ]
    return [
        Table(
            "Walks by 4-step self-rollout, before DMD", ["", "", *MEASURES], rows, "energy is unbiased: it may be < 0."
        ),
        Table("Welch's test, Holm-corrected over this table", ["", *MEASURES], tests),
        Table(
            "Stage 1: squared error of the flow given a clean past, s = 0.625, by what the past was in training",
            ["forcing", "error"],
            forcing,
        ),
        Table("After DMD, by iteration", ["", *MEASURES], dmd),
    ]


def verdicts(results: Results) -> list[Verdict]:
    """The paper's claims, and this study's, against the numbers."""
    frames, top, plan = early(results), results["plan"]["levels"][0], results["plan"]
    bi, ar = (ambiguity(results, t, top, frames, "of_prior") for t in ("bidirectional", "causal"))
    out = [
        Verdict(
            "Under the bidirectional teacher a noisy frame and its clean past do not determine the clean frame; under "
            "the AR teacher they do.",
            f"E Var / prior at s = {top:g}: {bi:.3f} against {number(ar)} (the estimator's bias).",
            bi > 0.1 and ar < 0.01,
        )
    ]
    if not results["seeds"]:
        return out
    inits = set(plan["inits"])
    if {"bi_ode", "causal_ode"} <= inits:
        near, mean = (np.mean(settled(results, "bi_ode", top, k, frames)) for k in ("dist_map", "dist_mean"))
        truth = ambiguity(results, "bidirectional", top, frames)
        causal = np.mean(settled(results, "causal_ode", top, "dist_map", frames))
        p = comparisons(results)
        energy = [np.mean(quality(results, i, "energy")) for i in ("bi_ode", "causal_ode")]
        motion = [np.mean(quality(results, i, "motion")) for i in ("bi_ode", "causal_ode")]
        p_energy = p["bi_ode vs causal_ode: energy"]
        out += [
            Verdict(
                "The student of bidirectional pairs ends at the conditional mean, that of AR pairs at the flow map.",
                f"distance² to map {near:.4f} (E Var {truth:.4f}), to mean {mean:.4f}; AR student to map {causal:.4f}.",
                bool(mean < 0.2 * near and causal < 0.2 * near and abs(near / truth - 1) < 0.2),
            ),
            Verdict(
                "Before DMD the bidirectional ODE initialisation generates worse videos.",
                f"energy distance {energy[0]:.4f} against {energy[1]:.4f}, p {number(p_energy)} (Holm).",
                bool(energy[0] > energy[1] and not p_energy > 0.05),
            ),
            Verdict(
                "It moves less.",
                f"motion {motion[0]:.3f} against {motion[1]:.3f} of the law's.",
                bool(motion[0] < motion[1]),
            ),
        ]
    return out + _consistency_verdicts(results) + _dmd_verdicts(results)


def _consistency_verdicts(results: Results) -> list[Verdict]:
    inits, out = set(results["plan"]["inits"]), []
    if {"asym_cd", "causal_cd"} <= inits:
        spread = [np.mean(quality(results, i, "spread")) for i in ("asym_cd", "causal_cd")]
        motion = [np.mean(quality(results, i, "motion")) for i in ("asym_cd", "causal_cd")]
        out += [
            Verdict(
                "Asymmetric consistency distillation is worse than causal.",
                f"spread {spread[0]:.3f} against {spread[1]:.3f}.",
                bool(spread[0] < spread[1]),
            ),
            Verdict(
                "Asymmetric consistency distillation moves less (as blur by a conditional mean would have it).",
                f"motion {motion[0]:.3f} against {motion[1]:.3f}.",
                bool(motion[0] < motion[1]),
            ),
        ]
    if {"asym_cd", "asym_cd_cp", "causal_cd"} <= inits:
        spread = [np.mean(quality(results, i, "spread")) for i in ("asym_cd_cp", "asym_cd", "causal_cd")]
        out.append(
            Verdict(
                "It is future noise that makes asymmetric CD worse (not the noisy past).",
                f"spread {spread[0]:.3f} with future noise and a clean past, {spread[1]:.3f} with both, "
                f"{spread[2]:.3f} with neither.",
                bool(spread[2] - spread[0] > 0.5 * (spread[2] - spread[1])),
            )
        )
    return out


def _dmd_verdicts(results: Results) -> list[Verdict]:
    plan = results["plan"]
    if not {"bi_ode", "causal_ode"} <= set(plan["dmd"]):
        return []
    at = str(plan["dmd_at"][-1])
    of = lambda i, m: [seed["dmd"][i][at][m] for seed in results["seeds"]]  # noqa: E731
    out = []
    for m, worse in (("static", 1), ("motion", -1), ("energy", 1)):
        a, b = of("bi_ode", m), of("causal_ode", m)
        p = welch(a, b)
        out.append(
            Verdict(
                f"The bidirectional start's worse {m} survives DMD.",
                f"{np.mean(a):.4f} against {np.mean(b):.4f} after {at} iterations, p {number(p)} (uncorrected).",
                bool(worse * (np.mean(a) - np.mean(b)) > 0 and p < 0.05),
            )
        )
    return out
