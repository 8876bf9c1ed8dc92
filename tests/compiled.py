"""Counts compilations."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def compiled(function: str = "") -> Iterator[list[str]]:
    """The names of what is compiled inside, or read from the persistent cache, by any thread; of one function's alone.

    A second call with other shapes counts, and so does one with arguments on another device, which traces nothing anew.
    """
    found: list[str] = []

    def listen(event: str, seconds: float, *, fun_name: str = "", **_: object) -> None:
        if event.endswith("backend_compile_duration") and (not function or fun_name == f"jit({function})"):
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
