"""A resumable folder of generated videos: which are requested, finished, or in the way.

    settings.json   the settings and the list of all videos; written before the first video, and again at the end
    videos.jsonl    a line per finished video, added once its files are whole

A video is identified by its prompt, its seed and its picture's content; its number may change. A video that is not
recorded as finished is incomplete, and is generated again. A file that is not the expected one is never replaced
without `overwrite`.
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfjax.core.checksums import SUMS, measure, write_sums
from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION, LIST_BYTES
from cfjax.core.paths import Mirror, file_sizes, make_folder, one_line, replacing, unusable
from cfjax.core.schema import checked, either, load_json, one_of, parse_json, several, shown, table, text, whole
from cfjax.data.requests import MAX_SEED, Request
from cfjax.evaluation.pages import PAGE_NAME, sheet_pages

SETTINGS, DONE = "settings.json", "videos.jsonl"
_HALF = re.compile(r"\.(settings\.json|videos\.jsonl|.+\.(mp4|safetensors|png))\.[0-9a-f]+\.partial")  # see `replacing`
_ASIDE = ".moving."


@dataclass(frozen=True)
class RequestedVideo:
    """One video of the set: its file, its request, and a hash of its picture's content ("" for none)."""

    file: str
    prompt: str
    seed: int
    image: str
    image_sha256: str


@dataclass(frozen=True)
class Finished:
    """A line of videos.jsonl: the files are whole and have so many bytes; `latents` is None where none were kept."""

    file: str
    prompt: str
    seed: int
    image_sha256: str
    bytes: int
    latents: int | None


def _file(name: str, value: Any) -> str:
    """A file name directly in the folder."""
    fits = isinstance(value, str) and value.endswith(".mp4") and len(value) <= 255 and Path(value).name == value
    return "" if fits else f"{name} is {shown(value)}; it must be the name of an mp4"


_TEXTS = {"file": _file, "prompt": text(CAPTION), "seed": whole(0, MAX_SEED), "image_sha256": text(64)}
_SET = table({"videos": several(table({**_TEXTS, "image": text(4096)}, closed=True), 1)})
_FINISHED = table({**_TEXTS, "bytes": whole(1), "latents": either(whole(1), one_of(None))}, closed=True)


def _identity(video: RequestedVideo | Finished) -> tuple[str, int, str]:
    """The identity of a video: equal for two requests of the same one."""
    return video.prompt, video.seed, video.image_sha256


def requested_videos(requests: Sequence[Request], hashes: Mapping[str, str]) -> list[RequestedVideo]:
    """Every request with its file: its number, its prompt as far as a file's name may say it, its seed.

    Args:
      hashes: of every picture's content, by path.
    """
    return [
        RequestedVideo(f"{n:03d}_{r.slug()}.mp4", r.prompt, r.seed, r.image, hashes.get(r.image, ""))
        for n, r in enumerate(requests)
    ]


def latents_name(file: str) -> str:
    """The file beside an mp4 that holds the video's latents."""
    return file.removesuffix(".mp4") + ".safetensors"


def check_free(folder: Path, asked: Sequence[RequestedVideo], *, latents: bool) -> None:
    """For a set that is generated from the start.

    Raises:
      UserError: it would replace something.
    """
    there = file_sizes(folder)
    wanted = [*_files(asked, latents), SETTINGS, DONE, *sorted(filter(PAGE_NAME.fullmatch, there))]
    if taken := [name for name in wanted if name in there]:
        fix = "choose another --workdir or --config.overwrite=True"
        if SETTINGS in there:
            fix += "; --config.resume=True goes on with what is there"
        raise UserError(f"{_some(folder, taken)} would be replaced; {fix}")


def _files(asked: Sequence[RequestedVideo], latents: bool) -> list[str]:
    return [name for v in asked for name in ((v.file, latents_name(v.file)) if latents else (v.file,))]


def _some(folder: Path, names: Sequence[str]) -> str:
    return f"{folder / names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")


# ---- what is there


@dataclass(frozen=True)
class Found:
    """The record of a folder, and its files.

    Attributes:
      there: sizes of its files in bytes, by name.
      settings: content of settings.json; {} when there is none.
      asked: the videos that it lists.
      done: the lines of videos.jsonl, by file.
    """

    folder: Path
    there: dict[str, int]
    settings: dict[str, Any]
    asked: list[RequestedVideo]
    done: dict[str, Finished]

    def mp4_unchanged(self, line: Finished) -> bool:
        """Whether the mp4 file has the size that was recorded."""
        return self.there.get(line.file) == line.bytes

    def latents_unchanged(self, line: Finished) -> bool:
        """Whether the file of latents has the size that was recorded."""
        return line.latents is not None and self.there.get(latents_name(line.file)) == line.latents


def read_set(folder: Path, *, resume: bool) -> Found:
    """Reads the record in a folder.

    Args:
      resume: whether it will be resumed; else an unreadable record is no error, and nothing counts as done.

    Raises:
      UserError: it is not what `VideoSet` writes.
    """
    there, settings, asked = file_sizes(folder), {}, []
    if SETTINGS in there:
        try:
            settings = checked(_SET, load_json(folder / SETTINGS, LIST_BYTES), SETTINGS)
            asked = [RequestedVideo(**video) for video in settings["videos"]]
        except ValueError:
            if resume:
                raise UserError(
                    f"{folder / SETTINGS}: is not what this version of cfjax generate writes, so it cannot go on with "
                    "it; choose another --workdir, or --config.overwrite=True in place of resume makes all again"
                ) from None
    done = _read_done(folder / DONE) if resume and asked and DONE in there else {}
    return Found(folder, there, settings, asked, done)


def _read_done(file: Path) -> dict[str, Finished]:
    """Finished videos by file. A last line that breaks off, as of a process that was killed, does not count."""
    lines, out = file.read_bytes().decode(errors="replace").split("\n"), {}
    for number, line in enumerate(lines, 1):
        try:
            entry = Finished(**checked(_FINISHED, parse_json(line), DONE)) if line else None
        except ValueError:
            if number == len(lines):
                break
            raise UserError(
                f"{file}, line {number}: is not what cfjax generate writes; remove it, and its video is made again"
            ) from None
        if entry:
            out[entry.file] = entry
    return out


def check_same(found: Found, settings: Mapping[str, Any], deciding: Sequence[str]) -> None:
    """Videos of different settings are not mixed.

    Args:
      deciding: the keys, or groups of keys, that decide what a request's video is; dots lie between groups.

    Raises:
      UserError: the folder's were made with others; it names the first.
    """
    old, new = _flat(found.settings), _flat(json.loads(json.dumps(settings)))
    for key in [*new, *old]:
        if old.get(key) != new.get(key) and any(f"{key}.".startswith(f"{group}.") for group in deciding):
            raise UserError(
                f"{found.folder / SETTINGS}: its videos were made with {key}={old.get(key)!r}, now it is "
                f"{new.get(key)!r}; give the same again, choose another --workdir, or --config.overwrite=True in place "
                "of resume makes all again"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


# ---- what is to be done


@dataclass(frozen=True)
class SetPlan:
    """What to do with the files of a folder.

    Attributes:
      keep: numbers of the videos that are finished under their names.
      moves: of those that are finished under another name: how they are recorded.
      make: the numbers that are left.
      lines: records of files that stay what they are.
      unasked: files of the folder's record that no request asks for any more.
      pages: contact sheets that stay what they are.
    """

    keep: frozenset[int]
    moves: dict[int, Finished]
    make: tuple[int, ...]
    lines: tuple[Finished, ...]
    unasked: tuple[str, ...]
    pages: frozenset[str]


def plan_set(found: Found, asked: Sequence[RequestedVideo], *, latents: bool, overwrite: bool) -> SetPlan:
    """Compares the requested videos with the finished ones.

    Args:
      latents: whether a video without its latents is generated again.
      overwrite: whether files that are in the way may be replaced.

    Raises:
      UserError: a file that may not be replaced is in the way.
    """
    whole = {
        name: line
        for name, line in found.done.items()
        if found.mp4_unchanged(line) and (not latents or found.latents_unchanged(line))
    }
    keep = {n for n, v in enumerate(asked) if v.file in whole and _identity(whole[v.file]) == _identity(v)}
    spare: dict[tuple[str, int, str], deque[Finished]] = {}
    for name in sorted(whole.keys() - {asked[n].file for n in keep}):
        spare.setdefault(_identity(whole[name]), deque()).append(whole[name])
    left = [n for n in range(len(asked)) if n not in keep]
    moves = {n: lines.popleft() for n in left if (lines := spare.get(_identity(asked[n])))}
    sources, targets = {line.file for line in moves.values()}, {asked[n].file for n in left}
    if not overwrite:
        _check_in_the_way(found, [asked[n] for n in left if asked[n].file not in sources], latents=latents)
    known = {video.file for video in found.asked} | found.done.keys()
    unasked = known - {video.file for video in asked} - sources
    return SetPlan(
        keep=frozenset(keep),
        moves=moves,
        make=tuple(n for n in left if n not in moves),
        lines=tuple(line for name, line in whole.items() if name not in targets),
        unasked=tuple(sorted(unasked & found.there.keys())),
        pages=_unchanged_pages(found, asked, set(left)),
    )


def _check_in_the_way(found: Found, videos: Sequence[RequestedVideo], *, latents: bool) -> None:
    """Incomplete videos of this set are replaced, and those that lack only their latents; nothing else is."""
    ours = {video.file for video in found.asked} - found.done.keys()
    for video in videos:
        line = found.done.get(video.file)
        if line and found.mp4_unchanged(line) and _identity(line) == _identity(video):
            ours.add(video.file)
    taken = [name for name in _files([v for v in videos if v.file not in ours], latents) if name in found.there]
    if taken:
        raise UserError(
            f"{_some(found.folder, taken)} would be replaced: not finished by this set, made for another prompt or "
            "picture, or changed since; move it away, or --config.overwrite=True beside resume makes it again"
        )


def _unchanged_pages(found: Found, asked: Sequence[RequestedVideo], new: set[int]) -> frozenset[str]:
    """Existing contact sheets whose files are the right ones, none of them new."""
    before, out = sheet_pages(len(found.asked)), set()
    for name, numbers in sheet_pages(len(asked)).items():
        shown = [found.asked[n].file for n in before.get(name, ())]
        if name in found.there and shown == [asked[n].file for n in numbers] and not new.intersection(numbers):
            out.add(name)
    return frozenset(out)


# ---- writing


class VideoSet:
    """Writes the record of a set of videos, in a folder of this machine or in a bucket.

    Args:
      settings: what settings.json says from the beginning, besides the videos.
    """

    def __init__(self, folder: Path, asked: Sequence[RequestedVideo], settings: Mapping[str, Any]) -> None:
        self.folder, self.asked, self.settings = folder, asked, settings
        self._mirror: Mirror | None = None

    @contextmanager
    def begin(self, found: Found, plan: SetPlan) -> Iterator[None]:
        """Writes the settings, removes partial files, and renames finished videos to their new numbers.

        It may be killed at any moment and repeated: a file's line is removed before the file is replaced.

        Raises:
          UserError: the folder cannot be written to.
        """
        try:
            make_folder(self.folder)
            self._mirror = Mirror(self.folder)
            with replacing(self._mirror.folder / DONE) as partial:
                partial.write_text("".join(map(_line, plan.lines)), encoding="utf-8")
            self.push()
            self._clear(found, plan)
            self.write(complete=False)
            self._move(found, plan)
        except OSError as error:
            raise unusable(error)(f"{self.folder}: cannot be written to ({one_line(error)})") from error
        try:
            yield
        finally:
            self.push()
            self._mirror.close()
            self._mirror = None

    def _clear(self, found: Found, plan: SetPlan) -> None:
        for name in found.there:
            stale = PAGE_NAME.fullmatch(name) and name not in plan.pages
            if stale or _HALF.fullmatch(name) or name.startswith(_ASIDE):
                (self.folder / name).unlink(missing_ok=True)

    def _move(self, found: Found, plan: SetPlan) -> None:
        """Renames finished videos; those whose name another one takes are first moved to temporary names."""
        targets = {self.asked[n].file for n in plan.moves}
        aside = {line.file for line in plan.moves.values()} & targets
        for name in sorted(aside):
            self._rename(found, name, name, _ASIDE + name)
        for n, line in plan.moves.items():
            place = _ASIDE + line.file if line.file in aside else line.file
            self._rename(found, line.file, place, self.asked[n].file)
            self.finish(n, line.bytes, line.latents)

    def _rename(self, found: Found, original: str, old: str, new: str) -> None:
        (self.folder / old).rename(self.folder / new)
        if latents_name(original) in found.there:
            (self.folder / latents_name(old)).rename(self.folder / latents_name(new))

    def finish(self, number: int, size: int, latents: int | None) -> None:
        """Records that the files of a video are whole, with their bytes."""
        assert self._mirror is not None, "finish: outside of begin"
        video = self.asked[number]
        line = Finished(video.file, video.prompt, video.seed, video.image_sha256, size, latents)
        with (self._mirror.folder / DONE).open("a", encoding="utf-8") as file:
            file.write(_line(line))

    def push(self) -> None:
        """Uploads the record to a bucket, where files cannot be appended to."""
        assert self._mirror is not None, "push: outside of begin"
        self._mirror.push()

    def write(self, more: Mapping[str, Any] = MappingProxyType({}), *, complete: bool) -> dict[str, Any]:
        """Writes settings.json, and returns its content.

        Args:
          more: JSON-able entries beside the settings.
          complete: whether all videos are there.
        """
        record = {**self.settings, **more, "complete": complete, "videos": [asdict(video) for video in self.asked]}
        with replacing(self.folder / SETTINGS) as partial:
            partial.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        if complete:
            own = {*_files(self.asked, latents=True), *sheet_pages(len(self.asked)), SETTINGS}
            write_sums(self.folder, measure(self.folder, own.__contains__))
        else:
            (self.folder / SUMS).unlink(missing_ok=True)  # of videos that may be made again
        return record


def _line(line: Finished) -> str:
    return json.dumps(asdict(line), ensure_ascii=False) + "\n"
