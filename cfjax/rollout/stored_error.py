"""How far a stream with stored keys and values in fewer bits is from the same stream without, block after block.

own past     each stream goes on from what it made itself: what users get, errors of earlier blocks in it
same past    the other stream's blocks are committed: what the bits alone cost, block by block
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.memory.codecs import Codec
from cfjax.models.cache import init_cache
from cfjax.models.wan import KV
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.generate import FewStep
from cfjax.rollout.stream import Noise, Pipeline, levels_of, next_block, stream_latents

_commit = jax.jit(commit_block, static_argnames="blocks")


@dataclass(frozen=True)
class StoredError:
    """Root mean square differences of latents, over the root mean square of the plain stream's: of every block."""

    own_past: np.ndarray
    same_past: np.ndarray

    def record(self) -> dict[str, float]:
        """Means over all blocks and over the last quarter, and the largest."""
        quarter = max(len(self.own_past) // 4, 1)
        found: dict[str, float] = {}
        for name, errors in (("own_past", self.own_past), ("same_past", self.same_past)):
            found |= {f"{name}_mean": float(errors.mean()), f"{name}_largest": float(errors.max())}
            found |= {f"{name}_last_quarter": float(errors[-quarter:].mean())}
        return found


def stored_errors(
    pipeline: Pipeline,
    text_kv: KV,
    noise: Noise,
    codecs: Sequence[Codec],
    *,
    num_frames: int,
    latent_shape: tuple[int, int, int],
    batch: int = 1,
) -> dict[str, StoredError]:
    """The errors of each codec, by its name.

    Args:
      pipeline: with a few-step sampler, and a memory policy, whose own codec the others are compared with.
      noise, num_frames, latent_shape, batch: as of `stream_latents`.

    Raises:
      UserError: another sampler, or no memory policy.
    """
    blocks, sampler = pipeline.blocks, pipeline.sampler
    if blocks is None or blocks.memory is None or not isinstance(sampler, FewStep) or sampler.rolling:
        raise UserError("errors of stored keys need a few-step sampler and a memory policy; give both")

    def streamed(pipeline: Pipeline) -> list[jax.Array]:
        made = stream_latents(pipeline, text_kv, noise, num_frames=num_frames, latent_shape=latent_shape, batch=batch)
        return list(made)

    plain, found = streamed(pipeline), dict[str, StoredError]()
    for codec in codecs:
        layout = replace(blocks, memory=replace(blocks.memory, codec=codec))
        own = streamed(replace(pipeline, blocks=layout))
        same = given_past(replace(pipeline, blocks=layout), text_kv, noise, plain)
        errors = (np.array([relative_rms(x, y) for x, y in zip(made, plain, strict=True)]) for made in (own, same))
        found[codec.name] = StoredError(*errors)
    return found


def given_past(pipeline: Pipeline, text_kv: KV, noise: Noise, clean: Sequence[jax.Array]) -> list[jax.Array]:
    """Every block of a few-step stream as it comes after `clean` ones, [B, F, H, W, C] each."""
    model, sampler, blocks = pipeline.model, pipeline.sampler, pipeline.blocks
    assert blocks is not None and isinstance(sampler, FewStep)
    height, width = clean[0].shape[2:4]
    frames, tokens = sum(x.shape[1] for x in clean), model.config.tokens_per_frame(height, width)
    cache, start, made = (
        init_cache(model.config, clean[0].shape[0], frames, tokens, blocks, model.config.tokens_per_row(width)),
        0,
        list[jax.Array](),
    )
    for number, (before, block) in enumerate(zip(chain([None], clean), clean, strict=False)):
        if before is not None:
            cache = _commit(model, before, text_kv, cache, jnp.int32(start - before.shape[1]), blocks=blocks)
        first = number == 0 and bool(sampler.first_steps)
        work = (text_kv, cache, jnp.int32(start))
        own = noise(number, block.shape, len(levels_of(sampler, first)))
        made.append(next_block(model, *own, *work, sampler=sampler, first=first, blocks=blocks))
        start += block.shape[1]
    return made


def relative_rms(x: jax.Array, y: jax.Array) -> float:
    """|x - y| / |y|."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
