"""Collectives of a compiled program, by kind: how many run, and how many bytes, from its optimised HLO text.

Counted is the largest array of every collective (the gathered one of an all-gather, the unreduced one of a
reduce-scatter) on one device: what a ring moves is (n - 1) / n of it, an all-reduce twice that. A loop's body counts as
often as XLA knows that it runs; a loop of unknown length as often as the caller says.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8, "s8": 1, "u8": 1}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")


@dataclass(frozen=True)
class Traffic:
    """Of one kind: runs per update, and bytes of their largest arrays."""

    runs: float
    bytes: float


@dataclass
class _Computation:
    own: list[tuple[str, int]] = field(default_factory=list)  # (kind, bytes)
    calls: list[tuple[str, float | None]] = field(default_factory=list)  # (computation, times; None: unknown)


def _largest(text: str) -> int:
    """Bytes of the largest array among the types in `text`."""
    sizes = (
        math.prod(int(n) for n in dims.split(",") if n) * (_BYTES.get(kind) or (1 if kind.startswith("f8") else 4))
        for kind, dims in _ARRAY.findall(text)
    )
    return max(sizes, default=0)


def _collective(line: str, types: str, operation: str) -> tuple[str, int] | None:
    """(kind, bytes) of a line that starts or runs a collective."""
    kind = operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    size = _largest(types)
    if kind == "reduce-scatter" and not operation.endswith("-start"):  # its type names the scattered part only
        found = _GROUPS.search(line)
        group = 1 if found is None else int(found[1]) if found[1] else len(found[2].split(","))
        size = max(size * group, _largest(line))
    return kind, size


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], _Computation())
            entry = header[2] if header[1] else entry
            continue
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        types, name = operation.groups()
        found = _collective(line, types, name)
        if found:
            current.own.append(found)
            continue  # what it applies is an addition
        trips = _TRIPS.search(line)
        times = float(trips[1]) if trips else None
        for role, called in _CALLED.findall(line):
            for target in called.strip("{}").replace("%", "").split(", "):
                current.calls.append((target, times if name == "while" and role == "body" else 1.0))
    return computations, entry


def collectives(text: str, *, unknown_trips: float = 1.0) -> dict[str, Traffic]:
    """Traffic of one run of the program, by kind.

    Args:
      text: `compiled.as_text()`.
      unknown_trips: runs of a loop whose length only its data tell.
    """
    computations, entry = _parse(text)
    known: dict[str, dict[str, Traffic]] = {}

    def of(name: str) -> dict[str, Traffic]:
        if name in known:
            return known[name]
        total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        computation = computations.get(name, _Computation())
        for kind, size in computation.own:
            total[kind][0] += 1
            total[kind][1] += size
        for called, times in computation.calls:
            for kind, traffic in of(called).items():
                repeat = unknown_trips if times is None else times
                total[kind][0] += repeat * traffic.runs
                total[kind][1] += repeat * traffic.bytes
        known[name] = {kind: Traffic(*values) for kind, values in total.items()}
        return known[name]

    return of(entry)
