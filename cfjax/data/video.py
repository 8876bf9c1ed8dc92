"""Video files to clips: decoded with PyAV, turned upright, sampled at a fixed rate by time stamps, fitted to a size."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from cfjax.core.errors import UserError

FITS = ("cover", "stretch")


class Unusable(Exception):
    """One clip cannot be used; its message is "kind: details", and kinds are what a summary counts."""


@dataclass(frozen=True)
class ClipFormat:
    """What every clip is made into.

    Attributes:
      frames, height, width: in pixels.
      fps: rate that clips are sampled at.
      fit: "cover" scales the picture until it covers the size and cuts what stands out, evenly at both sides; "stretch"
        ignores its proportions, as the PyTorch reference does.
      max_crop: largest part of the picture, 0 to 1, that "cover" may cut off; beyond it the clip has the wrong shape.
      upscale: also take clips that are smaller than the size.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    fit: str = "cover"
    max_crop: float = 0.5
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UserError(f"fit={self.fit!r}: use {' or '.join(FITS)}")
        if min(self.frames, self.height, self.width) < 1 or not self.fps > 0:
            raise UserError("frames, height, width and fps must be positive")
        if not 0 <= self.max_crop <= 1:
            raise UserError(f"max_crop={self.max_crop}: use 0 to 1, the part of the picture that may be cut off")

    def check_stride(self, stride: tuple[int, int, int]) -> None:
        """Raises UserError unless a codec of this stride encodes the format: 1 + stride k frames, whole patches."""
        time, height, width = stride
        if (self.frames - 1) % time:
            near = 1 + (self.frames - 1) // time * time
            raise UserError(f"frames={self.frames}: the codec takes 1 + {time} k frames; use {near} or {near + time}")
        if self.height % height or self.width % width:
            raise UserError(f"size {self.width} x {self.height}: the codec needs multiples of {width} and {height}")


def read_clip(path: str | Path, wanted: ClipFormat) -> np.ndarray:
    """The first `wanted.frames` frames of a file, uint8 [P, H, W, 3].

    At time k / fps after its first frame a clip shows the frame that a player would: the last one whose time has come.
    Decoding stops when all are there.

    Raises:
      Unusable: unreadable, too short, of the wrong size, or damaged in the part that is used.
    """
    out: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unusable("unreadable: no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in _at_rate(container.decode(stream), stream, wanted):
                # A frame shown twice is fitted once.
                out.append(out[-1] if frame is None else fit_picture(*_upright(frame, stream), wanted))
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Unusable(f"unreadable: {reason}") from None
    if not out:
        raise Unusable("unreadable: no frame could be decoded")
    if len(out) < wanted.frames:
        raise Unusable(f"too short: {len(out)} of {wanted.frames} frames at {wanted.fps:g} per second")
    return np.stack(out)


def _at_rate(frames: Iterator[Any], stream: Any, wanted: ClipFormat) -> Iterator[Any]:
    """The frame shown at each k / fps, None where it is the one before again; ends with the clip or its last frame."""
    period = 1.0 / float(stream.average_rate) if stream.average_rate else 1.0 / wanted.fps
    # Containers round time stamps, WebM to milliseconds and GIF to hundredths: a frame that is so late is in time.
    late = min(max(float(stream.time_base or 0), 1e-3), 0.25 / wanted.fps)
    first = end = None
    shown, given, count = None, False, 0

    def until(time: float) -> Iterator[Any]:
        """What is shown at the sampling times before `time`."""
        nonlocal given, count
        while count < wanted.frames and count / wanted.fps < time - late:
            yield None if given else shown
            given, count = True, count + 1

    for number, frame in enumerate(frames):
        if frame.is_corrupt:
            raise Unusable(f"damaged: frame {number} cannot be decoded whole")
        time = float(frame.time) if frame.time is not None else number * period
        first = time if first is None else first
        if shown is not None:
            yield from until(time - first)
        if count == wanted.frames:
            return
        shown, given = frame, False
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else period
        end = time - first + length
    if end is not None:
        yield from until(end)


def _upright(frame: Any, stream: Any) -> tuple[np.ndarray, float]:
    """The picture as a viewer sees it, uint8 [H, W, 3], and the width of its pixels over their height."""
    picture = frame.to_ndarray(format="rgb24")
    ratio = stream.sample_aspect_ratio
    aspect = float(ratio) if ratio else 1.0
    turns = round(frame.rotation / 90) % 4
    if turns:
        picture = np.rot90(picture, turns)  # anticlockwise, as the display matrix counts
    return picture, 1.0 / aspect if turns % 2 else aspect


def fit_picture(picture: np.ndarray, aspect: float, wanted: ClipFormat) -> np.ndarray:
    """A uint8 picture [H, W, 3] at the wanted size, by antialiased bilinear filtering.

    Args:
      aspect: width of a pixel over its height.

    Raises:
      Unusable: it is smaller than wanted, or too much of it would be cut off.
    """
    height, width = picture.shape[:2]
    shown = width * aspect
    if not wanted.upscale and (height < wanted.height or round(shown) < wanted.width):
        raise Unusable(f"wrong size: {round(shown)} x {height} is smaller than {wanted.width} x {wanted.height}")
    box = (0.0, 0.0, float(width), float(height))
    if wanted.fit == "cover":
        scale = min(shown / wanted.width, height / wanted.height)
        kept_x, kept_y = scale * wanted.width / shown, scale * wanted.height / height
        if 1 - kept_x * kept_y > wanted.max_crop + 1e-6:
            cut = f"{1 - kept_x * kept_y:.0%} of it would be cut off"
            raise Unusable(f"wrong shape: {round(shown)} x {height} for {wanted.width} x {wanted.height}, {cut}")
        x, y = (1 - kept_x) / 2 * width, (1 - kept_y) / 2 * height
        box = (x, y, width - x, height - y)
    if box == (0.0, 0.0, wanted.width, wanted.height):
        return np.ascontiguousarray(picture)
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((wanted.width, wanted.height), Image.Resampling.BILINEAR, box=box))


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]: 2 v / 255 - 1 (PyTorch reference)."""
    return video.astype(np.float32) * np.float32(2.0 / 255.0) - np.float32(1.0)
