"""Moving shapes with captions: a procedural video source whose every factor is known exactly.

One or two soft-edged shapes move over a plain background. A clip is a pure function of (config, seed, index), so any
process can draw any record, and `render` draws a clip again from its factors, which evaluation uses for analysis by
synthesis. With `branching` the object may turn left or right at a random moment, so the future is uncertain
given the past; the caption always gives the initial heading.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cfjax.core.errors import UserError
from cfjax.core.schema import checked, flag, number, row, several, table, text, whole

Factors = dict[str, np.ndarray]

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.9, -0.7, -0.7),
    "green": (-0.65, 0.75, -0.65),
    "blue": (-0.65, -0.45, 1.0),
    "yellow": (0.95, 0.85, -0.7),
    "magenta": (0.9, -0.65, 0.9),
    "cyan": (-0.7, 0.8, 0.95),
    "white": (0.95, 0.95, 0.95),
    "orange": (0.95, 0.05, -0.8),
}

_HALF = float(np.sqrt(0.5))
# unit headings in image axes: x to the right, y downwards
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-left": (-_HALF, -_HALF),
    "up-right": (_HALF, -_HALF),
    "down-left": (-_HALF, _HALF),
    "down-right": (_HALF, _HALF),
}

_SIN60 = float(np.sqrt(0.75))


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gauge of an upright equilateral triangle about its centroid: level r_in is the triangle of inradius r_in."""
    return np.maximum(y, _SIN60 * np.abs(x) - 0.5 * y)


def _circle_distance(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - r


def _square_distance(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.9 * r


def _triangle_distance(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return _triangle(x, y) - 0.65 * r


def _star_distance(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.minimum(_triangle(x, y), _triangle(x, -y)) - 0.58 * r


def _ring_distance(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.8 * r) - 0.3 * r


@dataclass(frozen=True)
class Shape:
    """A signed distance (px, negative inside) and the reach (left, right, up, down) in units of the nominal radius."""

    distance: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    reach: tuple[float, float, float, float]


# Every shape is centred on its centroid, so that a mask's centroid is the recorded centre whatever the shape.
SHAPES: dict[str, Shape] = {
    "circle": Shape(_circle_distance, (1.0, 1.0, 1.0, 1.0)),
    "square": Shape(_square_distance, (0.9, 0.9, 0.9, 0.9)),
    "triangle": Shape(_triangle_distance, (1.126, 1.126, 1.3, 0.65)),
    "star": Shape(_star_distance, (1.005, 1.005, 1.16, 1.16)),
    "ring": Shape(_ring_distance, (1.1, 1.1, 1.1, 1.1)),
}


_LENGTH = number(0, 1e6, above=True)
_WORDS = several(text(64), 0, 64)
# What a world's record may say of a `ShapesConfig`.
SHAPES_RULE = table(
    {},
    {
        "size": whole(1, 4096),
        "frames": whole(2, 2**16),
        "shapes": _WORDS,
        "colours": _WORDS,
        "directions": _WORDS,
        "speed": row(_LENGTH, _LENGTH),
        "speed_words": several(row(text(64), _LENGTH, _LENGTH), 0, 64),
        "start_words": flag,
        "radius": row(_LENGTH, _LENGTH),
        "softness": _LENGTH,
        "bounces": flag,
        "branching": number(0, 1),
        "num_objects": whole(1, 2),
        "background": row(*[number(-1, 1)] * 3),
    },
    closed=True,
)
CLIP_PIXELS = 2**22  # of all frames together


@dataclass(frozen=True)
class ShapesConfig:
    """What the toy world contains. Lengths are pixels, speeds pixels per frame, colours RGB in [-1, 1].

    `speed_words` (word, low, high) makes the speed a captioned factor and replaces `speed`; `start_words` captions the
    start ("from the upper left"); `branching` is the chance that an object turns 90 degrees past the first third.
    Without `bounces` the start is drawn uniformly over those that keep the whole path inside the frame.
    """

    size: int = 32
    frames: int = 12
    shapes: tuple[str, ...] = ("circle", "square", "triangle")
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "magenta", "cyan")
    directions: tuple[str, ...] = ("left", "right", "up", "down")
    speed: tuple[float, float] = (1.1, 1.6)
    speed_words: tuple[tuple[str, float, float], ...] = ()
    start_words: bool = False
    radius: tuple[float, float] = (5.0, 6.0)
    softness: float = 0.75
    bounces: bool = False
    branching: float = 0.0
    num_objects: int = 1
    background: tuple[float, float, float] = (-0.75, -0.75, -0.7)

    def __post_init__(self) -> None:
        for field, known in (("shapes", SHAPES), ("colours", PALETTE), ("directions", DIRECTIONS)):
            names = getattr(self, field)
            unknown = [name for name in names if name not in known]
            if unknown or not names or len(set(names)) != len(names):
                raise UserError(f"data.shapes.{field}={names}: choose distinct names from {', '.join(known)}")
        if self.num_objects not in (1, 2) or self.num_objects > len(self.colours):
            raise UserError(f"shapes.num_objects={self.num_objects}: use 1, or 2 with at least two colours")
        for field in ("speed", "radius"):
            low, high = getattr(self, field)
            if not 0 < low <= high:
                raise UserError(f"shapes.{field}={(low, high)}: use 0 < low <= high")
        if self.frames < 2 or self.softness <= 0 or not 0 <= self.branching <= 1:
            raise UserError("shapes: frames must be >= 2, softness > 0 and branching a probability")
        if self.size**2 * self.frames > CLIP_PIXELS:
            raise UserError(
                f"shapes: {self.frames} frames of {self.size} px are too many; a clip has {CLIP_PIXELS} pixels"
            )
        if self._straight_frames < (2 if self.bounces else self.frames):
            raise UserError(
                f"shapes: straight paths of {self.frames} frames leave a {self.size} px frame; lower shapes.speed, "
                "radius or frames, raise size, or set bounces=True"
            )

    @property
    def _straight_frames(self) -> int:
        """How many frames the widest, fastest object can move straight on inside the frame."""
        fastest = max([high for _, _, high in self.speed_words] or [self.speed[1]])
        reaches = [SHAPES[name].reach for name in self.shapes]
        widest = max(max(left + right, up + down) for left, right, up, down in reaches)
        return int((self.size - widest * self.radius[1]) / fastest) + 1

    @property
    def head_frames(self) -> int:
        """Number of leading frames that always move in the captioned direction: before any turn or bounce."""
        if not self.bounces and not self.branching:
            return self.frames
        third = min(self.frames, -(-self.frames // 3) + 1)
        return min(third, self._straight_frames) if self.bounces else third

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest; `ShapesConfig.from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ShapesConfig":
        """Raises UserError on unknown keys and values that they cannot have."""

        def freeze(value: Any) -> Any:
            return tuple(map(freeze, value)) if isinstance(value, list | tuple) else value

        checked(SHAPES_RULE, values, "shapes config")
        return cls(**{key: freeze(value) for key, value in values.items()})


def coverage(shape: str, centres_P2: np.ndarray, radius: ArrayLike, size: int, softness: float) -> np.ndarray:
    """Soft mask in [0, 1] of one shape at each centre (x, y in px, pixel centres at k + 0.5); radius scalar or [P]."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    centres = np.asarray(centres_P2, np.float32)
    x = axis[None, None, :] - centres[:, 0, None, None]
    y = axis[None, :, None] - centres[:, 1, None, None]
    r = np.broadcast_to(np.asarray(radius, np.float32), centres.shape[:1])[:, None, None]
    distance = SHAPES[shape].distance(x, y, r)
    # tanh form of sigmoid(-distance / softness): one transcendental, no overflow
    return 0.5 - 0.5 * np.tanh((0.5 / softness) * distance)


def render(factors: Factors, config: ShapesConfig) -> np.ndarray:
    """The clip that `factors` describe: float32 [P, H, W, 3] in [-1, 1]; later objects occlude earlier ones."""
    centres = factors["centres"]
    video = np.empty((centres.shape[1], config.size, config.size, 3), np.float32)
    video[:] = np.asarray(config.background, np.float32)
    for o, shape in enumerate(factors["shape"]):
        alpha = coverage(str(shape), centres[o], factors["radius"][o], config.size, config.softness)[..., None]
        video += alpha * (np.asarray(PALETTE[str(factors["colour"][o])], np.float32) - video)
    return video


def limits(shape: str, radius: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest centre (x, y) that keep the shape inside the frame."""
    left, right, up, down = (reach * radius for reach in SHAPES[shape].reach)
    return np.array([left, up]), np.array([size - right, size - down])


def _steps(config: ShapesConfig, heading: np.ndarray, turn_frame: int, turn_side: int) -> np.ndarray:
    """Unit step per frame transition [P-1, 2]; from `turn_frame` on rotated to the mover's left (-1) or right (+1)."""
    steps = np.tile(heading, (config.frames - 1, 1))
    if turn_frame >= 0:
        steps[turn_frame:] = turn_side * np.array([-heading[1], heading[0]])
    return steps


def _bounce(start: np.ndarray, steps: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, int]:
    """Centres [P, 2] of a path that reflects at the walls, and how often it did."""
    centres, position, flip, count = [start], start, np.ones(2), 0
    for step in steps:
        position = position + flip * step
        over = np.where(position < low, position - low, np.where(position > high, position - high, 0.0))
        position = position - 2 * over
        flip = np.where(over != 0, -flip, flip)
        count += int(np.count_nonzero(over))
        centres.append(position)
    return np.stack(centres), count


def _turn_frames(config: ShapesConfig) -> range:
    """The steps from which on an object may move in another direction."""
    first = max(config.head_frames - 1, -(-config.frames // 3))
    return range(first, max(first + 1, config.frames - config.frames // 4))


def possible_paths(config: ShapesConfig, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Every path that begins as a clip does: centres [K, P, 2], and the chance of each given the frames before turns.

    The first path goes straight on; then come, by the moment of the turn, that to the left and that to the right. These
    frames show start, heading, speed and size. As a start is drawn uniformly over those that keep the whole path inside
    the frame, a path is the likelier the fewer starts it has, and impossible from a start that it has not.

    Raises:
      UserError: a world of two objects, or of bounces, where that is not so.
    """
    if config.num_objects > 1 or config.bounces:
        raise UserError("data.shapes: paths are counted in a world of one object, without bounces")
    turns = [(-1, 0), *itertools.product(_turn_frames(config), (-1, 1))]
    prior = [1 - config.branching, *[config.branching / (len(turns) - 1)] * (len(turns) - 1)]
    heading, start = np.asarray(DIRECTIONS[str(factors["direction"][0])]), factors["centres"][0, 0].astype(float)
    low, high = limits(str(factors["shape"][0]), float(factors["radius"][0]), config.size)
    paths, chances = [], []
    for (frame, side), chance in zip(turns, prior, strict=True):
        steps = float(factors["speed"][0]) * _steps(config, heading, frame, side)
        path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
        lowest, highest = low - path.min(axis=0), high - path.max(axis=0)
        inside = np.all((start > lowest - 1e-4) & (start < highest + 1e-4))
        paths.append(start + path)
        chances.append(chance * inside / np.prod(highest - lowest))
    return np.stack(paths), np.asarray(chances) / np.sum(chances)


def _draw_object(config: ShapesConfig, rng: np.random.Generator, colour: str) -> dict[str, Any]:
    shape = config.shapes[rng.integers(len(config.shapes))]
    direction = config.directions[rng.integers(len(config.directions))]
    word, slowest, fastest = "", *config.speed
    if config.speed_words:
        word, slowest, fastest = config.speed_words[rng.integers(len(config.speed_words))]
    speed, radius = rng.uniform(slowest, fastest), rng.uniform(*config.radius)
    turn_frame, turn_side = -1, 0
    if rng.uniform() < config.branching:
        frames = _turn_frames(config)
        turn_frame = int(rng.integers(frames.start, frames.stop))
        turn_side = int(rng.choice((-1, 1)))
    steps = speed * _steps(config, np.asarray(DIRECTIONS[direction]), turn_frame, turn_side)
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    low, high = limits(shape, radius, config.size)
    sure = path[: config.head_frames] if config.bounces else path
    start = rng.uniform(low - sure.min(axis=0), high - sure.max(axis=0))
    centres, bounces = _bounce(start, steps, low, high) if config.bounces else (start + path, 0)
    return {
        "shape": shape,
        "colour": colour,
        "direction": direction,
        "speed_word": word,
        "speed": np.float32(speed),
        "radius": np.float32(radius),
        "centres": centres.astype(np.float32),
        "bounces": np.int32(bounces),
        "turn_frame": np.int32(turn_frame),
        "turn_side": np.int32(turn_side),
    }


def _draw_apart(config: ShapesConfig, rng: np.random.Generator, colour: str, other: dict[str, Any]) -> dict[str, Any]:
    """The first of at most 32 draws that never touches `other`, else the one that stays farthest from it."""
    best: dict[str, Any] = {}
    widest = -np.inf
    for _ in range(32):
        item = _draw_object(config, rng, colour)
        apart = np.linalg.norm(item["centres"] - other["centres"], axis=-1).min() - item["radius"] - other["radius"]
        if apart > widest:
            best, widest = item, apart
        if apart > 0.3 * config.radius[1]:
            break
    return best


def draw_factors(config: ShapesConfig, rng: np.random.Generator) -> Factors:
    """All factors of one clip; every array has a leading object axis O (1 unless num_objects is 2).

    shape, colour, direction, speed_word: str [O]; speed, radius: float32 [O]; centres: float32 [O, P, 2] (x, y);
    bounces, turn_frame (-1: never), turn_side (-1 left, +1 right, 0 none): int32 [O]. Two objects differ in colour.
    """
    first, *others = (config.colours[c] for c in rng.permutation(len(config.colours))[: config.num_objects])
    objects = [_draw_object(config, rng, first)]
    objects += [_draw_apart(config, rng, colour, objects[0]) for colour in others]
    return {name: np.array([item[name] for item in objects]) for name in objects[0]}


def _start_words(centre: np.ndarray, size: int) -> str:
    column = ("left", "", "right")[min(2, int(3 * centre[0] / size))]
    row = ("upper", "", "lower")[min(2, int(3 * centre[1] / size))]
    return " from the " + (f"{row} {column}".strip() or "middle")


def caption(factors: Factors, config: ShapesConfig) -> str:
    """'a red circle moving left'; a speed word comes before the heading, a start after it, objects joined by 'and'."""
    parts = []
    for o, shape in enumerate(factors["shape"]):
        words = ["a", factors["colour"][o], shape, "moving", factors["speed_word"][o], factors["direction"][o]]
        text = " ".join(str(word) for word in words if word)
        parts.append(text + (_start_words(factors["centres"][o, 0], config.size) if config.start_words else ""))
    return " and ".join(parts)


def all_captions(config: ShapesConfig) -> list[str]:
    """Every caption of a one-object world without start words, in a fixed order."""
    speeds = [word for word, _, _ in config.speed_words] or [""]
    product = itertools.product(config.colours, config.shapes, speeds, config.directions)
    return [" ".join(w for w in ("a", c, s, "moving", v, d) if w) for c, s, v, d in product]


def parse_caption(text: str, config: ShapesConfig) -> Factors:
    """The captioned factors (shape, colour, direction: str [O]) of a prompt, for judging a generated clip.

    Raises:
      UserError: an object of the caption lacks a configured shape, colour or direction.
    """
    found: dict[str, list[str]] = {"shape": [], "colour": [], "direction": []}
    for part in text.lower().split(" and "):
        words = part.split(" from the ")[0].split()
        for name, options in (("shape", config.shapes), ("colour", config.colours), ("direction", config.directions)):
            hits = [word for word in words if word in options]
            if len(hits) != 1:
                raise UserError(f"caption {text!r}: name one {name} of {', '.join(options)} per object")
            found[name] += hits
    return {name: np.array(values) for name, values in found.items()}


class ShapesSource:
    """Random access to clips: `source[i]` depends on (config, seed, i) alone, in whatever process it is asked for."""

    def __init__(self, config: ShapesConfig, seed: int, length: int) -> None:
        if length < 1 or seed < 0:
            raise UserError(f"shapes source: length={length}, seed={seed}; use length >= 1 and seed >= 0")
        self.config, self.seed, self.length = config, seed, length

    def __len__(self) -> int:
        return self.length

    def factors(self, index: int) -> Factors:
        """The factors of record `index` without rendering it."""
        if not 0 <= index < self.length:
            raise IndexError(f"record {index} of {self.length}")
        return draw_factors(self.config, np.random.default_rng([self.seed, index]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"video_PHWC": float32 in [-1, 1], "caption": str, "factors": Factors}."""
        factors = self.factors(int(index))
        return {
            "video_PHWC": render(factors, self.config),
            "caption": caption(factors, self.config),
            "factors": factors,
        }

    def videos(self, indices: Sequence[int]) -> np.ndarray:
        """The stacked clips video_BPHWC of these records."""
        return np.stack([self[i]["video_PHWC"] for i in indices])
