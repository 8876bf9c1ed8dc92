"""A config's sweep as commands: listed, run on this machine, or handed to SLURM or Kubernetes; its table of results.

    python launch/sweep.py list   --config=configs/dmd.py:toy --workdir=runs/sweeps/dmd
    python launch/sweep.py run    --config=configs/dmd.py:toy --workdir=runs/sweeps/dmd --jobs=2 --config.steps=100
    python launch/sweep.py slurm  --config=configs/dmd.py --workdir=/shared/sweeps/dmd --jobs=4 -- --nodes=2 --gpus=8
    python launch/sweep.py jobset --config=configs/dmd.py --workdir=/bucket/dmd -- --image=IMAGE --tpu=v5p:4x4x4
    python launch/sweep.py table  --config=configs/dmd.py:toy --workdir=runs/sweeps/dmd --sort=student/loss

A config's `get_hyper(hyper)` returns the points, as in big_vision:

    hyper.product([hyper.sweep("config.optim.student.lr", [1e-6, 2e-6]), hyper.sweep("config.cadence.student", [2, 5])])

and so do hyper.zipit([...]), hyper.chainit([...]), hyper.fixed(key, value); or its `sweep()` yields dicts of key and
value. Either may take the config's argument (the words behind its colon) as one more parameter. Keys may go without
"config."; each must be a key of the config. --config.KEY=VALUE holds for all points. A point's folder under --workdir
is named by its overrides. The same command again goes on with what was begun (of JobSets, those that were deleted).
What stands behind -- goes to launch/slurm.sh or launch/gke/jobset.py; --dry-run shows what would be started.
--verb=evaluate does the same for the evaluation of every point, in the folder evaluation of its run.
"""

import argparse
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gke import jobset
from ml_collections import ConfigDict

from cfjax.core.cli import config_file, parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.paths import in_bucket, local_path, path_of, replacing

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "logs"  # slurm.sh's, in the folder that is the same on all nodes
LONGEST_NAME = 120
Point = dict[str, Any]


class hyper:  # configs know it by this name
    """The combinators that a config's `get_hyper` is given; each returns a list of points, {key: value}."""

    @staticmethod
    def sweep(key: str, values: Iterable[Any]) -> list[Point]:
        """One point for each value."""
        return [{key: value} for value in values]

    @staticmethod
    def fixed(key: str, value: Any, length: int = 1) -> list[Point]:
        """The same value `length` times."""
        return [{key: value} for _ in range(length)]

    @staticmethod
    def product(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
        """Every combination; the last sweep changes fastest."""
        return [functools.reduce(_joined, points, {}) for points in itertools.product(*sweeps)]

    @staticmethod
    def zipit(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
        """First with first, second with second; sweeps of one point go with all.

        Raises:
          UserError: sweeps of different lengths.
        """
        length = max(map(len, sweeps), default=0)
        if any(len(points) not in (1, length) for points in sweeps):
            raise UserError(
                f"zipit: sweeps of {', '.join(str(len(points)) for points in sweeps)} points can't be paired"
            )
        full = [points if len(points) == length else list(points) * length for points in sweeps]
        return [functools.reduce(_joined, points, {}) for points in zip(*full, strict=True)]

    @staticmethod
    def chainit(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
        """The points of all, one sweep after another."""
        return list(itertools.chain(*sweeps))


def _joined(left: Point, right: Point) -> Point:
    for key in left.keys() & right.keys():
        raise UserError(f"{key} is swept twice in one point; chain such sweeps (chainit), or leave one out")
    return {**left, **right}


@dataclass(frozen=True)
class Run:
    """One point: its name, its folder, the command that trains it, the config it trains with."""

    name: str
    point: Point
    workdir: Path
    command: list[str]
    config: ConfigDict


def points_of(spec: str) -> list[Point]:
    """The points of a config's sweep, keys without "config.".

    Raises:
      UserError: no such file, no sweep in it, no points, a point that is no dict, or one that comes twice.
    """
    file, arg = config_file(spec)
    module = _module(file)
    if hasattr(module, "get_hyper"):
        given = _call(module.get_hyper, hyper, arg=arg)
    elif hasattr(module, "sweep"):
        given = _call(module.sweep, arg=arg)
    else:
        raise UserError(f"--config={file} has no sweep: write get_hyper(hyper) or sweep() in it")
    points = []
    for point in given:
        if not isinstance(point, Mapping) or not all(isinstance(key, str) for key in point):
            raise UserError(f"--config={file}: its sweep holds {point!r}; a point is a dict of key and value")
        points.append({key.removeprefix("config."): value for key, value in point.items()})
    if not points:
        raise UserError(f"--config={file}: its sweep has no points")
    for index, point in enumerate(points):
        if point in points[:index]:
            raise UserError(f"--config={file}: its sweep holds {_text(point)} twice; leave one out")
    return points


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(function: Any, *args: Any, arg: str) -> Iterable[Point]:
    """With the config's argument where the function takes it."""
    takes = len(inspect.signature(function).parameters)
    return function(*args, arg) if takes > len(args) else function(*args)


def _text(point: Point) -> str:
    return ", ".join(f"{key}={value}" for key, value in point.items()) or "no overrides"


def name_of(point: Point, keys: Sequence[str]) -> str:
    """A folder's name: the overrides, each key by its last two words, or more if another key ends in the same.

    Characters that a shell or a file system may stumble over become "_"; such a name, or a long one, ends in a hash.
    """
    text = ",".join(f"{_short(key, keys)}={value}" for key, value in point.items()) or "default"
    plain = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text.replace(" ", ""))
    if plain == text and len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(2, len(parts)):
        end = ".".join(parts[-length:])
        if sum(other == end or other.endswith(f".{end}") for other in keys) == 1:
            return end
    return key


def runs_of(spec: str, workdir: str | Path, overrides: Sequence[str], verb: str = "train") -> list[Run]:
    """Every point as a run, its overrides checked against the config; `workdir` may be in a bucket.

    Raises:
      UserError: a key that the config lacks, or a value of another type; a workdir that is no place.
    """
    points, root = points_of(spec), path_of(workdir)
    keys = sorted(set().union(*points))
    for word in overrides:
        key = word.lstrip("-").removeprefix("no").removeprefix("config.").partition("=")[0]
        if key in keys:
            raise UserError(f"{word}: {spec} sweeps over this key; leave it out")
    runs = []
    for point in points:
        name = name_of(point, keys)
        folder = root / name
        train = [f"--config={spec}", f"--workdir={folder}", *overrides]
        train += [f"--config.{key}={value}" for key, value in point.items()]
        config, _, _ = parse("train", train, description="", bucket=True)
        command = ["cfjax", "train", *train]
        for word in command:  # each is a line of a file, a log, a script
            jobset.check_plain(f"--config={spec}", word)
        if verb == "evaluate":
            command = ["cfjax", "evaluate", f"--config.run={folder}", f"--workdir={folder / 'evaluation'}"]
        runs.append(Run(name, point, folder, command, config))
    return runs


class Local:
    """Runs commands of this machine, `jobs` at a time; each one's output goes to a file in its folder.

    Args:
      devices: ids of GPUs, given out one to each job; empty leaves the machine's devices to every job.
    """

    def __init__(self, jobs: int, devices: Sequence[str] = ()) -> None:
        self._jobs, self._free = jobs, list(devices) or [""] * jobs
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, runs: Sequence[Run], verb: str) -> list[Run]:
        """Returns those that failed. Ctrl-C stops the running ones, which save, and starts no more."""
        with ThreadPoolExecutor(max_workers=min(self._jobs, len(self._free))) as pool:
            futures = [pool.submit(self._one, run, verb) for run in runs]
            try:
                codes = [future.result() for future in futures]
            except KeyboardInterrupt:
                with self._lock:
                    self._stopped = True
                    for process in self._running:
                        process.terminate()
                raise
        return [run for run, code in zip(runs, codes, strict=True) if code]

    def _one(self, run: Run, verb: str) -> int:
        run.workdir.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._stopped:
                return 0
            device = self._free.pop()
        environment = {**os.environ, "CFJAX_DISTRIBUTED": "off"} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        command = [sys.executable, "-m", "cfjax", *run.command[1:]]
        with (run.workdir / f"{verb}.log").open("a") as log:
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on once.
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            with self._lock:
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
            self._free.append(device)
        say(f"{run.name}: {'done' if code == 0 else f'failed with exit code {code}'}")
        return code


def to_slurm(runs: Sequence[Run], workdir: str | Path, jobs: int, options: Sequence[str], *, dry_run: bool) -> int:
    """Hands the runs to launch/slurm.sh as one array, of which `jobs` run at a time; returns its exit code.

    Their commands are written to a file in the sweep's folder (`LOGS` for a sweep in a bucket), in a dry run too. The
    jobs read their lines when they start, maybe much later: its name holds a hash of its text, so it never changes.
    """
    text = "".join(shlex.join(run.command) + "\n" for run in runs)
    folder = LOGS if in_bucket(path_of(workdir)) else Path(workdir)
    file = folder / f"commands-{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    asked = [*(["--dry-run"] if dry_run else []), *([f"--parallel={jobs}"] if jobs else [])]
    script = str(ROOT / "launch" / "slurm.sh")
    return subprocess.run(["bash", script, *asked, f"--array={file.resolve()}", *options]).returncode


def to_jobsets(runs: Sequence[Run], prefix: str, options: Sequence[str]) -> list[dict[str, Any]]:
    """One JobSet for each run, named by its place in the sweep; its overrides stand in an annotation."""
    parser = argparse.ArgumentParser(prog="launch/sweep.py jobset ... --")
    jobset.add_arguments(parser)
    machines = jobset.machines_of(parser.parse_args(options))
    out = []
    for index, run in enumerate(runs):
        made = jobset.manifest(f"{prefix}-{index}", run.command, machines)
        made["metadata"].setdefault("annotations", {})["cfjax/overrides"] = _text(run.point)
        out.append(made)
    return out


def results_of(run: Run) -> dict[str, float]:
    """What a run has reported so far: the last value of each curve, its step, and its evaluation's summary.

    Raises:
      UserError: a file of results that can't be read.
    """
    out: dict[str, float] = {}
    curves, evaluation = run.workdir / "metrics.jsonl", run.workdir / "evaluation" / "evaluation.json"
    try:
        for line in curves.read_text().splitlines() if curves.exists() else ():
            out.update(json.loads(line))
        if evaluation.exists():
            out.update(json.loads(evaluation.read_text())["summary"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.workdir}: its results can't be read ({error}); remove the broken file") from None
    return out


def table_of(runs: Sequence[Run], shown: Sequence[str], sort: str) -> list[dict[str, Any]]:
    """One row for each run: its overrides, its state, its numbers (None: not there yet), in the order of `sort`.

    Args:
      shown: names of numbers; empty: all losses, and the evaluation's share of right captions.
      sort: a number's name, the smallest first; -NAME is the largest first; "" keeps the sweep's order.

    Raises:
      UserError: no run has such a number.
    """
    results = [results_of(run) for run in runs]
    known = sorted(set().union(*results) - {"step"})
    by = sort.removeprefix("-")
    for name in (*shown, *((by,) if by else ())):
        if name not in known:
            raise UserError(
                f"no run of this sweep has reported {name!r}; there are {', '.join(known) or 'no results yet'}"
            )
    names = list(shown) or [name for name in known if name.endswith("/loss") or name == "all_correct"]
    order = range(len(runs))
    if by:
        sign = -1 if sort.startswith("-") else 1
        order = sorted(order, key=lambda i: (by not in results[i], sign * results[i].get(by, 0.0)))
    rows = []
    for index in order:
        run, latest = runs[index], results[index]
        done = int(latest["step"]) + 1 if "step" in latest else 0
        numbers = {name: latest.get(name) for name in dict.fromkeys([*names, *([by] if by else [])])}
        rows.append({"run": run.name, **run.point, "steps": f"{done} of {run.config.steps}", **numbers})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = [name for name in rows[0] if name != "run"]
    lines = [columns, ["---"] * len(columns), *([cell(row[name]) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(workdir: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes table.json and table.md into the sweep's folder, whole or not at all."""
    for name, text in (("table.json", json.dumps(rows, indent=2, default=str)), ("table.md", markdown(rows))):
        with replacing(path_of(workdir) / name) as partial:
            partial.write_text(text + "\n")


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(own flags, overrides for all points, what stands behind --)."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "run", "slurm", "jobset", "table"])
    parser.add_argument("--config", required=True, help="file.py[:arg], whose sweep is meant")
    parser.add_argument("--workdir", required=True, help="folder of the sweep, here or gs://BUCKET/FOLDER")
    parser.add_argument("--verb", default="train", choices=["train", "evaluate"])
    parser.add_argument("--jobs", type=int, default=0, help="how many at a time; 0: one here, all of them on a cluster")
    parser.add_argument("--devices", default="", help="run: ids of GPUs, as 0,1,2,3, one for each job")
    parser.add_argument("--name", default="sweep", help="jobset: what their names begin with")
    parser.add_argument("--metrics", default="", help="table: names of numbers, as student/loss,all_correct")
    parser.add_argument("--sort", default="", help="table: by this number; -NAME: the largest first")
    parser.add_argument("--dry-run", action="store_true")
    mine = [word for word in argv[:split] if not word.startswith(("--config.", "--noconfig."))]
    overrides = [word for word in argv[:split] if word not in mine]
    given = parser.parse_args(mine)
    if given.jobs < 0:
        raise UserError(f"--jobs={given.jobs}: must not be negative")
    rest = list(argv[split + 1 :])
    if rest and given.action not in ("slurm", "jobset"):
        raise UserError(f"{given.action} takes nothing behind --; leave out {shlex.join(rest)}")
    return given, overrides, rest


def main(argv: Sequence[str]) -> int:
    """Reads the command line; returns the exit code: 1 if a run of this machine failed."""
    given, overrides, rest = _arguments(argv)
    if given.action == "run":
        local_path(given.workdir, "--workdir", "runs of this machine keep their output on it")
    runs = runs_of(given.config, given.workdir, overrides, given.verb)
    if given.action == "list" or (given.action == "run" and given.dry_run):
        say("\n".join(shlex.join(run.command) for run in runs))
    elif given.action == "run":
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        failed = Local(given.jobs or 1, [part for part in given.devices.split(",") if part]).run(runs, given.verb)
        for run in failed:
            sys.stderr.write(f"launch/sweep.py: {run.name} failed; its output: {run.workdir / given.verb}.log\n")
        return 1 if failed else 0
    elif given.action == "slurm":
        return to_slurm(runs, given.workdir, given.jobs, rest, dry_run=given.dry_run)
    elif given.action == "jobset":
        jobset.submit(to_jobsets(runs, given.name, rest), dry_run=given.dry_run)
    else:
        rows = table_of(runs, [part for part in given.metrics.split(",") if part], given.sort)
        write_table(given.workdir, rows)
        say(markdown(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"launch/sweep.py: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("launch/sweep.py: stopped; the same command goes on from what the runs have saved\n")
        sys.exit(130)
