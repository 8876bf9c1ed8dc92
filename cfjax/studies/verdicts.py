"""Claims, judged by one rule, and the claims of the exact part; none is judged unless its numbers were measured.

The rule is stated before the numbers: a claim says that one number is larger than another. It holds if that is seen
with p < 0.05, is reversed if the opposite is, and else is not significant. All claims of a page are one family
of Holm's correction. With fewer than two seeds nothing is tested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cfjax.studies.results import Results, after_dmd, early, number, quality, settled, truth
from cfjax.studies.statistics import holm, paired, recorded, welch

LEVEL = 0.05
HOLDS, REVERSED, NOT_SIGNIFICANT, NOT_TESTED = "holds", "reversed", "not significant", "not tested"
TESTS = {"welch": welch, "paired": paired}
# measures by which a bidirectional start may be worse: +1 where more of it is worse, -1 where less is
WORSE = {"energy": 1, "patterns": 1, "static": 1, "spread": -1, "motion": -1}


@dataclass(frozen=True)
class Claim:
    """That one number is larger than another.

    Attributes:
      numbers: what is shown of them.
      larger, smaller: by seed (or another unit that was drawn independently), what is said to be the larger, and the
        other.
      test: the primary one, "welch" or, where both sides are of the same network or a gap, "paired".
    """

    text: str
    numbers: str
    larger: Sequence[float]
    smaller: Sequence[float]
    test: str = "welch"


@dataclass(frozen=True)
class Verdict:
    """A claim, the numbers that bear on it, what became of it, and its p (None: not tested).

    Attributes:
      outcome: "holds", "reversed", "not significant" or "not tested", by `p` alone.
      p, p_paired: of the primary and of the paired test, each Holm-corrected over the page.
    """

    claim: str
    numbers: str
    outcome: str
    test: str
    p: float | None
    p_paired: float | None


def outcome(larger: Sequence[float], smaller: Sequence[float], p: float) -> str:
    """What the rule says, given the corrected p."""
    if not np.isfinite(p):
        return NOT_TESTED
    if p >= LEVEL:
        return NOT_SIGNIFICANT
    return HOLDS if np.mean(larger) > np.mean(smaller) else REVERSED


def judge(claims: Sequence[Claim]) -> list[Verdict]:
    """A verdict per claim; their p-values are one family of Holm's correction, and their texts differ."""
    p = holm({c.text: TESTS[c.test](c.larger, c.smaller) for c in claims})
    also = holm({c.text: paired(c.larger, c.smaller) for c in claims})
    out = []
    for c in claims:
        tail = "" if c.test == "paired" else f" (paired {number(also[c.text])})"
        shown = f"{c.numbers}, p {number(p[c.text])}{tail or ' (paired)'}."
        found = outcome(c.larger, c.smaller, p[c.text])
        out.append(Verdict(c.text, shown, found, c.test, recorded(p[c.text]), recorded(also[c.text])))
    return out


def verdicts(results: Results) -> list[Verdict]:
    """The paper's claims, and this study's, against the numbers."""
    found = [_determined(results)]
    if results["seeds"]:
        found += [*_start_claims(results), *_consistency_claims(results), *_dmd_claims(results)]
        if results["plan"]["forcing"]:
            found.append(_forcing_claim(results))
    return judge(found)


def _determined(results: Results) -> Claim:
    """By past: the estimator averages over many futures of each, and pasts were drawn independently."""
    frames, top = early(results), results["plan"]["levels"][0]
    bi, ar = (truth(results, t, top, frames, "of_prior") for t in ("bidirectional", "causal"))
    spreads = [truth(results, t, top, frames, "by_past").tolist() for t in ("bidirectional", "causal")]
    return Claim(
        "A noisy frame and its clean past leave the clean frame open under the bidirectional teacher, and not under "
        "the AR teacher.",
        f"E Var / prior at s = {top:g}: {bi:.3f} against {number(ar)} (the estimator's bias), {len(spreads[0])} pasts",
        larger=spreads[0],
        smaller=spreads[1],
        test="paired",
    )


def _pair(results: Results, text: str, larger: str, smaller: str, measure: str) -> Claim:
    """Of two initialisations before DMD."""
    a, b = (quality(results, init, measure) for init in (larger, smaller))
    return Claim(text, f"{measure} {np.mean(a):.4f} ({larger}) against {np.mean(b):.4f} ({smaller})", a, b)


def _start_claims(results: Results) -> list[Claim]:
    plan, frames, top = results["plan"], early(results), results["plan"]["levels"][0]
    if not {"bi_ode", "causal_ode"} <= set(plan["inits"]):
        return []
    near, mean = (settled(results, "bi_ode", top, k, frames) for k in ("dist_map", "dist_mean"))
    causal = settled(results, "causal_ode", top, "dist_map", frames)
    left = truth(results, "bidirectional", top, frames, "central")
    floor = truth(results, "bidirectional", top, frames, "floor_mean")
    settling = [
        Claim(
            "The student of bidirectional pairs ends nearer to their conditional mean than to its teacher's map.",
            f"distance² to map {np.mean(near):.4f} (E Var {left:.4f}), to mean {np.mean(mean):.4f} (floor {floor:.4f})",
            near,
            mean,
            test="paired",
        ),
        Claim(
            "It ends further from its teacher's map than the student of AR pairs from its own.",
            f"distance² to map {np.mean(near):.4f} against {np.mean(causal):.4f}",
            near,
            causal,
        ),
    ]
    starts = [
        _pair(
            results,
            f"Before DMD the bidirectional ODE initialisation is worse in {measure}.",
            *(("bi_ode", "causal_ode") if sign > 0 else ("causal_ode", "bi_ode")),
            measure,
        )
        for measure, sign in WORSE.items()
    ]
    return settling + starts


def _consistency_claims(results: Results) -> list[Claim]:
    inits, out = set(results["plan"]["inits"]), []
    if {"asym_cd", "causal_cd"} <= inits:
        out = [
            _pair(results, "Asymmetric consistency distillation loses more spread.", "causal_cd", "asym_cd", "spread"),
            _pair(
                results,
                "Asymmetric consistency distillation moves less (as blur by a conditional mean would have it).",
                "causal_cd",
                "asym_cd",
                "motion",
            ),
        ]
    if {"asym_cd", "asym_cd_cp", "causal_cd"} <= inits:
        both, future, neither = (
            np.asarray(quality(results, init, "spread")) for init in ("asym_cd", "asym_cd_cp", "causal_cd")
        )
        out.append(
            Claim(
                "Of the spread that asymmetric CD loses, future noise costs more than the noisy past.",
                f"spread {future.mean():.3f} with future noise and a clean past, {both.mean():.3f} with both, "
                f"{neither.mean():.3f} with neither",
                list(neither - future),
                list(future - both),
                test="paired",
            )
        )
    return out


def _forcing_claim(results: Results) -> Claim:
    diffusion, teacher = ([seed["flow_error"][k] for seed in results["seeds"]] for k in ("diffusion", "teacher"))
    return Claim(
        "Diffusion forcing makes a worse AR network than teacher forcing, given a clean past.",
        f"squared error of the flow {np.mean(diffusion):.4f} against {np.mean(teacher):.4f}",
        diffusion,
        teacher,
    )


def gaps(results: Results, measure: str, at: int = 0) -> list[float]:
    """By how much the bidirectional start is worse in a measure, by seed: after `at` iterations of DMD, 0 before it."""
    of = (lambda i: after_dmd(results, i, at, measure)) if at else (lambda i: quality(results, i, measure))
    return [WORSE[measure] * (a - b) for a, b in zip(of("bi_ode"), of("causal_ode"), strict=True)]


def _still(measure: str) -> str:
    return f"After DMD the bidirectional start is still worse in {measure}."


def _narrows(measure: str) -> str:
    return f"DMD narrows the gap in {measure}."


def _dmd_claims(results: Results) -> list[Claim]:
    plan, out = results["plan"], []
    if not {"bi_ode", "causal_ode"} <= set(plan["dmd"]):
        return []
    end = plan["dmd_at"][-1]
    for measure, sign in WORSE.items():
        a, b = (after_dmd(results, init, end, measure) for init in ("bi_ode", "causal_ode"))
        shown = f"{np.mean(a):.4f} against {np.mean(b):.4f} after {end} iterations"
        out.append(Claim(_still(measure), shown, *((a, b) if sign > 0 else (b, a))))
        before, after = gaps(results, measure), gaps(results, measure, end)
        shown = f"gap {np.mean(before):.4f} before, {np.mean(after):.4f} after"
        out.append(Claim(_narrows(measure), shown, before, after, test="paired"))
    return out


def washed_out(found: Sequence[Verdict], measure: str) -> str:
    """Whether DMD washes the gap in a measure out, by the verdicts on what is left of it and on its narrowing."""
    by_claim: Mapping[str, str] = {v.claim: v.outcome for v in found}
    left, narrowed = by_claim[_still(measure)], by_claim[_narrows(measure)]
    if NOT_TESTED in (left, narrowed):
        return NOT_TESTED
    if left == REVERSED:
        return "over-corrected"
    if narrowed != HOLDS:
        return "no" if left == HOLDS else NOT_SIGNIFICANT
    return "in part" if left == HOLDS else "washed out"
