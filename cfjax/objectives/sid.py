"""Stage 3's alternative: score identity distillation (SiD, arXiv 2404.04057) on the same rollout, scores and critic.

Where DMD gives the student a constant direction, SiD differentiates through both score networks: its loss is an
unbiased estimate of the Fisher divergence between the student's and the real distribution (reference: `model/sid.py`,
`SiD`; Self Forcing's ablation).
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from cfjax.nn.visibility import Blocks
from cfjax.objectives.dmd import DMDConfig, Draws, counted_mean, draw, guided_x0, noised_for_scores, student_video
from cfjax.objectives.stage import Batch, Loss, Models


def generator_loss(config: DMDConfig, blocks: Blocks, *, alpha: float = 1.0, role: str = "student") -> Loss:
    """mean [(r - f) ((r - x) - alpha (r - f))] / sg(mean|x - r|), r the guided real and f the fake clean prediction.

    Gradient reaches the student through x and through both scores' inputs; the scores' weights are constants. The
    normaliser is per clip. The critic's loss is `objectives.dmd.critic_loss`. Of a long rollout's window the mean
    leaves out what DMD's does; the reference's SiD counts everything.
    """

    def loss(models: Models, batch: Batch, key: jax.Array, draws: Draws | None = None):
        draws = draw(key, batch["latents_BFHWC"].shape, config, blocks) if draws is None else draws
        x0 = student_video(models[role], batch, draws, config, blocks, gradient=True, codec=models.get("codec"))
        x, sigma_BF = noised_for_scores(x0, draws, config)
        with jax.named_scope("fake_score"):
            fake = guided_x0(models["critic"], x, sigma_BF, batch, config.fake_guidance, config)
        with jax.named_scope("real_score"):
            real = guided_x0(models["real_score"], x, sigma_BF, batch, config.real_guidance, config)
        difference = real - fake
        normaliser = stop_gradient(jnp.mean(jnp.abs(x0 - real), axis=(1, 2, 3, 4), keepdims=True))
        summands = jnp.nan_to_num(difference * ((real - x0) - alpha * difference) / normaliser)
        value = counted_mean(summands, draws, config, blocks)
        metrics = {"score_gap": jnp.mean(jnp.abs(difference)), "sample_std": jnp.std(x0)}
        return value, stop_gradient(metrics)

    return loss
