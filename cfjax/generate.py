"""`cfjax generate`: prompts, pictures and videos to mp4 files, streamed block by block where the sampler is causal."""

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save
from tqdm import tqdm

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.paths import replacing
from cfjax.core.programs import Programs
from cfjax.data.requests import (
    LATENTS,
    Request,
    read_image,
    read_latents,
    read_requests,
    read_video_end,
    video_frames,
)
from cfjax.evaluation.video import contact_sheet, pick_frames, shrink, to_uint8, write_mp4, write_png
from cfjax.models.vae import WanVAE
from cfjax.models.vae_tiling import decode_tiled
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import given_blocks
from cfjax.rollout.clips import Clips, Times, cache_bytes, make_clips, timing_record
from cfjax.rollout.generate import FewStep, ManyStep, network_calls
from cfjax.rollout.sizes import Sizes, default_given, latent_sizes, pixel_frames
from cfjax.rollout.stream import seeded_noise
from cfjax.runs import Run, load_weights, open_run
from cfjax.wan_world import WanWorld
from cfjax.world import World

DESCRIPTION = """Generates videos with a run that was trained here or converted: text to video, image to video, and the
continuation of a video. Writes mp4 files, a contact sheet, and settings.json with every setting and timing."""
SHEET, SETTINGS = "contact_sheet.png", "settings.json"
SHEET_FRAMES, SHEET_WIDTH = 8, 208  # pictures per row of the contact sheet, and their width in pixels at most
SAMPLERS_OWN = {"steps": (), "first_steps": (), "solver": "", "solver_steps": 0, "guidance": -1.0, "shift": 0.0}
PACKAGES = ("cfjax", "jax", "jaxlib", "flax", "numpy")


@dataclass(frozen=True)
class Job:
    """What is to be made, once everything that was asked for fits together."""

    run: Run
    requests: list[Request]
    sampler: FewStep | ManyStep
    blocks: Blocks | None
    sizes: Sizes
    files: list[Path]
    batch: int

    def calls(self) -> int:
        """Network evaluations per video."""
        return network_calls(self.sampler, self.blocks, self.sizes.generated, self.sizes.given)


def main(argv: Sequence[str]) -> int:
    """Parses the command line, generates, writes."""
    c, workdir, _ = parse(
        "generate",
        argv,
        description=DESCRIPTION,
        default_config="configs/generate.py",
        default_workdir="runs/generate",
        bucket=True,
    )
    begun = time.perf_counter()
    requests = read_requests(c.prompt, c.prompts, image=c.image, seed=c.seed, seeds=tuple(c.seeds), videos=c.videos)
    files = output_files(workdir, requests, overwrite=c.overwrite)
    run = open_run(
        c.run,
        ema=c.ema,
        world=c.world,
        decoder=c.decoder,
        decoder_precision=c.decoder_precision,
        with_model=False,
        with_text=False,
        text_cache=c.text_cache,
        stage=c.expect.stage,
        block_frames=c.expect.block_frames,
        precision=c.precision,
        attention=c.attention,
    )
    job = plan(c, run, requests, files)
    seconds = {"open": time.perf_counter() - begun}
    texts, negative, seconds["text"] = encode_texts(c, job)
    loading = time.perf_counter()
    job = replace(job, run=load_weights(run))
    seconds["open"] += time.perf_counter() - loading
    programs, times = Programs(), []
    sheet: list[np.ndarray] = []
    for part, clips in generate_batches(c, job, texts, negative, programs):
        write_clips(c, job, part, clips, sheet)
        times.append(clips.times)
    seconds |= {"compile": programs.seconds, "total": time.perf_counter() - begun}
    write_png(workdir / SHEET, contact_sheet(np.stack(sheet), SHEET_FRAMES), scale=max(1, c.scale // 2))
    record = settings(c, job, times, seconds, programs)
    with replacing(workdir / SETTINGS) as partial_file:
        partial_file.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    report(job, workdir, record)
    return 0


# ---- what is asked for


def output_files(workdir: Path, requests: Sequence[Request], *, overwrite: bool) -> list[Path]:
    """The mp4 of every request: its number, its prompt as far as a file's name may say it, its seed.

    Raises:
      UserError: one of them, the contact sheet or the settings are there already.
    """
    files = [workdir / f"{i:03d}_{request.slug()}.mp4" for i, request in enumerate(requests)]
    there = [file for file in (*files, workdir / SHEET, workdir / SETTINGS) if file.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if there[1:] else ""
        raise UserError(f"{there[0]}{more} would be replaced; choose another --workdir or --config.overwrite=True")
    return files


def plan(c: ConfigDict, run: Run, requests: list[Request], files: list[Path]) -> Job:
    """Settings and run brought together.

    Raises:
      UserError: they do not fit.
    """
    check_prompts(run, requests)
    if c.batch < 1:
        raise UserError(f"batch={c.batch}: use 1 or more")
    blocks, stride = blocks_of(c, run.blocks), run.world.codec.stride
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
    return Job(run, requests, sampler_of(c, run), blocks, sizes, files, min(c.batch, len(requests)))


def check_prompts(run: Run, requests: Sequence[Request]) -> None:
    """The toy's text encoder knows few words; a real one takes any prompt.

    Raises:
      UserError: a word that the toy never saw.
    """
    if not isinstance(run.world, World):
        return
    s = run.world.shapes
    known = f"write 'a COLOUR SHAPE moving DIRECTION' of {', '.join((*s.colours, *s.shapes, *s.directions))}"
    for request in requests:
        if unknown := run.world.text.tokenizer.unknown_words(request.prompt):
            words = ", ".join(map(repr, unknown))
            raise UserError(f"prompt {request.prompt!r}: this model never saw {words}; {known}")


def blocks_of(c: ConfigDict, own: Blocks | None) -> Blocks | None:
    """The run's block layout with the window, sink and first frame that are asked for.

    Raises:
      UserError: they do not fit, or are asked of a bidirectional run.
    """
    changes: dict[str, Any] = {name: c[name] for name in ("window", "sink") if c[name] >= 0}
    if c.independent_first_frame:
        changes["independent_first_frame"] = True
    if own is None and changes:
        raise UserError(f"{', '.join(changes)}: this run is bidirectional, it has no blocks; leave them out")
    return replace(own, **changes) if own else None


def sampler_of(c: ConfigDict, run: Run) -> FewStep | ManyStep:
    """The run's sampler with what `c.sampler` changes.

    Raises:
      UserError: a setting of the other kind of sampler.
    """
    given = {name: value for name, value in c.sampler.items() if value != SAMPLERS_OWN[name]}
    few = isinstance(run.sampler, FewStep)
    kind, other = (
        ("few-step", ("solver", "solver_steps", "guidance")) if few else ("many-step", ("steps", "first_steps"))
    )
    if wrong := [name for name in given if name in other]:
        raise UserError(f"sampler.{wrong[0]}: run {run.name!r} has a {kind} sampler, which has no such setting")
    values: dict[str, Any] = {"steps" if name == "solver_steps" else name: value for name, value in given.items()}
    return replace(run.sampler, **values)


def count_given(c: ConfigDict, run: Run, requests: Sequence[Request], blocks: Blocks | None, total: int) -> int:
    """How many latent frames the videos go on from: 1 with a picture, what `video` and `given_frames` say, or 0.

    Raises:
      UserError: a picture and a video, pictures for some prompts only, a bidirectional run, or frames amid a block.
    """
    pictures = sum(bool(request.image) for request in requests)
    if pictures and c.video:
        raise UserError("image and video are both given; a video goes on from one of them")
    if pictures not in (0, len(requests)):
        raise UserError(f"{pictures} of {len(requests)} prompts have a picture; give all of them one, or none")
    if not pictures and not c.video:
        return 0
    if blocks is None:
        raise UserError(
            f"run={run.name!r} is bidirectional: it makes all frames at once and cannot go on from given ones"
        )
    if pictures:
        count = 1
    elif Path(c.video).suffix in LATENTS:
        count = c.given_frames or len(read_latents(c.video))
    else:
        available = (video_frames(c.video, c.fps) - 1) // run.world.codec.stride[0] + 1
        count = c.given_frames or default_given(available, total, blocks)
    given_blocks(blocks, count)
    return count


# ---- making it


def encode_texts(c: ConfigDict, job: Job) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Text rows by prompt, the negative prompt's, and the seconds they took, reading the text encoder included.

    A few-step sampler has no use for the negative prompt: the rows are then some prompt's.
    """
    begun, world = time.perf_counter(), job.run.world
    prompts = sorted({request.prompt for request in job.requests})
    guided = isinstance(job.sampler, ManyStep)
    rows = world.encode_prompts([*prompts, c.negative_prompt or world.negative_prompt] if guided else prompts)
    return dict(zip(prompts, rows, strict=False)), rows[-1], time.perf_counter() - begun


def given_latents(c: ConfigDict, job: Job) -> Callable[[Request], np.ndarray | None]:
    """What each request's video begins with, latents_FHWC; every file is read and encoded once.

    Raises:
      UserError: a file that cannot be read or does not fit.
    """
    sizes, known = job.sizes, {}
    _, height, width = sizes.pixels()

    def read(file: str) -> np.ndarray:
        if Path(file).suffix in LATENTS:
            latents, shape = read_latents(file), (sizes.height, sizes.width, job.run.model.config.in_dim)
            if latents.shape[1:] != shape or len(latents) < sizes.given:
                raise UserError(f"video={file!r} holds latents {latents.shape}; needs {sizes.given} or more of {shape}")
            return latents[: sizes.given]
        if file == c.video:
            video = read_video_end(file, pixel_frames(sizes.given, sizes.stride[0]), height, width, c.fps, c.fit)
        else:
            video = read_image(file, height, width, c.fit)
        world = job.run.world
        encode = world.encode if isinstance(world, WanWorld) else jax.jit(world.codec.encode)
        return np.asarray(encode(jnp.asarray(video[None])))[0]

    def of(request: Request) -> np.ndarray | None:
        file = request.image or c.video
        if file and file not in known:
            known[file] = read(file)
        return known[file] if file else None

    return of


def generate_batches(
    c: ConfigDict, job: Job, texts: dict[str, np.ndarray], negative_SE: np.ndarray, programs: Programs
) -> Iterator[tuple[range, Clips]]:
    """Batches of videos, with the numbers of their requests. A last batch is filled up, so that one shape compiles."""
    given = given_latents(c, job)
    per_batch = len(job.blocks.spans(job.sizes.frames)) - given_count(job) if job.blocks else 1
    starts = range(0, len(job.requests), job.batch)
    with tqdm(total=per_batch * len(starts), unit="block", disable=not c.progress, dynamic_ncols=True) as bar:
        for start in starts:
            numbers = range(start, min(start + job.batch, len(job.requests)))
            rows = [job.requests[min(start + i, len(job.requests) - 1)] for i in range(job.batch)]
            first = [latents for request in rows if (latents := given(request)) is not None]
            clips = make_clips(
                job.run.model,
                job.run.world.codec,
                np.stack([texts[request.prompt] for request in rows]),
                negative_SE,
                job.sampler,
                job.blocks,
                seeded_noise(np.array([request.seed for request in rows], np.uint32), programs),
                job.sizes,
                given_BFHWC=np.stack(first) if first else None,
                decode_whole=tiled_decoder(c, job.run),
                finish=to_uint8,
                programs=programs,
                progress=bar.update,
            )
            yield numbers, clips


def given_count(job: Job) -> int:
    """Blocks that are given."""
    return given_blocks(job.blocks, job.sizes.given) if job.blocks else 0


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


# ---- what is written


def write_clips(c: ConfigDict, job: Job, numbers: range, clips: Clips, sheet: list[np.ndarray]) -> None:
    """One mp4 per video (and its latents), and its row for the contact sheet."""
    for i, number in enumerate(numbers):
        file, request = job.files[number], job.requests[number]
        pixels = clips.video_BPHWC[i]
        write_mp4(file, pixels, fps=c.fps, scale=c.scale)
        sheet.append(shrink(pick_frames(pixels[None], SHEET_FRAMES)[0], SHEET_WIDTH))
        if c.save_latents:
            about = {
                "prompt": request.prompt,
                "seed": str(request.seed),
                "run": job.run.name,
                "step": str(job.run.step),
            }
            with replacing(file.with_suffix(".safetensors")) as partial_file:
                partial_file.write_bytes(save({"latents_FHWC": clips.latents_BFHWC[i]}, metadata=about))


def settings(
    c: ConfigDict, job: Job, times: Sequence[Times], seconds: dict[str, float], programs: Programs
) -> dict[str, Any]:
    """Everything that settings.json says."""
    device, run, sizes = jax.devices()[0], job.run, job.sizes
    frames, height, width = sizes.pixels()
    before = pixel_frames(sizes.given, sizes.stride[0]) if sizes.given else 0
    memory = device.memory_stats() or {}
    return {
        "config": c.to_dict(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "device": {"platform": device.platform, "kind": device.device_kind, "used": 1, "there": jax.device_count()},
        "run": {"name": run.name, "stage": run.stage, "step": run.step, "averaged": run.averaged},
        "network": asdict(run.model.config),
        "world": run.world.fingerprint(),
        "decoder": {"name": c.decoder if isinstance(run.world, WanWorld) else "patch", "tile": c.tile},
        "frames": frames,
        "given_frames": before,
        "height": height,
        "width": width,
        "latent_shape": [sizes.frames, sizes.height, sizes.width, run.model.config.in_dim],
        "sampler": asdict(job.sampler),
        "blocks": asdict(job.blocks) if job.blocks else None,
        "network_calls": job.calls(),
        "batch": job.batch,
        "kv_cache_bytes": cache_bytes(run.model, job.sampler, job.blocks, sizes, job.batch),
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
        "peak_host_bytes": peak_host_bytes(),
        "largest_program_temporary_bytes": programs.temporary_bytes,
        "seconds": seconds,
        "timings": timing_record(times, len(job.requests), frames - before, job.batch),
        "videos": [
            {"file": file.name, **asdict(request)} for file, request in zip(job.files, job.requests, strict=True)
        ],
    }


def peak_host_bytes() -> int | None:
    """The most memory that this process held, where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(job: Job, workdir: Path, record: dict[str, Any]) -> None:
    """Three lines on the terminal."""
    t, seconds = record["timings"], record["seconds"]
    tile = f" in tiles of {record['decoder']['tile']}" if record["decoder"]["tile"] else ""
    say(f"{t['videos']} videos of {record['frames']} frames, {record['width']} x {record['height']}, in {workdir}")
    say(
        f"{record['network_calls']} network calls each; {t['frames_per_second_with_decoder']:.1f} frames/s with the "
        f"{record['decoder']['name']} decoder{tile}, {t['frames_per_second_without_decoder']:.1f} without, "
        f"batch {record['batch']} on one {record['device']['kind']}"
    )
    say(
        f"text {seconds['text']:.1f} s, compiling {seconds['compile']:.1f} s (not in the rates), first frames after "
        f"{1000 * t['first_frame_seconds'][-1]:.0f} ms, KV cache {record['kv_cache_bytes'] / 2**20:.1f} MiB"
    )
