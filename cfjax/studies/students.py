"""Toy students of every teacher, trained by the library's own losses and updates, one seed at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.models.wan import embed_text
from cfjax.objectives.consistency import ConsistencyConfig, consistency
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, flow_matching
from cfjax.objectives.dmd import DMDConfig, critic_loss, generator_loss
from cfjax.objectives.ode_regression import PairsConfig, Regression, ode_pairs, ode_regression
from cfjax.objectives.stage import Ema, Stage
from cfjax.rollout.generate import FewStep, generate_few_step
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.studies.laws import Law, sample
from cfjax.studies.toys import FRAMEWISE, Critic, Exact, Student, ToyConfig, windows
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import TrainState, advance, init_state
from cfjax.training.step import has_batch_axis, make_update, role_key

# What a student starts from before DMD, and by which teacher; `ahead_K` also names a teacher that sees K future frames.
INITS = {
    "causal_ode": "ODE regression, AR teacher",
    "bi_ode": "ODE regression, bidirectional teacher",
    "bi_ode_cp": "ODE regression, bidirectional teacher given the clean past",
    "causal_cd": "consistency distillation, AR teacher",
    "asym_cd_cp": "consistency distillation, bidirectional teacher given the clean past",
    "asym_cd": "consistency distillation, bidirectional teacher",
    "ar_diff": "none: the AR diffusion network itself",
}
SAMPLER = FewStep()
PAIRS_AT_ONCE = 4096
Pool = dict[str, jax.Array]


@dataclass(frozen=True)
class Budget:
    """Training budget, the same for every student.

    Attributes:
      ar_steps, ode_steps, cd_steps: updates of each stage; `ar_steps` also of DMD's critic before it meets a student.
      batch, pool: videos per update, and different videos (and pairs) in all.
      lr, dmd_lr: peak learning rates; cosine, DMD's constant.
      solver_steps: Euler steps of the ODE pairs.
      cd_levels: N of consistency distillation.
      width: of the networks' hidden layers.
    """

    ar_steps: int = 2500
    ode_steps: int = 2500
    cd_steps: int = 4000
    batch: int = 256
    pool: int = 65536
    lr: float = 5e-3
    dmd_lr: float = 2e-4
    solver_steps: int = 384
    cd_levels: int = 48
    width: int = 96


def _video(x_BF: Any) -> jax.Array:
    return jnp.asarray(x_BF, jnp.float32)[:, :, None, None, None]


def data_pool(law: Law, seed: int, count: int) -> Pool:
    """Clean videos, and text rows, which toy networks ignore."""
    clean = _video(sample(law, np.random.default_rng(seed), count))
    return {"latents_BFHWC": clean, "text_BSE": jnp.zeros((count, 1, 1)), "negative_text_SE": jnp.zeros((1, 1))}


def _pairs_config(budget: Budget) -> PairsConfig:
    return PairsConfig(solver_steps=budget.solver_steps, guidance=1.0)


@lru_cache(maxsize=32)
def _solve(teacher: Any, config: PairsConfig, method: str) -> Any:
    def solve(clean: jax.Array, noise_BF: jax.Array) -> jax.Array:
        text = jnp.zeros((clean.shape[0], 1, 1))
        noise = windows(noise_BF, teacher.ahead)
        return ode_pairs(teacher, clean, text, text, noise, config, FRAMEWISE, method=method)[..., :1]

    return jax.jit(solve)


def pair_pool(law: Law, init: str, budget: Budget, seed: int, pool: Pool) -> Pool:
    """The pool with `trajectory_BJFHWC`: the pairs of one ODE initialisation's teacher for its videos."""
    teacher = Exact(law, look_ahead(init, law))
    solve = _solve(teacher, _pairs_config(budget), "bidirectional" if init == "bi_ode" else "full")
    clean = pool["latents_BFHWC"]
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 7), clean.shape[:2])
    parts = [
        np.asarray(solve(clean[at : at + PAIRS_AT_ONCE], noise[at : at + PAIRS_AT_ONCE]))
        for at in range(0, len(clean), PAIRS_AT_ONCE)
    ]
    return {**pool, "trajectory_BJFHWC": jnp.asarray(np.concatenate(parts))}


def look_ahead(init: str, law: Law) -> int:
    """How many noisy future frames the clean-past teacher of an initialisation sees."""
    if init.startswith("ahead_"):
        return int(init.removeprefix("ahead_"))
    return law.frames - 1 if init.endswith("_cp") else 0


def ar_stage(forcing: str = "teacher") -> Stage:
    """Stage 1, from noise: teacher or diffusion forcing."""
    return Stage(
        "ar_diffusion", {"student": ar_diffusion(DiffusionConfig(weighting="uniform", forcing=forcing), FRAMEWISE)}
    )


def init_stage(init: str, budget: Budget) -> Stage:
    """Stage 2 of one initialisation.

    Raises:
      UserError: an unknown one, or `ar_diff`, which has no stage 2.
    """
    if init == "bi_ode" or "_ode" in init or init.startswith("ahead_"):
        how = Regression(past="endpoint" if init == "bi_ode" else "clip")
        return Stage("ode_regression", {"student": ode_regression(_pairs_config(budget), FRAMEWISE, how=how)})
    if init not in INITS or init == "ar_diff":
        raise UserError(f"init {init!r}: use one of {', '.join(INITS)} or ahead_K")
    teacher = "bidirectional" if init == "asym_cd" else "causal"
    config = ConsistencyConfig(budget.cd_levels, guidance=1.0, teacher=teacher, boundary=True)
    # No averaging: with 48 levels and some thousand updates a slow average does not carry the end point back to noise.
    return Stage("consistency", {"student": consistency(config, FRAMEWISE)}, ema={"student": Ema(decay=0.0)})


def dmd_stage() -> Stage:
    """Stage 3 with self-rollout: a random exit step, a detached past, five critic updates to one of the student."""
    config = DMDConfig(SelfForcing(tuple(map(float, SAMPLER.sigmas()))), real_guidance=0.0)
    losses = {"student": generator_loss(config, FRAMEWISE), "critic": critic_loss(config, FRAMEWISE)}
    return Stage("dmd", losses, cadence={"student": 5})


class Trainer:
    """One stage compiled once, for any number of seeds: the library's updates in a scan."""

    def __init__(self, stage: Stage, *, steps: int, batch: int, lr: float, schedule: str = "cosine"):
        self.stage = stage
        config = OptimizerConfig(lr=lr, schedule=schedule, b2=0.99)
        self.txs = {role: make_optimizer(config, steps=steps) for role in stage.losses}
        updates = {role: make_update(stage, role, self.txs[role]) for role in stage.losses}
        cycle = max([1, *stage.cadence.values()])

        def rows(state: TrainState, role: str, pool: Pool) -> Pool:
            count = pool["latents_BFHWC"].shape[0]
            chosen = jax.random.randint(jax.random.fold_in(role_key(state, role), 1), (batch,), 0, count)
            return {name: leaf[chosen] if has_batch_axis(name) else leaf for name, leaf in pool.items()}

        @jax.jit
        def run(state: TrainState, frozen: Mapping[str, Any], pool: Pool) -> TrainState:
            def body(state: TrainState, _: None) -> tuple[TrainState, None]:
                for iteration in range(cycle):
                    for role in stage.roles_at(iteration):
                        state, _metrics = updates[role](state, frozen, rows(state, role, pool))
                    state = advance(state)
                return state, None

            return jax.lax.scan(body, state, None, length=steps // cycle)[0]

        self._run = run

    def start(self, models: Mapping[str, Any], seed: int) -> TrainState:
        """A state at step 0."""
        return init_state(self.stage, models, self.txs, seed)

    def run(self, state: TrainState, frozen: Mapping[str, Any], pool: Pool) -> TrainState:
        """`steps` more iterations."""
        return self._run(state, frozen, pool)

    def fit(self, models: Mapping[str, Any], frozen: Mapping[str, Any], pool: Pool, seed: int) -> dict[str, Any]:
        """The trained roles."""
        return self.run(self.start(models, seed), frozen, pool).params


@lru_cache(maxsize=64)
def trainer(init: str, budget: Budget) -> Trainer:
    """The compiled stage of an initialisation; "ar" and "df" are stage 1 by teacher and by diffusion forcing."""
    if init in ("ar", "df"):
        stage, steps = ar_stage("teacher" if init == "ar" else "diffusion"), budget.ar_steps
    else:
        stage = init_stage(init, budget)
        steps = budget.cd_steps if stage.name == "consistency" else budget.ode_steps
    return Trainer(stage, steps=steps, batch=budget.batch, lr=budget.lr)


def train_ar(law: Law, budget: Budget, seed: int, pool: Pool, forcing: str = "ar") -> Student:
    """Stage 1 from a random network."""
    fresh = Student(ToyConfig(law.frames, budget.width), jax.random.key(seed))
    return trainer(forcing, budget).fit({"student": fresh}, {}, pool, seed)["student"]


def train_init(law: Law, init: str, budget: Budget, seed: int, pool: Pool, ar: Student) -> Student:
    """Stage 2 from the AR network, by one teacher."""
    if init == "ar_diff":
        return ar
    stage = trainer(init, budget)
    if stage.stage.name == "ode_regression":
        return stage.fit({"student": ar}, {}, pair_pool(law, init, budget, seed, pool), seed)["student"]
    teacher = Exact(law, look_ahead(init, law))
    return stage.fit({"student": ar}, {"teacher": teacher}, pool, seed)["student"]


@lru_cache(maxsize=8)
def _critic_trainer(budget: Budget) -> Trainer:
    stage = Stage("bidirectional", {"critic": flow_matching(DiffusionConfig(weighting="uniform"), role="critic")})
    return Trainer(stage, steps=budget.ar_steps, batch=budget.batch, lr=budget.lr)


def train_critic(law: Law, budget: Budget, seed: int, pool: Pool) -> Critic:
    """A bidirectional network on the data: where the fake score starts."""
    fresh = Critic(ToyConfig(law.frames, budget.width), jax.random.key(seed + 1000))
    return _critic_trainer(budget).fit({"critic": fresh}, {}, pool, seed)["critic"]


@lru_cache(maxsize=8)
def dmd_trainer(budget: Budget, steps: int) -> Trainer:
    """Stage 3, `steps` iterations at a time."""
    return Trainer(dmd_stage(), steps=steps, batch=budget.batch, lr=budget.dmd_lr, schedule="constant")


@jax.jit
def _generate(student: Any, noise: jax.Array, key: jax.Array) -> jax.Array:
    text_kv = embed_text(student, jnp.zeros((noise.shape[0], 1, 1)))
    return generate_few_step(student, noise, text_kv, key, SAMPLER, FRAMEWISE)


def self_rollout(student: Student, seed: int, count: int) -> np.ndarray:
    """`count` videos [count, F] by the few-step sampler, the student's own past behind it."""
    key_noise, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 99))
    noise = jax.random.normal(key_noise, (count, student.config.frames, 1, 1, 1))
    return np.asarray(_generate(student, noise, key))[:, :, 0, 0, 0].astype(float)
