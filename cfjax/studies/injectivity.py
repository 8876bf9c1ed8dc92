"""The exact part of the study: parts that are computed once each, stored as JSON, and skipped when they exist.

What they put numbers on: the paper's definition 3.1 (frame-level injectivity), lemma 3.2 (a bidirectional teacher's
flow map does not have it), proposition 3.3 (regression then returns a conditional mean) and 3.4 (diffusion forcing).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import read_if_whole, write_atomically
from cfjax.flow.path import add_noise
from cfjax.flow.schedule import sigma_table
from cfjax.models.wan import embed_text, teacher_forced
from cfjax.studies import linear
from cfjax.studies.laws import LinearGaussian, Walk, sample
from cfjax.studies.statistics import measure
from cfjax.studies.students import (
    INITS,
    SAMPLER,
    Budget,
    data_pool,
    dmd_stage,
    dmd_trainer,
    self_rollout,
    train_ar,
    train_critic,
    train_init,
)
from cfjax.studies.toys import FRAMEWISE, Exact
from cfjax.studies.walk import STEPS, TEACHER_OF, TEACHERS, Probe, collide, facts, probes, round_trip, settling

SIGMAS = tuple(float(s) for s in SAMPLER.sigmas())
REAL_SEED = 10_000
FORMAT = 2  # of the parts: those of another are not read


@dataclass(frozen=True)
class Plan:
    """The size of the study.

    Attributes:
      seeds: how many; a seed is own data, networks, minibatches and sampling noise. 0 leaves what needs no training.
      frames: of the walk.
      pasts, futures: of each probe; futures_seed draws them, the same for every seed.
      levels: noise levels of the probes, on the solver's grid.
      collisions: futures resampled per frame.
      videos: generated, and real, per measurement.
      inits: initialisations to train; ahead: look-aheads of the dose-response.
      forcing: also teacher against diffusion forcing.
      dmd: initialisations to go on with, measured at these iterations of `dmd_at`.
      budget: training.
    """

    seeds: int = 5
    frames: int = 5
    pasts: int = 24
    futures: int = 1000
    futures_seed: int = 1
    levels: tuple[float, ...] = (1.0, 0.625)
    collisions: int = 48
    videos: int = 3000
    inits: tuple[str, ...] = tuple(INITS)
    ahead: tuple[int, ...] = (1, 2, 3)
    forcing: bool = True
    dmd: tuple[str, ...] = ()
    dmd_at: tuple[int, ...] = (250, 1000, 4000)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        least = {"seeds": 0, "frames": 2, "pasts": 1, "futures": 10, "futures_seed": 0, "collisions": 0, "videos": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"study: {name}={getattr(self, name)} must be {low} or more")
        if unknown := sorted({*self.inits, *self.dmd} - set(INITS)):
            raise UserError(f"study: unknown initialisations {unknown}; use some of {', '.join(INITS)}")
        if not set(self.dmd) <= set(self.inits):
            raise UserError(f"study: dmd={self.dmd} goes on from initialisations; name them in inits too")
        if not self.levels:
            raise UserError(f"study: levels={self.levels} must name one at least, such as (1.0,)")
        if off := [s for s in self.levels if not 0.0 < s <= 1.0 or abs(s * STEPS - round(s * STEPS)) > 1e-6]:
            raise UserError(f"study: levels {off} must lie in (0, 1], in multiples of 1/{STEPS}")
        cycle = dmd_stage().cadence["student"]
        ascending = list(self.dmd_at) == sorted(set(self.dmd_at)) and min(self.dmd_at, default=0) > 0
        if self.dmd and (not ascending or any(n % cycle for n in self.dmd_at)):
            raise UserError(f"study: dmd_at={self.dmd_at} must name iterations, ascending, in multiples of {cycle}")
        if any(not 1 <= k < self.frames for k in self.ahead):
            raise UserError(f"study: ahead={self.ahead} must lie between 1 and frames - 1 = {self.frames - 1}")


def linear_part() -> dict[str, Any]:
    """The closed-form results: ambiguity by frame and level, and rollouts by correlation, length, look-ahead, CD."""
    law = LinearGaussian()

    def rollout(law: LinearGaussian, rows_at: Callable[[float], linear.Rows]) -> dict[str, float]:
        rows = [rows_at(s) for s in SIGMAS]
        covariance = linear.rollout_covariance(rows, SIGMAS)
        truth = law.mixture().covariance_FF
        return {"w2": linear.wasserstein(covariance, truth), "spread": linear.spread(covariance, law)}

    def consistency(teacher: str, steps: int) -> float:
        grid = np.append(sigma_table(steps, SAMPLER.shift).astype(float), 0.0)
        rows = linear.consistency_rows(law, list(grid), teacher)
        picked = [rows[int(np.argmin(np.abs(grid - s)))] for s in SIGMAS]
        return linear.rollout_w2(law, picked, SIGMAS)

    correlations, lengths, levels = (0.0, 0.5, 0.9, 0.99), (1, 2, 3, 5, 9, 21, 81), (48, 192, 768)
    laws = {a: LinearGaussian(a=a) for a in correlations}
    return {
        "ambiguity": {str(s): linear.ambiguity(law, s).tolist() for s in SIGMAS},
        "innovation": linear.innovation(law).tolist(),
        "by_correlation": {
            str(a): {
                "ambiguity": linear.ambiguity(of, 1.0).tolist(),
                "bidirectional": rollout(of, partial(linear.bidirectional_rows, of)),
                "causal": rollout(of, partial(linear.ahead_rows, of, ahead=0)),
            }
            for a, of in laws.items()
        },
        "first_frame_by_length": {str(n): float(linear.ambiguity(LinearGaussian(n), 1.0)[0]) for n in lengths},
        "by_ahead": {str(k): rollout(law, partial(linear.ahead_rows, law, ahead=k)) for k in range(law.frames)},
        "consistency": {
            teacher: {str(n): consistency(teacher, n) for n in levels} for teacher in ("causal", "clean_past", "joint")
        },
    }


@lru_cache(maxsize=4)
def _probes(plan: Plan, teacher: str) -> list[Probe]:
    frames = tuple(range(plan.frames))
    return probes(Walk(plan.frames), teacher, plan.pasts, plan.futures, plan.futures_seed, plan.levels, frames)


def truth_part(plan: Plan) -> dict[str, Any]:
    """Ambiguity of the walk by teacher, frame and level, with the solver's error."""
    rows = [
        {"teacher": teacher, "frame": p.frame + 1, "sigma": p.sigma, **facts(p, ar)}
        for teacher in TEACHERS
        for p, ar in zip(_probes(plan, teacher), _probes(plan, "causal"), strict=True)
    ]
    errors = {str(n): round_trip(Walk(plan.frames), 500, 0, n) for n in (STEPS, 2 * STEPS)}
    return {"rows": rows, "round_trip": errors, "rk4_steps": STEPS}


def collision_part(plan: Plan) -> dict[str, Any]:
    """One collision per frame."""
    found = [collide(Walk(plan.frames), frame, plan.collisions, plan.futures_seed + 2) for frame in range(plan.frames)]
    return {"rows": [{**asdict(c), "frame": c.frame + 1, "ends": c.ends.tolist()} for c in found]}


def flow_error(student: Any, law: Walk, seed: int, count: int, sigma: float = 0.625) -> float:
    """Mean square of a network's flow against the exact AR velocity, given the clean past."""
    rng = np.random.default_rng(REAL_SEED + seed)
    clean = jnp.asarray(sample(law, rng, count), jnp.float32)[:, :, None, None, None]
    noise = jnp.asarray(rng.standard_normal(clean.shape), jnp.float32)
    sigma_BF = jnp.full(clean.shape[:2], sigma)
    noisy = add_noise(clean, noise, sigma_BF)
    teacher: Any = Exact(law)

    @jax.jit
    def error(student: Any) -> jax.Array:
        text_kv = embed_text(student, jnp.zeros((count, 1, 1)))
        got, exact = (teacher_forced(m, noisy, sigma_BF, clean, text_kv, FRAMEWISE) for m in (student, teacher))
        return jnp.mean(jnp.square(got - exact))

    return float(error(student))


def seed_part(plan: Plan, seed: int, log: Callable[[str], None]) -> dict[str, Any]:
    """One seed: every initialisation's rollout, where the ODE students settled, the dose-response, both forcings."""
    law, budget = Walk(plan.frames), plan.budget
    pool = data_pool(law, seed, budget.pool)
    real, other = (sample(law, np.random.default_rng(REAL_SEED + 2 * seed + k), plan.videos) for k in range(2))
    ar = train_ar(law, budget, seed, pool)
    out: dict[str, Any] = {"quality": {"real": measure(other, real, law)}, "settling": [], "dmd": {}}
    students: dict[str, Any] = {}
    for init in (*plan.inits, *(f"ahead_{k}" for k in plan.ahead)):
        log(f"seed {seed}: {init}")
        students[init] = train_init(law, init, budget, seed, pool, ar)
        out["quality"][init] = measure(self_rollout(students[init], seed, plan.videos), real, law)
        for probe in _probes(plan, TEACHER_OF[init]) if init in TEACHER_OF else ():
            row = {"init": init, "frame": probe.frame + 1, "sigma": probe.sigma, **settling(students[init], probe)}
            out["settling"].append(row)
    if plan.forcing:
        log(f"seed {seed}: diffusion forcing")
        df = train_ar(law, budget, seed, pool, "df")
        out["flow_error"] = {"teacher": flow_error(ar, law, seed, 4096), "diffusion": flow_error(df, law, seed, 4096)}
    if plan.dmd:
        critic = train_critic(law, budget, seed, pool)
        for init in plan.dmd:
            log(f"seed {seed}: DMD from {init}")
            out["dmd"][init] = distilled(plan, seed, students[init], critic, pool, real)
    return out


def distilled(
    plan: Plan, seed: int, student: Any, critic: Any, pool: Mapping[str, jax.Array], real: np.ndarray
) -> dict[str, dict[str, float]]:
    """DMD from one student: measures by iteration; the critic starts on the data, the real score is exact."""
    law, done, out = Walk(plan.frames), 0, {}
    frozen = {"real_score": Exact(law)}
    state = None
    for until in plan.dmd_at:
        stage = dmd_trainer(plan.budget, until - done)
        state = state or stage.start({"student": student, "critic": critic}, seed)
        state, done = stage.run(state, frozen, dict(pool)), until
        out[str(until)] = measure(self_rollout(state.params["student"], seed, plan.videos), real, law)
    return out


def run(plan: Plan, workdir: Path, log: Callable[[str], None], made: Mapping[str, str]) -> dict[str, Any]:
    """All parts, each written to `workdir`/parts when done and not computed again.

    Args:
      made: commit and versions, kept with each part that is computed now.

    Raises:
      UserError: the workdir holds parts of another plan.
    """
    folder = workdir / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    record, asked = folder / "plan.json", json.loads(json.dumps({"format": FORMAT, **asdict(plan)}))
    if (before := read_if_whole(record)) is not None and {**before, "seeds": plan.seeds} != asked:
        raise UserError(
            f"{folder} holds a study of other settings or of another version; choose another --workdir, or remove it"
        )
    write_atomically(record, json.dumps(asked, indent=1))

    def part(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = folder / f"{name}.json"
        if (found := read_if_whole(file)) is None:
            log(name)
            write_atomically(file, json.dumps({"made": dict(made), **make()}, indent=1))
            found = read_if_whole(file)
        return found

    out = {
        "linear": part("linear", linear_part),
        "collisions": part("collisions", lambda: collision_part(plan)),
        "truth": part("truth", lambda: truth_part(plan)),
    }
    seeds = [part(f"seed{seed}", partial(seed_part, plan, seed, log)) for seed in range(plan.seeds)]
    return {"plan": asked, **out, "seeds": seeds}
