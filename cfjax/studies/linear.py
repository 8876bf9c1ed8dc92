"""Linear-Gaussian videos: the optimal student of each teacher in closed form, without training or sampling.

Everything is affine here, so the optimum of each objective over all functions is a matrix: ODE regression's is a
least-squares coefficient, consistency distillation's a recursion of them over the levels. A student is then a row
[on x_s^i | on x^{<i}] per frame, and its few-step self-rollout is again a Gaussian whose covariance follows by
substitution. float64 numpy; mean zero throughout. Proofs: docs/theory.md.
"""

from collections.abc import Sequence

import numpy as np

from cfjax.studies.laws import LinearGaussian

Rows = list[np.ndarray]  # per frame i: [i + 1], coefficients on (x^{<i}, x_s^i)


def root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def noised(covariance: np.ndarray, sigma: float) -> np.ndarray:
    """S_s = (1-s)^2 S + s^2 I."""
    return (1.0 - sigma) ** 2 * covariance + sigma**2 * np.eye(len(covariance))


def _regress(target: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares coefficients of `target` on the rows of `given`, both linear maps of white noise; the residual."""
    coefficients = target @ given.T @ np.linalg.pinv(given @ given.T, rcond=1e-12)
    return coefficients, float(np.sum((target - coefficients @ given) ** 2))


def _coupled(law: LinearGaussian, i: int, stop: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows (x^{<i}, x_s^i) and x_0^i, both as linear maps of white (past, noise of the window [i, stop)).

    The window's ODE is solved given the clean past: x_s = mean + S_s^{1/2} z, x_0 = mean + S^{1/2} z.
    """
    covariance = law.mixture().covariance_FF[:stop, :stop]
    past = root(covariance[:i, :i])
    gain = covariance[i:, :i] @ np.linalg.inv(covariance[:i, :i])
    left = covariance[i:, i:] - gain @ covariance[:i, i:]
    zeros = np.zeros((i, stop - i))
    mean = gain[0] @ past
    seen = np.concatenate([(1.0 - sigma) * mean, root(noised(left, sigma))[0]])
    end = np.concatenate([mean, root(left)[0]])
    return np.concatenate([np.concatenate([past, zeros], axis=1), seen[None]]), end


def ambiguity(law: LinearGaussian, sigma: float) -> np.ndarray:
    """V_i(s) = Var[x_0^i | x_s^i, x_0^{<i}] under the bidirectional teacher, [F]: a Schur complement."""
    half, half_s = root(law.mixture().covariance_FF), root(noised(law.mixture().covariance_FF, sigma))
    return np.array([_regress(half[i], np.vstack([half[:i], half_s[i : i + 1]]))[1] for i in range(law.frames)])


def innovation(law: LinearGaussian) -> np.ndarray:
    """Var[x_0^i | x_0^{<i}], [F]: the innovation variance of each frame."""
    half = root(law.mixture().covariance_FF)
    return np.array([_regress(half[i], half[:i])[1] for i in range(law.frames)])


def bidirectional_rows(law: LinearGaussian, sigma: float) -> Rows:
    """ODE regression on the bidirectional teacher's pairs; the past is the trajectory's own end."""
    half, half_s = root(law.mixture().covariance_FF), root(noised(law.mixture().covariance_FF, sigma))
    return [_regress(half[i], np.vstack([half[:i], half_s[i : i + 1]]))[0] for i in range(law.frames)]


def ahead_rows(law: LinearGaussian, sigma: float, ahead: int) -> Rows:
    """ODE regression on a teacher that is given the clean past and sees `ahead` noisy future frames (0: AR)."""
    rows = []
    for i in range(law.frames):
        given, end = _coupled(law, i, min(i + ahead + 1, law.frames), sigma)
        rows.append(_regress(end, given)[0])
    return rows


def _velocity_rows(law: LinearGaussian, i: int, stop: int, sigma: float, clean_past: bool) -> tuple[np.ndarray, ...]:
    """(given, x_s^i, v^i) as linear maps of white (x_0 of all frames, eps): the past is clean, the noise is data's.

    With `clean_past` v is the teacher's given x_0^{<i} and noisy frames [i, stop); else given all noisy frames.
    """
    frames = law.frames
    half = root(law.mixture().covariance_FF)
    clean = np.concatenate([half, np.zeros((frames, frames))], axis=1)
    noisy = (1.0 - sigma) * clean + sigma * np.concatenate([np.zeros((frames, frames)), np.eye(frames)], axis=1)
    seen = np.concatenate([clean[:i], noisy[i:stop]]) if clean_past else noisy
    flow = np.concatenate([np.zeros(frames), np.eye(frames)[i]]) - clean[i]
    return np.concatenate([clean[:i], noisy[i : i + 1]]), noisy[i], _regress(flow, seen)[0] @ seen


def consistency_rows(law: LinearGaussian, grid: Sequence[float], teacher: str) -> list[Rows]:
    """Consistency distillation, trained to its optimum at every level of the grid (ends at 0, last interval included).

    f_n = E[f_{n+1}(x_{s'}, x^{<i}) | x_s^i, x^{<i}] with the Euler step x_{s'} = x_s - (s - s') v.

    Args:
      teacher: "causal", "clean_past" (all noisy future frames, clean past) or "joint" (the whole noisy video).
    """
    after: Rows = [np.append(np.zeros(i), 1.0) for i in range(law.frames)]  # at 0 a student returns what it is given
    levels: list[Rows] = []
    for sigma, following in zip(reversed(grid[:-1]), reversed(grid[1:]), strict=True):
        rows = []
        for i in range(law.frames):
            stop = i + 1 if teacher == "causal" else law.frames
            given, noisy, flow = _velocity_rows(law, i, stop, sigma, teacher != "joint")
            moved = noisy - (sigma - following) * flow
            target = after[i][:-1] @ given[:-1] + after[i][-1] * moved
            rows.append(_regress(target, given)[0])
        levels.append(rows)
        after = rows
    return levels[::-1]


def rollout_covariance(students: Sequence[Rows], sigmas: Sequence[float]) -> np.ndarray:
    """Covariance of the few-step self-rollout: predict x_0, re-noise with fresh noise, frame after frame."""
    frames, steps = len(students[0]), len(sigmas)
    video = np.zeros((frames, frames * steps))
    for i in range(frames):
        x = np.zeros(frames * steps)
        for j, (rows, sigma) in enumerate(zip(students, sigmas, strict=True)):
            fresh = np.zeros(frames * steps)
            fresh[i * steps + j] = 1.0
            x = (1.0 - sigma) * x + sigma * fresh
            x = rows[i][:-1] @ video[:i] + rows[i][-1] * x
        video[i] = x
    return video @ video.T


def wasserstein(a_FF: np.ndarray, b_FF: np.ndarray) -> float:
    """W2 of two Gaussians of mean 0."""
    half = root(a_FF)
    return float(np.sqrt(max(np.trace(a_FF) + np.trace(b_FF) - 2.0 * np.trace(root(half @ b_FF @ half)), 0.0)))


def spread(a_FF: np.ndarray, law: LinearGaussian) -> float:
    """Ratio of the traces of the covariances."""
    return float(np.trace(a_FF) / np.trace(law.mixture().covariance_FF))


def rollout_w2(law: LinearGaussian, students: Sequence[Rows], sigmas: Sequence[float]) -> float:
    """W2 of a few-step self-rollout to the law."""
    return wasserstein(rollout_covariance(students, sigmas), law.mixture().covariance_FF)
