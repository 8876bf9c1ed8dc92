"""The job of `cfjax generate`: requests and a run, with everything checked that can be before it starts."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.core.paths import path_of
from cfjax.core.progress import followed
from cfjax.data.requests import (
    LATENTS,
    Request,
    read_image,
    read_latents,
    read_video_end,
    read_video_start,
    video_frames,
)
from cfjax.data.steered import parse_keys
from cfjax.data.video import ClipFormat
from cfjax.evaluation.video import check_mp4
from cfjax.experiment.experts import HighNoise, open_high_noise
from cfjax.experiment.runs import Run
from cfjax.memory.names import memory_name, with_memory
from cfjax.models.experts import takes_picture
from cfjax.models.vae import WanVAE
from cfjax.models.vae_tiling import decode_tiled
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import fuses, given_blocks
from cfjax.rollout.generate import FewStep, ManyStep, layout_of, network_calls
from cfjax.rollout.sizes import Sizes, default_given, latent_sizes, pixel_frames
from cfjax.rollout.timeline import Clock, Switch, Timeline, read_timelines
from cfjax.training.checkpoint import checkpoint_hash
from cfjax.worlds.assets import MODEL_FILE, asset
from cfjax.worlds.wan import check_image_encoder

SAMPLERS_OWN = {
    "kind": "",
    "steps": (),
    "first_steps": (),
    "solver": "",
    "solver_steps": 0,
    "guidance": -1.0,
    "shift": 0.0,
}
FEW_STEP_KINDS = ("few_step", "rolling")
FAULTS = 3  # that a message names


@dataclass(frozen=True)
class Job:
    """What is to be generated, after validation.

    Attributes:
      hashes: of the content of every picture, and of the video to continue, by path.
      faults: numbers of requests that cannot be met, with the reason; see `check_requests`.
      timelines: of requests whose prompts change over time, by their text.
      high: the run for high noise levels, where there is one.
      keys_FA: what is held in every latent frame of a run that can be steered; None: nothing.
    """

    run: Run
    requests: list[Request]
    sampler: FewStep | ManyStep
    blocks: Blocks | None
    sizes: Sizes
    batch: int
    negative_prompt: str
    hashes: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[tuple[int, str]] = ()
    timelines: Mapping[str, Timeline] = field(default_factory=dict)
    high: HighNoise | None = None
    keys_FA: np.ndarray | None = None

    def prompts(self, numbers: Iterable[int]) -> list[str]:
        """The prompts of some requests, those of their timelines in place of these, each once."""
        texts = (self.requests[n].prompt for n in numbers)
        known = (self.timelines[t].prompts() if t in self.timelines else [t] for t in texts)
        return list(dict.fromkeys(prompt for some in known for prompt in some))

    def calls(self) -> int:
        """Network evaluations per video."""
        return network_calls(self.sampler, self.blocks, self.sizes.generated, self.sizes.given)

    def given_blocks(self) -> int:
        """Blocks that are given."""
        return given_blocks(self.blocks, self.sizes.given) if self.blocks else 0


def plan(c: ConfigDict, run: Run, requests: list[Request]) -> Job:
    """The job of a run and the settings; single requests are checked by `check_requests`.

    Raises:
      UserError: they do not fit.
    """
    if c.batch < 1:
        raise UserError(f"batch={c.batch}: use 1 or more")
    sampler, stride = with_strength(c, sampler_of(c, run)), run.world.codec.stride
    blocks = layout_of(sampler, blocks_of(c, run.blocks))
    frames, height, width, _ = run.latent_shape
    asked = c.frames or pixel_frames(frames, stride[0])
    given = count_given(c, run, requests, blocks, (asked - 1) // stride[0] + 1)
    sizes = latent_sizes(
        asked,
        c.height or height * stride[1],
        c.width or width * stride[2],
        stride=stride,
        patch=run.model.config.patch,
        blocks=blocks,
        given=given,
    )
    pixels = sizes.pixels()
    fuses(c.fused_commit, memory=blocks.memory if blocks else None)
    if blocks and blocks.memory:
        blocks.memory.check(run.model.config)
    check_mp4(*pixels[1:], c.fps, c.scale)
    ClipFormat(*pixels, c.fps, c.fit)
    tiled_decoder(c, run)
    hashes, faults = hash_pictures(requests)
    timelines = timelines_of(c, requests, run, sizes, blocks)
    if blocks is not None and blocks.memory is not None and blocks.memory.pictures(blocks, stride[0]):
        timelines = timelines or by_sessions(c, requests)
    batch = 1 if timelines else min(c.batch, len(requests))
    negative = c.negative_prompt or run.world.negative_prompt
    high = open_high_noise(c, run, sampler)
    keys = keys_of(c, run, sizes.frames, by_session=bool(timelines))
    job = Job(run, requests, sampler, blocks, sizes, batch, negative, hashes, (), timelines, high, keys)
    job = replace(job, faults=[*check_prompts(job, c.negative_prompt), *faults])
    if not c.video:
        return job
    read_source(c, job) if c.strength >= 0 else read_given(c, job, c.video)
    return replace(job, hashes={**hashes, c.video: hash_file(c.video)})


def timed_requests(c: ConfigDict) -> list[Request]:
    """One request per timeline of `c.timeline` and video; the prompt is the timeline as it was written.

    Raises:
      UserError: other prompts beside it, or it cannot be read.
    """
    if c.prompts:
        raise UserError("timeline and prompts: give one of them; a .jsonl timeline has a video per line")
    found = read_timelines(c.timeline, Clock(c.fps, 1, 1))
    seeds = tuple(c.seeds) or tuple(range(c.seed, c.seed + c.videos))
    places = [f"timeline {number}" for number in range(1, len(found) + 1)]
    return [Request(t.text, seed, c.image, place) for t, place in zip(found, places, strict=True) for seed in seeds]


def keys_of(c: ConfigDict, run: Run, frames: int, *, by_session: bool) -> np.ndarray | None:
    """The keys of `c.actions`, [F, A]; None where there are none.

    Raises:
      UserError: a run that cannot be steered, a text that is no keys, or not with a timeline.
    """
    if not c.get("actions", ""):
        return None
    if run.model.config.actions is None:
        raise UserError(f"actions={c.actions!r}: run={run.name!r} cannot be steered (docs/actions.md); leave them out")
    if by_session:
        raise UserError(f"actions={c.actions!r}: not with a timeline or a memory that needs pixels; leave one out")
    return parse_keys(c.actions, frames)


def timelines_of(
    c: ConfigDict, requests: Sequence[Request], run: Run, sizes: Sizes, blocks: Blocks | None
) -> dict[str, Timeline]:
    """The timelines of the requests, in blocks of this run.

    Raises:
      UserError: they do not fit the video, or the run makes all frames at once.
    """
    if not c.timeline:
        return {}
    if blocks is None:
        raise UserError("timeline: this run is bidirectional, its prompt cannot change; use a causal one")
    found = read_timelines(c.timeline, Clock(c.fps, blocks.frames, run.world.codec.stride[0]))
    for timeline in found:
        timeline.check(len(blocks.spans(sizes.frames)))
        if blocks.memory is not None and not blocks.memory.cuts and any(s.mode == "cut" for s in timeline.switches):
            raise UserError(f"timeline: memory={memory_name(blocks.memory)} cannot cut the scene; leave the # out")
    return {timeline.text: timeline for timeline in found}


def by_sessions(c: ConfigDict, requests: Sequence[Request]) -> dict[str, Timeline]:
    """A timeline of one prompt for each request: a memory that needs pixels is a session's.

    Raises:
      UserError: the video itself is to be changed.
    """
    if c.strength >= 0:
        raise UserError(
            f"strength={c.strength}: not with a memory that needs the decoded pixels; leave one of them out"
        )
    return {request.prompt: Timeline((Switch(0, request.prompt),), request.prompt) for request in requests}


def blocks_of(c: ConfigDict, own: Blocks | None) -> Blocks | None:
    """The run's block layout with the requested window, sink and first frame.

    Raises:
      UserError: they do not fit, or the run is bidirectional.
    """
    changes: dict[str, Any] = {name: c[name] for name in ("window", "sink") if c[name] >= 0}
    if c.memory:
        changes["memory"] = c.memory
    if c.independent_first_frame:
        changes["independent_first_frame"] = True
    if own is None and changes:
        raise UserError(f"{', '.join(changes)}: this run is bidirectional, it has no blocks; leave them out")
    if own is None or not c.memory:
        return replace(own, **changes) if own else None
    layout = replace(own, independent_first_frame=own.independent_first_frame or c.independent_first_frame)
    return with_memory(layout, c.memory, window=c.window, sink=c.sink)


def sampler_of(c: ConfigDict, run: Run) -> FewStep | ManyStep:
    """The run's sampler with what `c.sampler` changes.

    Raises:
      UserError: a setting of the other kind of sampler, or one that it cannot have.
    """
    given = {name: value for name, value in c.sampler.items() if value != SAMPLERS_OWN[name]}
    few = isinstance(run.sampler, FewStep)
    kind, other = (
        ("few-step", ("solver", "solver_steps", "guidance")) if few else ("many-step", ("kind", "steps", "first_steps"))
    )
    if wrong := [name for name in given if name in other]:
        raise UserError(f"sampler.{wrong[0]}: run {run.name!r} has a {kind} sampler, which has no such setting")
    values: dict[str, Any] = {"steps" if name == "solver_steps" else name: value for name, value in given.items()}
    if kind := values.pop("kind", ""):
        if kind not in FEW_STEP_KINDS:
            raise UserError(f"sampler.kind={kind!r}: use {' or '.join(FEW_STEP_KINDS)}")
        values["rolling"] = kind == "rolling"
    sampler = replace(run.sampler, **values)
    sampler.first_sigmas() if isinstance(sampler, FewStep) else sampler.grid()
    return sampler


def with_strength(c: ConfigDict, sampler: FewStep | ManyStep) -> FewStep | ManyStep:
    """The sampler that begins with `c.video` at the noise level `c.strength`, if that is asked for.

    Raises:
      UserError: a strength without a video, or beside what goes on from one.
    """
    if c.strength < 0:
        return sampler
    if not c.video:
        raise UserError(f"strength={c.strength}: give the video that it is about too, --config.video=FILE")
    if c.given_frames or c.timeline:
        both = "given_frames" if c.given_frames else "timeline"
        raise UserError(f"strength and {both}: give one of them; with strength the video itself is changed")
    return replace(sampler, strength=c.strength)


def tiled_decoder(c: ConfigDict, run: Run) -> Callable[[jax.Array], jax.Array] | None:
    """Decodes finished latents tile by tile and frame by frame; None when the codec streams whole frames.

    Raises:
      UserError: tiles for another decoder than the Wan VAE.
    """
    if not c.tile:
        return None
    codec = run.world.codec
    if not isinstance(codec, WanVAE):
        raise UserError(f"tile={c.tile}: only decoder=vae of a Wan world decodes in tiles; leave it at 0")
    step = 3 * c.tile // 4 // codec.stride[1] * codec.stride[1]
    return partial(decode_tiled, codec, tile=(c.tile, c.tile), stride=(step, step), frames=1)


# ---- what videos begin with


def count_given(c: ConfigDict, run: Run, requests: Sequence[Request], blocks: Blocks | None, total: int) -> int:
    """Number of given latent frames: 1 with a picture, by `video` and `given_frames`, or 0.

    Raises:
      UserError: a picture and a video, pictures for some prompts only, a bidirectional run, or frames that end inside a
        block.
    """
    pictures = sum(bool(request.image) for request in requests)
    if takes_picture(run.model.config):
        if pictures != len(requests) or c.video:
            raise UserError(f"run={run.name!r} is image to video: give each of its prompts a picture (image), no video")
        if width := run.model.config.image_dim:
            check_image_encoder(run.world.folder, width)
        return 0
    if pictures and c.video:
        raise UserError("image and video are both given; a video continues one of them")
    if pictures not in (0, len(requests)):
        raise UserError(f"{pictures} of {len(requests)} prompts have a picture; give all of them one, or none")
    if not pictures and (not c.video or c.strength >= 0):
        return 0
    if blocks is None and not (pictures and run.image_start):
        raise UserError(
            f"run={run.name!r} is bidirectional: it makes all frames at once and cannot go on from given ones"
            + ("; give it a picture (image)" if run.image_start else "")
        )
    if blocks is None:
        return 1
    if pictures:
        count = 1
    elif Path(c.video).suffix in LATENTS:
        count = c.given_frames or len(read_latents(c.video))
    else:
        available = (video_frames(c.video, c.fps) - 1) // run.world.codec.stride[0] + 1
        count = c.given_frames or default_given(available, total, blocks)
    given_blocks(blocks, count)
    return count


def read_given(c: ConfigDict, job: Job, file: str) -> np.ndarray:
    """What a video begins with: latents_FHWC of a file of latents; of a picture or a video's end, video_PHWC.

    Raises:
      UserError: a file that cannot be read or does not fit.
    """
    sizes = job.sizes
    _, height, width = sizes.pixels()
    if Path(file).suffix in LATENTS:
        latents, shape = read_latents(file), (sizes.height, sizes.width, job.run.model.config.out_dim)
        if latents.shape[1:] != shape or len(latents) < sizes.given:
            raise UserError(f"video={file!r} holds latents {latents.shape}; needs {sizes.given} or more of {shape}")
        return latents[: sizes.given]
    if file == c.video:
        return read_video_end(file, pixel_frames(sizes.given, sizes.stride[0]), height, width, c.fps, c.fit)
    return read_image(file, height, width, c.fit)


def read_source(c: ConfigDict, job: Job) -> np.ndarray:
    """What a video is made of with `c.strength`: the beginning of `c.video`, video_PHWC, or latents_FHWC of a file.

    Raises:
      UserError: a file that cannot be read, or is shorter than the video that is asked for.
    """
    frames, height, width = job.sizes.pixels()
    if Path(c.video).suffix in LATENTS:
        latents, shape = read_latents(c.video), (job.sizes.height, job.sizes.width, job.run.model.config.out_dim)
        if latents.shape[1:] != shape or len(latents) < job.sizes.frames:
            need = f"{job.sizes.frames} or more of {shape}"
            raise UserError(f"video={c.video!r} holds latents {latents.shape}; needs {need}")
        return latents[: job.sizes.frames]
    return read_video_start(c.video, frames, height, width, c.fps, c.fit)


def sampler_record(sampler: FewStep | ManyStep) -> dict[str, Any]:
    """A sampler as plain values; a strength of 1 is none, as is one that does not roll."""
    return {key: x for key, x in asdict(sampler).items() if (key, x) not in (("strength", 1.0), ("rolling", False))}


def hash_file(file: str | Path) -> str:
    """A hash of a file's content: 16 hex digits."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def hash_pictures(requests: Sequence[Request]) -> tuple[dict[str, str], list[tuple[int, str]]]:
    """Hashes of the pictures by path, and the requests whose picture cannot be read."""
    hashes: dict[str, str] = {}
    broken: dict[str, str] = {}
    for file in {request.image: None for request in requests if request.image}:
        try:
            hashes[file] = hash_file(file)
        except OSError as error:
            broken[file] = f"image={file!r}: cannot read the picture ({error.strerror or error})"
    return hashes, [(n, broken[r.image]) for n, r in enumerate(requests) if r.image in broken]


def weights_hash(run: Run) -> str:
    """A hash that identifies a run's weights without reading them: 16 hex digits, equal for copies.

    Of an exported model it is the file's content; of a checkpoint its files' names, which are drawn when it is written.
    """
    if exported := asset(run.name, MODEL_FILE):
        return hash_file(exported)
    return checkpoint_hash(path_of(run.name), run.step)


# ---- requests, one by one


def check_prompts(job: Job, negative_prompt: str) -> list[tuple[int, str]]:
    """The requests with a prompt that the text encoder cannot take.

    Raises:
      UserError: it cannot take the negative prompt.
    """
    fault = job.run.world.prompt_fault
    if wrong := fault(negative_prompt):
        raise UserError(f"negative_prompt {wrong}")
    by_prompt = {prompt: fault(prompt) for prompt in job.prompts(range(len(job.requests)))}
    wrong_in = [(n, next(filter(None, map(by_prompt.get, job.prompts([n]))), "")) for n in range(len(job.requests))]
    return [(n, f"prompt {wrong}") for n, wrong in wrong_in if wrong]


def check_requests(c: ConfigDict, job: Job, numbers: Sequence[int]) -> None:
    """Reports all faults of the requests in one line; pictures are read one at a time.

    Args:
      numbers: of the requests whose pictures will be needed.

    Raises:
      UserError: there are faults; it names the first ones.
    """
    faults = list(job.faults)
    users: dict[str, list[int]] = {}
    for n in numbers:
        if (file := job.requests[n].image) in job.hashes:
            users.setdefault(file, []).append(n)
    for file in followed(users, len(users), "picture", "check", shown=c.progress and len(users) > 1):
        try:
            read_given(c, job, file)
        except UserError as error:
            faults += [(n, str(error)) for n in users[file]]
    if faults:
        raise UserError(_faults_message(c, job.requests, faults))


def _faults_message(c: ConfigDict, requests: Sequence[Request], faults: Sequence[tuple[int, str]]) -> str:
    """The faults by what they are, with where in the prompt file they are."""
    by_message: dict[str, list[str]] = {}
    for n, message in sorted(faults):
        found = by_message.setdefault(message, [])
        if requests[n].place not in found:
            found.append(requests[n].place)
    if not c.prompts and len(by_message) == 1:
        return next(iter(by_message))
    lines = []
    for message, (first, *rest) in list(by_message.items())[:FAULTS]:
        lines.append(f"{first}{f' and {len(rest)} more' if rest else ''}: {message}")
    if len(by_message) > FAULTS:
        lines.append(f"and {len(by_message) - FAULTS} more")
    broken = len({n for n, _ in faults})
    return f"{c.prompts or 'prompt'}, {broken} of {len(requests)} requests: {'; '.join(lines)}"
