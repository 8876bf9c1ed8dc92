"""The shape judge: right about true clips, also after the codec, and not fooled by wrong ones."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.shapes import DIRECTIONS, SHAPES, ShapesConfig, ShapesSource, parse_caption
from cfjax.evaluation.shapes_metrics import evaluate_shapes, measure_shapes, wilson
from cfjax.models.codec import fit_patch_codec

CONFIG = ShapesConfig()


def clips(config, count=48, seed=11):
    source = ShapesSource(config, seed, count)
    items = [source[i] for i in range(count)]
    return np.stack([item["video_PHWC"] for item in items]), [item["factors"] for item in items], items


@pytest.fixture(scope="module")
def real():
    return clips(CONFIG)


WORLDS = {
    "default": CONFIG,
    "all shapes and headings": ShapesConfig(shapes=tuple(SHAPES), directions=tuple(DIRECTIONS)),
    "branching": ShapesConfig(branching=1.0),
    "bouncing": ShapesConfig(bounces=True, speed=(1.5, 3.0), frames=16),
    "two objects": ShapesConfig(num_objects=2),
    "captioned speed": ShapesConfig(speed_words=(("slowly", 0.5, 0.8), ("quickly", 1.3, 1.6))),
}


@pytest.mark.parametrize("world", WORLDS)
def test_true_clips_are_judged_correct(world):
    video, factors, _ = clips(WORLDS[world])
    summary = evaluate_shapes(video, factors, WORLDS[world])["summary"]
    assert summary["all_correct"] >= 0.97 and summary["presence"] >= 0.97
    assert summary["residual"] < 0.02 and summary["direction_error"] < 2
    assert summary.get("speed_correct", 1.0) >= 0.97


def test_codec_round_trip_keeps_every_verdict(real):
    video, factors, _ = real
    source = ShapesSource(CONFIG, 0, 150)
    codec = fit_patch_codec(source[i]["video_PHWC"] for i in range(150))
    summary = evaluate_shapes(np.asarray(codec.decode(codec.encode(video))), factors, CONFIG)["summary"]
    assert summary["all_correct"] == 1.0 and summary["presence"] == 1.0
    assert 0.02 < summary["residual"] < 0.08


def test_measurements_match_the_recorded_factors(real):
    video, factors, _ = real
    table = measure_shapes(video, CONFIG)
    centres = np.stack([f["centres"][0] for f in factors])
    assert np.abs(table["centres"] - centres).max() < 0.6
    np.testing.assert_allclose(table["radius"], [f["radius"][0] for f in factors], atol=0.2)
    np.testing.assert_allclose(table["displacement"], [f["speed"][0] for f in factors], atol=0.1)
    assert table["jerkiness"].mean() < 0.1


def test_prompts_serve_as_factors(real):
    video, _, items = real
    parsed = [parse_caption(item["caption"], CONFIG) for item in items]
    assert evaluate_shapes(video, parsed, CONFIG)["summary"]["all_correct"] == 1.0


def test_wrong_prompts_are_caught_factor_by_factor(real):
    video, factors, _ = real
    for name, options in (("shape", CONFIG.shapes), ("colour", CONFIG.colours), ("direction", CONFIG.directions)):
        other = {value: options[(i + 1) % len(options)] for i, value in enumerate(options)}
        wrong = [f | {name: np.array([other[str(f[name][0])]])} for f in factors]
        summary = evaluate_shapes(video, wrong, CONFIG)["summary"]
        assert summary[f"{name}_correct"] == 0 and summary["all_correct"] == 0


def test_a_frozen_clip_is_static(real):
    video, factors, _ = real
    table = evaluate_shapes(np.repeat(video[:, :1], 12, 1), factors, CONFIG)["clips"]
    assert set(table["direction"]) == {"static"} and table["shape_correct"].all() and not table["all_correct"].any()


def test_an_empty_clip_shows_nothing(real):
    video, factors, _ = real
    empty = np.broadcast_to(np.asarray(CONFIG.background, np.float32), video.shape)
    table = evaluate_shapes(empty, factors, CONFIG)["clips"]
    assert set(table["shape"]) == set(table["colour"]) == set(table["direction"]) == {"none"}
    assert not table["presence"].any() and not table["all_correct"].any()


def test_vanishing_jitter_and_blur_show_in_their_own_numbers(real):
    video, factors, _ = real
    clean = evaluate_shapes(video, factors, CONFIG)["summary"]
    vanished = video.copy()
    vanished[:, 5] = CONFIG.background
    assert evaluate_shapes(vanished, factors, CONFIG)["summary"]["presence"] == 0
    jittered = np.stack([np.roll(video[:, p], (-1) ** p, axis=2) for p in range(12)], 1)
    assert evaluate_shapes(jittered, factors, CONFIG)["summary"]["jerkiness"] > clean["jerkiness"] + 2
    blurred = (np.roll(video, 2, 2) + np.roll(video, -2, 2) + np.roll(video, 2, 3) + np.roll(video, -2, 3)) / 4
    assert evaluate_shapes(blurred, factors, CONFIG)["summary"]["residual"] > 3 * clean["residual"]


def test_turns_are_read_off_branching_clips():
    config = ShapesConfig(branching=0.5)
    video, factors, _ = clips(config)
    np.testing.assert_array_equal(measure_shapes(video, config)["turn_side"], [f["turn_side"][0] for f in factors])


def test_longer_clips_than_configured_are_judged_too():
    config = ShapesConfig(frames=9)
    video, factors, _ = clips(CONFIG, 8)
    assert evaluate_shapes(video, factors, config)["summary"]["all_correct"] == 1.0


def test_wilson_interval_has_its_textbook_values():
    np.testing.assert_allclose(wilson(8, 10), (0.490, 0.943), atol=1e-3)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 10)[0] == 0.0


def test_misfits_are_refused(real):
    video, factors, _ = real
    with pytest.raises(UserError, match="48 clips but 47 factors"):
        evaluate_shapes(video, factors[1:], CONFIG)
    with pytest.raises(UserError, match="needs"):
        evaluate_shapes(video[:, :, :16], factors, CONFIG)
    with pytest.raises(UserError, match=r"is not in config\.colours"):
        evaluate_shapes(video, factors, ShapesConfig(colours=("white",)))
