"""Clips as files: float video to uint8, MP4, GIF and PNG, contact sheets and tiled videos.

Everything here takes and returns uint8 RGB (`to_uint8` makes it), enlarges by pixel repetition only, so that tiny
clips stay crisp, and writes under a temporary name before renaming, so that no half-written file is ever seen.
"""

import base64
import platform
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import ArrayLike
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.core.paths import one_line, replacing

SHEET_PIXELS = 40_000_000  # of a contact sheet at most: 120 MB as it is drawn, and every reader opens it
_MP4_SIDE = 16384  # x264's limit, in pixels
_PALETTE_PIXELS = 1 << 20  # pixels from which a GIF's palette is chosen
_OPTIMIZE_PIXELS = 1 << 21  # PNGs beyond take seconds a megapixel to press out the last per cent
# With x264's code for AVX-512 the same frames give other bytes in one encoding out of a few, at many sizes: its
# macroblock tree depends on what lies in memory. With that for AVX, which jaxlib needs anyway, a clip is one file.
_X264 = {"x264-params": "asm=AVX"} if platform.machine() in ("x86_64", "AMD64") else {}


def data_uri(data: bytes, mime: str) -> str:
    """`data` as a base64 data: URI of media type `mime`."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def to_uint8(video: ArrayLike) -> np.ndarray:
    """Float video [P, H, W, 3] or [B, P, H, W, 3] in [-1, 1] to uint8 of the same shape.

    clamp(v / 2 + 1/2, 0, 1) * 255, truncated (reference: `inference.py`).

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
    if scale == 1:
        return frames
    return frames.repeat(int(scale), axis=-3).repeat(int(scale), axis=-2)


def shrink(frames: np.ndarray, width: int) -> np.ndarray:
    """uint8 clips [..., H, W, 3] averaged down to at most `width` pixels across; smaller ones stay as they are."""
    height, wide = frames.shape[-3:-1]
    if wide <= width:
        return frames
    return _resize(frames, max(1, round(height * width / wide)), width)


def _resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [..., H, W, 3] averaged down to [..., height, width, 3]."""
    size, flat = (width, height), frames.reshape(-1, *frames.shape[-3:])
    small = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in flat])
    return small.reshape(*frames.shape[:-3], *small.shape[-3:])


def pick_frames(videos_BPHWC: np.ndarray, count: int) -> np.ndarray:
    """`count` frames of each clip (all, when there are fewer), spread evenly from the first to the last."""
    return videos_BPHWC[:, spread(videos_BPHWC.shape[1], count)]


def spread(total: int, count: int) -> np.ndarray:
    """Indices of `count` of `total` frames (all, when there are fewer), evenly from the first to the last."""
    return np.linspace(0, total - 1, max(min(count, total), 1)).round().astype(int)


def _rate(fps: float, what: str) -> Fraction:
    if not 0 < fps <= 1000:
        raise UserError(f"{what}: fps={fps} must lie in (0, 1000]")
    return Fraction(fps).limit_denominator(1001)


def write_mp4(path: str | Path, video_PHWC: np.ndarray, fps: float, scale: int = 1) -> int:
    """Writes a uint8 clip as H.264 in yuv420p, enlarged `scale` times; an odd size gains a repeated row or column.

    Colours are converted and tagged as BT.709, so that players agree on them.

    Returns:
      the file's bytes.

    Raises:
      UserError: the clip is not uint8 [P, H, W, 3], or fps or scale is out of range.
    """
    frames = enlarge(check_uint8(video_PHWC, "PHWC", str(path)), scale)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rate = _rate(fps, str(path))
    with replacing(path) as partial:
        _encode(partial, frames, rate)
        return partial.stat().st_size


def _encode(path: Path, frames: np.ndarray, rate: Fraction) -> None:
    options = {"movflags": "faststart"}
    # FFmpeg would take the part of a relative path before a colon for a protocol.
    with av.open(str(path.absolute()), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "medium", **_X264})
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


def check_mp4(height: int, width: int, fps: float, scale: int = 1) -> None:
    """Encodes one black frame and discards it, to find before generation what `write_mp4` would refuse.

    Raises:
      UserError: such a clip cannot be written.
    """
    _rate(fps, "mp4")
    size = f"{width * scale} x {height * scale}"
    if max(width, height) * scale > _MP4_SIDE:
        raise UserError(f"scale={scale}: H.264 takes no frames of {size} pixels, {_MP4_SIDE} a side at most")
    with tempfile.TemporaryDirectory(prefix="cfjax-") as folder:
        try:
            write_mp4(Path(folder) / "mp4", np.zeros((1, height, width, 3), np.uint8), fps, scale)
        except av.error.FFmpegError as error:
            raise UserError(f"H.264 takes no frames of {size} pixels at fps={fps:g} ({one_line(error)})") from None


def read_frames(path: Path, wanted: np.ndarray, height: int, width: int, scale: int = 1) -> np.ndarray:
    """Some frames of an mp4 of `write_mp4`, uint8 [n, height, width, 3]: repeated pixels are averaged again.

    Args:
      path: here or in a bucket.
      wanted: indices of frames, ascending.
      height, width, scale: the clip's and what it was enlarged by.

    Raises:
      UserError: it cannot be read, or has fewer frames.
    """
    kept: list[np.ndarray] = []
    try:
        with path.open("rb") as file, av.open(file, "r") as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    whole = frame.to_ndarray(format="rgb24")[: height * scale, : width * scale]
                    kept.append(_resize(whole[None], height, width)[0])
    except (OSError, av.error.FFmpegError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    if len(kept) != len(wanted):
        raise UserError(f"{path}: is shorter than it was when it was written")
    return np.stack(kept)


def write_gif(path: str | Path, video_PHWC: np.ndarray, fps: float, scale: int = 1) -> None:
    """Writes a uint8 clip as an endless GIF with one palette for all frames; frame times are in hundredths of a second.

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
        image.save(partial, "PNG", optimize=image.width * image.height <= _OPTIMIZE_PIXELS)


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


class ContactSheet:
    """A picture with a row per clip, drawn row by row: `columns` frames spread evenly from the first to the last.

    Frames are averaged down until the picture has at most `SHEET_PIXELS`; no clip is left out.

    Attributes:
      picture: uint8 [H', W', 3].
    """

    def __init__(
        self, clips: int, shape_PHW: tuple[int, int, int], columns: int = 8, gap: int = 2, background: int = 255
    ) -> None:
        """An empty sheet for so many clips of P frames of H x W.

        Raises:
          UserError: columns, gap or background is out of range, or not even one pixel a frame fits.
        """
        if columns < 1 or gap < 0 or not 0 <= background <= 255:
            raise UserError("contact sheet: use columns >= 1, gap >= 0 and background in 0..255")
        total, height, width = shape_PHW
        self._frames, self._gap = spread(total, columns), gap
        self._tile = self._fitting(clips, height, width)
        self.picture = np.full((*self._size(clips, *self._tile), 3), background, np.uint8)

    def _size(self, clips: int, height: int, width: int) -> tuple[int, int]:
        return clips * (height + self._gap) - self._gap, len(self._frames) * (width + self._gap) - self._gap

    def _fitting(self, clips: int, height: int, width: int) -> tuple[int, int]:
        """The largest frames of these proportions, no larger than height x width, of which a sheet fits."""
        for across in range(width, 0, -1):
            down = max(1, round(height * across / width))
            size = self._size(clips, down, across)
            if size[0] * size[1] <= SHEET_PIXELS:
                return down, across
        raise UserError(f"contact sheet: {clips} clips do not fit into {SHEET_PIXELS} pixels; draw several sheets")

    def draw(self, row: int, clip_PHWC: np.ndarray) -> None:
        """Draws a clip, or those frames of it that a row shows."""
        height, width = self._tile
        shown = clip_PHWC if len(clip_PHWC) == len(self._frames) else clip_PHWC[self._frames]
        if shown.shape[1:3] != self._tile:
            shown = _resize(shown, height, width)
        y = row * (height + self._gap)
        for column, frame in enumerate(shown):
            x = column * (width + self._gap)
            self.picture[y : y + height, x : x + width] = frame


def contact_sheet(videos_BPHWC: np.ndarray, columns: int = 8, gap: int = 2, background: int = 255) -> np.ndarray:
    """All clips on one `ContactSheet`, [H', W', 3]: a row per clip, frames shrunk where it would grow too large.

    Raises:
      UserError: the clips are not uint8 [N, P, H, W, 3], or columns, gap or background is out of range.
    """
    videos = check_uint8(videos_BPHWC, "NPHWC", "contact sheet")
    sheet = ContactSheet(len(videos), videos.shape[1:4], columns, gap, background)
    for row, clip_PHWC in enumerate(videos):
        sheet.draw(row, clip_PHWC)
    return sheet.picture


def grid_video(videos_BPHWC: np.ndarray, columns: int, gap: int = 2, background: int = 255) -> np.ndarray:
    """Clips side by side, `columns` to a row, as one video [P, H', W', 3]; empty cells show the background.

    Raises:
      UserError: the clips are not uint8 [N, P, H, W, 3], or columns, gap or background is out of range.
    """
    return _tile(check_uint8(videos_BPHWC, "NPHWC", "grid video"), columns, gap, background, "grid video")
