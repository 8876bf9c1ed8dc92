"""The numbers of a report: one row for real data, the codec's round trip and every stage, one column per measurement.

`metrics_table` is what metrics.json holds; `COLUMNS` defines how the page shows each number and which value is best.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cfjax.core.errors import UserError

Row = dict[str, float | str | None]


@dataclass(frozen=True)
class StageReport:
    """One stage of the pipeline, as the page shows it; None and empty fields leave their place out.

    Args:
      key: "teacher", "ar", "ode", "dmd", or another short name; unique within a report.
      brief: the name for a narrow column, by default the title.
      text: one or two sentences on what this stage is.
      videos: uint8 [N, P, H, W, 3], clip n made for caption n; trailing clips may be missing.
      summary: `evaluate_shapes(...)["summary"]` of this stage's clips.
      network_calls: calls of the diffusion network for one video.
      frames_per_second: generated frames per second of wall time.
      curves: metric name -> (step, value) points.
      command: the command line that ran this stage.
    """

    key: str
    title: str
    brief: str = ""
    text: str = ""
    videos: np.ndarray | None = None
    summary: Mapping[str, float] = field(default_factory=dict)
    network_calls: int | None = None
    frames_per_second: float | None = None
    train_seconds: float | None = None
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    command: str = ""

    @property
    def short(self) -> str:
        """The name for a narrow column."""
        return self.brief or self.title


def percent(value: float) -> str:
    """0.981 -> 98.1 %."""
    return f"{100 * value:.1f}\u202f%"


def number(value: float) -> str:
    """About three digits, without an exponent where that is readable."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    if size >= 0.01 or size == 0:
        return f"{value:.3f}"
    return f"{value:.4f}" if size >= 0.001 else f"{value:.1e}"


def times(value: float) -> str:
    """A ratio: 3.2x, 25x."""
    return f"{value:,.0f}\u00d7" if value >= 10 else f"{value:.1f}\u00d7"


@dataclass(frozen=True)
class Column:
    """A column of the metrics table; the best value minimises `distance` (None: no value is best)."""

    key: str
    title: str
    unit: str
    help: str
    show: Callable[[float], str] = number
    distance: Callable[[float], float] | None = None


def _more(value: float) -> float:
    return -value


def _less(value: float) -> float:
    return value


def _like_real(value: float) -> float:
    return abs(math.log(value)) if value > 0 else math.inf


COLUMNS = (
    Column("all_correct", "Caption", "all correct", "shape, colour and direction all as captioned", percent, _more),
    Column("shape_correct", "Shape", "correct", "the shape that best explains the pixels is the captioned one",
           percent, _more),
    Column("colour_correct", "Colour", "correct", "the nearest colour of the palette is the captioned one",
           percent, _more),
    Column("direction_correct", "Direction", "correct", "the net motion is nearest to the captioned direction",
           percent, _more),
    Column("speed_correct", "Speed", "correct", "the speed is nearest to the captioned word", percent, _more),
    Column("presence", "Presence", "whole clip", "the object is visible, at about its proper size, in every frame",
           percent, _more),
    Column("step", "Motion", "px/frame", "mean length of the object's move from frame to frame",
           lambda value: f"{value:.2f}"),
    Column("step_ratio", "Motion", "of real", "the same, relative to real clips; below 1 is too still",
           lambda value: f"{value:.2f}\u00d7", _like_real),
    Column("jerkiness", "Jerkiness", "px", "mean length of the second difference of the object's path", number, _less),
    Column("residual", "Residual", "rms", "pixel error that the best synthetic explanation leaves, in [-1, 1] units",
           number, _less),
    Column("network_calls", "Network", "calls/video", "calls of the diffusion network for one video",
           lambda value: f"{value:,.0f}", _less),
    Column("frames_per_second", "Frames", "per second", "generated frames per second on this machine", number, _more),
)  # fmt: skip


def plain(value: Any) -> Any:
    """The value as JSON can hold it: no numpy, no NaN or infinity, mappings as dicts, anything else as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def get(row: Row | None, key: str) -> float | None:
    """The number under `key`; None if it, or the row, is missing."""
    value = (row or {}).get(key)
    return None if isinstance(value, str) else value


def metrics_table(
    real_summary: Mapping[str, float] | None,
    codec_summary: Mapping[str, float] | None,
    stages: Sequence[StageReport],
) -> dict[str, Row]:
    """Rows "real", "codec" and the stages by key: title, every `COLUMNS` key (None where unknown), interval bounds.

    Raises:
      UserError: two stages have the same key, or one is called "real" or "codec".
    """
    keys = ["real", "codec", *(stage.key for stage in stages)]
    if len(set(keys)) != len(keys):
        raise UserError(f"report: stage keys {keys[2:]} must be distinct, and not real or codec")
    sources: dict[str, tuple[str, Mapping[str, Any]]] = {}
    if real_summary:
        sources["real"] = ("Real data", real_summary)
    if codec_summary:
        sources["codec"] = ("Codec round trip", codec_summary)
    for stage in stages:
        extra = {"network_calls": stage.network_calls, "frames_per_second": stage.frames_per_second}
        sources[stage.key] = (stage.title, {**stage.summary, **extra, "train_seconds": stage.train_seconds})
    real_step = (real_summary or {}).get("step")
    table: dict[str, Row] = {}
    for key, (title, values) in sources.items():
        row: dict[str, Any] = {"title": title}
        for column in COLUMNS:
            row[column.key] = values.get(column.key)
            bounds = {f"{column.key}_{end}": values.get(f"{column.key}_{end}") for end in ("low", "high")}
            row |= {name: bound for name, bound in bounds.items() if bound is not None}
        if real_step and row["step"] is not None:
            row["step_ratio"] = row["step"] / real_step
        row["train_seconds"] = values.get("train_seconds")
        table[key] = plain(row)
    return table
