"""Thousands of damaged files of every kind through cfjax's readers: how each case ended, counted.

    python benchmarks/robustness.py                               10,000 cases
    python benchmarks/robustness.py --kind="toy world.json"       one kind
    python benchmarks/robustness.py --kind="toy world.json" --seed=14      one case, with what was said

Files are damaged by seed (tests/properties: cut, bytes and bits changed, pieces exchanged, values retyped) and read in
a process of their own, with 1 GiB of memory and 10 seconds for each. told: an error of one line. right: the whole
file's value, or one that could have been meant. The others are faults: a traceback, a wrong value that was taken, more
memory or time, the end of the process. Prints a table and writes it as JSON; exit code 1 if there is a fault.
"""

import os
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from measure import parser, write

sys.path.insert(0, str(Path(__file__).parents[1]))

from cfjax.core.console import say
from tests.properties.child import BAD, GOOD, Child
from tests.properties.kinds import KINDS

SLOW_SHARE = 0.2  # of a kind's cases for one whose reader takes a second
LIBRARIES = ("numpy", "safetensors", "torch", "pillow", "av", "pyarrow", "lmdb", "tokenizers", "sentencepiece")
SHOWN = 10  # faults of a kind that are listed


def cases_of(total: int) -> dict[str, int]:
    """How many cases each kind gets, of about so many in all."""
    shares = {name: SLOW_SHARE if kind.slow else 1.0 for name, kind in KINDS.items()}
    unit = total / sum(shares.values())
    return {name: max(round(unit * share), 1) for name, share in shares.items()}


def count(child: Child, kind: str, seeds: range) -> dict[str, Any]:
    """The outcomes of one kind, and its first faults."""
    counts, faults, begun = Counter[str](), [], time.monotonic()
    for seed in seeds:
        outcome = child.outcome(kind, seed)
        counts[outcome.name] += 1
        if outcome.name in BAD:
            faults.append({"seed": seed, "outcome": outcome.name, "detail": outcome.detail})
    named = {name.replace(" ", "_"): counts[name] for name in (*GOOD, *BAD)}
    return {"kind": kind, "cases": len(seeds), **named, "seconds": time.monotonic() - begun, "faults": faults[:SHOWN]}


def main() -> int:
    """Runs the cases; returns the exit code."""
    command = parser(__doc__ or "", "robustness.json")
    command.add_argument("--cases", type=int, default=10_000)
    command.add_argument("--kind", choices=KINDS, help="only this kind")
    command.add_argument("--seed", type=int, help="only this case, of --kind; nothing is written")
    given = command.parse_args()
    child = Child()
    if given.seed is not None:
        outcome = child.outcome(given.kind, given.seed)
        child.close()
        say(f"{outcome.name}: {outcome.detail}")
        return int(outcome.name in BAD)
    rows = []
    for kind, number in cases_of(given.cases).items():
        if given.kind in (None, kind):
            rows.append(count(child, kind, range(number)))
            counts = ", ".join(f"{name} {rows[-1][name.replace(' ', '_')]}" for name in (*GOOD, *BAD))
            say(f"{kind}: {counts}; {rows[-1]['seconds']:.0f} s")
            child.close()  # a process for each kind, so that none sees what another left behind
    columns = [name.replace(" ", "_") for name in ("cases", *GOOD, *BAD)]
    total = {name: sum(row[name] for row in rows) for name in (*columns, "seconds")}
    say(", ".join(f"{name} {value:.0f}" for name, value in total.items()))
    libraries = {name: version(name) for name in LIBRARIES}
    write(given.out, rows, total=total, libraries=libraries)
    return int(any(total[name.replace(" ", "_")] for name in BAD))


if __name__ == "__main__":
    sys.exit(main())
