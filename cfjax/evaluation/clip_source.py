"""Clips of any system for measuring: video files and folders of pictures, one frame in memory at a time.

Frames are decoded as they are stored, all of them, to RGB by FFmpeg's default conversion: the same bytes as OpenCV's
`VideoCapture` gives, with which VBench reads files. `data.video` samples by time stamps and resizes, for training.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import av
import numpy as np

from cfjax.core.checksums import crc32
from cfjax.core.errors import UserError
from cfjax.core.limits import FRAMES, VIDEO_PIXELS
from cfjax.core.paths import one_line
from cfjax.data.clips import Folder
from cfjax.data.pictures import Unusable, read_picture

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class SourceClip:
    """A clip in a folder.

    Attributes:
      name: its path in the folder, with slashes; a folder of pictures has no suffix.
      path: the file, or the folder of pictures.
      pictures: names of the pictures in order; () for a video file.
    """

    name: str
    path: Path
    pictures: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The name without a video's suffix."""
        return self.name if self.pictures else str(PurePosixPath(self.name).with_suffix(""))

    def checksum(self) -> str:
        """Tells whether the clip is another one than before: bytes and CRC-32 of all its files."""
        if not self.pictures:
            return f"{self.path.stat().st_size}-{crc32(self.path)}"
        crc, size = 0, 0
        for name in self.pictures:
            size += (self.path / name).stat().st_size
            crc = zlib.crc32(f"{name} {crc32(self.path / name)}\n".encode(), crc)
        return f"{size}-{crc:08x}"


@dataclass(frozen=True)
class OpenClip:
    """A clip that is being read: its frames per second, and its frames as uint8 [H, W, 3], each to be used at once."""

    fps: float
    frames: Iterator[np.ndarray]


def find_source_clips(folder: str | Path, key: str) -> list[SourceClip]:
    """All clips in and below a folder, by name: every video file, and every folder that holds two pictures or more.

    A folder with a video in it is none of pictures: the pictures beside videos are contact sheets and the like.

    Args:
      key: the key of the config that names the folder, for messages.

    Raises:
      UserError: no such folder, or nothing in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--config.{key}={folder}: no such folder")
    scanned = Folder.scan(root)
    with_videos = {PurePosixPath(name).parent for name in scanned.clips}
    pictures: dict[PurePosixPath, list[str]] = {}
    for name in sorted(scanned.others):
        path = PurePosixPath(name)
        if path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.parent not in with_videos:
            pictures.setdefault(path.parent, []).append(path.name)
    found = [SourceClip(name, root / name) for name in scanned.clips]
    for parent, names in pictures.items():
        if len(names) > 1:
            name = root.name if str(parent) == "." else str(parent)
            found.append(SourceClip(name, root / parent, tuple(names)))
    if not found:
        raise UserError(f"--config.{key}={folder}: no videos in it, and no folders of pictures")
    return sorted(found, key=lambda clip: clip.name)


@contextmanager
def reading(clip: SourceClip, fps: float = 0.0) -> Iterator[OpenClip]:
    """Opens a clip.

    Args:
      fps: frames per second to take in place of the file's; 0 for the file's.

    Raises:
      Unusable: it cannot be decoded, or has no frame rate; while frames are read, too.
    """
    if clip.pictures:
        if not fps:
            raise Unusable("no frame rate: a folder of pictures states none; give --config.fps=16")
        yield OpenClip(fps, _of_one_size(read_picture(clip.path / name) for name in clip.pictures))
        return
    try:
        with clip.path.open("rb") as file, av.open(file, "r") as container:
            if not container.streams.video:
                raise Unusable("unreadable: no video stream in it")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # other clips have the other cores
            rate = fps or float(stream.guessed_rate or stream.average_rate or 0)
            if not rate:
                raise Unusable("no frame rate: the file states none; give --config.fps=16")
            yield OpenClip(rate, _of_one_size(f.to_ndarray(format="rgb24") for f in container.decode(stream)))
    except (OSError, av.error.FFmpegError) as error:
        raise Unusable(f"unreadable: {one_line(error)}") from None


def _of_one_size(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same frames, checked."""
    shape: tuple[int, ...] = ()
    number = -1
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            raise Unusable(
                f"sizes differ: frame {number} has {frame.shape[1]} x {frame.shape[0]} pixels, the first "
                f"{shape[1]} x {shape[0]}"
            )
        if frame.shape[0] * frame.shape[1] > VIDEO_PIXELS or number >= FRAMES:
            raise Unusable(f"too large: {shape[1]} x {shape[0]}, more than {VIDEO_PIXELS} pixels, or {FRAMES} frames")
        yield frame
    if number < 0:
        raise Unusable("unreadable: no frame could be decoded")
