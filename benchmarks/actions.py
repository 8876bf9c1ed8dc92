"""How well steered students do what their keys say, in a closed loop: benchmarks/results/actions.json.

    python benchmarks/actions.py loop toy_steered                     200 key sequences of 60 blocks, minutes
    python benchmarks/actions.py form runs/toy_steered/ar             a row of the table that compares both forms
    python benchmarks/actions.py form runs/toy_steered_attention/ar

Every sequence has its own caption, seed and keys, which change between blocks alone, as a user's do. What is seen is
measured from decoded pixels (`cfjax.evaluation.steering`); the guard's numbers (`cfjax.evaluation.guard`) are of each
tenth of the videos. An AR teacher makes fewer and shorter videos: its sampler takes 50 steps.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cfjax
from cfjax.core.console import say
from cfjax.core.paths import write_atomically
from cfjax.core.progress import followed
from cfjax.core.tree import named_leaves
from cfjax.data.steered import SteeringConfig
from cfjax.evaluation.guard import Collector
from cfjax.evaluation.steering import follow, random_keys, summary
from cfjax.evaluation.video import to_uint8
from cfjax.rollout.generate import FewStep

RESULTS = Path(__file__).parent / "results" / "actions.json"


def captions_for(run: Any, count: int) -> tuple[list[str], list[str], list[str]]:
    """Captions without a direction, their shapes and their colours, each combination equally often."""
    config = run.toy.shapes
    pairs = [(shape, colour) for shape in config.shapes for colour in config.colours]
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    return [f"a {c} {s}" for s, c in chosen], [s for s, _ in chosen], [c for _, c in chosen]


def guard_values(captions: Sequence[str], video_BPHWC: np.ndarray) -> dict[str, float]:
    """The guard's numbers of some frames."""
    collector = Collector()
    for caption, clip in zip(captions, video_BPHWC, strict=True):
        collector.add(caption, to_uint8(clip))
    return {name: float(value) for name, value in collector.values().items() if np.isfinite(value)}


def closed_loop(run: Any, *, sequences: int, blocks: int, batch: int, memory: str, seed: int = 0) -> dict[str, Any]:
    """Generates the sequences, and measures them."""
    frames = run.blocks.frames
    keys = random_keys(sequences, blocks, frames, seed)
    captions, shapes, colours = captions_for(run, sequences)
    parts, begun = [], time.perf_counter()
    for start in followed(range(0, sequences, batch), -(-sequences // batch), "batch", "closed loop"):
        part = slice(start, start + batch)
        seeds = list(range(seed + start, seed + start + len(captions[part])))
        parts.append(
            run.generate(captions[part], seed=seeds, frames=blocks * frames, memory=memory, actions=keys[part])
        )
    seconds = time.perf_counter() - begun
    video = np.concatenate(parts)
    found = follow(video, keys, shapes, run.toy.shapes, speed=SteeringConfig().speed, block_frames=frames)
    tenths = np.array_split(np.arange(video.shape[1]), 10)
    some = slice(0, min(sequences, 36))
    guard = [guard_values(captions[some], video[some, tenth[0] : tenth[-1] + 1]) for tenth in tenths]
    return {
        **summary(found, shapes, colours),
        "memory": memory,
        "seconds": round(seconds, 1),
        "guard_over_time": {name: [v[name] for v in guard] for name in guard[0] if all(name in v for v in guard)},
    }


def measured(name: str, *, sequences: int, blocks: int) -> dict[str, Any]:
    """The closed loop of a run, with what the run is."""
    run = cfjax.open_run(name)
    few = isinstance(run.sampler, FewStep)
    loop = closed_loop(run, sequences=sequences, blocks=blocks, batch=25, memory="longlive_infinity")
    actions = run.model.config.actions
    leaves = named_leaves(run.model)
    own = sum(leaf.size for key, leaf in leaves.items() if "action" in key)
    return {
        "stage": run.stage,
        "steps": run.step,
        "form": actions.form,
        "parameters": sum(leaf.size for leaf in leaves.values()),
        "action_parameters": own,
        "few_step": few,
        **loop,
    }


ROWS = {
    "told": "blocks that move as told, %",
    "told_low": "least of the 95 % interval",
    "there": "blocks in which a shape of its size is seen, %",
    "inside": "blocks that end inside the world, %",
    "shape_kept": "shape at the end as asked, %",
    "colour_kept": "colour at the end as asked, %",
}


def loop_table(results: dict[str, Any]) -> str:
    """The closed loop of the student, a row for each number, as docs/actions.md has it."""
    found = results["loop"]["toy_steered"]
    head = f"| {found['sequences']} sequences of {found['blocks']} blocks | all | by tenths of the video |"
    lines = [head, "|---|---|---|"]
    for key, title in ROWS.items():
        parts = found["over_time"].get(key, [])
        lines.append(f"| {title} | {100 * found[key]:.1f} | {', '.join(f'{100 * part:.0f}' for part in parts)} |")
    lines.append(f"| error of a block's way, px | {found['error_px']:.2f} | |")
    for name, values in found["guard_over_time"].items():
        lines.append(f"| guard: {name} | | {', '.join(f'{value:.3g}' for value in values)} |")
    return "\n".join(lines) + "\n"


def form_table(results: dict[str, Any]) -> str:
    """Both forms after the same stage, as docs/actions.md has it."""
    lines = ["| AR teacher | steps | parameters of actions | told, % | error, px |", "|---|---|---|---|---|"]
    for form, found in results["form"].items():
        cells = (form, found["steps"], f"{found['action_parameters']:,}")
        lines.append(f"| {' | '.join(map(str, cells))} | {100 * found['told']:.1f} | {found['error_px']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures a run, and adds it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loop", "form"))
    parser.add_argument("run")
    parser.add_argument("--sequences", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=0)
    given = parser.parse_args()
    sequences, blocks = (200, 60) if given.what == "loop" else (50, 20)
    found = measured(given.run, sequences=given.sequences or sequences, blocks=given.blocks or blocks)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = Path(given.run).name if given.what == "loop" else found["form"]
    results.setdefault(given.what, {})[key] = found
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    say(json.dumps({name: value for name, value in found.items() if not isinstance(value, dict)}, indent=1))


if __name__ == "__main__":
    main()
