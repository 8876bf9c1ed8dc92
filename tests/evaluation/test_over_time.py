"""Curves over a long video: pieces judged against what the world itself draws."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.shapes import ShapesConfig, parse_caption, render
from cfjax.evaluation.over_time import drift, judge_pieces, pieces

WORLD = ShapesConfig()


def drawn(colour: str, shape: str, start: float, step: float, frames: int) -> np.ndarray:
    """One object that moves right by `step` px a frame."""
    centres = np.stack([start + step * np.arange(frames), np.full(frames, 16.0)], -1)[None]
    factors = {"shape": np.array([shape]), "colour": np.array([colour]), "radius": np.array([5.5]), "centres": centres}
    return render(factors, WORLD)


def test_pieces_tell_when_a_video_stops_following():
    """Twelve frames of what was asked, then another colour, then a picture that stands still and fades."""
    right = drawn("red", "circle", 8, 1.2, 12)
    other = drawn("blue", "circle", 8, 1.2, 6)
    still = drawn("red", "circle", 16, 0.0, 6)
    still = WORLD.background + np.linspace(1.0, 0.2, 6)[:, None, None, None] * (still - WORLD.background)
    video = np.concatenate([right, other, still]).astype(np.float32)
    asked = parse_caption("a red circle moving right", WORLD)
    found = judge_pieces(np.stack([video, video]), [asked, asked], WORLD, 6)
    assert found["frame"].tolist() == [0, 6, 12, 18]
    assert found["follows"].tolist() == [1, 1, 0, 0] and found["colour_correct"].tolist() == [1, 1, 0, 1]
    assert found["direction_correct"].tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(found["step"][:3], 1.2, atol=0.03)
    assert found["step"][3] < 0.1 and found["residual"][3] > 5 * found["residual"][0]
    assert found["saturation"][3] < found["saturation"][0] - 0.02


def test_one_clip_of_two_that_follows_is_a_half():
    asked = parse_caption("a red circle moving right", WORLD)
    videos = np.stack([drawn(colour, "circle", 8, 1.2, 6) for colour in ("red", "green")])
    assert judge_pieces(videos, [asked] * 2, WORLD, 6)["follows"].tolist() == [0.5]


def test_frames_left_over_are_not_judged_and_short_pieces_are_refused():
    assert pieces(14, 6) == [slice(0, 6), slice(6, 12)]
    for length in (1, 15):
        with pytest.raises(UserError, match="2 or more, at most the video's 14"):
            pieces(14, length)


def test_drift_is_the_last_third_against_the_first():
    assert drift(np.array([1.0, 1.0, 5.0, 9.0, 3.0, 3.0])) == 2.0
    assert drift(np.array([4.0])) == 0.0
