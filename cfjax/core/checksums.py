"""A checksum for each file of a folder, stored beside them, so that a damaged file is found and named.

`checksums.json` maps each file's name to its size in bytes and its CRC-32 (zlib's: OCDBT files end in their own
CRC-32C, so that the CRC-32C of every one of them is the same number). For a bucket it keeps the MD5 that the bucket
reports for each object: nothing is downloaded to make or to compare it. It finds damage (a failing disk, a truncated
copy), not tampering: whoever changes a file on purpose can change its checksum.
"""

import base64
import errno
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.machine import machine_failure
from cfjax.core.paths import files_below, replacing
from cfjax.core.schema import load_json

SUMS = "checksums.json"
VERSION = 1
_PIECE = 1 << 20


@dataclass(frozen=True)
class FileSum:
    """A file as it was written: its size in bytes, and its CRC-32 in hex or its MD5 in base64; the other is ""."""

    bytes: int
    crc32: str = ""
    md5: str = ""


def crc32(file: Path) -> str:
    """The CRC-32 of a file, as eight digits of hex."""
    crc = 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    return base64.b64encode(digest.digest()).decode()


def measure(
    folder: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    known: Mapping[str, FileSum] = MappingProxyType({}),
) -> dict[str, FileSum]:
    """The checksums of the files below a folder, local or in a bucket, by relative path "a/b".

    Args:
      wanted: whether a file of this name gets one; `SUMS` does not.
      known: sums of files that need not be read again.
    """
    names = {name: found for name, found in files_below(folder).items() if name != SUMS and wanted(name)}
    return {
        name: known.get(name) or (FileSum(size, md5=md5) if md5 else FileSum(size, crc32=crc32(folder / name)))
        for name, (size, md5) in sorted(names.items())
    }


def write_sums(folder: Path, sums: Mapping[str, FileSum] | None = None) -> None:
    """Writes the checksums (default: of all files of the folder as they are now) beside them."""
    sums = measure(folder) if sums is None else sums
    files = {name: {key: value for key, value in asdict(about).items() if value != ""} for name, about in sums.items()}
    with replacing(folder / SUMS) as partial:
        partial.write_text(json.dumps({"version": VERSION, "files": files}, indent=1) + "\n", encoding="utf-8")


def read_sums(folder: Path) -> dict[str, FileSum] | None:
    """What `write_sums` wrote; None when there is no such file.

    Raises:
      UserError: it is not what `write_sums` writes.
    """
    file = folder / SUMS
    try:
        content: Any = load_json(file)
        if content["version"] != VERSION:
            raise UserError(f"{file}: version {content['version']!r} is not known; use a newer cfjax")
        sums = {name: FileSum(**about) for name, about in content["files"].items()}
        if not all(map(_sound, sums, sums.values())):
            raise ValueError
        return sums
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is damaged, or no list of checksums") from None


def _sound(name: str, about: FileSum) -> bool:
    inside = name and not name.startswith("/") and "\\" not in name and ".." not in name.split("/")
    known = isinstance(about.crc32, str) and isinstance(about.md5, str) and bool(about.crc32) != bool(about.md5)
    return bool(inside) and known and type(about.bytes) is int


def differing(folder: Path, sums: Mapping[str, FileSum]) -> Iterator[str]:
    """A line for each file that does not match its checksum, "NAME: what is wrong".

    Raises:
      UserError: a file may not be read; `Temporary` when the machine is in the way, a bad place on a disk excepted.
    """
    there = files_below(folder)
    for name, about in sums.items():
        if name not in there:
            yield f"{name}: missing"
        elif there[name][0] != about.bytes:
            yield f"{name}: {there[name][0]} bytes, and was written with {about.bytes}"
        elif wrong := _wrong(folder / name, about, remote_md5=there[name][1]):
            yield f"{name}: {wrong}"


def _wrong(file: Path, about: FileSum, remote_md5: str) -> str:
    """What is wrong with a file of the right size; "" if nothing. `remote_md5`: the MD5 that its bucket reports."""
    try:
        same = (remote_md5 or _md5(file)) == about.md5 if about.md5 else crc32(file) == about.crc32
    except OSError as error:
        if error.errno == errno.EIO:
            return "cannot be read (input/output error)"
        raise (machine_failure(file, error) or UserError(f"{file}: cannot be read ({error})")) from error
    return "" if same else "its bytes are not those that were written"
