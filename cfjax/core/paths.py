"""Folders of this machine and folders in a bucket (`gs://bucket/folder`) through the same code.

`path_of` gives a path with pathlib's interface for either; everything else that differs between the two is in this
module: how tensorstore names them, atomic writes, moving a folder, and files that grow, which a bucket does not have
(`Mirror`).
"""

import errno
import importlib.util
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import fsspec
from absl import logging
from etils import epath

from cfjax.core.errors import Temporary, UserError
from cfjax.core.limits import LIST_BYTES
from cfjax.core.machine import PASSING
from cfjax.core.schema import load_json

BUCKET, SLASH_LOST = "gs://", "gs:/"
PACKAGES = ("gcsfs", "google.cloud.storage")  # pip install -e '.[gcs]'
_PATTERN = "*?[\\"
# PASSING in the words of tensorstore, safetensors and torch.
_REFUSED = re.compile(
    r"(?i)no space left|disk quota|read-only file system|EXHAUSTED: Error writing|mapping size|StreamWriter failed"
)
_MISTAKES = (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError)


def path_of(place: str | os.PathLike[str]) -> Path:
    """`place` as a path: pathlib's own, or etils' for one in a bucket, which has the same interface.

    Raises:
      UserError: it is of another kind (`s3://`), a bucket's address that has lost a slash (as pathlib makes of one), or
        the packages for buckets are not installed.
    """
    text = os.fspath(place)
    kind, mark, _ = text.partition("://")
    if not mark and not text.startswith(SLASH_LOST):
        return Path(text)
    if kind + mark != BUCKET or not text.removeprefix(BUCKET).strip("/"):
        raise UserError(f"{text}: name a folder, or a bucket's folder as {BUCKET}BUCKET/FOLDER")
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        raise UserError(f"{text}: {missing[0]} is missing, which reads buckets; pip install -e '.[gcs]' in the clone")
    os.environ.setdefault("EPATH_USE_TF", "false")  # etils would go through TensorFlow wherever that is installed
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # others write there too
    return cast(Path, epath.Path(text))


def absolute(place: str | os.PathLike[str]) -> Path:
    """`path_of`, whatever the current folder will be."""
    path = path_of(place)
    return path if in_bucket(path) else path.absolute()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def local_path(place: str | os.PathLike[str], what: str, why: str) -> Path:
    """`place`, which has to be on this machine.

    Args:
      what, why: the key and the reason, for the message.

    Raises:
      UserError: it is a bucket's.
    """
    text = os.fspath(place)
    if "://" in text or text.startswith(SLASH_LOST):
        raise UserError(f"{what}={text}: {why}; mount the bucket or copy the folder, and name the local path")
    return Path(text)


def in_bucket(path: Path) -> bool:
    """Whether `path_of` made it from a bucket's address."""
    return str(path).startswith(BUCKET)


def is_folder(path: Path) -> bool:
    """Whether there is such a folder.

    Raises:
      Temporary: the bucket cannot be reached.
    """
    if not in_bucket(path):
        return path.is_dir()
    try:
        files, prefix = _files_of(path)
        return bool(files.ls(prefix, detail=False))
    except FileNotFoundError:
        return False
    except Exception as error:
        raise Temporary(f"{path}: the bucket cannot be reached ({one_line(error)})") from error


def make_folder(path: Path) -> None:
    """Creates a folder if absent, and checks that files can be written and replaced there.

    Raises:
      UserError: they cannot, in that bucket; `Temporary` unless it is not there or not to be written.
    """
    if in_bucket(path):
        _try_bucket(path)
    else:
        path.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path) -> None:
    """Checks whether files can be written in a folder, which need not exist yet; leaves nothing behind.

    Raises:
      UserError: they could not; `Temporary` when a bucket cannot be reached.
    """
    if in_bucket(path):
        return _try_bucket(path)
    there = path.absolute()
    while not os.path.exists(there):  # unlike Path.exists, False without permission
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{path}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {there} may not be written to; name another folder")


def _try_bucket(path: Path) -> None:
    """Writes a small file into a bucket's folder, and removes it."""
    trial = f"{path}/.{platform.node()}.{os.getpid()}"  # folders of buckets are in their files' names alone
    try:
        files, name = _files_of(path_of(trial))
        files.pipe_file(name, b"")
        files.rm_file(name)
    except Exception as error:
        raise unusable(error)(f"{path}: files cannot be written and removed there ({one_line(error)})") from error


def file_sizes(path: Path) -> dict[str, int]:
    """Sizes in bytes of the files directly in a folder, by name; empty when there is no such folder.

    Raises:
      UserError: it cannot be listed; `Temporary` when a bucket cannot be reached.
    """
    try:
        if in_bucket(path):
            files, prefix = _files_of(path)
            found = files.ls(prefix, detail=True)
            return {file["name"].rsplit("/", 1)[-1]: file["size"] for file in found if file["type"] == "file"}
        with os.scandir(path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise unusable(error)(f"{path}: cannot be listed ({one_line(error)})") from error


def unusable(error: BaseException) -> type[UserError]:
    """The error to raise when storage failed with `error`: permanent for a wrong name or permission, else temporary."""
    return UserError if isinstance(error, _MISTAKES) else Temporary


@contextmanager
def reporting_storage_errors(folder: Path, fix: str) -> Iterator[None]:
    """Context manager: a storage error while writing into `folder` (full disk, no permission) is raised as one line.

    Raises:
      UserError: that line, followed by `fix`; `Temporary` where the same command may succeed later.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise their own kinds
        if getattr(error, "errno", None) in PASSING or _REFUSED.search(str(error)):
            raise unusable(error)(f"{folder}: cannot be written to ({one_line(error)}); {fix}") from error
        raise


def one_line(error: BaseException) -> str:
    """Type and text of an error of another library, shortened to fit into a line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:160]}"


def kvstore(folder: Path) -> dict[str, Any]:
    """tensorstore's description of a folder."""
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    bucket, _, prefix = str(folder).removeprefix(BUCKET).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a local temporary path, and puts that file in the place of `path` if all went well.

    A local file is renamed (it is beside `path`, whose folder is created) once its bytes are on the disk, so that a
    power failure leaves the old one or the new one; one for a bucket is uploaded.
    """
    target = path_of(path)
    if in_bucket(target):
        with tempfile.TemporaryDirectory(prefix="cfjax-") as folder:
            partial = Path(folder) / target.name
            yield partial
            _send(partial, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")  # other machines may write there too
    try:
        yield partial
        to_disk(partial)
        os.replace(partial, target)
        to_disk(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """A file whole or not at all, text in UTF-8; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def read_if_whole(path: Path) -> Any:
    """The content of a JSON file of ours; None if it is absent, empty or truncated, as after a power failure."""
    try:
        return load_json(path, LIST_BYTES)
    except (FileNotFoundError, ValueError):
        return None


def to_disk(path: Path) -> None:
    """Returns once a file's bytes, or a folder's names, would survive a power failure (fsync)."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # of folders, some file systems cannot
            raise
    finally:
        os.close(opened)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder, in place of a file that is there; onto another disk, copies it and removes it here."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, partial, symlinks=True)
            else:
                shutil.copy2(source, partial, follow_symlinks=False)
            os.replace(partial, target)
        finally:
            remove(partial)
        remove(source)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_folder(source: Path, target: Path) -> None:
    """Moves a folder, whose new place is free; in a bucket, file by file."""
    if in_bucket(source):
        files, prefix = _files_of(source)
        files.mv(prefix, _files_of(target)[1], recursive=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        move(source, target)


def check_checkpoints(folder: Path) -> None:
    """Checks whether checkpoints can be written below a folder, before anything is.

    Raises:
      UserError: not with that name. Orbax looks for the pieces of a checkpoint by a pattern that begins with its path,
        and would find none.
    """
    path = str(absolute(folder))
    if found := [mark for mark in _PATTERN if mark in path]:
        raise UserError(
            f"{path}: checkpoints cannot be written below a name with {' or '.join(found)}; name another folder"
        )


class Mirror:
    """A local folder in place of `target`: the same one, or for a bucket a temporary one that is uploaded.

    For files that grow (in a bucket they cannot) and for libraries that read and write local files only.

    Attributes:
      folder: the local one.
    """

    def __init__(self, target: Path) -> None:
        self._target, self._own = target, in_bucket(target)
        self.folder = Path(tempfile.mkdtemp(prefix="cfjax-")) if self._own else target
        self._sent: dict[Path, tuple[int, int]] = {}

    def pull(self, *names: str) -> None:
        """Fetches those of the named files that are there."""
        for name in names if self._own else ():
            try:
                (self.folder / name).write_bytes((self._target / name).read_bytes())
            except FileNotFoundError:
                continue
            self._sent[self.folder / name] = _version(self.folder / name)

    def push(self) -> int:
        """Uploads the files that have changed, or logs in one line why not; the next call tries again.

        Returns:
          the size in bytes of the largest one.
        """
        largest = 0
        try:
            for file in sorted(self.folder.rglob("*")) if self._own else ():
                if file.is_file() and self._sent.get(file) != (version := _version(file)):
                    _send(file, self._target / file.relative_to(self.folder).as_posix())
                    self._sent[file], largest = version, max(largest, version[0])
        except Exception as error:  # a run matters more than its curves
            logging.warning("%s: not up to date (%s)", self._target, one_line(error))
        return largest

    def close(self) -> None:
        """Removes a temporary folder."""
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)


def _version(file: Path) -> tuple[int, int]:
    """Differs once the file was written to."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _send(source: Path, target: Path) -> None:
    """A file to a bucket, where it appears once all of it has arrived."""
    files, name = _files_of(target)
    files.put_file(str(source), name)


def _files_of(path: Path) -> tuple[Any, str]:
    """The file system of a bucket's path, and the name there."""
    return fsspec.core.url_to_fs(str(path))


def files_below(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and MD5 (base64, as a bucket reports it; else "") of all files below a folder, by relative path.

    Raises:
      UserError: they cannot be listed; `Temporary` when a bucket cannot be reached.
    """
    try:
        if not in_bucket(folder):
            files = (path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): (path.stat().st_size, "") for path in files}
        system, prefix = _files_of(folder)
        found = system.find(prefix, detail=True).items()
        return {name[len(prefix) :].strip("/"): (about["size"], about.get("md5Hash", "")) for name, about in found}
    except Exception as error:
        raise unusable(error)(f"{folder}: cannot be listed ({one_line(error)})") from error
