"""LMDB files: where they are, whether they are whole, and reading them through few open ones.

LMDB maps its file into memory and trusts it: reading a page that its header counts but that the file lacks kills the
whole process (SIGBUS), with no message. So the header is read first, as bytes, and checked against the file's size.
"""

import os
import struct
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

import lmdb

from cfjax.core.errors import UserError
from cfjax.core.machine import machine_failure
from cfjax.data.readers import BrokenRecord, Pool, reading_failure

DATA = "data.mdb"

# A file begins with two meta pages, written in turn (LMDB 0.9, 64 bits, this machine's byte order): a page's header of
# 16 bytes, then magic, version, address and size of the map, the free list's database (whose first field is the page
# size) and the main one of 48 bytes each, the last page in use, the number of the transaction that wrote it.
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_META = struct.Struct("=16x II QQ I44x 48x QQ")
_PAGE_SIZES = {1 << n for n in range(8, 17)}
T = TypeVar("T")
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError)


def lmdb_files(path: str | Path) -> list[Path]:
    """The LMDBs that `path` is or holds, by name; empty if it is none."""
    path = Path(path)
    if path.is_file() and path.suffix in (".lmdb", ".mdb"):
        return [path]
    if (path / DATA).is_file():
        return [path]
    return sorted(file.parent for file in path.glob(f"*/{DATA}")) if path.is_dir() else []


def is_lmdb(path: str | Path) -> bool:
    """Whether `path` is an LMDB or a folder of them."""
    return bool(lmdb_files(path))


def check_whole(path: Path) -> None:
    """Checks an LMDB's size against its header, without mapping it. A header of another kind is left to LMDB to refuse.

    Raises:
      UserError: the file is shorter than its header says, or cannot be read.
    """
    file = path / DATA if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            first = _meta(opened.read(_META.size))
            if first is None:
                return
            opened.seek(first[2])
            second = _meta(opened.read(_META.size))
    except OSError as error:
        raise machine_failure(file, error) or UserError(f"{file}: cannot be read ({error})") from None
    if second is None and size >= 2 * first[2]:
        return
    _, last_page, page_size = max(first, second or first)
    if size < (needed := max(last_page + 1, 2) * page_size):
        raise UserError(
            f"{file}: {size} bytes, but its header says {needed}: it was cut off, or is still being copied; copy "
            "it again, whole"
        )


def _meta(page: bytes) -> tuple[int, int, int] | None:
    """(transaction, last page, page size) of a meta page, None for other bytes."""
    if len(page) < _META.size:
        return None
    magic, version, _, _, page_size, last_page, transaction = _META.unpack(page)
    known = (magic, version) == (_MAGIC, _VERSION) and page_size in _PAGE_SIZES
    return (transaction, last_page, page_size) if known else None


class _Open:
    """An open environment; LMDB allows one per file and process, so all readers of a file share it."""

    alive: ClassVar["weakref.WeakValueDictionary[Path, _Open]"] = weakref.WeakValueDictionary()
    lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        check_whole(path)
        self.env = lmdb.open(
            str(path),
            subdir=path.is_dir(),
            readonly=True,
            lock=False,
            readahead=False,
            meminit=False,
            max_readers=1024,
        )

    def __del__(self) -> None:
        if "env" in self.__dict__:
            self.env.close()

    @classmethod
    def of(cls, path: Path) -> "_Open":
        """The environment of `path` in this process."""
        with cls.lock:
            found = cls.alive.get(path.resolve())
            if found is None:
                found = cls.alive[path.resolve()] = cls(path)
            return found

    @classmethod
    def after_fork(cls) -> None:
        """An environment must not be used after a fork: the child opens its own, once its copy is closed."""
        cls.lock = threading.Lock()
        for opened in cls.alive.values():
            opened.env.close()
        cls.alive.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Open.after_fork)


def _let_go(_: _Open) -> None:
    """Nothing: an environment closes with its last reader."""


class LmdbFiles:
    """Values of any number of LMDBs, of which a bounded number is open at a time."""

    def __init__(self) -> None:
        self._pool: Pool[_Open] = Pool(_let_go)

    def get(self, path: Path, key: str, *, at_most: int | None = None) -> bytes | None:
        """The value of a key of one LMDB, or its first `at_most` bytes; None if it is not there.

        Raises:
          UserError: the file cannot be read; a BrokenRecord when its pages are damaged there.
        """

        def read(opened: _Open) -> bytes | None:
            with opened.env.begin(buffers=True) as found:
                value = found.get(key.encode())
                return None if value is None else bytes(value[:at_most])

        return self._read_or_raise(path, read)

    def count(self, path: Path) -> int:
        """How many keys an LMDB has. Raises what `get` does."""
        return self._read_or_raise(path, lambda opened: int(opened.env.stat()["entries"]))

    def _read_or_raise(self, path: Path, read: Callable[[_Open], T]) -> T:
        try:
            with self._pool.borrow(path, lambda: _Open.of(path)) as opened:
                return read(opened)
        except _DAMAGE as error:
            raise BrokenRecord(f"{path}: cannot read this LMDB ({error})") from None
        except lmdb.Error as error:
            raise machine_failure(path, error) or UserError(f"{path}: cannot read this LMDB ({error})") from None
        except MemoryError as error:
            raise reading_failure(path, error) from None
