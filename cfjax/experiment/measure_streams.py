"""Streams measured over time: long videos under memory policies, and prompts that change in the middle."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import read_if_whole, write_atomically
from cfjax.core.programs import Programs
from cfjax.core.progress import Progress
from cfjax.data.shapes import parse_caption
from cfjax.evaluation.over_time import drift, follows, judge_pieces, pieces
from cfjax.evaluation.shapes_metrics import Table, evaluate_shapes, wilson
from cfjax.evaluation.video import to_uint8
from cfjax.experiment.measure import read_arrays, write_arrays
from cfjax.experiment.runs import Run
from cfjax.memory.names import with_memory
from cfjax.nn.visibility import Blocks
from cfjax.rollout.clips import Clips, cache_bytes, make_clips
from cfjax.rollout.session_state import Mode
from cfjax.rollout.sizes import Sizes
from cfjax.rollout.stream import Pipeline, seeded_noise
from cfjax.worlds.toy import evaluation_clips

LONG, SWITCH = "long", "switch"


def _layout(run: Run) -> Blocks:
    if run.blocks is None:
        raise UserError(f"run={run.name!r} is bidirectional: it makes all frames at once, and streams none")
    return run.blocks


def measure_long(
    run: Run, memories: Sequence[str], *, frames: int, clips: int, batch: int, seed: int, piece: int = 6, kept: int = 4
) -> dict[str, Any]:
    """Videos of `frames` latent frames over held-out captions under each memory policy, from the same noise.

    Args:
      memories: policies by name, see `memory.names.parse_memory`.
      batch: videos at a time, a divisor of `clips`.
      piece: pixel frames of a piece that is judged, see `evaluation.over_time.judge_pieces`.

    Returns:
      "frames", "captions" and "videos" of the kept ones (by policy, uint8 [N, P, H, W, 3]), and "policies": by name
      the curves "over_time", their "drift" (mean of the last third less that of the first), "cache_bytes" of one video,
      and "frames_per_second" with the decoder, of the fastest batch.

    Raises:
      UserError: a policy that there is none of or that does not fit, a bidirectional run, or a batch that does not
        divide the clips.
    """
    if clips % batch:
        raise UserError(f"clips={clips} must be a multiple of batch={batch}")
    layouts = {memory: with_memory(_layout(run), memory) for memory in memories}
    real = evaluation_clips(run.toy.shapes, clips)
    captions, factors = [clip["caption"] for clip in real], [clip["factors"] for clip in real]
    _, height, width, _ = run.latent_shape
    sizes = Sizes(frames, 0, height, width, run.world.codec.stride)
    pieces(sizes.pixels()[0], piece)
    policies, videos = {}, {}
    with Progress(len(layouts) * clips, "video", "long videos") as bar:
        for memory, layout in layouts.items():
            programs, made = Programs(), list[Clips]()
            for start in range(0, clips, batch):
                made.append(_clips(run, layout, captions[start : start + batch], seed + start, sizes, programs))
                bar.update(batch)
            video = np.concatenate([one.video_BPHWC for one in made])
            over_time = judge_pieces(video, factors, run.toy.shapes, piece)
            fastest = min(sum(one.times.network) + sum(one.times.decode) for one in made)
            policies[memory] = {
                "over_time": {name: row.tolist() for name, row in over_time.items()},
                "drift": {name: drift(row) for name, row in over_time.items() if name != "frame"},
                "cache_bytes": cache_bytes(run.model, run.sampler, layout, sizes, 1),
                "frames_per_second": batch * video.shape[1] / fastest,
            }
            videos[memory] = to_uint8(video[:kept])
    return {"frames": frames, "captions": captions[:kept], "policies": policies, "videos": videos}


def _clips(run: Run, layout: Blocks, captions: list[str], seed: int, sizes: Sizes, programs: Programs) -> Clips:
    return make_clips(
        Pipeline(run.model, run.world.codec, run.sampler, layout),
        run.world.encode_prompts(captions),
        run.world.negative_text_SE(),
        seeded_noise(np.arange(seed, seed + len(captions), dtype=np.uint32), programs),
        sizes,
        programs=programs,
    )


def measure_switch(
    run: Run,
    prompts: tuple[str, str],
    modes: Sequence[Mode],
    *,
    memory: str,
    frames: int,
    clips: int,
    seed: int,
    kept: int = 4,
) -> dict[str, Any]:
    """Sessions whose prompt changes in the middle: which share follows the new one, block by block.

    Args:
      prompts: the first and the second.  modes: of `Session.set_prompt`.  memory: the sessions' policy.
      frames: latent frames of a session.  clips: sessions of each mode, with seeds from `seed` on.

    Returns:
      "prompts", "switch" (the block), "blocks" (first pixel frame of each), "videos" of the kept ones by mode, and
      "modes": by name "before" and "follows", shares of the clips that show shape and colour of the first and of the
      second prompt in each block, "directs", of those that also move as the second says, and "settled", of those that
      do all that two blocks after the switch, with Wilson 95 % bounds.

    Raises:
      UserError: a prompt, mode or policy that there is none of, or fewer than four blocks.
    """
    layout = _layout(run)
    spans = layout.spans(frames)
    if len(spans) < 4:
        raise UserError(f"frames={frames}: a change of the prompt needs 4 blocks or more, of {layout.frames} frames")
    at = len(spans) // 2
    first, second = (parse_caption(prompt, run.toy.shapes) for prompt in prompts)
    found, videos = {}, {}
    with Progress(len(modes) * clips, "video", "prompt switches") as bar:
        for mode in modes:
            rows = []
            for number in range(clips):
                rows.append(_switched(run, prompts, mode, memory, seed + number, len(spans), at))
                bar.update()
            blocks = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
            starts = np.cumsum([0, *(block.shape[1] for block in blocks)])[:-1]
            video = np.concatenate(blocks, axis=1)
            shares = _followed(video, starts, (first, second), run)
            settled = shares["directs"][min(at + 2, len(blocks) - 1)]
            low, high = wilson(int(settled.sum()), clips)
            found[mode] = {
                "before": [float(x.mean()) for x in shares["first"]],
                "follows": [float(x.mean()) for x in shares["second"]],
                "directs": [float(x.mean()) for x in shares["directs"]],
                "settled": float(settled.mean()),
                "settled_low": low,
                "settled_high": high,
            }
            videos[mode] = to_uint8(video[:kept])
    return {"prompts": list(prompts), "switch": at, "blocks": starts.tolist(), "modes": found, "videos": videos}


def _switched(
    run: Run, prompts: tuple[str, str], mode: Mode, memory: str, seed: int, blocks: int, at: int
) -> list[np.ndarray]:
    """The pixels of each block of one session."""
    session, made = run.session(prompts[0], seed=seed, memory=memory), []
    for block in range(blocks):
        if block == at:
            session.set_prompt(prompts[1], mode=mode)
        made.append(session.next().video_BPHWC)
    session.close()
    return made


def _followed(
    video_BPHWC: np.ndarray, starts: np.ndarray, factors: tuple[Any, Any], run: Run
) -> dict[str, list[np.ndarray]]:
    """Which clips follow the first and the second prompt in each block, and which move as the second says, [B] each."""
    stops = [*starts[1:], video_BPHWC.shape[1]]
    out: dict[str, list[np.ndarray]] = {"first": [], "second": [], "directs": []}
    for start, stop in zip(starts, stops, strict=True):
        part = video_BPHWC[:, min(start, max(0, stop - 2)) : stop]
        for name, asked in zip(("first", "second"), factors, strict=True):
            clips = cast(Table, evaluate_shapes(part, [asked] * len(part), run.toy.shapes)["clips"])
            out[name].append(follows(clips))
        out["directs"].append(out["second"][-1] & clips["direction_correct"])
    return out


def save_streams(workdir: Path, kind: str, result: dict[str, Any]) -> None:
    """Writes the videos (`KIND.npz`) and, last, `KIND.json`."""
    videos = result["videos"].values()
    write_arrays(workdir / f"{kind}.npz", **{f"videos_{number}": video for number, video in enumerate(videos)})
    plain = {name: value for name, value in result.items() if name != "videos"}
    write_atomically(workdir / f"{kind}.json", json.dumps(plain | {"shown": list(result["videos"])}, indent=1))


def load_streams(workdir: Path, kind: str) -> dict[str, Any] | None:
    """What `save_streams` wrote; None where it is not there, or was cut by a power failure."""
    result: dict[str, Any] | None = read_if_whole(workdir / f"{kind}.json")
    arrays = read_arrays(workdir / f"{kind}.npz")
    if result is None or arrays is None or len(arrays) != len(result["shown"]):
        return None
    return result | {"videos": {name: arrays[f"videos_{number}"] for number, name in enumerate(result["shown"])}}
