"""The linear-Gaussian part against numbers, against the library's solver, and against samples of its flow."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.flow.schedule import sigma_table, warp_steps
from cfjax.flow.solvers import rk4
from cfjax.studies import linear
from cfjax.studies.laws import LinearGaussian, joint_velocity, sample

LAW = LinearGaussian()
SIGMAS = [float(s) for s in warp_steps()]


def w2(law, rows_at):
    return linear.rollout_w2(law, [rows_at(s) for s in SIGMAS], SIGMAS)


def consistency_w2(teacher, steps):
    grid = np.append(sigma_table(steps, 5.0).astype(float), 0.0)
    at = [int(np.argmin(np.abs(grid - s))) for s in SIGMAS]
    rows = linear.consistency_rows(LAW, grid, teacher)
    return linear.rollout_w2(LAW, [rows[n] for n in at], SIGMAS)


def test_the_bidirectional_teacher_is_ambiguous_but_for_the_last_frame():
    v = linear.ambiguity(LAW, 1.0)
    print("V(1)", v, "of the innovation", v / linear.innovation(LAW))
    np.testing.assert_allclose(v[:4], [0.4000, 0.0698, 0.0601, 0.0483], rtol=5e-3)
    assert abs(v[4]) < 1e-10
    half = linear.root(LAW.mixture().covariance_FF)
    assert v[0] == pytest.approx(1.0 - half[0, 0] ** 2, abs=1e-12)  # V_1(1) by hand
    assert all(linear.ambiguity(LAW, s)[:4].min() > 1e-3 for s in SIGMAS)


def test_without_correlation_there_is_nothing_to_confuse():
    white = LinearGaussian(a=0.0)
    assert linear.ambiguity(white, 1.0).max() < 1e-12
    assert w2(white, lambda s: linear.bidirectional_rows(white, s)) < 1e-6


def test_regression_on_the_ar_teacher_is_the_law_and_on_the_bidirectional_one_is_not():
    causal, bi = w2(LAW, lambda s: linear.ahead_rows(LAW, s, 0)), w2(LAW, lambda s: linear.bidirectional_rows(LAW, s))
    print("W2: causal", causal, "bidirectional", bi)
    assert causal < 1e-5 and bi == pytest.approx(0.526, abs=5e-3)


def test_the_damage_grows_with_the_future_that_the_teacher_sees():
    dose = [w2(LAW, lambda s, k=k: linear.ahead_rows(LAW, s, k)) for k in range(5)]
    print("W2 by future frames", dose)
    assert (np.diff(dose) > 0).all() and dose[1] > 0.7 * dose[4]


def test_one_step_variance_follows_the_law_of_total_variance():
    got = linear.rollout_covariance([linear.bidirectional_rows(LAW, 1.0)], [1.0])
    assert got[0, 0] == pytest.approx(1.0 - linear.ambiguity(LAW, 1.0)[0], abs=1e-10)


def test_consistency_is_hurt_by_a_noisy_past_not_by_future_frames():
    """The tower property: given the clean past, the averaged velocity of a teacher that looks ahead is the AR one."""
    causal = [consistency_w2("causal", n) for n in (48, 192, 768)]
    print("W2: causal CD", causal, "joint CD", [consistency_w2("joint", n) for n in (48, 192, 768)])
    assert all(3.0 < a / b < 5.0 for a, b in pairwise(causal))
    assert consistency_w2("clean_past", 48) == pytest.approx(causal[0], abs=1e-8)
    assert consistency_w2("joint", 768) > 0.5


def test_the_solver_finds_the_flow_matrix():
    with jax.enable_x64(True):
        flow = jax.jit(lambda x: rk4(lambda y, s: joint_velocity(LAW, y, s[None].repeat(5)), x, np.linspace(1, 0, 401)))
        got = np.asarray(flow(jnp.eye(5, dtype=jnp.float64)))
    error = np.abs(got - linear.root(LAW.mixture().covariance_FF)).max()
    print("rk4, 400 steps, against S^(1/2):", error)
    assert error < 1e-10


def test_ambiguity_is_the_residual_of_samples():
    rng = np.random.default_rng(0)
    covariance = LAW.mixture().covariance_FF
    forward = linear.root(linear.noised(covariance, 0.625)) @ np.linalg.inv(linear.root(covariance))
    clean = sample(LAW, rng, 200_000)
    noisy = clean @ forward.T
    for i, v in enumerate(linear.ambiguity(LAW, 0.625)[:4]):
        given = np.concatenate([clean[:, :i], noisy[:, i : i + 1]], axis=1)
        left = clean[:, i] - given @ np.linalg.lstsq(given, clean[:, i], rcond=None)[0]
        assert np.mean(left**2) / v == pytest.approx(1.0, abs=0.02)
