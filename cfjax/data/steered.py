"""Moving shapes that are steered: the arrow keys held in each frame move the shape, so its future is not in its past.

A clip's keys are a random process: on either axis one of its two keys, none or both are held for a random number of
frames. A shape moves by `speed` along each axis whose keys do not cancel, and stops at the edges of the frame, which it
never leaves. Captions name colour and shape; the direction that half of them also have says nothing about the path.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.shapes import DIRECTIONS, Factors, ShapesConfig, limits

KEYS = ("left", "right", "up", "down")
MOVES = np.array([DIRECTIONS[key] for key in KEYS], np.float32)  # of each key, (x, y)


@dataclass(frozen=True)
class SteeringConfig:
    """How clips are steered.

    Attributes:
      speed: pixels per frame, of each axis.
      held: least and greatest number of frames that an axis keeps its keys.
      still: chance that an axis has no key held.  both: chance that it has both, which cancel.
      silent: share of captions without a direction.
    """

    speed: float = 1.5
    held: tuple[int, int] = (1, 8)
    still: float = 0.35
    both: float = 0.05
    silent: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.held[0] <= self.held[1]:
            raise UserError(f"data.steering.held={self.held}: use 1 <= least <= greatest")
        if not self.speed > 0 or min(self.still, self.both) < 0 or self.still + self.both > 1:
            raise UserError("data.steering: speed must be positive, still and both chances that add up to 1 or less")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {**asdict(self), "held": list(self.held)}


def draw_keys(steering: SteeringConfig, frames: int, rng: np.random.Generator) -> np.ndarray:
    """The keys held in each frame, float32 [F, 4], in the order of `KEYS`."""
    keys = np.zeros((frames, 4), np.float32)
    move = (1 - steering.still - steering.both) / 2
    for axis in range(2):
        frame = -int(rng.integers(steering.held[1]))  # the clip begins somewhere in a hold
        while frame < frames:
            count = int(rng.integers(steering.held[0], steering.held[1] + 1))
            pair = ((0, 0), (1, 1), (1, 0), (0, 1))[rng.choice(4, p=[steering.still, steering.both, move, move])]
            keys[max(frame, 0) : max(frame + count, 0), 2 * axis : 2 * axis + 2] = pair
            frame += count
    return keys


def steer(start: np.ndarray, keys_FA: np.ndarray, speed: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The centres (x, y) of frames 0 to F, float32 [F, 2]: those of frame 0 are the start, whatever is held there."""
    centres = [np.asarray(start, np.float32)]
    for keys in keys_FA[1:]:
        centres.append(np.clip(centres[-1] + speed * (keys @ MOVES), low, high).astype(np.float32))
    return np.stack(centres)


def draw_steered(config: ShapesConfig, steering: SteeringConfig, rng: np.random.Generator) -> Factors:
    """All factors of one clip, as `shapes.draw_factors` has them, with keys float32 [1, P, 4] and silent bool [1].

    Raises:
      UserError: a world of two objects.
    """
    if config.num_objects != 1:
        raise UserError(f"shapes.num_objects={config.num_objects}: keys steer one object")
    pick = lambda options: options[rng.integers(len(options))]
    shape, colour, direction = pick(config.shapes), pick(config.colours), pick(config.directions)
    radius = rng.uniform(*config.radius)
    low, high = limits(shape, radius, config.size)
    keys = draw_keys(steering, config.frames, rng)
    centres = steer(rng.uniform(low, high), keys, steering.speed, low, high)
    return {
        "shape": np.array([shape]),
        "colour": np.array([colour]),
        "direction": np.array([direction]),
        "speed_word": np.array([""]),
        "speed": np.array([steering.speed], np.float32),
        "radius": np.array([radius], np.float32),
        "centres": centres[None],
        "keys": keys[None],
        "silent": np.array([rng.uniform() < steering.silent]),
    }


def spoken(text: str, *, silent: bool) -> str:
    """The caption, or the part of it before its direction."""
    return text.split(" moving ")[0] if silent else text


def keys_asked(captions: Sequence[str], frames: int) -> np.ndarray:
    """Keys that move a shape as its caption says, from the first frame to the last, [B, F, 4]; none for others."""
    rows = [[float(key in text.split(" moving ")[-1].split("-")) for key in KEYS] for text in captions]
    return np.repeat(np.array(rows, np.float32)[:, None], frames, axis=1)


def parse_keys(text: str, frames: int) -> np.ndarray:
    """Keys of every frame, float32 [F, 4], from "right*6, up+left*3, none*2": what is held for so many frames.

    The last ones are held to the end.

    Raises:
      UserError: it is not of that form, or there is no such key.
    """
    rows: list[np.ndarray] = []
    for part in text.split(","):
        names, _, count = part.strip().partition("*")
        if not names or not (count or "1").strip().isdecimal() or not int(count or 1):
            raise UserError(f"actions={text!r}: write KEYS*FRAMES, ..., as right*6, up+left*3, none*2")
        held = [] if names.strip() == "none" else [name.strip() for name in names.split("+")]
        rows += [as_keys(held)] * min(int(count or 1), frames)
    return np.stack([*rows, *[rows[-1]] * frames])[:frames]


def as_keys(held: Sequence[str], names: Sequence[str] = KEYS) -> np.ndarray:
    """A row of keys, float32 [A], 1 where its name is held.

    Raises:
      UserError: there is no such key.
    """
    if unknown := [name for name in held if name not in names]:
        raise UserError(f"keys: {unknown[0]!r} is none; there are {', '.join(names)}")
    return np.array([float(name in held) for name in names], np.float32)
