"""A run's videos for captions that training never saw, measured from decoded pixels; and the records of that."""

import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import read_if_whole, replacing, write_atomically
from cfjax.core.progress import compiling, followed
from cfjax.evaluation.guard import Collector
from cfjax.evaluation.shapes_metrics import Factors, evaluate_shapes
from cfjax.evaluation.video import to_uint8
from cfjax.experiment.runs import Run
from cfjax.worlds.toy import ToyWorld, evaluation_clips, stack_videos


def real_clips(world: ToyWorld, clips: int) -> dict[str, Any]:
    """The same measurement on real clips, and after the codec's round trip: what a perfect model would score."""
    real = evaluation_clips(world.shapes, clips)
    video = stack_videos(real)
    factors, captions = [clip["factors"] for clip in real], [clip["caption"] for clip in real]
    decoded = np.asarray(world.codec.decode(world.codec.encode(jnp.asarray(video))))
    return {
        "captions": captions,
        "videos": to_uint8(video),
        "summary": judge(video, factors, captions, world),
        "codec_summary": judge(decoded, factors, captions, world),
    }


def judge(
    video_BPHWC: np.ndarray, factors: Sequence[Factors], captions: Sequence[str], world: ToyWorld
) -> dict[str, float]:
    """`evaluate_shapes`' summary, and what needs no caption: see `guard.measure_clip` and `guard.diversity`."""
    summary = evaluate_shapes(video_BPHWC, factors, world.shapes)["summary"]
    guard = Collector()
    for caption, clip in zip(captions, video_BPHWC, strict=True):
        guard.add(caption, clip)
    return {**{name: float(value) for name, value in summary.items()}, **guard.values()}


def evaluate_run(run: Run, *, clips: int, batch: int, seed: int, kept: int = 8) -> dict[str, Any]:
    """Generates `clips` videos over the held-out captions and measures them.

    Returns:
      "summary" (means, with Wilson 95 % bounds for accuracies), "network_calls" per video, "frames_per_second" of the
      sampler at this batch (compiled, decoding included, the best batch), "captions" and "videos" of the kept ones.

    Raises:
      UserError: `batch` does not divide `clips`.
    """
    if clips % batch:
        raise UserError(f"clips={clips} must be a multiple of batch={batch}")
    real = evaluation_clips(run.toy.shapes, clips)
    captions = [clip["caption"] for clip in real]
    videos, fastest = [], float("inf")
    with compiling(f"the sampler of {run.name}"):
        run.sample(captions[:batch], seed)
    for start in followed(range(0, clips, batch), clips // batch, "batch", f"evaluate {run.stage}"):
        begun = time.perf_counter()
        videos.append(run.sample(captions[start : start + batch], seed + 1 + start))
        fastest = min(fastest, time.perf_counter() - begun)
    video = np.concatenate(videos)
    summary = judge(video, [clip["factors"] for clip in real], captions, run.toy)
    return {
        "stage": run.stage,
        "step": run.step,
        "summary": summary,
        "network_calls": run.calls(),
        "frames_per_second": batch * video.shape[1] / fastest,
        "captions": captions[:kept],
        "videos": to_uint8(video[:kept]),
    }


def save_evaluation(workdir: Path, result: dict[str, Any]) -> None:
    """Writes samples.npz and, last, evaluation.json."""
    write_arrays(workdir / "samples.npz", videos=result["videos"], captions=np.array(result["captions"]))
    plain = {name: value for name, value in result.items() if name != "videos"}
    write_atomically(workdir / "evaluation.json", json.dumps(plain, indent=1))


def load_evaluation(workdir: Path) -> dict[str, Any] | None:
    """What `save_evaluation` wrote; None where it is not there, or was cut by a power failure."""
    result: dict[str, Any] | None = read_if_whole(workdir / "evaluation.json")
    arrays = read_arrays(workdir / "samples.npz")
    if result is None or arrays is None or "videos" not in arrays:
        return None
    result["videos"] = arrays["videos"]
    return result


def write_arrays(path: Path, **arrays: Any) -> None:
    """An .npz file, atomically."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote; None where it is not there, or was cut by a power failure."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            return dict(archive)
    except (FileNotFoundError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
