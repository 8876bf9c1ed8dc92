"""Students of exact teachers where the future turns: the sideways paths of `laws.Turns`, frame-wise, over seeds.

Beside the learned world this takes the teacher's quality out: both teachers are the law's own PF-ODE.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cfjax.studies.findings import Table
from cfjax.studies.laws import Turns, sample
from cfjax.studies.statistics import energy_distance, summary
from cfjax.studies.students import Budget, data_pool, self_rollout, train_ar, train_init
from cfjax.studies.verdicts import Claim

TAIL, OFF = 2, 0.35  # last steps, which are behind every turn; how far from straight on and turned is neither, in steps
REAL_SEED = 20_000
# measure, what the page calls it, +1 where the theory has more of it for a bidirectional teacher
MEASURES = (
    ("motion", "motion, of real", -1),
    ("turns", "turns, of the law's", -1),
    ("between", "neither straight nor turned", 1),
    ("energy", "energy distance", 1),
    ("spread", "spread, of real", -1),
)
DECISIVE = ("motion", "turns", "between")
Paths = Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]  # chance of a turn -> by seed -> init -> measures


def measure_paths(x_BF: np.ndarray, real_BF: np.ndarray, law: Turns) -> dict[str, float]:
    """Generated paths against real ones, by name (`MEASURES`).

    motion: mean sideways step past the first straight ones, over that of real paths.  turns: share of paths whose last
    two steps go aside by more than half of a step, over real paths'.  between: share whose last two are further than
    0.35 of a step from 0 and from either side's.  energy: unbiased energy distance.  spread: ratio of total variances.
    """
    steps, real = np.diff(x_BF, axis=1), np.diff(real_BF, axis=1)
    tail, real_tail = (np.abs(s[:, -TAIL:].mean(axis=1)) / law.step for s in (steps, real))
    moves = lambda s: np.abs(s[:, law.straight :]).mean()
    return {
        "motion": float(moves(steps) / moves(real)),
        "turns": float((tail > 0.5).mean() / (real_tail > 0.5).mean()),
        "between": float((np.minimum(tail, np.abs(tail - 1.0)) > OFF).mean()),
        "energy": energy_distance(x_BF, real_BF),
        "spread": float(x_BF.var(axis=0).sum() / real_BF.var(axis=0).sum()),
    }


def seed_of(
    law: Turns, inits: Sequence[str], budget: Budget, seed: int, videos: int, log: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """One seed: every initialisation's own rollout in four steps; "real" is a second sample of the law."""
    pool = data_pool(law, seed, budget.pool)
    real, other = (sample(law, np.random.default_rng(REAL_SEED + 2 * seed + k), videos) for k in range(2))
    out = {"real": measure_paths(other, real, law)}
    ar = train_ar(law, budget, seed, pool)
    for init in inits:
        log(f"turns {law.branching:g}, seed {seed}: {init}")
        out[init] = measure_paths(self_rollout(train_init(law, init, budget, seed, pool, ar), seed, videos), real, law)
    return out


def _by_seed(paths: Paths, turn: str, init: str, measure: str) -> list[float]:
    return [seed[init][measure] for seed in paths[turn] if init in seed]


def claims(paths: Paths) -> tuple[list[Claim], list[Claim]]:
    """The decisive claims, of the first chance of a turn: bidirectional against causal ODE, and that against the law;
    and all others.
    """
    first, rest = list[Claim](), list[Claim]()
    for number, turn in enumerate(paths):
        for worse, better in (("bi_ode", "causal_ode"), ("bi_ode_cp", "causal_ode"), ("asym_cd", "causal_cd")):
            for measure, title, sign in MEASURES:
                a, b = (_by_seed(paths, turn, init, measure) for init in (worse, better))
                if min(len(a), len(b)) < 2:
                    continue
                more = "more" if sign > 0 else "less"
                text = f"Exact teachers, turns {turn}: {worse}, against {better}: {more} of {title.partition(',')[0]}."
                shown = f"{title}: {np.mean(a):.3f} against {np.mean(b):.3f}, {len(a)} seeds"
                main = number == 0 and worse == "bi_ode" and measure in DECISIVE
                (first if main else rest).append(Claim(text, shown, *((a, b) if sign > 0 else (b, a)), test="paired"))
        for measure, title, sign in MEASURES[:3] if number == 0 else ():
            a, b = (_by_seed(paths, turn, init, measure) for init in ("causal_ode", "real"))
            if len(a) > 1:
                text = f"Exact teachers, turns {turn}: causal_ode, against the law: "
                text += f"{'more' if sign > 0 else 'less'} of {title.partition(',')[0]}."
                shown = f"{title}: {np.mean(a):.3f} against {np.mean(b):.3f}, {len(a)} seeds"
                first.append(Claim(text, shown, *((a, b) if sign > 0 else (b, a)), test="paired"))
    return first, rest


def table(paths: Paths) -> Table:
    """Mean [95 % interval] over seeds by chance of a turn and initialisation."""
    rows = []
    for turn, seeds in paths.items():
        for init in seeds[0] if seeds else ():
            cells = []
            for measure, *_ in MEASURES:
                s = summary(_by_seed(paths, turn, init, measure))
                tail = f" [{s['low']:.3f}, {s['high']:.3f}]" if len(s["values"]) > 1 else ""
                cells.append(f"{s['mean']:.3f}{tail}")
            rows.append([turn, init, str(len(seeds)), *cells])
    head = ["chance of a turn", "", "seeds", *(title for _, title, _ in MEASURES)]
    return Table("Exact teachers, frame-wise, before DMD", head, rows)


def plan_of(values: Mapping[str, Any]) -> Budget:
    """The budget of the study's `paths`."""
    return Budget(
        ar_steps=values["steps"],
        ode_steps=values["steps"],
        cd_steps=values["steps"],
        batch=values["batch"],
        pool=values["pool"],
        solver_steps=values["solver_steps"],
    )
