"""How far a job is: a bar on a terminal; anywhere else, where a bar would fill a log, a line now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from cfjax.core.console import complain, counted, say

FIRST_SECONDS, LINE_SECONDS = 10.0, 30.0  # before the first line of a job, and between two

T = TypeVar("T")


def duration(seconds: float) -> str:
    """ "8 s", "12 min" or "3 h 20 min"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """Counts what is done of a job, on standard error; a context manager.

    On a terminal it is tqdm's bar, which `core.console.say` writes above. Elsewhere it is lines: "NAME: 512 of 1,024
    pairs, 9.8 pairs/s, 52 s left", the first after `FIRST_SECONDS`, one in `LINE_SECONDS`, and one at the end.

    Args:
      total: how much there is.  done: how much of it was there before.
      unit: of one, such as "video"; "B" are bytes.
      shown: False shows nothing.
      by_hand: lines are written by `line` alone.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        name: str = "",
        *,
        done: int = 0,
        shown: bool = True,
        by_hand: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._unit, self._name, self._done = total, unit, name, done
        self._now, self._by_hand, self._lines = now, by_hand, shown and not sys.stderr.isatty()
        self._begun = self._since = now()
        self._said, self._due, self._note, self._rated = done, self._begun + FIRST_SECONDS, "", True
        self._bar: Any = tqdm(
            desc=name or None,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=unit == "B",
            disable=not shown or self._lines,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self._done += count
        self._bar.update(count)
        if not self._by_hand and self._now() >= self._due:
            self.line()

    def unrated(self) -> None:
        """The next line has no rate: something was compiled since the last one."""
        self._rated = False

    def note(self, values: Mapping[str, str]) -> None:
        """What to show beside the count, such as the losses."""
        self._note = "".join(f", {name} {value}" for name, value in values.items())
        self._bar.set_postfix(values, refresh=False)

    def line(self) -> None:
        """A line now, where lines are written; its rate is that since the last one."""
        if not self._lines:
            return
        now = self._now()
        rate = (self._done - self._said) / max(now - self._since, 1e-9) if self._rated else 0.0
        speed = self._amount(rate) if rate >= 1 else f"{1 / rate:.3g} s" if rate else ""
        per = f", {speed}/s" if rate >= 1 else f", {speed} per {self._unit}" if rate else ""
        left = f", {duration((self._total - self._done) / rate)} left" if rate and self._done < self._total else ""
        self._say(f"{self._amount(self._done)} of {self._amount(self._total, unit=True)}{self._note}{per}{left}")
        self._since, self._said, self._due, self._rated = now, self._done, now + LINE_SECONDS, True

    def close(self) -> None:
        """The end of the job, or what is done of it."""
        self._bar.close()
        if self._lines and not self._by_hand and self._done != self._said:
            of = "" if self._done == self._total else f" of {self._amount(self._total)}"
            amount = f"{self._amount(self._done)}{of}" if of else self._amount(self._done, unit=True)
            self._say(f"{amount} in {duration(self._now() - self._begun)}")
        self._lines = False

    def _say(self, text: str) -> None:
        complain(f"{self._name}: {text}" if self._name else text)

    def _amount(self, number: float, *, unit: bool = False) -> str:
        if self._unit == "B":
            return tqdm.format_sizeof(number, "B")
        if unit:
            return counted(int(number), self._unit)
        return f"{number:,}" if isinstance(number, int) else f"{number:.3g} {self._unit}s"


def followed(items: Iterable[T], total: int, unit: str, name: str = "", *, shown: bool = True) -> Iterator[T]:
    """The items, with the progress through them."""
    with Progress(total, unit, name, shown=shown) as progress:
        for item in items:
            yield item
            progress.update()


@contextmanager
def compiling(what: str, *, shown: bool = True) -> Iterator[None]:
    """Around what compiles programs: says so before, and how long it took after."""
    begun = time.monotonic()
    if shown:
        say(f"compiling {what}, once ...")
    yield
    if shown:
        say(f"... compiled in {duration(time.monotonic() - begun)}")
