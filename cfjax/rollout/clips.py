"""Whole clips with timings: network, decoder and first frame separately, without compilation."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.programs import Programs
from cfjax.models.cache import init_cache
from cfjax.models.wan import Wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.rollout.session import Session
from cfjax.rollout.sizes import Sizes
from cfjax.rollout.stream import Noise, Pipeline, decode_step, prompt_kv, stream_latents
from cfjax.rollout.timeline import Timeline


@dataclass(frozen=True)
class Times:
    """Seconds that a batch of videos took, without compilation.

    Attributes:
      text: the prompts' keys and values of all layers, once per batch.
      network: of each block, with the commit of what precedes it: of the given frames, or of the block before it.
      decode: of each block (and of the given frames), or one figure for a clip that is decoded whole.
      first_frame: from the start to the first generated pixels on the host.
    """

    text: float
    network: list[float]
    decode: list[float]
    first_frame: float


@dataclass(frozen=True)
class Clips:
    """Videos (as `finish` of `make_clips` returns them), their latents, and timings."""

    video_BPHWC: np.ndarray
    latents_BFHWC: np.ndarray
    times: Times


class _Clock:
    """Wall time without the time that compiling took."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._last = self._now()

    def _now(self) -> float:
        return time.perf_counter() - self._programs.seconds

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._now()
        return self._last - before


class _BlockBuffer:
    """The blocks of a batch as they are made, and what each cost."""

    def __init__(self, clock: _Clock, finish: Callable[[np.ndarray], np.ndarray]) -> None:
        self._clock, self._finish = clock, finish
        self.latents: list[jax.Array] = []
        self.video: list[np.ndarray] = []
        self.network: list[float] = []
        self.decode: list[float] = []

    def add_latents(self, latents_BFHWC: jax.Array) -> None:
        """A generated block."""
        self.latents.append(jax.block_until_ready(latents_BFHWC))
        self.network.append(self._clock.lap())

    def add_pixels(self, video_BPHWC: jax.Array) -> None:
        """A decoded block; what `finish` makes of it is not timed."""
        pixels = np.asarray(video_BPHWC)
        self.decode.append(self._clock.lap())
        self.video.append(self._finish(pixels))
        self._clock.lap()

    def seconds(self) -> float:
        """Network and decoder so far."""
        return sum(self.network) + sum(self.decode)


def make_clips(
    pipeline: Pipeline,
    text_BSE: np.ndarray,
    negative_SE: np.ndarray,
    noise: Noise,
    sizes: Sizes,
    *,
    given_BFHWC: np.ndarray | None = None,
    decode_whole: Callable[[jax.Array], jax.Array] | None = None,
    finish: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    programs: Programs | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> Clips:
    """One batch of videos, block by block where the sampler is causal.

    Args:
      noise: by block, see `stream_latents`.
      decode_whole: decodes finished latents (tiled, say) in place of the codec's stream.
      finish: maps a piece of video to what is kept on the host, such as its bytes; not timed.
      programs: keeps what is compiled for the next batch.
      progress: called after each block.
    """
    programs = Programs() if programs is None else programs
    clock, batch, model, codec = _Clock(programs), len(text_BSE), pipeline.model, pipeline.codec
    text_kv = prompt_kv(model, jnp.asarray(text_BSE), jnp.asarray(negative_SE), pipeline.sampler, programs)
    jax.block_until_ready(text_kv)
    text_seconds, first, pieces = clock.lap(), 0.0, _BlockBuffer(clock, finish)
    given = None if given_BFHWC is None else jnp.asarray(given_BFHWC)
    blocks = stream_latents(
        pipeline,
        text_kv,
        noise,
        num_frames=sizes.generated,
        latent_shape=(sizes.height, sizes.width, model.config.in_dim),
        batch=batch,
        given_BFHWC=given,
        call=programs,
    )
    state = codec.init_state(batch)

    def decode(x0: jax.Array) -> None:
        nonlocal state
        if decode_whole is None:
            video_BPHWC, state = programs(decode_step, codec, x0, state)
            pieces.add_pixels(video_BPHWC)

    if given is not None:
        pieces.latents.append(given)
        decode(given)
    for x0 in blocks:
        pieces.add_latents(x0)
        decode(x0)
        first = first or text_seconds + pieces.seconds()
        progress()
    whole = jnp.concatenate(pieces.latents, axis=1)
    if decode_whole is not None:
        pieces.add_pixels(decode_whole(whole))
        first = text_seconds + pieces.seconds()
    times = Times(text_seconds, pieces.network, pieces.decode, first)
    return Clips(np.concatenate(pieces.video, axis=1), np.asarray(whole), times)


def timed_clips(
    session: Session,
    timeline: Timeline,
    sizes: Sizes,
    *,
    given_BFHWC: np.ndarray | None = None,
    decode_whole: Callable[[jax.Array], jax.Array] | None = None,
    finish: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
    progress: Callable[[], Any] = lambda: None,
) -> Clips:
    """One video whose prompt changes over time, from a session that was opened with its first prompt.

    `given_BFHWC` are the frames that it goes on from, which are part of the result; the others as in `make_clips`.
    Times hold what was compiled meanwhile.
    """
    given, pixels = ([] if x is None else [x] for x in (given_BFHWC, session.given_video_BPHWC))
    latents, video, network, decode = given, [finish(x) for x in pixels], list[float](), list[float]()
    switches = {switch.block: switch for switch in timeline.switches[1:]}
    while session.state.frame < sizes.frames:
        if switch := switches.get(session.state.block):
            session.set_prompt(switch.prompt, switch.mode, switch.blend_blocks)
        made = session.next()
        latents.append(np.asarray(made.latents_BFHWC))
        video.append(finish(made.video_BPHWC))
        network.append(made.network_s)
        decode.append(made.decode_s)
        progress()
    whole = np.concatenate(latents, axis=1)
    if decode_whole is not None:
        video = [finish(np.asarray(decode_whole(jnp.asarray(whole))))]
    return Clips(np.concatenate(video, axis=1), whole, Times(0.0, network, decode, network[0] + decode[0]))


def cache_bytes(model: Wan, sampler: FewStep | ManyStep, blocks: Blocks | None, sizes: Sizes, batch: int) -> int:
    """Bytes of the KV cache of a batch; 0 for a bidirectional sampler, which has none."""
    if blocks is None:
        return 0
    rows = batch * (2 if isinstance(sampler, ManyStep) else 1)
    tokens = model.config.tokens_per_frame(sizes.height, sizes.width)
    cache = jax.eval_shape(
        partial(init_cache, model.config, rows, sizes.frames, tokens, blocks, model.config.tokens_per_row(sizes.width))
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


class Timings:
    """Seconds and rates of any number of batches, in memory that does not grow with them.

    Sums are of all batches; percentiles and first frames are of the newest `BLOCKS` blocks and `BATCHES` batches.
    """

    BLOCKS, BATCHES = 10_000, 1_000

    def __init__(self) -> None:
        self._batches, self._text, self._network, self._decode = 0, 0.0, 0.0, 0.0
        self._last: list[float] = []
        self._blocks: deque[float] = deque(maxlen=self.BLOCKS)
        self._first: deque[float] = deque(maxlen=self.BATCHES)

    def add(self, times: Times) -> None:
        """Counts one more batch."""
        self._batches += 1
        self._text += times.text
        self._network += sum(times.network)
        self._decode += sum(times.decode)
        self._last = times.network
        self._blocks.extend(times.network)
        self._first.append(times.first_frame)

    def record(self, videos: int, pixel_frames: int, batch: int) -> dict[str, Any]:
        """Plain numbers, of one batch or more.

        Args:
          videos, batch: in all, and at a time (a padded last batch counts in full).
          pixel_frames: generated ones of each video.
        """
        frames = pixel_frames * batch * self._batches
        percentiles = {f"p{q}": float(np.percentile(self._blocks, q)) for q in (50, 95, 99)}
        return {
            "videos": videos,
            "first_frame_seconds": list(self._first),
            "seconds_per_block": self._last,
            "block_seconds": percentiles,
            "prompt_kv_seconds": self._text,
            "network_seconds": self._network,
            "decode_seconds": self._decode,
            "frames_per_second_without_decoder": frames / self._network,
            "frames_per_second_with_decoder": frames / (self._network + self._decode),
        }
