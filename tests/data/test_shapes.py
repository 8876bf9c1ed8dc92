"""The moving-shapes world: determinism, geometry, captions and the factors' truth."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.shapes import (
    DIRECTIONS,
    SHAPES,
    ShapesConfig,
    ShapesSource,
    all_captions,
    coverage,
    parse_caption,
    render,
)

FULL = ShapesConfig(
    shapes=tuple(SHAPES),
    directions=tuple(DIRECTIONS),
    speed_words=(("slowly", 0.5, 0.8), ("quickly", 1.3, 1.6)),
    start_words=True,
)


def test_clip_has_the_promised_form_and_is_drawn_again_from_its_factors():
    item = ShapesSource(ShapesConfig(), 0, 10)[3]
    video = item["video_PHWC"]
    assert video.shape == (12, 32, 32, 3) and video.dtype == np.float32 and np.abs(video).max() <= 1
    np.testing.assert_array_equal(render(item["factors"], ShapesConfig()), video)


def test_clip_depends_on_config_seed_and_index_alone():
    config = ShapesConfig()
    long, short = ShapesSource(config, 7, 1000), ShapesSource(config, 7, 50)
    np.testing.assert_array_equal(long[42]["video_PHWC"], short[42]["video_PHWC"])
    assert not np.array_equal(long[42]["video_PHWC"], long[43]["video_PHWC"])
    assert not np.array_equal(long[42]["video_PHWC"], ShapesSource(config, 8, 50)[42]["video_PHWC"])


def test_another_process_draws_the_same_clip():
    code = (
        "import hashlib; from cfjax.data.shapes import *;"
        "print(hashlib.sha256(ShapesSource(ShapesConfig(), 5, 100)[77]['video_PHWC'].tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = hashlib.sha256(ShapesSource(ShapesConfig(), 5, 100)[77]["video_PHWC"].tobytes()).hexdigest()
    assert other == here


def test_out_of_range_records_raise_index_errors():
    source = ShapesSource(ShapesConfig(), 0, 4)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            source[index]


def test_path_has_the_captioned_heading_and_the_recorded_speed():
    source = ShapesSource(FULL, 1, 64)
    for i in range(64):
        factors = source.factors(i)
        steps = np.diff(factors["centres"][0], axis=0)
        heading = np.asarray(DIRECTIONS[str(factors["direction"][0])])
        np.testing.assert_allclose(steps, np.tile(factors["speed"] * heading, (11, 1)), atol=1e-4)
        low, high = {w: (a, b) for w, a, b in FULL.speed_words}[str(factors["speed_word"][0])]
        assert low <= factors["speed"][0] <= high


@pytest.mark.parametrize("config", [ShapesConfig(), ShapesConfig(bounces=True, speed=(2.0, 3.0), frames=30)])
def test_shapes_never_leave_the_frame(config):
    source = ShapesSource(config, 2, 64)
    for i in range(64):
        factors = source.factors(i)
        left, right, up, down = (r * factors["radius"][0] for r in SHAPES[str(factors["shape"][0])].reach)
        centres = factors["centres"][0]
        assert (centres >= np.array([left, up]) - 1e-3).all()
        assert (centres <= config.size - np.array([right, down]) + 1e-3).all()


def test_bounces_are_counted_and_keep_the_speed():
    config = ShapesConfig(bounces=True, speed=(2.0, 2.0), frames=40)
    factors = ShapesSource(config, 0, 4).factors(0)
    velocity = np.diff(factors["centres"][0], axis=0)
    straight = np.abs(np.linalg.norm(velocity, axis=1) - 2.0) < 1e-3
    assert factors["bounces"][0] > 0 and (~straight).sum() <= factors["bounces"][0]


def test_branching_turns_by_a_right_angle_past_the_first_third():
    config = ShapesConfig(branching=1.0)
    sides = []
    for i in range(64):
        factors = ShapesSource(config, 3, 64).factors(i)
        turn, side = int(factors["turn_frame"][0]), int(factors["turn_side"][0])
        steps = np.diff(factors["centres"][0], axis=0)
        before, after = steps[turn - 1], steps[turn]
        assert turn >= config.frames // 3
        np.testing.assert_allclose(steps[:turn], np.tile(before, (turn, 1)), atol=1e-4)
        np.testing.assert_allclose(after, side * np.array([-before[1], before[0]]), atol=1e-4)
        sides.append(side)
    assert 16 < sides.count(1) < 48


def test_two_objects_differ_in_colour_and_rarely_touch():
    source = ShapesSource(ShapesConfig(num_objects=2), 0, 40)
    touching = 0
    for i in range(40):
        item = source[i]
        factors = item["factors"]
        assert factors["colour"][0] != factors["colour"][1] and " and " in item["caption"]
        apart = np.linalg.norm(factors["centres"][0] - factors["centres"][1], axis=-1).min()
        touching += apart < factors["radius"].sum()
    assert touching <= 4


def test_captions_parse_back_to_the_factors():
    source = ShapesSource(FULL, 4, 50)
    for i in range(50):
        item = source[i]
        parsed = parse_caption(item["caption"], FULL)
        for name in ("shape", "colour", "direction"):
            np.testing.assert_array_equal(parsed[name], item["factors"][name])


def test_default_captions_are_the_listed_ones():
    config = ShapesConfig()
    captions = all_captions(config)
    assert len(captions) == len(set(captions)) == 72 and "a red circle moving left" in captions
    assert ShapesSource(config, 0, 9)[8]["caption"] in captions


def test_caption_without_a_known_shape_is_refused():
    with pytest.raises(UserError, match="name one shape"):
        parse_caption("a red cat moving left", ShapesConfig())


def test_soft_masks_of_different_shapes_are_centred_and_distinguishable():
    centre = np.array([[16.3, 15.6]])
    axis = np.arange(32) + 0.5
    masks = {name: coverage(name, centre, 5.5, 32, 0.75)[0] for name in SHAPES}
    for mask in masks.values():
        measured = np.array([(mask.sum(0) @ axis), (mask.sum(1) @ axis)]) / mask.sum()
        np.testing.assert_allclose(measured, centre[0], atol=0.1)
    names = list(masks)
    for a in range(len(names)):
        for b in range(a):
            assert np.abs(masks[names[a]] - masks[names[b]]).sum() > 12


def test_config_round_trips_through_json_values():
    assert ShapesConfig.from_json(FULL.to_json()) == FULL
    with pytest.raises(UserError, match="is unknown; known are"):
        ShapesConfig.from_json({"sise": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("hexagon",)}, "shapes.shapes"),
        ({"colours": ("red", "red")}, "distinct"),
        ({"directions": ()}, "shapes.directions"),
        ({"num_objects": 3}, "num_objects"),
        ({"speed": (2.0, 1.0)}, "shapes.speed"),
        ({"speed": (2.0, 3.0)}, "bounces=True"),
        ({"branching": 1.5}, "branching"),
    ],
)
def test_impossible_worlds_are_refused_with_the_fix(change, message):
    with pytest.raises(UserError, match=message):
        ShapesConfig(**change)
