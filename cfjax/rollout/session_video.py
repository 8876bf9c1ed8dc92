"""A session that goes along with a video: what a block begins with, and the block made of it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise
from cfjax.models.wan import KV, Wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, few_step_block
from cfjax.rollout.session_state import SessionState, Source
from cfjax.rollout.stream import Call, Pipeline
from cfjax.rollout.video import adapted_level, check_frames, motion


@partial(jax.jit, static_argnames="blocks")
def next_from(
    model: Wan,
    latents: jax.Array,
    noise: jax.Array,
    fresh: jax.Array,
    levels: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    *,
    blocks: Blocks,
) -> jax.Array:
    """A block from a given one at the first of the levels."""
    return few_step_block(model, add_noise(latents, noise, levels[0]), fresh, levels, text_kv, cache, start, blocks)


_encode_step = jax.jit(lambda codec, video, state: codec.encode_step(video, state))


def next_source(
    pipeline: Pipeline,
    state: SessionState,
    video_BPHWC: np.ndarray,
    shape: tuple[int, int, int, int],
    *,
    follow_motion: bool,
    call: Call,
) -> tuple[Source, jax.Array]:
    """The video that a session goes along with, these frames further, and their latents_BFHWC.

    Args:
      shape: (F, H, W, C) of the block.

    Raises:
      UserError: the sampler or the codec cannot, the session began without a video, or these are no such frames.
    """
    codec, sampler, (frames, height, width, _) = pipeline.codec, pipeline.sampler, shape
    if not isinstance(sampler, FewStep) or not sampler.sigmas().size:
        raise UserError("video to video in a session needs a few-step sampler with a strength above 0")
    if not hasattr(codec, "encode_step") or not hasattr(codec, "init_encode_state"):
        raise UserError("this codec does not encode a stream: open the run with decoder='vae'")
    source = state.source
    if source is None:
        if state.block:
            raise UserError("this session began without a video: give one from the first block on")
        source = Source(codec.init_encode_state(1), None, sampler.strength)
    time_, down, right = codec.stride  # type: ignore[attr-defined]
    count = time_ * frames if source.last_HWC is not None else 1 + time_ * (frames - 1)
    check_frames(video_BPHWC, (1, count, height * down, width * right, 3))
    latents, encoder = call(_encode_step, codec, jnp.asarray(video_BPHWC, jnp.float32), source.encoder)
    before = None if source.last_HWC is None else source.last_HWC[None]
    moved = motion(video_BPHWC, before) if follow_motion else 0.0
    level = adapted_level(sampler.strength, moved, source.level) if follow_motion else sampler.strength
    return Source(encoder, video_BPHWC[0, -1], level), latents
