"""Solvers against a closed-form flow (order of convergence), against diffusers' UniPC, and their network calls.

For x0 ~ N(m, s^2) the marginal at sigma is N(mu, V) with mu = (1 - sigma) m, V = (1 - sigma)^2 s^2 + sigma^2. The
velocity E[eps - x0 | x] is then -m + (sigma - (1 - sigma) s^2) / V (x - mu), and the flow carries x to
mu' + sqrt(V' / V) (x - mu).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from cfjax.core.errors import UserError
from cfjax.flow import schedule
from cfjax.flow.solvers import SOLVERS, euler, heun, rk4, unipc

MEAN, STD = 0.7, 0.5
X = np.linspace(-2, 2, 5).astype(np.float32)


def gaussian_velocity(x, sigma):
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (x - (1 - sigma) * MEAN)


def gaussian_flow(x, start, end):
    std = [np.sqrt((1 - s) ** 2 * STD**2 + s**2) for s in (start, end)]
    return (1 - end) * MEAN + std[1] / std[0] * (x - (1 - start) * MEAN)


def log_snr_grid(steps):
    """Levels between sigma 0.88 and 0.27, equally spaced in log-SNR."""
    return 1 / (1 + np.exp(np.linspace(-2, 1, steps + 1)))


def fitted_order(solver, grid_of, counts):
    errors = []
    for steps in counts:
        grid = grid_of(steps)
        exact = gaussian_flow(X.astype(np.float64), grid[0], grid[-1])
        errors.append(np.abs(np.asarray(solver(gaussian_velocity, X, grid)) - exact).max())
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("solver", "expected", "tolerance"), [(euler, 0.988, 0.01), (heun, 1.983, 0.01), (unipc, 2.052, 0.01)]
)
def test_order_of_convergence(solver, expected, tolerance):
    order = fitted_order(solver, log_snr_grid, [8, 16, 32, 64])
    assert abs(order - expected) < tolerance, order


@pytest.mark.parametrize(("name", "bound"), [("euler", 0.09), ("heun", 0.022), ("unipc", 0.002)])
def test_wan_grid_reaches_the_data(name, bound):
    grid, _ = schedule.unipc_grid(50, 5.0)
    error = np.abs(np.asarray(SOLVERS[name](gaussian_velocity, X, grid)) - gaussian_flow(X, grid[0], 0.0)).max()
    assert error < bound


@pytest.mark.parametrize(("name", "calls"), [("euler", [0, 1, 2]), ("heun", [0, 1, 1, 2, 2]), ("unipc", [0, 1, 2])])
def test_network_calls(name, calls):
    seen = []

    def velocity(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma, ordered=True)
        return jnp.tanh(x) * sigma

    grid = np.float32([0.875, 0.5, 0.25, 0.0])
    jax.block_until_ready(SOLVERS[name](velocity, X, grid))
    jax.effects_barrier()
    assert seen == [grid[i] for i in calls]
    jaxpr = jax.make_jaxpr(lambda x: SOLVERS[name](lambda x, s: jnp.tanh(x) * s, x, grid))(X)
    assert str(jaxpr).count("tanh") == 1


def test_heun_corrects_its_last_step_when_the_grid_ends_above_zero():
    grid = np.float32([0.75, 0.5])
    v = gaussian_velocity(X, 0.75)
    expected = X - 0.25 * (v + gaussian_velocity(X - 0.25 * v, 0.5)) / 2
    np.testing.assert_allclose(heun(gaussian_velocity, X, grid), expected, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_trajectory_holds_the_states_at_every_level(name):
    grid, _ = schedule.unipc_grid(40, 5.0)
    x = np.broadcast_to(X[:, None], (5, 3))
    end, states = jax.jit(lambda x: SOLVERS[name](gaussian_velocity, x, grid, trajectory=True))(x)
    assert states.shape == (41, 5, 3) and states.dtype == jnp.float32
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_array_equal(states[-1], end)
    np.testing.assert_allclose(end, SOLVERS[name](gaussian_velocity, x, grid), atol=1e-6)
    exact = np.stack([gaussian_flow(x, grid[0], sigma) for sigma in grid])
    assert np.abs(states - exact).max() < {"euler": 0.11, "heun": 0.035, "unipc": 0.013}[name]


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_to_zero_is_the_x0_prediction(name):
    end = SOLVERS[name](gaussian_velocity, X, [0.9, 0.0])
    np.testing.assert_allclose(end, X - 0.9 * gaussian_velocity(X, 0.9), atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_model_sigmas_reach_only_the_network(name):
    grid, model_sigmas = np.float32([0.9, 0.4, 0.0]), np.float32([0.5, 0.25])
    end = SOLVERS[name](lambda x, s: s * jnp.ones_like(x), X, grid, model_sigmas=model_sigmas)
    by_hand = SOLVERS[name](lambda x, s: jnp.where(s > 0.6, 0.5, 0.25) * jnp.ones_like(x), X, grid)
    if name == "heun":  # its second call is at 0.4 and is told 0.25, as both functions say
        np.testing.assert_allclose(end, X - 0.5 * (0.5 + 0.25) / 2 - 0.4 * 0.25, atol=1e-6)
    np.testing.assert_allclose(end, by_hand, atol=1e-6)


def test_bfloat16_state_is_integrated_in_float32():
    grid = log_snr_grid(4)
    x = jnp.asarray(X, jnp.bfloat16)
    end = unipc(lambda x, s: gaussian_velocity(x, s).astype(jnp.bfloat16), x, grid)
    assert end.dtype == jnp.float32


def random_network(seed=0, width=16):
    """The same nonlinear velocity in jax and torch."""
    rng = np.random.default_rng(seed)
    w_in, w_out, b = (rng.standard_normal(s).astype(np.float32) / 4 for s in ((width, 32), (32, width), (32,)))
    w_in_t, w_out_t, b_t = map(torch.from_numpy, (w_in, w_out, b))

    def in_jax(x, sigma):
        return 2.0 * jnp.tanh(x @ w_in + 4.0 * sigma * b[None]) @ w_out + jnp.sin(3.0 * x)

    def in_torch(x, sigma):
        return 2.0 * torch.tanh(x @ w_in_t + 4.0 * sigma * b_t) @ w_out_t + torch.sin(3.0 * x)

    return in_jax, in_torch, rng.standard_normal((8, width)).astype(np.float32)


@pytest.mark.parametrize(("grid", "steps"), [("library", 10), ("library", 50), ("reference", 50), ("reference", 3)])
def test_unipc_equals_diffusers(grid, steps):
    in_jax, in_torch, x = random_network()
    torch.set_num_threads(1)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=2
    )
    if grid == "reference":
        scheduler.set_timesteps(sigmas=np.linspace(schedule.UNIPC_SIGMA_MAX, 0.0, steps + 1)[:-1])
        sigmas, timesteps = schedule.unipc_grid(steps, 5.0)
        np.testing.assert_array_equal(sigmas, scheduler.sigmas.numpy())
        np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy())
    else:  # the library's own grid starts at 1 - 1e-6
        scheduler.set_timesteps(steps)
        sigmas, timesteps = scheduler.sigmas.numpy(), scheduler.timesteps.numpy()

    sample = torch.from_numpy(x)
    for t in scheduler.timesteps:
        sample = scheduler.step(in_torch(sample, t.item() / 1000), t, sample, return_dict=False)[0]
    ours = unipc(in_jax, x, sigmas, model_sigmas=timesteps / 1000)
    error = np.abs(np.asarray(ours) - sample.numpy()).max() / np.abs(sample.numpy()).max()
    assert error < 2e-6, error  # 1e-6 seen


def test_unipc_from_pure_noise_starts_just_below_one():
    in_jax, _, x = random_network()
    grid = np.append(schedule.sigma_table(12, 5.0), np.float32(0.0))
    below = np.append(np.float64(1.0 - 1e-6), grid[1:])
    end = unipc(in_jax, x, grid)
    assert np.isfinite(end).all()
    np.testing.assert_allclose(end, unipc(in_jax, x, below, model_sigmas=grid[:-1]), atol=1e-6)


@pytest.mark.parametrize("grid", [[0.5], [0.1, 0.5], [0.5, 0.5], [1.5, 0.0], [0.5, -0.1], [[0.5, 0.1]]])
def test_impossible_grids(grid):
    for solver in SOLVERS.values():
        with pytest.raises(UserError, match="descend strictly"):
            solver(gaussian_velocity, X, grid)


def test_wrong_number_of_model_sigmas_and_traced_grids():
    with pytest.raises(UserError, match="one per step"):
        euler(gaussian_velocity, X, [0.5, 0.0], model_sigmas=[0.5, 0.0])
    with pytest.raises(UserError, match="host constants"):
        jax.jit(lambda grid: euler(gaussian_velocity, X, grid))(jnp.array([0.5, 0.0]))


def test_rk4_is_of_fourth_order_and_keeps_float64():
    with jax.enable_x64(True):
        x, exact = jnp.asarray(X, jnp.float64), gaussian_flow(X.astype(np.float64), 1.0, 0.0)
        errors = [np.abs(rk4(gaussian_velocity, x, np.linspace(1, 0, n + 1)) - exact).max() for n in (64, 128, 256)]
        orders = np.log2(np.array(errors[:-1]) / errors[1:])
        print("rk4 errors", errors, "orders", orders)
        assert (abs(orders - 4) < 0.3).all() and errors[-1] < 1e-10
    end, states = rk4(gaussian_velocity, X, np.linspace(1, 0, 65), trajectory=True)
    assert end.dtype == jnp.float32 and states.shape == (65, 5)
    np.testing.assert_allclose(end, exact, atol=2e-5)
