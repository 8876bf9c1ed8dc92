"""Everything worth knowing from a GPU that is lent for minutes, as JSON; started by benchmarks/device.sh.

    bash benchmarks/device.sh --out=runs/device            at most 8 minutes on one H100 or H200
    bash benchmarks/device.sh --scale=tiny                 the same programs, tiny, on any machine
    bash benchmarks/device.sh --only="streams,dmd"         some sections

Published sizes, random weights, no network. First all programs are compiled, several at a time; then the cases run, the
most worth knowing first. Every section has a share of the time, and what it leaves is the next one's; a case that would
come too late is skipped, one that fails leaves its traceback, and OUT/device.json is written anew after each. Goals are
printed beside what was measured.
"""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax
import jax
from device_cases import (
    FOUR,
    ONE,
    TWO,
    Case,
    Context,
    Skipped,
    Stream,
    attention_parity,
    decoder_alone,
    decoder_parity,
    encoder_alone,
    fp8,
    network_parity,
    nothing,
    rates,
    stream_cases,
)
from device_parts import SCALES, Ahead
from device_training import training_cases
from measure import commit

from cfjax.core.console import say
from cfjax.core.paths import write_atomically

COMPILING = 0.3  # of the time at most, before the first case
RESTART = 75  # exit code: the device does not answer any more, a new process may go on
# Section -> share of the time. What a section leaves is there for those behind it.
SHARES = {
    "machine": 0.04,
    "streams": 0.22,
    "stage 1": 0.07,
    "dmd": 0.16,
    "vae": 0.05,
    "caches and weights": 0.08,
    "parity": 0.08,
}
# What it should reach: case, key of its result, at least or at most.
GOALS: tuple[tuple[str, str, str, float], ...] = (
    ("chunk-wise, 4 steps, Wan VAE", "frames_per_second", ">", 17.0),
    ("chunk-wise, 4 steps, tiny decoder", "frames_per_second", ">", 35.0),
    ("chunk-wise, 4 steps, Wan VAE", "first_frame_s", "<", 0.3),
    ("frame-wise, 4 steps, Wan VAE", "first_frame_s", "<", 0.3),
    ("chunk-wise, 4 steps, tiny decoder", "network.of_peak", ">", 0.4),
    ("chunk-wise, 4 steps, tiny decoder", "network_steady.of_peak", ">", 0.4),
)


def all_cases() -> list[Case]:
    """Every case, the most worth knowing first."""
    full, tiny = ("wan", "tiny")
    return [
        Case("machine", "rates", 5, nothing, rates),
        Case("machine", "attention", 8, nothing, attention_parity),
        *stream_cases(
            "streams",
            Stream(3, FOUR, full, profile=True),
            Stream(3, FOUR, tiny, profile=True),
        ),
        *stream_cases(
            "streams",
            Stream(1, FOUR, full, profile=True),
            Stream(1, ONE, tiny),
            Stream(1, TWO, tiny),
            Stream(3, TWO, tiny),
            Stream(3, ONE, tiny),
            Stream(1, FOUR, tiny),
            variants=True,
        ),
        *training_cases(),
        decoder_alone(full, 3),
        decoder_alone(tiny, 3),
        decoder_alone(full, 1),
        *stream_cases(
            "caches and weights",
            Stream(3, FOUR, tiny, storage="int8", profile=True),
            Stream(3, FOUR, tiny, policy="sink"),
            least_s=15,
        ),
        *stream_cases("caches and weights", Stream(3, FOUR, tiny, policy="window"), least_s=15, variants=True),
        Case("caches and weights", "fp8 weights", 15, nothing, fp8),
        Case("parity", "network", 20, nothing, network_parity),
        Case("parity", "decoders", 20, nothing, decoder_parity),
        encoder_alone(),
    ]


@dataclass
class Record:
    """The JSON file, written anew whenever something is known.

    Attributes:
      file: where.  ends: time.time() at which everything has to be over.  seconds: of the whole budget.
    """

    file: Path
    ends: float
    seconds: float
    about: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.time()

    def section_ends(self, section: str) -> float:
        """`time.time()` until which a section's cases may begin: compiling and the shares before it included."""
        names = list(SHARES)
        share = COMPILING + sum(SHARES[name] for name in names[: names.index(section) + 1])
        return self.ends - self.seconds * (1 - min(share, 1.0))

    def resume(self) -> None:
        """Takes over what an earlier process found. What it was in when it ended counts as failed."""
        if self.file.exists():
            known = json.loads(self.file.read_text())
            self.cases = known["cases"]
            for case in self.cases.values():
                if case["status"] == "begun":
                    case |= {"status": "failed", "problem": "the process ended in this case"}

    def put(self, name: str, **values: Any) -> None:
        """Writes one case's entry."""
        self.cases[name] = values
        self.write()

    def write(self) -> None:
        """Writes the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        goals = goals_of(self.cases, full=self.about.get("scale") == "full")
        write_atomically(self.file, json.dumps({**self.about, "goals": goals, "cases": self.cases}, indent=1))


def goals_of(cases: dict[str, dict[str, Any]], *, full: bool) -> list[dict[str, Any]]:
    """Each goal with what was measured, None where nothing was; only full sizes meet one."""
    out = []
    for name, key, sign, bound in GOALS:
        value: Any = cases.get(name, {}).get("result")
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        met = None if value is None else value > bound if sign == ">" else value < bound
        out.append({"case": name, "what": key, "goal": f"{sign} {bound:g}", "measured": value, "met": met and full})
    return out


def describe(scale: str, seconds: float) -> dict[str, Any]:
    """What was measured, on what."""
    try:
        tree = commit()
    except OSError:  # no git there
        tree = "unknown"
    names = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_PLATFORMS")
    return {
        "command": " ".join(["bash benchmarks/device.sh", *sys.argv[1:]]),
        "commit": tree,
        "scale": scale,
        "budget_s": seconds,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
        "environment": {name: os.environ.get(name, "") for name in names},
        "weights": "random",
    }


def guarded(record: Record, case: Case, do: Callable[[], dict[str, Any]], **about: Any) -> None:
    """Runs one case; whatever happens is in the record.

    Raises:
      SystemExit: the device does not answer after it.
    """
    begun = time.time()
    record.put(case.name, section=case.section, status="begun", **about)
    entry: dict[str, Any] = {"section": case.section}
    try:
        entry |= {"status": "measured", "result": do()}
    except Skipped as reason:
        entry |= {"status": "skipped", "problem": str(reason)}
    except Exception as failure:
        trace = traceback.format_exc()
        entry |= {"status": "failed", "problem": f"{type(failure).__name__}: {failure}"[:1000], "trace": trace[-6000:]}
    record.put(case.name, **entry, seconds=time.time() - begun, **about)
    say(f"{record.seconds - record.left:5.0f} s  {case.name}: {outline(entry)}")
    if entry["status"] == "failed":
        try:
            jax.block_until_ready(jax.numpy.ones(8) + 1)
        except Exception:
            sys.exit(RESTART)


def outline(entry: dict[str, Any]) -> str:
    """One line of a result."""
    if entry["status"] != "measured":
        return f"{entry['status']}: {entry['problem'].splitlines()[0][:160]}"
    found = entry["result"]
    if "frames_per_second" in found:
        share = found.get("network", found).get("of_peak")
        parts = [f"{found['frames_per_second']:.1f} frames/s"]
        parts += [f"first {found['first_frame_s']:.2f} s"] if "first_frame_s" in found else []
        return ", ".join(parts + ([f"{100 * share:.0f} % of the peak"] if share else []))
    if "right" in found:
        return "right" if found["right"] else "WRONG, or not to be had: see the JSON"
    rows = {name: value for name, value in found.items() if isinstance(value, dict) and "ms" in value}
    if rows:
        return ", ".join(f"{name} {value['ms']:.0f} ms" for name, value in rows.items())
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items() if isinstance(value, float))


def compile_all(record: Record, context: Context, cases: list[Case]) -> dict[str, str]:
    """Names every case's programs and waits until they are compiled, or it is time to begin; case -> what failed."""
    problems = {}
    until = time.monotonic() + max(0.0, COMPILING * record.seconds - (record.seconds - record.left))
    for case in cases:
        try:
            case.prepare(context)
        except Exception:
            problems[case.name] = traceback.format_exc()[-6000:]
    context.ahead.wait(until)
    count = len(context.ahead.programs)
    say(f"{record.seconds - record.left:5.0f} s  {count} programs, {context.ahead.pending} of them still compiling")
    return problems


def programs_of(context: Context) -> list[dict[str, Any]]:
    """What every program took and needs."""
    return [
        {"name": p.name, "trace_s": p.trace_s, "compile_s": p.compile_s, "gib": p.memory, "done": p.future.done()}
        for p in context.ahead.programs
    ]


def run(record: Record, context: Context, cases: list[Case]) -> None:
    """Every case that is not there yet, in order, while there is time."""
    full = record.about["scale"] == "full"
    first = next((case for case in cases if case.name == "attention"), None)
    todo = [case for case in cases if case.name not in record.cases]
    if first in todo:  # it decides which kernel the networks are compiled with
        todo.remove(first)
        guarded(record, first, lambda: first.run(context))
    problems = compile_all(record, context, todo)
    for case in todo:
        record.about["programs"] = programs_of(context)
        needed = case.least_s if full else 0.0
        late = time.time() > record.section_ends(case.section) or record.left < needed
        if late:
            reason = f"no time: {record.left:.0f} s left of {record.seconds:.0f}, its section's share is spent"
            record.put(case.name, section=case.section, status="skipped", problem=reason)
            say(f"{record.seconds - record.left:5.0f} s  {case.name}: skipped, {reason}")
            continue
        about = {"compiling_beside": context.ahead.pending}
        if case.name in problems:
            about["while_compiling"] = problems[case.name]
        guarded(record, case, lambda case=case: case.run(context), **about)
    record.about["programs"] = programs_of(context)
    record.write()


def arguments() -> argparse.Namespace:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    command.add_argument("--scale", choices=sorted(SCALES), default="full", help="tiny: every size small, any machine")
    command.add_argument("--minutes", type=float, default=8.0, help="for everything, from the start of device.sh")
    command.add_argument("--only", default="", help=f"comma-separated sections of {', '.join(SHARES)}")
    command.add_argument("--out", type=Path, default=Path("runs/device"), help="folder of device.json")
    command.add_argument("--resume", action="store_true", help="go on where another process ended")
    command.add_argument(
        "--ends", type=float, default=0.0, help="time.time() at which the minutes are over; 0: from now"
    )
    options = command.parse_args()
    options.only = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := sorted(set(options.only) - set(SHARES)):
        command.error(f"--only={unknown[0]}: sections are {', '.join(SHARES)}")
    return options


def main() -> None:
    """Measures what there is time for, prints the goals."""
    options = arguments()
    seconds = 60 * options.minutes
    record = Record(options.out / "device.json", options.ends or time.time() + seconds, seconds)
    if options.resume:
        record.resume()
    record.about = describe(options.scale, seconds)
    context = Context(SCALES[options.scale], Ahead(max(2, min(12, (os.cpu_count() or 2) - 2))))
    cases = [case for case in all_cases() if not options.only or case.section in options.only]
    cases = [case for case in cases if options.scale == "full" or not case.variant]
    run(record, context, cases)
    full = options.scale == "full"
    for goal in goals_of(record.cases, full=full):
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        met = {True: "met", False: "NOT met" if full else "(of full sizes)", None: ""}[goal["met"]]
        say(f"{goal['case']}, {goal['what']}: {measured}, goal {goal['goal']}  {met}".rstrip())
    say(str(record.file))


if __name__ == "__main__":
    main()
