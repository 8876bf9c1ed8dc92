"""JAX's persistent compilation cache, on by default: a second start reads the programs that a first one compiled.

JAX's key of a program has its versions, XLA's flags and the cache's own path in it, but not the processor: XLA loads
what was compiled for another one, and says that it may die of it (SIGILL). So a folder is one processor's, and one
version's of Python, with which the compression changes:

    ~/.cache/cfjax/jax-0.10.2-py3.11-f51c0a7d/

Several processes may share it: a size limit makes JAX lock the folder, without which one could read what another has
half written. What a killed process or a full disk leaves there would be a warning at every start, and keep JAX from
writing any other program; it is removed, and the program is compiled again.
"""

import hashlib
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import logging
from filelock import FileLock, Timeout
from jax.experimental.compilation_cache import compilation_cache

from cfjax.core.errors import UserError

OFF = "off"
MOST_BYTES = 5 * 10**9
MOST_PROGRAMS = 1000  # JAX looks at every one before it writes another: 33 microseconds each here, more on a network
LEAST_SECONDS = 0.02  # of compiling: quicker programs are not worth a file
UNUSED_DAYS = 90  # after which the folder of another version or processor is removed
LOCK, PROGRAM, TIME = ".lockfile", "-cache", "-atime"  # as JAX names them
_LOCK_SECONDS = 5

_FOLDER = re.compile(r"jax-[^/]+-py[0-9.]+-[0-9a-f]{8}(-joined)?")
_WARNING = r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (\w+)|Cache value for key"
# What tells processors apart in the first paragraph of Linux's list, on x86 and on Arm.
_PROCESSOR = re.compile(r"(?m)^(vendor_id|cpu family|model|flags|Features|CPU (?:implementer|part|variant))\s*:.*$")


def folder_name(cpuinfo: str | None = None) -> str:
    """The name of this machine's folder: versions, and a hash of the processor with its vector instructions.

    Args:
      cpuinfo: text of /proc/cpuinfo (default: this machine's, where there is one).
    """
    if cpuinfo is None:
        with suppress(OSError):
            cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    first = (cpuinfo or "").split("\n\n")[0]
    lines = [found[0] for found in _PROCESSOR.finditer(first)] or [platform.processor()]
    digest = hashlib.sha256("\n".join([platform.machine(), *lines]).encode()).hexdigest()[:8]
    return f"jax-{jax.__version__}-py{sys.version_info.major}.{sys.version_info.minor}-{digest}"


def default_root() -> Path:
    """$XDG_CACHE_HOME/cfjax, or ~/.cache/cfjax.

    Raises:
      RuntimeError: this user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "cfjax"


@contextmanager
def compile_cache(where: str = "", *, joined: bool = False) -> Iterator[None]:
    """Inside, what is compiled is kept for the next start, and read from the last one. Afterwards all is as before.

    What JAX was told by its own variables or settings holds against the defaults here; JAX_ENABLE_COMPILATION_CACHE
    = false holds against everything.

    Args:
      where: a folder, here or in a bucket (gs://BUCKET/FOLDER, without a bound); "off"; or "": the folder of JAX's
        settings, else the user's own, which is done without where it cannot be had.
      joined: this is one of several processes of a run. They must all find a program or all compile it, for XLA shares
        out the tuning of GPU kernels among them; so there is no cache by default, and no bound on one that is named
        (whose lock would make some of them miss).

    Raises:
      UserError: a folder was named that cannot be written.
    """
    if where == OFF:
        with no_compile_cache():
            yield
        return
    if not _setting("jax_enable_compilation_cache") or (not where and _setting("jax_compilation_cache_dir")):
        yield
        return
    settings: dict[str, Any] = _unless_given("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    if not joined and "://" not in where:
        settings |= _unless_given("jax_compilation_cache_max_size", MOST_BYTES)
    bounded = settings.get("jax_compilation_cache_max_size", _setting("jax_compilation_cache_max_size")) >= 0
    place = None if joined and not where else _place(where, folder_name() + "-joined" * joined, bounded)
    if place is None:
        yield
        return
    with _configured(jax_compilation_cache_dir=str(place), **settings), warnings.catch_warnings():
        if isinstance(place, Path):
            warnings.filterwarnings("always", message=_WARNING)
            warnings.showwarning = partial(_mend, place, warnings.showwarning)
        yield


@contextmanager
def no_compile_cache() -> Iterator[None]:
    """Inside, programs are neither kept nor read.

    For those of machines that are not there: JAX writes them, cannot read them, and warns each time.
    """
    with _configured(jax_enable_compilation_cache=False):
        yield


@contextmanager
def _configured(**settings: Any) -> Iterator[None]:
    before = {name: _setting(name) for name in (*settings, "jax_enable_compilation_cache")}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    """JAX looks at its settings at the first program only, hence the reset."""
    changed = {name: value for name, value in settings.items() if _setting(name) != value}
    for name, value in changed.items():
        jax.config.update(name, value)
    if changed:
        compilation_cache.reset_cache()


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _unless_given(name: str, value: Any) -> dict[str, Any]:
    return {} if name.upper() in os.environ else {name: value}


def _place(where: str, name: str, bounded: bool) -> Path | str | None:
    """The folder `name` in `where`, made and tidied; None if the user's own cannot be had, which is logged."""
    if "://" in where:
        return f"{where.rstrip('/')}/{name}"
    try:
        # Resolved: JAX takes the path into its keys, so that another spelling of it would find nothing.
        root = (Path(where) if where else default_root()).resolve()
        folder = root / name
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not where:
            _must_be_ours(root, folder)
        if bounded:
            with suppress(Timeout):  # others are at work there
                tidy(folder)
        elif not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
        os.utime(folder)
        _remove_unused(root, folder)
    except (OSError, RuntimeError, NotImplementedError) as error:  # no right, no room, no home, no locks
        if where:
            raise UserError(f"--compile_cache={where}: {error}; name a folder that can be written, or off") from error
        logging.info("programs are not kept for the next start: %s", error)
        return None
    logging.info("compiled programs are kept in %s", folder)
    return folder


def _must_be_ours(*folders: Path) -> None:
    """Who can write there can make this process run what they like."""
    for folder in folders:
        if hasattr(os, "geteuid") and folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{folder} is another user's")


def tidy(folder: Path) -> None:
    """Removes what JAX cannot use: programs without a time of use, as a killed process leaves them, and the reverse.

    Of more than MOST_PROGRAMS programs, those that were used last stay.

    Raises:
      Timeout: others have kept the folder locked for seconds.
      OSError, NotImplementedError: it cannot be locked or written.
    """
    with FileLock(folder / LOCK, timeout=_LOCK_SECONDS):
        names = set(os.listdir(folder))
        stems = {name.removesuffix(PROGRAM) for name in names if name.endswith(PROGRAM)}
        timed = {name.removesuffix(TIME) for name in names if name.endswith(TIME)}
        old = sorted(stems & timed, key=partial(_used, folder))[:-MOST_PROGRAMS]
        for stem in (stems ^ timed) | set(old):
            _remove(folder, stem)


def _used(folder: Path, stem: str) -> int:
    """When JAX last used a program, in nanoseconds since 1970; 0 if it is not known."""
    with suppress(OSError):
        return int.from_bytes((folder / f"{stem}{TIME}").read_bytes()[:8], "little")
    return 0


def _remove(folder: Path, stem: str) -> None:
    for suffix in (PROGRAM, TIME):
        with suppress(OSError):
            (folder / f"{stem}{suffix}").unlink()


def _remove_unused(root: Path, folder: Path) -> None:
    """Folders of other versions and processors that nobody has started with for long."""
    for other in root.iterdir():
        old = _FOLDER.fullmatch(other.name) and time.time() - other.stat().st_mtime > UNUSED_DAYS * 86400
        if old and other != folder:
            shutil.rmtree(other, ignore_errors=True)


def _mend(folder: Path, show: Callable[..., Any], message: Any, *args: Any, **kwargs: Any) -> None:
    """In place of `warnings.showwarning`: JAX's own about the cache are logged, and their cause is removed."""
    found = re.match(_WARNING, str(message))
    if found is None:
        show(message, *args, **kwargs)
        return
    logging.info("%s", message)
    doing, module, error = found.groups()
    with suppress(OSError, Timeout, NotImplementedError):
        if error == "Timeout":  # each program would wait as long
            _configure({"jax_enable_compilation_cache": False})
        elif doing == "reading":  # the entry that was used last; JAX does not write over it
            pattern = re.compile(re.escape(module) + r"-[0-9a-f]{64}")
            stems = [name.removesuffix(TIME) for name in os.listdir(folder) if name.endswith(TIME)]
            _remove(folder, max(filter(pattern.fullmatch, stems), key=partial(_used, folder), default=""))
        elif doing == "writing":
            tidy(folder)
