"""Clips side by side on a page, all on one clock.

A clip is a strip of its frames (a lossless PNG, or WebP) that CSS steps through: it plays wherever images do, stays as
crisp as the pixels are, can be paused and stepped, and all clips of a wall share one clock, which separate <video>
elements do not.
"""

import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.evaluation.video import check_uint8, data_uri

_STRIP_WIDTH = 8192  # px of a whole strip; larger clips are shown reduced
_QUALITY = 80  # of lossy strips, of 100
_WALL_BYTES = 4_000_000  # of encoded strips; rows beyond it are left out, and the page says so
_CLIP_SIZES = ((160, 850), (96, 560), (96, 330))  # px for a clip, and for a row of them, on wide to narrow screens

WallColumn = tuple[str, int | None, np.ndarray]  # name, network calls, clips


def escaped(value: Any) -> str:
    """A value as text of a page."""
    return html.escape(str(value))


def checked_columns(columns: Sequence[tuple[str, int | None, np.ndarray | None]]) -> list[WallColumn]:
    """Every column that has clips.

    Raises:
      UserError: clips are not uint8 [N, P, H, W, 3] or differ in length or size between columns.
    """
    kept: list[WallColumn] = []
    for name, calls, clips in columns:
        if clips is not None:
            kept.append((name, calls, check_uint8(clips, "NPHWC", f"report: {name}")))
    sizes = {name: clips.shape[1:4] for name, _, clips in kept}
    if len(set(sizes.values())) > 1:
        raise UserError(f"report: all clips need the same frames, height and width, got {sizes}")
    return kept


def _reduction(frames: int, width: int) -> int:
    """The whole factor by which frames are reduced so that their strip is not too wide; 1 for small clips."""
    return -(-frames * width // _STRIP_WIDTH)


def _strip(video_PHWC: np.ndarray, lossy: bool) -> bytes:
    """All frames side by side as a picture [H, P * W], reduced by `_reduction`; rows and columns left over are cut."""
    factor = _reduction(video_PHWC.shape[0], video_PHWC.shape[2])
    height, width = (size // factor for size in video_PHWC.shape[1:3])
    whole = video_PHWC[:, : height * factor, : width * factor].transpose(1, 0, 2, 3).reshape(height * factor, -1, 3)
    image = Image.fromarray(np.ascontiguousarray(whole))
    with io.BytesIO() as buffer:
        image = image.reduce(factor) if factor > 1 else image
        if lossy:
            image.save(buffer, "WEBP", quality=_QUALITY)
        else:
            image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


def wall_of(columns: Sequence[WallColumn], captions: Sequence[str], fps: float, *, lossy: bool = False) -> str:
    """One row per caption, one column per stage, all clips on one clock; `lossy` for clips of natural pictures."""
    if not columns or not captions:
        return ""
    rows: list[str] = []
    spent, kind = 0, "webp" if lossy else "png"
    for n, caption in enumerate(captions):
        strips = [(name, _strip(clips[n], lossy) if n < len(clips) else None) for name, _, clips in columns]
        spent += sum(4 * len(strip) // 3 for _, strip in strips if strip)
        if (spent > _WALL_BYTES and rows) or not any(strip for _, strip in strips):
            break
        cells = "".join(
            f'<img class="clip" alt="{escaped(f"{name}: {caption}")}" src="{data_uri(strip, f"image/{kind}")}">'
            if strip else '<span class="clip"></span>'
            for name, strip in strips
        )  # fmt: skip
        rows.append(f'<div class="row"><p>{escaped(caption)}</p>{cells}</div>')
    frames, height, width = columns[0][2].shape[1:4]
    factor = _reduction(frames, width)
    width, height = width // factor, height // factor
    scales = [max(1, int(min(clip, row / len(columns)) // width)) for clip, row in _CLIP_SIZES]
    values = {"columns": len(columns), "frames": frames, "fps": f"{fps:g}", "clip-w": f"{width}px"}
    values |= {"clip-h": f"{height}px"} | {f"scale-{n}": scale for n, scale in enumerate(scales)}
    style = "; ".join(f"--{name}: {value}" for name, value in values.items())
    notes = ["" if calls is None else f"<small>{counted(calls, 'call')}</small>" for _, calls, _ in columns]
    names = "".join(f"<span>{escaped(name)}{note}</span>" for (name, _, _), note in zip(columns, notes, strict=True))
    note = f"{frames} frames at {fps:g} per second, "
    note += (
        "as they are measured, in smaller pictures."
        if lossy
        else ("pixel for pixel." if factor == 1 else f"reduced {factor} times in width and height.")
    )
    if len(rows) < len(captions):
        note += f" The first {len(rows)} of {len(captions)} captions."
    controls = (
        '<div class="controls" hidden><button type="button">Pause</button>'
        f'<input type="range" min="1" max="{frames}" value="1" aria-label="Frame"><output>1 / {frames}</output></div>'
    )
    return (
        f'<div class="wall" style="{style}">\n<div class="top row names">{controls}{names}</div>'
        f'\n{chr(10).join(rows)}\n</div>\n<p class="note">{note}</p>'
    )
