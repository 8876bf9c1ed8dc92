"""What a set of published size costs to open and to read: 80,000 clips, and 1,000,000 prompts.

    python benchmarks/datasets.py

Writes sets with tiny latents (what grows with their number is measured, not the disk) and opens each in a process of
its own with the usual limit of 1,024 open files: seconds to open and to the first batch, what the process holds then
and after many more batches, readers, open files and threads. One more set has clips of published size, a few hundred,
for what open readers keep in memory. Prints a table and writes it as JSON.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import parser, write

from cfjax.core.console import say
from cfjax.data.latents import make_iterator
from cfjax.data.parts import SetWriter, part_size
from cfjax.data.precompute import digest
from cfjax.data.records import Layout, RecordDataset
from cfjax.data.sets import open_dataset

TINY, PUBLISHED = (1, 2, 2, 4), (21, 60, 104, 16)
# name -> (items, items of a part (0: the default), shape of latents, where they are kept, batches that are read)
SETS: dict[str, tuple[int, int, tuple[int, int, int, int], str, int]] = {
    "80,000 clips in parts of 64": (80_000, 64, TINY, "records", 1200),
    "80,000 clips in parts by default": (80_000, 0, TINY, "records", 1200),
    "1,000,000 prompts in parts by default": (1_000_000, 0, TINY, "none", 3000),
    "1,000 clips of 21 x 60 x 104 x 16": (1000, 4, PUBLISHED, "records", 60),
}
BATCH, TEXT_ROWS, OPEN_FILES = 16, 4, 1024


def caption(item: int) -> str:
    """A prompt of usual length."""
    return f"a cat, number {item}, surfs on a wave at sunset while the camera follows it slowly from the side"


def make(path: Path, items: int, part_items: int, shape: tuple[int, int, int, int], kept_in: str) -> dict[str, Any]:
    """Writes a set as `cfjax precompute` does, without encoders; seconds of what is done once per set."""
    layout = Layout(shape, TEXT_ROWS, 4, kept_in=kept_in, text_dtype="float32")
    job = {"source": "benchmark"}
    writer = SetWriter(path, items=items, part_items=part_items, layout=layout, job=job, description={"source": {}})
    text = np.ones((TEXT_ROWS, 4), np.float32)
    writer.write_negative(text)
    arrays = {"latents": np.random.default_rng(0).standard_normal(shape).astype(np.float16)} if layout.arrays() else {}
    start = time.perf_counter()
    for index in writer.todo():
        with writer.part(index) as part:
            for item in part.items:
                part.add(f"{item}.mp4", item, caption(item), text, **arrays)
    written = time.perf_counter()
    writer.finish()
    finished = time.perf_counter()
    assert not writer.todo()
    return {
        "parts": writer.parts,
        "write_s": written - start,
        "finish_s": finished - written,
        "todo_s": time.perf_counter() - finished,
    }


def held() -> dict[str, float]:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    rss = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {
        "rss_mib": rss,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def read(path: Path, batches: int) -> dict[str, Any]:
    """Opens a set and reads batches of it, shuffled, under the usual limit of open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    before, start = held(), time.perf_counter()
    dataset = open_dataset(path)
    opened = time.perf_counter()
    iterator = make_iterator(dataset, BATCH, 0)
    next(iterator)
    first = time.perf_counter()
    for _ in range(batches // 4):  # buffers and the pool of readers fill
        next(iterator)
    early = held()
    for _ in range(batches - batches // 4):
        next(iterator)
    assert isinstance(dataset, RecordDataset)
    rest = (time.perf_counter() - first) / batches / BATCH
    return {
        "open_s": opened - start,
        "first_batch_s": first - opened,
        "ms_per_record": 1e3 * rest,
        "batches": batches,
        "readers": dataset.files.open_readers,
        "before": before,
        "early": early,
        "late": held(),
    }


def prompts_digest(count: int) -> dict[str, float]:
    """Seconds and peak memory of the digest of that many prompts, as a job of them is known by."""
    prompts = [caption(i) for i in range(count)]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    digest({"prompts": prompts})
    seconds = time.perf_counter() - start
    return {"digest_s": seconds, "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10}


def alone(call: str, *arguments: Any) -> dict[str, Any]:
    """One of the functions above in a process of its own."""
    code = f"import json, sys, datasets; print(json.dumps(datasets.{call}(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps([str(a) if isinstance(a, Path) else a for a in arguments])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| set | parts | open s | first batch s | ms a record | readers | open files | threads | MiB early, late |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        early, late = row["early"], row["late"]
        cells = [row["set"], row["parts"], f"{row['open_s']:.2f}", f"{row['first_batch_s']:.2f}"]
        cells += [f"{row['ms_per_record']:.2f}", row["readers"], late["open_files"], late["threads"]]
        cells.append(f"{early['rss_mib']:.0f}, {late['rss_mib']:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Makes every set, reads it, prints the table, writes the JSON."""
    command = parser(__doc__, "datasets.json")
    command.add_argument("--folder", help="where the sets are made, 10 GiB (default: a temporary folder)")
    options = command.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number, (name, (items, part_items, shape, kept_in, batches)) in enumerate(SETS.items()):
            path = Path(folder) / str(number)
            made = make(path, items, part_items, shape, kept_in)
            about = {"set": name, "items": items, "part_items": part_items or part_size(items)}
            rows.append({**about, **made, **alone("read", path, batches)})
    write(options.out, rows, batch=BATCH, open_files=OPEN_FILES, prompts=alone("prompts_digest", 1_000_000))
    say(table(rows))


if __name__ == "__main__":
    main()
