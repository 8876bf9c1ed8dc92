"""Clips as files: float video to bytes as the reference does it, MP4, GIF and PNG, contact sheets and tiled videos.

Everything here takes and returns uint8 RGB (`to_uint8` makes it), enlarges by pixel repetition only, so that tiny
clips stay crisp, and writes under a temporary name before renaming, so that no half-written file is ever seen.
"""

import base64
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import ArrayLike
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.core.paths import replacing

_PALETTE_PIXELS = 1 << 20  # pixels looked at when a GIF's palette is chosen


def data_uri(data: bytes, mime: str) -> str:
    """`data` as a base64 data: URI of media type `mime`."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def to_uint8(video: ArrayLike) -> np.ndarray:
    """Float video [P, H, W, 3] or [B, P, H, W, 3] in [-1, 1] to uint8 of the same shape.

    As the reference writes its videos: clamp(v / 2 + 1/2, 0, 1) * 255, truncated.

    Raises:
      UserError: the array is not float, not of that shape, or holds NaN.
    """
    array = np.asarray(video)
    if array.dtype.kind in "iub":
        raise UserError(f"to_uint8: expected float video in [-1, 1], got {array.dtype}")
    if array.ndim not in (4, 5) or array.shape[-1] != 3:
        raise UserError(f"to_uint8: expected [P, H, W, 3] or [B, P, H, W, 3], got {array.shape}")
    array = array.astype(np.float32)
    if np.isnan(array).any():
        raise UserError("to_uint8: the video holds NaN; look for a diverged model or a wrong latent scale")
    return (np.clip(array * np.float32(0.5) + np.float32(0.5), 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)


def check_uint8(frames: np.ndarray, shape: str, what: str) -> np.ndarray:
    """The array as it is, if it is uint8 RGB of the axes named in `shape` (such as "NPHWC") with none of them empty."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != len(shape) or frames.shape[-1] != 3 or not frames.size:
        axes = ", ".join(shape[:-1])
        raise UserError(f"{what}: expected uint8 [{axes}, 3] with nothing empty, got {frames.dtype} {frames.shape}")
    return frames


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Repeats pixels `scale` times over H and W of [..., H, W, 3]."""
    if int(scale) != scale or scale < 1:
        raise UserError(f"scale={scale}: use a whole number of at least 1")
    return frames.repeat(int(scale), axis=-3).repeat(int(scale), axis=-2)


def shrink(frames: np.ndarray, width: int) -> np.ndarray:
    """uint8 clips [..., H, W, 3] averaged down to at most `width` pixels across; smaller ones stay as they are."""
    height, wide = frames.shape[-3:-1]
    if wide <= width:
        return frames
    size = (width, max(1, round(height * width / wide)))
    flat = frames.reshape(-1, height, wide, 3)
    small = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in flat])
    return small.reshape(*frames.shape[:-3], *small.shape[-3:])


def pick_frames(videos_NPHWC: np.ndarray, count: int) -> np.ndarray:
    """`count` frames of each clip (all, when there are fewer), spread evenly from the first to the last."""
    total = videos_NPHWC.shape[1]
    return videos_NPHWC[:, np.linspace(0, total - 1, max(min(count, total), 1)).round().astype(int)]


def _rate(fps: float, what: str) -> Fraction:
    if not 0 < fps <= 1000:
        raise UserError(f"{what}: fps={fps} must lie in (0, 1000]")
    return Fraction(fps).limit_denominator(1001)


def write_mp4(path: str | Path, video_PHWC: np.ndarray, fps: float, scale: int = 1) -> None:
    """Writes a uint8 clip as H.264 in yuv420p, enlarged `scale` times; an odd size gains a repeated row or column.

    Colours are converted and tagged as BT.709, so that players agree on them.

    Raises:
      UserError: the clip is not uint8 [P, H, W, 3], or fps or scale is out of range.
    """
    frames = enlarge(check_uint8(video_PHWC, "PHWC", str(path)), scale)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = _rate(fps, str(path))
    options = {"movflags": "faststart"}
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def write_gif(path: str | Path, video_PHWC: np.ndarray, fps: float, scale: int = 1) -> None:
    """Writes a uint8 clip as an endless GIF with one palette for all frames; its clock ticks in hundredths of a second.

    Raises:
      UserError: the clip is not uint8 [P, H, W, 3], or fps or scale is out of range.
    """
    frames = check_uint8(video_PHWC, "PHWC", str(path))
    duration = 10 * max(1, round(100 / float(_rate(fps, str(path)))))
    pixels = frames.reshape(1, -1, 3)
    sample = pixels[:, :: -(-pixels.shape[1] // _PALETTE_PIXELS)]
    palette = Image.fromarray(np.ascontiguousarray(sample)).quantize(256, Image.Quantize.MEDIANCUT)
    first, *rest = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in enlarge(frames, scale)
    ]
    with replacing(path) as partial:
        first.save(partial, "GIF", save_all=True, append_images=rest, duration=duration, loop=0, disposal=1)


def write_png(path: str | Path, image_HWC: np.ndarray, scale: int = 1) -> None:
    """Writes a uint8 RGB picture, enlarged `scale` times.

    Raises:
      UserError: the picture is not uint8 [H, W, 3], or scale is out of range.
    """
    image = Image.fromarray(enlarge(check_uint8(image_HWC, "HWC", str(path)), scale))
    with replacing(path) as partial:
        image.save(partial, "PNG", optimize=True)


def _tile(tiles: np.ndarray, columns: int, gap: int, background: int, what: str) -> np.ndarray:
    """[N, ..., H, W, 3] to [..., rows * (H + gap) - gap, columns * (W + gap) - gap, 3], filled row by row."""
    if columns < 1 or gap < 0 or not 0 <= background <= 255:
        raise UserError(f"{what}: use columns >= 1, gap >= 0 and background in 0..255")
    count, (height, width) = len(tiles), tiles.shape[-3:-1]
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    canvas = np.full((*tiles.shape[1:-3], *size), background, np.uint8)
    for n, tile in enumerate(tiles):
        y, x = (n // columns) * (height + gap), (n % columns) * (width + gap)
        canvas[..., y : y + height, x : x + width, :] = tile
    return canvas


def contact_sheet(videos_NPHWC: np.ndarray, columns: int = 8, gap: int = 2, background: int = 255) -> np.ndarray:
    """One picture [H', W', 3]: a row per clip, in it `columns` frames spread evenly from the first to the last.

    Raises:
      UserError: the clips are not uint8 [N, P, H, W, 3], or columns, gap or background is out of range.
    """
    videos = check_uint8(videos_NPHWC, "NPHWC", "contact sheet")
    picked = pick_frames(videos, columns)
    columns = min(columns, videos.shape[1])
    return _tile(picked.reshape(-1, *videos.shape[2:]), columns, gap, background, "contact sheet")


def grid_video(videos_NPHWC: np.ndarray, columns: int, gap: int = 2, background: int = 255) -> np.ndarray:
    """Clips side by side, `columns` to a row, as one video [P, H', W', 3]; places left over show the background.

    Raises:
      UserError: the clips are not uint8 [N, P, H, W, 3], or columns, gap or background is out of range.
    """
    return _tile(check_uint8(videos_NPHWC, "NPHWC", "grid video"), columns, gap, background, "grid video")
