"""Self-rollout by windows of blocks (Rolling Forcing, arXiv 2509.25161): generate without gradient, replay with it.

Every block is in as many windows as there are steps, at another level in each. A number r is drawn, and the windows w
with w mod steps = r are those that give the video and carry gradient: each block is in one of them, so that a video
has blocks at all levels (`inference_with_rolling_forcing` in `long_video/pipeline/rolling_forcing_training.py` of
Causal Forcing). As in `rollout.self_forcing`, the loop runs without gradient and keeps the inputs of these windows;
then they run again, with gradient, against the committed keys and values. All of those stay stored: what a window sees
of them follows from its place.

The reference's processes draw r each for itself, and windows before those that the scores see leave zeros (quirk Q28);
here r is one for all, and every block is the video's. No gradient reaches keys and values of earlier blocks, and no
noise is added to what is committed (`kv_gradient` and `context_noise` are of rollouts block by block).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, stop_gradient

from cfjax.flow.path import x0_from_flow
from cfjax.memory.slots import State
from cfjax.models.wan import KV, Wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, empty_cache
from cfjax.rollout.rolling import Place, Window, empty_window, roll, rolling_layout, window_flow, window_levels
from cfjax.rollout.self_forcing import Draws, Part, SelfForcing, cut, video_by_blocks

ROLLS = "rolls"  # scope of the conditional between a rollout by windows and one block by block
COUNTED_WINDOWS = "counted_windows"  # scope of the loop over the windows, whose number may be drawn
COMMIT_DONE = "commit_done"  # scope of the conditional that commits blocks that are done


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RolledWindows:
    """The windows that give a video, G of them, without gradient.

    x_GBFHWC: inputs.  x0_GBFHWC: predictions.  at_G: their first frames.  stop: the frame that the video ends before.
    cache: of all committed blocks.
    """

    x_GBFHWC: jax.Array
    x0_GBFHWC: jax.Array
    at_G: jax.Array
    stop: jax.Array
    cache: State


def training_layout(blocks: Blocks, steps: int, num_frames: int) -> Blocks:
    """The layout of windows, with a memory that stores a whole video. Raises as `rolling_layout` does."""
    layout = rolling_layout(blocks, steps)
    return replace(layout, memory=replace(layout.memory, stored=num_frames - blocks.frames))


@jax.named_scope("self_rollout")
def roll_windows(
    model: Wan, text_kv: KV, draws: Draws, config: SelfForcing, layout: Blocks, count: jax.Array | int
) -> RolledWindows:
    """Generates `count` (may be traced) blocks by windows, and keeps those that were drawn. No gradient."""
    noise, sigmas, frames = draws["noise_BFHWC"], config.sigmas, layout.frames
    steps, shape, total = len(sigmas), noise.shape, len(layout.spans(noise.shape[1]))
    fresh_JBFHWC = jnp.moveaxis(draws["renoise_BFJHWC"], 2, 0)[: steps - 1]
    windows, stop = total + steps - 1, jnp.int32(count * frames)

    def body(number: jax.Array, carry: Any) -> Any:
        window, cache, kept = carry
        at = (number.astype(jnp.int32) - (steps - 1)) * frames
        new = number * frames  # after the end it is any block: it does not exist
        own = Window(
            dynamic_slice_in_dim(noise, new, frames, 1), dynamic_slice_in_dim(fresh_JBFHWC, new, frames, 2)
        )  # fmt: skip
        window, x, x0 = roll(model, window, own, sigmas, text_kv, cache, Place(at, 0, stop), layout)
        commit = lambda cache: commit_block(model, x0[:, :frames], text_kv, cache, at, layout)
        with jax.named_scope(COMMIT_DONE):
            cache = jax.lax.cond((at >= 0) & (at + frames < stop), commit, lambda cache: cache, cache)
        put = lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, number, 0)
        return window, cache, jax.tree.map(put, kept, (x, x0))

    held = jnp.zeros((windows, shape[0], steps * frames, *shape[2:]), jnp.float32)
    cache = empty_cache(model.config, shape, layout)
    carry = (empty_window(shape, steps, layout), cache, (held, held))
    with jax.named_scope(COUNTED_WINDOWS):
        _, cache, kept = jax.lax.fori_loop(0, count + steps - 1, body, carry)
    number_G = draws["residue"] + steps * jnp.arange(-(-(total - 1) // steps) + 1)
    x, x0 = (jnp.take(x, number_G, axis=0, mode="clip") for x in kept)
    at_G = ((number_G - (steps - 1)) * frames).astype(jnp.int32)
    return stop_gradient(RolledWindows(x, x0, at_G, stop, cache))


@jax.named_scope("replay_windows")
def replay_windows(model: Wan, text_kv: KV, rolled: RolledWindows, config: SelfForcing, layout: Blocks) -> jax.Array:
    """The predictions of the drawn windows again, x0_GBFHWC, now with gradient."""
    batch, frames = rolled.x_GBFHWC.shape[1:3]
    sigma_BF = jnp.broadcast_to(window_levels(config.sigmas, layout), (batch, frames))

    def one(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x, at = inputs
        known = replace(rolled.cache, count=jnp.clip(at, 0, len(rolled.cache.frame_F)))  # slots are frames
        v = window_flow(model, x, sigma_BF, text_kv, known, Place(at, 0, rolled.stop), layout)
        return None, x0_from_flow(v, x, sigma_BF)

    return jax.lax.scan(one, None, (rolled.x_GBFHWC, rolled.at_G))[1]


def joined_windows(x0_GBFHWC: jax.Array, rolled: RolledWindows, num_frames: int) -> jax.Array:
    """The video that the drawn windows make, one after another; zeros behind its end."""
    groups, batch, frames, *size = x0_GBFHWC.shape
    row = jnp.moveaxis(x0_GBFHWC, 0, 1).reshape(batch, groups * frames, *size)
    video = dynamic_slice_in_dim(row, -rolled.at_G[0], num_frames, 1)
    exists_F = (jnp.arange(num_frames) < rolled.stop).reshape(1, -1, 1, 1, 1)
    return jnp.where(exists_F, video, 0.0)


def video_by_windows(
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
    """As `self_forcing.video_by_blocks`, by windows of blocks."""
    num_frames = draws["noise_BFHWC"].shape[1]
    layout = training_layout(blocks, len(config.sigmas), num_frames)
    number = len(blocks.spans(num_frames)) if count is None else count
    rolled = roll_windows(*stop_gradient((model, text_kv)), draws, config, layout, number)
    whole = joined_windows(rolled.x0_GBFHWC, rolled, num_frames)
    video = whole
    if gradient:
        video = joined_windows(replay_windows(model, text_kv, rolled, config, layout), rolled, num_frames)
    return cut(video, part), whole


def student_rollout(
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
    """A video of the student, by windows or block by block as was drawn, see `self_forcing.video_by_blocks`."""

    def by_windows(model: Wan, text_kv: KV) -> tuple[jax.Array, jax.Array]:
        return video_by_windows(model, text_kv, draws, config, blocks, gradient=gradient, count=count, part=part)

    def by_blocks(model: Wan, text_kv: KV) -> tuple[jax.Array, jax.Array]:
        return video_by_blocks(model, text_kv, draws, config, blocks, gradient=gradient, count=count, part=part)

    if not config.rolling:
        return by_blocks(model, text_kv)
    if config.rolling == 1.0:
        return by_windows(model, text_kv)
    with jax.named_scope(ROLLS):
        return jax.lax.cond(draws["rolls"], by_windows, by_blocks, model, text_kv)
