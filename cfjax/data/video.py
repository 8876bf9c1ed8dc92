"""Video files to frames by their time stamps: decoded with PyAV, rotated, sampled at a fixed rate, resized.

At any time a video shows the last frame whose time stamp has passed, as a player does. The frame rate that a file
states is not used, as recorders and remuxers write arbitrary values; frames that an edit list trims off are not shown.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cfjax.core.limits import VIDEO_PIXELS
from cfjax.data.pictures import ClipFormat, Unusable, fit_picture, over_white

UNTIL_THE_END = float("inf")
ROUNDING = 1e-3  # seconds; WebM keeps times in milliseconds
JUMP_BACK = 0.5  # seconds by which a frame's time stamp may precede that of the previous frame
CUT_SHORT = 1.0  # seconds that the data of a Matroska file may end before the duration in its header
INDEXED = {"mov", "matroska", "avi"}  # a jump into MPEG program streams gives frames of wrong times (FFmpeg 8.1)
COVERS = Disposition.attached_pic | Disposition.timed_thumbnails


@dataclass(frozen=True)
class Span:
    """Presentation times of a video in seconds: of its first frame, of its last frame, and of the end of that one."""

    first: float
    last: float
    end: float

    def count(self, fps: float) -> int:
        """Number of frames, 1 / fps apart, up to the last one."""
        return floor((self._final(fps) - self.first) * fps + 1e-2) + 1

    def final_times(self, count: int, fps: float) -> np.ndarray:
        """The times of the last `count` of these."""
        return np.maximum(self._final(fps) - np.arange(count - 1, -1, -1) / fps, self.first)

    def _final(self, fps: float) -> float:
        return max(self.last, self.end - 1 / fps)  # a last frame that is shown for long fills the end


def read_clip(path: str | Path, wanted: ClipFormat, start: float = 0.0, stop: float = UNTIL_THE_END) -> np.ndarray:
    """The first `wanted.frames` frames of a file, or of a part of it, uint8 [P, H, W, 3].

    Frame k is the one that is shown k / fps after the first. Decoding stops when all are there.

    Args:
      start, stop: the part, in seconds after the file's first frame.

    Raises:
      Unusable: unreadable, too short, of the wrong size, or damaged in the part that is used.
    """
    times = start + np.arange(wanted.frames) / wanted.fps
    times = times[times < stop - ROUNDING]
    if start:
        times += _first_time(path)
    clip = _sampled(path, times, wanted, from_first=not start)
    if len(clip) < wanted.frames:
        raise Unusable(f"too short: {len(clip)} of {wanted.frames} frames at {wanted.fps:g} per second")
    return np.stack(clip)


def read_end(path: str | Path, wanted: ClipFormat) -> np.ndarray:
    """The last `wanted.frames` frames of a file, 1 / fps apart, uint8 [P, H, W, 3]; the last one is its very last.

    Decodes from the nearest key frame on; memory does not grow with the file's length.

    Raises:
      Unusable: unreadable, too short, of the wrong size, cut short, or damaged in the part that is used.
    """
    span = video_span(path)
    if (count := span.count(wanted.fps)) < wanted.frames:
        raise Unusable(f"too short: {count} of {wanted.frames} frames at {wanted.fps:g} per second")
    clip = _sampled(path, span.final_times(wanted.frames, wanted.fps), wanted, from_first=False)
    if len(clip) < wanted.frames:
        raise Unusable(
            f"damaged: it cannot be decoded up to {span.last - span.first:.2f} s, where it ends; cut it before"
        )
    return np.stack(clip)


def video_span(path: str | Path) -> Span:
    """Presentation times of a file's frames: from its packets, or by decoding if these have no time stamps.

    Raises:
      Unusable: unreadable, damaged, cut short, or without a frame.
    """
    with _opened(path) as (container, stream):
        extent = _packet_extent(container, stream)
    if extent is None:
        extent = _Extent()
        with _opened(path) as (container, stream):
            for time, frame in _timed(container, stream):
                extent.add(time, _seconds(frame))
    return extent.span()


class _Extent:
    """Collects the times of frames in any order."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._before: float | None = None
        self._last: float | None = None
        self._length = 0.0

    def add(self, time: float, length: float) -> None:
        self._first = time if self._first is None else min(self._first, time)
        if self._last is None or time > self._last:
            self._before, self._last, self._length = self._last, time, length
        elif time < self._last:
            self._before = time if self._before is None else max(self._before, time)

    def span(self) -> Span:
        if self._first is None or self._last is None:
            raise Unusable("unreadable: no frame could be decoded")
        return Span(self._first, self._last, self._last + _shown_for(self._length, self._last, self._before))


def _shown_for(stated: float, last: float, before: float | None) -> float:
    """Duration of the last frame: as stated, or that of the previous one if almost none is stated."""
    return stated if stated > 2 * ROUNDING or before is None else last - before


def _seconds(of: Any) -> float:
    """The stated duration of a packet or a frame, 0 if there is none."""
    return float(of.duration * of.time_base) if of.duration and of.time_base else 0.0


def _packet_extent(container: InputContainer, stream: VideoStream) -> _Extent | None:
    """The extent by the packets; None if one of them has no presentation time stamp."""
    extent, reach = _Extent(), 0.0
    for packet in container.demux():
        own = packet.stream_index == stream.index
        if packet.is_corrupt and own:
            raise Unusable("damaged: it ends amid a frame; cut it before that")
        if not packet.size or packet.is_discard:
            continue
        if own and packet.pts is None:
            return None
        if packet.pts is not None:
            time = float(packet.pts * packet.time_base)
            reach = max(reach, time + _seconds(packet))
            if own:
                extent.add(time, _seconds(packet))
    stated = (container.duration or 0) / av.time_base
    if "matroska" in container.format.name and reach < stated - CUT_SHORT:  # other formats say it themselves
        raise Unusable(f"damaged: its header says {stated:.1f} s, its data end after {reach:.1f} s; cut it there")
    return extent


# ---- decoding


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its stream of pictures; whatever goes wrong in reading it is Unusable."""
    try:
        # Of a relative path FFmpeg would take what stands before a colon for a protocol.
        with av.open(str(Path(path).absolute()), metadata_errors="replace") as container:
            yield container, _stream(container)
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Unusable(f"unreadable: {reason}") from None


def _stream(container: InputContainer) -> VideoStream:
    moving = [stream for stream in container.streams.video if not stream.disposition & COVERS]
    if not moving:
        raise Unusable("no pictures: sound alone" if container.streams.audio else "unreadable: no video stream")
    stream = next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])
    context = stream.codec_context
    if context is None:
        raise Unusable("unreadable: nothing here decodes it")
    if context.width * context.height > VIDEO_PIXELS:
        raise Unusable(f"too large: {context.width} x {context.height}, more than {VIDEO_PIXELS} pixels")
    context.options = {**context.options, "max_pixels": str(VIDEO_PIXELS)}  # a later frame may be of another size
    stream.thread_type = "SLICE"  # frame threads may hand out VP8 frames that are still being written (FFmpeg 8.1)
    return stream


def _timed(container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, VideoFrame]]:
    """Every frame with its time; one without a time stamp follows the previous frame."""
    before, end = -UNTIL_THE_END, 0.0
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise Unusable(f"damaged: frame {number} cannot be decoded whole")
        time = end if frame.time is None else float(frame.time)
        if time < before - JUMP_BACK:
            raise Unusable(f"damaged: time stamps go back from {before:.2f} s to {time:.2f} s; cut it there")
        before = time = max(before, time)
        end = time + (_seconds(frame) or 1.0 / float(stream.guessed_rate or 25))
        yield time, frame


def _first_time(path: str | Path) -> float:
    with _opened(path) as (container, stream):
        for time, _ in _timed(container, stream):
            return time
    raise Unusable("unreadable: no frame could be decoded")


def _sampled(path: str | Path, times: np.ndarray, wanted: ClipFormat, *, from_first: bool) -> list[np.ndarray]:
    """The pictures that are shown at `times`, up to the end of the video; each picture is fitted once.

    Args:
      from_first: times count from the first frame; otherwise they are the video's own, and decoding begins near them.
    """
    if not from_first:
        try:
            return _pictures(path, times, wanted, seek=True)
        except _SeekFailed:
            pass  # no index, no key frames, or time stamps that mislead: the whole way then
    return _pictures(path, times, wanted, from_first=from_first)


class _SeekFailed(Exception):
    """The frames after a seek are not those at that position of the file."""


def _pictures(
    path: str | Path, times: np.ndarray, wanted: ClipFormat, *, from_first: bool = False, seek: bool = False
) -> list[np.ndarray]:
    out: list[np.ndarray] = []
    shown = None
    with _opened(path) as (container, stream):
        # Containers round times, GIF to hundredths: a frame that is so late is in time.
        late = min(max(float(stream.time_base or 0), ROUNDING), 0.25 / wanted.fps)
        frames = _after_jump(container, stream, times[0], late) if seek else _timed(container, stream)
        for frame in _at(frames, times, late, from_first):
            if frame is not shown:
                shown, picture = frame, _fitted(frame, stream, wanted)
            out.append(picture)
    return out


def _after_jump(
    container: InputContainer, stream: VideoStream, time: float, late: float
) -> Iterator[tuple[float, VideoFrame]]:
    """The frames from the last key frame before `time` on. Raises _Astray when they turn out not to be these."""
    if not INDEXED & set(container.format.name.split(",")):
        raise _SeekFailed
    try:
        container.seek(floor(time / float(stream.time_base or 1)), stream=stream)
        begun = False
        for shown_from, frame in _timed(container, stream):
            if frame.time is None or (not begun and shown_from > time + late):
                raise _SeekFailed
            begun = begun or frame.key_frame  # those before it may need frames that were jumped over
            if begun:
                yield shown_from, frame
        if not begun:
            raise _SeekFailed
    except (Unusable, av.error.FFmpegError) as error:
        raise _SeekFailed from error


def _at(
    frames: Iterator[tuple[float, VideoFrame]], times: Sequence[float] | np.ndarray, late: float, from_first: bool
) -> Iterator[VideoFrame]:
    """The frame that is shown at each time: the last one whose time stamp has passed. Ends with the video."""
    current = next(frames, None)
    if current is None:
        raise Unusable("unreadable: no frame could be decoded")
    first = current[0] if from_first else 0.0
    before, following = None, next(frames, None)
    for time in times:
        while following is not None and following[0] - first <= time + late:
            before, current, following = current[0], following, next(frames, None)
        if following is None:
            length = _shown_for(_seconds(current[1]), current[0], before)
            if time > max(current[0] - first + late, current[0] - first + length - late):
                return
        yield current[1]


def _fitted(frame: VideoFrame, stream: VideoStream, wanted: ClipFormat) -> np.ndarray:
    """The displayed picture (pixel aspect ratio, rotation) at the wanted size."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        picture = over_white(frame.to_ndarray(format="rgba"))
    else:
        picture = frame.to_ndarray(format="rgb24")
    pixel = (float(stream.sample_aspect_ratio or 1), 1.0)
    sides: Any = frame.side_data
    if (matrix := sides.get(SideData.DISPLAYMATRIX)) is None:
        return fit_picture(picture, wanted, pixel)
    # Its right is shown in the direction (a, b) and its bottom in (c, d): ISO/IEC 14496-12, 8.3.2, "matrix".
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)
    straight, turned = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, turned) > 0.01 * max(straight, turned):
        raise Unusable("wrong shape: it is to be shown at an angle that is no multiple of 90 degrees; turn it yourself")
    if turned > straight:
        picture, pixel, a, d = picture.swapaxes(0, 1), pixel[::-1], c, b
    return fit_picture(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], wanted, pixel)
