"""A folder of video files and their captions: in a table of any kind (`data.tables`), or in text files beside them.

Tables name clips in many ways: by a path relative to the folder or an absolute one, with Windows' separators, with the
folder's own name in front, by a bare name although the file is in a subfolder, or by a name without a suffix.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION
from cfjax.core.schema import load_bytes
from cfjax.data.captions import Columns, caption_of, field_of, parts_of, printed
from cfjax.data.pictures import Unusable
from cfjax.data.tables import decode, read_table

SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".vob", ".mxf"),
}
TABLES = tuple(
    f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet")
)
BESIDE = (".txt", ".caption")  # NAME.txt, NAME.mp4.txt, NAME.caption, in any letter case
APPLE_DOUBLE = "._"  # what macOS leaves beside each file on disks of other systems


@dataclass(frozen=True)
class ClipFile:
    """A clip in a folder's listing.

    Attributes:
      name: its path in the folder, or what a table calls it.
      fault: why it cannot be used, "kind: details"; "" if it can.
      start, stop: the part of the file that it is, in seconds; stop 0 is the end.
    """

    name: str
    caption: str
    fault: str = ""
    start: float = 0.0
    stop: float = 0.0

    def label(self) -> str:
        """Its name, with its part of the file if it is one."""
        return f"{self.name}[{self.start:g}-{self.stop:g}]" if self.stop else self.name


@dataclass(frozen=True)
class Folder:
    """All files in and below a folder, linked folders included; paths are relative to it, with slashes.

    Attributes:
      clips: files of SUFFIXES.  others: all other files.
    """

    root: Path
    clips: Sequence[str]
    others: frozenset[str]

    @classmethod
    def scan(cls, root: str | Path) -> "Folder":
        """Reads the folder. Raises UserError when it is none."""
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"source={str(root)!r}: no such folder")
        clips, others = [], set()
        for name in _files(root):
            is_clip = PurePosixPath(name).suffix.lower() in SUFFIXES and not _leftover(name)
            clips.append(name) if is_clip else others.add(name)
        return cls(root, sorted(clips), frozenset(others))


def _files(root: Path) -> Iterator[str]:
    """Every file below a folder, through links; a folder that links back to one above it is entered once."""
    entered: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        folders.sort()
        yield from (Path(folder, name).relative_to(root).as_posix() for name in files)


def _leftover(name: str) -> bool:
    return PurePosixPath(name).name.startswith(APPLE_DOUBLE)


@dataclass
class Listing:
    """The clips of a folder, and how they were found.

    Attributes:
      clips: by name; those that cannot be used say why.
      table: the table that was read, None if there is none.
      columns: the columns that were taken from it, by part.
      passed_over: number of files of each suffix that are neither clips nor captions.
    """

    clips: list[ClipFile]
    table: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)

    def notes(self) -> dict[str, str]:
        """A line each on what was read and what was ignored, if there is anything to report."""
        out = {}
        if self.columns:
            columns = ", ".join(f"{part} by {name!r}" for part, name in self.columns.items())
            out["table"] = f"{self.table}: columns: {columns}"
        if self.passed_over:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in self.passed_over.items())
            out["passed over"] = f"passed over, as neither clips nor their captions: {counts}"
        return out


def list_clips(folder: str | Path, captions: str | Path = "") -> list[ClipFile]:
    """Every clip under `folder` and every clip that its table names, by name; see `read_listing`."""
    return read_listing(folder, captions).clips


def read_listing(
    folder: str | Path,
    captions: str | Path = "",
    *,
    columns: Columns = Columns(),
    encoding: str = "",
    parts: bool = False,
) -> Listing:
    """Every clip under `folder` and every clip that its table names, by name.

    Args:
      captions: the table; "" takes the one of TABLES in the folder. Clips that the table does not name, or all without
        a table, take their caption from a text file beside them (BESIDE).
      columns: how the table is read.  encoding: of text files that are not UTF-8.
      parts: a row's "timestamp" says which parts of the file are clips (Panda-70M, Koala-36M), one caption each.

    Raises:
      UserError: no folder, no clips, several tables, or a table that cannot be read.
    """
    scanned = Folder.scan(folder)
    table = Path(captions) if captions else _own_table(scanned)
    listing = Listing([], table)
    named: set[str] = set()
    if table is not None:
        _read_rows(listing, scanned, table, columns, encoding, parts, named)
    if not scanned.clips and not any(not clip.fault for clip in listing.clips):
        raise UserError(f"source={str(folder)!r}: no clips in it (looked for {' '.join(sorted(SUFFIXES))})")
    hint = _unread_table(scanned) if table is None else ""
    used: set[str] = set()
    for name in scanned.clips:
        if name not in named:
            listing.clips.append(_beside(scanned, name, encoding, used, hint))
    listing.clips = list(map(_nameable, listing.clips))
    listing.clips.sort(key=lambda clip: (clip.name, clip.start, bool(clip.fault)))
    listing.passed_over = _passed_over(scanned, used | named, table)
    return listing


def escaped(name: str) -> str:
    """A name, or what was said of one, in characters that can be written: bytes that are no UTF-8 as \\udc80 or so."""
    return name.encode("utf-8", "backslashreplace").decode()


def _nameable(clip: ClipFile) -> ClipFile:
    """The clip; one whose name is not UTF-8 cannot be used, and its name is escaped."""
    if (name := escaped(clip.name)) == clip.name:
        return replace(clip, fault=escaped(clip.fault))
    return replace(clip, name=name, fault=escaped(clip.fault) or "unreadable name: it is no UTF-8; rename the file")


def _own_table(folder: Folder) -> Path | None:
    found = [name for name in TABLES if name in folder.others]
    if len(found) > 1:
        raise UserError(f"{folder.root}: {' and '.join(found)} are both there; choose with --config.captions=TABLE")
    return folder.root / found[0] if found else None


def _unread_table(folder: Folder) -> str:
    kinds = {Path(name).suffix for name in TABLES} - {".json"}  # every other tool writes one of these
    found = min((name for name in folder.others if Path(name).suffix.lower() in kinds), default="")
    return f"; {found} lies there: --config.captions=TABLE" if found else ""


def _passed_over(folder: Folder, used: set[str], table: Path | None) -> Counter[str]:
    own = {os.path.normpath(table)} if table is not None else set()
    left = (name for name in folder.others - used if os.path.normpath(folder.root / name) not in own)
    counts = Counter(
        f"{APPLE_DOUBLE}*" if _leftover(name) else escaped(PurePosixPath(name).suffix) or "no suffix" for name in left
    )
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


# ---- captions beside the clips


def _beside(folder: Folder, name: str, encoding: str, used: set[str], hint: str) -> ClipFile:
    found = [other for other in _sidecars(name) if other in folder.others]
    texts = {}
    for other in found:
        used.add(other)
        try:
            texts[other] = decode(load_bytes(folder.root / other, 4 * CAPTION), encoding).strip()
        except (OSError, ValueError) as error:
            return ClipFile(name, "", f"unreadable caption: {other}: {error}")
        except LookupError:
            raise UserError(
                f"encoding={encoding!r}: Python knows no such encoding; use utf-8, gbk, cp1252 ..."
            ) from None
    if len(set(texts.values())) > 1:
        return ClipFile(name, "", f"several captions: {' and '.join(texts)} differ; remove one")
    try:
        return ClipFile(name, caption_of(next(iter(texts.values()), None)))
    except Unusable as error:
        where = f"{found[0]} is empty" if found else f"neither in a table nor in a .txt beside it{hint}"
        return ClipFile(name, "", f"no caption: {where}" if "empty" in str(error) else str(error))


def _sidecars(name: str) -> list[str]:
    stems = {name: None, name.removesuffix(PurePosixPath(name).suffix): None}
    return [f"{stem}{end}" for stem in stems for suffix in BESIDE for end in (suffix, suffix.upper(), suffix.title())]


# ---- tables


def _read_rows(
    listing: Listing,
    folder: Folder,
    table: Path,
    columns: Columns,
    encoding: str,
    parts: bool,
    named: set[str],
) -> None:
    """Adds the clips that a table names to the listing, and their names to `named`."""
    index, seen = _Index(folder, table), set()
    for row in read_table(table, encoding):
        if not listing.columns:
            listing.columns = columns.of(table, row, clips=True)
        fields = {part: field_of(table, row, column) for part, column in listing.columns.items()}
        name = str(fields["file"] or "").strip()
        try:
            name = index.find(name)
            named.add(name)
            sections = _sections(fields, parts)
        except Unusable as error:
            listing.clips.append(ClipFile(name or f"{table.name}, {row.place}", "", str(error)))
            continue
        for caption, (start, stop) in sections:
            clip = _clip(name, caption, columns.choice, start, stop)
            if (name, start, stop) in seen:
                clip = replace(clip, fault=f"named twice: {row.place} of {table} has another caption for it")
            seen.add((name, start, stop))
            listing.clips.append(clip)


def _clip(name: str, caption: object, choice: str, start: float, stop: float) -> ClipFile:
    try:
        return ClipFile(name, caption_of(caption, choice), "", start, stop)
    except Unusable as error:
        return ClipFile(name, "", str(error), start, stop)


def _sections(fields: Mapping[str, Any], parts: bool) -> Sequence[tuple[Any, tuple[float, float]]]:
    """The captions of a row, each with the part of the file that it is about; (0, 0) is the whole."""
    caption = fields["caption"]
    if "times" not in fields:
        return [(caption, (0.0, 0.0))]
    if parts:
        return parts_of(fields["times"], caption)
    several = printed(caption) if isinstance(caption, str) else caption
    if isinstance(several, list) and len(several) > 1:
        raise Unusable("several captions: one for each part of the file; --config.parts=True cuts it by the timestamps")
    return [(caption, (0.0, 0.0))]


class _Index:
    """The files of a folder by the ways in which tables name them."""

    def __init__(self, folder: Folder, table: Path) -> None:
        self._root, self._table = folder.root, table
        self._files = {*folder.clips, *folder.others}
        self._bare: dict[str, list[str]] = {}
        for name in folder.clips:
            path = PurePosixPath(name)
            for called in {path.name, path.stem}:
                self._bare.setdefault(called, []).append(name)

    def find(self, wanted: str) -> str:
        """The path in the folder of the file that a table calls `wanted`. Raises Unusable unless just one matches."""
        if not wanted:
            raise Unusable("no file name: the row names no file")
        for form in self._forms(wanted):
            if form in self._files:
                return form
        bare = PurePosixPath(wanted.replace("\\", "/")).name
        called = self._bare.get(bare, [])
        if bare == wanted and len(called) == 1:
            return called[0]
        if bare == wanted and called:
            raise Unusable(
                f"ambiguous: {len(called)} files are called so, as {' and '.join(called[:2])}; name the folder"
            )
        if Path(wanted).is_absolute() and Path(wanted).exists():
            raise Unusable(
                f"outside: it is there, but not under {self._root}; name a source above both, or link it there"
            )
        raise Unusable(
            f"missing: {self._table} names it, but nothing under {self._root} is called so{self._hint(bare)}"
        )

    def _forms(self, wanted: str) -> Iterator[str]:
        """Candidates for its path: as given, with slashes, relative to the table, without the root's name."""
        for form in dict.fromkeys((wanted, wanted.replace("\\", "/"))):
            if Path(form).is_absolute():
                for root, path in ((self._root.absolute(), Path(form)), (self._root.resolve(), Path(form).resolve())):
                    yield Path(os.path.relpath(path, root)).as_posix()
                continue
            plain = os.path.normpath(form)
            yield plain
            yield Path(os.path.relpath(self._table.parent.absolute() / form, self._root.absolute())).as_posix()
            first, _, rest = plain.partition("/")
            if first == self._root.absolute().name:
                yield rest

    def _hint(self, bare: str) -> str:
        near = self._bare.get(bare) or [
            n for called, ns in self._bare.items() if called.lower() == bare.lower() for n in ns
        ]
        return f"; there is {near[0]}" if near else ""
