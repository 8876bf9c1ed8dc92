"""Blends of prompts: text rows between others, for transitions and weighted prompts."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from cfjax.core.errors import UserError

Blend = Literal["linear", "slerp"]
SMALLEST_ANGLE = 1e-4  # radians; below it a spherical blend is the linear one


def blend_rows(rows: Sequence[np.ndarray], weights: Sequence[float], blend: Blend = "linear") -> np.ndarray:
    """Text rows [..., S, E] between others. Rows of zeros (padding) in all of them stay zeros.

        linear   sum w_i e_i, scaled to the norm sum w_i |e_i| (over all rows)
        slerp    per row, along the great circle from the first to the second; of two only

    Source: `blend_embeddings` in `blending.py` of Scope (daydreamlive/scope). Weights are scaled to add up to 1.

    Raises:
      UserError: weights that are negative, all 0 or not as many as prompts; slerp of more than two.
    """
    if blend not in get_args(Blend):
        raise UserError(f"blend={blend!r}: use {' or '.join(get_args(Blend))}")
    if len(rows) != len(weights) or not rows:
        raise UserError(f"{len(rows)} prompts with {len(weights)} weights: give each prompt one")
    share = np.asarray(weights, np.float64)
    if not np.isfinite(share).all() or (share < 0).any() or share.sum() == 0:
        raise UserError(f"weights {tuple(weights)}: use numbers of 0 or more, not all 0")
    share = share / share.sum()
    kept = [(np.asarray(x, np.float64), w) for x, w in zip(rows, share, strict=True) if w]
    if len(kept) == 1:
        return kept[0][0].astype(np.float32)
    if blend == "slerp":
        if len(rows) > 2:
            raise UserError(f"slerp is between two prompts, not {len(rows)}; use linear")
        return _slerp(kept[0][0], kept[1][0], kept[1][1]).astype(np.float32)
    mixed = sum(w * x for x, w in kept)
    norm = np.linalg.norm(mixed)
    wanted = sum(w * np.linalg.norm(x) for x, w in kept)
    return (mixed * (wanted / norm if norm else 1.0)).astype(np.float32)


def _slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """Row by row; the length of a row is between both."""
    long_a, long_b = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    cosine = np.sum(a * b, axis=-1, keepdims=True) / np.maximum(long_a * long_b, 1e-30)
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    plain = (angle < SMALLEST_ANGLE) | (angle > np.pi - SMALLEST_ANGLE) | (long_a == 0) | (long_b == 0)
    sine = np.where(plain, 1.0, np.sin(angle))
    unit = (np.sin((1 - share) * angle) * a / np.maximum(long_a, 1e-30)) + (
        np.sin(share * angle) * b / np.maximum(long_b, 1e-30)
    )
    return np.where(plain, (1 - share) * a + share * b, unit / sine * ((1 - share) * long_a + share * long_b))
