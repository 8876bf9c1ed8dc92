"""A server under load, under attack, and from the start: benchmarks/results/serving.json.

    python benchmarks/serving.py                       the tiny network of the tests, all counts
    python benchmarks/serving.py --run=runs/quickstart/dmd
    python benchmarks/serving.py --seconds=5 --disconnects=20 --messages=200      a short one

Eight clients stream for two minutes; then, beside a client whose frames are compared with its session alone, 200 vanish
and 5,000 messages come that are made from the schema and damaged. Numbers of the machine that it runs on.
"""

import gc
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from measure import commit, parser

from cfjax.core.console import say
from cfjax.core.paths import write_atomically
from cfjax.evaluation.video import to_uint8
from cfjax.experiment.runs import open_run
from cfjax.rollout.batched import SIZES, groups, step_together
from cfjax.serving.client import Client
from cfjax.serving.engine import Together
from cfjax.serving.protocol import Open
from cfjax.serving.served import Limits, Served, serve_run
from tests.serving.attacks import attack, flood, fuzz, vanish_often, witness
from tests.serving.fuzz import messages
from tests.serving.running import PROMPTS, Running, running, tiny_served, until

ROOT = Path(__file__).parents[1]
LIMITS = Limits(resume_seconds=0.2, sessions=9)
SINGLE = ("binary", "oversize", "deep", "deep objects", "wide", "foreign", "no origin")


def main() -> None:
    """Both parts, and their record."""
    command = parser(__doc__ or "", "serving.json")
    command.add_argument("--run", default="", help="a run's folder; '': the tests' tiny network")
    command.add_argument("--parts", default="load,fuzz,start")
    command.add_argument("--clients", type=int, default=8)
    command.add_argument("--seconds", type=float, default=120.0)
    command.add_argument("--disconnects", type=int, default=200)
    command.add_argument("--messages", type=int, default=5000)
    args = command.parse_args()
    parts, found = args.parts.split(","), json.loads(args.out.read_text()) if args.out.exists() else {}
    served = tiny_served(LIMITS)
    if args.run:
        served = serve_run(
            open_run(args.run), fps=8.0, memories=("longlive_infinity",), examples=PROMPTS, limits=LIMITS
        )
    about = {
        "command": " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    network = {"run": args.run or "tests.serving.running.tiny_run"}

    def keep() -> None:
        write_atomically(args.out, json.dumps(found, indent=1) + "\n")

    if "load" in parts:
        with running(served, LIMITS, together=Together(step_together, groups, SIZES)) as own:
            found["load"] = {**about, **network, **load(own, args.clients, args.seconds)}
        keep()
    if "fuzz" in parts:
        with running(served, LIMITS) as own:  # one after another: the witness's frames are then the same bits
            found["fuzz"] = {**about, **network, **hostile(own, served, args.disconnects, args.messages)}
        keep()
    if "start" in parts:
        found["start"] = {**about, **starts()}
        keep()
    say(json.dumps({part: found[part] for part in parts}, indent=1))


def load(own: Running, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients at once, each as fast as it gets blocks."""
    over = time.perf_counter() + seconds
    rows: list[dict[str, Any]] = []

    def stream(seed: int) -> None:
        with Client(own.url) as client:
            begun = time.perf_counter()
            client.open(PROMPTS[seed % 2], seed=seed, fps=0, format="jpeg")
            arrivals, frames, indices = [], 0, []
            while time.perf_counter() < over:
                for block in client.blocks(1):
                    arrivals.append(time.perf_counter())
                    frames += len(block.frames_PHWC)
                    indices.append(block.index)
            assert indices == [*range(len(indices))], "a block is missing"
            rows.append({"frames": frames, "first": arrivals[0] - begun, "between": np.diff(arrivals)})
            client.close()

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    assert len(rows) == clients, "a client failed"
    counts, between = [row["frames"] for row in rows], np.concatenate([row["between"] for row in rows])
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "frames": sum(counts),
        "frames_per_second": round(sum(counts) / took, 1),
        "fairness_max_over_min": round(max(counts) / min(counts), 3),
        "first_frame_ms_max": round(1000 * max(row["first"] for row in rows), 1),
        "block_ms_p50": round(1000 * float(np.percentile(between, 50)), 2),
        "block_ms_p95": round(1000 * float(np.percentile(between, 95)), 2),
    }


def hostile(own: Running, served: Served, disconnects: int, count: int) -> dict[str, Any]:
    """What hostile and unlucky clients leave behind."""
    texts: list[str] = []

    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(messages())
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    vanish_often(own.url, PROMPTS[0], 8)  # what is made once is made
    until(lambda: not own.host.sessions())
    tracemalloc.start()
    device, host = device_bytes(), tracemalloc.get_traced_memory()[0]
    with witness(own.url, PROMPTS[0], 99) as ended:
        vanished = vanish_often(own.url, PROMPTS[1], disconnects)
        answers = fuzz(own.url, texts)
        floods, code = flood(own.url, 3000)
        single = {name: attack(own.url, name) for name in SINGLE}
        frames = ended()
    until(lambda: not own.host.sessions() and device_bytes() <= device, 60)
    grown = tracemalloc.get_traced_memory()[0] - host - frames.nbytes
    tracemalloc.stop()
    session = served.open(Open(1, PROMPTS[0], seed=99))
    wanted = list[np.ndarray]()
    while len(wanted) < len(frames):
        wanted += list(to_uint8(session.next().video_BPHWC)[0])
    return {
        "disconnects": vanished["vanished"],
        "messages": len(texts),
        "answers": dict(sorted(Counter(answers).items())),
        "flood": {"errors": sum(floods.values()), "close_code": code},
        "refused": {name: {"errors": errors, "code": end} for name, (errors, end) in single.items()},
        "witness_frames": len(frames),
        "witness_bit_identical": bool(np.array_equal(np.stack(wanted[: len(frames)]), frames)),
        "host_bytes_grown": grown,
        "device_bytes_grown": device_bytes() - device,
    }


def starts() -> dict[str, Any]:
    """Seconds from the command to "ready", with an empty cache of programs and with what that start has put there.

    The run is a miniature of tests/golden with the policies of configs/serve.py.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as root:
        with tarfile.open(ROOT / "tests" / "golden" / "old_outputs.tar.xz") as archive:
            archive.extractall(root, filter="data")
        asked = ["--config.run=runs/dmd", "--config.port=0", f"--compile_cache={root}/programs"]
        memories = "--config.memories=infinity_rope,'ema_sink(window=6,sink=1)'"
        command = [sys.executable, "-m", "cfjax", "serve", f"--config={ROOT}/configs/serve.py", *asked, memories]
        for _ in range(2):
            begun = time.perf_counter()
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None and any(line.startswith("ready") for line in server.stdout)
                seconds.append(round(time.perf_counter() - begun, 1))
                server.terminate()
    return {"first_s": seconds[0], "second_s": seconds[1], "second_over_first": round(seconds[1] / seconds[0], 3)}


def device_bytes() -> int:
    """Of all arrays on the device."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


if __name__ == "__main__":
    main()
