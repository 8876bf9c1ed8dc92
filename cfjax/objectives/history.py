"""What stands in the clean past's place while an AR network trains: ways against exposure bias (paper's appendix).

Teacher forcing shows a noisy block the *clean* past, but generation shows it the network's own. Both strategies degrade
the past with the network being trained, without gradient, and keep the clean target:

    direct      Direct Forcing (Pack and Force Your Memory, arXiv 2510.01784): every block is noised and predicted clean
                in one step, all blocks at once given the clean past; one extra network call
    resampled   Resampling Forcing (arXiv 2512.15702): every block is noised and its PF-ODE solved to the end, block
                after block given the *already degraded* past, so that errors accumulate as they do in generation
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.flow.schedule import shift_sigma
from cfjax.models.cache import KVCache, init_cache
from cfjax.models.wan import KV, Wan, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, denoise_block, scan_blocks

HISTORIES = ("clean", "direct", "resampled")


def draw_history(key: jax.Array, shape: tuple[int, ...], shift: float) -> dict[str, jax.Array]:
    """history_sigma_B, logit-normal(0, 1) and shifted (shift < 1 is towards clean), and history_eps_BFHWC."""
    key_level, key_eps = jax.random.split(key)
    level_B = jax.nn.sigmoid(jax.random.normal(key_level, shape[:1], jnp.float32))
    return {
        "history_sigma_B": shift_sigma(level_B, shift),
        "history_eps_BFHWC": jax.random.normal(key_eps, shape, jnp.float32),
    }


def degraded(
    model: Wan, clean_BFHWC: jax.Array, text_kv: KV, draws: dict[str, jax.Array], blocks: Blocks, kind: str, steps: int
) -> jax.Array:
    """The past as the network itself would have left it, shaped like the clean clip, without gradient.

    Args:
      draws: see `draw_history`.
      kind: "direct" or "resampled".
      steps: Euler steps of "resampled", equal in sigma.
    """
    model, text_kv = stop_gradient(model), stop_gradient(text_kv)
    sigma_BF = jnp.broadcast_to(draws["history_sigma_B"][:, None], clean_BFHWC.shape[:2])
    noised = add_noise(clean_BFHWC, draws["history_eps_BFHWC"], sigma_BF)
    if kind == "direct":
        v = teacher_forced(model, noised, sigma_BF, clean_BFHWC, text_kv, blocks)
        return stop_gradient(x0_from_flow(v, noised, sigma_BF))
    return stop_gradient(_resampled(model, noised, sigma_BF, text_kv, blocks, steps))


def _resampled(
    model: Wan, noised_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, blocks: Blocks, steps: int
) -> jax.Array:
    batch, num_frames, height, width, _ = noised_BFHWC.shape
    cache = init_cache(model.config, batch, num_frames, model.config.tokens_per_frame(height, width), blocks)

    def block(cache: KVCache, start: jax.Array, inputs: tuple) -> tuple[KVCache, jax.Array]:
        (x, sigma), _ = inputs
        step = sigma / steps

        def euler(i: jax.Array, x: jax.Array) -> jax.Array:
            v = denoise_block(model, x, sigma - i * step, text_kv, cache, start, blocks)
            return x0_from_flow(v, x, step)  # x - step v

        x = jax.lax.fori_loop(0, steps, euler, x)
        return commit_block(model, x, text_kv, cache, start, blocks), x

    return scan_blocks(block, cache, (noised_BFHWC, sigma_BF), None, num_frames, blocks)[1]
