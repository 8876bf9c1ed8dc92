"""A watchdog that ends a run which makes no progress, instead of occupying its machines."""

import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from cfjax.core.console import complain
from cfjax.core.errors import Temporary, UserError
from cfjax.core.peers import notify_peers

STALLED = Temporary.exit_code


class Watchdog:
    """While active, exits the process when no iteration ends, or no checkpoint is restored, for `seconds`.

    A process that died or hangs leaves the others waiting in a collective, which no exception interrupts: hence a
    separate thread, and an exit without clean-up. The time from there to the first iteration's end (compiling) and
    what runs within `paused` do not count.

    Args:
      seconds: between the ends of two iterations, and for restoring; 0 is no watchdog.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = threading.Event()
        self._last: tuple[str, float] | None = None  # what is waited for, since when; None: not counting
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self, step: int) -> None:
        """Iteration `step` has ended."""
        self._last = (f"no iteration ended in {self._seconds:g} s after step {step}", time.monotonic())

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Around restoring a checkpoint."""
        self._last = (f"no checkpoint was restored in {self._seconds:g} s", time.monotonic())
        yield
        self._last = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take long: sampling, the last save."""
        before, self._last = self._last, None
        yield
        self._last = before and (before[0], time.monotonic())

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            last = self._last
            if last and time.monotonic() - last[1] > self._seconds:
                complain(
                    f"cfjax: process {jax.process_index()} of {jax.process_count()}: {last[0]}; another process died, "
                    "or this one hangs. The run ends; the same command goes on from its last checkpoint "
                    "(stall_seconds is the time, 0 is for ever)"
                )
                os._exit(STALLED)


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """Exits a process of several at once on an error, such as a collective whose peer has died.

    An ordinary exit waits for the other processes, which may wait for this one. It is used for stops that all
    processes make.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        who = f"cfjax: process {jax.process_index()} of {jax.process_count()} ends"
        if isinstance(error, UserError):
            line, code = " ".join(str(error).split()), error.exit_code
        else:
            complain(traceback.format_exc())
            line = "another one died, or see above; the same command goes on from the last checkpoint"
            code = STALLED
        complain(f"{who}: {line}")
        notify_peers(line, code)
        os._exit(code)
