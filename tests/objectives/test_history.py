"""Strategies against exposure bias: what the degraded past is, step by step, and that it is a constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.models.wan import embed_text, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, draw
from cfjax.objectives.history import degraded, draw_history
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, TEXT_LEN, normal, relative, text, tiny

BLOCKS = Blocks(3)
KEY = jax.random.key(0)


def test_direct_is_one_step_from_the_noised_clip_given_the_clean_past():
    draws = draw_history(jax.random.key(3), SHAPE, 0.6)
    kv = embed_text(tiny(), text())
    got = jax.jit(lambda m: degraded(m, normal(1), kv, draws, BLOCKS, "direct", 1))(tiny())
    s = draws["history_sigma_B"][:, None, None, None, None]
    x = (1 - s) * normal(1) + s * draws["history_eps_BFHWC"]
    sigma_BF = jnp.broadcast_to(draws["history_sigma_B"][:, None], SHAPE[:2])
    flow = jax.jit(lambda m: teacher_forced(m, x, sigma_BF, normal(1), kv, BLOCKS))(tiny())
    assert relative(got, x - s * flow) < 1e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_resampled_goes_block_by_block_on_its_own_past(steps):
    """Against a loop that forgets nothing and caches nothing: each block by a full pass over the degraded blocks."""
    draws = draw_history(jax.random.key(3), SHAPE, 0.6)
    kv = embed_text(tiny(), text())
    got = jax.jit(lambda m: degraded(m, normal(1), kv, draws, BLOCKS, "resampled", steps))(tiny())
    s = draws["history_sigma_B"][:, None, None, None, None]
    noised = (1 - s) * normal(1) + s * draws["history_eps_BFHWC"]
    flow = jax.jit(lambda m, x, sigma, past: teacher_forced(m, x, sigma, past, kv, BLOCKS))
    past = jnp.zeros(SHAPE)
    for start, stop in BLOCKS.spans(FRAMES):
        x = noised
        for i in range(steps):
            level = draws["history_sigma_B"] * (1 - i / steps)
            v = flow(tiny(), x, jnp.broadcast_to(level[:, None], SHAPE[:2]), past)
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
    kv = embed_text(tiny(), text())
    past = jax.jit(lambda m: degraded(m, normal(1), kv, draws, BLOCKS, history, 1))(tiny())

    def by_hand(model):
        index = jnp.repeat(draws["index_BF"][:, ::3], 3, axis=1)
        u = 1.0 - index / 1000.0
        sigma = (5.0 * u / (1.0 + 4.0 * u)).astype(jnp.float32)
        wide = sigma[:, :, None, None, None]
        x = (1 - wide) * normal(1) + wide * draws["eps_BFHWC"]
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
