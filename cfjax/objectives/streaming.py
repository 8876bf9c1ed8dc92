"""Distribution matching on a rollout that goes on from update to update: LongLive's streaming long tuning.

The losses are those of `objectives.dmd` on the last window of `rollout.streaming`, and count its new frames alone, the
critic's too. Every update, the student's or the critic's, adds a chunk to the same rollout. Reference:
`compute_generator_loss` and `compute_critic_loss` of LongLive's `model/streaming_training.py`.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from cfjax.core.errors import UserError
from cfjax.flow.path import flow_from_x0, velocity
from cfjax.models.wan import embed_text
from cfjax.nn.visibility import Blocks
from cfjax.objectives.dmd import (
    DMDConfig,
    Draws,
    distribution_gradient,
    draw,
    noised_for_scores,
    noising_level,
    score_x0,
)
from cfjax.objectives.stage import Batch, Models, RolloutLoss
from cfjax.rollout.streaming import Chunk, RolloutState, Streaming, add_chunk, draw_chunk


def draw_update(key: jax.Array, shape: tuple[int, ...], config: DMDConfig, blocks: Blocks) -> dict[str, jax.Array]:
    """Random numbers of one loss for clips of `shape`: those of `dmd.draw` for the window, and of `draw_chunk`."""
    streaming = _streaming(config)
    window = (shape[0], streaming.window_frames, *shape[2:])
    return {**draw(key, window, config, blocks), **draw_chunk(jax.random.fold_in(key, streaming.max_frames), streaming)}


def generator_loss(config: DMDConfig, blocks: Blocks, role: str = "student") -> RolloutLoss:
    """`dmd.generator_loss` over a chunk's new frames.

    Raises:
      UserError: see `Streaming.check`; raised here, before anything runs.
    """
    _streaming(config).check(blocks)

    def loss(models: Models, batch: Batch, key: jax.Array, rollout: RolloutState, draws: Draws | None = None):
        draws = draw_update(key, batch["latents_BFHWC"].shape, config, blocks) if draws is None else draws
        chunk = _chunk(models, role, batch, rollout, draws, config, blocks, gradient=True)
        seen, x0 = {**batch, "text_BSE": chunk.text_BSE}, chunk.x0_BFHWC
        gradient, metrics = distribution_gradient(x0, models, seen, draws, config)
        value = 0.5 * _counted_mean(jnp.square(x0 - stop_gradient(x0 - gradient)), chunk)
        return value, {**metrics, "sample_std": stop_gradient(jnp.std(x0)), **_place(chunk)}, chunk.state

    return loss


def critic_loss(config: DMDConfig, blocks: Blocks, role: str = "critic", student: str = "student") -> RolloutLoss:
    """`dmd.critic_loss` over a chunk's new frames. Raises as `generator_loss` does."""
    _streaming(config).check(blocks)

    def loss(models: Models, batch: Batch, key: jax.Array, rollout: RolloutState, draws: Draws | None = None):
        draws = draw_update(key, batch["latents_BFHWC"].shape, config, blocks) if draws is None else draws
        chunk = _chunk(models, student, batch, rollout, draws, config, blocks, gradient=False)
        x, sigma_BF = noised_for_scores(chunk.x0_BFHWC, draws, config)
        fake_x0 = score_x0(models[role], x, sigma_BF, embed_text(models[role], chunk.text_BSE), config)
        flow = flow_from_x0(fake_x0, x, noising_level(sigma_BF, config))
        error = jnp.square(flow - velocity(chunk.x0_BFHWC, draws["score_eps_BFHWC"]))
        return _counted_mean(error, chunk), _place(chunk), chunk.state

    return loss


def _streaming(config: DMDConfig) -> Streaming:
    if config.streaming is None:
        raise UserError("objective.new_frames=0 is no streaming; LongLive's is 18")
    return config.streaming


def _chunk(
    models: Models,
    student: str,
    batch: Batch,
    rollout: RolloutState,
    draws: Draws,
    config: DMDConfig,
    blocks: Blocks,
    *,
    gradient: bool,
) -> Chunk:
    if "codec" not in models:
        raise UserError("a rollout that goes on needs a frozen role 'codec', which makes its window's first latent")
    how = (config.self_forcing, _streaming(config), blocks, models["codec"])
    model = models[student] if gradient else stop_gradient(models[student])
    return add_chunk(model, rollout, batch["text_BSE"], draws, *how, gradient=gradient)


def _counted_mean(x_BFHWC: jax.Array, chunk: Chunk) -> jax.Array:
    return jnp.mean(jnp.mean(x_BFHWC, axis=(0, 2, 3, 4)), where=chunk.counted_F)


def _place(chunk: Chunk) -> dict[str, jax.Array]:
    """For the curves: how long the rollout is, in latent frames."""
    return {"rollout_frames": chunk.state.length.astype(jnp.float32)}
