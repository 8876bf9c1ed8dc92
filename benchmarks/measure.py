"""What the benchmarks share: compiling with XLA's own memory figures, interleaved timing, the record around results."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax

CLOCKS = {"ms": time.perf_counter, "cpu_ms": time.process_time}


def compile_call(call: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The compiled call, its compile time, and its temporary memory as XLA plans it."""
    lowered = jax.jit(call).lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    return compiled, {"compile_s": seconds, "temp_mib": memory.temp_size_in_bytes / 2**20}


def interleave(
    calls: Mapping[str, Callable[..., Any]], arguments: Callable[[int], Mapping[str, tuple[Any, ...]]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Times the calls in turn, in another order every round; each should have run once before.

    Returns:
      name -> {"ms": wall time of every round, "cpu_ms": the process's CPU time, "median_ms", "median_cpu_ms"}.
    """
    out: dict[str, dict[str, Any]] = {name: {clock: [] for clock in CLOCKS} for name in calls}
    for i in range(rounds):
        given = jax.block_until_ready(arguments(i))
        for name in list(calls) if i % 2 else reversed(calls):
            start = {clock: now() for clock, now in CLOCKS.items()}
            jax.block_until_ready(calls[name](*given[name]))
            for clock, now in CLOCKS.items():
                out[name][clock].append(1e3 * (now() - start[clock]))
    for name, clock in ((name, clock) for name in out for clock in CLOCKS):
        out[name][f"median_{clock}"] = statistics.median(out[name][clock])
    return out


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """slow / fast of each round: median, least, greatest."""
    ratios = [s / f for s, f in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def parser(doc: str, results: str) -> argparse.ArgumentParser:
    """A command line with `--out`, which is benchmarks/results/`results` unless given."""
    command = argparse.ArgumentParser(description=doc.partition("\n")[0])
    command.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / results)
    return command


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it; "unknown" outside a clone."""
    command = ["git", "describe", "--always", "--dirty"]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return ran.stdout.strip() or "unknown"


def write(path: Path, rows: list[dict[str, Any]], **about: Any) -> None:
    """The rows as JSON, with the command, the commit, the machine and the versions."""
    record = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
        **about,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
