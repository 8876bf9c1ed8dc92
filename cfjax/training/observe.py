"""Performance of a run: step time, tokens/s, utilisation, memory and data wait as curves; a trace on demand."""

import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from absl import logging

from cfjax.core.errors import UserError
from cfjax.core.paths import Mirror, one_line, path_of

TRACE = "profile"  # the folder of a run that traces go to; `tensorboard --logdir` finds them (XProf plug-in)
_COLLECTIVE = re.compile(r"%?(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\w+)\b")
_GIB = 2.0**30

Interval = tuple[float, float]


@dataclass(frozen=True)
class Work:
    """Figures of a run that `StepClock` needs.

    Attributes:
      tokens: latent tokens of one batch, all devices together.
      flops: role -> FLOPs of one update, all devices together, recomputation not counted.
      peak: FLOP/s of all devices together at their best; 0 is unknown.
      trace: iterations [first, end) to write a profiler trace of.
      counts: further figures to log with the clock's, such as the number of broken records.
    """

    tokens: float = 0.0
    flops: Mapping[str, float] = field(default_factory=dict)
    peak: float = 0.0
    trace: tuple[int, int] | None = None
    counts: Callable[[], Mapping[str, float]] = dict


class StepClock:
    """Wall time between two log lines, as curves. Devices run behind the host, so only means over many steps are right.

    perf/step_seconds       wall time of an iteration, all its roles' updates; sampling and saving are left out
    perf/tokens_per_second  latent tokens of the batches that updates were made with
    perf/mfu                model FLOPs utilisation (PaLM, arXiv 2204.02311): the FLOPs that the mathematics asks for,
                            recomputation not counted, over what the devices could do; where both are known
    perf/data_wait          fraction of that time in which the loop waited for the data
    perf/memory_gib         peak memory of the fullest local device so far; where the backend reports it
    """

    def __init__(self, work: Work, now: Callable[[], float] = time.perf_counter) -> None:
        self._work, self._now = work, now
        self._begun = now()
        self._steps = 0
        self._tokens = self._flops = self._wait = self._left_out = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager: the time within counts as data wait."""
        start = self._now()
        yield
        self._wait += self._now() - start

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Around what is not training: sampling, saving, compiling."""
        start = self._now()
        yield
        self._left_out += self._now() - start

    def updated(self, role: str) -> None:
        """One role's update was dispatched."""
        self._tokens += self._work.tokens
        self._flops += self._work.flops.get(role, 0.0)

    def step(self) -> None:
        """One iteration is over."""
        self._steps += 1

    def values(self) -> dict[str, float]:
        """The curves' next points, and a new start; nothing before the first step."""
        if not self._steps:
            return {}
        now = self._now()
        seconds = max(now - self._begun - self._left_out, 1e-9)
        out = {
            "perf/step_seconds": seconds / self._steps,
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/data_wait": min(self._wait / seconds, 1.0),
            **self._work.counts(),
        }
        if self._work.peak and self._flops:
            out["perf/mfu"] = self._flops / seconds / self._work.peak
        if memory := peak_memory():
            out["perf/memory_gib"] = memory / _GIB
        self._begun, self._steps = now, 0
        self._tokens = self._flops = self._wait = self._left_out = 0.0
        return out


def peak_memory() -> int:
    """Peak bytes in use on the fullest local device; 0 where the backend does not report it (CPU)."""
    stats = (device.memory_stats() or {} for device in jax.local_devices())
    return max(int(s.get("peak_bytes_in_use", 0)) for s in stats)


def trace_window(text: str) -> tuple[int, int] | None:
    """`first:end`, iterations first to end - 1; None for "".

    Raises:
      UserError: anything else.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"profile={text!r}: use first:end in iterations, such as 100:105")
    return int(found[1]), int(found[2])


class Tracer:
    """Writes an XProf trace of some iterations to `workdir`/profile and computes the share of collectives.

    Every host writes its own file; the first process logs the share, of its own host. A failing trace is only a
    warning.

    Args:
      window: iterations [first, end), or None for no trace.
    """

    def __init__(self, workdir: str | Path, window: tuple[int, int] | None) -> None:
        self._target, self._window = path_of(workdir) / TRACE, window
        self._mirror: Mirror | None = None

    def before(self, step: int) -> None:
        """Starts the trace when its first iteration comes."""
        if self._window and step == self._window[0]:
            with _warned(self._target):
                mirror = Mirror(self._target)
                jax.profiler.start_trace(str(mirror.folder))
                self._mirror = mirror

    def after(self, step: int, result: Any) -> dict[str, float]:
        """Ends it after its last one, once `result` is there; returns {"perf/collective_share": ...} then."""
        if self._mirror is None or self._window is None or step + 1 < self._window[1]:
            return {}
        jax.block_until_ready(result)
        return self.close()

    def close(self) -> dict[str, float]:
        """Ends a trace that is still running; as `after`."""
        if self._mirror is None:
            return {}
        mirror, self._mirror = self._mirror, None
        share: dict[str, float] = {}
        with _warned(self._target):
            jax.profiler.stop_trace()
            mirror.push()
            files = sorted(mirror.folder.rglob(f"{platform.node()}.xplane.pb"))
            if files and jax.process_index() == 0:
                share = {"perf/collective_share": collective_share(files[-1])}
        mirror.close()
        return share


@contextmanager
def _warned(folder: Path) -> Iterator[None]:
    """Context manager: errors inside become a one-line warning."""
    try:
        yield
    except Exception as error:  # any error of the profiler or the storage
        logging.warning("%s: no trace, or no share of collectives (%s)", folder, one_line(error))


def _covered(intervals: Iterable[Interval]) -> float:
    """Length of a union of intervals: ops nest (a loop and what it runs)."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _operations(trace: Any) -> Iterator[tuple[Any, str, Interval]]:
    """(device, HLO operation, interval in ns) of a trace's events."""
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                name = stats.get("hlo_op") or (event.name if line.name == "XLA Ops" else "")
                if name:
                    device = (plane.name, stats.get("device_ordinal", 0))
                    yield device, str(name), (event.start_ns, event.start_ns + event.duration_ns)


def collective_share(file: str | Path) -> float:
    """Of the time in which the devices of a trace (xplane.pb) ran operations, the part in which one was a collective.

    Waiting for other devices counts, and so do collectives that run beside computation: an upper bound of their cost.
    """
    busy: dict[Any, list[Interval]] = {}
    collective: dict[Any, list[Interval]] = {}
    for device, name, interval in _operations(jax.profiler.ProfileData.from_file(str(file))):
        busy.setdefault(device, []).append(interval)
        if _COLLECTIVE.match(name):
            collective.setdefault(device, []).append(interval)
    total = sum(map(_covered, busy.values()))
    return sum(map(_covered, collective.values())) / total if total else 0.0
