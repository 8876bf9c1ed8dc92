"""How far a plan is: which program is compiled, which of how many, and for how long already."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY, LONGEST = 30.0, 300.0  # seconds before the first line about one program, and at most between two


@contextmanager
def telling(told: Callable[[str], None], what: str, *, every: float = EVERY) -> Iterator[None]:
    """A line before a program is compiled, some meanwhile, ever further apart, and one when it is done.

    Args:
      told: gets the lines, also from another thread.
      what: such as "the student's update (1 of 2)".
      every: seconds before the first of those between.
    """
    begun, ended = time.perf_counter(), threading.Event()

    def beat() -> None:
        pause = every
        while not ended.wait(pause):
            told(f"still compiling {what}: {time.perf_counter() - begun:.0f} s")
            pause = min(2 * pause, LONGEST)

    told(f"compiling {what}")
    thread = threading.Thread(target=beat, name="plan-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    told(f"compiled {what} in {time.perf_counter() - begun:.0f} s")
