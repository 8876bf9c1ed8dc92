"""Integrators of the probability-flow ODE dx/dsigma = v(x, sigma), from noise (large sigma) to data.

Every solver has the signature `solver(velocity, x, sigmas, *, model_sigmas=None, trajectory=False)`:

    velocity      (x, sigma) -> v, with sigma a float32 scalar; may be any traceable function.
    x             the state at sigmas[0], any shape.
    sigmas        [N + 1] host constants (numpy or a concrete array), strictly descending within [0, 1].
    model_sigmas  [N] noise levels that the network is conditioned on instead of sigmas[:N] (UniPC's truncated
                  timesteps); the update still uses `sigmas`.
    trajectory    also return the states at all N + 1 levels, stacked in front: `(x_end, states[N + 1, ...])`.

Arithmetic and results are float32. The step loop is a `lax.scan` whose body holds the network once, and all
coefficients are formed on the host in float64. Network calls: euler N; heun 2N - 1 when the last sigma is 0 (2N
otherwise); unipc N. A `UserError` says what is wrong with a grid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
Grid = np.ndarray | jax.Array | Sequence[float]
Solution = jax.Array | tuple[jax.Array, jax.Array]

# UniPC works in log-SNR, which is infinite at sigma = 1; a grid that starts there is started this much lower, as the
# diffusers library does. The network is still conditioned on sigma = 1.
UNIPC_MARGIN = 1e-6


def _grids(sigmas: Grid, model_sigmas: Grid | None) -> tuple[np.ndarray, np.ndarray]:
    """Both grids on the host: sigmas as float64 [N + 1], the network's conditioning as float32 [N]."""
    try:
        grid = np.asarray(sigmas, np.float64)
        model_sigmas = grid[:-1] if model_sigmas is None else np.asarray(model_sigmas, np.float64)
    except jax.errors.TracerArrayConversionError:
        raise UserError("solver grids must be host constants: build sigmas with numpy outside jit") from None
    if grid.ndim != 1 or len(grid) < 2 or not (np.diff(grid) < 0).all() or grid[0] > 1 or grid[-1] < 0:
        raise UserError(f"solver sigmas must descend strictly within [0, 1] and hold at least two levels, got {grid}")
    if model_sigmas.shape != (len(grid) - 1,):
        raise UserError(f"model_sigmas has shape {model_sigmas.shape}: give one per step, ({len(grid) - 1},)")
    return grid, model_sigmas.astype(np.float32)


def _columns(**columns: np.ndarray) -> dict[str, jax.Array]:
    return {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}


def _solution(x: jax.Array, states: jax.Array | None) -> Solution:
    return x if states is None else (x, jnp.concatenate([states, x[None]]))


def euler(
    velocity: Velocity, x: jax.Array, sigmas: Grid, *, model_sigmas: Grid | None = None, trajectory: bool = False
) -> Solution:
    """x <- x + (sigma_{i+1} - sigma_i) v(x, sigma_i): first order, N network calls."""
    grid, model_sigmas = _grids(sigmas, model_sigmas)

    def step(x, at):
        v = velocity(x, at["model_sigmas"]).astype(jnp.float32)
        return x + at["h"] * v, (x if trajectory else None)

    return _solution(
        *jax.lax.scan(step, jnp.asarray(x, jnp.float32), _columns(model_sigmas=model_sigmas, h=np.diff(grid)))
    )


def heun(
    velocity: Velocity, x: jax.Array, sigmas: Grid, *, model_sigmas: Grid | None = None, trajectory: bool = False
) -> Solution:
    """Second order: an Euler predictor, then the trapezoidal rule over the velocities at both ends of the step.

    The scan runs over network calls, which alternate between predictor and corrector. A last step to sigma = 0 is the
    Euler step alone (no call at 0, where networks are not trained): 2N - 1 calls, 2N if the grid ends above 0. In the
    latter case the network is conditioned on the last sigma itself, as model_sigmas has no entry for it.
    """
    grid, model_sigmas = _grids(sigmas, model_sigmas)
    calls = 2 * (len(grid) - 1) - (1 if grid[-1] == 0 else 0)
    step_of_call = np.arange(calls) // 2
    guess = np.arange(calls) % 2 == 0
    sigma_at_call = np.append(model_sigmas, grid[-1])[(np.arange(calls) + 1) // 2]
    # A guess moves to base + h v; a correction to base + h/2 (v_guess + v), which becomes the next base.
    h = np.diff(grid)[step_of_call]
    columns = _columns(model_sigmas=sigma_at_call, new=np.where(guess, h, h / 2), old=np.where(guess, 0.0, h / 2))

    def call(carry, at):
        base, point, v_guess = carry
        v = velocity(point, at["model_sigmas"]).astype(jnp.float32)
        moved = base + at["old"] * v_guess + at["new"] * v
        return (jnp.where(at["guess"], base, moved), moved, v), (base if trajectory else None)

    x = jnp.asarray(x, jnp.float32)
    (_, end, _), states = jax.lax.scan(call, (x, x, jnp.zeros_like(x)), {**columns, "guess": jnp.asarray(guess)})
    return _solution(end, None if states is None else states[::2])


def rk4(velocity: Velocity, x: jax.Array, sigmas: Grid, *, trajectory: bool = False) -> Solution:
    """Classical Runge-Kutta of fourth order, 4 N calls: for exact velocities, as in `studies`.

    A float64 state (`jax.enable_x64`) stays float64. It evaluates the velocity at a final sigma of 0 too, where
    networks are not trained; so it is not a sampler, and not in `SOLVERS`.
    """
    grid, _ = _grids(sigmas, None)
    x = jnp.asarray(x)
    dtype = x.dtype if x.dtype == jnp.float64 else jnp.float32

    def step(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        s, h = at
        k1 = velocity(x, s)
        k2 = velocity(x + 0.5 * h * k1, s + 0.5 * h)
        k3 = velocity(x + 0.5 * h * k2, s + 0.5 * h)
        k4 = velocity(x + h * k3, s + h)
        return x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4), (x if trajectory else None)

    columns = (jnp.asarray(grid[:-1], dtype), jnp.asarray(np.diff(grid), dtype))
    return _solution(*jax.lax.scan(step, x.astype(dtype), columns))


def _unipc_coefficients(grid: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficients of every UniPC step (order 2, x0-prediction, B(h) = expm1(-h), "bh2"), each [N].

    Reference: `wan/utils/fm_solvers_unipc.py`, `multistep_uni_p_bh_update` and `multistep_uni_c_bh_update`.

    With m_i the x0 prediction at step i, the corrected state and the next state are linear combinations:
      x_i^c   = corr_x x_i + corr_last x_{i-1}^c + corr_m0 m_i + corr_m1 m_{i-1} + corr_m2 m_{i-2}
      x_{i+1} = pred_x x_i^c + pred_m0 m_i + pred_m1 m_{i-1}
    """
    steps = len(grid) - 1
    sigma = np.minimum(grid, 1.0 - UNIPC_MARGIN)
    with np.errstate(divide="ignore"):
        lam = np.log1p(-sigma) - np.log(sigma)  # +inf at a final sigma of 0, where only expm1(-inf) = -1 is used
    names = ("corr_x", "corr_last", "corr_m0", "corr_m1", "corr_m2", "pred_x", "pred_m0", "pred_m1")
    c = {name: np.zeros(steps) for name in names}
    order = [min(2, steps - i, i + 1) for i in range(steps)]
    for i in range(steps):
        if i == 0:
            c["corr_x"][0] = 1.0
        else:
            h = lam[i] - lam[i - 1]
            big = np.expm1(-h)
            scale = -(1.0 - sigma[i]) * big
            c["corr_last"][i] = sigma[i] / sigma[i - 1]
            rho1, rho2, r = 0.0, 0.5, 1.0
            if order[i - 1] == 2:
                r = (lam[i - 2] - lam[i - 1]) / h
                p1 = big / -h - 1.0
                b1, b2 = p1 / big, 2.0 * (p1 / -h - 0.5) / big
                rho1, rho2 = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [b1, b2])
            c["corr_m0"][i] = scale * rho2
            c["corr_m1"][i] = scale * (1.0 - rho1 / r - rho2)
            c["corr_m2"][i] = scale * rho1 / r
        h = lam[i + 1] - lam[i]
        scale = -(1.0 - sigma[i + 1]) * np.expm1(-h)
        slope = 0.5 * h / (lam[i - 1] - lam[i]) if order[i] == 2 else 0.0
        c["pred_x"][i] = sigma[i + 1] / sigma[i]
        c["pred_m0"][i] = scale * (1.0 - slope)
        c["pred_m1"][i] = scale * slope
    return c


def unipc(
    velocity: Velocity, x: jax.Array, sigmas: Grid, *, model_sigmas: Grid | None = None, trajectory: bool = False
) -> Solution:
    """UniPC of order 2 (arXiv 2302.04867): predictor and corrector from one call per step, N network calls.

    The Wan sampler is `unipc(velocity, x, sigmas, model_sigmas=timesteps / 1000)` with both from
    `schedule.unipc_grid`. A grid that starts at sigma = 1 (infinite log-SNR) is started at 1 - 1e-6 for the arithmetic.
    The last step is first order. The trajectory holds the corrected states.
    """
    grid, model_sigmas = _grids(sigmas, model_sigmas)
    solver_sigma = np.minimum(grid, 1.0 - UNIPC_MARGIN)[:-1]

    def step(carry, at):
        x, last, m1, m2 = carry
        m0 = x - at["sigma"] * velocity(x, at["model_sigmas"]).astype(jnp.float32)
        x = at["corr_x"] * x + at["corr_last"] * last
        x = x + at["corr_m0"] * m0 + at["corr_m1"] * m1 + at["corr_m2"] * m2
        moved = at["pred_x"] * x + at["pred_m0"] * m0 + at["pred_m1"] * m1
        return (moved, x, m0, m1), (x if trajectory else None)

    x = jnp.asarray(x, jnp.float32)
    zeros = jnp.zeros_like(x)
    columns = _columns(model_sigmas=model_sigmas, sigma=solver_sigma, **_unipc_coefficients(grid))
    (end, *_), states = jax.lax.scan(step, (x, zeros, zeros, zeros), columns)
    return _solution(end, states)


SOLVERS: dict[str, Callable[..., Any]] = {"euler": euler, "heun": heun, "unipc": unipc}
