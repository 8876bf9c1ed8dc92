"""Metrics of a clip: known motions, ramps, freezes, loops and seams are found; official code's numbers are met."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cfjax.data.pictures import Unusable
from cfjax.evaluation.actions import action_fidelity
from cfjax.evaluation.clip_source import SourceClip, reading
from cfjax.evaluation.frame_metrics import (
    FlickerMeter,
    FrameMeter,
    boundaries,
    drift_per_second,
    freeze,
    loop,
    luma_of,
    seams,
)
from cfjax.evaluation.guard import frame_series, measure_clip
from cfjax.evaluation.guard import seams as guard_seams
from cfjax.evaluation.motion_metrics import FlowMeter, is_dynamic
from cfjax.evaluation.opencv import opencv
from cfjax.evaluation.reference_metrics import ReferenceMeter, psnr, similarities
from tests.golden.record_vbench import FILE, RATES, SIZES, flows, moving, noisy

HEIGHT, WIDTH = 192, 256
OFFICIAL = np.load(FILE)


def texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A random picture at any places with details of 9 px and more: DIS begins at a quarter of the size."""
    rng = np.random.default_rng(0)
    out = np.full((*x.shape, 3), 110.0)
    for across, down, phase in rng.uniform(-0.7, 0.7, (24, 3)):
        out += 9 * np.sin(across * x[..., None] + down * y[..., None] + phase * np.array([4.0, 5.0, 6.0]))
    return out


def clip_of(place, frames: int = 9, part: int = 1) -> list[np.ndarray]:
    """uint8 frames of the texture; `place(x, y, n)` tells where frame n is taken from it; `part` divides its sides."""
    y, x = np.mgrid[: HEIGHT // part, : WIDTH // part].astype(float)
    x, y = x - x.mean(), y - y.mean()
    return [np.clip(texture(*place(x, y, n)), 0, 255).round().astype(np.uint8) for n in range(frames)]


def measured(frames, fps: float = 16.0) -> dict[str, float]:
    meter = FlowMeter(fps)
    for frame in frames:
        meter.add(luma_of(frame))
    return meter.values()


def flickering(frames) -> FlickerMeter:
    meter = FlickerMeter()
    for frame in frames:
        meter.add(frame)
    return meter


# ---- motion


@pytest.mark.parametrize(("across", "down", "fps"), [(0.5, 0.0, 16.0), (1.5, -1.0, 16.0), (-3.0, 2.0, 8.0)])
def test_a_translation_gives_its_pixels_per_frame(across, down, fps):
    """To 0.2 px from one sampled frame to the next: DIS begins at a quarter of the size."""
    found = measured(clip_of(lambda x, y, n: (x - across * n, y - down * n)), fps)
    length = math.hypot(across, down)
    near = 0.2 / max(1, round(fps / 8))
    assert found["pan"] == pytest.approx(across, abs=near) and found["tilt"] == pytest.approx(down, abs=near)
    for name in ("flow", "flow_fastest", "camera_speed"):
        assert found[name] == pytest.approx(length, abs=1.5 * near), name
    assert found["camera_share"] > 0.95 and found["object_flow"] < 0.1
    assert abs(found["zoom"]) < 0.02 and abs(found["roll"]) < 0.5
    assert found["motion_smoothness"] > 0.995


def test_a_zoom_and_a_turn_give_their_rates():
    growth, turn = 0.01, math.radians(0.5)  # a frame

    def place(x, y, n):
        scale, angle = math.exp(-growth * n), -turn * n
        return scale * (math.cos(angle) * x - math.sin(angle) * y), scale * (math.sin(angle) * x + math.cos(angle) * y)

    found = measured(clip_of(place), fps=16.0)
    assert found["zoom"] == pytest.approx(16 * growth, rel=0.1)  # measured 5 and 8 %, for the same reason
    assert found["roll"] == pytest.approx(16 * math.degrees(turn), rel=0.1)
    assert abs(found["pan"]) < 0.05 and abs(found["tilt"]) < 0.05


def test_an_object_before_a_still_camera_is_no_camera_motion():
    frames = []
    for n, frame in enumerate(clip_of(lambda x, y, n: (x, y))):
        frame[60:124, 20 + 3 * n : 84 + 3 * n] = clip_of(lambda x, y, n: (x, y), 1)[0][:64, 100:164, ::-1]
        frames.append(frame)
    found = measured(frames)
    assert found["camera_speed"] < 0.1 and found["flow_fastest"] > 1.5 and found["object_flow"] > 0.1
    assert 0.8 < found["camera_share"] < 1.0


def test_an_abrupt_frame_costs_smoothness():
    frames = clip_of(lambda x, y, n: (x - n, y))
    smooth = measured(frames)["motion_smoothness"]
    frames[3] = frames[8]
    assert measured(frames)["motion_smoothness"] < smooth - 0.005


def test_frames_are_sampled_and_judged_as_vbench_does():
    """Recorded from its own class: sampling, threshold, mean of the fastest pixels, the rule."""
    assert [FlowMeter(rate).interval for rate in RATES] == OFFICIAL["intervals"].tolist()
    fastest = []
    for field in flows():
        meter = FlowMeter(8.0)
        meter._pair(field)
        fastest.append(meter.values()["flow_fastest"])
    np.testing.assert_allclose(fastest, OFFICIAL["fastest"], rtol=1e-6)
    for (height, width, count), (threshold, needed) in zip(SIZES, OFFICIAL["parameters"], strict=True):
        side, above = min(height, width), np.nextafter(threshold, np.inf)
        for moving_pairs in range(count):
            pairs = [above] * moving_pairs + [threshold] * (count - 1 - moving_pairs)
            assert is_dynamic(pairs, side, count) == (moving_pairs >= needed), (side, count, moving_pairs)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (12, 40), (16, 16)])
def test_frames_too_small_for_optical_flow_have_none(size):
    found = measured([np.zeros((*size, 3), np.uint8)] * 5)
    assert found["flow"] == 0 if min(size) >= 16 else all(map(math.isnan, found.values()))


def test_actions_are_compared_with_the_camera():
    asked = np.repeat([1.0, -1.0, 0.0, 2.0, -2.0, 1.0], 2)
    camera = np.zeros((6, 4))
    camera[:, 0] = 0.5 * asked[::2] + 0.01
    found = action_fidelity({"pan": asked}, camera, 2)
    assert found["action_fidelity"] == pytest.approx(1.0) and found["action_sign"] == 1.0
    turned = action_fidelity({"pan": -asked, "tilt": np.zeros(12)}, camera, 2)
    assert turned["action_fidelity"] == pytest.approx(-1.0) and turned["action_sign"] == 0.0
    assert all(map(math.isnan, action_fidelity({"zoom": np.zeros(12)}, camera, 2).values()))


# ---- frames


def test_flickering_is_vbenchs_number(tmp_path):
    """On lossless frames, and on an H.264 file, whose frames are decoded to the same bytes."""
    assert flickering(moving()).values()["temporal_flickering"] == pytest.approx(
        float(OFFICIAL["flickering_pictures"]), abs=1e-7
    )
    assert float(OFFICIAL["flickering_fastvideo"]) == pytest.approx(float(OFFICIAL["flickering_pictures"]), abs=1e-7)
    (tmp_path / "clip.mp4").write_bytes(OFFICIAL["mp4"].tobytes())
    with reading(SourceClip("clip.mp4", tmp_path / "clip.mp4")) as opened:
        frames = list(opened.frames)
    assert opened.fps == opencv().VideoCapture(str(tmp_path / "clip.mp4")).get(opencv().CAP_PROP_FPS) == 16
    np.testing.assert_array_equal(np.stack(frames), OFFICIAL["frames_mp4"])
    assert flickering(frames).values()["temporal_flickering"] == pytest.approx(
        float(OFFICIAL["flickering_mp4"]), abs=1e-7
    )


def test_frames_are_measured_as_the_guard_measures_them():
    frames = noisy(moving())
    meter = FrameMeter()
    for frame in frames:
        meter.add(frame, luma_of(frame))
    series, steps = frame_series(frames), flickering(frames).differences
    for name in ("luma", "contrast", "sharpness"):
        np.testing.assert_allclose(meter.series[name], series[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(meter.series["saturation"], series["saturation"], atol=1e-3)  # OpenCV's is in bytes
    at = boundaries(12, 4)
    assert at.tolist() == [3, 7] and boundaries(21, 12, 9).tolist() == [8]
    assert boundaries(33, 12, 9).tolist() == guard_seams([(0, 3), (3, 6), (6, 9)], 4).tolist()
    assert seams(steps, series["luma"], at)["seam"] == pytest.approx(measure_clip(frames, at)["seam"])


def test_a_brightness_ramp_gives_its_slope():
    meter = FrameMeter()
    for n in range(17):
        frame = np.full((32, 32, 3), 40 + 4 * n, np.uint8)
        meter.add(frame, luma_of(frame))
    found = meter.values(fps=8.0)
    assert found["luma_drift"] == pytest.approx(8 * 4 / 255, rel=1e-5) and found["luma"] == pytest.approx(72 / 255)
    assert found["contrast_drift"] == pytest.approx(0, abs=1e-6) and found["saturation_drift"] == 0
    assert math.isnan(drift_per_second([0.5], 8.0))


def test_a_freeze_is_found_with_its_length():
    frames = clip_of(lambda x, y, n: (x - min(n, 4) - max(n - 10, 0), y), 15, 4)
    found = freeze(flickering(frames).differences, fps=8.0)
    assert found["longest_freeze"] == 6 / 8 and found["frozen"] == 6 / 14
    assert freeze(flickering(clip_of(lambda x, y, n: (x - n, y), part=4)).differences, 8.0)["frozen"] == 0
    assert math.isnan(freeze([], 8.0)["frozen"])


@pytest.mark.parametrize("period", [5, 12, 20])
def test_a_loop_is_found_with_its_period(period):
    def turning(x, y, n):
        angle = 2 * math.pi * n / period
        return x + 12 * math.cos(angle), y + 12 * math.sin(angle)

    meter = FrameMeter()
    for frame in noisy(np.stack(clip_of(turning, 40, 4)), 3.0):
        meter.add(frame, luma_of(frame))
    found = meter.values(fps=10.0)
    assert found["loop"] == 1.0 and found["loop_period"] == pytest.approx(period / 10)


def test_what_does_not_come_round_is_no_loop():
    """Steady motion, a still picture with noise, and one that turns back."""
    still = noisy(np.stack(clip_of(lambda x, y, n: (x, y), 30, 4)))
    there = clip_of(lambda x, y, n: (x - n, y), 30, 4)
    back = clip_of(lambda x, y, n: (x - 15 + abs(15 - n), y), 30, 4)
    for frames in (still, there, back):
        meter = FrameMeter()
        for frame in frames:
            meter.add(frame, luma_of(frame))
        assert meter.values(8.0)["loop"] == 0.0
    assert loop(np.zeros((3, 4)), 8.0)["loop"] == 0.0


def test_a_seam_is_the_jump_between_blocks():
    luma = np.cumsum([0.0, *([0.01, 0.01, 0.03] * 4)])
    assert seams(255 * np.diff(luma), luma, boundaries(13, 3))["seam"] == pytest.approx(3.0)
    assert seams(255 * np.diff(luma), luma, boundaries(13, 3))["seam_luma"] == pytest.approx(3.0)
    assert math.isnan(seams(np.zeros(12), np.zeros(13), boundaries(13, 3))["seam"])  # nothing moves
    assert math.isnan(seams(np.ones(12), np.ones(13), boundaries(13, 20))["seam"])  # one block


# ---- against a reference


def test_similarities_are_those_of_scikit_image_and_of_pytorch_msssim():
    clip, other = moving(), noisy(moving())
    meter = ReferenceMeter()
    for a, b in zip(clip, other, strict=True):
        meter.add(a, luma_of(a), b, luma_of(b))
        assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-9)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    known = [structural_similarity(luma_of(a), luma_of(b), **settings) for a, b in zip(clip, other, strict=True)]
    assert meter.values()["ssim"] == pytest.approx(np.mean(known), abs=1e-5)
    assert meter.values()["psnr"] == pytest.approx(float(OFFICIAL["psnr"]), abs=1e-4)  # FastVideo's
    assert math.isnan(meter.values()["ms_ssim"])
    large = moving(1, 192, 256)
    ssim, ms_ssim = similarities(*(x[0, ..., 0].astype(np.float32) for x in (large, noisy(large))))
    assert ssim == pytest.approx(float(OFFICIAL["ssim"]), abs=1e-5)
    assert ms_ssim == pytest.approx(float(OFFICIAL["ms_ssim"]), abs=1e-5)


def test_a_clip_against_itself():
    clip = moving(2)
    assert psnr(clip[0], clip[0]) == 100.0
    assert similarities(luma_of(clip[0]), luma_of(clip[0]))[0] == pytest.approx(1.0)
    assert all(map(math.isnan, similarities(np.zeros((10, 90), np.float32), np.zeros((10, 90), np.float32))))


def test_a_file_that_is_no_video_says_so(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(Unusable, match="unreadable"), reading(SourceClip("a.mp4", tmp_path / "a.mp4")) as opened:
        list(opened.frames)
    with pytest.raises(Unusable, match=r"give --config\.fps"), reading(SourceClip("a", tmp_path, ("0.png",))):
        pass
