"""A process that exits with an error notifies the other processes of the run, which would wait for it until XLA aborts.

Messages are in the key-value store of JAX's coordination service, which exists as soon as a process has joined; each
process polls it once a second. A process that is killed sends none: its heartbeats end, and XLA aborts the others
within minutes.
"""

import atexit
import os
import threading
import time
from contextlib import suppress
from typing import Any

import jax

from cfjax.core.console import complain

_NOTES = "cfjax/ended"
EVERY = 1.0  # seconds
PATIENCE = 3.0  # for which the first process, whose end is that of the service, waits until all have read


def _service() -> Any:
    """The client of the coordination service; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def notify_peers(line: str, code: int) -> None:
    """Publishes why this process is about to exit, and its exit code."""
    with suppress(Exception):  # the service may be what is wrong
        _service().key_value_set(f"{_NOTES}/{jax.process_index()}", f"{code} {' '.join(line.split())}")
        if jax.process_index() == 0:
            time.sleep(PATIENCE)


def watch_peers() -> None:
    """Starts a thread that exits this process with a one-line error once another one has published a failure."""
    over = threading.Event()
    thread = threading.Thread(target=_listen, args=(over,), name="peers", daemon=True)

    def end() -> None:  # before JAX leaves the service
        over.set()
        thread.join()

    atexit.register(end)
    thread.start()


def _listen(over: threading.Event) -> None:
    own = f"{_NOTES}/{jax.process_index()}"
    with suppress(Exception):  # an older or newer JAX: as without
        while not over.wait(EVERY):
            for name, note in _service().key_value_dir_get(f"{_NOTES}/"):
                if name != own:
                    code, _, line = note.partition(" ")
                    who = f"process {name.rpartition('/')[2]} of {jax.process_count()}"
                    complain(f"cfjax: {who} has ended, and so does this one, {jax.process_index()}: {line}")
                    os._exit(int(code))
