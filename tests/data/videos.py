"""Small real video files for tests, written with PyAV: pictures whose colours encode the time."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {
    ".mp4": ("libx264", "yuv420p"),
    ".mov": ("libx264", "yuv420p"),
    ".mkv": ("libx264", "yuv420p"),
    ".ts": ("libx264", "yuv420p"),
    ".avi": ("mpeg4", "yuv420p"),
    ".mpg": ("mpeg2video", "yuv420p"),
    ".webm": ("libvpx", "yuv420p"),
    ".gif": ("gif", "rgb8"),
}


def ramp(frames: int, height: int, width: int) -> np.ndarray:
    """Grey frames whose brightness is 2 t, with a bright left half: uint8 [P, H, W, 3]."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video += (2 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    video[:, :, : width // 2] += 90
    return video


def write_video(
    path: Path,
    frames: int,
    *,
    fps: float = 16,
    size: tuple[int, int] = (16, 32),
    times: Sequence[float] | None = None,
    video: np.ndarray | None = None,
    faststart: bool = False,
    aspect: Fraction | None = None,
) -> Path:
    """`frames` of `ramp`, at `fps` or at the given times in seconds (variable frame rate)."""
    name, pixels = CODECS[path.suffix]
    pictures = ramp(frames, *size) if video is None else video
    options = {"movflags": "faststart"} if faststart else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(name, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = pixels
        if name == "libx264":
            stream.options = {"crf": "1", "g": "8"}
        if name == "libvpx":
            stream.bit_rate = 4_000_000
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[n]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def show_by_matrix(path: Path, right: tuple[int, int], bottom: tuple[int, int]) -> None:
    """Writes a display matrix into an mp4's track header: where the picture's right and bottom are shown, (x, y)."""
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    assert struct.unpack(">9i", data[start : start + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    (a, b), (c, d) = right, bottom
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def trim_mp4(path: Path, first: int, frames: int, fps: float) -> None:
    """Changes an mp4's edit list to show `frames` frames from `first` on, as a trim without re-encoding does."""
    data = bytearray(path.read_bytes())
    movie, media = (struct.unpack(">I", data[(at := data.find(box)) + 16 : at + 20])[0] for box in (b"mvhd", b"mdhd"))
    entry = data.find(b"elst") + 12
    begin = struct.unpack(">i", data[entry + 4 : entry + 8])[0] + round(media * first / fps)
    data[entry : entry + 8] = struct.pack(">Ii", round(movie * frames / fps), begin)
    path.write_bytes(data)


def write_sound(path: Path, cover: bytes = b"") -> Path:
    """Silence as MP3, with a JPEG on its cover (an ID3v2.3 APIC frame) if one is given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libmp3lame", rate=48000)
        for n in range(30):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, 1152 * n
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if cover:
        picture = b"\0image/jpeg\0\x03\0" + cover
        tag = b"APIC" + struct.pack(">I", len(picture)) + b"\0\0" + picture
        size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\x03\0\0" + size + tag + path.read_bytes())
    return path


def truncate(path: Path, part: float) -> None:
    """Cuts the file off."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def brightness(video: np.ndarray) -> np.ndarray:
    """Mean of the right half of every frame: 2 t of `ramp`."""
    return video[:, :, video.shape[2] // 2 + 1 :].mean(axis=(1, 2, 3))
