"""Strategies against exposure bias: what the degraded past is, step by step, and that it is a constant."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.models.wan import embed_text, make_wan, teacher_forced
from cfjax.nn.visibility import Blocks, Visibility
from cfjax.objectives import diffusion, history
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, draw
from cfjax.objectives.history import corrective_clip, direct, draw_history, prefix_frames, resampled
from cfjax.objectives.stage import Stage
from cfjax.rollout import generate
from cfjax.rollout.generate import ManyStep
from tests.objectives.learning import CONFIG as SMALL
from tests.objectives.learning import FRAMEWISE, UNIFORM, batch_of, examination, fresh, gaussian_floor, learn
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, TEXT_LEN, normal, relative, text, text_kv, tiny

BLOCKS = Blocks(3)
KEY = jax.random.key(0)


@cache
def flow_of_blocks():
    return jax.jit(lambda m, x, sigma, past: teacher_forced(m, x, sigma, past, embed_text(m, text()), BLOCKS))


def test_direct_is_one_step_of_each_block_given_the_earlier_estimates():
    """Against full passes over the estimates so far, without a cache; a level per block, as the loss draws them."""
    sigma_BF = jnp.repeat(jnp.array([[0.3, 0.9], [0.6, 0.2]]), 3, axis=1)
    got = jax.jit(lambda m: direct(m, normal(4), sigma_BF, text_kv(), BLOCKS))(tiny())
    past = jnp.zeros(SHAPE)
    for start, stop in BLOCKS.spans(FRAMES):
        x = normal(4) - sigma_BF[:, :, None, None, None] * flow_of_blocks()(tiny(), normal(4), sigma_BF, past)
        past = past.at[:, start:stop].set(x[:, start:stop])
    error = relative(got, past)
    print(f"direct: {error:.1e}")
    assert error < 2e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_resampled_goes_block_by_block_on_its_own_past(steps):
    """Against a loop that forgets nothing and caches nothing: each block by a full pass over the degraded blocks."""
    draws = draw_history(jax.random.key(3), SHAPE, 0.6)
    got = jax.jit(lambda m: resampled(m, normal(1), text_kv(), draws, BLOCKS, steps))(tiny())
    s = draws["history_sigma_B"][:, None, None, None, None]
    noised = (1 - s) * normal(1) + s * draws["history_eps_BFHWC"]
    past = jnp.zeros(SHAPE)
    for start, stop in BLOCKS.spans(FRAMES):
        x = noised
        for i in range(steps):
            level = draws["history_sigma_B"] * (1 - i / steps)
            v = flow_of_blocks()(tiny(), x, jnp.broadcast_to(level[:, None], SHAPE[:2]), past)
            x = x - s / steps * v
        past = past.at[:, start:stop].set(x[:, start:stop])
    error = relative(got, past)
    print(f"resampled in {steps} steps: {error:.1e}")
    assert error < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("history", ["direct", "resampled"])
def test_the_loss_sees_the_degraded_past_as_a_constant(history):
    """Its value and gradient are those of teacher forcing with the degraded clip put in the clean half's place."""
    config = DiffusionConfig(history=history)
    batch = {"latents_BFHWC": normal(1), "text_BSE": text(), "negative_text_SE": normal(2, (TEXT_LEN, CONFIG.text_dim))}
    draws = draw(jax.random.key(5), SHAPE, config)
    u = 1.0 - jnp.repeat(draws["index_BF"][:, ::3], 3, axis=1) / 1000.0
    sigma = (5.0 * u / (1.0 + 4.0 * u)).astype(jnp.float32)
    wide = sigma[:, :, None, None, None]
    x = (1 - wide) * normal(1) + wide * draws["eps_BFHWC"]
    if history == "direct":
        past = jax.jit(lambda m: direct(m, x, sigma, text_kv(), BLOCKS))(tiny())
    else:
        past = jax.jit(lambda m: resampled(m, normal(1), text_kv(), draws, BLOCKS, 1))(tiny())

    def by_hand(model):
        v = teacher_forced(model, x, sigma, past, embed_text(model, text()), BLOCKS)
        y = jnp.exp(-2.0 * (sigma - 0.5) ** 2) - np.exp(-0.5)
        levels = 1.0 - np.arange(1000) / 1000.0
        bell = np.exp(-2.0 * (5.0 * levels / (1.0 + 4.0 * levels) - 0.5) ** 2)
        error = jnp.mean((v - (draws["eps_BFHWC"] - normal(1))) ** 2, axis=(2, 3, 4))
        return jnp.mean(1000.0 * y / np.sum(bell - bell.min()) * error)

    loss = ar_diffusion(config, BLOCKS)
    got, grads = jax.jit(jax.value_and_grad(lambda m: loss({"student": m}, batch, KEY, draws)[0]))(tiny())
    expected, expected_grads = jax.jit(jax.value_and_grad(by_hand))(tiny())
    assert float(got) == pytest.approx(float(expected), rel=1e-4)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert float(jnp.linalg.norm(ours - theirs)) <= 2e-4 * float(jnp.linalg.norm(theirs)) + 1e-7


def test_levels_lean_towards_clean():
    """Logit-normal has median 1/2; a shift of 0.6 moves it to 0.375."""
    sigma = np.asarray(draw_history(KEY, (8000, 1, 1, 1, 1), 0.6)["history_sigma_B"])
    assert np.median(sigma) == pytest.approx(0.375, abs=0.01) and 0 < sigma.min() < sigma.max() < 1
    assert draw_history(KEY, (BATCH, 1, 1, 1, 1), 0.6)["history_eps_BFHWC"].shape == (BATCH, 1, 1, 1, 1)


def test_strategies_that_exclude_each_other_are_named():
    with pytest.raises(UserError, match=r"objective\.history='direct' needs forcing='teacher'"):
        DiffusionConfig(history="direct", forcing="diffusion")
    with pytest.raises(UserError, match=r"objective\.history_steps"):
        DiffusionConfig(history_steps=0)
    with pytest.raises(UserError, match=r"objective\.bagger needs history='clean'"):
        DiffusionConfig(bagger=0.5, history="direct")
    with pytest.raises(UserError, match=r"objective\.bagger_prefix must lie"):
        DiffusionConfig(bagger=0.5, bagger_prefix=1.0)
    with pytest.raises(UserError, match="clips of two blocks or more"):
        prefix_frames(3, Blocks(3), 0.5)


# ---- BAgger


def test_a_corrective_clip_is_the_rollout_after_the_real_first_block_played_backwards():
    """Euler with guidance written out against full passes; the paper's prefix is 4 of 7 chunks of 3 frames."""
    negative = normal(2, (TEXT_LEN, CONFIG.text_dim))
    sampler = ManyStep("euler", steps=2, shift=5.0, guidance=3.0)
    make = jax.jit(lambda m: corrective_clip(m, normal(1), normal(4), text(), negative, sampler, BLOCKS))
    got, clip = make(tiny()), normal(1).at[:, 3:].set(0.0)
    both = jnp.stack([negative] * BATCH)
    flow = jax.jit(lambda m, x, s, past, t: teacher_forced(m, x, s, past, embed_text(m, t), BLOCKS))
    x, levels = normal(4), [1.0, 5.0 / 6.0, 0.0]
    for level, following in pairwise(levels):
        sigma = jnp.full(SHAPE[:2], level)
        v, empty = flow(tiny(), x, sigma, clip, text()), flow(tiny(), x, sigma, clip, both)
        x = x + (following - level) * (empty + 3.0 * (v - empty))
    clip = clip.at[:, 3:].set(x[:, 3:])
    error = relative(got, clip[:, ::-1])
    print(f"corrective clip: {error:.1e}")
    assert error < 5e-5
    assert [prefix_frames(21, Blocks(n), 4 / 7) for n in (3, 1)] == [12, 12]
    assert prefix_frames(13, Blocks(3, independent_first_frame=True), 4 / 7) == 7
    assert prefix_frames(2, Blocks(1), 4 / 7) == 1


class Mirror:
    """A codec that reverses channels and halves: its clips tell whether pixels or latents were reversed."""

    def decode(self, latents):
        return 2.0 * latents[:, :, :, ::-1]

    def encode(self, video):
        return video + jnp.arange(video.shape[1], dtype=jnp.float32)[None, :, None, None, None]


def test_a_codec_reverses_pixels(monkeypatch):
    monkeypatch.setattr(history, "embed_text", lambda *_: None)
    monkeypatch.setattr(history, "generate_many_step", lambda *_, **given: normal(1))
    got = corrective_clip(None, normal(1), normal(1), text(), text()[0], ManyStep(), BLOCKS, Mirror())
    expected = 2.0 * np.asarray(normal(1))[:, ::-1, :, ::-1] + np.arange(FRAMES)[None, :, None, None, None]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
@pytest.mark.parametrize("corrective", [True, False])
def test_bagger_learns_what_follows_the_drifted_prefix(monkeypatch, corrective, forcing):
    """The average's rollout; prefix clean, told 0 and outside the mean; real clips are learned whole."""
    seen = {}

    def network(x, conditioning_sigma_BF, words, past, **_):
        seen.update(x=x, conditioning_sigma=conditioning_sigma_BF, words=words)
        return 0.3 * x - 0.2 * (0.0 if isinstance(past, Visibility) else past)

    def roll(rollout_model, real, noise, words, negative, sampler, blocks, codec):
        seen.update(rollout_model=rollout_model, sampler=sampler)
        return jnp.flip(real + noise, axis=1)

    monkeypatch.setattr(diffusion, "embed_text", lambda model, text: text)
    monkeypatch.setattr(
        diffusion, "teacher_forced", lambda m, x, s, past, words, _, **others: network(x, s, words, past)
    )
    monkeypatch.setattr(diffusion, "corrective_clip", roll)
    config = DiffusionConfig(weighting="uniform", forcing=forcing, bagger=0.5, bagger_steps=7)
    batch = {"latents_BFHWC": normal(1), "text_BSE": text(), "negative_text_SE": text()[0]}
    batch["reversed_text_BSE"] = -text()
    draws = {**draw(KEY, SHAPE, config), "corrective": jnp.bool_(corrective)}
    models = {"student": network, "student_ema": "average"}
    value, metrics = ar_diffusion(config, BLOCKS)(models, batch, KEY, draws)
    x0 = np.asarray(jnp.flip(normal(1) + draws["rollout_eps_BFHWC"], axis=1) if corrective else normal(1))
    u = 1.0 - np.repeat(np.asarray(draws["index_BF"])[:, ::3], 3, axis=1) / 1000.0
    sigma, eps, given = 5.0 * u / (1.0 + 4.0 * u), np.asarray(draws["eps_BFHWC"]), 3 if corrective else 0
    sigma[:, :given] = 0.0
    wide = sigma[:, :, None, None, None]
    x = (1 - wide) * x0 + wide * eps
    error = (0.3 * x - 0.2 * (x0 if forcing == "teacher" else 0.0) - (eps - x0))[:, given:] ** 2
    assert float(value) == pytest.approx(np.mean(error), rel=1e-5) == float(metrics["flow_error"])
    np.testing.assert_allclose(seen["conditioning_sigma"], sigma, atol=1e-6)
    np.testing.assert_array_equal(seen["words"], -text() if corrective else text())
    assert seen["rollout_model"] == "average" and seen["sampler"] == ManyStep(steps=7)


def test_bagger_draws_the_share_of_corrective_updates():
    config = DiffusionConfig(bagger=0.6)
    keys = jax.random.split(KEY, 4000)
    drawn = jax.jit(jax.vmap(lambda key: draw(key, (1, 1, 1, 1, 1), config)["corrective"]))(keys)
    assert np.mean(drawn) == pytest.approx(0.6, abs=0.03)


@pytest.mark.slow
def test_bagger_learns_to_undo_a_known_drift(monkeypatch):
    """Rollouts that copy frame 1 and brighten it by 0.5: played backwards, a frame is its past less 0.5, exactly.

    So the noise of frame 2 is known from its drifted past; a frame that ignored it would be at the Gaussian floor.
    """

    def drifting(*_, given_BFHWC):
        return jnp.concatenate([given_BFHWC, given_BFHWC + 0.5], axis=1)

    monkeypatch.setattr(history, "generate_many_step", drifting)
    stage = Stage(
        "ar_diffusion", {"student": ar_diffusion(replace(UNIFORM, forcing="diffusion", bagger=0.5), FRAMEWISE)}
    )
    models = {"student": make_wan(SMALL, jax.random.key(0))}
    student = learn(stage, models, lambda key: batch_of(fresh(key, 128, 1.0)), 500).params["student"]
    x, sigma_BF, x0, target = examination(fresh, 1.0)
    kv = embed_text(student, batch_of(x0)["text_BSE"])
    flow = jax.jit(lambda m, x, s, kv: m(x, s, kv, Visibility("block_causal", FRAMEWISE)))
    x = x.at[:, 0].set(x0[:, 1] + 0.5)
    v = flow(student, x, sigma_BF.at[:, 0].set(0.0), kv)
    ratio = float(jnp.mean(jnp.square(v - target)[:, 1])) / gaussian_floor()
    print(f"BAgger: the frame after a drifted one at {ratio:.4f} of the floor")
    assert ratio < 0.15


# ---- cost


@pytest.mark.parametrize(
    ("settings", "frames"),
    [
        ({}, 2),
        ({"noise_augmentation": 900}, 2),
        ({"forcing": "diffusion"}, 1),
        ({"history": "direct"}, 4),
        ({"history": "resampled"}, 4),
        ({"history": "resampled", "history_steps": 3}, 6),
        ({"forcing": "diffusion", "bagger": 1.0, "bagger_steps": 20}, 1 + (2 + 2 * 20) / 2),
    ],
    ids=str,
)
def test_frames_that_pass_the_network(monkeypatch, settings, frames):
    """Forward frames of one clip over its F frames (two blocks): teacher forcing's two halves are 2."""
    passed = []

    def count(x, result):
        passed.append(x.shape[0] * x.shape[1])
        return result

    monkeypatch.setattr(diffusion, "embed_text", lambda *_: text_kv())
    monkeypatch.setattr(history, "embed_text", lambda *_: text_kv())
    monkeypatch.setattr(diffusion, "teacher_forced", lambda m, x, *_, **others: count(jnp.tile(x, (2, 1, 1, 1, 1)), x))
    for module, commit in ((history, "commit_block"), (generate, "commit_unless_last")):
        monkeypatch.setattr(module, "denoise_block", lambda m, x, *_: count(x, x))
        monkeypatch.setattr(module, commit, lambda m, x, kv, cache, *_: count(x, cache))
    monkeypatch.setattr(generate, "commit_given", lambda m, x, kv, cache, blocks: count(x, cache))
    config = DiffusionConfig(**settings)
    batch = {"latents_BFHWC": normal(1), "text_BSE": text(), "negative_text_SE": text()[0]}

    class Network:
        config = CONFIG

        def __call__(self, x, *_):
            return count(x, x)

    monkeypatch.setattr(history, "stop_gradient", lambda x: x)
    with jax.disable_jit():
        ar_diffusion(config, BLOCKS)({"student": Network()}, batch, KEY)
    assert sum(passed) == BATCH * FRAMES * frames
