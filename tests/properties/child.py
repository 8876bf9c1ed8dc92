"""Damaged files are read in a process of their own, so that too much memory, too long, or its death are outcomes too.

python -m tests.properties.child      reads {"kind", "seed", "seconds"} lines, answers {"name", "detail"}
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STATM = Path("/proc/self/statm")  # Linux tells a process its size; elsewhere memory is not bounded
GOOD, BAD = ("told", "right"), ("traceback", "silent", "over memory", "over time", "crash")
# More memory than the reader of the whole file takes, its processor's seconds, and waiting's: of a case, of a start.
MEMORY, SECONDS, PATIENCE, START = 2**30, 10.0, 120.0, 600.0


@dataclass(frozen=True)
class Outcome:
    """What became of one damaged file.

    Attributes:
      name: told, in a line; right: the whole file's value, or one that could have been meant; else one of `BAD`.
      detail: the message, or what is wrong.
    """

    name: str
    detail: str = ""


class Child:
    """The process; another takes its place when it dies."""

    def __init__(self) -> None:
        self.seconds = SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: set[str] = set()

    def outcome(self, kind: str, seed: int) -> Outcome:
        """What becomes of the file of a kind that `seed` damages."""
        if self._process is None:
            self._process = _start()
        if kind not in self._ready:
            begun = self._ask(kind, None, START)  # writes the miniature, reads it whole
            if begun.name != "right":
                raise RuntimeError(f"{kind}: its miniature is not read ({begun.detail})")
            self._ready.add(kind)
        return self._ask(kind, seed, PATIENCE)

    def _ask(self, kind: str, seed: int | None, seconds: float) -> Outcome:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"kind": kind, "seed": seed, "seconds": self.seconds}).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [process.stdout], b""
        if line:
            return Outcome(**json.loads(line))
        self.close()
        if not ready:
            return Outcome("over time", f"no answer within {seconds:g} s")
        return Outcome("crash", f"the process ended with exit code {process.returncode}")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process, self._ready = None, set()


def _start() -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.properties.child"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


# ---- in the process


class _TookLong(BaseException):
    pass


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """At most `MEMORY` more than now, and `seconds` of work: other work on the machine does not count."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if STATM.exists():
        size = int(STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


class _Template:
    """A miniature, and what it says whole."""

    def __init__(self, kind: Any, folder: Path) -> None:
        self._kind, self._folder, self._file = kind, folder, folder / kind.file
        folder.mkdir()
        kind.make(folder)
        self._data = self._file.read_bytes()
        self._before = self._names()
        self._whole = kind.read(folder)

    def _names(self) -> set[Path]:
        return set(self._folder.rglob("*"))

    def outcome(self, seed: int, seconds: float) -> Outcome:
        from cfjax.core.errors import UserError
        from cfjax.data.pictures import Unusable
        from tests.properties.kinds import same
        from tests.properties.mutations import mutated

        self._file.write_bytes(mutated(self._data, seed, self._kind.damage))
        try:
            with _bounded(seconds):
                value = self._kind.read(self._folder)
            if same(value, self._whole) or self._kind.sane(value, self._whole):
                return Outcome("right")
            return Outcome("silent", _shown(value))
        except _TookLong:
            return Outcome("over time", f"{seconds:g} s")
        except Exception as error:
            if _has_memory_error(error):
                return Outcome("over memory", _place_of(error))
            if isinstance(error, UserError | Unusable):
                return Outcome("told", str(error)[:300])
            return _fault(error)
        finally:
            self._file.write_bytes(self._data)
            for path in sorted(self._names() - self._before, reverse=True):
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:400]


def _has_memory_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fault(error: BaseException) -> Outcome:
    return Outcome("traceback", f"{type(error).__name__}: {str(error)[:200]} at {_place_of(error)}")


def _place_of(error: BaseException) -> str:
    """The last line of cfjax that the error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/cfjax/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside of cfjax"


def _took_long(*_: object) -> None:
    raise _TookLong


def main() -> None:
    """Answers until the input ends."""
    from absl import logging

    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    logging.set_verbosity(logging.FATAL)
    signal.signal(signal.SIGPROF, _took_long)
    from tests.properties.kinds import INSTRUMENTS, KINDS

    kinds = KINDS | INSTRUMENTS
    templates: dict[str, _Template] = {}
    with tempfile.TemporaryDirectory(prefix="cfjax-properties-") as folder:
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["seed"] is None:
                out = Outcome("right")
                try:
                    templates[asked["kind"]] = _Template(kinds[asked["kind"]], Path(folder) / str(len(templates)))
                except Exception as error:
                    out = _fault(error)
            else:
                out = templates[asked["kind"]].outcome(asked["seed"], asked["seconds"])
            answers.write(json.dumps(vars(out)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
