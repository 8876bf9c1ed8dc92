"""Distribution matching on the end of a longer rollout: what the losses count, and what they refuse."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.models.wan import KV
from cfjax.nn.visibility import Blocks
from cfjax.objectives import dmd, sid
from cfjax.objectives.dmd import DMDConfig, critic_loss, draw
from cfjax.rollout.long_video import LongVideo
from cfjax.rollout.self_forcing import SelfForcing
from tests.tiny import BATCH, CONFIG, SHAPE, TEXT_LEN, normal, text

BLOCKS, FRAMES = Blocks(2), SHAPE[1]
SHORT = DMDConfig(SelfForcing((1.0, 0.625)), real_guidance=0.0)
LONG = replace(SHORT, long=LongVideo(FRAMES, FRAMES + 4))
KEY = jax.random.key(0)
LOSSES = {"dmd": dmd.generator_loss, "sid": sid.generator_loss}


class Score:
    """A score network in closed form: v = slope x + sigma."""

    def __init__(self, slope: float):
        self.slope = slope

    def __call__(self, x, sigma_BF, text_kv):
        return self.slope * x + sigma_BF[:, :, None, None, None]


MODELS = {"critic": Score(0.7), "real_score": Score(-0.4), "codec": "a codec"}


@pytest.fixture(autouse=True)
def the_window_is_the_student(monkeypatch):
    """The student stands for the window that it would have rolled out; what a rollout is, test_long_video says."""
    rolled = lambda model, *_, gradient, **__: model if gradient else jax.lax.stop_gradient(model)
    monkeypatch.setattr(dmd, "roll_window", rolled)
    monkeypatch.setattr(dmd, "embed_text", lambda model, text: KV(text, text))
    monkeypatch.setattr(dmd, "student_rollout", lambda model, *_, **__: (model, model))


def batch() -> dict[str, jax.Array]:
    negative = normal(2, (TEXT_LEN, CONFIG.text_dim))
    return {"latents_BFHWC": jnp.zeros((BATCH, 3, *SHAPE[2:])), "text_BSE": text(), "negative_text_SE": negative}


@cache
def any_count() -> dict[str, jax.Array]:
    return jax.jit(lambda key: draw(key, SHAPE, LONG, BLOCKS))(jax.random.key(3))


def drawn(count: int) -> dict[str, jax.Array]:
    return {**any_count(), "count": jnp.int32(count)}


def value_and_gradient(name: str, config: DMDConfig, draws: dict) -> tuple[float, jax.Array]:
    loss = LOSSES[name](config, BLOCKS)
    return jax.value_and_grad(lambda video: loss({**MODELS, "student": video}, batch(), KEY, draws)[0])(normal(4))


@pytest.mark.parametrize("name", LOSSES)
def test_the_shortest_rollout_has_the_usual_loss(name):
    got, gradient = value_and_gradient(name, LONG, drawn(3))
    expected, usual = value_and_gradient(name, SHORT, drawn(3))
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradient, usual, rtol=1e-5, atol=1e-9)


def test_dmd_leaves_out_the_first_block_of_a_longer_rollout():
    """Its scores see the whole window, and so does the normaliser; the mean is that of what is left."""
    got, gradient = value_and_gradient("dmd", LONG, drawn(4))
    _, usual = value_and_gradient("dmd", SHORT, drawn(4))
    direction = np.asarray(usual) * normal(4).size  # g, of all frames
    counted = direction[:, BLOCKS.frames :]
    assert float(got) == pytest.approx(0.5 * np.mean(counted**2), rel=1e-5)
    np.testing.assert_allclose(gradient[:, BLOCKS.frames :], counted / counted.size, rtol=1e-4, atol=1e-8)
    assert not np.any(gradient[:, : BLOCKS.frames])


def test_sid_leaves_out_the_first_block_of_a_longer_rollout():
    draws, video = drawn(5), np.asarray(normal(4), np.float64)
    expected = 0.0
    for i, clip in enumerate(video):
        s = float(draws["score_sigma_B"][i])
        x = (1 - s) * clip + s * np.asarray(draws["score_eps_BFHWC"][i])
        fake, real = x - s * (0.7 * x + s), x - s * (-0.4 * x + s)
        summands = (real - fake) * ((real - clip) - (real - fake)) / np.mean(np.abs(clip - real))
        expected += np.mean(summands[BLOCKS.frames :]) / len(video)
    assert float(value_and_gradient("sid", LONG, draws)[0]) == pytest.approx(expected, rel=1e-4)


def test_the_critic_learns_from_the_whole_window():
    values = [
        float(critic_loss(LONG, BLOCKS)({**MODELS, "student": normal(4)}, batch(), KEY, drawn(count))[0])
        for count in (3, 5)
    ]
    assert values[0] == values[1] > 0


def test_what_is_drawn_fits_the_longest_rollout_and_the_window():
    """Whatever the batch's own clips are long."""
    draws = jax.eval_shape(lambda key: draw(key, batch()["latents_BFHWC"].shape, LONG, BLOCKS), KEY)
    assert draws["noise_BFHWC"].shape[1] == draws["context_BFHWC"].shape[1] == FRAMES + 4
    assert draws["exit_G"].shape == (5,) and draws["count"].shape == () and 3 <= int(any_count()["count"]) <= 5
    assert draws["score_eps_BFHWC"].shape == SHAPE


def test_without_a_codec_it_is_a_mistake():
    models = {"student": normal(4), "critic": Score(0.7), "real_score": Score(-0.4)}
    with pytest.raises(UserError, match="need a frozen role 'codec'"):
        dmd.generator_loss(LONG, BLOCKS)(models, batch(), KEY, drawn(4))


def test_noised_clips_are_no_rollout():
    with pytest.raises(UserError, match=r"objective.max_frames=10 needs objective.student_input=self_rollout"):
        replace(LONG, student_input="noised_data")


def test_frames_that_are_no_whole_blocks_are_reported_before_anything_runs():
    with pytest.raises(UserError, match="7 latent frames do not divide into blocks"):
        critic_loss(replace(LONG, long=LongVideo(6, 7)), BLOCKS)
