"""Random access to records of many files with few of them open, and the errors of reading.

A set of a million records may have a thousand files. Readers are opened when needed, and the least recently used one is
closed for the next, so that files, memory and threads do not grow with the set. (ArrayRecord starts one
pool of 64 idle threads in a process that reads, whatever the number of its readers; with the options here none of them
reads ahead.)
"""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

from array_record.python.array_record_module import ArrayRecordReader

from cfjax.core.errors import UserError
from cfjax.core.machine import machine_failure, open_file_limit

READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # of access at random
V = TypeVar("V")


class BrokenRecord(UserError):
    """A record is damaged, absent or does not match its set; the machine is not at fault."""


def reading_failure(place: object, error: BaseException, fix: str = "") -> UserError:
    """The error to raise when reading `place` failed: the machine's, or else a BrokenRecord that ends with `fix`."""
    return machine_failure(place, error) or BrokenRecord(f"{place}: {' '.join(str(error).split())}{fix}")


def max_open_readers() -> int:
    """Maximum number of open readers of a set: an eighth of the process's limit of open files, 4 to 128."""
    return max(4, min(open_file_limit() // 8, 128))


class _Entry(Generic[V]):
    def __init__(self, value: V) -> None:
        self.value, self.users = value, 0


class Pool(Generic[V]):
    """An LRU cache of at most `max_open_readers()` open resources.

    Thread-safe. A resource in use is never closed: if more threads than that read at once, there is one for each. A
    forked process starts with an empty pool, and so does a pickled copy.

    Args:
      close: ends one of them (a function of a module, for pickle).
    """

    def __init__(self, close: Callable[[V], None]) -> None:
        self._close = close
        self._begin()

    def _begin(self) -> None:
        # the parent's stay with a forked process, unused, so that nothing of theirs is closed twice
        self._inherited = getattr(self, "_entries", None)
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._close,)

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def borrow(self, key: Hashable, make: Callable[[], V]) -> Iterator[V]:
        """The resource `key`, opened by `make` if absent."""
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._make_room()
                entry = self._entries[key] = _Entry(make())
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            yield entry.value
        finally:
            with self._lock:
                entry.users -= 1

    def _make_room(self) -> None:
        too_many = len(self._entries) + 1 - max_open_readers()
        idle = [key for key, entry in self._entries.items() if not entry.users]
        for key in idle[: max(too_many, 0)]:
            self._close(self._entries.pop(key).value)


class _Reader:
    """The open file of one part, with a lock: some versions of the library do not allow two threads to read at once."""

    def __init__(self, file: Path) -> None:
        self._lock, self._reader = threading.Lock(), ArrayRecordReader(str(file), READER_OPTIONS)
        if not self._reader.ok():
            self._reader.close()  # raises what kept it from being opened

    def read(self, place: int) -> bytes:
        with self._lock:
            return self._reader.read([place])[0]

    def close(self) -> None:
        with suppress(RuntimeError):  # a damaged file complains once more
            self._reader.close()


class RecordFiles:
    """The records of several ArrayRecord files, numbered consecutively; a file is opened when first read.

    Args:
      parts: (file, records) of each.
    """

    def __init__(self, parts: Sequence[tuple[Path, int]]) -> None:
        self._files = [file for file, _ in parts]
        self._ends = list(accumulate(records for _, records in parts))
        self._readers = Pool(_Reader.close)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def open_readers(self) -> int:
        """How many files are open now."""
        return len(self._readers)

    def locate(self, index: int) -> tuple[Path, int]:
        """The file of record `index`, and its index in that file. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)

    def read(self, index: int) -> bytes:
        """The bytes of a record.

        Raises:
          IndexError: there is no such record.
          ValueError, RuntimeError, MemoryError: it cannot be read; see `reading_failure`.
        """
        file, place = self.locate(index)
        with self._readers.borrow(file, lambda: _Reader(file)) as reader:
            return reader.read(place)
