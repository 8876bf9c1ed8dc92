"""Every clip of a folder, measured one frame at a time, several clips side by side, and a record for each.

clips/NAME.json   what was measured of one clip; written whole, and kept by the next command if the clip's bytes,
                  its reference's and the settings are the same
videos.json       all clips, means with intervals, and what could not be measured
"""

import base64
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.limits import FRAMES
from cfjax.core.paths import read_if_whole, write_atomically
from cfjax.core.schema import each_of, either, number, one_of, table, text, whole
from cfjax.data.pictures import Unusable
from cfjax.evaluation.actions import SUFFIX, action_fidelity, read_actions
from cfjax.evaluation.clip_source import SourceClip, reading
from cfjax.evaluation.clip_table import BY_NAME, FLICKERING, GROUPS, MOTION
from cfjax.evaluation.clip_table import FRAMES as FRAME_GROUP
from cfjax.evaluation.frame_metrics import KEPT, SMALL, FlickerMeter, FrameMeter, boundaries, freeze, luma_of, seams
from cfjax.evaluation.motion_metrics import FlowMeter
from cfjax.evaluation.opencv import one_thread_each
from cfjax.evaluation.reference_metrics import ReferenceMeter

RECORDS = "clips"
LONGEST = 200  # bytes of a record's name, which gets more for a moment as it is written
VERSION = 1  # of the formulas: records of another one are measured again


@dataclass(frozen=True)
class Settings:
    """What decides a clip's numbers.

    Attributes:
      metrics: groups of `clip_table.GROUPS`.
      block, first_block: frames of a block and of the first one, for seams; 0 for none, and for the same.
      fps: frames per second in place of the files'; 0 for the files'.
    """

    metrics: tuple[str, ...] = GROUPS
    block: int = 0
    first_block: int = 0
    fps: float = 0.0


@dataclass(frozen=True)
class ClipScore:
    """What was measured of a clip.

    Attributes:
      fault: why it could not be; "" if it was.
      note: what else is to be said of it.
      values: by metric; those that are not defined for it are left out.
      small: frames for clips of other seeds, uint8 [8, 16, 16, 3] in base64; "" without the group of frames.
    """

    file: str
    fault: str = ""
    note: str = ""
    frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    small: str = ""

    def pictures(self) -> np.ndarray | None:
        """The frames in `small`; None if there are none."""
        data = base64.b64decode(self.small)
        size = (KEPT, SMALL, SMALL, 3)
        return np.frombuffer(data, np.uint8).reshape(size) if len(data) == math.prod(size) else None


_NUMBER = either(number(-1e12, 1e12), one_of(None))
SCORE = table(
    {
        "file": text(4096),
        "fault": text(4096),
        "note": text(4096),
        "frames": whole(0, FRAMES),
        "fps": number(0, 1e6),
        "height": whole(0, 2**16),
        "width": whole(0, 2**16),
        "values": each_of(_NUMBER),
    },
    {"small": text(2**16)},
)
_RECORD = table({"version": one_of(VERSION), "made_of": text(10_000), "score": SCORE})


def score_of(values: Mapping[str, Any], scorers: Collection[str] = ()) -> ClipScore:
    """A score of what `SCORE` allows; metrics that this version does not know are left out.

    Args:
      scorers: whose metrics, SCORER or SCORER.NUMBER, are known too.
    """
    found = {name: v for name, v in values["values"].items() if v is not None}
    known = {name: v for name, v in found.items() if name in BY_NAME or name.partition(".")[0] in scorers}
    return ClipScore(**{**{k: v for k, v in values.items() if k in ClipScore.__dataclass_fields__}, "values": known})


# ---- one clip


def measure_clip(clip: SourceClip, reference: SourceClip | None, settings: Settings) -> ClipScore:
    """Measures a clip, and how near it is to a reference. What is wrong with the clip is in `fault`.

    Raises:
      UserError: its actions cannot be read, or OpenCV is missing.
    """
    try:
        with ExitStack() as stack:
            opened = stack.enter_context(reading(clip, settings.fps))
            other = stack.enter_context(closing(_frames_of(reference, opened.fps))) if reference else None
            return _Meters(clip, opened.fps, settings).run(opened.frames, other)
    except Unusable as error:
        return ClipScore(clip.name, fault=str(error))


def _frames_of(clip: SourceClip, fps: float) -> Generator[np.ndarray, None, None]:
    """A reference's frames; it is opened with the first."""
    with reading(clip, fps) as opened:
        yield from opened.frames


class _Meters:
    """The meters that a clip goes through."""

    def __init__(self, clip: SourceClip, fps: float, settings: Settings) -> None:
        self._clip, self._fps, self._settings = clip, fps, settings
        chosen = settings.metrics
        self._flicker = FlickerMeter()
        self._frames = FrameMeter() if FRAME_GROUP in chosen else None
        self._flow = FlowMeter(fps) if MOTION in chosen else None
        self._reference = ReferenceMeter()

    def run(self, frames: Iterator[np.ndarray], other: Iterator[np.ndarray] | None) -> ClipScore:
        """Every frame through every meter."""
        with_luma = self._frames is not None or self._flow is not None or other is not None
        count, shape, note = 0, (0, 0, 0), ""
        for frame in frames:
            luma = luma_of(frame) if with_luma else frame
            self._flicker.add(frame)
            if self._frames is not None:
                self._frames.add(frame, luma)
            if self._flow is not None:
                self._flow.add(luma)
            if other is not None and not note:
                note = self._against(frame, luma, other, count)
            count, shape = count + 1, frame.shape
        if other is not None and not note and self._more(other):
            note = f"the reference is longer; its first {count} frames were compared"
        values = {name: value for name, value in self._values(other is not None).items() if math.isfinite(value)}
        small = base64.b64encode(self._frames.small().tobytes()).decode() if self._frames is not None else ""
        return ClipScore(self._clip.name, "", note, count, self._fps, shape[0], shape[1], values, small)

    def _against(self, frame: np.ndarray, luma: np.ndarray, others: Iterator[np.ndarray], number: int) -> str:
        """Compares with the reference's next frame; returns why that is the end of it, "" if it is not."""
        try:
            other = next(others, None)
        except Unusable as error:
            self._reference = ReferenceMeter()
            return f"not compared: the reference is {error}"
        if other is None:
            return f"the reference is shorter; {number} frames were compared"
        if other.shape != frame.shape:
            sizes = f"{other.shape[1]} x {other.shape[0]}, not {frame.shape[1]} x {frame.shape[0]}"
            return f"not compared: the reference has {sizes} pixels"
        self._reference.add(frame, luma, other, luma_of(other))
        return ""

    @staticmethod
    def _more(others: Iterator[np.ndarray]) -> bool:
        """Whether the reference goes on; a damaged end does not count."""
        try:
            return next(others, None) is not None
        except Unusable:
            return False

    def _values(self, compared: bool) -> dict[str, float]:
        out: dict[str, float] = {}
        if FLICKERING in self._settings.metrics:
            out |= self._flicker.values()
        if self._frames is not None:
            out |= self._frames.values(self._fps) | freeze(self._flicker.differences, self._fps)
            if self._settings.block:
                at = boundaries(len(self._frames.series["luma"]), self._settings.block, self._settings.first_block)
                out |= seams(self._flicker.differences, self._frames.series["luma"], at)
        if self._flow is not None:
            out |= self._flow.values()
            if (actions := read_actions(self._clip.path.parent / f"{Path(self._clip.stem).name}{SUFFIX}")) is not None:
                out |= action_fidelity(actions, self._flow.camera(), self._flow.interval)
        return out | (self._reference.values() if compared else {})


# ---- all of them


def score_clips(
    clips: Sequence[SourceClip],
    references: Mapping[str, SourceClip],
    settings: Settings,
    folder: Path,
    *,
    workers: int = 0,
    done: Callable[[int], Any] = lambda count: None,
) -> list[ClipScore]:
    """Measures clips, or reads their records, in the order of `clips`.

    Args:
      references: by the clips' names.
      folder: of the records, here or in a bucket.
      workers: clips that are measured side by side; 0 for the machine's cores.
      done: called with the number of clips that were just finished.

    Raises:
      UserError: the records cannot be written.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    scores: dict[str, ClipScore] = {}
    with one_thread_each(), ThreadPoolExecutor(workers or cores) as pool:
        waiting = iter(clips)
        running: dict[Future[ClipScore], str] = {}
        try:
            while True:  # a few at a time, so that an error ends it soon
                for clip in itertools.islice(waiting, 2 * (workers or cores) - len(running)):
                    task = pool.submit(_score, clip, references.get(clip.name), settings, folder)
                    running[task] = clip.name
                if not running:
                    break
                finished = next(as_completed(running))
                scores[running.pop(finished)] = finished.result()
                done(1)
        finally:
            for task in running:
                task.cancel()
    return [scores[clip.name] for clip in clips]


def _score(clip: SourceClip, reference: SourceClip | None, settings: Settings, folder: Path) -> ClipScore:
    record = folder / RECORDS / record_name(clip.name)
    made_of = _made_of(clip, reference, settings)
    found = read_if_whole(record)
    if found is not None and not _RECORD("", found) and found["made_of"] == made_of:
        return score_of(found["score"])
    score = measure_clip(clip, reference, settings)
    content = {"version": VERSION, "made_of": made_of, "score": asdict(score)}
    write_atomically(record, json.dumps(content) + "\n")
    return score


def record_name(name: str) -> str:
    """The file of a clip's record; a long name, as of a prompt, is cut and told apart by a checksum."""
    parent, _, last = name.rpartition("/")
    if len(last.encode()) > LONGEST:
        last = f"{last.encode()[: LONGEST - 9].decode(errors='ignore')}_{zlib.crc32(last.encode()):08x}"
    return f"{parent}/{last}.json" if parent else f"{last}.json"


def _made_of(clip: SourceClip, reference: SourceClip | None, settings: Settings) -> str:
    """A line that is another one when the numbers may be."""
    actions = clip.path.parent / f"{Path(clip.stem).name}{SUFFIX}"
    try:
        parts = [clip.checksum(), reference.checksum() if reference else ""]
        parts.append(SourceClip(actions.name, actions).checksum() if actions.is_file() else "")
    except OSError as error:
        raise UserError(f"{clip.path}: cannot be read ({error.strerror or error})") from None
    return json.dumps([*parts, asdict(settings)])


def without_pictures(score: ClipScore) -> ClipScore:
    """A score for the summary, in which the small frames are not kept."""
    return replace(score, small="")
