"""Noise schedules: levels, tables, training weights.

All levels are sigmas in [0, 1] (the reference's timestep is t = 1000 sigma). A *table* is a descending float32 array
of N sigmas that starts at exactly 1 and does not contain 0; the reference maps every level to the nearest table
entry, without interpolation (`utils/scheduler.py`, `FlowMatchScheduler`). Tables are host constants (numpy); lookups
work on traced arrays.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cfjax.core.errors import UserError

Levels = TypeVar("Levels", np.ndarray, jax.Array)

# The highest sigma of the unshifted UniPC grid: 1 - 1/1000 as the reference scheduler's float32 arithmetic leaves it.
UNIPC_SIGMA_MAX = 0.9990000128746033


def shift_sigma(u: Levels, shift: float) -> Levels:
    """sigma = s u / (1 + (s - 1) u): moves the levels `u` (numpy or jax, any shape) towards noise for shift s > 1."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps}: a noise schedule needs at least one step")
    if not shift > 0:
        raise UserError(f"shift={shift}: the timestep shift must be positive (1 is no shift, Wan uses 5 or 8)")


def sigma_table(num_steps: int, shift: float) -> np.ndarray:
    """The N noise levels shift_sigma(1 - i/N), i = 0..N-1: descending float32, first exactly 1, 0 not included.

    The unshifted levels follow `torch.linspace` in float32 (counted from the nearer end), so that the table equals
    the reference's bit for bit: T5 = sigma_table(1000, 5), T8 = sigma_table(1000, 8), T48 = sigma_table(48, 5).
    """
    _check(num_steps, shift)
    i = np.arange(num_steps)
    step = np.float64(np.float32(-1.0) / np.float32(num_steps))
    # Products in float64 and one rounding at the end: the fused multiply-add of torch's kernel.
    u = np.where(i < (num_steps + 1) // 2, 1.0 + step * i, -step * (num_steps - i)).astype(np.float32)
    return shift_sigma(u, shift).astype(np.float32)


def nearest(table: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """Index of the table entry nearest to each `sigma` (any shape), the first one on ties; int32, works under jit."""
    sigma = jnp.asarray(sigma, jnp.float32)
    table = jnp.asarray(table, jnp.float32).reshape((1,) * sigma.ndim + (-1,))
    return jnp.argmin(jnp.abs(table - sigma[..., None]), axis=-1)


def lookup(table: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """The table entry nearest to each `sigma`. Note that 0 maps to the last entry, which is not 0."""
    return jnp.asarray(table, jnp.float32)[nearest(table, sigma)]


def warp_steps(steps: Sequence[int] = (1000, 750, 500, 250), shift: float = 5.0) -> np.ndarray:
    """The few-step sampler's levels: each integer tau becomes entry 1000 - tau of the 1000-entry table (0 stays 0).

    Returns float32 sigmas; for the default list and shift 5: 1, 0.9375, 0.8333333, 0.625.
    """
    if not steps or any(int(tau) != tau or not 0 <= tau <= 1000 for tau in steps):
        raise UserError(f"denoising steps {tuple(steps)}: give integers between 0 and 1000")
    table = np.append(sigma_table(1000, shift), np.float32(0.0))
    return table[1000 - np.asarray(steps, np.int64)]


def check_steps(key: str, steps: Sequence[int]) -> None:
    """Refuses what is no list of denoising steps; `key` names it.

    Raises:
      UserError: they are none, do not descend, or hold a 0.
    """
    if steps and steps[-1] == 0:
        raise UserError(f"{key}={tuple(steps)}: the last step leads to 0 by itself; leave the trailing 0 out")
    if not steps or list(steps) != sorted(set(steps), reverse=True) or not 0 < steps[-1] <= steps[0] <= 1000:
        raise UserError(f"{key}={tuple(steps)}: give timesteps between 1000 and 1, the noisiest first")


def bsmntw(table: ArrayLike) -> np.ndarray:
    """Training weight of every table entry: a bell around t = 500 lowered to 0 at its minimum, times 1000 / sum.

    y = exp(-2 ((t - 500) / 1000)^2), w = 1000 (y - min y) / sum(y - min y). For T5 the weight at pure noise is 0.
    """
    y = np.exp(-2.0 * (np.asarray(table, np.float64) - 0.5) ** 2)
    y -= y.min()
    if not y.any():
        raise UserError("bsmntw weights need a table of at least two different noise levels")
    return (1000.0 * y / y.sum()).astype(np.float32)


def bsmntw_weight(sigma: ArrayLike, table: ArrayLike) -> jax.Array:
    """The bsmntw weight of each `sigma`, by nearest table entry; `table` is a host constant."""
    return jnp.asarray(bsmntw(table))[nearest(table, sigma)]


def round_timestep_bf16(sigma: ArrayLike) -> jax.Array:
    """bf16(1000 sigma) / 1000 in float32: the reference's rounding of conditioning timesteps (quirks Q1 and Q2).

    Above t = 512 the rounded timesteps are 4 apart, so the 1000 levels of T5 collapse to 294.
    """
    # Not `.astype(bfloat16).astype(float32)`: under jit XLA may drop such a pair of casts.
    t = jax.lax.reduce_precision(jnp.asarray(sigma, jnp.float32) * 1000.0, exponent_bits=8, mantissa_bits=7)
    # Under jit XLA divides by multiplying with 1/1000, which float32 has not exactly. One correction, which must not be
    # folded away, makes 1000 sigma the rounded timestep to the bit (three of T5's have no such sigma).
    rounded = jax.lax.optimization_barrier(t / 1000.0)
    return jax.lax.optimization_barrier(rounded + (t - 1000.0 * rounded) / 1000.0)


def gap_bf16(sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
    """The reference's step size sigma - sigma_next in consistency distillation, formed in bf16 throughout (quirk Q2).

    bf(bf(t~ - t~') / 1000) with t~ = bf(1000 sigma); its ratio to the true step is between 0.60 and 1.64 on T48.
    """
    t, t_next = (
        jax.lax.reduce_precision(jnp.asarray(s, jnp.float32) * 1000.0, exponent_bits=8, mantissa_bits=7)
        for s in (sigma, sigma_next)
    )
    gap = jax.lax.reduce_precision(t - t_next, exponent_bits=8, mantissa_bits=7)
    return jax.lax.reduce_precision(gap / 1000.0, exponent_bits=8, mantissa_bits=7)


def score_sigma(u: ArrayLike, shift: float, lo: float, hi: float) -> jax.Array:
    """The level at which DMD compares scores: shift_sigma(u) clipped to [lo, hi], u uniform in [0, 1).

    The reference draws u = k/1000 with integer k, shift 5, lo 0.02, hi 0.98.
    """
    return jnp.clip(shift_sigma(jnp.asarray(u, jnp.float32), shift), lo, hi)


def unipc_grid(num_steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """The many-step sampler's grid: `(sigmas[N + 1], timesteps[N])`.

    Reference: `wan/utils/fm_solvers_unipc.py`, `FlowUniPCMultistepScheduler.set_timesteps`.

    sigmas: float32, descending from 0.99979985 (shift 5; not 1) to a final 0, used by the solver unrounded.
    timesteps: int64, 1000 sigma *truncated*, the network's input; divide by 1000 for `model_sigmas`.
    """
    _check(num_steps, shift)
    sigmas = shift_sigma(np.linspace(UNIPC_SIGMA_MAX, 0.0, num_steps + 1)[:-1], shift)
    return np.append(sigmas, 0.0).astype(np.float32), (sigmas * 1000.0).astype(np.int64)
