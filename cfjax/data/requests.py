"""What a user asks for: prompts from a flag or a file, and the picture, video or latents that a video begins with."""

import csv
import json
import re
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cfjax.core.errors import UserError
from cfjax.data.pictures import ClipFormat, Unusable, fit_picture, read_picture, to_float
from cfjax.data.video import read_end, video_span

FIELDS = ("prompt", "seed", "image")
LATENTS = (".npz", ".safetensors")
SLUG = 48  # characters of a prompt that its file's name keeps
MAX_SEED = 2**32 - 1
EMPTY = "prompt is empty; give --config.prompt='a red circle moving left'"


@dataclass(frozen=True)
class Request:
    """One video: its prompt, its seed, and the picture that it begins with ("" for none)."""

    prompt: str
    seed: int
    image: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError(EMPTY)
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed={self.seed}: use 0 to {MAX_SEED}")

    def slug(self) -> str:
        """Prompt and seed as part of a file's name: ASCII letters and digits; a checksum stands for what is lost."""
        plain = unicodedata.normalize("NFKD", self.prompt).encode("ascii", "ignore").decode().lower()
        words = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")
        kept = words[:SLUG].rstrip("_")
        if kept != words or not self.prompt.isascii():
            kept = f"{kept}_{zlib.crc32(self.prompt.encode()):08x}".lstrip("_")
        return f"{kept}_seed{self.seed}"


def read_requests(
    prompt: str, file: str, *, image: str = "", seed: int = 0, seeds: tuple[int, ...] = (), videos: int = 1
) -> list[Request]:
    """One request per prompt and video.

    Args:
      prompt: one prompt, or several separated by `|`; ignored when `file` is given.
      file: .txt with a prompt per line, .jsonl or .csv with the fields prompt, seed, image (the last two are optional).
      image: the picture that every video without its own begins with.
      seed: the i-th video of a prompt gets seed + i, unless its line has a seed to count from.
      seeds: the seeds of every prompt's videos, in place of `seed` and `videos`.
      videos: of each prompt.

    Raises:
      UserError: no prompts, a broken file or line.
    """
    rows = read_prompts(file) if file else [{"prompt": text.strip()} for text in prompt.split("|") if text.strip()]
    if not rows:
        raise UserError(f"{file}: no prompts" if file else EMPTY)
    if videos < 1:
        raise UserError(f"videos={videos}: use 1 or more")
    out = []
    for row in rows:
        base = int(row.get("seed", seed))
        own = seeds if seeds and "seed" not in row else tuple(range(base, base + videos))
        out += [Request(row["prompt"], s, row.get("image") or image) for s in own]
    return out


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a prompt file, each with "prompt" and perhaps "seed" and "image" (see `read_requests`)."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={str(path)!r}: cannot read it ({error})") from None
    if file.suffix == ".jsonl":
        rows = [_json_row(file, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif file.suffix == ".csv":
        rows = [dict(row) for row in csv.DictReader(text.splitlines())]
    elif file.suffix == ".txt":
        rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    else:
        raise UserError(f"prompts={str(path)!r}: use a .txt, .jsonl or .csv file")
    return [_checked(file, n, row) for n, row in enumerate(rows, 1)]


def _json_row(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}, line {number}: not JSON ({error})") from None


def _checked(file: Path, number: int, row: Any) -> dict[str, Any]:
    """A row with known fields only, empty ones left out."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or set(row) - set(FIELDS):
        raise UserError(f"{file}, row {number}: needs a prompt, and may have {' and '.join(FIELDS[1:])}; nothing else")
    kept = {key: value for key, value in row.items() if value not in ("", None)}
    try:
        return {**kept, "seed": int(kept["seed"])} if "seed" in kept else kept
    except (ValueError, TypeError):
        raise UserError(f"{file}, row {number}: seed={kept['seed']!r} is no whole number") from None


def read_image(path: str | Path, height: int, width: int, fit: str = "cover") -> np.ndarray:
    """A picture as a clip of one frame, float32 [1, H, W, 3] in [-1, 1].

    Args:
      fit: "cover" scales and cuts evenly; "stretch" ignores the proportions, as the PyTorch reference does.

    Raises:
      UserError: it cannot be read.
    """
    try:
        picture = read_picture(path)
    except Unusable as error:
        raise UserError(f"image={str(path)!r}: {error}") from None
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
            with np.load(path) as archive:
                arrays = {name: archive[name] for name in archive.files}
        else:
            arrays = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"video={str(path)!r}: cannot read the latents ({error})") from None
    if len(arrays) != 1 or next(iter(arrays.values())).ndim != 4:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise UserError(f"video={str(path)!r}: needs one array [F, H, W, C], found {found or 'none'}")
    return next(iter(arrays.values())).astype(np.float32)
