"""`cfjax generate`: prompts, pictures and videos to mp4 files, streamed block by block where the sampler is causal."""

import importlib.metadata
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import jax
from ml_collections import ConfigDict

from cfjax.conversion.lora import check_loras, merged, open_loras
from cfjax.conversion.lora_files import LoraFile
from cfjax.core.cli import parse
from cfjax.core.console import counted, say
from cfjax.core.lock import holding
from cfjax.core.paths import check_writable, in_bucket, one_line, reporting_storage_errors, unusable, write_atomically
from cfjax.core.precision import to_record
from cfjax.core.programs import Programs
from cfjax.core.tensor_files import tensor_bytes
from cfjax.data.captions import Columns
from cfjax.data.requests import Request, read_requests
from cfjax.evaluation.pages import SheetPages, sheet_pages
from cfjax.evaluation.video import write_mp4
from cfjax.evaluation.video_set import (
    Found,
    SetPlan,
    VideoSet,
    check_free,
    check_same,
    latents_name,
    plan_set,
    read_set,
    requested_videos,
)
from cfjax.experiment.batches import generate_batches
from cfjax.experiment.experts import with_high_noise
from cfjax.experiment.job import (
    Job,
    check_requests,
    hash_file,
    plan,
    sampler_record,
    timed_requests,
    weights_hash,
)
from cfjax.experiment.runs import load_weights, open_run
from cfjax.memory.names import blocks_record
from cfjax.models.text_cache import TextCache, fill
from cfjax.rollout.clips import Clips, Timings, cache_bytes
from cfjax.rollout.generate import ManyStep
from cfjax.rollout.sizes import pixel_frames
from cfjax.worlds.wan import image_encoder_hash
from cfjax.worlds.world import WorldParts

DESCRIPTION = """Generates videos with a run that was trained here or converted: text to video, image to video, and the
continuation of a video. Writes mp4 files, contact sheets, settings.json with every setting and timing, and videos.jsonl
with what is finished, which --config.resume=True resumes."""
TEXT_ROWS = ".text_rows"  # folder in the workdir, as long as videos are made
# What decides a request's video; a set cannot be resumed with other values.
DECIDING = (
    *("run.stage", "run.step", "run.averaged", "run.weights", "run.lora", "run.high_noise", "run.storage"),
    "run.image_encoder",
    *("network", "world", "decoder"),
    *("frames", "given_frames", "height", "width", "latent_shape", "sampler", "blocks", "negative_prompt"),
    *("video_sha256", "fit", "fps", "scale"),
)
MEASURED = ("seconds", "timings", "peak_device_bytes", "peak_host_bytes", "largest_program_temporary_bytes")
RESUME = "what is finished stays, and --config.resume=True goes on"
PACKAGES = ("cfjax", "jax", "jaxlib", "flax", "numpy")


def main(argv: Sequence[str]) -> int:
    """Parses the command line, checks all of it, generates, writes."""
    c, workdir, _ = parse(
        "generate",
        argv,
        description=DESCRIPTION,
        default_config="configs/generate.py",
        default_workdir="runs/generate",
        bucket=True,
    )
    with holding(workdir), reporting_storage_errors(workdir, RESUME):
        generate(c, workdir)
    return 0


def generate(c: ConfigDict, workdir: Path) -> None:
    """Checks all of it, generates, writes.

    Raises:
      UserError: a request is invalid, or the output cannot be written.
    """
    begun = time.perf_counter()
    job = open_job(c, workdir)
    videos = VideoSet(workdir, requested_videos(job.requests, job.hashes), settings(c, job))
    found = read_set(workdir, resume=c.resume)
    if c.resume and found.asked:
        check_same(found, videos.settings, DECIDING)
    todo = plan_set(found, videos.asked, latents=c.save_latents, overwrite=c.overwrite)
    batches = batches_of(len(job.requests), job.batch, set(todo.make))
    check_requests(c, job, [n for numbers in batches for n in numbers])
    if report_found(found, todo, videos):
        return
    seconds = {"open": time.perf_counter() - begun}
    measured = make_videos(c, job, videos, found, todo, batches, seconds)
    seconds["total"] = time.perf_counter() - begun
    kept = {name: found.settings[name] for name in MEASURED if name in found.settings}
    report(todo, workdir, videos.write(measured or kept, complete=True))


def open_job(c: ConfigDict, workdir: Path) -> Job:
    """The requests, the run without its weights, and both combined into a job.

    Raises:
      UserError: they do not fit or cannot be read, or the workdir cannot be written to or holds what would be replaced.
    """
    requests = timed_requests(c) if c.timeline else plain_requests(c)
    check_writable(workdir)
    if not (c.resume or c.overwrite):
        check_free(workdir, requested_videos(requests, {}), latents=c.save_latents)
    run = open_run(
        c.run,
        ema=c.ema,
        world=c.world,
        parts=WorldParts(c.decoder, c.decoder_precision, with_text=False, text_cache=c.text_cache),
        with_model=False,
        stage=c.expect.stage,
        block_frames=c.expect.block_frames,
        precision=c.precision,
        attention=c.attention,
        storage=c.storage,
    )
    check_loras(open_loras(c.lora), run.model.config)
    return plan(c, run, requests)


def plain_requests(c: ConfigDict) -> list[Request]:
    """The requests of `c.prompt` or `c.prompts`."""
    return read_requests(
        c.prompt,
        c.prompts,
        image=c.image,
        seed=c.seed,
        seeds=tuple(c.seeds),
        videos=c.videos,
        columns=Columns(caption=c.prompt_column, choice=c.caption_choice),
        encoding=c.encoding,
    )


def batches_of(count: int, batch: int, make: set[int]) -> list[range]:
    """The batches with something to make. They are always cut alike: a video's neighbours may decide its last bits."""
    starts = (range(start, min(start + batch, count)) for start in range(0, count, batch))
    return [numbers for numbers in starts if make.intersection(numbers)]


def report_found(found: Found, todo: SetPlan, videos: VideoSet) -> bool:
    """Says what is there already; whether that is everything."""
    if todo.unasked:
        first = ", ".join(todo.unasked[:3]) + (", ..." if todo.unasked[3:] else "")
        say(f"{found.folder}: {counted(len(todo.unasked), 'video')} no longer requested; kept: {first}")
    pages = todo.pages == sheet_pages(len(videos.asked)).keys()
    if found.settings.get("complete") and found.asked == videos.asked and not todo.make and pages:
        say(f"{found.folder} is complete, {counted(len(videos.asked), 'video')}; nothing to make")
        return True
    if there := len(videos.asked) - len(todo.make):
        say(f"{found.folder} has {there} of {counted(len(videos.asked), 'video')}; going on with {len(todo.make)}")
        for name in ("versions", "device"):
            before, now = found.settings.get(name), videos.settings[name]
            if before != now:
                say(f"note: {name} then {before}, now {now}: the last bits of the videos may differ")
    return False


# ---- making it


def make_videos(
    c: ConfigDict,
    job: Job,
    videos: VideoSet,
    found: Found,
    todo: SetPlan,
    batches: Sequence[range],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Makes what is to be made and writes it; returns what was measured, {} when there was nothing to make.

    Args:
      seconds: gets those of the text, of opening the weights, and of compiling.
    """
    programs, timings, make = Programs(say if c.progress else None), Timings(), set(todo.make)
    pages = SheetPages(
        videos.folder,
        [video.file for video in videos.asked],
        make=todo.make,
        good=todo.pages,
        shape_PHW=job.sizes.pixels(),
        scale=c.scale,
    )
    with text_rows(c, job, videos.folder) as texts:
        if batches:
            seconds["text"] = encode_texts(job, texts, job.prompts(n for numbers in batches for n in numbers))
            loading = time.perf_counter()
            loras = open_loras(c.lora)
            run = load_weights(job.run, partial(merged, loras=loras) if loras else None)
            job = replace(job, run=with_high_noise(run, job.high))
            seconds["open"] += time.perf_counter() - loading
        with videos.begin(found, todo):
            for numbers, clips in generate_batches(c, job, texts, batches, programs):
                for i, number in enumerate(numbers):
                    if number in make:
                        write_video(c, job, videos, number, clips, i)
                        pages.add(number, clips.video_BPHWC[i])
                timings.add(clips.times)
                videos.push()
            pages.close()
    if not batches:
        return {}
    seconds["compile"] = programs.seconds
    return measured(job, timings, seconds, programs, len(todo.make))


@contextmanager
def text_rows(c: ConfigDict, job: Job, workdir: Path) -> Iterator[TextCache]:
    """Where text rows are while videos are made: in the user's cache, or in the workdir, from which they go at the end.

    For a workdir in a bucket they are in a temporary folder of this machine.
    """
    world = job.run.world
    if c.text_cache:
        folder = Path(c.text_cache)
    else:
        folder = Path(tempfile.mkdtemp(prefix="cfjax-")) if in_bucket(workdir) else workdir / TEXT_ROWS
    try:
        yield world.open_text_cache(folder)
    finally:
        if not c.text_cache:
            shutil.rmtree(folder, ignore_errors=True)


def encode_texts(job: Job, texts: TextCache, prompts: Sequence[str]) -> float:
    """Encodes the prompts, and the negative one for a guided sampler; the seconds, reading the encoder included."""
    begun = time.perf_counter()
    fill(
        job.run.world.load_text,
        texts,
        [*prompts, job.negative_prompt] if isinstance(job.sampler, ManyStep) else prompts,
    )
    return time.perf_counter() - begun


# ---- what is written


def write_video(c: ConfigDict, job: Job, videos: VideoSet, number: int, clips: Clips, row: int) -> None:
    """Writes a video's latents, its mp4, and then its line in the record.

    Raises:
      UserError: they cannot be written.
    """
    video, latents = videos.asked[number], None
    file = videos.folder / video.file
    try:
        if c.save_latents:
            run = job.run
            about = {"prompt": video.prompt, "seed": str(video.seed), "run": run.name, "step": str(run.step)}
            content = tensor_bytes({"latents_FHWC": clips.latents_BFHWC[row]}, about)
            write_atomically(videos.folder / latents_name(video.file), content)
            latents = len(content)
        size = write_mp4(file, clips.video_BPHWC[row], fps=c.fps, scale=c.scale)
        videos.finish(number, size, latents)
    except (OSError, av.error.FFmpegError) as error:
        raise unusable(error)(f"{file}: cannot be written ({one_line(error)}); {RESUME}") from error


def settings(c: ConfigDict, job: Job) -> dict[str, Any]:
    """What settings.json says before the first video: everything that decides what the videos are, and where."""
    device, run, sizes = jax.devices()[0], job.run, job.sizes
    frames, height, width = sizes.pixels()
    decoder = run.world.decoder_record()
    return {
        "config": c.to_dict(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "device": {"platform": device.platform, "kind": device.device_kind, "used": 1, "there": jax.device_count()},
        "run": {
            "name": run.name,
            "stage": run.stage,
            "step": run.step,
            "averaged": run.averaged,
            "weights": weights_hash(run),
            **({"high_noise": job.high.record(weights_hash(job.high.run))} if job.high else {}),
            **({"image_encoder": image_encoder_hash(run.world.folder)} if run.model.config.image_dim else {}),
            **({"storage": c.storage} if c.storage else {}),
            **({"lora": [lora_record(lora) for lora in open_loras(c.lora)]} if c.lora else {}),
        },
        "network": to_record(run.model.config),
        "world": run.world.fingerprint(),
        "decoder": {"name": decoder["name"], "tile": c.tile, **decoder},
        "frames": frames,
        "given_frames": pixel_frames(sizes.given, sizes.stride[0]) if sizes.given else 0,
        "height": height,
        "width": width,
        "latent_shape": [sizes.frames, sizes.height, sizes.width, run.model.config.out_dim],
        "sampler": sampler_record(job.sampler),
        "blocks": blocks_record(job.blocks) if job.blocks else None,
        "negative_prompt": job.negative_prompt,
        "video_sha256": job.hashes[c.video] if c.video else "",
        **({"prompts_sha256": hash_file(Path(c.prompts))} if c.prompts else {}),
        "fit": c.fit,
        "fps": c.fps,
        "scale": c.scale,
        "network_calls": job.calls(),
        "batch": job.batch,
        "kv_cache_bytes": cache_bytes(run.model, job.sampler, job.blocks, sizes, job.batch),
    }


def lora_record(lora: LoraFile) -> dict[str, Any]:
    """What settings.json says of a LoRA: its file, its content, its weight."""
    return {"file": lora.path.name, "sha256": hash_file(lora.path), "weight": lora.weight}


def measured(job: Job, timings: Timings, seconds: dict[str, float], programs: Programs, made: int) -> dict[str, Any]:
    """What settings.json says besides, once videos were made: seconds and bytes of this command."""
    frames = job.sizes.pixels()[0]
    before = pixel_frames(job.sizes.given, job.sizes.stride[0]) if job.sizes.given else 0
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
        "peak_host_bytes": peak_host_bytes(),
        "largest_program_temporary_bytes": programs.temporary_bytes,
        "seconds": seconds,
        "timings": timings.record(made, frames - before, job.batch),
    }


def peak_host_bytes() -> int | None:
    """Peak memory of this process, where the system reports it."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(todo: SetPlan, workdir: Path, record: dict[str, Any]) -> None:
    """Three lines on the terminal, or one when only what describes the videos was written."""
    if not todo.make:
        there = counted(len(record["videos"]), "video")
        return say(f"{workdir} is complete, {there}; contact sheets and settings are updated")
    t, seconds = record["timings"], record["seconds"]
    tile = f" in tiles of {record['decoder']['tile']}" if record["decoder"]["tile"] else ""
    videos, frames = counted(t["videos"], "video"), counted(record["frames"], "frame")
    calls = counted(record["network_calls"], "network call")
    say(f"{videos} of {frames}, {record['width']} x {record['height']}, in {workdir}")
    say(
        f"{calls} each; {t['frames_per_second_with_decoder']:.1f} frames/s with the "
        f"{record['decoder']['name']} decoder{tile}, {t['frames_per_second_without_decoder']:.1f} without, "
        f"batch {record['batch']} on one {record['device']['kind']}"
    )
    say(
        f"text {seconds['text']:.1f} s, compiling {seconds['compile']:.1f} s (not in the rates), first frames after "
        f"{1000 * t['first_frame_seconds'][-1]:.0f} ms, KV cache {record['kv_cache_bytes'] / 2**20:.1f} MiB"
    )
