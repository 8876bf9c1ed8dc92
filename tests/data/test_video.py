"""Real files of several kinds become clips of one format, or say why they cannot."""

from fractions import Fraction

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.video import ClipFormat, Unusable, fit_picture, read_clip
from tests.data.videos import brightness, ramp, rotate_mp4, truncate, write_video

WANTED = ClipFormat(frames=9, height=16, width=32)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mov", ".gif"])
def test_a_file_at_the_right_rate_and_size_comes_back(tmp_path, suffix):
    clip = read_clip(write_video(tmp_path / f"a{suffix}", 12), WANTED)
    assert clip.shape == (9, 16, 32, 3) and clip.dtype == np.uint8
    difference = np.abs(clip.astype(int) - ramp(12, 16, 32)[:9]).mean()
    print(f"{suffix}: mean difference {difference:.2f} of 255")
    assert difference < (40 if suffix == ".gif" else 4)  # the GIF encoder knows eight shades of red and green


@pytest.mark.parametrize(("fps", "frames"), [(30, 20), (24, 16), (10, 8), (29.97, 20), (60, 40)])
def test_other_rates_show_the_frame_of_the_moment(tmp_path, fps, frames):
    clip = read_clip(write_video(tmp_path / "a.mp4", frames, fps=fps), WANTED)
    shown = [int((k / 16 + 1e-3) * fps) for k in range(9)]  # time stamps may be a millisecond late
    np.testing.assert_allclose(brightness(clip), 2.0 * np.array(shown), atol=1.5)


def test_a_variable_rate_is_read_by_its_time_stamps(tmp_path):
    times = [0.0, 0.01, 0.02, 0.03, 0.3, 0.31, 0.45, 0.6]
    clip = read_clip(write_video(tmp_path / "a.mp4", len(times), fps=16, times=times), WANTED)
    shown = [max(i for i, t in enumerate(times) if t <= k / 16 + 1e-3) for k in range(9)]
    assert shown == [0, 3, 3, 3, 3, 5, 5, 5, 6]
    np.testing.assert_allclose(brightness(clip), 2.0 * np.array(shown), atol=1.5)


def test_a_clip_may_start_later_than_zero(tmp_path):
    times = [2.0 + k / 16 for k in range(12)]
    clip = read_clip(write_video(tmp_path / "a.mp4", 12, times=times), WANTED)
    np.testing.assert_allclose(brightness(clip), 2.0 * np.arange(9), atol=1.5)


def test_a_phone_held_upright_is_turned(tmp_path):
    file = write_video(tmp_path / "a.mp4", 9, size=(16, 32))
    rotate_mp4(file)
    clip = read_clip(file, ClipFormat(frames=9, height=32, width=16))
    # turned clockwise the bright left half is on top
    assert clip[:, :14].mean() > clip[:, 18:].mean() + 80


def test_wide_pixels_are_seen_wide(tmp_path):
    file = write_video(tmp_path / "a.mp4", 9, size=(16, 16), aspect=Fraction(2, 1))
    assert read_clip(file, WANTED).shape == (9, 16, 32, 3)


@pytest.mark.parametrize(
    ("frames", "kind", "options"),
    [
        (8, "too short: 8 of 9", {}),
        (16, "too short", {"fps": 32}),
        (9, "wrong size: 32 x 14 is smaller than 32 x 16", {"size": (14, 32)}),
        (9, "wrong shape", {"size": (80, 32)}),
    ],
)
def test_clips_that_do_not_serve_say_why(tmp_path, frames, kind, options):
    with pytest.raises(Unusable, match=kind):
        read_clip(write_video(tmp_path / "a.mp4", frames, **options), WANTED)


@pytest.mark.parametrize(("part", "faststart"), [(0.0, False), (0.4, False), (0.8, False), (0.5, True), (0.75, True)])
def test_truncated_files_are_found_out(tmp_path, part, faststart):
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 32, 3)).astype(np.uint8)
    file = write_video(tmp_path / "a.mp4", 12, video=noise, faststart=faststart)
    read_clip(file, WANTED)
    truncate(file, part)
    with pytest.raises(Unusable, match=r"unreadable|damaged|too short"):
        read_clip(file, WANTED)


def test_a_file_that_is_no_video_is_unreadable(tmp_path):
    (tmp_path / "a.mp4").write_text("no video at all")
    with pytest.raises(Unusable, match="unreadable"):
        read_clip(tmp_path / "a.mp4", WANTED)
    with pytest.raises(Unusable, match="unreadable"):
        read_clip(tmp_path / "absent.mp4", WANTED)


def test_cover_cuts_both_sides_alike_and_stretch_cuts_nothing():
    picture = np.zeros((32, 128, 3), np.uint8)
    picture[:, :32], picture[:, 96:] = 250, 250  # cover keeps the middle half
    cover = fit_picture(picture, 1.0, WANTED)
    stretch = fit_picture(picture, 1.0, ClipFormat(frames=9, height=16, width=32, fit="stretch"))
    assert cover.shape == stretch.shape == (16, 32, 3)
    assert cover[:, 2:-2].max() == 0 and (stretch[:, :6] == 250).all() and (stretch[:, -6:] == 250).all()
    small = fit_picture(np.full((8, 16, 3), 7, np.uint8), 1.0, ClipFormat(frames=9, height=16, width=32, upscale=True))
    assert small.shape == (16, 32, 3) and (small == 7).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"fit": "letterbox"}, "fit="), ({"frames": 0}, "positive"), ({"max_crop": 2.0}, "max_crop")],
)
def test_impossible_formats_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ClipFormat(**values)


def test_a_format_must_suit_the_codec():
    ClipFormat().check_stride((4, 8, 8))
    with pytest.raises(UserError, match="use 77 or 81"):
        ClipFormat(frames=80).check_stride((4, 8, 8))
    with pytest.raises(UserError, match="multiples of 8 and 8"):
        ClipFormat(height=482).check_stride((4, 8, 8))
