"""Real files of several kinds become clips of one format, or say why they cannot."""

import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.data import video as module
from cfjax.data.pictures import ClipFormat, Unusable, fit_picture
from cfjax.data.video import read_clip, read_end, video_span
from tests.data.videos import brightness, ramp, show_by_matrix, trim_mp4, truncate, write_sound, write_video

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


# Where a display matrix shows a picture's right and bottom, and what that makes of it. FFmpeg 9.0.2's command line,
# which turns pictures by itself, gave the same for all eight, bit for bit.
ORIENTATIONS = {
    "as it is": ((1, 0), (0, 1), lambda x: x),
    "mirrored": ((-1, 0), (0, 1), lambda x: x[:, ::-1]),
    "by 180 degrees": ((-1, 0), (0, -1), lambda x: np.rot90(x, 2)),
    "upside down": ((1, 0), (0, -1), lambda x: x[::-1]),
    "90 degrees clockwise": ((0, 1), (-1, 0), lambda x: np.rot90(x, -1)),
    "90 degrees anticlockwise": ((0, -1), (1, 0), np.rot90),
    "transposed": ((0, 1), (1, 0), lambda x: x.swapaxes(0, 1)),
    "transposed the other way": ((0, -1), (-1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_orientation_is_shown_upright(tmp_path, name):
    right, bottom, turn = ORIENTATIONS[name]
    file = write_video(tmp_path / "a.mp4", 9, video=np.random.default_rng(0).integers(0, 255, (9, 16, 32, 3), np.uint8))
    plain = read_clip(file, WANTED)
    show_by_matrix(file, right, bottom)
    expected = np.stack([turn(picture) for picture in plain])
    shown = replace(WANTED, height=expected.shape[1], width=expected.shape[2])
    np.testing.assert_array_equal(read_clip(file, shown), expected)
    np.testing.assert_array_equal(read_end(file, shown), expected)


def test_a_slanted_picture_is_refused(tmp_path):
    show_by_matrix(file := write_video(tmp_path / "a.mp4", 9), (1, 1), (-1, 1))
    with pytest.raises(Unusable, match="no multiple of 90 degrees"):
        read_clip(file, WANTED)


def test_wide_pixels_are_seen_wide(tmp_path):
    file = write_video(tmp_path / "a.mp4", 9, size=(16, 16), aspect=Fraction(2, 1))
    assert read_clip(file, WANTED).shape == (9, 16, 32, 3)
    show_by_matrix(file, (0, 1), (-1, 0))  # and seen high once turned
    assert read_clip(file, ClipFormat(frames=9, height=32, width=16)).shape == (9, 32, 16, 3)


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


# ---- the end


def decoded(file) -> tuple[list[float], np.ndarray]:
    """Times and pictures of all frames, decoded from the first one on."""
    with av.open(str(file)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [time for time, _ in frames], np.stack([picture for _, picture in frames])


TIMES = {
    "30 a second": np.arange(60) / 30,
    "slow, then busy": np.r_[np.arange(0, 2, 0.5), np.arange(2, 3, 1 / 30)],
    "busy, then slow": np.r_[np.arange(0, 1, 1 / 30), np.arange(1, 4, 0.5)],
    "jittered": np.sort(np.r_[0, np.random.default_rng(0).uniform(0.02, 3, 50)]),
}


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".ts", ".avi"])
@pytest.mark.parametrize("name", TIMES)
def test_the_last_frames_are_the_last_frames(tmp_path, suffix, name):
    """At 1 / fps before one another, the frames that are shown; the last is the file's very last, at any rate."""
    times = np.unique(np.round(TIMES[name], 3))
    video = np.random.default_rng(0).integers(0, 255, (len(times), 16, 32, 3), np.uint8)
    rate = 30 if suffix == ".ts" else 1000
    file = write_video(tmp_path / f"a{suffix}", len(times), times=times, fps=rate, video=video)
    when, pictures = decoded(file)
    when = np.array(when) - when[0]
    np.testing.assert_allclose(when, times - times[0], atol=1.1e-3)
    span = video_span(file)
    final = max(when[-1], span.end - span.first - 1 / 16)
    shown = [max(i for i, t in enumerate(when) if t <= final - k / 16 + 1e-3) for k in range(8, -1, -1)]
    np.testing.assert_array_equal(read_end(file, WANTED), pictures[shown])
    assert shown[-1] == len(pictures) - 1 and span.end - span.last <= max(np.diff(times)) + 2e-3


def test_a_recorder_that_states_1000_frames_a_second(tmp_path):
    """What browsers write: no rate, no durations. The last frame counts for as long as the one before it."""
    file = write_video(tmp_path / "a.webm", 17, fps=1000, times=np.arange(17) / 16)
    assert video_span(file).count(16) == 17 and video_span(file).end == pytest.approx(17 / 16, abs=2e-3)
    np.testing.assert_allclose(brightness(read_end(file, WANTED)), 2.0 * np.arange(8, 17), atol=2.5)
    assert len(read_clip(file, replace(WANTED, frames=17))) == 17


def test_a_last_frame_that_is_shown_for_long_fills_the_end(tmp_path):
    greys = [Image.new("L", (32, 16), 20 * n) for n in range(6)]
    greys[0].save(tmp_path / "a.gif", save_all=True, append_images=greys[1:], duration=[60] * 5 + [400])
    assert video_span(tmp_path / "a.gif").count(16) == 11  # 0.7 seconds
    np.testing.assert_allclose(read_end(tmp_path / "a.gif", WANTED).mean((1, 2, 3)), [40, 60, 80, *[100] * 6])


@pytest.mark.parametrize(("first", "frames"), [(12, 30), (5, 20), (0, 40)])
def test_what_an_edit_list_trims_off_is_not_shown(tmp_path, first, frames):
    file = write_video(tmp_path / "a.mp4", 60)
    trim_mp4(file, first, frames, 16)
    assert video_span(file).count(16) == frames
    np.testing.assert_allclose(brightness(read_clip(file, WANTED)), 2.0 * np.arange(first, first + 9), atol=1.5)
    last = first + frames
    np.testing.assert_allclose(brightness(read_end(file, WANTED)), 2.0 * np.arange(last - 9, last), atol=1.5)


def test_only_the_end_is_decoded(tmp_path, monkeypatch):
    """Of 400 frames with a key frame in every eight: those of one or two groups, and as many pictures as are wanted."""
    file = write_video(tmp_path / "a.mp4", 400, video=ramp(200, 16, 32)[np.arange(400) % 100])
    decoded, fitted = [], []
    timed, fit = module._timed, module.fit_picture
    monkeypatch.setattr(module, "_timed", lambda *a: (decoded.append(t) or (t, f) for t, f in timed(*a)))
    monkeypatch.setattr(module, "fit_picture", lambda *a: fitted.append(1) or fit(*a))
    read_end(file, WANTED)
    assert len(decoded) <= 9 + 2 * 8 and len(fitted) == 9


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mpg"])
def test_a_part_of_a_file_is_what_the_whole_shows_there(tmp_path, suffix):
    """Also where a file has no index (.mpg), in which a jump would give frames of wrong times."""
    video = np.random.default_rng(0).integers(0, 255, (60, 16, 32, 3), np.uint8)
    file = write_video(tmp_path / f"a{suffix}", 60, fps=25, video=video)
    whole = read_clip(file, replace(WANTED, frames=60, fps=25))
    part = read_clip(file, replace(WANTED, fps=25), start=1.2)
    np.testing.assert_array_equal(part, whole[30:39])
    with pytest.raises(Unusable, match="too short: 5 of 9"):
        read_clip(file, replace(WANTED, fps=25), start=1.2, stop=1.4)


def test_one_frame(tmp_path):
    file = write_video(tmp_path / "a.mp4", 1)
    one = replace(WANTED, frames=1)
    np.testing.assert_array_equal(read_end(file, one), read_clip(file, one))
    assert video_span(file).count(16) == 1
    with pytest.raises(Unusable, match="too short: 1 of 9"):
        read_end(file, WANTED)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_a_broken_tail_is_reported_and_a_whole_beginning_serves(tmp_path, suffix):
    video = np.random.default_rng(0).integers(0, 255, (60, 16, 32, 3), np.uint8)
    file = write_video(tmp_path / f"a{suffix}", 60, video=video, faststart=suffix == ".mp4")
    whole = read_clip(file, WANTED)
    truncate(file, 0.6)
    np.testing.assert_array_equal(read_clip(file, WANTED), whole)
    with pytest.raises(Unusable, match=r"damaged: .* cut it"):
        read_end(file, WANTED)


def test_two_recordings_in_one_file_are_reported(tmp_path):
    one, other = (write_video(tmp_path / f"{name}.ts", 24, fps=16) for name in "ab")
    one.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(Unusable, match="time stamps go back from"):
        read_clip(one, replace(WANTED, frames=40))


def test_sound_alone_is_reported_also_with_a_picture_on_its_cover(tmp_path):
    Image.new("RGB", (32, 32)).save(cover := io.BytesIO(), "JPEG")
    for file in (write_sound(tmp_path / "a.mp3"), write_sound(tmp_path / "b.mp3", cover.getvalue())):
        for read in (read_clip, read_end):
            with pytest.raises(Unusable, match="no pictures: sound alone"):
                read(file, WANTED)


def test_transparent_parts_show_white(tmp_path):
    frames = [Image.new("RGBA", (32, 16), (200, 10, 10, 255 if n % 2 else 0)) for n in range(9)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=60, disposal=2)
    clip = read_clip(tmp_path / "a.gif", WANTED)
    assert (clip[0] == 255).all() and clip[1].reshape(-1, 3).mean(0).round().tolist() == [200, 10, 10]


# ---- fitting


def test_cover_cuts_both_sides_alike_and_stretch_cuts_nothing():
    picture = np.zeros((32, 128, 3), np.uint8)
    picture[:, :32], picture[:, 96:] = 250, 250  # cover keeps the middle half
    cover = fit_picture(picture, WANTED)
    stretch = fit_picture(picture, replace(WANTED, fit="stretch"))
    assert cover.shape == stretch.shape == (16, 32, 3)
    assert cover[:, 2:-2].max() == 0 and (stretch[:, :6] == 250).all() and (stretch[:, -6:] == 250).all()
    small = fit_picture(np.full((8, 16, 3), 7, np.uint8), replace(WANTED, upscale=True))
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
