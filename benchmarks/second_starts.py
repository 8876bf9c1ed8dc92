"""What the cache of compiled programs saves: `cfjax generate` of the toy teacher, started twice on a cache of its own.

    python benchmarks/second_starts.py

Counts of programs are JAX's own events, and disturbed by nothing. Seconds: of compiling or reading, summed over all
programs; and what `generate` prints, which is of its large programs, tracing and lowering included. Prints a table and
writes it as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import parser, write

from cfjax.core.console import say

ROOT = Path(__file__).parents[1]
COUNTED = """
import json, sys
from collections import Counter
from jax import monitoring
counts, seconds = Counter(), Counter()
monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
monitoring.register_event_duration_secs_listener(lambda event, s, **_: seconds.update({event.rpartition("/")[2]: s}))
from cfjax.__main__ import main
code = main(sys.argv[1:])
print(json.dumps({"counts": counts, "seconds": seconds}))
sys.exit(code)
"""
COLUMNS = ("start", "programs", "read", "compiled", "of them kept", "compile or read, s", "printed, s", "cache, KB")


def start(name: str, cache: Path, workdir: Path) -> dict[str, Any]:
    """One process: what it compiled, what it read, and how large the cache is afterwards."""
    words = ["generate", "--config.run=toy_teacher", "--config.progress=False"]
    command = [sys.executable, "-c", COUNTED, *words, f"--workdir={workdir}", f"--compile_cache={cache}"]
    others = {name: value for name, value in os.environ.items() if "_CACHE_" not in name}
    environment = others | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    told = json.loads(out.splitlines()[-1])
    counts, seconds, (printed,) = told["counts"], told["seconds"], map(float, re.findall(r"compiling ([\d.]+) s", out))
    programs, read = counts["compile_requests_use_cache"], counts.get("cache_hits", 0)
    return {
        "start": name,
        "programs": programs,
        "read": read,
        "compiled": programs - read,
        "kept": counts.get("cache_misses", 0),
        "compile_seconds": seconds["backend_compile_duration"],
        "printed_seconds": printed,
        "cache_bytes": sum(file.stat().st_size for file in cache.rglob("*-cache")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        counts = [str(row[key]) for key in ("start", "programs", "read", "compiled", "kept")]
        seconds = [f"{row[key]:.1f}" for key in ("compile_seconds", "printed_seconds")]
        lines.append("| " + " | ".join([*counts, *seconds, f"{row['cache_bytes'] / 1e3:.0f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "second_starts.json").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [start(name, Path(folder) / "cache", Path(folder) / name) for name in ("first", "second")]
    say(table(rows))
    write(options.out, rows)


if __name__ == "__main__":
    main()
