"""Limits and failures of the machine (open files, storage), as opposed to faults of a file."""

import errno
import os
import re
from contextlib import suppress

try:
    import resource
except ImportError:  # no such limits there
    resource = None  # type: ignore[assignment]

from cfjax.core.errors import Temporary, UserError

FILES_AT_LEAST = 128  # a run's own: checkpoints, curves, sockets, compilation cache
FILES_WANTED = 8192
_UNLIMITED = 1 << 20
_CODES = {os.strerror(code): code for code in errno.errorcode}


def open_file_limit() -> int:
    """How many files this process may hold open: the soft limit, `ulimit -n`."""
    if resource is None:
        return FILES_WANTED
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _UNLIMITED if soft == resource.RLIM_INFINITY else min(soft, _UNLIMITED)


def ensure_open_files() -> None:
    """Raises the soft limit of open files to FILES_WANTED, as far as the hard one goes.

    Raises:
      UserError: the limit is then still too low for any command.
    """
    if resource is not None and open_file_limit() < FILES_WANTED:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)
        with suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if open_file_limit() < FILES_AT_LEAST:
        raise UserError(
            f"this process may hold {open_file_limit()} files open, and needs {FILES_AT_LEAST}: raise the limit, as "
            "ulimit -n 4096 (whoever set the hard limit has to raise that first)"
        )


def error_code(error: BaseException) -> int | None:
    """The errno behind an error of Python or of a library: 0 for an unknown one, None when it is not a system error.

    Libraries in other languages report it by the system's text, as "pread() failed: Input/output error".
    """
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):  # as Rust says it
        return int(found[1])
    codes = (_CODES[part] for part in re.split(r": |; ", text) if part in _CODES)
    return next(codes, 0 if re.search(r"\w\(\) failed", text) else None)


def machine_failure(place: object, error: BaseException) -> UserError | None:
    """The error to raise when `place` could not be read because of the machine; None when the file is at fault.

    A limit or a missing permission is permanent (UserError); a disk, a mount or memory may recover (Temporary).
    """
    code = error_code(error)
    if code is None:
        return None
    reason = os.strerror(code) if code else " ".join(str(error).split())
    if code in (errno.EMFILE, errno.ENFILE):
        allowed = f"of which this process may have {open_file_limit()}"
        return UserError(f"{place}: {reason.lower()}, {allowed}; raise the limit before the command: ulimit -n 4096")
    if code in (errno.EACCES, errno.EPERM):
        return UserError(f"{place}: may not be read ({reason}); change its rights")
    if code == errno.ENOMEM:
        return Temporary(f"{place}: no memory left to read it; make room and give the same command again")
    return Temporary(
        f"{place}: cannot be reached ({reason}); see to its disk or mount, and give the same command again"
    )


# Rooms, mounts and networks that may be there again when the same command is given.
PASSING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)


def storage_failure(error: BaseException) -> UserError | None:
    """The error to raise for a failure of storage; None when it is something else.

    A full or failing disk, a quota or a read-only mount may recover (Temporary); a missing permission does not.
    """
    code = error_code(error)
    if isinstance(error, UserError) or code is None:
        return None
    place = getattr(error, "filename", None)
    what = f"{place}: {os.strerror(code).lower()}" if place else " ".join(str(error).split())[:200]
    if code in PASSING:
        return Temporary(f"{what}; see to the room, the quota and the mount there, and give the same command again")
    if code in (errno.EACCES, errno.EPERM) and place:
        return UserError(f"{what}; change its rights, or name another place")
    return None
