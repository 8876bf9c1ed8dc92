"""Files that several processes need and one should make."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_once(path: str | Path, make: Callable[[], Any]) -> None:
    """Calls `make`, which writes `path`, unless it exists; other processes of this machine wait and then find it.

    A lock file is beside it meanwhile; the system releases the lock of a process that dies.

    Raises:
      whatever `make` does; the next waiting process then tries.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    while not target.exists():
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not _is(lock, held.fileno()):
                continue  # who held it before failed and removed it: others may hold a newer one
            try:
                if not target.exists():
                    make()
            finally:
                lock.unlink(missing_ok=True)


def _is(path: Path, descriptor: int) -> bool:
    """Whether that open file still is the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
