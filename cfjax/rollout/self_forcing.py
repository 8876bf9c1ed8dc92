"""Self-rollout for distribution matching, split in two: generate without gradient, then replay with gradient.

Only each block's exit step carries gradient (paper section 3.2; reference: `pipeline/self_forcing_training.py`,
`SelfForcingTrainingPipeline.inference_with_trajectory`). So `rollout` runs the sequential loop without gradient and
keeps the inputs of that step: its noisy latents and the committed keys and values. `replay_exit` then runs the exit
steps of *all* blocks in one pass: the loop's gradient, from one large pass. Under a memory policy that is a pass for
each block, see `rollout.remembered`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.models.saved import Saved, forward_saving, replay_saved
from cfjax.models.wan import KV, FrameKV, KvGradient, Wan, replay
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_unless_last, denoise_block, empty_cache, loop_blocks, scan_blocks
from cfjax.rollout.remembered import Begin, Exits, Remembered, check_trains, commit_if, empty, replay_remembered

Predict = Callable[[jax.Array, jax.Array], jax.Array]  # (x, sigma) -> x0
BEFORE_EXIT = "steps_before_exit"  # scope of the loop whose length is drawn
Draws = Mapping[str, jax.Array]
Part = tuple[jax.Array, int] | None  # some frames of a video: the first one (traced), and how many; None: all


@dataclass(frozen=True)
class SelfForcing:
    """How the student rolls out while it trains.

    Attributes:
      sigmas: the few-step levels, descending.
      first_sigmas: another list for the first block, or empty.
      context_noise: sigma of the noise added before committing; the reference adds 0.00498 by accident (quirk Q4).
      kv_gradient: the gradient of later blocks into earlier keys and values, see `models.wan.replay`.
      same_exit: one exit step for all blocks (but the first when it has its own list), as in the reference.
      save_activations: the exit steps keep each layer's output, so that the replay has no forward pass of its own.
      rolling: the share of rollouts that are made by windows of blocks (`rollout.rolling_training`).
    """

    sigmas: tuple[float, ...]
    first_sigmas: tuple[float, ...] = ()
    context_noise: float = 0.0
    kv_gradient: KvGradient = "detached"
    same_exit: bool = True
    save_activations: bool = False
    rolling: float = 0.0

    def __post_init__(self) -> None:
        for name, levels in (("steps", self.sigmas), ("first_steps", self.first_sigmas)):
            if list(levels) != sorted(set(levels), reverse=True):
                raise UserError(f"objective.{name}: levels {levels} do not descend; name the noisiest step first")
            if levels and levels[-1] <= 0.0:
                raise UserError(f"objective.{name}: its last level is 0, where every rollout ends; leave that 0 out")
        if not self.sigmas:
            raise UserError("objective.steps is empty; the paper's are (1000, 750, 500, 250)")
        if self.kv_gradient not in get_args(KvGradient):
            raise UserError(f"objective.kv_gradient={self.kv_gradient!r}: use {' or '.join(get_args(KvGradient))}")
        if not 0.0 <= self.context_noise < 1.0:
            raise UserError(f"objective.context_noise={self.context_noise}: a sigma, 0 (none) or more and less than 1")
        if not 0.0 <= self.rolling <= 1.0:
            raise UserError(f"objective.rolling={self.rolling}: a share of the rollouts, 0 (none) to 1 (all)")
        if self.rolling and self.first_sigmas:
            raise UserError("objective.first_steps: with objective.rolling there is one list of steps; leave it empty")

    def tables(self, num_blocks: int) -> tuple[jax.Array, np.ndarray]:
        """Levels of every block, [blocks, J + 1], zero-padded at the end, and the number of steps of each."""
        lists: Sequence[tuple[float, ...]] = [self.first_sigmas or self.sigmas] + [self.sigmas] * (num_blocks - 1)
        width = max(len(row) for row in lists) + 1
        padded = np.array([list(row) + [0.0] * (width - len(row)) for row in lists], np.float32)
        return jnp.asarray(padded), np.array([len(row) for row in lists], np.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """The results of a self-rollout, all without gradient.

    x_exit_BFHWC, sigma_exit_BF: input and level of each frame's exit step.
    x0_BFHWC: the generated video (prediction at the exit step).
    context: committed keys and values, the replay's context; zeros for the last block, which no other block sees.
    saved: every layer's output in the exit steps, if they were kept.
    begin, state: where a rollout began that goes on from another, and the policy's state after it.
    """

    x_exit_BFHWC: jax.Array
    sigma_exit_BF: jax.Array
    x0_BFHWC: jax.Array
    context: FrameKV
    saved: Saved | None = None
    begin: Begin | None = None
    state: Any = None


def draw_rollout(key: jax.Array, shape: tuple[int, ...], config: SelfForcing, blocks: Blocks) -> dict[str, jax.Array]:
    """Random numbers of one rollout of shape [B, F, H, W, C].

    noise_BFHWC; renoise_BFJHWC, the fresh noise between steps; context_BFHWC; exit_G, an exit step per block. With
    `config.rolling` also rolls, whether it is one by windows, and residue, which of these give the video.
    """
    num_blocks = len(blocks.spans(shape[1]))
    _, lengths = config.tables(num_blocks)
    keys = jax.random.split(key, 5)
    steps = int(lengths.max())
    normal = lambda k, s: jax.random.normal(k, s, jnp.float32)
    rest = jax.random.randint(keys[3], (num_blocks,), 0, len(config.sigmas))
    if config.same_exit:
        rest = jnp.broadcast_to(rest[-1:], rest.shape)
    own_first = jax.random.randint(keys[4], (), 0, int(lengths[0]))
    exits = rest.at[0].set(own_first) if config.first_sigmas else rest
    windows: dict[str, jax.Array] = {}
    if config.rolling:
        key_rolls, key_residue = jax.random.split(jax.random.fold_in(key, num_blocks))
        windows = {
            "rolls": jax.random.uniform(key_rolls) < config.rolling,
            "residue": jax.random.randint(key_residue, (), 0, len(config.sigmas)),
        }
    return {
        **windows,
        "noise_BFHWC": normal(keys[0], shape),
        "renoise_BFJHWC": normal(keys[1], (*shape[:2], max(steps - 1, 1), *shape[2:])),
        "context_BFHWC": normal(keys[2], shape),
        "exit_G": exits.astype(jnp.int32),
    }


def _until_exit(
    predict: Predict, x: jax.Array, renoise: jax.Array, levels: jax.Array, exit_step: jax.Array
) -> jax.Array:
    """The input of a block's exit step."""

    def step(j: jax.Array, x: jax.Array) -> jax.Array:
        eps = jax.lax.dynamic_index_in_dim(renoise, j, axis=2, keepdims=False)
        return add_noise(predict(x, levels[j]), eps, levels[j + 1])

    with jax.named_scope(BEFORE_EXIT):
        return jax.lax.fori_loop(0, exit_step, step, x)


@jax.named_scope("self_rollout")
def rollout(
    model: Wan,
    text_kv: KV,
    draws: dict[str, jax.Array],
    config: SelfForcing,
    blocks: Blocks,
    *,
    count: jax.Array | None = None,
    save: bool = False,
    begin: Begin | None = None,
) -> Rollout:
    """Generates a video with the student's own cache, each block stopped at its exit step; no gradient.

    One compile whatever the exit steps: they are traced, and the loop before the exit is a `fori_loop`. The number of
    blocks may be traced too: `count` stops after so many, and leaves zeros behind them; None makes all that were drawn.
    With `save`, the exit steps keep what their gradient needs. With a `begin`, which needs a memory policy, the rollout
    goes on from another one: it leaves zeros for the blocks before its first, and commits the last.
    """
    check_trains(blocks, kv_gradient=config.kv_gradient, save_activations=save)
    shape = draws["noise_BFHWC"].shape
    spans = blocks.spans(shape[1])
    levels_GJ, _ = config.tables(len(spans))
    if draws["exit_G"].shape != (len(spans),):
        raise UserError(f"exit_G has shape {draws['exit_G'].shape}; {len(spans)} blocks need ({len(spans)},)")
    starts = jnp.asarray([start for start, _ in spans], jnp.int32)
    last = starts[(len(spans) if count is None else jnp.minimum(count, len(spans))) - 1]
    origin = begin.origin if begin else 0

    def block(cache: Any, start: jax.Array, inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        (x, renoise, context_eps), (levels, exit_step) = inputs
        past = cache.state if isinstance(cache, Remembered) else cache

        def predict(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return x0_from_flow(denoise_block(model, x, sigma, text_kv, past, origin + start, blocks), x, sigma)

        x_exit = _until_exit(predict, x, renoise, levels, exit_step)
        sigma_BF = jnp.broadcast_to(levels[exit_step], x.shape[:2])
        if save:
            with jax.named_scope("denoise_block"):
                saved = forward_saving(model, x_exit, sigma_BF, text_kv, cache, start, blocks)
            x0 = x0_from_flow(saved.flow_BFHWC, x_exit, sigma_BF)
        else:
            saved, x0 = None, predict(x_exit, levels[exit_step])
        seen = add_noise(x0, context_eps, config.context_noise)
        if isinstance(cache, Remembered):
            cache = commit_if(
                True if begin else start < last, model, seen, text_kv, cache, start, blocks, origin=origin
            )
        elif len(spans) > 1:
            cache = commit_unless_last(model, seen, text_kv, cache, start, blocks, last)
        return cache, (x_exit, sigma_BF, x0, saved)

    frames = tuple(draws[name] for name in ("noise_BFHWC", "renoise_BFJHWC", "context_BFHWC"))
    work = (block, _before(model, shape, blocks, begin), frames, (levels_GJ, draws["exit_G"]), shape[1], blocks)
    if count is None and begin is None:
        return _result(*scan_blocks(*work), begin)
    number, first = len(spans) if count is None else count, begin.first if begin else 0
    return _result(*loop_blocks(*work, number, first=first), begin)


def _result(cache: Any, outputs: tuple[Any, ...], begin: Begin | None) -> Rollout:
    """The rollout, of what is carried after the last block and what each block gave."""
    x_exit, sigma_exit, x0, saved = outputs
    state, kept = (cache.state, cache.kept) if isinstance(cache, Remembered) else (None, cache)
    context = FrameKV(kept.k_LBFTNK, kept.v_LBFTNK)
    return jax.lax.stop_gradient(Rollout(x_exit, sigma_exit, x0, context, saved, begin, state if begin else None))


def _before(model: Wan, shape: tuple[int, ...], blocks: Blocks, begin: Begin | None) -> Any:
    """What a rollout carries, before its first block."""
    if blocks.memory is None:
        return empty_cache(model.config, shape, Blocks(frames=blocks.frames))
    return empty(model.config, shape, blocks, begin.state if begin else None)


@jax.named_scope("replay_exit_steps")
def replay_exit(
    model: Wan, text_kv: KV, rolled: Rollout, config: SelfForcing, blocks: Blocks, *, start: jax.Array | None = None
) -> jax.Array:
    """The generated video again, x0_BFHWC, now with gradient through every block's exit step, in one pass (under
    a memory policy, one per block).

    With a `start`, traced, `rolled` holds a stretch of a longer video (but its context whole), see `models.wan.replay`.
    """
    if blocks.memory is not None:
        check_trains(blocks, kv_gradient=config.kv_gradient, save_activations=rolled.saved is not None)
        exits = (rolled.x_exit_BFHWC, rolled.sigma_exit_BF, rolled.x0_BFHWC, rolled.context)
        return replay_remembered(model, text_kv, Exits(*exits, start, rolled.begin), blocks)
    given = (model, rolled.x_exit_BFHWC, rolled.sigma_exit_BF, text_kv, rolled.context)
    if rolled.saved is None:
        v = replay(*given, blocks, kv_gradient=config.kv_gradient, start=start)
    else:
        v = replay_saved(*given, rolled.saved, blocks, kv_gradient=config.kv_gradient, start=start)
    return x0_from_flow(v, rolled.x_exit_BFHWC, rolled.sigma_exit_BF)


def cut(video_BFHWC: jax.Array, part: Part) -> jax.Array:
    """Some frames of a video."""
    return video_BFHWC if part is None else jax.lax.dynamic_slice_in_dim(video_BFHWC, *part, axis=1)


def video_by_blocks(
    model: Wan,
    text_kv: KV,
    draws: Draws,
    config: SelfForcing,
    blocks: Blocks,
    *,
    gradient: bool,
    count: jax.Array | None = None,
    part: Part = None,
) -> tuple[jax.Array, jax.Array]:
    """A video generated block by block: the part of it, with gradient if asked for, and all of it without.

    Args:
      count: as of `rollout`.
    """
    save = gradient and config.save_activations
    rolled = rollout(*jax.lax.stop_gradient((model, text_kv)), dict(draws), config, blocks, count=count, save=save)
    if not gradient:
        return cut(rolled.x0_BFHWC, part), rolled.x0_BFHWC
    stretch = rolled
    if part is not None:
        per_frame = (rolled.x_exit_BFHWC, rolled.sigma_exit_BF, rolled.x0_BFHWC, rolled.saved)
        x, sigma_BF, made, saved = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, *part, axis=1), per_frame)
        stretch = replace(rolled, x_exit_BFHWC=x, sigma_exit_BF=sigma_BF, x0_BFHWC=made, saved=saved)
    x0 = replay_exit(model, text_kv, stretch, config, blocks, start=None if part is None else part[0])
    return x0, rolled.x0_BFHWC
