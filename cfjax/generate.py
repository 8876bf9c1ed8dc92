"""`cfjax generate`: captions to mp4 files, streamed block by block where the sampler is few-step."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.evaluation.video import contact_sheet, to_uint8, write_mp4, write_png
from cfjax.models.wan import embed_text
from cfjax.rollout.generate import FewStep
from cfjax.rollout.stream import stream
from cfjax.runs import Run, open_run

DESCRIPTION = (
    """Generates videos from captions with a trained run: mp4 files, a contact sheet and settings.json with timings."""
)


def main(argv: Sequence[str]) -> int:
    """Parses the command line, generates, writes."""
    c, workdir, _ = parse(
        "generate", argv, description=DESCRIPTION, default_config="configs/generate.py", default_workdir="runs/generate"
    )
    run = open_run(c.run, ema=c.ema)
    prompts = [text.strip() for text in c.prompt.split("|") if text.strip()]
    if not prompts:
        raise UserError("prompt is empty; give --config.prompt='a red circle moving left'")
    for text in prompts:
        unknown = run.world.text.tokenizer.unknown_words(text)
        if unknown:
            raise UserError(
                f"prompt {text!r}: this model never saw {', '.join(map(repr, unknown))}; {_vocabulary(run)}"
            )
    captions = [text for text in prompts for _ in range(c.videos)]
    video, timings = generate_videos(run, captions, c.seed)
    write_videos(c, workdir, run, captions, video, timings)
    return 0


def _vocabulary(run: Run) -> str:
    s = run.world.shapes
    return f"write 'a COLOUR SHAPE moving DIRECTION' of {', '.join((*s.colours, *s.shapes, *s.directions))}"


def generate_videos(run: Run, captions: list[str], seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """video_BPHWC, and timings: seconds per block of a compiled stream, or of the whole for other samplers."""
    if not isinstance(run.sampler, FewStep) or run.blocks is None:
        run.sample(captions, seed)
        begun = time.perf_counter()
        video = run.sample(captions, seed)
        return video, {"seconds": time.perf_counter() - begun, "network_calls": run.calls()}
    text_kv = embed_text(run.model, jnp.asarray(run.world.text.encode(captions)))
    seconds: list[float] = []
    for _ in range(2):  # the first pass compiles
        chunks, seconds, begun = [], [], time.perf_counter()
        blocks = stream(
            run.model,
            run.world.codec,
            text_kv,
            jax.random.key(seed),
            run.sampler,
            run.blocks,
            num_frames=run.latent_shape[0],
            latent_shape=run.latent_shape[1:],
            batch=len(captions),
        )
        for video, _ in blocks:
            chunks.append(video)
            seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
    timings = {"seconds": sum(seconds), "seconds_per_block": seconds, "network_calls": run.calls()}
    return np.concatenate(chunks, axis=1), timings


def write_videos(
    c: ConfigDict, workdir: Path, run: Run, captions: list[str], video: np.ndarray, timings: dict[str, Any]
) -> None:
    """One mp4 per video, contact_sheet.png and settings.json in `workdir`."""
    workdir.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(video)
    for index, (text, clip) in enumerate(zip(captions, pixels, strict=True)):
        write_mp4(workdir / f"{index:03d}_{text.replace(' ', '_')[:80]}.mp4", clip, fps=c.fps, scale=c.scale)
    write_png(workdir / "contact_sheet.png", contact_sheet(pixels), scale=max(1, c.scale // 2))
    record = {**c.to_dict(), "stage": run.stage, "step": run.step, "captions": captions, **timings}
    (workdir / "settings.json").write_text(json.dumps(record, indent=1))
    rate = pixels.shape[0] * pixels.shape[1] / timings["seconds"]
    say(f"{len(captions)} videos in {workdir}: {timings['network_calls']} network calls each, {rate:.0f} frames/s")
    if "seconds_per_block" in timings:
        say(f"first frames after {1000 * timings['seconds_per_block'][0]:.0f} ms (compiled)")
