"""The steered world: keys move the shape, the edges stop it, and records say what was held."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.latents import LatentDataset, make_iterator
from cfjax.data.merge import Member
from cfjax.data.precompute import precompute
from cfjax.data.shapes import ShapesConfig, limits, render
from cfjax.data.steered import KEYS, SteeringConfig, as_keys, draw_keys, keys_asked, parse_keys, spoken, steer
from cfjax.evaluation.shapes_metrics import measure_shapes
from cfjax.evaluation.steering import follow, random_keys, summary
from cfjax.worlds.toy import SplitSource, is_held_out, make_world

SHAPES = ShapesConfig(frames=12, radius=(4.8, 5.6))
STEERING = SteeringConfig()
SOURCE = SplitSource(SHAPES, 3, 64, steering=STEERING)


def test_clips_move_as_their_keys_say_and_stay_inside():
    """What is measured from pixels is the recorded path, and that is the keys' own."""
    clips = [SOURCE[i] for i in range(24)]
    centres = measure_shapes(np.stack([clip["video_PHWC"] for clip in clips]), SHAPES)["centres"]
    for clip, seen in zip(clips, centres, strict=True):
        factors = clip["factors"]
        path, keys = factors["centres"][0], clip["actions_FA"]
        np.testing.assert_array_equal(keys, factors["keys"][0])
        low, high = limits(str(factors["shape"][0]), float(factors["radius"][0]), SHAPES.size)
        assert (path >= low - 1e-4).all() and (path <= high + 1e-4).all()
        right, down = keys[1:, 1] - keys[1:, 0], keys[1:, 3] - keys[1:, 2]
        wanted = np.clip(path[:-1] + STEERING.speed * np.stack([right, down], -1), low, high)
        np.testing.assert_allclose(path[1:], wanted, atol=1e-4)
        assert np.abs(seen - path).max() < 0.5


def test_a_clip_is_a_function_of_its_seed_and_number():
    again = SplitSource(SHAPES, 3, 64, steering=STEERING)[7]
    np.testing.assert_array_equal(again["video_PHWC"], SOURCE[7]["video_PHWC"])
    plain = SplitSource(SHAPES, 3, 64)[7]
    assert "actions_FA" not in plain and " moving " in plain["caption"]


def test_keys_are_held_for_random_times():
    keys = draw_keys(SteeringConfig(held=(2, 4), both=0.1), 4000, np.random.default_rng(0))
    for axis in range(2):
        pair = keys[:, 2 * axis] * 2 + keys[:, 2 * axis + 1]
        lengths = np.diff(np.flatnonzero(np.diff(pair)))
        assert lengths.min() >= 2 and set(np.unique(pair)) == {0, 1, 2, 3}
        assert abs((pair == 0).mean() - 0.35) < 0.05
    both = (keys.sum(1) == 2).mean()
    assert both > 0.2  # two keys at once, of either axis


def test_captions_have_a_direction_in_half_of_the_clips():
    texts = [SOURCE[i]["caption"] for i in range(64)]
    assert 16 < sum(" moving " in text for text in texts) < 48
    assert not any(is_held_out(text) for text in texts if " moving " in text)
    assert spoken("a red circle moving left", silent=True) == "a red circle"


def test_keys_that_a_caption_asks_for():
    keys = keys_asked(["a red circle moving left", "a blue square", "a red star moving up-right"], 3)
    assert keys.shape == (3, 3, 4) and keys[:, 2].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert as_keys(["up", "left"]).tolist() == [1, 0, 1, 0] and len(KEYS) == 4
    assert parse_keys("right*2, up+left*1,none", 6).argmax(1).tolist() == [1, 1, 0, 0, 0, 0]
    assert parse_keys("right*2, up+left*1,none", 6).sum(1).tolist() == [1, 1, 2, 0, 0, 0]
    for wrong in ("right*0", "", "right*a", "fly*2"):
        with pytest.raises(UserError):
            parse_keys(wrong, 4)
    with pytest.raises(UserError, match="'jump' is none"):
        as_keys(["jump"])
    with pytest.raises(UserError, match="least <= greatest"):
        SteeringConfig(held=(3, 2))


def test_a_dataset_says_what_was_held(tmp_path):
    """Latents on disk, batches, and records that are joined into a set."""
    world = make_world(SHAPES, channels=16, text_length=8)
    source = SplitSource(SHAPES, 3, 8, steering=STEERING)
    folder = precompute(source, world.codec, world.encode_prompts, tmp_path / "clips", text_encoder={}, progress=False)
    dataset = LatentDataset(folder)
    np.testing.assert_array_equal(dataset[5]["actions_FA"], source[5]["actions_FA"])
    assert dataset.manifest["source"]["steering"] == STEERING.to_json()
    batch = next(iter(make_iterator(dataset, batch_size=4, seed=0)))
    assert batch["actions_BFA"].shape == (4, 12, 4)
    record = Member.open(folder).record(5)
    np.testing.assert_array_equal(record.arrays["actions"], source[5]["actions_FA"])


def test_following_is_judged_block_by_block():
    """Drawn as told: all of it; drawn without a key that is held: those blocks are not."""
    keys = random_keys(4, 10, 3, seed=1)
    rng, shapes = np.random.default_rng(0), ["circle", "square", "triangle", "circle"]

    def drawn(keys_BFA):
        videos = []
        for shape, own in zip(shapes, keys_BFA, strict=True):
            low, high = limits(shape, 5.2, SHAPES.size)
            path = steer(rng.uniform(low, high), own, STEERING.speed, low, high)
            factors = {"shape": np.array([shape]), "colour": np.array(["red"]), "radius": np.array([5.2])}
            videos.append(render({**factors, "centres": path[None]}, SHAPES))
        return np.stack(videos)

    found = follow(drawn(keys), keys, shapes, SHAPES, speed=1.5, block_frames=3)
    assert found["told"].all() and found["inside"].all() and found["there"].all()
    told = summary(found, shapes, ["red"] * 4)
    assert told["told"] == told["shape_kept"] == told["colour_kept"] == 1 and len(told["over_time"]["told"]) == 9
    other = follow(drawn(1 - keys), keys, shapes, SHAPES, speed=1.5, block_frames=3)
    assert other["told"].mean() < 0.6
