"""Generation requests: prompts from a flag or a file, and the picture, video or latents that a video begins with."""

import re
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.data.archives import read_archive
from cfjax.data.captions import Columns, caption_of
from cfjax.data.pictures import ClipFormat, Unusable, fit_picture, read_picture, to_float
from cfjax.data.tables import TEXT, Row, read_table
from cfjax.data.video import read_clip, read_end, video_span

OPTIONAL = ("seed", "image")  # columns of a prompt file besides the prompts
LATENTS = (".npz", ".safetensors")
SLUG = 48  # characters of a prompt that its file's name keeps
MAX_SEED = 2**32 - 1
EMPTY = "prompt is empty; give --config.prompt='a red circle moving left'"


@dataclass(frozen=True)
class Request:
    """One video: its prompt, its seed, and its first picture ("" for none); `place` is its row in the file."""

    prompt: str
    seed: int
    image: str = ""
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError(EMPTY)
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed={self.seed}: use 0 to {MAX_SEED}")

    def slug(self) -> str:
        """Prompt and seed as part of a file name: ASCII letters and digits, and a checksum if anything was dropped."""
        plain = unicodedata.normalize("NFKD", self.prompt).encode("ascii", "ignore").decode().lower()
        words = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")
        kept = words[:SLUG].rstrip("_")
        if kept != words or not self.prompt.isascii():
            kept = f"{kept}_{zlib.crc32(self.prompt.encode()):08x}".lstrip("_")
        return f"{kept}_seed{self.seed}"


def read_requests(
    prompt: str,
    file: str,
    *,
    image: str = "",
    seed: int = 0,
    seeds: tuple[int, ...] = (),
    videos: int = 1,
    columns: Columns = Columns(),
    encoding: str = "",
) -> list[Request]:
    """One request per prompt and video.

    Args:
      prompt: one prompt, or several separated by `|`; ignored when `file` is given.
      file: a table (`data.tables`) of prompts, and perhaps of seeds and images.
      image: the picture that every video without its own begins with.
      seed: the i-th video of a prompt gets seed + i, unless its line has a seed to count from.
      seeds: the seeds of every prompt's videos, in place of `seed` and `videos`.
      videos: of each prompt.
      columns: how the table is read.  encoding: of a text file that is not UTF-8.

    Raises:
      UserError: no prompts, a broken file or line.
    """
    texts = [text.strip() for text in prompt.split("|") if text.strip()]
    plain = [_PromptRow(text, place=f"prompt {number}") for number, text in enumerate(texts, 1)]
    rows = list(_prompt_rows(Path(file), columns, encoding)) if file else plain
    if not rows:
        raise UserError(f"{file}: no prompts in it" if file else EMPTY)
    if videos < 1:
        raise UserError(f"videos={videos}: use 1 or more")
    out = []
    for row in rows:
        base = seed if row.seed is None else row.seed
        own = seeds if seeds and row.seed is None else tuple(range(base, base + videos))
        out += [Request(row.prompt, s, row.image or image, row.place) for s in own]
    return out


@dataclass(frozen=True)
class _PromptRow:
    """A row of a prompt file."""

    prompt: str
    seed: int | None = None
    image: str = ""
    place: str = ""


def _prompt_rows(file: Path, columns: Columns, encoding: str) -> Iterator[_PromptRow]:
    """The rows of a prompt file, without the blank lines of a .txt.

    Unknown columns are an error, as they may be misspelt ones, unless the prompts' column is named.
    """
    for row in read_table(file, encoding):
        if file.suffix.lower() == ".txt" and not row.values[TEXT].strip():
            continue
        column = columns.of(file, row, clips=False)["caption"]
        if not columns.caption and (other := [name for name in row.values if name not in (column, *OPTIONAL)]):
            known = f"{column}, {' and '.join(OPTIONAL)} are read"
            raise UserError(
                f"{file}, {row.place}: unknown column {other[0]!r}; {known}, and others with "
                f"--config.prompt_column={column} passed over"
            )
        try:
            prompt = caption_of(row.values[column], columns.choice)
        except Unusable as error:
            raise UserError(f"{file}, {row.place}: {error}") from None
        yield _PromptRow(prompt, _seed(file, row), _beside(file, row.values.get("image")), row.place)


def _seed(file: Path, row: Row) -> int | None:
    value = row.values.get("seed")
    if value is None or value == "":
        return None
    try:
        number = float(value) if isinstance(value, str) else value
        if isinstance(value, bool) or number != int(number):
            raise ValueError
        seed = int(number)  # spreadsheets write 42.0
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{file}, {row.place}: seed={value!r} is no whole number") from None
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{file}, {row.place}: seed={seed}: use 0 to {MAX_SEED}")
    return seed


def _beside(file: Path, picture: Any) -> str:
    """The path of a row's picture: relative ones are tried beside the file, then in the current folder."""
    if not picture:
        return ""
    beside = file.parent / str(picture)
    return str(picture) if not beside.exists() and Path(str(picture)).exists() else str(beside)


def read_image(path: str | Path, height: int, width: int, fit: str = "cover") -> np.ndarray:
    """A picture as a clip of one frame, float32 [1, H, W, 3] in [-1, 1].

    Args:
      fit: "cover" scales and crops evenly; "stretch" ignores the aspect ratio (see `ClipFormat`).

    Raises:
      UserError: it cannot be read.
    """
    try:
        picture = read_picture(path)
    except Unusable as error:
        raise UserError(f"image={str(path)!r}: cannot read the picture ({error})") from None
    return to_float(fit_picture(picture, _format(1, height, width, 1.0, fit))[None])


def read_video_end(
    path: str | Path, frames: int, height: int, width: int, fps: float, fit: str = "cover"
) -> np.ndarray:
    """The last `frames` frames of a video sampled at `fps`, float32 [P, H, W, 3] in [-1, 1].

    Raises:
      UserError: it cannot be read, or is shorter.
    """
    try:
        return to_float(read_end(path, _format(frames, height, width, fps, fit)))
    except Unusable as error:
        raise UserError(f"video={str(path)!r}: {error}") from None


def read_video_start(
    path: str | Path, frames: int, height: int, width: int, fps: float, fit: str = "cover"
) -> np.ndarray:
    """The first `frames` frames of a video, as `read_video_end`.

    Raises:
      UserError: it cannot be read, or is shorter.
    """
    available = video_frames(path, fps)
    if available < frames:
        raise UserError(
            f"video={str(path)!r} has {counted(available, 'frame')} at {fps:g} per second, fewer than frames={frames}"
        )
    try:
        return to_float(read_clip(path, _format(frames, height, width, fps, fit)))
    except Unusable as error:
        raise UserError(f"video={str(path)!r}: {error}") from None


def video_frames(path: str | Path, fps: float) -> int:
    """How many frames a video has, up to its last one, when it is sampled at `fps`.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return video_span(path).count(fps)
    except Unusable as error:
        raise UserError(f"video={str(path)!r}: {error}") from None


def _format(frames: int, height: int, width: int, fps: float, fit: str) -> ClipFormat:
    return ClipFormat(frames, height, width, fps, fit, max_crop=1.0, upscale=True)


def read_latents(path: str | Path) -> np.ndarray:
    """latents_FHWC, float32, of a .safetensors or .npz file with one array [F, H, W, C] (as `cfjax generate` writes).

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    try:
        if Path(path).suffix == ".npz":
            arrays = read_archive(path)
        else:
            arrays = load_file(path)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"video={str(path)!r}: cannot read the latents ({error})") from None
    if len(arrays) != 1 or next(iter(arrays.values())).ndim != 4:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise UserError(f"video={str(path)!r}: needs one array [F, H, W, C], found {found or 'none'}")
    latents = next(iter(arrays.values()))
    if latents.dtype == np.dtype("V2"):  # NumPy saves bfloat16, which it has no name for, as two plain bytes
        latents = latents.view(ml_dtypes.bfloat16)
    if latents.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise UserError(f"video={str(path)!r}: holds {latents.dtype}, no floating-point latents")
    latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise UserError(f"video={str(path)!r}: holds latents that are not finite")
    return latents
