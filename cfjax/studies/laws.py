"""Video laws whose scores are known: mixtures of Gaussians with one covariance, over scalar videos of F frames.

The velocity of the probability-flow ODE, v(x, s) = E[eps - x0 | x_s = x], is closed form for such a mixture, and so is
that of any run of frames given *clean* earlier frames, which is a mixture again. That covers every teacher: all frames
together (bidirectional), one frame given its past (autoregressive), and anything in between.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mixture(NamedTuple):
    """Components of a mixture, host constants in float64: means_MF, log_weights_M, and the covariance they share."""

    means_MF: np.ndarray
    log_weights_M: np.ndarray
    covariance_FF: np.ndarray


@dataclass(frozen=True)
class LinearGaussian:
    """A stationary AR(1) video: x^1 ~ N(0, 1), x^i = a x^{i-1} + sqrt(1 - a^2) w."""

    frames: int = 5
    a: float = 0.9

    def mixture(self) -> Mixture:
        """One component."""
        index = np.arange(self.frames)
        covariance = self.a ** np.abs(index[:, None] - index[None]).astype(float)
        return Mixture(np.zeros((1, self.frames)), np.zeros(1), covariance)


@dataclass(frozen=True)
class Walk:
    """A branching walk: x^1 ~ N(0, first^2), x^i = x^{i-1} +- step + noise w, each sign a fair coin.

    The sign is the video's motion; samples of this law never have a still or half-way step.
    """

    frames: int = 5
    first: float = 0.3
    step: float = 0.5
    noise: float = 0.12

    def mixture(self) -> Mixture:
        """One component per path, 2^(F - 1)."""
        count = 2 ** (self.frames - 1)
        signs = 1.0 - 2.0 * ((np.arange(count)[:, None] >> np.arange(self.frames - 1)[None]) & 1)
        means = self.step * np.concatenate([np.zeros((count, 1)), np.cumsum(signs, axis=1)], axis=1)
        index = np.arange(self.frames)
        covariance = self.first**2 + self.noise**2 * np.minimum(index[:, None], index[None])
        return Mixture(means, np.full(count, -np.log(count)), covariance)


@dataclass(frozen=True)
class Turns:
    """The sideways path of an object that turns where nothing announces it: x^1 ~ N(0, first^2),
    x^i = x^{i-1} + c_i step + noise w, where c is 0 until a turn, and then always the same sign.

    A video turns with chance `branching`, to either side, after `straight` or more steps and with two or more to come.
    """

    frames: int = 6
    branching: float = 0.5
    straight: int = 1
    first: float = 0.3
    step: float = 0.5
    noise: float = 0.12

    def mixture(self) -> Mixture:
        """One component that goes straight on, and two for every moment of a turn."""
        index, moments = np.arange(self.frames), range(self.straight, self.frames - 2)
        aside = [self.step * np.maximum(index - moment, 0) for moment in moments]
        means = np.stack([np.zeros(self.frames), *aside, *(-path for path in aside)])
        chances = np.array([1.0 - self.branching, *[self.branching / (2 * len(aside))] * (2 * len(aside))])
        covariance = self.first**2 + self.noise**2 * np.minimum(index[:, None], index[None])
        possible = chances > 0
        return Mixture(means[possible], np.log(chances[possible]), covariance)


Law = LinearGaussian | Walk | Turns


class Conditional(NamedTuple):
    """The law of frames [i, i + F) given the I = i frames before: a mixture whose means depend linearly on that past.

    past_means_MI, gain_FI, precision_II: determine the components' weights and means given the past.
    values_F, vectors_FF: eigenvalues and eigenvectors of the conditional covariance.
    """

    means_MF: np.ndarray
    log_weights_M: np.ndarray
    past_means_MI: np.ndarray
    gain_FI: np.ndarray
    precision_II: np.ndarray
    values_F: np.ndarray
    vectors_FF: np.ndarray


@lru_cache(maxsize=256)
def conditional(law: Law, start: int, stop: int) -> Conditional:
    """Frames [start, stop) given the clean frames before `start`; components with equal means there are merged."""
    means, log_weights, covariance = law.mixture()
    seen, inverse = np.unique(means[:, :stop].round(12), axis=0, return_inverse=True)
    weights = np.bincount(inverse.ravel(), np.exp(log_weights), minlength=len(seen))
    past, window = slice(0, start), slice(start, stop)
    precision = np.linalg.inv(covariance[past, past])
    gain = covariance[window, past] @ precision
    left = covariance[window, window] - gain @ covariance[past, window]
    values, vectors = np.linalg.eigh(left)
    return Conditional(seen[:, window], np.log(weights), seen[:, past], gain, precision, values, vectors)


def velocity(law: Law, start: int, x_BF: jax.Array, sigma_B: jax.Array, past_BI: jax.Array) -> jax.Array:
    """E[eps - x0 | x_s, clean past] of frames [start, start + F), [B, F], in the dtype of `x`.

    Within a component, with d = x - (1-s) mu, S the covariance and S_s = (1-s)^2 S + s^2 I, it is
    (s I - (1-s) S) S_s^{-1} d - mu; components are weighed by their posterior given x_s and the past.
    """
    part = conditional(law, start, start + x_BF.shape[1])
    cast = lambda a: jnp.asarray(a, x_BF.dtype)
    off_BMI = past_BI[:, None] - cast(part.past_means_MI)[None]
    log_weights = cast(part.log_weights_M)[None]
    log_weights -= 0.5 * jnp.einsum("bkp,pq,bkq->bk", off_BMI, cast(part.precision_II), off_BMI)
    vectors, values = cast(part.vectors_FF), cast(part.values_F)[None]
    means = cast(part.means_MF @ part.vectors_FF)[None]
    means += jnp.einsum("bkp,cp,cd->bkd", off_BMI, cast(part.gain_FI), vectors)
    s_B1 = sigma_B.astype(x_BF.dtype)[:, None]
    keep = 1.0 - s_B1
    inverse = 1.0 / (keep**2 * values + s_B1**2)  # [B, F], of S_s in its eigenbasis
    y = x_BF @ vectors
    distance = y[:, None] - keep[:, :, None] * means
    posterior = jax.nn.softmax(log_weights - 0.5 * jnp.sum(inverse[:, None] * distance**2, axis=-1), axis=-1)
    mean = jnp.einsum("bk,bkc->bc", posterior, means)
    flow = (s_B1 - keep * values) * inverse * (y - keep * mean) - mean
    return flow @ vectors.T


def joint_velocity(law: Law, x_BF: jax.Array, sigma_B: jax.Array) -> jax.Array:
    """All frames together, at one level: the bidirectional teacher."""
    return velocity(law, 0, x_BF, sigma_B, x_BF[:, :0])


def sample(law: Law, rng: np.random.Generator, count: int, past_I: np.ndarray | None = None) -> np.ndarray:
    """Videos [count, F] in float64; with a past, whole videos that begin with it."""
    past = np.zeros(0) if past_I is None else np.asarray(past_I, float)
    part = conditional(law, len(past), law.frames)
    off = past[None] - part.past_means_MI
    logits = part.log_weights_M - 0.5 * np.einsum("kp,pq,kq->k", off, part.precision_II, off)
    weights = np.exp(logits - logits.max())
    chosen = rng.choice(len(weights), count, p=weights / weights.sum())
    noise = rng.standard_normal((count, law.frames - len(past)))
    fresh = (part.means_MF + off @ part.gain_FI.T)[chosen] + (noise * np.sqrt(part.values_F)) @ part.vectors_FF.T
    return np.concatenate([np.broadcast_to(past, (count, len(past))), fresh], axis=1)
