"""Laws of the straight path: conversions are inverse to each other for every shape of sigma."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.flow import path

X0, EPS = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)), jax.random.normal(jax.random.key(1), (2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_conversions_are_inverse(shape):
    sigma = np.random.default_rng(0).uniform(0.1, 0.9, shape).astype(np.float32)
    x, v = path.add_noise(X0, EPS, sigma), path.velocity(X0, EPS)
    np.testing.assert_allclose(path.x0_from_flow(v, x, sigma), X0, atol=1e-6)
    np.testing.assert_allclose(path.eps_from_flow(v, x, sigma), EPS, atol=1e-6)
    np.testing.assert_allclose(path.flow_from_x0(X0, x, sigma), v, atol=1e-5)


def test_end_points_are_data_and_noise():
    np.testing.assert_array_equal(path.add_noise(X0, EPS, 0.0), X0)
    np.testing.assert_array_equal(path.add_noise(X0, EPS, 1.0), EPS)


def test_velocity_is_the_derivative_of_the_path():
    _, dx = jax.jvp(lambda sigma: path.add_noise(X0, EPS, sigma), (0.3,), (1.0,))
    np.testing.assert_allclose(dx, path.velocity(X0, EPS), atol=1e-6)


def test_sigma_per_frame_acts_on_its_own_frame():
    sigma_BF = jnp.array([[0.0, 0.5, 1.0], [1.0, 0.0, 0.25]])
    x = path.add_noise(X0, EPS, sigma_BF)
    np.testing.assert_array_equal(x[0, 0], X0[0, 0])
    np.testing.assert_array_equal(x[1, 0], EPS[1, 0])
    np.testing.assert_allclose(x[1, 2], 0.75 * X0[1, 2] + 0.25 * EPS[1, 2], atol=1e-6)


def test_bfloat16_inputs_are_computed_in_float32():
    x0, eps = X0.astype(jnp.bfloat16), EPS.astype(jnp.bfloat16)
    x = path.add_noise(x0, eps, 0.3)
    assert x.dtype == path.velocity(x0, eps).dtype == path.x0_from_flow(eps, x0, 0.3).dtype == jnp.float32
    np.testing.assert_array_equal(x, path.add_noise(x0.astype(jnp.float32), eps.astype(jnp.float32), 0.3))


def test_sigma_of_higher_rank_is_an_error():
    with pytest.raises(ValueError, match="more axes"):
        path.expand(jnp.zeros((2, 3)), jnp.zeros((2,)))
