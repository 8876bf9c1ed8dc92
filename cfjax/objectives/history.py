"""Replacements for the clean past in AR training, against exposure bias (paper's appendix).

Teacher forcing shows a noisy block the *clean* past, but generation shows it the network's own. The first two degrade
the past with the network being trained, without gradient, and keep the clean target; the third makes other clips:

    direct      Direct Forcing (Pack and Force Your Memory, arXiv 2510.01784, section 3.2): a block noised for its own
                loss is completed in one step, x_t + (1 - t) v (here x - sigma v), and this is the next blocks' past;
                clips of a video are walked in order, their gradients gathered before one optimiser step
    resampled   Resampling Forcing (arXiv 2512.15702, equations 5 to 7, algorithm 1): every block is noised to one level
                t_s of the clip, logit-normal(0, 1) shifted by 0.6, and its PF-ODE solved to the end by the online
                weights, block after block given the *already degraded* past; one Euler step
    BAgger      Backwards Aggregation (arXiv 2512.12080): the network's own rollout after a real first block, played
                backwards, goes from drifted to real; see `corrective_clip`

Direct Forcing's network calls are its loss's own, one block after another; here they are repeated without gradient, so
that the loss stays one pass over all blocks. With a block's own level and noise in both, the values are the same.

Checked against published summaries with equations, algorithms and settings, not against the papers. Inferred: that
Direct Forcing detaches its one-step estimates (clips are back-propagated one by one). Resampling Forcing warms up by
teacher forcing (10K steps of 25K at 5 s), and BAgger, too, starts from a network that can generate: start either from a
run of `ar_diffusion`. Not here: Resampling Forcing's history routing, MemoryPack.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.flow.schedule import shift_sigma
from cfjax.models.cache import KVCache
from cfjax.models.codec import Codec
from cfjax.models.wan import KV, Wan, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, denoise_block, empty_cache, scan_blocks
from cfjax.rollout.generate import ManyStep, generate_many_step

HISTORIES = ("clean", "direct", "resampled")


def draw_history(key: jax.Array, shape: tuple[int, ...], shift: float) -> dict[str, jax.Array]:
    """Of "resampled": history_sigma_B, logit-normal(0, 1) and shifted (< 1 is towards clean), and history_eps_BFHWC."""
    key_level, key_eps = jax.random.split(key)
    level_B = jax.nn.sigmoid(jax.random.normal(key_level, shape[:1], jnp.float32))
    return {
        "history_sigma_B": shift_sigma(level_B, shift),
        "history_eps_BFHWC": jax.random.normal(key_eps, shape, jnp.float32),
    }


def direct(model: Wan, noised_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, blocks: Blocks) -> jax.Array:
    """One-step estimates of all blocks, each given the earlier ones' estimates; without gradient.

    Args:
      noised_BFHWC, sigma_BF: the noisy blocks of the loss, and their conditioning sigma.
    """
    return _completed(model, noised_BFHWC, sigma_BF, text_kv, blocks, 1)


def resampled(
    model: Wan, clean_BFHWC: jax.Array, text_kv: KV, draws: dict[str, jax.Array], blocks: Blocks, steps: int
) -> jax.Array:
    """The past as the network itself would generate it, shaped like the clean clip; without gradient.

    Args:
      draws: see `draw_history`.
      steps: Euler steps, equal in sigma (paper: 1).
    """
    sigma_BF = jnp.broadcast_to(draws["history_sigma_B"][:, None], clean_BFHWC.shape[:2])
    noised = add_noise(clean_BFHWC, draws["history_eps_BFHWC"], sigma_BF)
    return _completed(model, noised, sigma_BF, text_kv, blocks, steps)


def _completed(
    model: Wan, noised_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, blocks: Blocks, steps: int
) -> jax.Array:
    model, text_kv = stop_gradient(model), stop_gradient(text_kv)
    num_frames, cache = noised_BFHWC.shape[1], empty_cache(model.config, noised_BFHWC.shape, blocks)

    def block(cache: KVCache, start: jax.Array, inputs: tuple) -> tuple[KVCache, jax.Array]:
        (x, sigma), _ = inputs
        step = sigma / steps

        def euler(i: jax.Array, x: jax.Array) -> jax.Array:
            v = denoise_block(model, x, sigma - i * step, text_kv, cache, start, blocks)
            return x0_from_flow(v, x, step)  # x - step v

        x = jax.lax.fori_loop(0, steps, euler, x)
        return commit_block(model, x, text_kv, cache, start, blocks), x

    return stop_gradient(scan_blocks(block, cache, (noised_BFHWC, sigma_BF), None, num_frames, blocks)[1])


def prefix_frames(num_frames: int, blocks: Blocks, fraction: float) -> int:
    """Frames of a corrective clip that are given, not learned: whole blocks, about `fraction` of them, and not all.

    Raises:
      UserError: a clip of one block.
    """
    spans = blocks.spans(num_frames)
    if len(spans) < 2:
        raise UserError("objective.bagger needs clips of two blocks or more: the first are its drifted past")
    return spans[min(max(round(fraction * len(spans)), 1), len(spans) - 1) - 1][1]


def corrective_clip(
    model: Wan,
    clean_BFHWC: jax.Array,
    noise_BFHWC: jax.Array,
    text_BSE: jax.Array,
    negative_SE: jax.Array,
    sampler: ManyStep,
    blocks: Blocks,
    codec: Codec | None = None,
) -> jax.Array:
    """BAgger's corrective trajectory: the real first block, the rollout after it, played backwards; without gradient.

    The paper decodes the rollout, reverses its pixels and encodes them again, as a `codec` does here. Without one the
    latents are reversed: the same where a latent frame holds one frame of video (the toy world), else an approximation.

    Args:
      model: makes the rollout, by `sampler` under the clip's own caption (the paper: 20 steps; its guidance is not
        known to us).
      noise_BFHWC: shaped like the clip; the first block's is not used.
    """
    model = stop_gradient(model)
    start = blocks.spans(clean_BFHWC.shape[1])[0][1]
    positive = embed_text(model, text_BSE)
    negative = embed_text(model, jnp.broadcast_to(negative_SE[None], text_BSE.shape))
    given = clean_BFHWC[:, :start]
    clip = generate_many_step(model, noise_BFHWC[:, start:], positive, negative, sampler, blocks, given_BFHWC=given)
    if codec is None:
        return stop_gradient(jnp.flip(clip, axis=1))
    return stop_gradient(codec.encode(jnp.flip(codec.decode(clip), axis=1)).astype(clean_BFHWC.dtype))
