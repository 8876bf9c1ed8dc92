"""Rolling Forcing (arXiv 2509.25161): blocks at all noise levels of a few-step sampler, denoised together.

A window holds as many blocks as the sampler has steps, the oldest at the cleanest level and the newest pure noise. One
pass over it brings each block to its next level; the oldest one leaves, is committed, and fresh noise comes in. So a
block takes two passes, one of the window and one commit, and a step sees later blocks as well as earlier ones.

    levels  .625  .833  .938  1.0
    blocks    0     1     2    3    -> block 0 is done; next: 1 2 3 4

Where a video begins and ends, the window holds blocks that do not exist; nothing sees them, and one program serves all.
Source: `CausalInferencePipeline.inference_rolling_forcing` in `long_video/pipeline/rolling_forcing_inference.py` of
Causal Forcing, which also commits the first block while it is half denoised; nothing sees that before its last commit.
With fewer blocks than steps, that code gives blocks levels that they are not at (quirk Q27); here they have their own.
What the passes see is `memory.rolling`'s.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.memory.names import memory_name
from cfjax.memory.rolling import Place, RollingForcing
from cfjax.memory.slots import State
from cfjax.models.experts import Conditioned
from cfjax.models.wan import KV, Wan, backbone
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, commit_given, empty_cache


class Window(NamedTuple):
    """The blocks that are half denoised, oldest first, all but the newest of a pass.

    x_BFHWC: at their levels.  fresh_JBFHWC: the noise between all steps of each.
    """

    x_BFHWC: jax.Array
    fresh_JBFHWC: jax.Array


def rolling_layout(blocks: Blocks | None, steps: int) -> Blocks:
    """The layout with the memory that windows of `steps` blocks need: its own, or one of as many frames as its window.

    Raises:
      UserError: a bidirectional network, another memory policy, or a window that does not hold these blocks.
    """
    if blocks is None:
        raise UserError("sampler.kind='rolling' needs a causal network: a bidirectional one has no blocks")
    memory = blocks.memory
    if memory is None:
        if blocks.sink not in (0, blocks.frames):
            raise UserError(f"sink={blocks.sink}: sampler.kind='rolling' keeps the first block; use {blocks.frames}")
        memory = RollingForcing(blocks.window or RollingForcing.window, blocks.frames)
    if not isinstance(memory, RollingForcing):
        raise UserError(
            f"memory={memory_name(memory)}: sampler.kind='rolling' has its own; leave it out, or use rolling_forcing"
        )
    layout = replace(blocks, window=0, sink=0, memory=memory)
    memory.slots(layout)
    if memory.window < (steps + 1) * blocks.frames:
        raise UserError(
            f"window={memory.window} must hold the first block and {steps} blocks that are denoised together: use "
            f"{(steps + 1) * blocks.frames} or more"
        )
    return layout


def empty_window(shape: tuple[int, ...], steps: int, blocks: Blocks) -> Window:
    """Before the first block of latents of `shape` [B, F, H, W, C]: blocks that do not exist."""
    held = (shape[0], (steps - 1) * blocks.frames, *shape[2:])
    return Window(jnp.zeros(held, jnp.float32), jnp.zeros((steps - 1, *held), jnp.float32))


def window_flow(
    model: Wan | Conditioned,
    x_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: State,
    place: Place,
    blocks: Blocks,
) -> jax.Array:
    """The flow of all frames of a window, each at its own noise level, given the committed past. Reads the cache."""
    frames, config = x_BFHWC.shape[1], model.config
    attend = blocks.memory.window_attention(config, cache, place, frames, blocks)
    positions = place.at + cache.offset + jnp.arange(frames)
    layers = jnp.arange(config.num_layers)
    if isinstance(model, Conditioned):
        x_BFHWC = model.beside(x_BFHWC, place.at)
        model = model.network
    return backbone(model, x_BFHWC, sigma_BF, text_kv, positions, attend, layer_input=layers)[0]


def window_levels(sigmas: Any, blocks: Blocks) -> jax.Array:
    """The noise level of each frame of a window, [F]: the oldest block's is the last of the descending `sigmas`."""
    return jnp.repeat(jnp.asarray(sigmas, jnp.float32)[::-1], blocks.frames)


@jax.named_scope("denoise_window")
def roll(
    model: Wan,
    window: Window,
    own: Window,
    sigmas: np.ndarray | tuple[float, ...],
    text_kv: KV,
    cache: State,
    place: Place,
    blocks: Blocks,
) -> tuple[Window, jax.Array, jax.Array]:
    """One pass over the window and a new block.

    Args:
      own: the new block: noise, and its fresh noise, [steps - 1 or more, B, F, H, W, C].
      sigmas: the sampler's levels, descending.
      place: of the window, the new block included.

    Returns:
      The window that the next block is added to, the input x_BFHWC of this pass, and its prediction x0_BFHWC, whose
      first block is done.
    """
    steps, frames = len(sigmas), blocks.frames
    x = jnp.concatenate([window.x_BFHWC, own.x_BFHWC], axis=1)
    fresh = jnp.concatenate([window.fresh_JBFHWC, own.fresh_JBFHWC[: steps - 1]], axis=2)
    levels_F = window_levels(sigmas, blocks)
    sigma_BF = jnp.broadcast_to(levels_F, x.shape[:2])
    x0 = x0_from_flow(window_flow(model, x, sigma_BF, text_kv, cache, place, blocks), x, sigma_BF)
    if steps == 1:
        return window, x, x0
    # The block of this number, from the oldest on, has made steps - 1 - number steps.
    spans = [(number, slice(number * frames, (number + 1) * frames)) for number in range(1, steps)]
    eps = jnp.concatenate([fresh[steps - 1 - number][:, span] for number, span in spans], axis=1)
    following = add_noise(x0[:, frames:], eps, jnp.broadcast_to(levels_F[:-frames], eps.shape[:2]))
    return Window(following, fresh[:, :, frames:]), x, x0


def generate_rolling(
    model: Wan,
    noise_BFHWC: jax.Array,
    renoise_BFJHWC: jax.Array,
    sigmas: np.ndarray,
    text_kv: KV,
    blocks: Blocks,
    *,
    given_BFHWC: jax.Array | None = None,
) -> jax.Array:
    """A whole video by windows of blocks: latents_BFHWC, float32.

    Args:
      noise_BFHWC, renoise_BFJHWC, given_BFHWC: as of `generate.generate_few_step`; J = steps - 1 or more.
      blocks: see `rolling_layout`.
    """
    frames, steps, shape = blocks.frames, len(sigmas), noise_BFHWC.shape
    start = 0 if given_BFHWC is None else given_BFHWC.shape[1]
    count = len(blocks.spans(shape[1]))
    cache = empty_cache(model.config, shape, blocks)
    if given_BFHWC is not None:
        cache = commit_given(model, given_BFHWC, text_kv, cache, blocks)
    fresh_JBFHWC = jnp.moveaxis(renoise_BFJHWC, 2, 0)[: max(steps - 1, 0)]

    def new_blocks(x: jax.Array, axis: int) -> jax.Array:
        """One per window, along a first axis; none exist after the video's end."""
        padded = jnp.pad(x, [(0, (steps - 1) * frames if i == axis else 0) for i in range(x.ndim)])
        split = padded.reshape(*x.shape[:axis], count + steps - 1, frames, *x.shape[axis + 1 :])
        return jnp.moveaxis(split, axis, 0)

    def one(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        (window, cache), (number, own) = carry, inputs
        at = start + (number - (steps - 1)) * frames
        place = Place(at, start, start + shape[1])
        window, _, x0 = roll(model, window, own, sigmas, text_kv, cache, place, blocks)
        done = x0[:, :frames]
        commit = lambda cache: commit_block(model, done, text_kv, cache, at, blocks)
        is_read = (number >= steps - 1) & (number < count + steps - 2)
        return (window, jax.lax.cond(is_read, commit, lambda cache: cache, cache)), done

    own = Window(new_blocks(noise_BFHWC, 1), new_blocks(fresh_JBFHWC, 2))
    numbers = jnp.arange(count + steps - 1)
    done = jax.lax.scan(one, (empty_window(shape, steps, blocks), cache), (numbers, own))[1][steps - 1 :]
    made = jnp.moveaxis(done, 0, 1).reshape(shape)
    return made if given_BFHWC is None else jnp.concatenate([given_BFHWC, made], axis=1)
