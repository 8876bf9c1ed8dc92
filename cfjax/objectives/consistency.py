"""Stage 2b: causal consistency distillation from the AR teacher (paper section 3.3; arXiv 2605.15141).

No ODE pairs: one guided Euler step of the AR teacher, given the clean past, links two neighbouring noise levels, and
the student's prediction at the noisier one regresses the prediction of its EMA at the cleaner one (consistency models,
arXiv 2303.01469; reference: `model/naive_consistency.py`, `NaiveConsistency.generator_loss`). As in stage 2a the map
(noisy block, clean past) -> clean block is single-valued.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from cfjax.core.errors import UserError
from cfjax.flow.guidance import guided
from cfjax.flow.path import add_noise, expand, x0_from_flow
from cfjax.flow.schedule import gap_bf16, lookup, round_timestep_bf16, sigma_table
from cfjax.models.wan import Wan, embed_text, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.objectives.stage import Batch, Loss, Models
from cfjax.rollout.generate import both_prompts

Draws = Mapping[str, jax.Array]


@dataclass(frozen=True)
class ConsistencyConfig:
    """Stage 2b's choices.

    Attributes:
      solver_steps: N, the levels of the discretised path (48); `shift` is their timestep shift.
      guidance: the teacher's scale in the sampling convention (the reference: 3 here, 6 for ODE pairs, quirk Q8).
      teacher: "causal", the AR teacher given the clean past; "bidirectional", one that sees the whole noisy clip: the
        paper's asymmetric baseline (its Figure 10), whose averaged velocity is not the causal one.
      boundary: also train the last interval, whose target is the teacher's own end point. The reference draws
        n <= N - 2 and so never does (quirk Q23): it relies on the initialisation there.
      bf16_timesteps: round the conditioning timesteps to bfloat16, convert flows with the nearest level of the
        1000-entry table, and form the step size from the rounded timesteps (quirk Q2).
    """

    solver_steps: int = 48
    shift: float = 5.0
    guidance: float = 3.0
    teacher: str = "causal"
    boundary: bool = False
    bf16_timesteps: bool = False

    def __post_init__(self) -> None:
        if self.teacher not in ("causal", "bidirectional"):
            raise UserError(f"objective.teacher={self.teacher!r}: use causal or bidirectional")
        if self.solver_steps < 2:
            raise UserError(f"objective.solver_steps={self.solver_steps}: consistency links two levels; use 2 or more")

    def levels(self) -> np.ndarray:
        """Sigmas, descending, [N + 1]: the table and the final 0."""
        return np.append(sigma_table(self.solver_steps, self.shift), np.float32(0.0))


def draw(key: jax.Array, shape: tuple[int, ...], config: ConsistencyConfig) -> dict[str, jax.Array]:
    """Random numbers of one loss: level_B ~ U{0..N - 2} (N - 1 with `boundary`), shared by a clip's frames; eps_BFHWC.

    The reference draws one level for the whole batch of a process, of batch size 1.
    """
    key_level, key_eps = jax.random.split(key)
    intervals = config.solver_steps - (0 if config.boundary else 1)
    return {
        "level_B": jax.random.randint(key_level, shape[:1], 0, intervals),
        "eps_BFHWC": jax.random.normal(key_eps, shape, jnp.float32),
    }


def _conditioning_sigma(config: ConsistencyConfig, sigma_BF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the level that the networks are conditioned on, the level that converts their flow to x0)."""
    if not config.bf16_timesteps:
        return sigma_BF, sigma_BF
    conditioning_sigma = round_timestep_bf16(sigma_BF)
    return conditioning_sigma, lookup(sigma_table(1000, config.shift), conditioning_sigma)


def _teacher_step(
    teacher: Wan,
    x: jax.Array,
    conditioning_sigma_BF: jax.Array,
    gap_BF: jax.Array,
    batch: Batch,
    config: ConsistencyConfig,
    blocks: Blocks,
) -> jax.Array:
    """x_sigma' = x_sigma - (sigma - sigma') v with the guided flow; each branch has both halves on its own prompt."""
    negative = jnp.broadcast_to(batch["negative_text_SE"][None], batch["text_BSE"].shape)
    text_kv = both_prompts(embed_text(teacher, batch["text_BSE"]), embed_text(teacher, negative))
    if config.teacher == "bidirectional":
        v = guided(lambda a: teacher(*a, text_kv), (x, conditioning_sigma_BF), config.guidance)
    else:
        clean = batch["latents_BFHWC"].astype(jnp.float32)
        flow = lambda a: teacher_forced(teacher, a[0], a[1], a[2], text_kv, blocks)
        v = guided(flow, (x, conditioning_sigma_BF, clean), config.guidance)
    return x - expand(gap_BF, x) * v


def consistency(config: ConsistencyConfig, blocks: Blocks, role: str = "student") -> Loss:
    """L = E |f_theta(x_sigma, sigma) - sg f_theta-(x_sigma', sigma')|^2 with f(x, s) = x - s v(x, s; clean past).

    x_sigma' is the teacher's Euler step from x_sigma; theta- is the role's running average (`{role}_ema`), which the
    stage must keep. All three networks see the clean past by teacher forcing. Injectable draws: level_B, eps_BFHWC.
    """

    def loss(models: Models, batch: Batch, key: jax.Array, draws: Draws | None = None):
        clean = batch["latents_BFHWC"].astype(jnp.float32)
        draws = draw(key, clean.shape, config) if draws is None else draws
        levels = jnp.asarray(config.levels())
        to_frames = lambda s_B: jnp.broadcast_to(s_B[:, None], clean.shape[:2])
        sigma_BF, next_BF = to_frames(levels[draws["level_B"]]), to_frames(levels[draws["level_B"] + 1])
        gap_BF = gap_bf16(sigma_BF, next_BF) if config.bf16_timesteps else sigma_BF - next_BF
        x = add_noise(clean, draws["eps_BFHWC"], sigma_BF)

        def predict(model: Wan, x: jax.Array, sigma_BF: jax.Array) -> jax.Array:
            conditioning_sigma_BF, convert_BF = _conditioning_sigma(config, sigma_BF)
            v = teacher_forced(model, x, conditioning_sigma_BF, clean, embed_text(model, batch["text_BSE"]), blocks)
            return x0_from_flow(v, x, convert_BF)

        conditioning_sigma_BF, _ = _conditioning_sigma(config, sigma_BF)
        x_next = stop_gradient(
            _teacher_step(models["teacher"], x, conditioning_sigma_BF, gap_BF, batch, config, blocks)
        )
        target = stop_gradient(predict(models[f"{role}_ema"], x_next, next_BF))
        if config.boundary:  # at sigma' = 0 the target is the teacher's step itself
            target = jnp.where(expand(next_BF, x) > 0.0, target, x_next)
        student = predict(models[role], x, sigma_BF)
        error = jnp.mean(jnp.square(student - target))
        return error, {"teacher_step": jnp.mean(jnp.abs(x_next - x)), "sample_std": stop_gradient(jnp.std(student))}

    return loss
