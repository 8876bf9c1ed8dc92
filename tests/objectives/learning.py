"""Learning on Gaussian clips: a tiny network, data whose optimum is known in closed form, a loop compiled once.

Clips hold two frames of 2 x 2 x 1 latents, one token per frame, every number N(mean, STD^2). They are independent
("fresh"), or the second frame repeats the first ("copied").
"""

from collections.abc import Callable, Mapping
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.flow.path import add_noise
from cfjax.flow.schedule import sigma_table
from cfjax.models.wan import Wan, WanConfig, make_wan
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, flow_matching
from cfjax.objectives.stage import Batch, Stage
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import TrainState, advance, init_state
from cfjax.training.step import make_update

CONFIG = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_dim=1, out_dim=1, text_dim=4, freq_dim=32)
FRAMEWISE = Blocks(1)
STD = 0.5
REAL_MEAN, STUDENT_MEAN = 1.0, -1.0
TABLE = sigma_table(1000, 5.0)
UNIFORM = DiffusionConfig(weighting="uniform")


def fresh(key: jax.Array, count: int, mean: float) -> jax.Array:
    """latents_BFHWC of independent frames."""
    return mean + STD * jax.random.normal(key, (count, 2, 2, 2, 1))


def copied(key: jax.Array, count: int, mean: float) -> jax.Array:
    """latents_BFHWC whose second frame repeats the first."""
    return jnp.repeat(fresh(key, count, mean)[:, :1], 2, axis=1)


def batch_of(latents: jax.Array, **more: jax.Array) -> dict[str, jax.Array]:
    """A batch with empty text."""
    text = jnp.zeros((len(latents), 1, CONFIG.text_dim))
    return {"latents_BFHWC": latents, "text_BSE": text, "negative_text_SE": text[0], **more}


def learn(
    stage: Stage,
    models: Mapping[str, Wan],
    make_batch: Callable[[jax.Array], Batch],
    steps: int,
    *,
    frozen: Mapping[str, Wan] | None = None,
    lr: float = 0.005,
    b1: float = 0.9,
) -> TrainState:
    """`steps` iterations of the library's own updates, cadence and all, as one program."""
    txs = {
        role: make_optimizer(
            OptimizerConfig(lr=lr, schedule="wsd", warmup=10, decay_fraction=0.5, b1=b1, b2=0.99), steps=steps
        )
        for role in stage.losses
    }
    updates = {role: make_update(stage, role, txs[role]) for role in stage.losses}

    @jax.jit
    def run(state: TrainState, frozen: Mapping[str, Wan]) -> TrainState:
        def iteration(state: TrainState, key: jax.Array) -> tuple[TrainState, None]:
            for place, (role, update) in enumerate(updates.items()):
                batch = make_batch(jax.random.fold_in(key, place))
                due = state.step % stage.cadence.get(role, 1) == 0
                state = jax.lax.cond(due, lambda s, u=update, b=batch: u(s, frozen, b)[0], lambda s: s, state)
            return advance(state), None

        return jax.lax.scan(iteration, state, jax.random.split(jax.random.key(1), steps))[0]

    return run(init_state(stage, models, txs, 0), dict(frozen or {}))


@cache
def bidirectional() -> Wan:
    """A bidirectional network of fresh clips around REAL_MEAN."""
    stage = Stage("bidirectional", {"student": flow_matching(UNIFORM)})
    models = {"student": make_wan(CONFIG, jax.random.key(0))}
    return learn(stage, models, lambda key: batch_of(fresh(key, 128, REAL_MEAN)), 400).params["student"]


@cache
def causal() -> Wan:
    """An AR diffusion network of copied clips around STUDENT_MEAN, frame by frame."""
    stage = Stage("ar_diffusion", {"student": ar_diffusion(UNIFORM, FRAMEWISE)})
    models = {"student": make_wan(CONFIG, jax.random.key(0))}
    return learn(stage, models, lambda key: batch_of(copied(key, 128, STUDENT_MEAN)), 400).params["student"]


def examination(make: Callable[..., jax.Array], mean: float) -> tuple[jax.Array, ...]:
    """(x_sigma, sigma_BF, x0, v) of 4000 unseen clips, every level of the table four times."""
    x0 = make(jax.random.key(7), 4000, mean)
    eps = jax.random.normal(jax.random.key(8), x0.shape)
    sigma_BF = jnp.broadcast_to(jnp.asarray(np.tile(TABLE, 4))[:, None], x0.shape[:2])
    return add_noise(x0, eps, sigma_BF), sigma_BF, x0, eps - x0


def gaussian_floor() -> float:
    """The least error of any predictor of v = eps - x0 from x_sigma alone, averaged over the table.

    (x0, eps) -> (x_sigma, v) has determinant 1, so Var(v | x_sigma) = STD^2 / Var(x_sigma).
    """
    return float(np.mean(STD**2 / ((1 - TABLE) ** 2 * STD**2 + TABLE**2)))
