"""Video to video: blocks that begin with a given video at a noise level, in place of pure noise.

    x_sigma = (1 - sigma) z + sigma eps,    sigma: the sampler's strength

Source: StreamDiffusionV2, `models/wan/causal_stream_inference.py` and `streamv2v/inference.py`; Krea's realtime video
(`GenerateParams.strength`). Strength 1 is text to video, strength 0 what the codec makes of the video.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.rollout.stream import Noise

MOST_MOTION = 0.2  # root mean square difference of two frames in [-1, 1]
ALMOST_STILL, KEPT = 0.1, 0.1


class StreamEncoder(Protocol):
    """The part of a codec that a session's given video needs; `models.vae.WanVAE` has it."""

    def init_encode_state(self, batch: int) -> Any: ...

    def encode_step(self, video_BPHWC: jax.Array, state: Any) -> tuple[jax.Array, Any]: ...


def first_level(sampler: FewStep | ManyStep, first: bool = False) -> float:
    """The noise level that a block begins at; 0 if nothing is left to do."""
    if isinstance(sampler, ManyStep):
        levels = sampler.grid()[0]
    else:
        levels = sampler.first_sigmas() if first else sampler.sigmas()
    return float(levels[0]) if len(levels) else 0.0


def noised(noise: Noise, latents_BFHWC: jax.Array, sampler: FewStep | ManyStep, blocks: Blocks | None) -> Noise:
    """Noise under which every block begins with its part of given latents.

    Args:
      latents_BFHWC: of the whole video, [1, F, H, W, C] or one per row.  blocks: None: one block of all.
    """
    spans = blocks.spans(latents_BFHWC.shape[1]) if blocks else [(0, latents_BFHWC.shape[1])]

    def of_block(block: int, shape: tuple[int, ...], steps: int) -> tuple[jax.Array, jax.Array]:
        start, fresh = noise(block, shape, max(steps, 1))
        begin, end = spans[block]
        return add_noise(latents_BFHWC[:, begin:end], start, first_level(sampler, block == 0)), fresh

    return of_block


def motion(video_BPHWC: np.ndarray, before_BHWC: np.ndarray | None = None) -> float:
    """How much a piece of video moves, 0 to 1: the largest root mean square difference of two frames, over 0.2.

    Args:
      video_BPHWC: in [-1, 1].  before_BHWC: the frame before it, if there is one.
    """
    frames = video_BPHWC if before_BHWC is None else np.concatenate([before_BHWC[:, None], video_BPHWC], axis=1)
    if frames.shape[1] < 2:
        return 0.0
    apart = np.sqrt(np.mean(np.square(np.diff(frames.astype(np.float64), axis=1)), axis=(0, 2, 3, 4)))
    return float(np.clip(apart.max() / MOST_MOTION, 0.0, 1.0))


def adapted_level(strength: float, moved: float, before: float) -> float:
    """The noise level of a block that moves so much: 0.9 (strength - 0.1 motion) + 0.1 (the level before).

    Source: `compute_noise_scale_and_step` of StreamDiffusionV2, which conditions the network 0.1 below that level; here
    both are the same.
    """
    return (1 - KEPT) * (strength - ALMOST_STILL * moved) + KEPT * before


def check_frames(video_BPHWC: np.ndarray, wanted: tuple[int, ...]) -> None:
    """Raises UserError if a piece of video is not of this shape [B, P, H, W, 3]."""
    if tuple(video_BPHWC.shape) != wanted:
        raise UserError(f"video {tuple(video_BPHWC.shape)}: the next block takes {wanted}, float32 in [-1, 1]")


def levels_at(level: float, sampler: FewStep, first: bool = False) -> jnp.ndarray:
    """The sampler's levels with another first one: as many whatever that is, so that one program runs them."""
    levels = sampler.first_sigmas() if first else sampler.sigmas()
    return jnp.asarray([level, *levels[1:]], jnp.float32)
