"""Stage 2a: causal ODE pairs from the AR teacher, and their regression (paper section 3.2).

Reference: `get_causal_ode_data_chunkwise.py`, and `model/ode_regression.py`, `ODERegression`.

The teacher's PF-ODE is solved block by block *given the clean past*, so that (noisy block, clean past) -> clean block
is a function: the student can learn it (paper definition 3.1 and equation 4, frame-level injectivity). With a
bidirectional teacher the same pairs would depend on unseen future noise (lemma 3.2), and regression would return their
mean (proposition 3.3). Pairs are made by one full-sequence pass per network call
(`method="full"`), or block by block against a KV cache (`method="cached"`); both are the same mathematics.
`method="bidirectional"` makes that baseline's pairs (CausVid, Self Forcing); `Regression` is how pairs are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.guidance import doubled, guided
from cfjax.flow.path import x0_from_flow
from cfjax.flow.schedule import check_steps, sigma_table, warp_steps
from cfjax.flow.solvers import euler
from cfjax.models.cache import KVCache
from cfjax.models.context import clean_context
from cfjax.models.wan import KV, Wan, embed_text, replay, teacher_forced
from cfjax.nn.visibility import Blocks, Visibility
from cfjax.objectives.diffusion import per_block
from cfjax.objectives.stage import Batch, Loss, Models
from cfjax.rollout.blocks import commit_block, denoise_block, empty_cache, scan_blocks
from cfjax.rollout.generate import both_prompts


@dataclass(frozen=True)
class PairsConfig:
    """How ODE pairs are made.

    Attributes:
      steps: integer timesteps of the student, descending; the trajectory is stored at these levels.
      solver_steps: Euler steps from pure noise to 0; their table must contain the student's levels.
      shift: timestep shift of both tables.
      guidance: scale in the sampling convention (the reference: 6 for pairs, 3 for sampling, quirk Q8).
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    solver_steps: int = 48
    shift: float = 5.0
    guidance: float = 6.0

    def __post_init__(self) -> None:
        check_steps("objective.steps", self.steps)

    def sigmas(self) -> np.ndarray:
        """The student's levels."""
        return warp_steps(self.steps, self.shift)

    def grid(self) -> np.ndarray:
        """The solver's levels, [solver_steps + 1] with the final 0."""
        return np.append(sigma_table(self.solver_steps, self.shift), np.float32(0.0))

    def kept(self) -> tuple[int, ...]:
        """Indices of the student's levels in the solver's grid.

        Raises:
          UserError: a level is not on the grid.
        """
        grid = self.grid()
        indices = [int(np.argmin(np.abs(grid - s))) for s in self.sigmas()]
        off = [t for t, i, s in zip(self.steps, indices, self.sigmas(), strict=True) if abs(grid[i] - s) > 1e-4]
        if off:
            grid_of = f"objective.solver_steps={self.solver_steps}"
            raise UserError(f"objective.steps: {off} are not on the grid of {grid_of}; change either")
        return tuple(indices)


METHODS = ("full", "cached", "bidirectional")
# Whose pairs a regression is for, by the past that it shows the student (see `Regression`): with the clean clip the AR
# teacher's, which were solved given it; with the others the bidirectional teacher's, which knew no clean past.
METHODS_FOR = {"clip": ("full", "cached"), "endpoint": ("bidirectional",), "noisy": ("bidirectional",)}


def ode_pairs(
    model: Wan,
    clean_BFHWC: jax.Array,
    text_BSE: jax.Array,
    negative_BSE: jax.Array,
    noise_BFHWC: jax.Array,
    config: PairsConfig,
    blocks: Blocks,
    *,
    method: str = "full",
) -> jax.Array:
    """The AR teacher's trajectories given the clean past: [B, J + 1, F, H, W, C], the student's levels, then the end.

    Each guidance branch conditions both halves on its own prompt. With method "bidirectional" the model is a
    bidirectional teacher: all frames are solved together from their noise and `clean` is not used.

    Raises:
      UserError: an unknown method.
    """
    if method not in METHODS:
        raise UserError(f"objective.method={method!r}: use one of {', '.join(METHODS)}")
    text_kv = both_prompts(embed_text(model, text_BSE), embed_text(model, negative_BSE))
    solve = {"full": _solve_full, "cached": _solve_cached, "bidirectional": _solve_bidirectional}[method]
    trajectory = solve(model, clean_BFHWC, text_kv, noise_BFHWC, config, blocks)  # [B, F, N + 1, H, W, C]
    keep = jnp.asarray([*config.kept(), config.solver_steps])
    return jnp.moveaxis(trajectory[:, :, keep], 2, 1)


def _solve_full(
    model: Wan, clean: jax.Array, text_kv: KV, noise: jax.Array, config: PairsConfig, blocks: Blocks
) -> jax.Array:
    # The clean half does not depend on the noise: its keys are computed once, not 2 x 48 times as in the reference.
    context = clean_context(model, doubled(clean), text_kv, blocks)

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        flow = lambda x: replay(model, x, jnp.broadcast_to(sigma, x.shape[:2]), text_kv, context, blocks)
        return guided(flow, x, config.guidance)

    return _euler_states(velocity, noise, config)


def _solve_bidirectional(
    model: Wan, clean: jax.Array, text_kv: KV, noise: jax.Array, config: PairsConfig, blocks: Blocks
) -> jax.Array:
    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        flow = lambda x: model(x, jnp.broadcast_to(sigma, x.shape[:2]), text_kv)
        return guided(flow, x, config.guidance)

    return _euler_states(velocity, noise, config)


def _solve_cached(
    model: Wan, clean: jax.Array, text_kv: KV, noise: jax.Array, config: PairsConfig, blocks: Blocks
) -> jax.Array:
    cache = empty_cache(model.config, (2 * clean.shape[0], *clean.shape[1:]), blocks)  # both prompts' side by side

    def block(cache: KVCache, start: jax.Array, inputs: Any) -> tuple[KVCache, jax.Array]:
        (x, clean_block), _ = inputs

        def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
            flow = lambda x: denoise_block(model, x, sigma, text_kv, cache, start, blocks)
            return guided(flow, x, config.guidance)

        states = _euler_states(velocity, x, config)
        return commit_block(model, doubled(clean_block), text_kv, cache, start, blocks), states

    return scan_blocks(block, cache, (noise, clean), None, clean.shape[1], blocks)[1]


def _euler_states(velocity: Any, noise: jax.Array, config: PairsConfig) -> jax.Array:
    """States before every step and the end point, [B, F, N + 1, H, W, C]."""
    return jnp.moveaxis(euler(velocity, noise, config.grid(), trajectory=True)[1], 0, 2)


def draw(
    key: jax.Array, shape: tuple[int, ...], levels: int, blocks: Blocks, per: str = "clip"
) -> dict[str, jax.Array]:
    """level_BF ~ U{0..levels - 1} for shape [B, F]: one per clip (the reference, quirk Q9), or one per block."""
    if per == "block":
        return {"level_BF": per_block(jax.random.randint(key, shape, 0, levels), blocks)}
    return {"level_BF": jnp.broadcast_to(jax.random.randint(key, (shape[0], 1), 0, levels), shape)}


@dataclass(frozen=True)
class Regression:
    """How the student is trained on the pairs; the default is the paper's causal ODE initialisation.

    Attributes:
      levels_per: "clip" (the reference, quirk Q9) or "block" (Self Forcing, CausVid).
      past: what a block sees of the earlier ones: "clip", the clean clip that the AR teacher was given; "endpoint", the
        trajectory's own end (the only clean past that a bidirectional teacher's pairs have); "noisy", the earlier
        blocks at their own levels, as in diffusion forcing (Self Forcing, CausVid).
    """

    levels_per: str = "clip"
    past: str = "clip"

    def __post_init__(self) -> None:
        if self.levels_per not in ("clip", "block"):
            raise UserError(f"objective.levels_per={self.levels_per!r}: use clip or block")
        if self.past not in METHODS_FOR:
            raise UserError(f"objective.past={self.past!r}: use one of {', '.join(METHODS_FOR)}")


def ode_regression(
    config: PairsConfig, blocks: Blocks, role: str = "student", *, how: Regression | None = None
) -> Loss:
    """L = E_k |x_k - sigma_k v(x_k, sigma_k; clean past) - x_end|^2, a plain mean square.

    The batch holds `trajectory_BJFHWC` from `ode_pairs` and `latents_BFHWC`, the clean past. Injectable: level_BF.
    """
    how = how or Regression()

    def loss(models: Models, batch: Batch, key: jax.Array, draws: Mapping[str, jax.Array] | None = None):
        trajectory = batch["trajectory_BJFHWC"].astype(jnp.float32)
        clean = batch["latents_BFHWC"].astype(jnp.float32)
        sigmas = jnp.asarray(config.sigmas())
        if draws is None:
            draws = draw(key, clean.shape[:2], len(config.steps), blocks, how.levels_per)
        level_BF = draws["level_BF"]
        states_BFJ = jnp.moveaxis(trajectory, 1, 2)
        x = jnp.take_along_axis(states_BFJ, level_BF[:, :, None, None, None, None], axis=2)[:, :, 0]
        model = models[role]
        sigma_BF = sigmas[level_BF]
        text_kv = embed_text(model, batch["text_BSE"])
        if how.past == "noisy":
            v = model(x, sigma_BF, text_kv, Visibility("block_causal", blocks))
        else:
            past = clean if how.past == "clip" else trajectory[:, -1]
            v = teacher_forced(model, x, sigma_BF, past, text_kv, blocks)
        error = jnp.mean(jnp.square(x0_from_flow(v, x, sigma_BF) - trajectory[:, -1]), axis=(2, 3, 4))
        at_noise = level_BF == 0
        return jnp.mean(error), {"error_from_noise": jnp.sum(error * at_noise) / jnp.maximum(jnp.sum(at_noise), 1)}

    return loss
