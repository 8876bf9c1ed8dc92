"""The branching walk: ambiguity of a teacher's pairs, exact collisions, and predictions of a trained student.

Conditioned on a clean past the couplings are exact: draw futures from the law given that past, and run the teacher's
PF-ODE from data to noise. Then (x_s^i, x_0^i) of these videos are the teacher's pairs with that past. Solvers go from
high to low sigma, so the reverse runs in u = 1 - s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import root

from cfjax.flow.path import x0_from_flow
from cfjax.flow.solvers import rk4
from cfjax.models.wan import embed_text, teacher_forced
from cfjax.studies.laws import Law, joint_velocity, sample, velocity
from cfjax.studies.toys import FRAMEWISE, Student

TEACHERS = ("bidirectional", "causal")
TEACHER_OF = {"causal_ode": "causal", "bi_ode": "bidirectional"}  # of the students whose end is compared with its map
STEPS = 96  # of rk4, equal in sigma: every few-step level is on this grid
BANDWIDTH = 0.05  # of local-linear fits, in standard deviations of x_s^i
CENTRAL = (0.02, 0.98)  # quantiles of x_s^i between which a student is judged
RETURNED = 512  # videos per frame that are also solved back, for the solver's own error
Flow = Callable[[jax.Array, jax.Array], jax.Array]


def _forward_grid(steps: int) -> np.ndarray:
    return np.linspace(1.0, 0.0, steps + 1)


def _backwards(flow: Flow) -> Flow:
    """dx/du = -v at s = 1 - u."""
    return lambda x, u: -flow(x, 1.0 - u)


@lru_cache(maxsize=8)
def noising(law: Law, steps: int = STEPS) -> Any:
    """Compiled: videos [B, F] to the bidirectional PF-ODE's states at s = k / steps, [steps + 1, B, F]."""
    flow: Flow = lambda x, s: joint_velocity(law, x, jnp.broadcast_to(s, x.shape[:1]))
    return jax.jit(lambda x: rk4(_backwards(flow), x, _forward_grid(steps), trajectory=True)[1])


@lru_cache(maxsize=32)
def frame_noising(law: Law, frame: int, steps: int = STEPS) -> Any:
    """Compiled: (past [B, i], x_0^i [B]) to the AR PF-ODE's states of that frame, [steps + 1, B]."""

    def solve(past: jax.Array, end: jax.Array) -> jax.Array:
        flow: Flow = lambda x, s: velocity(law, frame, x, jnp.broadcast_to(s, x.shape[:1]), past)
        return rk4(_backwards(flow), end[:, None], _forward_grid(steps), trajectory=True)[1][:, :, 0]

    return jax.jit(solve)


@lru_cache(maxsize=8)
def denoising(law: Law, steps: int = STEPS) -> Any:
    """Compiled: noise [B, F] to the bidirectional PF-ODE's end."""
    flow: Flow = lambda x, s: joint_velocity(law, x, jnp.broadcast_to(s, x.shape[:1]))
    return jax.jit(lambda x: rk4(flow, x, _forward_grid(steps)))


@lru_cache(maxsize=32)
def frame_denoising(law: Law, frame: int, steps: int = STEPS) -> Any:
    """Compiled: (past [B, i], noise of frame i [B]) to the AR PF-ODE's end [B]."""

    def solve(past: jax.Array, noise: jax.Array) -> jax.Array:
        flow: Flow = lambda x, s: velocity(law, frame, x, jnp.broadcast_to(s, x.shape[:1]), past)
        end: Any = rk4(flow, noise[:, None], _forward_grid(steps))
        return end[:, 0]

    return jax.jit(solve)


@dataclass(frozen=True)
class Probe:
    """Pairs of one teacher with given pasts, by frame and level, and an estimate of each end point's mean.

    All arrays [pasts, futures]: noisy x_s^i; end x_0^i; guess, a leave-one-out local-linear fit of the end on the noisy
    frame; guess_error, that fit's own variance; inside, whether the point is in the central quantiles.
    clean [pasts, futures, F]: the videos.  solver_error: mean square of data -> noise -> data by the same solver.
    """

    frame: int
    sigma: float
    clean: np.ndarray
    noisy: np.ndarray
    end: np.ndarray
    guess: np.ndarray
    guess_error: np.ndarray
    inside: np.ndarray
    solver_error: float

    def _rises(self) -> np.ndarray:
        """Differences between the ends of neighbours, by rising noisy frame, [pasts, futures - 1]."""
        order = np.argsort(self.noisy, axis=1)
        return np.diff(np.take_along_axis(self.end, order, axis=1), axis=1)

    def ambiguity_by_past(self) -> np.ndarray:
        """Var[x_0^i | x_s^i, past] by differences of neighbours, [pasts]; its bias falls with the number of futures."""
        return np.mean(self._rises() ** 2, axis=1) / 2.0

    def central_ambiguity(self) -> float:
        """E Var between the quantiles where a student is judged, which are neighbours too."""
        inside = np.take_along_axis(self.inside, np.argsort(self.noisy, axis=1), axis=1)
        return float(np.mean(self._rises()[inside[:, 1:] & inside[:, :-1]] ** 2) / 2.0)

    def monotone(self) -> float:
        """Fraction of neighbours in order: 1 where end is an increasing function of noisy."""
        return float((self._rises() >= 0).mean())

    def fit_error(self) -> float:
        """Mean square of end - guess. AR pairs' end *is* their conditional mean: there it is the fit's bias."""
        return float(((self.end - self.guess) ** 2)[self.inside].mean())

    def fit_variance(self) -> float:
        """What the fit's own variance adds to a squared distance from the conditional mean."""
        return float(self.guess_error[self.inside].mean())

    def prior(self) -> float:
        """Mean variance of x_0^i given the past."""
        return float(self.end.var(axis=1).mean())


def local_linear(x_B: np.ndarray, y_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave-one-out local-linear fit of y on x at every x (Gaussian kernel), and the sum of its squared weights."""
    gap = x_B[None] - x_B[:, None]
    kernel = np.exp(-0.5 * (gap / (BANDWIDTH * x_B.std())) ** 2)
    np.fill_diagonal(kernel, 0.0)
    s0, s1, s2 = kernel.sum(1), (kernel * gap).sum(1), (kernel * gap**2).sum(1)
    weights = kernel * (s2[:, None] - s1[:, None] * gap)
    weights /= np.maximum(s0 * s2 - s1**2, 1e-12)[:, None]
    return weights @ y_B, (weights**2).sum(1)


def _probe(frame: int, sigma: float, clean: np.ndarray, noisy: np.ndarray, solver_error: float) -> Probe:
    end = clean[:, :, frame]
    fits = [local_linear(x, y) for x, y in zip(noisy, end, strict=True)]
    guess = np.stack([fit for fit, _ in fits])
    low, high = np.quantile(noisy, CENTRAL, axis=1, keepdims=True)
    residual = np.mean((end - guess) ** 2, axis=1, keepdims=True)
    error = residual * np.stack([squares for _, squares in fits])
    inside = (noisy >= low) & (noisy <= high)
    return Probe(frame, sigma, clean, noisy, end, guess, error, inside, solver_error)


def probes(
    law: Law, teacher: str, pasts: int, futures: int, seed: int, sigmas: tuple[float, ...], frames: tuple[int, ...]
) -> list[Probe]:
    """A probe per frame and level; the same pasts and futures for both teachers (`TEACHERS`)."""
    rng, out = np.random.default_rng(seed), []
    given = sample(law, rng, pasts)
    for frame in frames:
        clean = np.stack([sample(law, rng, futures, past[:frame]) for past in given])
        flat = jnp.asarray(clean.reshape(-1, law.frames), jnp.float32)
        some = slice(None, None, max(1, len(flat) // RETURNED))
        if teacher == "bidirectional":
            states = noising(law)(flat)
            back, states = denoising(law)(states[-1, some])[:, frame], states[:, :, frame]
        else:
            states = frame_noising(law, frame)(flat[:, :frame], flat[:, frame])
            back = frame_denoising(law, frame)(flat[some, :frame], states[-1, some])
        error = float(jnp.mean((back - flat[some, frame]) ** 2))
        for sigma in sigmas:
            noisy = np.asarray(states[round(sigma * STEPS)]).reshape(pasts, futures).astype(float)
            out.append(_probe(frame, sigma, clean, noisy, error))
    return out


def facts(probe: Probe, ar: Probe) -> dict[str, Any]:
    """Statistics of a teacher's pairs, without any student.

    ambiguity, of_prior: E Var, and over the prior's.  by_past: the same by past.  central: E Var where students are
    judged.  monotone: see `Probe`.  floor_map: what the solver's error adds to a distance from the flow map (from pure
    noise, so no less than at lower levels).  floor_mean: what the fit's error adds to one from the conditional mean.

    Args:
      ar: the AR teacher's probe of the same frame and level, on which the fit's bias can be seen; that of the
        bidirectional teacher's mean, which is smoother, is taken to be no larger.
    """
    by_past = probe.ambiguity_by_past()
    return {
        "ambiguity": float(by_past.mean()),
        "of_prior": float(by_past.mean()) / probe.prior(),
        "by_past": by_past.tolist(),
        "central": probe.central_ambiguity(),
        "monotone": probe.monotone(),
        "floor_map": probe.solver_error,
        "floor_mean": ar.fit_error() + (0.0 if probe is ar else probe.fit_variance()),
    }


@jax.jit
def _predict(student: Any, noisy: jax.Array, sigma: jax.Array, clean: jax.Array) -> jax.Array:
    video = lambda x: x[:, :, None, None, None]
    text_kv = embed_text(student, jnp.zeros((noisy.shape[0], 1, 1)))
    sigma_BF = jnp.broadcast_to(sigma, noisy.shape)
    flow = teacher_forced(student, video(noisy), sigma_BF, video(clean), text_kv, FRAMEWISE)
    return x0_from_flow(flow, video(noisy), sigma_BF)[:, :, 0, 0, 0]


def settling(student: Student, probe: Probe) -> dict[str, float]:
    """Distances of a student's predictions.

    dist_map, dist_mean: squared distances to the teacher's end points and to their conditional mean, over the central
    quantiles; their floors are among `facts`.  kept: the predictions' variance given the past over the data's, all
    noisy frames; by the law of total variance the conditional mean keeps 1 - E Var / prior.
    """
    frames = probe.clean.shape[2]
    clean = jnp.asarray(probe.clean.reshape(-1, frames), jnp.float32)
    noisy = jnp.zeros_like(clean).at[:, probe.frame].set(probe.noisy.ravel().astype(np.float32))
    got = np.asarray(_predict(student, noisy, jnp.float32(probe.sigma), clean))[:, probe.frame]
    got = got.reshape(probe.noisy.shape)
    within = lambda x: float(x[probe.inside].mean())
    return {
        "dist_map": within((got - probe.end) ** 2),
        "dist_mean": within((got - probe.guess) ** 2),
        "kept": float(got.var(axis=1).mean()) / probe.prior(),
    }


def round_trip(law: Law, count: int, seed: int, steps: int = STEPS) -> float:
    """Root mean square of data -> noise -> data under the bidirectional PF-ODE, float64: the solver's own error."""
    with jax.enable_x64(True):
        clean = jnp.asarray(sample(law, np.random.default_rng(seed), count))
        back = denoising(law, steps)(noising(law, steps)(clean)[-1])
        return float(jnp.sqrt(jnp.mean((back - clean) ** 2)))


@dataclass(frozen=True)
class Collision:
    """One noise x_1^i and one past x_0^{<i}, reached by many noise vectors: where frame i ends in each of them.

    ends: x_0^i of every solved future.  asked: futures resampled.  residual: largest |difference| of the past.
    causal: where the AR teacher, which has no future to depend on, takes the same noise and past.
    """

    frame: int
    ends: np.ndarray
    asked: int
    residual: float
    causal: float


def collide(law: Law, frame: int, futures: int, seed: int, steps: int = STEPS) -> Collision:
    """Resamples the future noise and solves for the past noise that leads to the same past, x_1^i untouched (float64).

    The roots found are an existence proof of collisions, not samples of a conditional law.
    """
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        solve = denoising(law, steps)
        noise = rng.standard_normal(law.frames)
        wanted = np.asarray(solve(jnp.asarray(noise[None])))[0, :frame]

        @jax.jit
        def miss(past: jax.Array, rest: jax.Array, wanted: jax.Array) -> jax.Array:
            return solve(jnp.concatenate([past, rest])[None])[0, :frame] - wanted

        slope = jax.jit(jax.jacfwd(miss))
        ends, worst = [], 0.0
        for _ in range(futures):
            rest = np.concatenate([noise[frame : frame + 1], rng.standard_normal(law.frames - frame - 1)])
            past = noise[:frame]
            if frame:
                given = (jnp.asarray(rest), jnp.asarray(wanted))
                found = root(miss, past, args=given, jac=lambda *a: np.asarray(slope(*a)), tol=1e-14)
                error = float(np.abs(miss(jnp.asarray(found.x), *given)).max())
                if error > 1e-8:
                    continue
                past, worst = found.x, max(worst, error)
            ends.append(float(solve(jnp.asarray(np.concatenate([past, rest]))[None])[0, frame]))
        alone = frame_denoising(law, frame, steps)(jnp.asarray(wanted[None]), jnp.asarray(noise[frame : frame + 1]))
        return Collision(frame, np.array(ends), futures, worst, float(alone[0]))
