"""The paper's other matchings: SiD, CausVid's noised data, bidirectional DMD; formulas and what they learn."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise
from cfjax.models.wan import KV, embed_text, teacher_forced
from cfjax.nn.visibility import FULL, Blocks, Visibility
from cfjax.objectives import dmd, sid
from cfjax.objectives.dmd import DMDConfig, critic_loss, draw, student_video
from cfjax.objectives.stage import Stage
from cfjax.rollout.generate import FewStep, generate_few_step
from cfjax.rollout.self_forcing import SelfForcing
from tests.objectives import learning
from tests.objectives.learning import FRAMEWISE, REAL_MEAN, STD, batch_of, bidirectional, causal, fresh, learn
from tests.tiny import SHAPE, normal, relative, text, tiny

SIGMAS = (1.0, 0.9375, 0.8333333, 0.625)
DMD = DMDConfig(SelfForcing(SIGMAS), real_guidance=0.0)
NOISED = replace(DMD, student_input="noised_data")
KEY = jax.random.key(0)


class Score:
    """A score network in closed form: v = slope x + sigma."""

    def __init__(self, slope: float):
        self.slope = slope

    def __call__(self, x, sigma_BF, text_kv):
        return self.slope * x + sigma_BF[:, :, None, None, None]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_sid_is_the_formula_and_differentiates_through_the_scores(monkeypatch, alpha):
    """Value and gradient by the video's numbers, against SiD written out with affine scores."""
    monkeypatch.setattr(dmd, "embed_text", lambda model, text: KV(text, text))
    monkeypatch.setattr(sid, "student_video", lambda student, *_, gradient, codec: student)
    draws = draw(jax.random.key(3), SHAPE, DMD, Blocks(3))
    models = {"critic": Score(0.7), "real_score": Score(-0.4)}
    batch = {"latents_BFHWC": jnp.zeros(SHAPE), "text_BSE": text(), "negative_text_SE": text()[0]}
    loss = sid.generator_loss(DMD, Blocks(3), alpha=alpha)
    value = lambda video: loss({**models, "student": video}, batch, KEY, draws)[0]
    got, gradient = jax.value_and_grad(value)(normal(4))

    expected, slope = 0.0, np.zeros(SHAPE)
    for i, clip in enumerate(np.asarray(normal(4), np.float64)):
        s = float(draws["score_sigma_B"][i])
        x = (1 - s) * clip + s * np.asarray(draws["score_eps_BFHWC"][i])
        f, r = x - s * (0.7 * x + s), x - s * (-0.4 * x + s)
        normaliser = np.mean(np.abs(clip - r))
        gap, ahead = r - f, (r - clip) - alpha * (r - f)
        expected += np.mean(gap * ahead) / normaliser / len(SHAPE[:1] * SHAPE[0])
        # d gap / d clip = 1.1 s (1 - s); d r / d clip = (1 - s) (1 + 0.4 s)
        d_gap = 1.1 * s * (1 - s)
        slope[i] = (d_gap * ahead + gap * ((1 - s) * (1 + 0.4 * s) - 1 - alpha * d_gap)) / normaliser / clip.size
    assert float(got) == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(gradient, slope / SHAPE[0], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
def test_noised_data_is_denoised_in_one_pass(forcing):
    """CausVid: a level of the few-step list per block, shared by its frames; noisy past, or the clean one."""
    blocks, config = Blocks(3), replace(NOISED, forcing=forcing)
    draws = draw(jax.random.key(3), SHAPE, config, blocks)
    level = np.asarray(draws["level_BF"])
    assert (level.reshape(SHAPE[0], -1, 3) == level[:, ::3, None]).all() and level.max() < 4
    sigma_BF = jnp.asarray(np.array(SIGMAS, np.float32)[level])
    x = add_noise(normal(1), draws["noise_BFHWC"], sigma_BF)
    kv = embed_text(tiny(), text())
    if forcing == "teacher":
        flow = teacher_forced(tiny(), x, sigma_BF, normal(1), kv, blocks)
    else:
        flow = tiny()(x, sigma_BF, kv, Visibility("block_causal", blocks))
    batch = {"latents_BFHWC": normal(1), "text_BSE": text()}
    video = jax.jit(lambda m: student_video(m, batch, draws, config, blocks, gradient=True))(tiny())
    assert relative(video, x - sigma_BF[:, :, None, None, None] * flow) < 1e-5


def test_one_block_of_all_frames_is_bidirectional():
    """The few-step bidirectional student: no mask, every frame sees every frame."""
    whole = Blocks(SHAPE[1])
    draws = dict(draw(jax.random.key(3), SHAPE, DMD, whole))
    draws["exit_G"] = jnp.zeros((1,), jnp.int32)
    batch = {"latents_BFHWC": normal(1), "text_BSE": text()}
    video = jax.jit(lambda m: student_video(m, batch, draws, DMD, whole, gradient=True))(tiny())
    noise = draws["noise_BFHWC"]
    flow = jax.jit(lambda m: m(noise, jnp.ones(SHAPE[:2]), embed_text(m, text()), FULL))(tiny())
    assert relative(video, noise - flow) < 1e-5


LOSSES = {"sid": (sid.generator_loss, DMD), "causvid": (dmd.generator_loss, NOISED)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_student_moves_to_the_real_scores_distribution(name):
    """From an AR model of copied frames around -1 to the teacher's independent frames around 1."""
    make, config = LOSSES[name]
    losses = {"student": make(config, FRAMEWISE), "critic": critic_loss(config, FRAMEWISE)}
    stage = Stage("dmd", losses, cadence={"student": 5})
    models, frozen = {"student": causal(), "critic": bidirectional()}, {"real_score": bidirectional()}
    state = learn(stage, models, lambda key: batch_of(fresh(key, 64, REAL_MEAN)), 300, frozen=frozen, b1=0.0)
    noise = jax.random.normal(jax.random.key(5), (2000, 2, 2, 2, 1))
    kv = embed_text(state.params["student"], jnp.zeros((2000, 1, learning.CONFIG.text_dim)))
    sample = jax.jit(partial(generate_few_step, sampler=FewStep(), blocks=FRAMEWISE))
    video = np.asarray(sample(state.params["student"], noise, kv, jax.random.key(6)))
    frames = video.reshape(2000, 2, 4)
    correlation = np.corrcoef(frames[:, 0].ravel(), frames[:, 1].ravel())[0, 1]
    print(f"{name}: mean {video.mean():.3f}, std {video.std():.3f}, correlation of frames {correlation:.3f}")
    assert abs(video.mean() - REAL_MEAN) < 0.25
    assert abs(video.std() - STD) < 0.2
    assert correlation < 0.4


@pytest.mark.parametrize("wrong", [{"student_input": "images"}, {"forcing": "self"}, {"score_min": 0.99}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=f"objective.{next(iter(wrong))}="):
        replace(DMD, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigmas": (0.5, 1.0)},
        {"sigmas": ()},
        {"first_sigmas": (1.0, 1.0)},
        {"kv_gradient": "own"},
        {"context_noise": 1.0},
    ],
    ids=str,
)
def test_wrong_rollouts_are_named(wrong):
    key = next(iter(wrong)).replace("sigmas", "steps")
    with pytest.raises(UserError, match=rf"objective\.{key}\b"):
        replace(DMD.self_forcing, **wrong)
