"""The only writer to standard output: verbs use `say`, library code logs."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm


def say(message: str = "") -> None:
    """Writes one line to standard output at once, above a progress bar that is shown (on standard error)."""
    with tqdm.external_write_mode(file=sys.stdout):
        sys.stdout.write(message + "\n")
        sys.stdout.flush()


def counted(number: int, noun: str) -> str:
    """ "1 video", "2 videos", "1,024 batches"."""
    many = f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else many}"


def complain(message: str) -> None:
    """Writes one line to standard error at once, if anyone is left to read it."""
    with suppress(OSError):
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


class _TolerantStream:
    """A text stream that never raises: what cannot be written is lost, or written once there is room again."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def end(self) -> None:
        """Writes what is left, or drops it: the interpreter would exit with an error of its own."""
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _lost(self, error: OSError) -> None:
        if error.errno == errno.EPIPE:  # nobody will read from it again
            self._let_go()

    def _let_go(self) -> None:
        with suppress(OSError, ValueError):  # no file of the system
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def tolerate_output_errors() -> Iterator[None]:
    """Inside, a closed pipe (`| head`) or a log on a full disk does not end the process: what can be written is.

    Afterwards the streams are as before.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = [_TolerantStream(stream) for stream in before]  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.end()
