"""What several live sessions cost together, and one after another; what a start costs with and without a cache.

    python benchmarks/batching.py

The quickstart's sizes (the toy's network with random weights, 32 x 32 pixels, blocks of 3 frames, 4 steps) under the
memory policy `longlive_infinity`. A round makes a block of each client, one after another by `Session.next`,
together by `step_together`, and together in halves on two devices of one CPU, a thread for each (as `cfjax serve
--config.devices=2`), in turn. Wall time depends on what else runs: `others_share` says what part of the
processors others took, and the process's CPU time stands beside it. Prints a table and writes it as JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import busy_s, others, parser, ratio, write

from cfjax.core.console import say
from cfjax.experiment.streams import random_codec, random_model
from cfjax.models.wan import Wan, preset
from cfjax.nn.visibility import Blocks
from cfjax.rollout.batched import SIZES, compile_sizes, groups, step_together
from cfjax.rollout.generate import FewStep
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.stream import Pipeline

ROOT = Path(__file__).parents[1]
SHAPE, ROWS, WIDTH, FRAMES = (4, 4, 16), 8, 64, 3
MEMORY, OTHER = "longlive_infinity", "ema_sink"


def pipeline() -> Pipeline:
    """The toy's, with random weights: speed does not depend on them."""
    config = preset("toy", remat="none")
    model = random_model(jax.eval_shape(lambda: Wan(config, jax.random.key(0))), 0)
    return Pipeline(model, random_codec("toy", model.config.precision), FewStep(), Blocks(FRAMES))


def rows_of(prompts: Any) -> np.ndarray:
    """Text rows that depend on the prompt."""
    seeds = [sum(prompt.encode()) for prompt in prompts]
    return np.stack([np.random.default_rng(s).standard_normal((ROWS, WIDTH)).astype(np.float32) for s in seeds])


def client(parts: Pipeline, number: int, memory: str = MEMORY) -> Session:
    """A session with a prompt and a seed of its own."""
    return Session(parts, Text(rows_of), f"prompt {number}", latent_shape=SHAPE, seed=number, memory=memory)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def on(parts: Pipeline, device: Any) -> Pipeline:
    """A copy on a device."""
    return replace(parts, model=jax.device_put(parts.model, device), codec=jax.device_put(parts.codec, device))


def clients(copies: Sequence[Pipeline], size: int) -> list[Session]:
    """At different positions of full memories, one after another of the copies' devices."""
    streams = [client(copies[number % len(copies)], number) for number in range(size)]
    for number, stream in enumerate(streams):
        for _ in range(4 + number):
            stream.next()
    return streams


def compared(parts: Pipeline, size: int, rounds: int, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """Rounds of so many clients."""
    streams = clients([parts], size)
    ways: dict[str, Callable[[], Any]] = {
        "alternating": lambda: [s.next() for s in streams],
        "together": lambda: step_together(streams),
    }
    if size > 1:
        spread = clients([on(parts, device) for device in jax.devices()], size)
        halves = [spread[::2], spread[1::2]]
        ways["two_devices"] = lambda: list(pool.map(step_together, halves))
    for call in ways.values():
        call()
    found: dict[str, dict[str, list[float]]] = {name: {"ms": [], "cpu_ms": []} for name in ways}
    foreign: list[float] = []
    for i in range(rounds):
        begun, busy, own = time.perf_counter(), busy_s(), sum(os.times()[:4])
        for name in list(ways) if i % 2 else reversed(list(ways)):
            for kind, value in zip(("ms", "cpu_ms"), timed(ways[name]), strict=True):
                found[name][kind].append(value)
        taken = busy_s() - busy - (sum(os.times()[:4]) - own)
        foreign.append(max(taken, 0.0) / (time.perf_counter() - begun))
    frames = size * FRAMES
    row: dict[str, Any] = {"case": f"{size} clients", "clients": size, "rounds": rounds}
    for name, times in found.items():
        row[name] = {
            "frames_per_s": 1e3 * frames / statistics.median(times["ms"]),
            "frames_per_cpu_s": 1e3 * frames / statistics.median(times["cpu_ms"]),
            "p50_ms": float(np.percentile(times["ms"], 50)),
            "p95_ms": float(np.percentile(times["ms"], 95)),
            "median_cpu_ms": statistics.median(times["cpu_ms"]),
        }
    row["wall_ratio"] = ratio(found["alternating"]["ms"], found["together"]["ms"])
    if size > 1:
        row["two_devices"]["wall_ratio"] = ratio(found["alternating"]["ms"], found["two_devices"]["ms"])
    row["cpu_ratio"] = ratio(found["alternating"]["cpu_ms"], found["together"]["cpu_ms"])
    quietest = sorted(range(rounds), key=foreign.__getitem__)[: max(rounds // 5, 1)]
    pick = lambda name: [found[name]["ms"][i] for i in quietest]
    row["quietest_fifth"] = {
        "others_cores": statistics.median(foreign[i] for i in quietest),
        "wall_ratio": ratio(pick("alternating"), pick("together")),
    }
    return row


def parity(parts: Pipeline, blocks: int = 8) -> float:
    """The largest relative difference of latents: three clients under two policies together, and each alone."""
    streams = [client(parts, number, memory) for memory in (MEMORY, OTHER) for number in range(3)]
    for number, stream in enumerate(streams):
        for _ in range(number):
            stream.next()
    copies, errors = [stream.fork() for stream in streams], []
    for _ in range(blocks):
        wanted = [np.asarray(copy.next().latents_BFHWC) for copy in copies]
        found = [np.asarray(made.latents_BFHWC) for made in step_together(streams)]
        errors += [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(found, wanted, strict=True)]
    return float(max(errors))


def served(parts: Pipeline, turns: int) -> dict[str, Any]:
    """Eight clients under two policies, each away for 0 to 2 turns of the device after a block; then a ninth begins."""
    rng = np.random.default_rng(0)
    streams = [client(parts, number, (MEMORY, OTHER)[number % 2]) for number in range(8)]
    for policy in range(2):
        for size in SIZES[:-1]:
            step_together([stream.fork() for stream in streams[policy::2]][:size])
    waiting, away, frames = list(streams), list[list[Any]](), dict.fromkeys(map(id, streams), 0)
    for _ in range(turns):
        away = [[left - 1, stream] for left, stream in away]
        waiting += [stream for left, stream in away if left < 0]
        away = [item for item in away if item[0] >= 0]
        group = groups(waiting)[0] if waiting else []
        waiting = [stream for stream in waiting if stream not in group]
        for stream, made in zip(group, step_together(group), strict=True):
            frames[id(stream)] += made.latents_BFHWC.shape[1]
            away.append([int(rng.integers(3)), stream])
    blocks, opened = [], []
    old = [client(parts, 20 + i) for i in range(7)]
    for _ in range(3):
        step_together(old)
    for number in range(8):  # it comes right after a step of the seven others has begun, and is opened meanwhile
        opened.append(timed(lambda number=number: client(parts, 40 + number))[0])
        new = client(parts, 60 + number)
        together = [*old, client(parts, 80)]
        block = statistics.median(timed(lambda group=together: step_together(group))[0] for _ in range(5))
        blocks.append(timed(lambda group=[*old, new]: (step_together(old), step_together(group)))[0] / block)
    counts = list(frames.values())
    return {
        "case": "served",
        "frames_of_clients": counts,
        "fairness": max(counts) / min(counts),
        "first_frame_in_blocks": {"median": statistics.median(blocks), "max": max(blocks)},
        "open_ms": statistics.median(opened),
    }


def start(cache: str) -> dict[str, float]:
    """A process that compiles the programs of all batch sizes, or reads them: its seconds."""
    environment = {k: v for k, v in os.environ.items() if "_CACHE_" not in k} | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    begun = time.perf_counter()
    out = subprocess.run(
        [sys.executable, __file__, "--start"], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return {"seconds": time.perf_counter() - begun, **json.loads(out.splitlines()[-1])}


def started() -> None:
    """The work of `start`."""
    begun = time.perf_counter()
    session = client(pipeline(), 0)
    opened = time.perf_counter()
    compile_sizes(session)
    programs = time.perf_counter()
    session.set_prompt("another", "recache")
    session.fork().next()
    say(json.dumps({"open_s": opened - begun, "sizes_s": programs - opened}))


def starts() -> dict[str, Any]:
    """A first and a second start."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = start(folder), start(folder)
    share = (second["open_s"] + second["sizes_s"]) / (first["open_s"] + first["sizes_s"])
    return {"case": "starts", "first": first, "second": second, "second_by_first": share}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the comparisons."""
    lines = ["| clients | alternating, frames/s | together | ratio | of CPU time | p50, p95 ms | two devices | ratio |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        old, new = row["alternating"], row["together"]
        cells = (row["clients"], f"{old['frames_per_s']:.0f}", f"{new['frames_per_s']:.0f}")
        ratios = (f"{row['wall_ratio']['median']:.2f}", f"{row['cpu_ratio']['median']:.2f}")
        both = row.get("two_devices")
        last = (f"{both['frames_per_s']:.0f}", f"{both['wall_ratio']['median']:.2f}") if both else ("", "")
        times = f"{new['p50_ms']:.1f}, {new['p95_ms']:.1f}"
        lines.append("| " + " | ".join(map(str, (*cells, *ratios, times, *last))) + " |")
    return "\n".join(lines)


def main() -> None:
    command = parser(__doc__, "batching.json")
    command.add_argument("--rounds", type=int, default=40)
    command.add_argument("--start", action="store_true", help="what a start of its own does")
    options = command.parse_args()
    if options.start:
        started()
        return
    jax.config.update("jax_num_cpu_devices", 2)
    parts, load = pipeline(), dict[str, float]()
    with others(load), ThreadPoolExecutor(2) as pool:
        rows = [compared(parts, size, options.rounds, pool) for size in SIZES]
    say(table(rows))
    more = [served(parts, 300), starts()]
    say(json.dumps(more))
    write(options.out, rows + more, parity=parity(parts), parameters=_parameters(parts), **load)


def _parameters(parts: Pipeline) -> int:
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(parts.model))


if __name__ == "__main__":
    main()
