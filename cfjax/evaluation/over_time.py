"""A long video measured in pieces, one after the other: whether it follows its caption, moves, and keeps its quality.

A piece of a few frames is judged as a clip is (`evaluation.shapes_metrics`), so that a curve over the pieces shows
when a stream that began well stops following, freezes or drifts.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.shapes import Factors, ShapesConfig
from cfjax.evaluation.guard import frame_series
from cfjax.evaluation.shapes_metrics import Table, evaluate_shapes
from cfjax.evaluation.video import to_uint8

OF_FRAMES = ("luma", "saturation", "contrast", "sharpness")
MEANS = ("follows", "shape_correct", "colour_correct", "direction_correct", "all_correct", "step", "residual")


def pieces(frames: int, length: int) -> list[slice]:
    """A video's frames in pieces of `length`; a last one that is shorter is left out.

    Raises:
      UserError: a piece has fewer than two frames, or more than the video.
    """
    if not 2 <= length <= frames:
        raise UserError(f"pieces of {length} frames: use 2 or more, at most the video's {frames}")
    return [slice(start, start + length) for start in range(0, frames - length + 1, length)]


def judge_pieces(
    video_BPHWC: np.ndarray, factors: Sequence[Factors], config: ShapesConfig, length: int
) -> dict[str, np.ndarray]:
    """Means over the clips of each piece, by name, [pieces].

    Args:
      video_BPHWC: float32 in [-1, 1].
      factors: asked of each clip, all along.
      length: frames of a piece.

    Returns:
      frame, the piece's first; shape_correct, colour_correct, direction_correct, all_correct and `follows` (shape,
      colour and presence: the direction is judged on its own, since a world's edge may bar it), shares of the
      clips; step, length of a frame's move in px; residual, pixel error of the best explanation; luma, saturation,
      contrast and sharpness as in `guard.measure_clip`.

    Raises:
      UserError: see `pieces` and `evaluate_shapes`.
    """
    parts = pieces(video_BPHWC.shape[1], length)
    rows = [_judged(video_BPHWC[:, part], factors, config) for part in parts]
    found = {name: np.array([row[name] for row in rows]) for name in MEANS}
    series = [frame_series(to_uint8(clip)) for clip in video_BPHWC]
    for name in OF_FRAMES:
        over = np.mean([one[name] for one in series], axis=0)
        found[name] = np.array([over[part].mean() for part in parts])
    return {"frame": np.array([part.start for part in parts]), **found}


def follows(clips: Table) -> np.ndarray:
    """Which clips of `evaluate_shapes(...)["clips"]` show the shape and the colour that were asked for, [B]."""
    right: np.ndarray = clips["shape_correct"] & clips["colour_correct"] & clips["presence"]
    return right


def _judged(video_BPHWC: np.ndarray, factors: Sequence[Factors], config: ShapesConfig) -> dict[str, float]:
    clips = cast(Table, evaluate_shapes(video_BPHWC, factors, config)["clips"])
    return {name: float(np.mean(follows(clips) if name == "follows" else clips[name])) for name in MEANS}


def drift(series: np.ndarray) -> float:
    """The mean of a series' last third, less that of its first."""
    third = max(1, len(series) // 3)
    return float(np.mean(series[-third:]) - np.mean(series[:third]))
