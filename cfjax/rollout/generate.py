"""Samplers: few-step and many-step causal, and bidirectional. Pure functions of noise; jit them whole.

Network calls for a video of n blocks (`network_calls` counts them): few-step n (steps + 1); many-step n (2 steps + 2)
with guidance's two branches counted; bidirectional 2 steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.guidance import guide
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.flow.schedule import sigma_table, unipc_grid, warp_steps
from cfjax.flow.solvers import SOLVERS
from cfjax.models.cache import KVCache, init_cache
from cfjax.models.wan import KV, Wan, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, denoise_block, scan_blocks


@dataclass(frozen=True)
class FewStep:
    """The distilled student's sampler: predict x0, re-noise with fresh noise, repeat (PyTorch reference).

    Attributes:
      steps: integer timesteps before warping, descending.
      first_steps: another list for the first block (1- and 2-step models), or empty.
      shift: timestep shift of the table that warps them.
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int, ...] = ()
    shift: float = 5.0

    def sigmas(self) -> np.ndarray:
        return warp_steps(self.steps, self.shift)

    def first_sigmas(self) -> np.ndarray:
        return warp_steps(self.first_steps or self.steps, self.shift)


@dataclass(frozen=True)
class ManyStep:
    """A PF-ODE sampler with classifier-free guidance (PyTorch reference): UniPC, 50 steps, shift 5, scale 3."""

    solver: str = "unipc"
    steps: int = 50
    shift: float = 5.0
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"sampler.solver={self.solver!r}: use one of {', '.join(SOLVERS)}")

    def grid(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Solver sigmas [N + 1], and what the network is told if that differs."""
        if self.solver == "unipc":
            sigmas, timesteps = unipc_grid(self.steps, self.shift)
            return sigmas, timesteps / 1000.0
        return np.append(sigma_table(self.steps, self.shift), np.float32(0.0)), None


def few_step_block(
    model: Wan,
    noise_BFHWC: jax.Array,
    renoise_JBFHWC: jax.Array,
    sigmas: Sequence[float] | np.ndarray,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> jax.Array:
    """One block by few-step sampling; `renoise` [J - 1 or more, B, ...] is the fresh noise between steps."""
    levels = jnp.asarray(np.append(np.asarray(sigmas, np.float32), np.float32(0.0)))
    steps = len(levels) - 1
    # After the last step the next level is 0 and the noise vanishes.
    fresh = jnp.concatenate([renoise_JBFHWC[: steps - 1], jnp.zeros_like(noise_BFHWC)[None]], axis=0)

    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        sigma, sigma_next, eps = inputs
        v = denoise_block(model, x, sigma, text_kv, cache, start, blocks)
        return add_noise(x0_from_flow(v, x, sigma), eps, sigma_next), None

    return jax.lax.scan(step, noise_BFHWC, (levels[:-1], levels[1:], fresh))[0]


def renoise_draws(key: jax.Array, noise_BFHWC: jax.Array, steps: int) -> jax.Array:
    """Fresh noise [B, F, J, H, W, C] for the steps after the first; J = steps - 1, at least 1."""
    shape = noise_BFHWC.shape
    return jax.random.normal(key, (*shape[:2], max(steps - 1, 1), *shape[2:]), jnp.float32)


def generate_few_step(
    model: Wan,
    noise_BFHWC: jax.Array,
    text_kv: KV,
    key: jax.Array,
    sampler: FewStep,
    blocks: Blocks,
    *,
    renoise_BFJHWC: jax.Array | None = None,
) -> jax.Array:
    """A whole video by few-step causal sampling: latents_BFHWC, float32. `renoise` may be injected."""
    batch, num_frames, height, width, _ = noise_BFHWC.shape
    sigmas, first = sampler.sigmas(), sampler.first_sigmas()
    steps = max(len(sigmas), len(first))
    renoise = renoise_draws(key, noise_BFHWC, steps) if renoise_BFJHWC is None else renoise_BFJHWC
    tokens = model.config.tokens_per_frame(height, width)
    cache = init_cache(model.config, batch, num_frames, tokens, blocks)

    def block(levels: np.ndarray, cache: KVCache, start: jax.Array, inputs: Any) -> tuple[KVCache, jax.Array]:
        (noise, fresh), _ = inputs
        x0 = few_step_block(model, noise, jnp.moveaxis(fresh, 2, 0), levels, text_kv, cache, start, blocks)
        return commit_block(model, x0, text_kv, cache, start, blocks), x0

    draws = (noise_BFHWC, renoise)
    if not sampler.first_steps:
        return scan_blocks(lambda *a: block(sigmas, *a), cache, draws, None, num_frames, blocks)[1]
    size = blocks.spans(num_frames)[0][1]
    head, tail = jax.tree.map(lambda x: x[:, :size], draws), jax.tree.map(lambda x: x[:, size:], draws)
    cache, x0 = block(first, cache, jnp.int32(0), (head, None))
    if num_frames == size:
        return x0
    rest = scan_blocks(lambda *a: block(sigmas, *a), cache, tail, None, num_frames - size, blocks, start=size)[1]
    return jnp.concatenate([x0, rest], axis=1)


def both_prompts(positive: KV, negative: KV) -> KV:
    """Positive and negative prompt stacked along the batch axis: guidance costs one network call of twice the batch."""
    return KV(*(jnp.concatenate([p, n], axis=1) for p, n in zip(positive, negative, strict=True)))


def _twice(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x], axis=0)


def generate_many_step(
    model: Wan, noise_BFHWC: jax.Array, positive: KV, negative: KV, sampler: ManyStep, blocks: Blocks
) -> jax.Array:
    """A whole video by the AR diffusion teacher: a fresh ODE solve per block, both prompts' caches side by side."""
    batch, num_frames, height, width, _ = noise_BFHWC.shape
    text_kv = both_prompts(positive, negative)
    sigmas, told = sampler.grid()
    cache = init_cache(model.config, 2 * batch, num_frames, model.config.tokens_per_frame(height, width), blocks)

    def block(cache: KVCache, start: jax.Array, inputs: Any) -> tuple[KVCache, jax.Array]:
        (noise,), _ = inputs

        def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
            v = denoise_block(model, _twice(x), sigma, text_kv, cache, start, blocks)
            positive, negative = jnp.split(v, 2)
            return guide(positive, negative, sampler.guidance, "sampling")

        x0 = SOLVERS[sampler.solver](velocity, noise, sigmas, model_sigmas=told)
        return commit_block(model, _twice(x0), text_kv, cache, start, blocks), x0

    return scan_blocks(block, cache, (noise_BFHWC,), None, num_frames, blocks)[1]


def generate_bidirectional(
    model: Wan, noise_BFHWC: jax.Array, positive: KV, negative: KV, sampler: ManyStep
) -> jax.Array:
    """A whole video by the bidirectional teacher: one ODE solve over all frames."""
    text_kv = both_prompts(positive, negative)
    sigmas, told = sampler.grid()

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        v = model(_twice(x), jnp.broadcast_to(sigma, (2 * x.shape[0], x.shape[1])), text_kv)
        positive, negative = jnp.split(v, 2)
        return guide(positive, negative, sampler.guidance, "sampling")

    return SOLVERS[sampler.solver](velocity, noise_BFHWC, sigmas, model_sigmas=told)


def network_calls(sampler: FewStep | ManyStep, blocks: Blocks | None, num_frames: int) -> int:
    """Network evaluations per video, guidance branches and cache commits counted; `blocks=None` is bidirectional."""
    if isinstance(sampler, FewStep):
        assert blocks is not None
        rest = len(blocks.spans(num_frames)) - 1
        return len(sampler.first_sigmas()) + 1 + rest * (len(sampler.sigmas()) + 1)
    per_solve = 2 * sampler.steps - 1 if sampler.solver == "heun" else sampler.steps
    if blocks is None:
        return 2 * per_solve
    return len(blocks.spans(num_frames)) * 2 * (per_solve + 1)


def generate(
    model: Wan,
    noise_BFHWC: jax.Array,
    text_BSE: jax.Array,
    negative_SE: jax.Array,
    key: jax.Array,
    sampler: FewStep | ManyStep,
    blocks: Blocks | None,
) -> jax.Array:
    """Text rows and noise to latents_BFHWC, by whichever sampler; `blocks=None` is bidirectional."""
    positive = embed_text(model, text_BSE)
    if isinstance(sampler, FewStep):
        return generate_few_step(model, noise_BFHWC, positive, key, sampler, blocks or Blocks(noise_BFHWC.shape[1]))
    negative = embed_text(model, jnp.broadcast_to(negative_SE[None], text_BSE.shape))
    if blocks is None:
        return generate_bidirectional(model, noise_BFHWC, positive, negative, sampler)
    return generate_many_step(model, noise_BFHWC, positive, negative, sampler, blocks)
