"""Appending to a log file of a run; write errors never end the run."""

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from absl import logging

from cfjax.core.paths import one_line

MOST = 64_000_000  # bytes that wait for room on a disk, the newest ones


class Appender:
    """Appends to a file at once. Data that cannot be written is buffered, and written in order when that works again.

    A partial write is overwritten: the next one begins where the last complete one ended. The first failure is logged.

    Args:
      file: on this machine; made, with its folder, at the first write.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._warned = file, False
        self._size: int | None = None  # up to where the file is whole; None: as it is found
        self._waiting: deque[bytes] = deque()

    def add(self, data: bytes) -> None:
        """Writes `data` behind all that was added before."""
        self._waiting.append(data)
        self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Writes what is buffered; with `sync` also to the disk (fsync)."""
        if not self._waiting and not (sync and self.file.exists()):
            return
        data = b"".join(self._waiting)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as stream:
                size = stream.tell() if self._size is None else self._size
                stream.truncate(size)
                self._size = size
                view = memoryview(data)
                while view:
                    view = view[stream.write(view) :]
                if sync:
                    os.fsync(stream.fileno())
        except OSError as error:
            self._warn(error)
            while sum(map(len, self._waiting)) > MOST:
                self._waiting.popleft()
            return
        self._size += len(data)
        self._waiting.clear()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logging.warning("%s: cannot be written (%s); the run goes on and tries again", self.file, one_line(error))

    def rewrite(self, keep: Callable[[bytes], bool]) -> None:
        """Keeps the lines of the file for which `keep` is true; atomic."""
        temporary = self.file.with_suffix(".tmp")
        try:
            kept = [line + b"\n" for line in self.file.read_bytes().splitlines() if keep(line)]
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, self.file)
            self._size = None
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(error)
