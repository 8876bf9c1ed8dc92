"""The guard rails: every number on clips where it is known, and every warning on the collapse that it is for.

Bounds of the warnings are measured on real toy clips through their codec: what is done to them is mild (20 % more
chroma, a blur of 0.4 px, a third of the seeds alike) and silent, or a collapse and reported.
"""

import math
from dataclasses import fields

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cfjax.core.errors import UserError
from cfjax.evaluation.guard import (
    Baseline,
    Collector,
    Sample,
    Thresholds,
    diversity,
    measure_clip,
    seams,
    thumbnail,
    warnings,
)
from cfjax.worlds.toy import evaluation_clips, shipped_world, stack_videos

RED = np.array([204, 51, 51], np.uint8)


def flat(*colours, size: int = 8) -> np.ndarray:
    """A frame of one colour after another."""
    return np.stack([np.full((size, size, 3), colour, np.uint8) for colour in colours])


# ---- numbers


def test_motion_is_the_mean_change_in_grey_levels():
    clip = measure_clip(flat(10, 20, 50))
    assert clip["motion"] == 20.0
    assert clip["temporal_flickering"] == (255 - 20) / 255  # VBench: (255 - mean absolute difference) / 255
    assert clip["frozen"] == 0.0 and clip["travel"] == 2.0


def test_frozen_steps_are_counted():
    still = flat(10, 10, 10, 40, 40)
    assert measure_clip(still)["frozen"] == 0.75
    still[1, 0, 0, 0] += 1  # one value of 192 by one grey level is no motion
    assert measure_clip(still)["frozen"] == 0.75
    assert math.isnan(measure_clip(flat(10, 10))["travel"])


def test_a_still_picture_that_flickers_does_not_travel():
    assert measure_clip(flat(10, 30, 10, 30))["travel"] == 1.0
    grain = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3)).astype(np.uint8)
    assert measure_clip(grain)["travel"] == pytest.approx(1.0, abs=0.05)


def test_luma_is_bt709_and_saturation_is_hsv():
    clip = measure_clip(np.broadcast_to(RED, (2, 8, 8, 3)).copy())
    assert clip["luma"] == pytest.approx((0.2126 * 204 + 0.7874 * 51) / 255, abs=1e-6)
    assert clip["saturation"] == pytest.approx(1 - 51 / 204)
    assert (clip["contrast"], clip["sharpness"]) == pytest.approx((0, 0), abs=1e-6)
    black = measure_clip(flat(0, 0))
    assert black["saturation"] == 0.0 and black["clipped"] == 1.0
    assert measure_clip(flat((255, 7, 0), (255, 7, 7)))["clipped"] == pytest.approx(0.5)


def test_contrast_and_sharpness_of_a_checkerboard():
    """Luma 0.2 and 0.6: deviation 0.2; the Laplacian is +-4 x 0.4, so its deviation is 1.6. Stripes have half of it."""
    board = np.where(np.indices((9, 9)).sum(0) % 2, 51, 153).astype(np.uint8)[None, ..., None].repeat(3, -1)
    stripes = np.broadcast_to(np.where(np.arange(9) % 2, 51, 153).astype(np.uint8)[None, None, :, None], (1, 9, 9, 3))
    clip = measure_clip(board)
    assert clip["contrast"] == pytest.approx(0.2, abs=1e-3) and clip["sharpness"] == pytest.approx(1.6, abs=1e-2)
    assert measure_clip(stripes)["sharpness"] == pytest.approx(0.8, abs=1e-2)


def test_drift_is_the_change_over_the_clip():
    ramp = measure_clip(flat(*range(51, 153, 10)))
    assert ramp["luma_drift"] == pytest.approx(100 / 255, abs=1e-5) and ramp["saturation_drift"] == 0.0
    colours = [(200, 200 - 10 * i, 200 - 10 * i) for i in range(6)]
    assert measure_clip(flat(*colours))["saturation_drift"] == pytest.approx(0.25)
    assert math.isnan(measure_clip(flat(9))["luma_drift"])


def test_seams_lie_where_blocks_meet():
    spans = [(0, 3), (3, 6), (6, 9)]
    assert seams(spans, 1).tolist() == [2, 5]  # toy: frames 2 -> 3 and 5 -> 6
    assert seams(spans, 4).tolist() == [8, 20]  # Wan: a block of 3 ends with frames 8, 20, of 33
    assert seams([(0, 1), (1, 4)], 4).tolist() == [0]
    steps = flat(*np.cumsum([10, 2, 2, 8, 2, 2, 8, 2, 2]))
    assert measure_clip(steps, seams(spans, 1))["seam"] == 4.0
    assert math.isnan(measure_clip(steps)["seam"]) and math.isnan(measure_clip(flat(9, 9), np.array([0]))["seam"])


def test_floats_count_as_the_bytes_that_are_written():
    video = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 8, 8, 3)).astype(np.float32)
    written = (np.clip(video / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    assert measure_clip(video) == measure_clip(written) | {"seam": pytest.approx(math.nan, nan_ok=True)}
    with pytest.raises(UserError, match="NaN"):
        measure_clip(np.full((2, 8, 8, 3), np.nan))
    with pytest.raises(UserError, match="uint8"):
        measure_clip(np.zeros((2, 8, 8, 4), np.uint8))


def test_a_large_clip_is_compared_in_the_small():
    video = np.zeros((81, 60, 130, 3), np.uint8)
    video[..., 65:, :] = 90
    small = thumbnail(video)
    assert small.shape == (16, 20, 43, 3)
    assert (small[:, :, :21] == 0).all() and small[0, 0, 21, 0] == 30 and (small[:, :, 22:] == 90).all()


def test_diversity_is_the_seeds_share_of_the_distance():
    thumbs = [[np.full((1, 4, 4, 3), value, np.float32) for value in row] for row in ((0, 2), (10, 12))]
    assert diversity(thumbs) == {"seed_distance": 2.0, "diversity": 2.0 / np.mean([10, 12, 8, 10])}
    one = [[row[0], row[0]] for row in thumbs]
    assert diversity(one) == {"seed_distance": 0.0, "diversity": 0.0}
    assert diversity([one[0], one[0]])["diversity"] == 0.0  # all videos are equal
    assert math.isnan(diversity([row[:1] for row in thumbs])["seed_distance"])
    assert math.isnan(diversity(thumbs[:1])["diversity"])


def test_undefined_metrics_are_left_out():
    collector = Collector()
    with pytest.raises(UserError, match="no clips"):
        collector.values()
    collector.add("a", flat(9, 12))
    assert {"seam", "diversity", "seed_distance"}.isdisjoint(collector.values())
    collector.add("a", flat(9, 15))
    assert collector.values()["motion"] == 4.5 and collector.values()["seed_distance"] == 1.5


# ---- warnings

SEAMS = np.array([2, 5, 8])


@pytest.fixture(scope="module")
def real():
    """(captions, clips through the codec): 15 prompts with two clips each."""
    world = shipped_world("toy_teacher")
    clips = evaluation_clips(world.shapes, 30)
    videos = np.asarray(world.codec.decode(world.codec.encode(stack_videos(clips))))
    return [clip["caption"] for clip in clips], videos


def values(captions, videos):
    collector = Collector(SEAMS)
    for caption, video in zip(captions, videos, strict=True):
        collector.add(caption, video)
    return collector.values()


@pytest.fixture(scope="module")
def baseline(real):
    return Baseline("real clips", True, values(*real))


def grey(videos):
    return videos.mean(-1, keepdims=True)


def chroma(videos, factor):
    return grey(videos) + factor * (videos - grey(videos))


def blurred(videos, sigma):
    return gaussian_filter(videos, (0, 0, sigma, sigma, 0))


def ramp(videos):
    return np.linspace(0, 1, videos.shape[1], dtype=np.float32)[None, :, None, None, None]


def noise(videos, levels):
    return np.random.default_rng(0).normal(0, levels / 127.5, videos.shape).astype(np.float32)


def held(videos):
    return videos[:, :1].repeat(videos.shape[1], 1)


COLLAPSES = {
    "freezes": (held, {"motion", "frozen"}),
    "freezes with flicker": (lambda v: held(v) + noise(v, 2), {"travel"}),
    "stops after two blocks": (lambda v: v[:, np.minimum(np.arange(12), 5)], {"motion", "frozen"}),
    "over-saturates": (lambda v: chroma(v, 1.6), {"saturation"}),
    "washes out": (lambda v: chroma(v, 0.5), {"saturation"}),
    "clips": (lambda v: 6 * v + 2, {"clipped"}),
    "brightens": (lambda v: v + 0.2, {"luma"}),
    "drifts in brightness": (lambda v: v + 0.2 * ramp(v), {"luma_drift"}),
    "drifts in colour": (lambda v: grey(v) + (1 + 0.8 * ramp(v)) * (v - grey(v)), {"saturation_drift"}),
    "loses contrast": (lambda v: v.mean() + 0.5 * (v - v.mean()), {"contrast"}),
    "gains contrast": (lambda v: v.mean() + 3.0 * (v - v.mean()), {"contrast"}),
    "blurs": (lambda v: blurred(v, 0.7), {"sharpness"}),
    "grain": (lambda v: v + noise(v, 8), {"motion", "sharpness"}),
    "jumps at blocks": (lambda v: v * np.repeat([1, 0.9, 1, 0.9], 3)[None, :, None, None, None], {"seam"}),
    "one clip per prompt": (lambda v: v[np.arange(len(v)) % 15], {"diversity"}),
}
MILD = {
    "real": lambda v: v,
    "other clips": lambda v: v[::-1, :, :, ::-1],
    "chroma": lambda v: chroma(v, 1.2),
    "blur": lambda v: blurred(v, 0.4),
    "pauses": lambda v: v[:, np.arange(12) * 5 // 6],
    "brighter": lambda v: v + 0.05,
    "noise": lambda v: v + noise(v, 0.5),
    "some seeds alike": lambda v: np.concatenate([v[:10], v[10:15], v[15:25], v[10:15]]),
}


def metrics_in(raised):
    return {line.partition("(")[2].split()[0] for line in raised.values()}


@pytest.mark.parametrize("collapse", COLLAPSES)
def test_a_collapse_is_reported(real, baseline, collapse):
    captions, videos = real
    spoil, metrics = COLLAPSES[collapse]
    raised = warnings(Sample(7, values(captions, spoil(videos))), baseline, stage="dmd")
    assert metrics <= metrics_in(raised), raised
    for line in raised.values():
        assert line.startswith("step 7: ") and "in real clips)" in line and "; try: " in line and "\n" not in line


@pytest.mark.parametrize("case", MILD)
def test_what_is_mild_is_silent(real, baseline, case):
    captions, videos = real
    assert warnings(Sample(7, values(captions, MILD[case](videos))), baseline, stage="dmd") == {}


def test_every_threshold_is_used_and_moves_its_warning(real, baseline):
    captions, videos = real
    sample = Sample(7, values(captions, chroma(videos, 1.6)))
    assert metrics_in(warnings(sample, baseline)) == {"saturation"}
    assert warnings(sample, baseline, Thresholds(saturation_high_ratio=1.6)) == {}
    used = {key for _, metrics in COLLAPSES.values() for key in metrics}
    names = {
        field.name.removesuffix("_ratio").removesuffix("_low").removesuffix("_high") for field in fields(Thresholds)
    }
    assert names == used


def test_a_runs_own_first_samples_forbid_no_gain():
    """From a blurred, slow start a student may become livelier and sharper; not blurrier."""
    first = {"motion": 2.0, "sharpness": 0.01, "saturation": 0.3}
    later = {"motion": 5.0, "sharpness": 0.03, "saturation": 0.3}
    assert warnings(Sample(9, later), Baseline("step 0", False, first)) == {}
    assert metrics_in(warnings(Sample(9, later), Baseline("real clips", True, first))) == {"motion", "sharpness"}
    assert metrics_in(warnings(Sample(9, first), Baseline("step 0", False, later))) == {"motion", "sharpness"}


def test_without_a_baselines_diversity_there_is_a_floor():
    (line,) = warnings(Sample(9, {"diversity": 0.1}), Baseline("real clips", True, {})).values()
    assert "every seed gives much the same video (diversity 0.1, expected 0.2 or more)" in line
    assert warnings(Sample(9, {"diversity": 0.4}), Baseline("real clips", True, {})) == {}


def test_advice_names_the_stages_own_keys():
    def advice(stage):
        base = Baseline("step 0", False, {"saturation": 0.3})
        (line,) = warnings(Sample(9, {"saturation": 0.5}), base, stage=stage).values()
        return line.partition("; try: ")[2]

    assert "objective.real_guidance" in advice("dmd") and "cadence.student" in advice("dmd")
    assert "objective.guidance" in advice("consistency")
    assert "sampler.guidance" in advice("ar_diffusion")


def test_advice_leaves_out_keys_that_the_run_does_not_read():
    def advice(metric, *keys, earlier=True):
        sample, other = Sample(9, {metric: 0.5}), Baseline("step 0", False, {metric: 0.3})
        (line,) = warnings(sample, other, stage="dmd", keys=keys, earlier=earlier).values()
        return line.partition("; ")[2]

    critic = "raise cadence.student (more critic updates per student update)"
    assert advice("saturation", "cadence.student", "objective.gan.r1_weight") == (
        f"try: raise objective.gan.r1_weight, or {critic}; or go on from an earlier checkpoint"
    )
    assert advice("saturation", "cadence.student", "objective.real_guidance") == (
        f"try: lower objective.real_guidance, or {critic}; or go on from an earlier checkpoint"
    )
    assert advice("luma_drift") == "go on from an earlier checkpoint"
    assert advice("luma_drift", earlier=False) == ""  # there is none to go on from
    assert advice("saturation", "cadence.student", earlier=False) == f"try: {critic}"
