"""Batches of videos: what each begins with, and the pipeline, session or video that makes it."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.core.programs import Programs
from cfjax.core.progress import Progress
from cfjax.data.requests import LATENTS, Request
from cfjax.evaluation.video import to_uint8
from cfjax.experiment.job import Job, hash_file, read_given, read_source, tiled_decoder
from cfjax.models.experts import picture_condition, takes_picture, with_picture
from cfjax.models.steered import steered
from cfjax.models.text_cache import TextCache, read_rows
from cfjax.rollout.clips import Clips, make_clips, timed_clips
from cfjax.rollout.generate import ManyStep
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.stream import Pipeline, seeded_noise
from cfjax.rollout.timeline import Timeline
from cfjax.rollout.video import noised
from cfjax.worlds.wan import load_image_encoder

CHANGED = "has changed since the command began; give it again with --config.resume=True"
GIVEN_KEPT = 16  # encoded inputs kept in memory; videos of one picture are usually adjacent


def given_latents(c: ConfigDict, job: Job, batches: Sequence[range]) -> Callable[[Request], np.ndarray | None]:
    """What each request's video begins with, latents_FHWC; the newest few stay encoded, the encoder while it is needed.

    Raises:
      UserError: a file that cannot be read or does not fit any more.
    """
    if c.strength >= 0:
        return lambda request: None
    world, pictures = job.run.world, takes_picture(job.run.model.config)
    left = {job.requests[n].image or c.video for numbers in batches for n in numbers}
    encoders: list[Callable[[jax.Array], jax.Array]] = []

    def encode(video_PHWC: np.ndarray) -> np.ndarray:
        if not encoders:
            encoders.append(world.open_encoder())
        return np.asarray(encoders[0](jnp.asarray(video_PHWC[None])))[0]

    @lru_cache(maxsize=GIVEN_KEPT)
    def read(file: str) -> np.ndarray:
        if hash_file(file) != job.hashes[file]:
            raise UserError(f"{file}: {CHANGED}")
        given = read_given(c, job, file)
        if pictures:
            grey = np.zeros((job.sizes.pixels()[0] - len(given), *given.shape[1:]), given.dtype)
            given = np.concatenate([given, grey])
        latents = given if Path(file).suffix in LATENTS else encode(given)
        left.discard(file)
        if not left:
            encoders.clear()  # its weights need not stay beside the network's
        return latents

    def of(request: Request) -> np.ndarray | None:
        file = request.image or c.video
        return read(file) if file else None

    return of


def given_features(c: ConfigDict, job: Job, batches: Sequence[range]) -> Callable[[Request], np.ndarray] | None:
    """CLIP's features of each request's picture, [T, D], for networks that take some, else None.

    They are made at once, before the network runs, so that the encoder is in memory no longer than that.

    Raises:
      UserError: a file that cannot be read or does not fit any more, or there is no encoder.
    """
    if not job.run.model.config.image_dim or not batches:
        return None
    encode, found = load_image_encoder(job.run.world.folder), dict[str, np.ndarray]()
    for file in dict.fromkeys(job.requests[n].image for numbers in batches for n in numbers):
        if hash_file(file) != job.hashes[file]:
            raise UserError(f"{file}: {CHANGED}")
        found[file] = np.asarray(encode(jnp.asarray(read_given(c, job, file))))[0]
    return lambda request: found[request.image]


def source_latents(c: ConfigDict, job: Job) -> jax.Array | None:
    """latents_BFHWC, B = 1, of the video that is changed with `c.strength`; None without one.

    Raises:
      UserError: it changed since it was checked.
    """
    if c.strength < 0:
        return None
    if hash_file(c.video) != job.hashes[c.video]:
        raise UserError(f"{c.video}: {CHANGED}")
    source = jnp.asarray(read_source(c, job)[None])
    return source if Path(c.video).suffix in LATENTS else job.run.world.open_encoder()(source)


def generate_batches(
    c: ConfigDict, job: Job, texts: TextCache, batches: Sequence[range], programs: Programs
) -> Iterator[tuple[range, Clips]]:
    """Batches of videos, with the numbers of their requests. A last batch is filled up, so that one shape compiles."""
    given, source = given_latents(c, job, batches), source_latents(c, job) if batches else None
    features = given_features(c, job, batches)
    per_batch = len(job.blocks.spans(job.sizes.frames)) - job.given_blocks() if job.blocks else 1
    with Progress(per_batch * len(batches), "block", "generate", shown=c.progress) as bar:
        for numbers in batches:
            rows = [job.requests[min(numbers.start + i, numbers.stop - 1)] for i in range(job.batch)]
            first = [latents for request in rows if (latents := given(request)) is not None]
            guided = isinstance(job.sampler, ManyStep)
            model: Any = steered(job.run.model, None if job.keys_FA is None else job.keys_FA[None])
            if takes_picture(model.config):
                image = jnp.asarray(np.stack([features(request) for request in rows])) if features else None
                model, first = with_picture(model, picture_condition(jnp.asarray(np.stack(first))), image), []
            pipeline = Pipeline(model, job.run.world.codec, job.sampler, job.blocks, c.fused_commit)
            if timeline := job.timelines.get(rows[0].prompt):
                yield numbers, timed_video(c, job, pipeline, timeline, rows[0].seed, texts, first, programs, bar.update)
                continue
            noise = seeded_noise(np.array([request.seed for request in rows], np.uint32), programs)
            clips = make_clips(
                pipeline,
                read_rows(texts, [request.prompt for request in rows]),
                read_rows(texts, [job.negative_prompt if guided else rows[0].prompt])[0],
                noise if source is None else noised(noise, source, job.sampler, job.blocks),
                job.sizes,
                given_BFHWC=np.stack(first) if first else None,
                decode_whole=tiled_decoder(c, job.run),
                finish=to_uint8,
                programs=programs,
                progress=bar.update,
            )
            yield numbers, clips


def timed_video(
    c: ConfigDict,
    job: Job,
    pipeline: Pipeline,
    timeline: Timeline,
    seed: int,
    texts: TextCache,
    given: Sequence[np.ndarray],
    programs: Programs,
    progress: Callable[[], Any],
) -> Clips:
    """A video whose prompt changes over time; a batch of one."""
    negative = read_rows(texts, [job.negative_prompt])[0] if isinstance(job.sampler, ManyStep) else None
    session = Session(
        pipeline,
        Text(lambda prompts: np.asarray(read_rows(texts, list(prompts))), negative),
        timeline.switches[0].prompt,
        latent_shape=(job.sizes.height, job.sizes.width, job.run.model.config.out_dim),
        seed=seed,
        max_frames=job.sizes.frames,
        given_BFHWC=jnp.asarray(np.stack(given)) if given else None,
        call=programs,
    )
    return timed_clips(
        session,
        timeline,
        job.sizes,
        given_BFHWC=np.stack(given) if given else None,
        decode_whole=tiled_decoder(c, job.run),
        finish=to_uint8,
        progress=progress,
    )
