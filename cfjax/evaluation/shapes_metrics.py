"""Judging moving-shapes clips from their pixels, by analysis and synthesis.

`measure_shapes` uses only the world (`ShapesConfig`), not the prompt: it finds the object's mask, colour and path,
then renders every shape at a few radii along that path and keeps the best fit. The error of that fit, `residual`, is
a sensitive measure of quality. `evaluate_shapes` compares the measurements with the captioned factors.
"""

from collections.abc import Sequence

import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.shapes import DIRECTIONS, PALETTE, Factors, ShapesConfig, coverage

_FLOOR = 0.12  # fraction of the object's contrast below which a pixel counts as background
_RADII = 5  # radii tried per shape
_SHAPE_FRAMES = 6  # frames that vote on the shape
_PRESENT = (0.5, 1.6)  # visible mass, relative to the expected area
_CHUNK = 8  # clips per pass: keeps the working set in cache

Table = dict[str, np.ndarray]


def _contrast(names: Sequence[str], config: ShapesConfig) -> np.ndarray:
    """Palette colours relative to the background [N, 3]."""
    return np.array([PALETTE[name] for name in names], np.float32) - np.asarray(config.background, np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-8)


def _colours(deviation_BPHWC: np.ndarray, config: ShapesConfig) -> np.ndarray:
    """Index of the nearest palette hue [B], from the mean deviation weighted by its own square."""
    strength = np.square(deviation_BPHWC).sum(-1, keepdims=True)
    strength *= strength > 0.1 * strength.max(axis=(1, 2, 3), keepdims=True)
    mean = (strength * deviation_BPHWC).sum((1, 2, 3)) / np.maximum(strength.sum((1, 2, 3)), 1e-8)
    return (_unit(mean) @ _unit(_contrast(config.colours, config)).T).argmax(-1)


def _masks(deviation_BPHWC: np.ndarray, colour_B: np.ndarray, config: ShapesConfig) -> np.ndarray:
    """Opacity of the object per pixel [B, P, H, W]; with two objects only pixels of this clip's hue count."""
    contrast = _contrast(config.colours, config)
    chosen = contrast[colour_B]
    mask = np.einsum("bphwc,bc->bphw", deviation_BPHWC, chosen / np.square(chosen).sum(-1, keepdims=True))
    if config.num_objects > 1:
        hue = (deviation_BPHWC @ _unit(contrast).T).argmax(-1)
        mask = mask * (hue == colour_B[:, None, None, None])
    return np.clip(mask, 0.0, 1.0)


def _paths(mask_BPHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask mass [B, P] in px and centroid (x, y) [B, P, 2]; frames without an object are interpolated."""
    solid = np.where(mask_BPHW > _FLOOR, mask_BPHW, 0.0)
    mass = solid.sum((2, 3))
    x = solid.sum(2) @ (np.arange(mask_BPHW.shape[3], dtype=np.float32) + 0.5)
    y = solid.sum(3) @ (np.arange(mask_BPHW.shape[2], dtype=np.float32) + 0.5)
    centres = np.stack([x, y], -1) / np.maximum(mass, 1e-6)[..., None]
    seen = mass > 2.0
    frames = np.arange(mass.shape[1])
    for clip in np.flatnonzero(~seen.all(1)):
        if not seen[clip].any():
            centres[clip] = mask_BPHW.shape[3] / 2
            continue
        for axis in range(2):
            centres[clip, :, axis] = np.interp(frames, frames[seen[clip]], centres[clip, seen[clip], axis])
    return mass, centres.astype(np.float32)


def _explain(mask_BPHW: np.ndarray, centres_BP2: np.ndarray, config: ShapesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Shape index and radius [B] whose drawing along the measured path comes closest to the mask."""
    batch, frames, size = mask_BPHW.shape[:3]
    votes = np.unique(np.linspace(0, frames - 1, min(frames, _SHAPE_FRAMES)).round().astype(int))
    target = mask_BPHW[:, votes].reshape(-1, size, size)
    flat = centres_BP2[:, votes].reshape(-1, 2)
    radii = np.linspace(*config.radius, _RADII, dtype=np.float32)
    errors = np.empty((batch, len(config.shapes), _RADII), np.float32)
    for s, shape in enumerate(config.shapes):
        for k, radius in enumerate(radii):
            difference = coverage(shape, flat, radius, size, config.softness) - target
            errors[:, s, k] = np.square(difference).reshape(batch, -1).mean(1)
    best = errors.reshape(batch, -1).argmin(1)
    return best // _RADII, radii[best % _RADII]


def _synthesise(table: Table, config: ShapesConfig) -> tuple[np.ndarray, np.ndarray]:
    """The best explanation's opacity [B, P, H, W] and area at the middle radius [B]."""
    batch, frames = table["mass"].shape
    opacity = np.empty((batch, frames, config.size, config.size), np.float32)
    area = np.empty(batch, np.float32)
    middle = np.full((1, 2), config.size / 2)
    for s, shape in enumerate(config.shapes):
        rows = np.flatnonzero(table["shape_index"] == s)
        flat = table["centres"][rows].reshape(-1, 2)
        radius = np.repeat(table["radius"][rows], frames)
        opacity[rows] = coverage(shape, flat, radius, config.size, config.softness).reshape(
            -1, frames, config.size, config.size
        )
        area[rows] = coverage(shape, middle, np.mean(config.radius), config.size, config.softness).sum()
    return opacity, area


def _measure_chunk(video: np.ndarray, colours: np.ndarray | None, config: ShapesConfig) -> Table:
    deviation = np.asarray(video, np.float32) - np.asarray(config.background, np.float32)
    colour = _colours(deviation, config) if colours is None else colours
    mask = _masks(deviation, colour, config)
    mass, centres = _paths(mask)
    shape, radius = _explain(mask, centres, config)
    table = {"colour_index": colour, "shape_index": shape, "radius": radius, "mass": mass, "centres": centres}
    opacity, area = _synthesise(table, config)
    contrast = _contrast(config.colours, config)[colour]
    if config.num_objects > 1:
        error = np.square(opacity - mask) * (np.square(contrast).sum(-1) / 3)[:, None, None, None]
    else:
        error = np.square(deviation - opacity[..., None] * contrast[:, None, None, None])
    table["residual"] = np.sqrt(error.reshape(len(mask), -1).mean(1))
    table["relative_mass"] = mass / area[:, None]
    return table


def _motion(centres_BP2: np.ndarray, config: ShapesConfig) -> Table:
    """Heading, displacement, smoothness and turn from the measured path."""
    frames = centres_BP2.shape[1]
    steps = np.diff(centres_BP2, axis=1)
    straight = not config.branching and not config.bounces
    head = frames if straight else min(frames, config.head_frames)
    net = (centres_BP2[:, head - 1] - centres_BP2[:, 0]) / (head - 1)
    slowest = min([low for _, low, _ in config.speed_words] or [config.speed[0]])
    axes = np.array([DIRECTIONS[name] for name in config.directions])
    moving = np.linalg.norm(net, axis=-1) > 0.25 * slowest
    tail = steps[:, -max(1, frames // 4) :].mean(1)
    cross = net[:, 0] * tail[:, 1] - net[:, 1] * tail[:, 0]
    angle = np.degrees(np.arctan2(cross, (net * tail).sum(-1)))
    bend = np.abs(np.diff(steps, axis=1)) if frames > 2 else np.zeros((len(steps), 1, 2))
    return {
        "net": net,
        "direction": np.where(moving, np.array(config.directions)[(net @ axes.T).argmax(-1)], "static"),
        "displacement": np.linalg.norm(net, axis=-1),
        "step": np.linalg.norm(steps, axis=-1).mean(-1),
        "jerkiness": np.sqrt(np.square(bend).sum(-1)).mean(-1),
        "turn_angle": angle,
        "turn_side": np.where(moving & (np.abs(angle) > 45), np.sign(angle), 0).astype(np.int32),
    }


def measure_shapes(video_BPHWC: np.ndarray, config: ShapesConfig, colours: np.ndarray | None = None) -> Table:
    """Measurements from pixels alone, without the prompt; every array has a leading clip axis B.

    shape, colour, direction: str ("none" when nothing is there, "static" when it hardly moves); radius (px);
    centres [B, P, 2] (x, y in px); relative_mass [B, P] (visible area over expected area); presence (bool, within
    0.5x to 1.6x in every frame); net [B, 2] and displacement (px/frame over the leading frames that move in the
    captioned direction); step (mean length of a frame's move, jitter included); jerkiness (mean length of the second
    difference of the path, px); turn_angle (degrees, heading at the end against heading at the start, positive to the
    mover's right); turn_side (-1, 0, +1); residual (rms pixel error of the best synthetic explanation, video in
    [-1, 1]). `colours` [B] (indices into config.colours) selects the object to follow when there are two.

    Raises:
      UserError: the video is not [B, P, size, size, 3] of at least two frames.
    """
    video = np.asarray(video_BPHWC)
    if video.ndim != 5 or video.shape[2:] != (config.size, config.size, 3) or video.shape[1] < 2 or not len(video):
        raise UserError(f"shapes metrics: video {video.shape} needs [B, P>=2, {config.size}, {config.size}, 3]")
    chunks = []
    for start in range(0, len(video), _CHUNK):
        part = slice(start, start + _CHUNK)
        chunks.append(_measure_chunk(video[part], None if colours is None else colours[part], config))
    table = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    table |= _motion(table["centres"], config)
    relative = table["relative_mass"]
    table["presence"] = np.all((relative > _PRESENT[0]) & (relative < _PRESENT[1]), axis=1)
    there = relative.mean(1) > 0.1
    for name in ("shape", "colour"):
        table[name] = np.where(there, np.array(getattr(config, name + "s"))[table.pop(f"{name}_index")], "none")
    table["direction"] = np.where(there, table["direction"], "none")
    del table["mass"]
    return table


def _speed_words(displacement: np.ndarray, config: ShapesConfig) -> np.ndarray:
    middles = np.array([(low + high) / 2 for _, low, high in config.speed_words])
    nearest = np.abs(displacement[:, None] - middles[None]).argmin(-1)
    return np.array([word for word, _, _ in config.speed_words])[nearest]


def _compare(table: Table, factors: Sequence[Factors], o: int, config: ShapesConfig) -> Table:
    """Measurements of object `o` with correctness against what was asked."""
    for name in ("shape", "colour", "direction"):
        table[f"{name}_correct"] = table[name] == np.array([str(f[name][o]) for f in factors])
    asked = np.array([DIRECTIONS[str(f["direction"][o])] for f in factors])
    cosine = np.clip((_unit(table["net"]) * asked).sum(-1), -1, 1)
    table["direction_error"] = np.degrees(np.arccos(cosine))
    table["all_correct"] = table["shape_correct"] & table["colour_correct"] & table["direction_correct"]
    if config.speed_words and all("speed_word" in f for f in factors):
        words = np.array([str(f["speed_word"][o]) for f in factors])
        table["speed_correct"] = _speed_words(table["displacement"], config) == words
    return table


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion; z = 1.96 is 95 %."""
    rate, square = successes / trials, z * z / trials
    middle = (rate + square / 2) / (1 + square)
    half = z * np.sqrt(rate * (1 - rate) / trials + square / (4 * trials)) / (1 + square)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def summarise(clips: Table) -> dict[str, float]:
    """Means over clips of every scalar column; booleans also get `<name>_low` and `<name>_high` (Wilson 95 %)."""
    summary: dict[str, float] = {}
    for name, column in clips.items():
        if column.ndim != 1 or column.dtype.kind not in "bf":
            continue
        summary[name] = float(column.mean())
        if column.dtype.kind == "b":
            summary[f"{name}_low"], summary[f"{name}_high"] = wilson(int(column.sum()), len(column))
    return summary


def evaluate_shapes(
    video_BPHWC: np.ndarray, factors_list: Sequence[Factors], config: ShapesConfig
) -> dict[str, Table | dict[str, float]]:
    """Judges clips against the factors asked for (a source's factors, or `parse_caption` of the prompts).

    Returns {"clips": table of per-clip arrays, "summary": means and 95 % intervals}. The table is that of
    `measure_shapes` plus shape_correct, colour_correct, direction_correct, all_correct (bool), direction_error
    (degrees) and, in a world of speed words, speed_correct. With two objects a clip is correct when both are and
    its numbers are the objects' means; each object is followed by its hue, so colour_correct means that it is there.

    Raises:
      UserError: clips and factors differ in number, or a factor is not in the configured world.
    """
    if len(video_BPHWC) != len(factors_list):
        raise UserError(f"shapes metrics: {len(video_BPHWC)} clips but {len(factors_list)} factors")
    for name, options in (("shape", config.shapes), ("colour", config.colours), ("direction", config.directions)):
        unknown = {str(value) for factors in factors_list for value in factors[name]} - set(options)
        if unknown:
            raise UserError(f"shapes metrics: {name} {sorted(unknown)} is not in config.{name}s={options}")
    if config.num_objects == 1:
        clips = _compare(measure_shapes(video_BPHWC, config), factors_list, 0, config)
        return {"clips": clips, "summary": summarise(clips)}
    if any(len(factors["colour"]) != config.num_objects for factors in factors_list):
        raise UserError(f"shapes metrics: every caption must name {config.num_objects} objects")
    tables = []
    for o in range(config.num_objects):
        colours = np.array([config.colours.index(str(factors["colour"][o])) for factors in factors_list])
        tables.append(_compare(measure_shapes(video_BPHWC, config, colours), factors_list, o, config))
    clips = {}
    for name, first in tables[0].items():
        columns = [table[name] for table in tables]
        if first.dtype.kind == "b":
            clips[name] = np.logical_and.reduce(columns)
        elif first.dtype.kind == "f" and first.ndim == 1:
            clips[name] = np.mean(columns, axis=0)
    return {"clips": clips, "summary": summarise(clips)}
