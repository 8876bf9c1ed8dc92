"""What a bidirectional teacher's pairs leave open where an object may turn: exact, of a law with finitely many futures.

Given a clean past, the clips of the turning world are K videos with known chances, so the law of their latents is a
sum of K points, E[x_0 | x_s] is a softmax over them, and the PF-ODE can be solved in their span (K - 1 dimensions)
however many pixels there are. A block's own noise decides where the AR teacher takes it. Where the bidirectional
teacher takes it also depends on the noise of the frames after it: drawing that again with the block's own noise kept
gives the law of the block's end points, of which a student can learn the mean at best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHIFT, STEPS = 5.0, 64  # of the solver's levels: from noise to 0.02, where the nearest point is where it ends
LOWEST = 0.02
LEVELS = (1.0, 0.9375, 5 / 6, 0.625)  # of the student's four steps
NEIGHBOURS = 24  # whose ends are averaged for a student's prediction
PAIRS, ROLLOUTS = 2048, 256  # from which it predicts, and how many blocks it makes
MIXED = 0.75  # a block is a mixture if no content has so much of it


@dataclass(frozen=True)
class Futures:
    """The K futures of one past, of F frames after it.

    Attributes:
      latents_KFD: of each frame.  chance_K: of each future.
      products_FKK: inner products of the decoded frames' pixel gradients: the gradient energy of a mean of frames with
        weights w is w' G w.
      centres_KF2, before_2: of the object in these frames and in the one before, in units of the object's step.
    """

    latents_KFD: np.ndarray
    chance_K: np.ndarray
    products_FKK: np.ndarray
    centres_KF2: np.ndarray
    before_2: np.ndarray


@dataclass(frozen=True)
class Block:
    """Where a block is made of means of its possible contents.

    left: E Var[x_0 | what the mean is given] over Var[x_0 | past]; 0 where every block is one of the contents.
    sharpness: gradient energy over that of the contents.  motion: step over the object's.  mixed: share of blocks that
    no content has three quarters of.  turns: share of blocks that are turned by more than half, over the chance of it.
    """

    left: float
    sharpness: float
    motion: float
    mixed: float
    turns: float


def with_chance(futures: Futures, turn: float, *, was: float = 0.5) -> np.ndarray:
    """The futures' chances in a world whose objects turn with chance `turn`, not `was`; the impossible stay so."""
    odds = np.append((1.0 - turn) / (1.0 - was), np.full(len(futures.chance_K) - 1, turn / was))
    return futures.chance_K * odds / (futures.chance_K @ odds)


def ends(
    points_KR: np.ndarray, chance_K: np.ndarray, noise_NR: np.ndarray, keep: Sequence[float] = ()
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Where the PF-ODE of these points leads from noise: indices [N], and its states at the levels `keep`.

    From s to s' it is exact for a fixed E[x_0 | x_s]: x' = (1 - s') m + s' (x - (1 - s) m) / s.
    """
    even = np.linspace(1.0, 0.0, STEPS, endpoint=False)
    levels = SHIFT * even / (1.0 + (SHIFT - 1.0) * even)
    levels = np.unique([*levels[levels > LOWEST], LOWEST, *keep])[::-1]
    with np.errstate(divide="ignore"):
        prior_K = np.log(chance_K)
    x, square_K = noise_NR, np.square(points_KR).sum(-1)
    weights, states = np.zeros((len(x), len(points_KR))), dict[float, np.ndarray]()
    for s, following in zip(levels.tolist(), [*levels[1:].tolist(), 0.0], strict=True):
        states[s] = x
        # log of exp(-|x - (1 - s) z|^2 / (2 s^2)), without what all points share
        logits = prior_K + ((1.0 - s) * (x @ points_KR.T) - 0.5 * (1.0 - s) ** 2 * square_K) / s**2
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        mean = weights @ points_KR
        x = (1.0 - following) * mean + following * (x - (1.0 - s) * mean) / s
    return weights.argmax(axis=1), [states[s] for s in keep]


def _span(flat_KD: np.ndarray) -> np.ndarray:
    """An orthonormal basis [D, R] of what some centred points span."""
    values, vectors = np.linalg.svd(flat_KD, full_matrices=False)[1:]
    return vectors[values > 1e-9 * max(values.max(), 1e-30)].T


def _centred(futures: Futures, chance_K: np.ndarray, span: slice) -> np.ndarray:
    flat = futures.latents_KFD[chance_K > 0, span].reshape((chance_K > 0).sum(), -1)
    return flat - flat.mean(axis=0)


def left_open(
    futures: Futures, chance_K: np.ndarray, first: int, count: int, *, noises: int, again: int, seed: int
) -> Block:
    """What the bidirectional teacher leaves open of the block [first, first + count) at s = 1, all frames before given.

    Args:
      first: of these frames; all futures are alike before it.
      noises: draws of the block's own noise.  again: draws of the noise of the frames behind it, for each.
    """
    rng, chance = np.random.default_rng(seed), chance_K[chance_K > 0]
    points = _centred(futures, chance_K, slice(first, None))
    basis, own = _span(points), count * futures.latents_KFD.shape[2]
    fixed = rng.standard_normal((noises, 1, own)) @ basis[:own]
    drawn = rng.standard_normal((noises, again, len(basis) - own)) @ basis[own:]
    where = ends(points @ basis, chance, (fixed + drawn).reshape(noises * again, -1))[0].reshape(noises, again)
    weights_MK = np.stack([(where == k).mean(axis=1) for k in range(len(chance))], axis=1)
    return _made_of(futures, chance_K, weights_MK, slice(first, first + count), again / (again - 1.0))


def four_steps(futures: Futures, chance_K: np.ndarray, first: int, count: int, *, behind: bool, seed: int) -> Block:
    """Blocks of the student that predicts the mean of its teacher's pairs, in four steps with fresh noise between them.

    The mean is that of the nearest pairs' ends, so it is biased towards more mixture; `behind=False` shows by how much.

    Args:
      behind: whether the teacher sees the frames behind the block: the bidirectional one; False: the causal one.
    """
    rng, chance = np.random.default_rng(seed), chance_K[chance_K > 0]
    span = slice(first, first + count)
    points, block = (
        _centred(futures, chance_K, slice(first, None) if behind else span),
        _centred(futures, chance_K, span),
    )
    basis, small = _span(points), _span(block)
    own = block.shape[1]
    own_basis = basis[:own]
    noise = rng.standard_normal((PAIRS, len(basis)))
    inside = noise @ basis
    where, states = ends(points @ basis, chance, inside, LEVELS)
    across, outside = small.T @ own_basis, (noise[:, :own] - inside @ own_basis.T) @ small
    contents = block @ small
    x, weights = rng.standard_normal((ROLLOUTS, small.shape[1])), np.zeros((ROLLOUTS, len(chance)))
    for s, following, state in zip(LEVELS, [*LEVELS[1:], 0.0], states, strict=True):
        known = state @ across.T + s * outside
        square = np.square(x).sum(-1)[:, None] - 2 * x @ known.T + np.square(known).sum(-1)[None]
        near = np.argpartition(square, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        weights = np.stack([(where[near] == k).mean(axis=1) for k in range(len(chance))], axis=1)
        x = (1.0 - following) * weights @ contents + following * rng.standard_normal(x.shape)
    return _made_of(futures, chance_K, weights, span, 1.0)


def _made_of(futures: Futures, chance_K: np.ndarray, weights_MK: np.ndarray, span: slice, bias: float) -> Block:
    """Blocks that are means of the futures' with these weights; `bias` corrects the variance of a finite sample."""
    possible, block = chance_K > 0, _centred(futures, chance_K, span)
    within = weights_MK @ np.square(block).sum(-1) - np.square(weights_MK @ block).sum(-1)
    whole = weights_MK.mean(axis=0)
    prior = whole @ np.square(block).sum(-1) - np.square(whole @ block).sum()
    products = futures.products_FKK[span][:, possible][:, :, possible]
    energy = np.einsum("mk,fkl,ml->mf", weights_MK, products, weights_MK).mean()
    crisp = (np.einsum("fkk->fk", products) @ whole).mean()
    paths = np.einsum("mk,kfc->mfc", weights_MK, futures.centres_KF2[possible, span])
    start = futures.before_2 if span.start == 0 else futures.centres_KF2[0, span.start - 1]
    steps = np.diff(paths, axis=1, prepend=np.broadcast_to(start, (len(paths), 1, 2)))
    straight = futures.latents_KFD[:1, span].reshape(1, -1) - futures.latents_KFD[possible, span].reshape(
        len(block), -1
    )
    turned = np.square(straight).sum(-1) > 1e-9  # within this block
    alike = np.square(block[:, None] - block[None]).sum(-1) < 1e-12  # futures that are one content of this block
    return Block(
        left=float(bias * within.mean() / prior) if prior > 1e-12 else 0.0,
        sharpness=float(energy / crisp),
        motion=float(np.linalg.norm(steps, axis=-1).mean()),
        mixed=float(((weights_MK @ alike).max(axis=1) < MIXED).mean()),
        turns=float((weights_MK[:, turned].sum(axis=1) > 0.5).mean() / max(chance_K[possible][turned].sum(), 1e-9)),
    )


def dose(
    every: Sequence[Futures], first: int, *, turn: float, frames: int, noises: int, again: int
) -> dict[str, float | int | dict[str, float]]:
    """Means over pasts for one chance of a turn and one block size, from the first frame that can show a turn.

    one_step: `left_open`.  four_steps, causal: of the bidirectional and of the causal teacher's student.
    """
    behind = every[0].latents_KFD.shape[1] - first - frames
    found: dict[str, list[Block]] = {"one_step": [], "four_steps": [], "causal": []}
    for seed, futures in enumerate(every):
        chance = with_chance(futures, turn)
        found["one_step"].append(left_open(futures, chance, first, frames, noises=noises, again=again, seed=seed))
        found["four_steps"].append(four_steps(futures, chance, first, frames, behind=True, seed=seed))
        found["causal"].append(four_steps(futures, chance, first, frames, behind=False, seed=seed))
    means = {
        kind: {name: float(np.mean([vars(block)[name] for block in blocks])) for name in vars(blocks[0])}
        for kind, blocks in found.items()
    }
    return {"turn": turn, "frames": frames, "behind": behind, **means}
