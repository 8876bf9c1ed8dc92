"""Self-rollouts that are longer than the scores' window (Rolling Forcing, arXiv 2509.25161).

Reference: `model/base.py`, `SelfForcingModel._run_generator`.

A student that only rolls out the window of its bidirectional scores never sees the errors that accumulate over a long
video. So it rolls out a random number of blocks, and the scores get the last `window_frames` latents. These do not
begin as a video does: the first latent of Wan's autoencoder is one picture, the others are several frames. The first
latent of the window is therefore re-encoded: the latents up to it are decoded, and the last picture is encoded as the
beginning of a video.

Gradient reaches only the window's own blocks, and none that began before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, stop_gradient

from cfjax.core.errors import UserError
from cfjax.models.codec import Codec
from cfjax.models.wan import KV, Wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.self_forcing import Rollout, SelfForcing, draw_rollout, replay_exit, rollout

FIRST_REENCODED = "first_latent_anew"  # scope of the conditional that skips re-encoding for a window from the start
LAST_PICTURE = "last_picture"  # scope of the loop over the latents before the window


@dataclass(frozen=True)
class LongVideo:
    """How far the student rolls out, and how much of the end the scores see; both in latent frames, whole blocks.

    The number of blocks is uniform between the two, both included.
    """

    window_frames: int
    max_frames: int

    def __post_init__(self) -> None:
        if not 2 <= self.window_frames <= self.max_frames:
            raise UserError(
                f"objective.window_frames={self.window_frames}, objective.max_frames={self.max_frames}: "
                "the window has 2 frames or more, and the longest rollout no fewer; 0 for both is off"
            )

    def counts(self, blocks: Blocks) -> tuple[int, int]:
        """Least and largest number of blocks. Raises UserError where the frames are no whole blocks."""
        return len(blocks.spans(self.window_frames)), len(blocks.spans(self.max_frames))

    def start(self, count: jax.Array, blocks: Blocks) -> jax.Array:
        """The window's first frame in a rollout of `count` blocks."""
        return (count - self.counts(blocks)[0]) * blocks.frames

    def counted_F(self, count: jax.Array, blocks: Blocks) -> jax.Array:
        """Which frames of the window a loss counts, bool: not the first block if its first latent was re-encoded."""
        first = blocks.spans(self.window_frames)[0][1]
        return (jnp.arange(self.window_frames) >= first) | (self.start(count, blocks) == 0)


def draw_long(
    key: jax.Array, shape: tuple[int, ...], config: SelfForcing, long: LongVideo, blocks: Blocks
) -> dict[str, jax.Array]:
    """`draw_rollout` of `max_frames` frames for clips of shape [B, F, H, W, C], and `count`, the number of blocks."""
    least, most = long.counts(blocks)
    count = jax.random.randint(jax.random.fold_in(key, most), (), least, most + 1)
    return {**draw_rollout(key, (shape[0], long.max_frames, *shape[2:]), config, blocks), "count": count}


@jax.named_scope(LAST_PICTURE)
def last_picture(codec: Codec, latents_BFHWC: jax.Array, stop: jax.Array) -> jax.Array:
    """The last pixel frame, [B, 1, H, W, 3], of `codec.decode(latents[:, :stop])`; `stop` is traced, 1 or more.

    A causal decoder decodes one latent at a time: memory for one, one program for every length, and time for `stop`.
    """
    video, state = codec.decode_step(latents_BFHWC[:, :1], codec.init_state(latents_BFHWC.shape[0]))

    def step(number: jax.Array, carry: tuple) -> tuple:
        video, state = codec.decode_step(dynamic_slice_in_dim(latents_BFHWC, number, 1, axis=1), carry[1])
        return video[:, -1:], state

    return jax.lax.fori_loop(1, stop, step, (video[:, -1:], state))[0]


def roll_window(
    model: Wan,
    text_kv: KV,
    draws: Mapping[str, jax.Array],
    config: SelfForcing,
    long: LongVideo,
    blocks: Blocks,
    codec: Codec,
    *,
    gradient: bool,
) -> jax.Array:
    """The last `window_frames` latents x0_BFHWC of a rollout of `draws["count"]` blocks, as a video of its own.

    One program whatever the count. With `gradient`, the frames that a loss counts (`LongVideo.counted_F`) carry it.
    """
    frames, start = long.window_frames, long.start(draws["count"], blocks)
    frozen = stop_gradient((model, text_kv))
    save = gradient and config.save_activations
    rolled = rollout(*frozen, dict(draws), config, blocks, count=draws["count"], save=save)

    def end(x: jax.Array) -> jax.Array:
        return dynamic_slice_in_dim(x, start, frames, axis=1)

    if gradient:
        per_frame = (rolled.x_exit_BFHWC, rolled.sigma_exit_BF, rolled.x0_BFHWC, rolled.saved)
        x, sigma_BF, made, saved = jax.tree.map(end, per_frame)
        stretch: Rollout = replace(rolled, x_exit_BFHWC=x, sigma_exit_BF=sigma_BF, x0_BFHWC=made, saved=saved)
        x0 = replay_exit(model, text_kv, stretch, config, blocks, start=start)
    else:
        x0 = end(rolled.x0_BFHWC)

    def reencoded(video: jax.Array) -> jax.Array:
        return codec.encode(last_picture(codec, video, start + 1)).astype(video.dtype)

    with jax.named_scope(FIRST_REENCODED):
        first = jax.lax.cond(start > 0, reencoded, lambda video: video[:, :1], rolled.x0_BFHWC)
    first = stop_gradient(first)
    counted = long.counted_F(draws["count"], blocks)[None, :, None, None, None]
    was_reencoded = ((jnp.arange(frames) == 0) & (start > 0))[None, :, None, None, None]
    return jnp.where(was_reencoded, first, jnp.where(counted, x0, stop_gradient(x0)))
