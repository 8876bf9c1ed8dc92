"""What is measured of each frame and of each step between frames, and what a whole clip's series say.

Everything is summed as frames arrive; what is kept of a frame are a few numbers and two pictures of 16 x 16.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cfjax.evaluation.opencv import opencv

LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709, on gamma-encoded RGB, as in `evaluation.guard`
SERIES = ("luma", "saturation", "contrast", "sharpness")
FROZEN = 0.25  # grey levels of 255: a step with less mean change is a still picture, as in `evaluation.guard`
SMALL = 16  # px a side of the pictures that are kept
KEPT = 8  # frames of a clip that clips of other seeds are compared with
LOOP_STEPS = 4  # frames of the shortest period
LOOP_REST = 0.1  # of the largest distance in between: what two frames a period apart may differ by

Frame = np.ndarray
Values = dict[str, float]


def luma_of(frame_HWC: Frame) -> np.ndarray:
    """BT.709 luma of a uint8 RGB frame, float32 [H, W], 0 to 255."""
    luma: np.ndarray = opencv().transform(frame_HWC.astype(np.float32), np.array([LUMA], np.float32))
    return luma


class FlickerMeter:
    """VBench's temporal flickering (vbench/temporal_flickering.py): (255 - mean of the steps' mean |difference|) / 255.

    Attributes:
      differences: mean absolute difference of each step, grey levels of 255, over all pixels and channels.
    """

    def __init__(self) -> None:
        self.differences: list[float] = []
        self._before: Frame | None = None

    def add(self, frame_HWC: Frame) -> None:
        """Takes the next frame, uint8."""
        if self._before is not None:
            cv2 = opencv()
            self.differences.append(float(cv2.norm(frame_HWC, self._before, cv2.NORM_L1)) / frame_HWC.size)
        self._before = frame_HWC

    def values(self) -> Values:
        """temporal_flickering; NaN for a single frame."""
        return {"temporal_flickering": (255.0 - _mean(self.differences)) / 255.0}


class FrameMeter:
    """Luma, saturation, contrast and sharpness of each frame, and two small pictures, for loops and for other seeds."""

    def __init__(self) -> None:
        self.series: dict[str, list[float]] = {name: [] for name in SERIES}
        self._grey: list[np.ndarray] = []
        self._colour: list[np.ndarray] = []

    def add(self, frame_HWC: Frame, luma_HW: np.ndarray) -> None:
        """Takes the next frame with its `luma_of`."""
        cv2: Any = opencv()
        mean, deviation = cv2.meanStdDev(luma_HW)
        self.series["luma"].append(float(mean[0, 0]) / 255)
        self.series["contrast"].append(float(deviation[0, 0]) / 255)
        self.series["saturation"].append(cv2.mean(cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2HSV))[1] / 255)
        inner = cv2.Laplacian(luma_HW, cv2.CV_32F)[1:-1, 1:-1]
        self.series["sharpness"].append(float(cv2.meanStdDev(inner)[1][0, 0]) / 255 if inner.size else math.nan)
        self._grey.append(cv2.resize(luma_HW, (SMALL, SMALL), interpolation=cv2.INTER_AREA))
        self._colour.append(cv2.resize(frame_HWC, (SMALL, SMALL), interpolation=cv2.INTER_AREA))

    def values(self, fps: float) -> Values:
        """Means of the series, their drifts per second, and `loop`."""
        out = {name: _mean(series) for name, series in self.series.items()}
        out |= {f"{name}_drift": drift_per_second(series, fps) for name, series in self.series.items()}
        return out | loop(np.stack(self._grey).reshape(len(self._grey), -1), fps)

    def small(self) -> np.ndarray:
        """`KEPT` frames, spread evenly from the first to the last, uint8 [8, 16, 16, 3]."""
        return np.stack([self._colour[i] for i in np.linspace(0, len(self._colour) - 1, KEPT).round().astype(int)])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def drift_per_second(series: Sequence[float], fps: float) -> float:
    """Slope of the least-squares line through a series; NaN for a single frame."""
    if len(series) < 2:
        return math.nan
    return float(np.polyfit(np.arange(len(series)) / fps, series, 1)[0])


def freeze(differences: Sequence[float], fps: float) -> Values:
    """Still pictures within a clip.

    Returns:
      frozen, the share of steps that change less than `FROZEN` grey levels; longest_freeze, in seconds.
    """
    longest = run = 0
    still = [difference < FROZEN for difference in differences]
    for one in still:
        run = run + 1 if one else 0
        longest = max(longest, run)
    return {"frozen": _mean(still), "longest_freeze": longest / fps if still else math.nan}


def boundaries(frames: int, block: int, first: int = 0) -> np.ndarray:
    """The steps that lead from one block into the next: step p leads from frame p to p + 1.

    Args:
      block: frames of a block.  first: frames of the first one; 0 for the same.
    """
    return np.arange(first or block, frames, block) - 1


def seams(differences: Sequence[float], luma: Sequence[float], at: np.ndarray) -> Values:
    """How much more a clip changes from block to block than within blocks: 1 is no seam; NaN where nothing moves.

    Args:
      luma: mean luma of each frame; () for none.  at: see `boundaries`.

    Returns:
      seam, mean difference of the steps `at` over that of the others; seam_luma, the same of mean luma's change.
    """
    changes = {"seam": np.asarray(differences), "seam_luma": np.abs(np.diff(luma))}
    out = {}
    for name, change in changes.items():
        crossing = np.isin(np.arange(len(change)), at)
        apart = bool(crossing.any()) and not crossing.all()
        inside = float(change[~crossing].mean()) if apart else 0.0
        out[name] = float(change[crossing].mean()) / inside if inside > 0 else math.nan
    return out


def loop(series_PC: np.ndarray, fps: float) -> Values:
    """Whether a clip comes round again, by the root mean square distance D(k) of frames that are k frames apart.

    A loop has the shortest period k, of at least `LOOP_STEPS` frames and seen at least half a time more, with D(k) at
    most a tenth of the largest D below k, and no larger than its neighbours. That largest D must be a change at all
    (`FROZEN`). D is computed for all k at once by the Fourier transform along time.

    Args:
      series_PC: each frame as a few numbers, grey levels.

    Returns:
      loop, 1 or 0; loop_period in seconds, NaN where there is none.
    """
    count = len(series_PC)
    found = {"loop": 0.0, "loop_period": math.nan}
    furthest = 2 * count // 3
    if furthest <= LOOP_STEPS:
        return found
    distance = _distances(series_PC.astype(np.float64))
    largest = np.maximum.accumulate(distance)
    for lag in range(LOOP_STEPS, furthest):
        before = largest[lag - 1]
        lowest = distance[lag] <= min(distance[lag - 1], distance[lag + 1])
        if before > FROZEN and distance[lag] <= LOOP_REST * before and lowest:
            return {"loop": 1.0, "loop_period": lag / fps}
    return found


def _distances(series_PC: np.ndarray) -> np.ndarray:
    """sqrt(mean over t and dimensions of (s[t + k] - s[t])^2) for every k, [P]."""
    count, width = series_PC.shape
    series_PC = series_PC - series_PC.mean(0)
    power = np.zeros(count)
    size = 2 * count
    for column in series_PC.T:
        transform = np.fft.rfft(column, size)
        power += np.fft.irfft(np.abs(transform) ** 2, size)[:count]
    squares = np.concatenate([[0.0], np.cumsum((series_PC**2).sum(1))])
    lags = np.arange(count)
    total = squares[count - lags] + (squares[count] - squares[lags]) - 2 * power
    return np.sqrt(np.maximum(total, 0.0) / ((count - lags) * width))
