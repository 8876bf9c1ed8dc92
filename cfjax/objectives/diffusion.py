"""Stages 0 and 1: flow matching for a bidirectional teacher, and AR diffusion with teacher forcing (paper section 3.2).

Both regress v* = eps - x0 with a weight per noise level; they differ in the attention mask and in whether a noise level
is drawn per clip or per block. Why clean frames are the past, and not noised ones as in diffusion forcing: those are
never seen when videos are generated (paper proposition 3.4). Reference: `model/diffusion.py`,
`CausalDiffusion.generator_loss`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise, velocity
from cfjax.flow.schedule import bsmntw, nearest, round_timestep_bf16, sigma_table
from cfjax.models.wan import KV, Wan, embed_text, teacher_forced
from cfjax.nn.visibility import FULL, Blocks, Visibility
from cfjax.objectives.history import HISTORIES, corrective_clip, direct, draw_history, prefix_frames, resampled
from cfjax.objectives.stage import Batch, Loss, Models
from cfjax.rollout.generate import ManyStep

Draws = Mapping[str, jax.Array]
CORRECTIVE = "corrective_clips"  # scope of the conditional that spares real clips the rollout


@dataclass(frozen=True)
class DiffusionConfig:
    """How noise levels are drawn and weighted.

    Attributes:
      shift: timestep shift of the 1000-level table (5 for Wan 1.3B at 480p).
      weighting: "bsmntw" (`utils/scheduler.py`), "uniform", or "x0": sigma^2 / mean sigma^2, the error of the clean
        video.
      text_dropout: chance of the negative prompt per clip (the reference drops none, quirk Q19).
      bf16_timesteps: round timesteps to bfloat16 as the reference does (quirk Q1).
      forcing: what an AR network's noisy block sees of the past: "teacher" clean blocks, "diffusion" noisy ones.
      noise_augmentation: with teacher forcing, a > 0 noises the clean half too, at table indices U{a..999} per block (a
        larger a is *less* noise) and with the noisy half's own eps, as the reference does; 0 is off.
      history: with teacher forcing, "clean", or the network's own degraded past: "direct", or "resampled"
        (`objectives.history`), whose levels are drawn with `history_shift`, solved in `history_steps` Euler steps.
      image_start: chance per clip that its first latent frame is given: clean, at level 0, without loss, as
        Wan2.2-TI2V-5B continues a picture (its release: `wan/textimage2video.py`, `WanTI2V.i2v`, one timestep per
        token). In an AR network's noisy half too.
      bagger: chance that an update (a microbatch) learns from corrective clips, the network's rollouts played backwards
        (`objectives.history`), instead of real ones; 0 is off. The paper's aggregated data hold 1/3, 1/2, 3/5 after
        rounds 1, 2, 3. Its objective is forcing="diffusion".
      bagger_prefix: the part of a corrective clip that is given clean and without loss, its drifted past; in blocks.
      bagger_steps, bagger_guidance: UniPC steps and guidance scale of the rollouts.
    """

    shift: float = 5.0
    weighting: str = "bsmntw"
    text_dropout: float = 0.0
    bf16_timesteps: bool = False
    forcing: str = "teacher"
    noise_augmentation: int = 0
    history: str = "clean"
    history_shift: float = 0.6
    history_steps: int = 1
    image_start: float = 0.0
    bagger: float = 0.0
    bagger_prefix: float = 4 / 7
    bagger_steps: int = 20
    bagger_guidance: float = 3.0

    def __post_init__(self) -> None:
        if self.forcing not in ("teacher", "diffusion"):
            raise UserError(f"objective.forcing={self.forcing!r}: use teacher or diffusion")
        if not 0 <= self.noise_augmentation < 1000:
            raise UserError(f"objective.noise_augmentation={self.noise_augmentation}: use an index of 0 (off) to 999")
        if self.noise_augmentation and self.forcing != "teacher":
            raise UserError("objective.noise_augmentation noises the clean half, which only forcing=teacher has")
        if self.history not in HISTORIES:
            raise UserError(f"objective.history={self.history!r}: use one of {', '.join(HISTORIES)}")
        if self.history != "clean" and (self.forcing != "teacher" or self.noise_augmentation):
            raise UserError(f"objective.history={self.history!r} needs forcing='teacher' and noise_augmentation=0")
        if self.history_steps < 1 or not self.history_shift > 0:
            raise UserError("objective.history_steps must be 1 or more, and objective.history_shift positive")
        if not 0.0 <= self.bagger <= 1.0:
            raise UserError(f"objective.bagger={self.bagger}: use a probability, 0 for off")
        if self.bagger and (self.history != "clean" or self.noise_augmentation):
            raise UserError("objective.bagger needs history='clean' and noise_augmentation=0")
        if not 0.0 <= self.image_start <= 1.0:
            raise UserError(f"objective.image_start={self.image_start}: use a probability, 0 for off")
        if self.image_start and (self.bagger or self.history != "clean" or self.noise_augmentation):
            raise UserError("objective.image_start needs history='clean', noise_augmentation=0 and bagger=0")
        if not 0.0 < self.bagger_prefix < 1.0 or self.bagger_steps < 1:
            raise UserError("objective.bagger_prefix must lie between 0 and 1, and objective.bagger_steps be 1 or more")
        if self.weighting not in ("bsmntw", "uniform", "x0"):
            raise UserError(f"objective.weighting={self.weighting!r}: use bsmntw, uniform or x0")
        if not 0.0 <= self.text_dropout < 1.0:
            raise UserError(f"objective.text_dropout={self.text_dropout}: use a probability below 1")


def _weights(config: DiffusionConfig, table: np.ndarray) -> np.ndarray:
    """Weight of every table entry, mean 1 over the table (bsmntw sums to 1000 over 1000 entries)."""
    if config.weighting == "bsmntw":
        return bsmntw(table)
    if config.weighting == "x0":
        return table**2 / np.mean(table**2)
    return np.ones_like(table)


def per_block(index_BF: jax.Array, blocks: Blocks) -> jax.Array:
    """Every frame of a block takes its block's first value."""
    first = [start for start, stop in blocks.spans(index_BF.shape[1]) for _ in range(start, stop)]
    return index_BF[:, jnp.asarray(first)]


def draw(key: jax.Array, shape: tuple[int, ...], config: DiffusionConfig) -> dict[str, jax.Array]:
    """Random numbers of one loss: eps ~ N(0, 1) [B,F,H,W,C]; index ~ U{0..999} [B,F]; drop ~ Bernoulli [B].

    With a given first frame also given ~ Bernoulli [B]; with noise augmentation augment ~ U{a..999} [B,F]; with a
    resampled history see `draw_history`; with BAgger rollout_eps ~ N(0, 1) [B,F,H,W,C] and corrective ~ Bernoulli, a
    scalar.
    """
    key_eps, key_index, key_drop = jax.random.split(key, 3)
    draws = {
        "eps_BFHWC": jax.random.normal(key_eps, shape, jnp.float32),
        "index_BF": jax.random.randint(key_index, shape[:2], 0, 1000),
        "drop_B": jax.random.bernoulli(key_drop, config.text_dropout, shape[:1]),
    }
    if config.noise_augmentation:
        key_augment = jax.random.fold_in(key_index, 1)
        draws["augment_BF"] = jax.random.randint(key_augment, shape[:2], config.noise_augmentation, 1000)
    if config.image_start:
        draws["given_B"] = jax.random.bernoulli(jax.random.fold_in(key_drop, 1), config.image_start, shape[:1])
    if config.bagger:
        key_rollout = jax.random.fold_in(key_eps, 2)
        draws["rollout_eps_BFHWC"] = jax.random.normal(key_rollout, shape, jnp.float32)
        draws["corrective"] = jax.random.bernoulli(jax.random.fold_in(key_rollout, 1), config.bagger)
    if config.history == "resampled":
        draws |= draw_history(jax.random.fold_in(key_eps, 1), shape, config.history_shift)
    return draws


def drop_text(batch: Batch, drop_B: jax.Array) -> jax.Array:
    """text_BSE with the dropped clips' rows replaced by the negative prompt's."""
    return jnp.where(drop_B[:, None, None], batch["negative_text_SE"][None], batch["text_BSE"])


def _noised(config: DiffusionConfig, x0: jax.Array, draws: Draws, index_BF: jax.Array) -> tuple[jax.Array, ...]:
    """x_sigma, the conditioning sigma, and the loss weight, for the drawn table indices."""
    levels = sigma_table(1000, config.shift)
    table = jnp.asarray(levels)
    sigma_BF = table[index_BF]
    if config.bf16_timesteps:  # Q1: the level is re-looked-up from the rounded timestep
        conditioning_sigma_BF = round_timestep_bf16(sigma_BF)
        index_BF = nearest(table, conditioning_sigma_BF)
        sigma_BF = table[index_BF]
    else:
        conditioning_sigma_BF = sigma_BF
    weights = jnp.asarray(_weights(config, levels))[index_BF]
    return add_noise(x0, draws["eps_BFHWC"], sigma_BF), conditioning_sigma_BF, weights


def _weighted_error(
    v: jax.Array, target: jax.Array, weight_BF: jax.Array, learned_BF: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Means over all frames of all clips, or over those of `learned_BF` (one or more)."""
    error_BF = jnp.mean(jnp.square(v - target), axis=(2, 3, 4))
    where = learned_BF
    return jnp.mean(weight_BF * error_BF, where=where), {"flow_error": jnp.mean(error_BF, where=where)}


def given_first(draws: Draws, frames: int) -> jax.Array:
    """given_BF: true where a frame is a clip's first one and given."""
    return draws["given_B"][:, None] & (jnp.arange(frames) == 0)[None]


def _with_given(
    given_BF: jax.Array, x0: jax.Array, x: jax.Array, conditioning_sigma_BF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The noisy frames and their levels with the given ones clean, at level 0."""
    return jnp.where(given_BF[:, :, None, None, None], x0, x), jnp.where(given_BF, 0.0, conditioning_sigma_BF)


def flow_matching(config: DiffusionConfig, role: str = "student") -> Loss:
    """The bidirectional teacher's loss: one noise level per clip, full attention.

    L = E w(sigma) |v(x_sigma, sigma, text) - (eps - x0)|^2 (rectified flow, arXiv 2210.02747, as in Wan2.1). With
    `image_start` a clip's first latent frame may be clean, at level 0, outside the mean.
    """

    def loss(models: Models, batch: Batch, key: jax.Array, draws: Draws | None = None):
        x0 = batch["latents_BFHWC"].astype(jnp.float32)
        draws = draw(key, x0.shape, config) if draws is None else draws
        index_BF = jnp.broadcast_to(draws["index_BF"][:, :1], x0.shape[:2])
        x, conditioning_sigma_BF, weight_BF = _noised(config, x0, draws, index_BF)
        learned_BF = None
        if config.image_start:
            given_BF = given_first(draws, x0.shape[1])
            x, conditioning_sigma_BF = _with_given(given_BF, x0, x, conditioning_sigma_BF)
            learned_BF = ~given_BF
        model = models[role]
        v = model(x, conditioning_sigma_BF, embed_text(model, drop_text(batch, draws["drop_B"])), FULL)
        return _weighted_error(v, velocity(x0, draws["eps_BFHWC"]), weight_BF, learned_BF)

    return loss


def _past(
    config: DiffusionConfig,
    model: Wan,
    x0: jax.Array,
    noisy: tuple[jax.Array, jax.Array],
    text_kv: KV,
    draws: Draws,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """The clean half and its conditioning sigma: the clip or the network's version of it at 0, or a noisy copy.

    `noisy` is the noisy half and its conditioning sigma.
    """
    if config.noise_augmentation:
        noised, conditioning_sigma_BF, _ = _noised(config, x0, draws, per_block(draws["augment_BF"], blocks))
        return noised, conditioning_sigma_BF
    zero_BF = jnp.zeros(x0.shape[:2], jnp.float32)
    if config.history == "direct":
        return direct(model, *noisy, text_kv, blocks), zero_BF
    if config.history == "resampled":
        return resampled(model, x0, text_kv, dict(draws), blocks, config.history_steps), zero_BF
    return x0, zero_BF


def _aggregated(
    config: DiffusionConfig, models: Models, role: str, batch: Batch, draws: Draws, blocks: Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """BAgger's clips: x0_BFHWC, the drop-free text_BSE, and given_F, true where a frame is given and not learned.

    The rollouts are made within the update by `{role}_ema` where the stage averages the role, else by the weights being
    trained: the rounds of the paper (roll out a network, add to the data, train the next from the start) become one run
    whose rollouts follow it. Real or corrective is drawn once per update, so that only corrective ones pay a rollout.
    """
    real = batch["latents_BFHWC"].astype(jnp.float32)
    rollout_model = models.get(f"{role}_ema", models[role])
    sampler = ManyStep(steps=config.bagger_steps, shift=config.shift, guidance=config.bagger_guidance)

    def backwards() -> jax.Array:
        texts = batch["text_BSE"], batch["negative_text_SE"]
        noise, codec = draws["rollout_eps_BFHWC"], models.get("codec")
        return corrective_clip(rollout_model, real, noise, *texts, sampler, blocks, codec)

    with jax.named_scope(CORRECTIVE):
        x0 = jax.lax.cond(draws["corrective"], backwards, lambda: real)
    text = batch["text_BSE"]
    if "reversed_text_BSE" in batch:
        text = jnp.where(draws["corrective"], batch["reversed_text_BSE"], text)
    prefix = prefix_frames(real.shape[1], blocks, config.bagger_prefix)
    return x0, text, draws["corrective"] & (jnp.arange(real.shape[1]) < prefix)


def ar_diffusion(config: DiffusionConfig, blocks: Blocks, role: str = "student") -> Loss:
    """Stage 1: AR diffusion, a noise level per block. Teacher forcing: noisy blocks see *clean* earlier ones.

    L = E w(sigma_b) |v(x_sigma^b, sigma_b, x0^{<b}, text) - (eps - x0)^b|^2; gradients flow through the clean half.
    With `forcing="diffusion"` (diffusion forcing, arXiv 2407.01392) x_sigma^{<b} takes the place of x0^{<b}.

    With `bagger` a corrective clip's first blocks are clean, at level 0, outside the mean. The paper changes the
    caption ("a reversed video of ..."): a batch may hold such rows, reversed_text_BSE (`data.reversed`); without them
    the clip keeps its own caption, whose direction of motion is then wrong (the given blocks show the right one).

    With `image_start` a clip's first latent frame may be given, as in `flow_matching`: clean in the noisy half too.
    """

    def loss(models: Models, batch: Batch, key: jax.Array, draws: Draws | None = None):
        x0, text_BSE = batch["latents_BFHWC"].astype(jnp.float32), batch["text_BSE"]
        draws = draw(key, x0.shape, config) if draws is None else draws
        given_BF = given_first(draws, x0.shape[1]) if config.image_start else None
        if config.bagger:
            x0, text_BSE, given_F = _aggregated(config, models, role, batch, draws, blocks)
            given_BF = jnp.broadcast_to(given_F[None], x0.shape[:2])
        x, conditioning_sigma_BF, weight_BF = _noised(config, x0, draws, per_block(draws["index_BF"], blocks))
        if given_BF is not None:
            x, conditioning_sigma_BF = _with_given(given_BF, x0, x, conditioning_sigma_BF)
        model = models[role]
        text_kv = embed_text(model, drop_text({**batch, "text_BSE": text_BSE}, draws["drop_B"]))
        if config.forcing == "diffusion":
            v = model(x, conditioning_sigma_BF, text_kv, Visibility("block_causal", blocks))
        else:
            past, past_BF = _past(config, model, x0, (x, conditioning_sigma_BF), text_kv, draws, blocks)
            v = teacher_forced(model, x, conditioning_sigma_BF, past, text_kv, blocks, clean_sigma_BF=past_BF)
        learned_BF = None if given_BF is None else ~given_BF
        return _weighted_error(v, velocity(x0, draws["eps_BFHWC"]), weight_BF, learned_BF)

    return loss
