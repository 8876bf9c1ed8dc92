"""Videos of a world whose objects turn without notice: how they go on from clean first frames, against what could come.

A clip's first frames show heading, speed, size and start, and not whether, when or to which side the object turns; the
chances of that are known exactly (`data.shapes.possible_paths`). So generated futures of one past can be held against
the law of its real futures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.shapes import DIRECTIONS, Factors, ShapesConfig, possible_paths, render
from cfjax.evaluation.shapes_metrics import measure_shapes

Table = dict[str, np.ndarray]

TAIL = 2  # last steps, which are behind every turn
HALF_TURN = 0.5  # sideways part of the last steps from which a video counts as turned, in speeds
OFF = 0.35  # distance of the last steps from straight on, left and right, from which it is none of them, in speeds


@dataclass(frozen=True)
class Past:
    """The clean first frames of a clip, and what may come after them.

    Attributes:
      video_PHWC: the clip itself, of which `given` frames are shown.
      centres_KP2: every path that begins so, in px; the first one does not turn.  chance_K: of each.
    """

    caption: str
    factors: Factors
    video_PHWC: np.ndarray
    centres_KP2: np.ndarray
    chance_K: np.ndarray

    @property
    def turns(self) -> float:
        """The chance of a turn."""
        return float(1.0 - self.chance_K[0])


def pasts_of(clips: Sequence[dict[str, Any]], config: ShapesConfig) -> list[Past]:
    """The pasts of some clips of a world; see `possible_paths`."""
    return [
        Past(clip["caption"], clip["factors"], clip["video_PHWC"], *possible_paths(config, clip["factors"]))
        for clip in clips
    ]


def first_turned(config: ShapesConfig) -> int:
    """The first frame that shows a turn in some clip."""
    return config.head_frames


def real_futures(past: Past, config: ShapesConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """Clips [count, P, H, W, 3] that begin like `past`, drawn from the exact law of what may follow."""
    chosen = rng.choice(len(past.chance_K), count, p=past.chance_K)
    drawn = {k: render({**past.factors, "centres": past.centres_KP2[k][None]}, config) for k in set(chosen.tolist())}
    return np.stack([drawn[k] for k in chosen.tolist()])


def gradient_energy(video_BPHWC: np.ndarray) -> np.ndarray:
    """Sum of the squared differences of neighbouring pixels, [B, P]: halves where a frame is the mean of two places."""
    video = np.asarray(video_BPHWC, np.float64)
    return sum(np.square(np.diff(video, axis=axis)).sum(axis=(2, 3, 4)) for axis in (2, 3))


def measure_turns(
    video_BPHWC: np.ndarray, factors_list: Sequence[Factors], config: ShapesConfig, *, given: int
) -> Table:
    """Measurements of videos whose first `given` frames are a real clip's, with a leading clip axis B.

    centres [B, P, 2] (px).  motion: mean length of the steps after the given frames, over the clip's speed (1 in data,
    with or without a turn).  turned: whether the last two steps go sideways by more than half of the speed.  between:
    whether they are none of straight on, left and right, by more than 0.35 of the speed from each; 0 in data.
    sharpness [B, P - given]: gradient energy over that of the same video's given frames; 1 for a frame as crisp as
    these, one half for a mean of two places that do not overlap.

    Raises:
      UserError: fewer than two given frames, or no two steps after the last turn.
    """
    frames = config.frames
    if not 2 <= given <= first_turned(config) or frames - given <= TAIL:
        raise UserError(
            f"given={given}: use 2 to {min(first_turned(config), frames - TAIL - 1)} frames before any turn"
        )
    centres = measure_shapes(video_BPHWC, config)["centres"]
    speed = np.array([float(f["speed"][0]) for f in factors_list])
    ahead = np.array([DIRECTIONS[str(f["direction"][0])] for f in factors_list])
    right = np.stack([-ahead[:, 1], ahead[:, 0]], axis=-1)
    steps = np.diff(centres, axis=1) / speed[:, None, None]
    tail = steps[:, -TAIL:].mean(axis=1)
    on, aside = (tail * ahead).sum(-1), (tail * right).sum(-1)
    corners = np.array([(1.0, 0.0), (0.0, 1.0), (0.0, -1.0)])
    apart = np.linalg.norm(np.stack([on, aside], axis=-1)[:, None] - corners[None], axis=-1).min(axis=1)
    energy = gradient_energy(video_BPHWC)
    return {
        "centres": centres,
        "motion": np.linalg.norm(steps[:, given - 1 :], axis=-1).mean(axis=1),
        "turned": np.abs(aside) > HALF_TURN,
        "between": apart > OFF,
        "sharpness": energy[:, given:] / energy[:, :given].mean(axis=1, keepdims=True),
    }
