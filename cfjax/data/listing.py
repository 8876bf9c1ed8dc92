"""The list of clips that a set was made of, stored with it, so that changes of the folder are reported clip by clip."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from cfjax.core.errors import UserError
from cfjax.core.limits import RECORDS
from cfjax.core.schema import row, several, text
from cfjax.data.pictures import Unusable

ITEMS = "items.json"
SHOWN = 3
_KEPT = several(row(text(), text(64)), 0, RECORDS)
Item = tuple[str, str]  # name, and caption or what is wrong with the clip
Hashed = list[Item]


class Named(Protocol):
    """Items with names and captions; see `ingest.Source`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Its name in reports."""
        ...

    def caption(self, index: int) -> str:
        """Its caption. Raises Unusable without one."""
        ...


def listed(source: Named) -> list[Item]:
    """(name, caption or what is wrong with it) of every item."""

    def caption(index: int) -> str:
        try:
            return source.caption(index)
        except Unusable as error:
            return str(error)

    return [(source.name(index), caption(index)) for index in range(len(source))]


def hashed(listing: Iterable[Item]) -> Hashed:
    """The listing as it is stored: a hash of 8 hex digits instead of the caption."""
    return [(name, hashlib.sha256(caption.encode()).hexdigest()[:8]) for name, caption in listing]


def unhashed(kept: object) -> Hashed:
    """A stored listing. Raises UserError when it is not one."""
    if wrong := _KEPT("", kept):
        raise UserError(f"{ITEMS}: no list of items ({wrong}); remove the folder and precompute it again")
    return [(name, caption) for name, caption in kept]  # type: ignore[attr-defined]


def changes(before: Hashed, now: Hashed, path: Path) -> str:
    """What changed in the clips since the set at `path` was begun, and how to fix it."""
    old, new = dict(before), dict(now)
    added = [name for name in new if name not in old]
    gone = [name for name in old if name not in new]
    other = [name for name, caption in new.items() if name in old and old[name] != caption]
    counts = (_named(added, "new"), _named(gone, "gone"), _named(other, "with another caption"))
    what = ", ".join(filter(None, counts)) or "the same names, differently often"
    fix = "choose another --config.output for all of them"
    if added and not gone and not other:
        fix += (
            ", or precompute a folder of the new ones alone to another output, and join both by "
            f"cfjax precompute --merge={path},NEW --config.output=ALL"
        )
    return f"was made of other clips ({len(before)} then, {len(now)} now): {what}; {fix}"


def _named(names: Sequence[str], what: str) -> str:
    """As `2 new (a.mp4, b.mp4)`; nothing for none."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})" if names else ""
