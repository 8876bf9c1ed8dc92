"""Preview samples of a run while it trains: videos to look at, and measurements that warn when it collapses.

Every `sample_every` steps a handful of prompts is sampled with several seeds each, by the averaged weights where there
are any. The pixels' numbers (`cfjax.evaluation.guard`) become the curves `guard/...`, and one that is far from the
baseline becomes a line on the terminal and in the log. The baseline is real clips of the same prompts, through the same
decoder, where the data holds clips; for sets of prompts alone it is what the run samples before its first step. It is
stored in `guard.json`, so that a resumed run is compared with the same numbers.

One preview costs `prompts` x `seeds` clips of the run's own sampler (12 of 34 network calls for a chunk-wise
4-step student, where a step of stage 3 rolls out its whole batch), their decoding, and 0.6 s of numpy for 81 frames of
480 x 832; `guard/seconds` has the sum. A Wan system's clips are sampled as many at a time as the batch has
shards, so that memory stays below the step's own rollout, and decoded one latent frame at a time, by the tiny
decoder if the world has one. An error while sampling never ends training: it is logged once and sampling stops. Not
supported: Wan worlds in runs of several processes, each of which would have to read the decoder.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.paths import replacing
from cfjax.core.progress import compiling
from cfjax.core.sharding import batch_sharding, batch_shards, replicated
from cfjax.data.latents import ClipDataset
from cfjax.data.steered import keys_asked
from cfjax.evaluation.guard import BACK, Baseline, Collector, Sample, seams, warnings
from cfjax.evaluation.shapes_metrics import evaluate_shapes
from cfjax.evaluation.video import grid_video, pick_frames, shrink, to_uint8
from cfjax.experiment.build import Experiment, Preview
from cfjax.experiment.data import Data
from cfjax.models.codec import Codec
from cfjax.models.experts import takes_picture
from cfjax.models.steered import steered
from cfjax.models.wan import Wan
from cfjax.rollout.generate import generate, network_calls
from cfjax.rollout.stream import decode_step
from cfjax.training.metrics import EventWriter
from cfjax.training.state import TrainState
from cfjax.worlds.open import open_decoder
from cfjax.worlds.toy import ToyWorld, evaluation_clips, held_out_captions

BASELINE = "guard.json"
REAL_PER_CAPTION = 3  # the toy's real clips of each prompt
SHOWN_FRAMES, SHOWN_WIDTH = 16, 208  # of a clip in the "samples" video

_SHOWN = ("all_correct", "shape_correct", "colour_correct", "direction_correct", "presence", "step", "residual")

# latents_BFHWC on the host to uint8 videos, one clip at a time
Decode = Callable[[np.ndarray], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Rows:
    """The clips of a preview: the first `shown` are in the video of samples, those from `first_watched` on measured."""

    captions: list[str]
    text_BSE: np.ndarray
    shown: int
    first_watched: int

    def watched(self) -> list[str]:
        """The captions that are measured, one for each seed."""
        return self.captions[self.first_watched :]


@dataclass(frozen=True)
class Scene:
    """What is sampled, and how it is decoded.

    Attributes:
      open_decoder: reads the decoder, whose memory is freed again after each preview.
      time_stride: pixel frames per latent frame after the first.
      real: real clips of the watched prompts as (caption, uint8 video), through the same decoder; None: there are none.
      chunk: rows sampled at a time; 0 is all.
    """

    rows: Rows
    open_decoder: Callable[[], Decode]
    time_stride: int
    real: Callable[[Decode], Iterator[tuple[str, np.ndarray]]] | None
    chunk: int
    toy: ToyWorld | None


# ---- what is sampled


def toy_scene(preview: Preview, world: ToyWorld) -> Scene | None:
    """Held-out captions for the "samples" video, and the guard's prompts with their seeds."""
    prompts, seeds = (preview.prompts, preview.seeds) if preview.guard else (0, 0)
    known = held_out_captions(world.shapes)
    captions = [clip["caption"] for clip in evaluation_clips(world.shapes, preview.clips)]
    spread = np.unique(np.linspace(0, len(known) - 1, min(prompts, len(known))).round().astype(int))
    watched = [known[i] for i in spread for _ in range(seeds)]
    if not captions and not watched:
        return None
    every = captions + watched
    rows = Rows(every, world.text.encode(every), len(captions) or len(every), len(captions))

    def decode(latents_BFHWC: np.ndarray) -> Iterator[np.ndarray]:
        return iter(to_uint8(np.asarray(world.codec.decode(jnp.asarray(latents_BFHWC)))))

    def real(decode: Decode) -> Iterator[tuple[str, np.ndarray]]:
        clips = evaluation_clips(world.shapes, REAL_PER_CAPTION * len(known))
        chosen = [clip for clip in clips if clip["caption"] in set(watched)]
        latents = np.asarray(world.codec.encode(jnp.asarray(np.stack([clip["video_PHWC"] for clip in chosen]))))
        return zip((clip["caption"] for clip in chosen), decode(latents), strict=True)

    return Scene(rows, lambda: decode, world.codec.stride[0], real, 0, world)


def wan_scene(preview: Preview, dataset: ClipDataset, mesh: Mesh | None) -> Scene | None:
    """A handful of the dataset's prompts, spread over it; decoded by the world that the set was made in.

    Raises:
      UserError: no world to decode with.
    """
    if not preview.guard:
        return None
    if jax.process_count() > 1:
        raise UserError("in a run of several processes the decoder of a Wan world is not read")
    path = preview.world or dataset.manifest.get("world_path", "")
    if not path:
        raise UserError(f"{dataset.path} does not say which world it was made in; name it with --config.guard.world")
    read = partial(open_decoder, path, key="guard.world")
    stride = read().stride[0]  # a world that cannot be opened is an error now, not hours later
    chosen = spread_captions(dataset, preview.prompts)
    captions = [caption for caption in chosen for _ in range(preview.seeds)]
    text_BSE = np.stack([dataset[chosen[caption]]["text_SE"] for caption in captions])
    rows = Rows(captions, text_BSE, len(captions), 0)

    def decoder() -> Decode:
        codec = read()
        return lambda latents_BFHWC: (decode_clip(codec, latents_FHWC) for latents_FHWC in latents_BFHWC)

    def real(decode: Decode) -> Iterator[tuple[str, np.ndarray]]:
        for caption, index in chosen.items():
            yield caption, next(decode(dataset[index]["latents_FHWC"][None]))

    shards = batch_shards(mesh) if mesh else 1
    return Scene(rows, decoder, stride, real if dataset.has_latents else None, shards, None)


def spread_captions(dataset: ClipDataset, count: int) -> dict[str, int]:
    """At most `count` distinct captions, evenly over the dataset, and a record of each; few records are read."""
    even, more = (np.linspace(0, len(dataset) - 1, n).round().astype(int) for n in (count, 8 * count))
    out: dict[str, int] = {}
    for index in (*even, *more):
        out.setdefault(dataset.caption(int(index)), int(index))
        if len(out) == count:
            break
    return out


def decode_clip(codec: Codec, latents_FHWC: np.ndarray) -> np.ndarray:
    """uint8 video_PHWC, decoded one latent frame at a time: the least memory that a decoder needs."""
    state, parts = codec.init_state(1), []
    for frame in latents_FHWC:
        video, state = decode_step(codec, jnp.asarray(frame)[None, None], state)
        parts.append(to_uint8(np.asarray(video)[0]))
    return np.concatenate(parts)


# ---- sampling


def _off(when: str, error: Exception) -> None:
    """Says in one line that previews are off; the whole error goes to the log."""
    logging.info("guard: off", exc_info=error)
    say(f"guard: off from {when} on ({' '.join(str(error).split()) or type(error).__name__}); training goes on")


class Monitor:
    """Samples, shows, measures and warns; a `SampleFn` of `training.loop`."""

    def __init__(self, e: Experiment, data: Data, scene: Scene, workdir: Path, mesh: Mesh | None) -> None:
        self._e, self._scene, self._mesh, self._file = e, scene, mesh, workdir / BASELINE
        self._latent_shape, self._negative_SE = data.dataset.latent_shape, data.dataset.negative_text_SE
        blocks, frames = e.sampling_blocks, self._latent_shape[0]
        spans = blocks.spans(frames) if blocks else []
        self._seams_G = seams(spans, scene.time_stride)
        self._sample = jax.jit(self._generate, out_shardings=replicated(mesh) if mesh else None)
        self._alive, self._compiled, self._said = True, False, set[str]()
        if e.preview.guard:
            calls = network_calls(e.sampler, blocks, frames)
            against = "real clips" if scene.real else "the run's first samples"
            clips = f"{counted(len(scene.rows.watched()), 'clip')} of {counted(calls, 'network call')}"
            every = e.schedule.sample_every
            when = f"every {counted(every, 'step')}" if 0 < every < e.schedule.steps else "at the end"
            say(f"guard: {clips} {when}, compared with {against}")

    @property
    def wants_start(self) -> bool:
        """Whether samples before the first step are needed, if there is no other baseline."""
        return bool(self._e.preview.guard and self._scene.real is None)

    def __call__(self, state: TrainState, step: int, writer: EventWriter) -> None:
        if jax.process_count() > 1:  # sampling needs every process: process 0 decides
            self._alive = bool(multihost_utils.broadcast_one_to_all(np.asarray(self._alive)))
        if not self._alive:
            return
        try:
            self._preview(state, step, writer)
        except Exception as error:  # whatever it is: a run of days must not end here
            self._alive = False
            _off(f"step {step}", error)

    def _preview(self, state: TrainState, step: int, writer: EventWriter) -> None:
        begun = time.perf_counter()
        with self._compiling():
            latents = self._draw(state.ema.get("student", state.params["student"]))
        if jax.process_index() > 0:
            return
        if not np.isfinite(latents).all():
            back = f"; {BACK}" if self._saved(step) > 1 else ""
            self._warn(step, {"NaN": f"step {step}: samples hold NaN or infinities{back}"})
            return
        rows, decode = self._scene.rows, self._scene.open_decoder()
        collector, shown = Collector(self._seams_G), []
        for i, (caption, video) in enumerate(zip(rows.captions, decode(latents), strict=True)):
            if i < rows.shown:
                shown.append(shrink(pick_frames(video[None], SHOWN_FRAMES)[0], SHOWN_WIDTH))
            if i >= rows.first_watched:
                collector.add(caption, video)
        writer.video(step, "videos", grid_video(np.stack(shown), columns=4), scale=3 if self._scene.toy else 1)
        if self._scene.toy and self._e.preview.clips:
            self._follows(self._scene.toy, latents, step, writer)
        if rows.watched():
            now = Sample(step, collector.values())
            raised = warnings(
                now,
                self._baseline(decode, now),
                stage=self._e.stage.name,
                keys=self._e.used_keys,
                earlier=self._saved(step) > 1,
            )
            curves = {**now.values, "warnings": len(raised), "seconds": time.perf_counter() - begun}
            writer.scalars(step, {f"guard/{name}": value for name, value in curves.items()})
            self._warn(step, raised)

    def _saved(self, step: int) -> int:
        """How many checkpoints the run has saved once it has done `step` steps."""
        schedule = self._e.schedule
        return step // schedule.save_every + (step == schedule.steps and step % schedule.save_every > 0)

    def _warn(self, step: int, raised: Mapping[str, str]) -> None:
        """Says each sign when it comes, not again while it stays; none before a checkpoint is there to judge by."""
        if not self._saved(step):
            return
        for line in (line for sign, line in raised.items() if sign not in self._said):
            say(f"guard: {line}")
        self._said = set(raised)

    def _compiling(self) -> AbstractContextManager[None]:
        """Around the first preview's sampling."""
        if self._compiled:
            return nullcontext()
        self._compiled = True
        shown = self._e.schedule.progress and jax.process_index() == 0
        return compiling("the sampler of the previews", shown=shown)

    def _baseline(self, decode: Decode, now: Sample) -> Baseline:
        """The one in the workdir; else that of real clips, or `now`, which is then stored."""
        watched = self._scene.rows.watched()
        try:
            record = json.loads(self._file.read_text())
            if record["prompts"] == watched:
                return Baseline(**record["baseline"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if self._scene.real is None:
            baseline = Baseline(f"step {now.step}", False, now.values)
        else:
            collector = Collector(self._seams_G)
            for caption, video in self._scene.real(decode):
                collector.add(caption, video)
            baseline = Baseline("real clips", True, collector.values())
        with replacing(self._file) as partial:
            partial.write_text(json.dumps({"prompts": watched, "baseline": asdict(baseline)}, indent=1))
        return baseline

    def _follows(self, world: ToyWorld, latents: np.ndarray, step: int, writer: EventWriter) -> None:
        """How well the toy's videos follow their captions."""
        count = self._e.preview.clips
        factors = [clip["factors"] for clip in evaluation_clips(world.shapes, count)]
        video = np.asarray(world.codec.decode(jnp.asarray(latents[:count])))
        summary = evaluate_shapes(video, factors, world.shapes)["summary"]
        writer.scalars(step, {f"samples/{name}": float(summary[name]) for name in _SHOWN})

    def _generate(self, model: Wan, text_BSE: jax.Array, negative_SE: jax.Array, row_B: jax.Array) -> jax.Array:
        """Every row's noise follows its own number; fresh noise that of the first."""
        start, fresh = jax.random.key(self._e.seed + 1), jax.random.key(self._e.seed + 2)
        draw = lambda row: jax.random.normal(jax.random.fold_in(start, row), self._latent_shape)
        noise = jax.vmap(draw)(row_B)
        if self._mesh and self._scene.chunk:
            noise = jax.lax.with_sharding_constraint(noise, batch_sharding(self._mesh))
        key = jax.random.fold_in(fresh, row_B[0])
        if model.config.actions is not None:  # steered as the captions say
            keys = keys_asked(self._scene.rows.captions, self._latent_shape[0])
            model = steered(model, jnp.asarray(keys)[row_B])
        return generate(model, noise, text_BSE, negative_SE, key, self._e.sampler, self._e.sampling_blocks)

    def _draw(self, model: Wan) -> np.ndarray:
        """latents_BFHWC of all rows, on the host; the last chunk is padded, so that one shape compiles."""
        text_BSE, count = self._scene.rows.text_BSE, len(self._scene.rows.captions)
        chunk = self._scene.chunk or count
        parts = []
        for first in range(0, count, chunk):
            rows = np.minimum(np.arange(first, first + chunk), count - 1).astype(np.int32)
            latents = self._sample(model, text_BSE[rows], self._negative_SE, rows)
            parts.append(np.asarray(latents)[: count - first])
        return np.concatenate(parts)


def make_monitor(e: Experiment, data: Data, workdir: Path, mesh: Mesh | None = None) -> Monitor | None:
    """What `fit` calls every `sample_every` iterations; None where nothing is to be sampled."""
    if takes_picture(e.networks["student"].base):
        say("guard: off: an image-to-video network's samples need pictures, which previews have not; training goes on")
        return None
    try:
        scene = toy_scene(e.preview, data.world) if data.world else wan_scene(e.preview, data.dataset, mesh)
    except Exception as error:  # training does not need it
        _off("start", error)
        return None
    return Monitor(e, data, scene, workdir, mesh) if scene else None
