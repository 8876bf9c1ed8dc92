"""File names that are read from a file: they, and symbolic links, must stay inside that file's folder.

A folder from someone else must not decide what is read elsewhere on this machine. Paths that a user gives on the
command line may be anywhere.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.schema import shown

NAME, NAMES = 255, 4096  # characters of a name and of all on the way to it, as Linux has them
BLOBS, CACHES = "blobs", ("models--", "datasets--", "spaces--")


def inside(folder: Path, name: Any, named_in: object) -> Path:
    """The path of `name`, which the file `named_in` mentions, in or below `folder`; it need not exist.

    Raises:
      UserError: the path, links resolved, is outside the folder.
    """
    if not isinstance(name, str) or not _plain(name):
        raise UserError(f"{named_in}: {shown(name)} is no name of a file in {folder}; nothing else is read on its word")
    return resolved_inside(folder / name, folder)


def _plain(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    outward = path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive
    short = len(name) <= NAMES and all(len(part) <= NAME for part in path.parts)
    return bool(path.parts) and short and not outward and "\0" not in name


def resolved_inside(path: Path, folder: Path) -> Path:
    """`path`, which may be a link inside `folder`, or into the Hugging Face cache, where snapshots are links.

    Raises:
      UserError: it is a link to anywhere else.
    """
    try:
        place, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link to itself
        raise UserError(f"{path}: a link that leads nowhere; copy the file there") from None
    if place.is_relative_to(root) or _is_blob(place):
        return path
    raise UserError(f"{path} leads to {place}, outside of {folder}; copy the file there, or name that one yourself")


def _is_blob(place: Path) -> bool:
    """Whether it is a file of the Hugging Face cache: models--OWNER--NAME/blobs/HASH."""
    blobs = place.parent
    return blobs.name == BLOBS and blobs.parent.name.startswith(CACHES)
