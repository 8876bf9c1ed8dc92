"""Videos that turn without notice: the chances of what follows, and measurements of clips whose paths are known."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.shapes import ShapesConfig, ShapesSource, possible_paths
from cfjax.evaluation.turns import first_turned, gradient_energy, measure_turns, pasts_of, real_futures
from configs.bidirectional import get_config

WORLD = ShapesConfig.from_json(get_config("toy,branching").data.shapes.to_dict())
GIVEN = 3


@pytest.fixture(scope="module")
def pasts():
    source = ShapesSource(WORLD, 5, 24)
    return pasts_of([source[i] for i in range(len(source))], WORLD)


def test_chances_are_those_of_the_clips():
    """Calibrated: of 2,500 clips, as many turn as was likely from their starts, among the sure ones and the others."""
    source = ShapesSource(WORLD, 3, 2500)
    turned, chance = np.zeros(2500, bool), np.zeros(2500)
    for i in range(len(source)):
        factors = source.factors(i)
        paths, chances = possible_paths(WORLD, factors)
        own = np.abs(paths - factors["centres"][0]).max(axis=(1, 2))
        assert own.min() < 1e-4 and chances[own.argmin()] > 0 and chances.sum() == pytest.approx(1.0)
        assert len(paths) == 9 and np.ptp(paths[:, :4], axis=0).max() < 1e-9  # alike up to the first turn
        turned[i], chance[i] = factors["turn_frame"][0] >= 0, 1 - chances[0]
    assert chance.mean() == pytest.approx(WORLD.branching, abs=0.03)
    for rows in (chance < 0.999, chance > 0.999):  # of the latter starts no path goes straight on
        error = 4 * np.sqrt(0.25 / max(rows.sum(), 1))
        assert rows.sum() > 50 and abs(turned[rows].mean() - chance[rows].mean()) < error


def test_paths_are_not_counted_where_they_cannot_be():
    bouncing = ShapesConfig(bounces=True)
    with pytest.raises(UserError, match="without bounces"):
        possible_paths(bouncing, ShapesSource(bouncing, 0, 1).factors(0))


def test_real_futures_measure_as_they_are(pasts):
    rng, rows = np.random.default_rng(0), []
    for past in pasts:
        clips = real_futures(past, WORLD, rng, 8)
        table = measure_turns(clips, [past.factors] * 8, WORLD, given=GIVEN)
        aside = np.abs(table["centres"][:, -1] - past.centres_KP2[0, -1]).max(axis=1)
        np.testing.assert_array_equal(table["turned"], aside > 1.0)
        np.testing.assert_allclose(clips[:, :GIVEN], np.repeat(past.video_PHWC[None, :GIVEN], 8, axis=0), atol=1e-6)
        rows.append(table)
    motion, sharp = (np.concatenate([table[name] for table in rows]) for name in ("motion", "sharpness"))
    assert not any(table["between"].any() for table in rows)
    print(f"motion {motion.mean():.4f}, sharpness {sharp.mean():.4f}, largest {abs(sharp - 1).max():.3f}")
    assert motion.mean() == pytest.approx(1.0, abs=0.02) and sharp.mean() == pytest.approx(1.0, abs=0.03)


def test_a_mean_of_two_futures_is_blurred_slow_and_neither(pasts):
    past = next(p for p in pasts if p.chance_K[1] > 0 and p.chance_K[2] > 0)
    left, right = (real_futures(_sure(past, k), WORLD, np.random.default_rng(0), 1) for k in (1, 2))
    table = measure_turns((left + right) / 2, [past.factors], WORLD, given=GIVEN)
    whole = measure_turns(left, [past.factors], WORLD, given=GIVEN)
    assert table["between"][0] and not whole["between"][0] and whole["turned"][0]
    assert table["sharpness"][0, 0] == pytest.approx(whole["sharpness"][0, 0])  # before the turn
    assert table["sharpness"][0, -1] == pytest.approx(0.5, abs=0.1) and table["motion"][0] < 0.7 * whole["motion"][0]


def _sure(past, k):
    return type(past)(past.caption, past.factors, past.video_PHWC, past.centres_KP2, np.eye(len(past.chance_K))[k])


def test_gradient_energy_is_that_of_differences():
    video = np.zeros((1, 1, 3, 3, 1))
    video[0, 0, 1, 1] = 2.0
    assert gradient_energy(video)[0, 0] == 4 * 4.0


@pytest.mark.parametrize("given", [1, first_turned(WORLD) + 1, 7])
def test_a_past_ends_before_any_turn(pasts, given):
    with pytest.raises(UserError, match="before any turn"):
        measure_turns(pasts[0].video_PHWC[None], [pasts[0].factors], WORLD, given=given)
