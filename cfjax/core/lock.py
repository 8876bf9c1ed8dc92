"""A lock on a folder: one process at a time writes there, and holds a small file that names its host and process.

The file is filelock's lease: its holder touches it every few seconds. A lock of a process of this machine that no
longer runs (by process id and start time) is taken over at once. For another machine only the touches count: the lock
of one that died (a preempted machine, whose run continues elsewhere) is taken over when a lease has passed without any.
Clocks of machines are never compared. Folders in buckets are not locked.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from absl import logging
from filelock import LeaseCompromise, SoftFileLease, Timeout
from jax.experimental import multihost_utils

from cfjax.core.errors import Temporary
from cfjax.core.paths import check_writable, in_bucket, make_folder, one_line, unusable

LOCK = ".lock"
LEASE_SECONDS = 60.0  # NFS may keep what it knows of a file for as long
TOUCH_SECONDS = 2.0


@contextmanager
def holding(folder: Path, name: str = LOCK, *, each: bool = False) -> Iterator[None]:
    """Locks `folder`, which is created if absent; if it was created here and is empty at the end, it is removed.

    In a run of several processes the first holds it for all.

    Args:
      name: of the lock, where several processes write different parts of one folder.
      each: every process of a run holds a lock of its own.

    Raises:
      Temporary: another process writes there; the line names it.
      UserError: the folder cannot be made or written to.
    """
    if in_bucket(folder):
        yield
        return
    together = not each and jax.distributed.is_initialized()
    if together and jax.process_index() > 0:
        if not multihost_utils.broadcast_one_to_all(np.asarray(False)):
            raise Temporary(f"{folder}: process 0 of this run could not take it; its own line says why")
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = SoftFileLease(
        folder / name, lease_duration=LEASE_SECONDS, heartbeat_interval=TOUCH_SECONDS, on_compromise=_stop
    )
    taken = False
    try:
        try:
            _acquire(lock, folder)
            taken = True
        finally:
            if together:
                multihost_utils.broadcast_one_to_all(np.asarray(taken))
        yield
    finally:
        _release(lock)
        for place in made:
            with suppress(OSError):  # it is in use
                place.rmdir()


def _acquire(lock: SoftFileLease, folder: Path) -> None:
    check_writable(folder)
    try:
        make_folder(folder)
        watch = _Watch(lock)
        try:
            lock.acquire(timeout=LEASE_SECONDS + 2 * TOUCH_SECONDS, poll_interval=0.2, cancel_check=watch)
        except Timeout:
            if watch.moved or lock.owner is not None:
                raise
            lock.break_lock()  # empty or cut, as after a power failure, which the library leaves alone
            lock.acquire(timeout=0)
    except Timeout:
        raise Temporary(
            f"{folder}: {_holder(lock)} writes there; wait for its end, or end it, or name another folder"
        ) from None
    except OSError as error:
        raise unusable(error)(f"{folder}: cannot be written to ({one_line(error)})") from error
    if watch.before:
        logging.warning("%s: taken over from %s, which is gone", folder, watch.before)


def _holder(lock: SoftFileLease) -> str:
    """The holder, for a message; the library appends a mark for containers to the host's name."""
    owner = lock.owner
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"


class _Watch:
    """Called while waiting for a lock: whether its holder has shown that it is alive.

    Attributes:
      before: the holder at the beginning, "" for none.
      moved: what the last call returned.
    """

    def __init__(self, lock: SoftFileLease) -> None:
        self._file, self._since = Path(lock.lock_file), time.monotonic()
        self._seen = self._touched(self._file)
        self.before, self.moved, self._warned = _holder(lock) if self._seen else "", False, False

    def __call__(self) -> bool:
        now = self._touched(self._file)
        self._seen = self._seen or now
        self.moved = now not in (None, self._seen)
        if not self.moved and not self._warned and time.monotonic() - self._since > 3 * TOUCH_SECONDS:
            self._warned = True
            logging.warning(
                "%s: %s held it last; waiting for a sign of life, %.0f s at most",
                self._file,
                self.before or "another process",
                LEASE_SECONDS,
            )
        return self.moved

    @staticmethod
    def _touched(file: Path) -> tuple[int, int] | None:
        """When it was last touched; it is opened first, because NFS would answer from its cache otherwise."""
        try:
            with file.open("rb") as opened:
                stat = os.fstat(opened.fileno())
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns


def _stop(lost: LeaseCompromise) -> None:
    """Exits this process at once when another one has taken its folder over after a lease without touches."""
    if lost.reason != "owner-changed":
        return logging.warning("%s: is gone; another command may now write beside this one", lost.lock_file)
    sys.stderr.write(f"cfjax: {lost.lock_file}: taken over by another process, as this one had stood still; it ends\n")
    sys.stderr.flush()
    os._exit(Temporary.exit_code)


def _release(lock: SoftFileLease) -> None:
    try:
        lock.release()
    except OSError as error:  # the work is done; the next command takes it over
        logging.warning("%s: cannot be removed (%s)", lock.lock_file, one_line(error))
