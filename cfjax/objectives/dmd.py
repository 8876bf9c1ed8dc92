"""Stage 3: asymmetric distribution matching distillation with self-rollout (paper section 3.2).

Reference: `model/dmd.py`, `DMD`.

The causal student generates with its own cache; a frozen bidirectional teacher (the real score, with guidance) and a
trained bidirectional critic (the fake score) give the direction in which its videos should move.

The paper's baselines differ in two choices: what the student starts from (`student_input`; CausVid, arXiv 2412.07772,
takes noised real clips), and how the scores become a gradient (DMD here, SiD in `objectives.sid`). One block of all
frames is bidirectional DMD. With `long`, rollouts are longer than the scores' window, see `rollout.long_video`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from cfjax.core.errors import UserError
from cfjax.flow.guidance import guided
from cfjax.flow.path import add_noise, flow_from_x0, velocity, x0_from_flow
from cfjax.flow.schedule import lookup, score_sigma, sigma_table
from cfjax.models.codec import Codec
from cfjax.models.wan import Wan, embed_text, teacher_forced
from cfjax.nn.visibility import Blocks, Visibility
from cfjax.objectives.diffusion import per_block
from cfjax.objectives.stage import Batch, Loss, Models
from cfjax.rollout.generate import both_prompts
from cfjax.rollout.long_video import LongVideo, draw_long, roll_window
from cfjax.rollout.rolling_training import student_rollout
from cfjax.rollout.self_forcing import Draws, SelfForcing, draw_rollout
from cfjax.rollout.streaming import Streaming


@dataclass(frozen=True)
class DMDConfig:
    """Stage 3's choices.

    Attributes:
      self_forcing: how the student rolls out.
      student_input: "self_rollout", or "noised_data": real clips noised at a few-step level per block, denoised in one
        pass (CausVid); their past is then noisy ("diffusion") or clean ("teacher"), as `forcing` says.
      real_guidance, fake_guidance: w in pos + w (pos - neg), the "dmd" convention (quirk Q7); 0 is no guidance.
      score_shift, score_min, score_max: distribution of the level at which scores are compared, see `score_sigma`.
      score_table_shift: the reference converts the scores' flows with a shift-8 table although it noised with shift 5
        (quirk Q3), and noises at the nearest entry of its table: the bounds are not in it, so a tenth of the draws is
        noised at 0.9799 or 0.0197 and conditioned on 0.98 or 0.02. None uses the exact level, 8.0 is the reference's.
      long: rollouts longer than the scores' window; the losses then need a frozen role "codec". None is off.
      streaming: a rollout that goes on from update to update; the losses are those of `objectives.streaming`.
    """

    self_forcing: SelfForcing
    student_input: str = "self_rollout"
    forcing: str = "diffusion"
    real_guidance: float = 3.0
    fake_guidance: float = 0.0
    score_shift: float = 5.0
    score_min: float = 0.02
    score_max: float = 0.98
    score_table_shift: float | None = None
    long: LongVideo | None = None
    streaming: Streaming | None = None

    def __post_init__(self) -> None:
        if self.student_input not in ("self_rollout", "noised_data"):
            raise UserError(f"objective.student_input={self.student_input!r}: use self_rollout or noised_data")
        if self.forcing not in ("teacher", "diffusion"):
            raise UserError(f"objective.forcing={self.forcing!r}: use teacher or diffusion")
        if not 0.0 < self.score_min <= self.score_max <= 1.0:  # flows have no meaning at sigma 0
            raise UserError(
                f"objective.score_min={self.score_min} and score_max={self.score_max} are no range of sigmas above 0"
            )
        if not self.score_shift > 0:
            raise UserError(f"objective.score_shift={self.score_shift}: use more than 0 (1 is no shift)")
        if self.score_table_shift is not None and not self.score_table_shift > 0:
            raise UserError(f"objective.score_table_shift={self.score_table_shift}: use more than 0, or 0 for no table")
        longer = self.long or self.streaming
        if longer and self.student_input != "self_rollout":
            raise UserError(
                f"objective.max_frames={longer.max_frames} needs objective.student_input=self_rollout, or 0"
            )
        if self.self_forcing.rolling and self.student_input != "self_rollout":
            raise UserError(
                f"objective.rolling={self.self_forcing.rolling} needs objective.student_input=self_rollout, or 0"
            )


def draw(key: jax.Array, shape: tuple[int, ...], config: DMDConfig, blocks: Blocks) -> dict[str, jax.Array]:
    """Random numbers of one loss: the student's, score_sigma_B in [min, max], score_eps_BFHWC.

    The student's: see `draw_rollout`, or `draw_long`, whose window is then what the scores get of `shape`'s frames; for
    noised data noise_BFHWC and level_BF, one few-step level per block.
    """
    key_rollout, key_level, key_eps = jax.random.split(key, 3)
    u_B = jax.random.randint(key_level, shape[:1], 0, 1000).astype(jnp.float32) / 1000.0
    if config.student_input == "noised_data":
        key_noise, key_step = jax.random.split(key_rollout)
        level_BF = jax.random.randint(key_step, shape[:2], 0, len(config.self_forcing.sigmas))
        student = {
            "noise_BFHWC": jax.random.normal(key_noise, shape, jnp.float32),
            "level_BF": per_block(level_BF, blocks),
        }
    elif config.long:
        student = draw_long(key_rollout, shape, config.self_forcing, config.long, blocks)
    else:
        student = draw_rollout(key_rollout, shape, config.self_forcing, blocks)
    return {
        **student,
        "score_sigma_B": score_sigma(u_B, config.score_shift, config.score_min, config.score_max),
        "score_eps_BFHWC": jax.random.normal(key_eps, video_shape(shape, config), jnp.float32),
    }


def video_shape(shape: tuple[int, ...], config: DMDConfig) -> tuple[int, ...]:
    """Shape of the student's video that the critics see, for clips of `shape`: long rollouts have a window's frames."""
    return (shape[0], config.long.window_frames, *shape[2:]) if config.long else shape


def student_video(
    model: Wan,
    batch: Batch,
    draws: Draws,
    config: DMDConfig,
    blocks: Blocks,
    *,
    gradient: bool,
    codec: Codec | None = None,
) -> jax.Array:
    """x0_BFHWC of the student, with or without gradient to its weights.

    Args:
      codec: needed for `config.long` alone, the frozen role "codec": `models.get("codec")`. Frames that the loss is to
        leave out (`counted_mean`) then carry no gradient, also not through the scores that see them.

    Raises:
      UserError: a long rollout without a codec.
    """
    text_kv = embed_text(model, batch["text_BSE"])
    if config.long:
        if codec is None:
            raise UserError("rollouts longer than the window need a frozen role 'codec', which makes its first latent")
        return roll_window(model, text_kv, draws, config.self_forcing, config.long, blocks, codec, gradient=gradient)
    if config.student_input == "self_rollout":
        return student_rollout(model, text_kv, draws, config.self_forcing, blocks, gradient=gradient)[0]
    clean = batch["latents_BFHWC"].astype(jnp.float32)
    sigma_BF = jnp.asarray(config.self_forcing.sigmas, jnp.float32)[draws["level_BF"]]
    x = add_noise(clean, draws["noise_BFHWC"], sigma_BF)
    if config.forcing == "teacher":
        v = teacher_forced(model, x, sigma_BF, clean, text_kv, blocks)
    else:
        v = model(x, sigma_BF, text_kv, Visibility("block_causal", blocks))
    x0 = x0_from_flow(v, x, sigma_BF)
    return x0 if gradient else stop_gradient(x0)


def counted_mean(x_BFHWC: jax.Array, draws: Draws, config: DMDConfig, blocks: Blocks) -> jax.Array:
    """Mean over the frames that the student's loss counts: all, but for those of `LongVideo.counted_F`."""
    if config.long is None:
        return jnp.mean(x_BFHWC)
    return jnp.mean(jnp.mean(x_BFHWC, axis=(0, 2, 3, 4)), where=config.long.counted_F(draws["count"], blocks))


def score_x0(model: Wan, x_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: Any, config: DMDConfig) -> jax.Array:
    """A score network's clean prediction; its sigma may come from another table (quirk Q3)."""
    used = sigma_BF
    if config.score_table_shift is not None:
        used = lookup(sigma_table(1000, config.score_table_shift), sigma_BF)
    return x0_from_flow(model(x_BFHWC, sigma_BF, text_kv), x_BFHWC, used)


def guided_x0(
    model: Wan, x: jax.Array, sigma_BF: jax.Array, batch: Batch, scale: float, config: DMDConfig
) -> jax.Array:
    """`score_x0` with guidance; one network call of twice the batch when the scale is not 0."""
    positive = embed_text(model, batch["text_BSE"])
    if scale == 0.0:
        return score_x0(model, x, sigma_BF, positive, config)
    negative = embed_text(model, jnp.broadcast_to(batch["negative_text_SE"][None], batch["text_BSE"].shape))
    text_kv = both_prompts(positive, negative)
    return guided(lambda a: score_x0(model, *a, text_kv, config), (x, sigma_BF), scale, "dmd")


def noising_level(sigma_BF: jax.Array, config: DMDConfig) -> jax.Array:
    """The level that videos are noised at when the scores are conditioned on `sigma_BF`; see `score_table_shift`."""
    if config.score_table_shift is None:
        return sigma_BF
    return lookup(sigma_table(1000, config.score_shift), sigma_BF)


def noised_for_scores(x0: jax.Array, draws: Draws, config: DMDConfig) -> tuple[jax.Array, jax.Array]:
    """(x_sigma, sigma_BF) at which the scores are compared: one level per clip, see `draw`."""
    sigma_BF = jnp.broadcast_to(draws["score_sigma_B"][:, None], x0.shape[:2])
    return add_noise(x0, draws["score_eps_BFHWC"], noising_level(sigma_BF, config)), sigma_BF


def distribution_gradient(
    x0: jax.Array, models: Models, batch: Batch, draws: Draws, config: DMDConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """g = (f - r) / mean|x0 - r| per sample (DMD, arXiv 2311.18828): away from the student's own; no gradient."""
    x, sigma_BF = noised_for_scores(stop_gradient(x0), draws, config)
    with jax.named_scope("fake_score"):
        fake = guided_x0(models["critic"], x, sigma_BF, batch, config.fake_guidance, config)
    with jax.named_scope("real_score"):
        real = guided_x0(models["real_score"], x, sigma_BF, batch, config.real_guidance, config)
    normaliser = jnp.mean(jnp.abs(x0 - real), axis=(1, 2, 3, 4), keepdims=True)
    gradient = jnp.nan_to_num((fake - real) / normaliser)
    metrics = {"dmd_gradient_norm": jnp.mean(jnp.abs(gradient)), "dmd_normaliser": jnp.mean(normaliser)}
    return stop_gradient(gradient), stop_gradient(metrics)


def generator_loss(config: DMDConfig, blocks: Blocks, role: str = "student") -> Loss:
    """1/2 mean (x0 - sg(x0 - g))^2 on the student's video x0, whose gradient is g / numel (DMD, arXiv 2311.18828)."""

    def loss(models: Models, batch: Batch, key: jax.Array, draws: Draws | None = None):
        shape = batch["latents_BFHWC"].shape
        draws = draw(key, shape, config, blocks) if draws is None else draws
        x0 = student_video(models[role], batch, draws, config, blocks, gradient=True, codec=models.get("codec"))
        gradient, metrics = distribution_gradient(x0, models, batch, draws, config)
        value = 0.5 * counted_mean(jnp.square(x0 - stop_gradient(x0 - gradient)), draws, config, blocks)
        return value, {**metrics, "sample_std": stop_gradient(jnp.std(x0))}

    return loss


def critic_loss(config: DMDConfig, blocks: Blocks, role: str = "critic", student: str = "student") -> Loss:
    """Flow matching of the critic on the student's videos: mean (v_f - (eps - x0))^2, unweighted.

    Raises:
      UserError: `config.long` counts frames that are not whole blocks; raised here, before anything runs.
    """
    if config.long:
        config.long.counts(blocks)

    def loss(models: Models, batch: Batch, key: jax.Array, draws: Draws | None = None):
        shape = batch["latents_BFHWC"].shape
        draws = draw(key, shape, config, blocks) if draws is None else draws
        x0 = student_video(models[student], batch, draws, config, blocks, gradient=False, codec=models.get("codec"))
        x, sigma_BF = noised_for_scores(x0, draws, config)
        fake_x0 = score_x0(models[role], x, sigma_BF, embed_text(models[role], batch["text_BSE"]), config)
        flow = flow_from_x0(fake_x0, x, noising_level(sigma_BF, config))
        return jnp.mean(jnp.square(flow - velocity(x0, draws["score_eps_BFHWC"]))), {}

    return loss
