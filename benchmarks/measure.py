"""What the benchmarks share: compiling with XLA's own memory figures, interleaved timing, the record around results."""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax
import jax

from cfjax.core.console import say

QUIET = 0.05  # share of the processors that others may take while a record is made
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


def busy_s() -> float:
    """CPU seconds that all programs of this machine have used (Linux)."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def others(found: dict[str, float]) -> Iterator[None]:
    """Fills in the load average at the start, and the processors' share that other programs took inside."""
    found["load_average"] = os.getloadavg()[0]
    start, busy, own = time.perf_counter(), busy_s(), sum(os.times()[:4])
    yield
    foreign = busy_s() - busy - (sum(os.times()[:4]) - own)
    found["others_share"] = max(foreign, 0.0) / (time.perf_counter() - start) / (os.cpu_count() or 1)


def status_mib(field: str) -> float:
    """A line of /proc/self/status, such as VmRSS or VmHWM (its highest so far)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def resting_mib() -> float:
    """What this process holds, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status_mib("VmRSS")


def highest_mib(call: Callable[[], Any]) -> float:
    """The most that this process holds during a call."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what is held now
    call()
    return status_mib("VmHWM")


def parser(doc: str, results: str) -> argparse.ArgumentParser:
    """A command line with `--out`, which is benchmarks/results/`results` unless given."""
    command = argparse.ArgumentParser(description=doc.partition("\n")[0])
    command.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / results)
    return command


def keep(command: argparse.ArgumentParser, path: Path, rows: list[dict[str, Any]], **about: Any) -> bool:
    """`write`, unless `path` is where the command keeps its record and `others` took more than QUIET in a row."""
    noisy = [row["case"] for row in rows if row["others_share"] > QUIET]
    if noisy and path == command.get_default("out"):
        say(f"other programs ran beside {', '.join(noisy)}: nothing is written (--out=FILE writes in any case)")
        return False
    write(path, rows, **about)
    say(f"{path}")
    return True


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
