"""Pictures of any kind to uint8 RGB of one size: scaled by their value range, on white where transparent, upright."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from cfjax.core.errors import UserError
from cfjax.core.limits import PICTURE_PIXELS

FITS = ("cover", "stretch")
MOVING = (
    "GIF",
    "PNG",
    "WEBP",
    "AVIF",
)  # formats of animations; a JPEG or TIFF of several pictures begins with the main one

ROWS = 256  # of a picture that are blended together

# What Pillow's readers raise, one or the other, for files that are damaged or too large to be meant.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class Unusable(Exception):
    """A clip or caption cannot be used; the message is "kind: details", and summaries count kinds."""


@dataclass(frozen=True)
class ClipFormat:
    """The format that every clip is converted to.

    Attributes:
      frames, height, width: in pixels.
      fps: rate that clips are sampled at.
      fit: "cover" scales the picture until it covers the size and crops the rest, evenly at both sides; "stretch"
        ignores the aspect ratio (reference: `transforms.Resize` in `inference.py`).
      max_crop: largest fraction of the picture that "cover" may crop; clips beyond it are skipped.
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


def fit_picture(picture: np.ndarray, wanted: ClipFormat, pixel: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """A uint8 picture [H, W, 3] at the wanted size, by antialiased bilinear filtering.

    Args:
      pixel: width and height at which each of its pixels is shown.

    Raises:
      Unusable: it is smaller than wanted, or too much of it would be cut off.
    """
    height, width = picture.shape[:2]
    across, down = width * pixel[0], height * pixel[1]
    shown = f"{round(across)} x {round(down)}"
    if not wanted.upscale and (round(down) < wanted.height or round(across) < wanted.width):
        raise Unusable(f"wrong size: {shown} is smaller than {wanted.width} x {wanted.height}")
    box = (0.0, 0.0, float(width), float(height))
    if wanted.fit == "cover":
        scale = min(across / wanted.width, down / wanted.height)
        kept_x, kept_y = scale * wanted.width / across, scale * wanted.height / down
        if 1 - kept_x * kept_y > wanted.max_crop + 1e-6:
            cut = f"{1 - kept_x * kept_y:.0%} of it would be cut off"
            raise Unusable(f"wrong shape: {shown} for {wanted.width} x {wanted.height}, {cut}")
        x, y = (1 - kept_x) / 2 * width, (1 - kept_y) / 2 * height
        box = (x, y, width - x, height - y)
    if box == (0.0, 0.0, wanted.width, wanted.height):
        return np.ascontiguousarray(picture)
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((wanted.width, wanted.height), Image.Resampling.BILINEAR, box=box))


def to_float(video: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]: 2 v / 255 - 1 (reference: `transforms.Normalize` in `inference.py`)."""
    return video.astype(np.float32) * np.float32(2.0 / 255.0) - np.float32(1.0)


def over_white(rgba_HW4: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: a picture with an alpha channel composited on white."""
    out = np.empty((*rgba_HW4.shape[:2], 3), np.uint8)
    for rows in (slice(start, start + ROWS) for start in range(0, len(out), ROWS)):  # large pictures in strips
        alpha = rgba_HW4[rows, :, 3:].astype(np.uint16)
        blended = rgba_HW4[rows, :, :3] * alpha + 255 * (255 - alpha)
        out[rows] = (blended + 127) // 255
    return out


def read_picture(path: str | Path | BinaryIO) -> np.ndarray:
    """A picture file as a viewer shows it, uint8 [H, W, 3].

    Whole numbers of 16 bits are scaled by their range; float pictures hold 0 to 1. Transparent parts show white.

    Raises:
      Unusable: it cannot be read whole, is an animation, or has values of an unknown range.
    """
    try:
        with _quiet(), Image.open(path) as opened:
            if opened.width * opened.height > PICTURE_PIXELS:
                raise Unusable(f"too large: {opened.width} x {opened.height}, more than {PICTURE_PIXELS} pixels")
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format in MOVING:
                raise Unusable(
                    f"not one picture: an animation of {frames} frames; save one of them, or give it as a video"
                )
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return _eight_bit(opened)
    # Pillow's readers raise these, one or the other, for files that are damaged or too large to be meant.
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise Unusable(f"unreadable: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warning of large pictures, of which PICTURE_PIXELS says how large they may be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _eight_bit(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return _grey(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("F", "I"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if image.mode == "I":
            raise Unusable(f"unknown range: whole numbers of 32 bits, {low:g} to {high:g}; save it with 8 or 16 bits")
        if not (np.isfinite(values).all() and low >= 0.0 and high <= 1.0):
            raise Unusable(
                f"unknown range: floats from {low:g} to {high:g}; 0 to 1 are black to white, scale them or save 8 bits"
            )
        return _grey(np.rint(values * 255).astype(np.uint8))
    if image.has_transparency_data:
        return over_white(np.asarray(_in_mode(image, "RGBA")))
    return np.asarray(_in_mode(image, "RGB"))


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode; `convert` would copy one that is in it already."""
    return image if image.mode == mode else image.convert(mode)


def _grey(values_HW: np.ndarray) -> np.ndarray:
    return np.repeat(values_HW[..., None], 3, axis=-1)
