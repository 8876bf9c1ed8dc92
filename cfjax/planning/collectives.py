"""Collectives of a compiled program, by kind: how many run, and how many bytes, from its optimised HLO text.

Counted is the largest array of every collective (the gathered one of an all-gather, the unreduced one of a
reduce-scatter) on one device: what a ring moves is (n - 1) / n of it, an all-reduce twice that. A loop's trip count is
XLA's `known_trip_count`, or the constant of its condition "counter < constant" (TPU); for a loop of unknown length, and
for the branch of a conditional that moves most, it is the caller's (`trip_counts`).
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from cfjax.planning.trip_counts import TripCounts, branch_frequency, loop_trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8, "s8": 1, "u8": 1}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|called_computations|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_STACK = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] *\{([^}]*)\})")
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_SCATTERS = "all-reduce-scatter"  # TPU's name of a computation that is a reduce-scatter, written as its meaning


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: number per update, and bytes of their largest arrays."""

    runs: float
    bytes: float


@dataclass
class _Computation:
    own: list[tuple[str, int]] = field(default_factory=list)  # (kind, bytes)
    calls: list[tuple[str, float]] = field(default_factory=list)  # (computation, times)
    loops: list[tuple[str, str, str]] = field(default_factory=list)  # without a noted length: body, condition, stack
    branches: list[tuple[list[str], str]] = field(default_factory=list)  # of conditionals: computations, stack
    constants: list[int] = field(default_factory=list)
    counts: bool = False  # holds "counter < something"

    def trip_counts(self) -> float | None:
        """Of a loop's condition: the loop's trip count, if it is a constant."""
        return float(self.constants[0]) if self.counts and len(self.constants) == 1 else None


def _largest(text: str) -> int:
    """Bytes of the largest array among the types in `text`."""
    sizes = (
        math.prod(int(n) for n in dims.split(",") if n) * (_BYTES.get(kind) or (1 if kind.startswith("f8") else 4))
        for kind, dims in _ARRAY.findall(text)
    )
    return max(sizes, default=0)


def _group(line: str) -> int:
    """Devices that a collective runs over."""
    found = _GROUPS.search(line)
    if found is None:
        return 1
    size, listed, axes, chosen = found.groups()
    if axes is not None:
        sizes = dict(re.findall(r"('\w+')=(\d+)", axes))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", chosen))
    return int(size) if size else len(listed.split(","))


def _collective(line: str, types: str, operation: str) -> tuple[str, int] | None:
    """(kind, bytes) of a line that starts or runs a collective."""
    kind = operation.removesuffix("-start")
    if kind not in KINDS:
        return None
    size = _largest(types)
    if kind == "reduce-scatter" and not operation.endswith("-start"):  # its type names the scattered part only
        size = max(size * _group(line), _largest(line))
    return kind, size


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current, scatters = "", _Computation(), False
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], _Computation())
            entry = header[2] if header[1] else entry
            scatters = header[2].startswith(_SCATTERS)
            continue
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        _read(line, operation[1], operation[2], current, scatters)
    return computations, entry


def _read(line: str, types: str, name: str, current: _Computation, scatters: bool) -> None:
    """One operation of a computation."""
    found = _collective(line, types, name)
    if found:
        current.own.append(("reduce-scatter" if scatters else found[0], found[1]))
        return  # what it applies is an addition
    if constant := _CONSTANT.search(line):
        current.constants.append(int(constant[1]))
    current.counts |= name == "compare" and "direction=LT" in line
    called = [(role, target.strip("{}").replace("%", "").split(", ")) for role, target in _CALLED.findall(line)]
    if name == "while":
        inner = dict(called)
        noted = _TRIPS.search(line)
        if noted:
            current.calls.append((inner["body"][0], float(noted[1])))
        else:
            current.loops.append((inner["body"][0], inner["condition"][0], _stack(line)))
        return
    if name == "conditional":
        current.branches.append(([one for _, targets in called for one in targets], _stack(line)))
        return
    current.calls.extend((one, 1.0) for _, targets in called for one in targets)


def _stack(line: str) -> str:
    found = _STACK.search(line)
    return found[1] if found else ""


def _moved(traffic: Mapping[str, Traffic]) -> float:
    return sum(of.bytes for of in traffic.values())


def collectives(text: str, *, trip_counts: TripCounts | None = None) -> dict[str, Traffic]:
    """Traffic of one run of the program, by kind.

    Args:
      text: `compiled.as_text()`.
      trip_counts: of loops and conditionals that depend on data, see `planning.trip_counts`.
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
        loops = [
            (body, computations[condition].trip_counts() or loop_trip_count(stack, trip_counts or {}))
            for body, condition, stack in computation.loops
        ]
        branches = []
        for targets, stack in computation.branches:
            *others, most = sorted(targets, key=lambda branch: _moved(of(branch)))
            share = branch_frequency(stack, trip_counts or {})
            branches += [(most, share), *((branch, (1 - share) / len(others)) for branch in others)]
        for called, times in [*computation.calls, *loops, *branches]:
            for kind, traffic in of(called).items():
                total[kind][0] += times * traffic.runs
                total[kind][1] += times * traffic.bytes
        known[name] = {kind: Traffic(*values) for kind, values in total.items()}
        return known[name]

    return of(entry)
