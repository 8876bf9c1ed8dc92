"""Causal ODE pairs: two ways to solve, one trajectory; the regression's formula; a known flow map is learned."""

from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.models.wan import embed_text, make_wan, teacher_forced
from cfjax.nn.visibility import Blocks, Visibility
from cfjax.objectives import ode_regression as module
from cfjax.objectives.ode_regression import PairsConfig, Regression, draw, ode_pairs, ode_regression
from cfjax.objectives.stage import Stage
from tests.objectives.learning import CONFIG, FRAMEWISE, batch_of, fresh, learn
from tests.tiny import BATCH, SHAPE, normal, relative, text, tiny

LAYOUTS = {"chunkwise": Blocks(3), "framewise": Blocks(1), "window_sink": Blocks(2, window=4, sink=1)}
KEY = jax.random.key(0)
SIGMAS = (1.0, 0.9375, 0.8333333, 0.625)


@cache
def solved(layout: str, method: str) -> jax.Array:
    solve = jax.jit(partial(ode_pairs, config=PairsConfig(), blocks=LAYOUTS[layout], method=method))
    return solve(tiny(), normal(2), text(), normal(102, text().shape), normal(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_and_cached_solve_the_same_ode(layout):
    full, cached = solved(layout, "full"), solved(layout, "cached")
    assert full.shape == (BATCH, 5, *SHAPE[1:])
    error = relative(cached, full)
    print(f"{layout}: full sequence vs KV cache {error:.1e}")
    assert error < 1e-4


def test_layouts_have_trajectories_of_their_own():
    """Otherwise the test above would compare nothing."""
    first, *others = (solved(layout, "full") for layout in LAYOUTS)
    assert all(relative(other, first) > 1e-2 for other in others)


def test_trajectory_is_the_references_loop():
    """48 Euler steps on T48, both prompts apart, the clean half recomputed (`get_causal_ode_data_chunkwise.py`)."""
    clean, x, blocks = normal(2), normal(3), LAYOUTS["chunkwise"]
    flow = jax.jit(lambda m, x, s, kv: teacher_forced(m, x, s, clean, kv, blocks))
    positive, negative = embed_text(tiny(), text()), embed_text(tiny(), normal(102, text().shape))
    u = 1.0 - np.arange(48) / 48.0
    grid = np.append(5.0 * u / (1.0 + 4.0 * u), 0.0)
    states = []
    for level, lower in pairwise(grid):
        states.append(x)
        sigma = jnp.full(SHAPE[:2], level, jnp.float32)
        v_pos, v_neg = flow(tiny(), x, sigma, positive), flow(tiny(), x, sigma, negative)
        x = x + float(lower - level) * (v_neg + 6.0 * (v_pos - v_neg))
    expected = jnp.stack([*(states[i] for i in (0, 12, 24, 36)), x], axis=1)
    error = relative(solved("chunkwise", "full"), expected)
    print(f"library vs loop: {error:.1e}")
    assert error < 1e-4
    np.testing.assert_array_equal(solved("chunkwise", "full")[:, 0], normal(3))


def test_kept_levels_are_the_students():
    config = PairsConfig()
    assert config.kept() == (0, 12, 24, 36) and config.grid()[-1] == 0.0
    np.testing.assert_allclose(config.grid()[list(config.kept())], SIGMAS, rtol=1e-6)
    with pytest.raises(UserError, match=r"^objective.steps: \[900\] are not on the grid of objective.solver_steps=48"):
        PairsConfig(steps=(1000, 900)).kept()


def test_loss_is_the_formula(monkeypatch):
    """x_k - sigma_k v against the end point; the clean past is the real clip, not the end point."""

    def network(x, sigma_BF, clean, text_BSE):
        offset = sigma_BF[:, :, None, None, None] + jnp.mean(text_BSE, axis=(1, 2))[:, None, None, None, None]
        return 0.4 * x - 0.2 * clean + offset

    monkeypatch.setattr(module, "embed_text", lambda model, text: text)
    monkeypatch.setattr(module, "teacher_forced", lambda model, x, s, clean, text, blocks: model(x, s, clean, text))
    trajectory, clean = normal(4, (BATCH, 5, *SHAPE[1:])), normal(2)
    batch = {"latents_BFHWC": clean, "text_BSE": text(), "trajectory_BJFHWC": trajectory}
    levels = [2, 0]
    draws = {"level_BF": jnp.broadcast_to(jnp.array(levels)[:, None], SHAPE[:2])}
    loss, metrics = ode_regression(PairsConfig(), Blocks(3))({"student": network}, batch, KEY, draws)
    errors = []
    for i, level in enumerate(levels):
        x, sigma = np.asarray(trajectory[i, level]), SIGMAS[level]
        v = 0.4 * x - 0.2 * np.asarray(clean[i]) + sigma + float(jnp.mean(text()[i]))
        errors.append(np.mean((x - sigma * v - np.asarray(trajectory[i, -1])) ** 2))
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(metrics["error_from_noise"]) == pytest.approx(errors[1], rel=1e-5)


def test_one_level_per_clip():
    """Quirk Q9: all frames share the level; the levels are uniform."""
    level_BF = draw(KEY, (400, 3), 4, Blocks(3))["level_BF"]
    assert bool(jnp.all(level_BF == level_BF[:, :1]))
    assert int(jnp.bincount(level_BF[:, 0], length=4).min()) > 70


def test_a_level_per_block_on_request():
    level_BF = draw(KEY, (400, 6), 4, Blocks(3), "block")["level_BF"]
    assert bool(jnp.all(level_BF == jnp.repeat(level_BF[:, ::3], 3, axis=1)))
    assert bool(jnp.any(level_BF[:, 0] != level_BF[:, 3]))


def test_bidirectional_pairs_are_the_plain_loop():
    """Euler steps of the whole clip, both prompts apart; the clean clip is not looked at."""
    config = PairsConfig()
    solve = jax.jit(partial(ode_pairs, config=config, blocks=Blocks(3), method="bidirectional"))
    got = solve(tiny(), jnp.full(SHAPE, jnp.nan), text(), normal(102, text().shape), normal(3))
    flow = jax.jit(lambda m, x, s, t: m(x, s, embed_text(m, t)))
    x, grid, states = normal(3), config.grid(), []
    for level, lower in pairwise(grid):
        states.append(x)
        sigma = jnp.full(SHAPE[:2], level, jnp.float32)
        v_pos, v_neg = flow(tiny(), x, sigma, text()), flow(tiny(), x, sigma, normal(102, text().shape))
        x = x + float(lower - level) * (v_neg + 6.0 * (v_pos - v_neg))
    error = relative(got, jnp.stack([*(states[i] for i in (0, 12, 24, 36)), x], axis=1))
    print(f"bidirectional pairs vs loop: {error:.1e}")
    assert error < 1e-4
    with pytest.raises(UserError, match=r"objective\.method='joint'"):
        ode_pairs(tiny(), normal(2), text(), text(), normal(3), config, Blocks(3), method="joint")


@pytest.mark.parametrize("past", ["endpoint", "noisy"])
def test_what_a_block_sees_of_the_past(past):
    """The endpoint of its own trajectory, or the earlier blocks at their own levels."""
    trajectory, levels = normal(4, (BATCH, 5, *SHAPE[1:])), jnp.array([[0, 0, 0, 2, 2, 2], [3, 3, 3, 1, 1, 1]])
    batch = {"latents_BFHWC": normal(2), "text_BSE": text(), "trajectory_BJFHWC": trajectory}
    loss = ode_regression(PairsConfig(), Blocks(3), how=Regression("block", past))
    got, _ = jax.jit(lambda m: loss({"student": m}, batch, KEY, {"level_BF": levels}))(tiny())
    frames = jnp.arange(SHAPE[1])
    x = jnp.stack([trajectory[b, levels[b], frames] for b in range(BATCH)])
    sigma = jnp.asarray(SIGMAS, jnp.float32)[levels]

    def flow(model):
        kv = embed_text(model, text())
        if past == "noisy":
            return model(x, sigma, kv, Visibility("block_causal", Blocks(3)))
        return teacher_forced(model, x, sigma, trajectory[:, -1], kv, Blocks(3))

    x0 = x - sigma[:, :, None, None, None] * jax.jit(flow)(tiny())
    assert float(got) == pytest.approx(float(jnp.mean((x0 - trajectory[:, -1]) ** 2)), rel=1e-5)


@pytest.mark.parametrize("wrong", [{"levels_per": "frame"}, {"past": "future"}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=f"objective.{next(iter(wrong))}="):
        Regression(**wrong)


def flow_map(key: jax.Array, count: int) -> dict[str, jax.Array]:
    """Exact trajectories of clips whose frames are N(m, 1/4), m = 0 in frame 1 and clean frame 1 in frame 2.

    The PF-ODE keeps every number's quantile: x_sigma = (1 - sigma) m + sqrt((1 - sigma)^2 / 4 + sigma^2) z.
    """
    clean, z = (fresh(k, count, 0.0) for k in jax.random.split(key))
    z = 2.0 * z  # N(0, 1)
    mean = jnp.concatenate([jnp.zeros_like(clean[:, :1]), clean[:, :1]], axis=1)
    states = [(1 - s) * mean + ((1 - s) ** 2 / 4 + s**2) ** 0.5 * z for s in (*SIGMAS, 0.0)]
    return batch_of(clean, trajectory_BJFHWC=jnp.stack(states, axis=1))


def test_learns_a_flow_map_given_the_clean_past():
    stage = Stage("ode_regression", {"student": ode_regression(PairsConfig(), FRAMEWISE)})
    models = {"student": make_wan(CONFIG, jax.random.key(0))}
    state = learn(stage, models, lambda key: flow_map(key, 128), 400)
    batch = flow_map(jax.random.key(9), 2000)
    loss, metrics = jax.jit(stage.losses["student"])(state.params, batch, KEY)
    scale = float(jnp.var(batch["trajectory_BJFHWC"][:, -1]))
    print(
        f"regression error {float(loss) / scale:.4f} of the variance, {float(metrics['error_from_noise']) / scale:.4f}"
    )
    assert float(loss) < 0.02 * scale and float(metrics["error_from_noise"]) < 0.03 * scale


def joint_flow_map(key: jax.Array, count: int) -> dict[str, jax.Array]:
    """Exact *joint* trajectories of clips N(0, 1/4) whose second frame repeats the first.

    The covariance of the two frames is S = 1/4 [[1, 1], [1, 1]]; the PF-ODE is x_sigma = S_sigma^(1/2) z with
    S_sigma = (1 - sigma)^2 S + sigma^2 I, so frame 1 moves with frame 2's noise, which a causal student never sees.
    """
    z = 2.0 * fresh(key, count, 0.0)  # N(0, 1)
    along, across = (z[:, :1] + z[:, 1:]) / 2**0.5, (z[:, :1] - z[:, 1:]) / 2**0.5

    def state(s: float) -> jax.Array:
        sum_part, difference = ((1 - s) ** 2 / 2 + s**2) ** 0.5 * along, s * across
        return jnp.concatenate([sum_part + difference, sum_part - difference], axis=1) / 2**0.5

    states = [state(s) for s in (*SIGMAS, 0.0)]
    return batch_of(states[-1], trajectory_BJFHWC=jnp.stack(states, axis=1))


def test_a_bidirectional_teachers_pairs_leave_a_conditional_mean():
    """The paper's point, in closed form: from noise, frame 1's end point has S_11 - (S^(1/2))_11^2 = half its variance
    left given what the student sees, so regression leaves that error and halves the variance of what it generates."""
    how = Regression(past="endpoint")
    stage = Stage("ode_regression", {"student": ode_regression(PairsConfig(), FRAMEWISE, how=how)})
    models = {"student": make_wan(CONFIG, jax.random.key(0))}
    model = learn(stage, models, lambda key: joint_flow_map(key, 128), 400).params["student"]
    batch = joint_flow_map(jax.random.key(9), 4000)
    noise, end = batch["trajectory_BJFHWC"][:, 0], batch["trajectory_BJFHWC"][:, -1]
    jump = jax.jit(lambda m, kv: noise - teacher_forced(m, noise, jnp.ones((4000, 2)), end, kv, FRAMEWISE))
    first = jump(model, embed_text(model, batch["text_BSE"]))[:, 0]
    left = float(jnp.mean((first - end[:, 0]) ** 2)) / 0.25
    made = float(jnp.var(first)) / 0.25
    print(f"frame 1 from noise: error {left:.3f} of the variance (0.5 expected), variance {made:.3f} (0.5 expected)")
    assert left == pytest.approx(0.5, abs=0.04) and made == pytest.approx(0.5, abs=0.06)
