"""Whether a steered shape moves as it is told, measured from pixels block after block."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cfjax.data.shapes import ShapesConfig, limits
from cfjax.data.steered import SteeringConfig, draw_keys, steer
from cfjax.evaluation.shapes_metrics import measure_shapes, wilson

OUTSIDE = 1.0  # px that a centre may be beyond its limits, which the radius is not known for


def random_keys(count: int, blocks: int, block_frames: int, seed: int) -> np.ndarray:
    """Key sequences as a user holds them, [count, blocks * block_frames, 4]: they change between blocks alone."""
    held = SteeringConfig(held=(1, 4))  # in blocks
    rng = np.random.default_rng(seed)
    return np.repeat(np.stack([draw_keys(held, blocks, rng) for _ in range(count)]), block_frames, axis=1)


def follow(
    video_BPHWC: np.ndarray,
    keys_BFA: np.ndarray,
    shapes: Sequence[str],
    config: ShapesConfig,
    *,
    speed: float,
    block_frames: int,
) -> dict[str, np.ndarray]:
    """Compares what is seen with what is told, block by block but for the first, whose shape comes from nowhere.

    A block moves as told if its displacement is, on both axes, nearer to what its keys ask for from where it begins
    (the edges considered) than to that of one key more or less: within half a block's way.

    Args:
      keys_BFA: of every frame, the same ones within a block.  shapes: what each clip should show.

    Returns:
      told bool [B, G - 1]; error [B, G - 1, 2], px, displacement minus what was asked; inside bool [B, G - 1], whether
      the block's last centre is within the frame; there bool [B, G], whether a shape of about the right size is seen
      in all of its frames; shape, colour: str [B], in the last 12 frames.
    """
    table = measure_shapes(video_BPHWC, config)
    last = table["centres"][:, block_frames - 1 :: block_frames]
    asked, inside = np.empty_like(last[:, 1:]), np.empty(last[:, 1:].shape[:2], bool)
    for b, shape in enumerate(shapes):
        low, high = limits(shape, float(np.mean(config.radius)), config.size)
        for g in range(1, last.shape[1]):
            keys = keys_BFA[b, g * block_frames : (g + 1) * block_frames]
            begin = np.clip(last[b, g - 1], low, high)
            asked[b, g - 1] = steer(begin, np.concatenate([keys[:1], keys]), speed, low, high)[-1] - begin
            inside[b, g - 1] = bool(((last[b, g] > low - OUTSIDE) & (last[b, g] < high + OUTSIDE)).all())
    error = np.diff(last, axis=1) - asked
    mass = table["relative_mass"].reshape(len(video_BPHWC), -1, block_frames)
    end = measure_shapes(video_BPHWC[:, -12:], config)
    return {
        "told": (np.abs(error) < 0.5 * speed * block_frames).all(-1),
        "error": error,
        "inside": inside,
        "there": ((mass > 0.5) & (mass < 1.6)).all(-1),
        "shape": end["shape"],
        "colour": end["colour"],
    }


def summary(found: dict[str, np.ndarray], shapes: Sequence[str], colours: Sequence[str]) -> dict[str, Any]:
    """Shares over all blocks, with Wilson's 95 % bounds, and over time: of each tenth of the blocks."""
    told = found["told"]
    low, high = wilson(int(told.sum()), told.size)
    parts = lambda rows: [float(part.mean()) for part in np.array_split(rows, min(10, rows.shape[1]), axis=1)]
    return {
        "sequences": len(told),
        "blocks": int(told.shape[1] + 1),
        "told": float(told.mean()),
        "told_low": low,
        "told_high": high,
        "error_px": float(np.abs(found["error"]).mean()),
        "inside": float(found["inside"].mean()),
        "there": float(found["there"].mean()),
        "shape_kept": float((found["shape"] == np.asarray(shapes)).mean()),
        "colour_kept": float((found["colour"] == np.asarray(colours)).mean()),
        "over_time": {name: parts(found[name]) for name in ("told", "inside", "there")},
    }
