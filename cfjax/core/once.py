"""Files that several processes want and one should make."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make_once(path: str | Path, make: Callable[[], Any]) -> None:
    """Calls `make`, which writes `path`, unless it is there; other processes of this machine wait and find it.

    A lock file lies beside it meanwhile; the system frees the lock of a process that dies.

    Raises:
      whatever `make` does; the next process in line then tries in its turn.
    """
    target = Path(path)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            if not target.exists():
                make()
        finally:
            lock.unlink(missing_ok=True)
