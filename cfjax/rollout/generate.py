"""Samplers: few-step and many-step causal, and bidirectional. Pure functions of noise; jit them whole.

Network calls for a video of n blocks (`network_calls` counts them): few-step n (steps + 1) - 1, as the last block is
not committed; many-step 2 n (steps + 1) - 2 with guidance's two branches counted; bidirectional 2 steps; rolling
2 n + steps - 2, of which n + steps - 1 over a window of `steps` blocks. Where commits are fused
(`rollout.blocks.commit_and_denoise`), few-step makes them in n steps passes. Many-step does not fuse: it would save one
pass of 51 per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.guidance import doubled, guided, joined
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.flow.schedule import check_steps, sigma_table, unipc_grid, warp_steps
from cfjax.flow.solvers import SOLVERS
from cfjax.memory.rolling import RollingForcing
from cfjax.models.cache import KVCache
from cfjax.models.experts import Conditioned, Experts
from cfjax.models.wan import KV, Wan, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import (
    FusedCommit,
    commit_and_denoise,
    commit_given,
    commit_unless_last,
    denoise_block,
    empty_cache,
    fuses,
    given_blocks,
    last_block_of,
    layout_from,
    scan_blocks,
)
from cfjax.rollout.rolling import generate_rolling, rolling_layout


def check_strength(strength: float) -> None:
    """Raises UserError for what is no noise level."""
    if not 0.0 <= strength <= 1.0:
        raise UserError(f"strength={strength}: use a noise level from 0 (the video itself) to 1 (pure noise)")


def levels_from(strength: float, levels: np.ndarray) -> np.ndarray:
    """The levels of a sampler that begins at this one: it, and those below it. None of 0: nothing is left to do."""
    if strength >= levels[0]:
        return levels
    start = [strength] if strength else []
    return np.array([*start, *levels[levels < strength]], np.float32)


@dataclass(frozen=True)
class FewStep:
    """The distilled student's sampler: predict x0, re-noise with fresh noise, repeat.

    Reference: `pipeline/causal_inference.py`, `CausalInferencePipeline`.

    Attributes:
      steps: integer timesteps before warping, descending.
      first_steps: another list for the first block (1- and 2-step models), or empty.
      shift: timestep shift of the table that warps them.
      strength: the noise level that a given video is brought to, in place of the levels above it; 1: pure noise.
      rolling: blocks at all levels are denoised together (Rolling Forcing, `rollout.rolling`).
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int, ...] = ()
    shift: float = 5.0
    strength: float = 1.0
    rolling: bool = False

    def __post_init__(self) -> None:
        check_steps("sampler.steps", self.steps)
        if self.first_steps:
            check_steps("sampler.first_steps", self.first_steps)
        check_strength(self.strength)
        if self.rolling and self.first_steps:
            raise UserError(
                f"sampler.first_steps={self.first_steps}: kind='rolling' has one list of steps; leave it out"
            )
        if self.rolling and self.strength < 1.0:
            raise UserError(f"strength={self.strength}: not with sampler.kind='rolling'; use kind='few_step'")

    def sigmas(self) -> np.ndarray:
        return levels_from(self.strength, warp_steps(self.steps, self.shift))

    def first_sigmas(self) -> np.ndarray:
        return levels_from(self.strength, warp_steps(self.first_steps or self.steps, self.shift))


@dataclass(frozen=True)
class ManyStep:
    """A PF-ODE sampler with classifier-free guidance: UniPC, 50 steps, shift 5, scale 3.

    Reference: `pipeline/causal_diffusion_inference.py`, `CausalDiffusionInferencePipeline`. `strength` as of `FewStep`.
    """

    solver: str = "unipc"
    steps: int = 50
    shift: float = 5.0
    guidance: float = 3.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"sampler.solver={self.solver!r}: use one of {', '.join(SOLVERS)}")
        check_strength(self.strength)

    def grid(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Solver sigmas [N + 1], and the levels that the network is conditioned on if these differ."""
        if self.solver == "unipc":
            sigmas, timesteps = unipc_grid(self.steps, self.shift)
            levels = levels_from(self.strength, sigmas)
            if len(levels) == len(sigmas) and levels[0] == sigmas[0]:
                return sigmas, timesteps / 1000.0
            kept = timesteps[len(timesteps) + 2 - len(levels) :] if len(levels) > 1 else timesteps[:0]
            return levels, np.append(np.floor(1000 * levels[: min(len(levels) - 1, 1)]), kept) / 1000.0
        return levels_from(self.strength, np.append(sigma_table(self.steps, self.shift), np.float32(0.0))), None


def layout_of(sampler: FewStep | ManyStep, blocks: Blocks | None) -> Blocks | None:
    """The block layout as a sampler needs it: a rolling one has a memory of its own, see `rolling_layout`.

    Raises:
      UserError: they do not go together.
    """
    if isinstance(sampler, FewStep) and sampler.rolling:
        return rolling_layout(blocks, len(sampler.steps))
    if blocks is not None and isinstance(blocks.memory, RollingForcing):
        raise UserError("memory='rolling_forcing' is for sampler.kind='rolling': set that too, or another memory")
    return blocks


def few_step_block(
    model: Wan,
    noise_BFHWC: jax.Array,
    renoise_JBFHWC: jax.Array,
    sigmas: Sequence[float] | np.ndarray | jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
    *,
    first_flow: jax.Array | None = None,
) -> jax.Array:
    """One block by few-step sampling; `renoise` [J - 1 or more, B, ...] is the fresh noise between steps.

    Args:
      noise_BFHWC: what it begins with: noise, or a given video at the first level.
      sigmas: the levels; may be traced.
      first_flow: the flow at the first level, if that is known already.
    """
    levels = jnp.append(jnp.asarray(sigmas, jnp.float32), jnp.float32(0.0))
    steps = len(levels) - 1
    if not steps:
        return noise_BFHWC
    # After the last step the next level is 0 and the noise vanishes.
    fresh = jnp.concatenate([renoise_JBFHWC[: steps - 1], jnp.zeros_like(noise_BFHWC)[None]], axis=0)

    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        sigma, sigma_next, eps = inputs
        v = denoise_block(model, x, sigma, text_kv, cache, start, blocks)
        return add_noise(x0_from_flow(v, x, sigma), eps, sigma_next), None

    todo = (levels[:-1], levels[1:], fresh)
    if first_flow is None:
        return jax.lax.scan(step, noise_BFHWC, todo)[0]
    x = add_noise(x0_from_flow(first_flow, noise_BFHWC, levels[0]), fresh[0], levels[1])
    return x if steps == 1 else jax.lax.scan(step, x, jax.tree.map(lambda x: x[1:], todo))[0]


def fused_block(
    model: Wan,
    clean_BFHWC: jax.Array,
    noise_BFHWC: jax.Array,
    renoise_JBFHWC: jax.Array,
    sigmas: Sequence[float] | np.ndarray,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, KVCache]:
    """`few_step_block`, whose first pass commits the clean block before it as well; also the cache with that block."""
    level = jnp.float32(sigmas[0])
    flow, cache = commit_and_denoise(model, clean_BFHWC, noise_BFHWC, level, text_kv, cache, start, blocks)
    work = (model, noise_BFHWC, renoise_JBFHWC, sigmas, text_kv, cache, start, blocks)
    return few_step_block(*work, first_flow=flow), cache


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
    given_BFHWC: jax.Array | None = None,
    fused_commit: FusedCommit = "auto",
) -> jax.Array:
    """A whole video by few-step causal sampling: latents_BFHWC, float32.

    Args:
      noise_BFHWC: one frame of noise per frame to generate.
      renoise_BFJHWC: the fresh noise between steps (None: drawn from `key`).
      given_BFHWC: frames that precede them (an encoded image, the end of another video) and are part of the result.
        The first generated block is then the one with `first_steps`.
      fused_commit: whether a block's first pass commits the one before it; the same video.
    """
    layout = layout_of(sampler, blocks)
    assert layout is not None
    blocks, sigmas, first = layout, sampler.sigmas(), sampler.first_sigmas()
    fused, steps = fuses(fused_commit, memory=blocks.memory), max(len(sigmas), len(first))
    draws = (noise_BFHWC, renoise_draws(key, noise_BFHWC, steps) if renoise_BFJHWC is None else renoise_BFJHWC)
    if sampler.rolling:
        return generate_rolling(model, *draws, sigmas, text_kv, blocks, given_BFHWC=given_BFHWC)
    num_frames, parts, done = noise_BFHWC.shape[1], [given_BFHWC], 0
    cache, start, known = _started(model, noise_BFHWC, text_kv, blocks, given_BFHWC, fused=fused)
    spans = layout_from(blocks, start).spans(num_frames)

    def block(levels: np.ndarray, carry: Any, start_: jax.Array, inputs: Any) -> tuple[Any, jax.Array]:
        (cache, known), ((noise, fresh), _) = carry, inputs
        work = (noise, jnp.moveaxis(fresh, 2, 0), levels, text_kv, cache, start_, blocks)
        if known is not None:
            x0, cache = fused_block(model, known, *work)
            return (cache, x0), x0
        x0 = few_step_block(model, *work)
        if fused or len(spans) == 1:
            return (cache, x0 if fused else None), x0
        return (commit_unless_last(model, x0, text_kv, cache, start_, blocks, start + spans[-1][0]), None), x0

    carry: Any = (cache, known)
    for number, (a, b) in enumerate(spans):  # the blocks before those that are all alike
        alike = not fused or (carry[1] is not None and carry[1].shape[1] == b - a == blocks.frames)
        if alike and not (number == 0 and sampler.first_steps):
            break
        own = jax.tree.map(lambda x, a=a, b=b: x[:, a:b], draws)
        carry, x0 = block(sigmas if number else first, carry, jnp.int32(start + a), (own, None))
        parts, done = [*parts, x0], b
    if done < num_frames:
        rest = jax.tree.map(lambda x: x[:, done:], draws)
        work = (carry, rest, None, num_frames - done, blocks)
        parts.append(scan_blocks(partial(block, sigmas), *work, start=start + done)[1])
    return _joined(*parts)


def _started(
    model: Wan, noise_BFHWC: jax.Array, text_kv: KV, blocks: Blocks, given_BFHWC: jax.Array | None, *, fused: bool
) -> tuple[KVCache, int, jax.Array | None]:
    """The cache before the first generated block, that block's first frame, and the block that it is to commit."""
    start = 0 if given_BFHWC is None else given_BFHWC.shape[1]
    rows, num_frames, size = text_kv.k_LBSNK.shape[1], noise_BFHWC.shape[1], noise_BFHWC.shape[2:]
    cache, known = empty_cache(model.config, (rows, start + num_frames, *size), blocks), None
    if given_BFHWC is None:
        return cache, start, None
    if fused:
        given_BFHWC, known = last_block_of(given_BFHWC, blocks)
    if given_BFHWC.shape[1]:
        cache = commit_given(model, given_BFHWC, text_kv, cache, blocks)
    return cache, start, known


def _joined(*parts: jax.Array | None) -> jax.Array:
    """Frames in a row; None is nothing."""
    known = [part for part in parts if part is not None]
    return known[0] if len(known) == 1 else jnp.concatenate(known, axis=1)


def both_prompts(positive: KV, negative: KV) -> KV:
    """The text's keys and values for `flow.guidance.guided`: the positive prompts', then the negative ones'."""
    return joined(positive, negative, axis=1)


def many_step_block(
    model: Wan,
    noise_BFHWC: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    sampler: ManyStep,
    blocks: Blocks,
) -> jax.Array:
    """One block by a fresh ODE solve; text and cache hold both prompts (`both_prompts`)."""
    sigmas, model_sigmas = sampler.grid()
    if len(sigmas) < 2:
        return noise_BFHWC

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        flow = lambda x: denoise_block(model, x, sigma, text_kv, cache, start, blocks)
        return guided(flow, x, sampler.guidance)

    return SOLVERS[sampler.solver](velocity, noise_BFHWC, sigmas, model_sigmas=model_sigmas)


def generate_many_step(
    model: Wan,
    noise_BFHWC: jax.Array,
    positive: KV,
    negative: KV,
    sampler: ManyStep,
    blocks: Blocks,
    *,
    given_BFHWC: jax.Array | None = None,
) -> jax.Array:
    """A whole video by the AR diffusion teacher: a fresh ODE solve per block, both prompts' caches side by side.

    `given_BFHWC` as in `generate_few_step`.
    """
    text_kv = both_prompts(positive, negative)
    given = None if given_BFHWC is None else doubled(given_BFHWC)
    cache, start, _ = _started(model, noise_BFHWC, text_kv, blocks, given, fused=False)
    num_frames = noise_BFHWC.shape[1]
    last = start + layout_from(blocks, start).spans(num_frames)[-1][0]

    def block(cache: KVCache, start: jax.Array, inputs: Any) -> tuple[KVCache, jax.Array]:
        x0 = many_step_block(model, inputs[0], text_kv, cache, start, sampler, blocks)
        if num_frames > blocks.frames:  # two blocks or more
            cache = commit_unless_last(model, doubled(x0), text_kv, cache, start, blocks, last)
        return cache, x0

    x0 = scan_blocks(block, cache, noise_BFHWC, None, num_frames, blocks, start=start)[1]
    return _joined(given_BFHWC, x0)


def generate_bidirectional(
    model: Wan | Conditioned | Experts,
    noise_BFHWC: jax.Array,
    positive: KV,
    negative: KV,
    sampler: ManyStep,
    *,
    given_BFHWC: jax.Array | None = None,
) -> jax.Array:
    """The frames after the given ones, by the bidirectional teacher: one ODE solve over all of them.

    Args:
      given_BFHWC: clean frames before them (an encoded image), which the network sees at noise level 0 in every step,
        as Wan2.2-TI2V-5B was trained (its release: `wan/textimage2video.py`, `WanTI2V.i2v`).
    """
    text_kv = both_prompts(positive, negative)
    sigmas, model_sigmas = sampler.grid()
    if len(sigmas) < 2:
        return noise_BFHWC
    given = noise_BFHWC[:, :0] if given_BFHWC is None else given_BFHWC
    count = given.shape[1]

    def flow(x: jax.Array, sigma: jax.Array) -> jax.Array:
        levels = jnp.broadcast_to(sigma, x.shape[:2])
        if not count:
            return model(x, levels, text_kv)
        before = doubled(given)
        levels = jnp.concatenate([jnp.zeros(before.shape[:2], levels.dtype), levels], axis=1)
        return model(jnp.concatenate([before, x], axis=1), levels, text_kv)[:, count:]

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        scale = model.guidance(sigma, sampler.guidance) if isinstance(model, Experts) else sampler.guidance
        return guided(lambda x: flow(x, sigma), x, scale)

    return SOLVERS[sampler.solver](velocity, noise_BFHWC, sigmas, model_sigmas=model_sigmas)


def network_calls(sampler: FewStep | ManyStep, blocks: Blocks | None, num_frames: int, given: int = 0) -> int:
    """Network evaluations per video, guidance branches and cache commits counted; `blocks=None` is bidirectional.

    A pass that is a commit and a step at once counts as both. The last block is not committed. A rolling sampler's pass
    over a window counts as one.

    Args:
      num_frames: frames to generate.  given: frames before them, whose blocks are committed only.
    """
    per_solve = 0
    if isinstance(sampler, ManyStep):
        steps = max(len(sampler.grid()[0]) - 1, 0)
        per_solve = max(2 * steps - 1, 0) if sampler.solver == "heun" else steps
    if blocks is None:
        return 2 * per_solve
    commits, count = given_blocks(blocks, given), len(layout_from(blocks, given).spans(num_frames))
    if isinstance(sampler, FewStep) and sampler.rolling:
        return commits + count + len(sampler.steps) - 1 + count - 1
    if isinstance(sampler, FewStep):
        return commits + len(sampler.first_sigmas()) + (count - 1) * (len(sampler.sigmas()) + 1)
    return 2 * (commits + count * (per_solve + 1) - 1)


def generate(
    model: Wan,
    noise_BFHWC: jax.Array,
    text_BSE: jax.Array,
    negative_SE: jax.Array,
    key: jax.Array,
    sampler: FewStep | ManyStep,
    blocks: Blocks | None,
    given_BFHWC: jax.Array | None = None,
) -> jax.Array:
    """Text rows and noise to latents_BFHWC, by whichever sampler; `blocks=None` is bidirectional.

    Raises:
      UserError: given frames that end inside a block.
    """
    positive = embed_text(model, text_BSE)
    if isinstance(sampler, FewStep):
        layout = blocks or Blocks(noise_BFHWC.shape[1])
        return generate_few_step(model, noise_BFHWC, positive, key, sampler, layout, given_BFHWC=given_BFHWC)
    negative = embed_text(model, jnp.broadcast_to(negative_SE[None], text_BSE.shape))
    if blocks is not None:
        return generate_many_step(model, noise_BFHWC, positive, negative, sampler, blocks, given_BFHWC=given_BFHWC)
    new = generate_bidirectional(model, noise_BFHWC, positive, negative, sampler, given_BFHWC=given_BFHWC)
    return _joined(given_BFHWC, new)
