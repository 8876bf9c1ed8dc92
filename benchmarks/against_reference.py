"""The PyTorch reference (a clone of Causal-Forcing) beside cfjax: the same work in turn, on this machine.

    python benchmarks/against_reference.py --reference_dir=CLONE --cases=stream,small

| case | work |
|---|---|
| stream | a few-step video of the larger network, block after block; `video`: the same as one program of cfjax |
| small | a few-step video of the smaller network |
| teacher_forcing | stage 1: loss and gradients of the smaller network |
| dmd | stage 3's generator: self-rollout, three score passes, loss and gradients of the smaller network |

Every case runs in float32 and bfloat16 on both sides. Sides alternate; ratios are medians over rounds of the
reference's time divided by cfjax's. Outputs are compared with the reference's in float32: the largest error relative to
the largest value; parameter gradients with one another. Memory is each side's own process: the most that a second call
holds, above what the imports take. The record goes to benchmarks/results/ only if other programs kept off the
processors meanwhile.

The reference is run on a CPU as `cfjax.comparison.reference` opens it: attention by PyTorch's own fused kernel. In
teacher forcing it gets a mask over all keys (its block-sparse kernel is for GPUs), about twice the pairs that are seen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import diffusers.utils.logging
import jax
import torch
from measure import highest_mib, keep, others, parser, resting_mib

from cfjax.comparison.reference import Reference, open_reference
from cfjax.comparison.reference_speed import PAIRS, Pair, Side, Work
from cfjax.comparison.report import compare_named, relative_error
from cfjax.comparison.turns import round_ratios, take_turns
from cfjax.core.console import say
from cfjax.models.wan import Wan, WanConfig
from cfjax.nn.visibility import Blocks

LARGER = {"dim": 384, "heads": 6, "layers": 6, "ffn": 1536, "side": 32}  # 15.6 M parameters, 256 tokens a frame
SMALLER = {"dim": 256, "heads": 4, "layers": 6, "ffn": 1024, "side": 14}  # 49 tokens a frame
# case -> (what runs, its sizes where no flag gives them)
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "stream": ("stream", LARGER),
    "video": ("video", LARGER),
    "small": ("stream", SMALLER),
    "small_video": ("video", SMALLER),
    "teacher_forcing": ("teacher_forcing", SMALLER),
    "dmd": ("dmd", SMALLER),
}
SIDES = ("cfjax_float32", "reference_float32", "cfjax_bfloat16", "reference_bfloat16")
BASE = "reference_float32"


def work_of(options: argparse.Namespace, case: str) -> Work:
    """A case's sizes: the flags', else its own."""
    chosen = {name: getattr(options, name) or default for name, default in CASES[case][1].items()}
    model = WanConfig(
        dim=chosen["dim"],
        ffn_dim=chosen["ffn"],
        num_heads=chosen["heads"],
        num_layers=chosen["layers"],
        text_dim=options.text_dim,
        remat=options.remat,
    )
    return Work(
        model,
        frames=options.frames,
        height=options.height or chosen["side"],
        width=options.width or chosen["side"],
        blocks=Blocks(options.blocks, window=options.window, sink=options.sink),
        steps=options.steps,
        text_rows=options.text_rows,
        quirks=options.quirks,
    )


def make_side(pair: Pair, name: str, work: Work, reference: Reference) -> Side:
    """One of SIDES."""
    who, dtype = name.split("_")
    return pair.ours(work, dtype) if who == "cfjax" else pair.theirs(reference, work, dtype)


def errors(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Largest relative error of the output, and of the worst parameter's gradient."""
    found = {"output": relative_error(ours[""], theirs[""])}
    if len(theirs) > 1:
        named = [{name: x for name, x in side.items() if name} for side in (ours, theirs)]
        found["gradient"] = compare_named("", "", *named, tolerance=1.0).max_rel
    return found


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """The reference's time divided by cfjax's, round by round: float32's by both, and bfloat16's by its like."""
    found = {}
    for theirs, ours in ((BASE, "cfjax_float32"), (BASE, "cfjax_bfloat16"), ("reference_bfloat16", "cfjax_bfloat16")):
        if theirs in seconds and ours in seconds:
            found[f"{theirs} / {ours}"] = round_ratios(seconds[theirs], seconds[ours])
    return found


def peak_mib(make: Callable[[], Side]) -> dict[str, float]:
    """What a side holds in this process above what was held before: after a first call, and at most during another."""
    before = resting_mib()
    side = make()
    side.run()
    resting = resting_mib() - before
    return {"resting_mib": resting, "peak_mib": highest_mib(side.run) - before}


def memory_of(case: str, side: str) -> dict[str, float]:
    """`peak_mib` by this script in a process of its own."""
    ran = subprocess.run(
        [sys.executable, *sys.argv, f"--cases={case}", f"--sides={side}", "--memory_here"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(ran.stdout.splitlines()[-1])


def measure(case: str, work: Work, sides: list[str], rounds: int, reference: Reference) -> dict[str, Any]:
    """One row: first calls, errors, times in turn, ratios."""
    pair, made, first, found = PAIRS[CASES[case][0]], {}, {}, {}
    for name in sides:
        made[name] = make_side(pair, name, work, reference)
        start = time.perf_counter()
        result = made[name].run()
        first[name] = time.perf_counter() - start
        found[name] = made[name].arrays(result)
    apart = {name: errors(found[name], found[BASE]) for name in sides if name != BASE and BASE in found}
    del found
    row: dict[str, Any] = {"case": case, "work": describe(work), "first_call_s": first, "error": apart}
    with others(row):
        seconds = take_turns({name: side.run for name, side in made.items()}, rounds)
    row |= {"seconds": seconds, "median_s": {name: statistics.median(s) for name, s in seconds.items()}}
    return row | {"ratio": ratios(seconds)}


def describe(work: Work) -> dict[str, Any]:
    """The sizes for the record."""
    model = work.model
    sizes = {name: getattr(model, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "remat")}
    shapes = jax.eval_shape(lambda: Wan(model, jax.random.key(0)))
    return sizes | {
        "parameters": sum(x.size for x in jax.tree.leaves(shapes)),
        "tokens_per_frame": model.tokens_per_frame(work.height, work.width),
        "frames": work.frames,
        "blocks": [work.blocks.frames, work.blocks.window, work.blocks.sink],
        "steps": work.steps,
        "text_rows": work.text_rows,
        "quirks": work.quirks,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| case | side | s | the reference's float32 time / this | error | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, median in row["median_s"].items():
            ratio = row["ratio"].get(f"{BASE} / {name}", {}).get("median")
            if ratio is None and BASE in row["median_s"]:
                ratio = row["median_s"][BASE] / median
            error = " ".join(f"{what} {x:.1e}" for what, x in row["error"].get(name, {}).items())
            peak = row.get("memory", {}).get(name, {}).get("peak_mib")
            cells = [row["case"], name.replace("_", " "), f"{median:.2f}", f"{ratio:.2f}" if ratio else ""]
            lines.append(f"| {' | '.join([*cells, error, f'{peak:.0f}' if peak else ''])} |")
    return "\n".join(lines)


def command_line() -> argparse.ArgumentParser:
    """All flags; a size of 0 is the case's own."""
    command = parser(__doc__, "against_reference.json")
    command.add_argument("--reference_dir", required=True, help="your clone of Causal-Forcing")
    command.add_argument("--cases", default="stream,small,teacher_forcing,dmd", help=f"of {', '.join(CASES)}")
    command.add_argument("--sides", default=",".join(SIDES), help="those that run, of these")
    command.add_argument("--rounds", type=int, default=5)
    for name in ("dim", "heads", "layers", "ffn", "side", "height", "width"):
        command.add_argument(f"--{name}", type=int, default=0)
    for name, default in {"frames": 21, "blocks": 3, "window": 0, "sink": 0, "steps": 4}.items():
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--text_rows", type=int, default=64)
    command.add_argument("--text_dim", type=int, default=128)
    command.add_argument("--remat", choices=("none", "full", "dots"), default="none", help="of cfjax's training steps")
    command.add_argument("--quirks", action=argparse.BooleanOptionalAction, default=True, help="of the reference's DMD")
    command.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="in further processes")
    command.add_argument("--memory_here", action="store_true", help=argparse.SUPPRESS)
    return command


def main() -> None:
    """Runs the cases, prints the table, writes the JSON."""
    options = command_line().parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    torch.set_num_threads(os.cpu_count() or 1)
    diffusers.utils.logging.set_verbosity_error()  # the clone's classes are built on it; it warns of every cast
    cases, sides, rows = options.cases.split(","), options.sides.split(","), []
    with open_reference(options.reference_dir) as reference:
        for case in cases:
            work = work_of(options, case)
            if options.memory_here:
                pair = PAIRS[CASES[case][0]]
                say(json.dumps(peak_mib(lambda: make_side(pair, sides[0], work, reference))))  # noqa: B023
                return
            rows.append(measure(case, work, sides, options.rounds, reference))
            if options.memory:
                rows[-1]["memory"] = {name: memory_of(case, name) for name in sides}
            say(table(rows[-1:]))
    say(table(rows))
    keep(command_line(), options.out, rows, torch=torch.__version__, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
