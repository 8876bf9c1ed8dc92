"""Rollouts by windows of blocks: the video that inference makes, and the gradient of a plain loop."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.memory.rolling import Place
from cfjax.models.wan import embed_text
from cfjax.nn.visibility import Blocks
from cfjax.objectives.dmd import DMDConfig
from cfjax.rollout.blocks import commit_block, empty_cache
from cfjax.rollout.rolling import generate_rolling, rolling_layout, window_flow
from cfjax.rollout.rolling_training import student_rollout, video_by_windows
from cfjax.rollout.self_forcing import SelfForcing, draw_rollout, video_by_blocks
from tests.tiny import BATCH, CONFIG, SIDE, normal, relative, text, text_kv, tiny

SIGMAS = (1.0, 0.9, 0.6)
CONFIGURED, BLOCKS = SelfForcing(SIGMAS, rolling=1.0), Blocks(1, window=5, sink=1)
FRAMES, STEPS = 7, len(SIGMAS)
SHAPE = (BATCH, FRAMES, SIDE, SIDE, CONFIG.in_dim)


@cache
def draws() -> dict:
    return jax.jit(lambda key: draw_rollout(key, SHAPE, CONFIGURED, BLOCKS))(jax.random.key(3))


def drawn(residue: int) -> dict:
    return {**draws(), "residue": jnp.int32(residue)}


@partial(jax.jit, static_argnames="gradient")
def windows(model, drawn, count, *, gradient):
    kv = embed_text(model, text())
    return video_by_windows(model, kv, drawn, CONFIGURED, BLOCKS, gradient=gradient, count=count)[0]


def test_the_oldest_blocks_are_those_of_inference():
    """Whatever is drawn, a block that leaves its window is the one that is generated; and each is once in a video."""
    layout = rolling_layout(BLOCKS, STEPS)
    whole = jax.jit(lambda *x: generate_rolling(tiny(), *x, np.array(SIGMAS), text_kv(), layout))(
        draws()["noise_BFHWC"], draws()["renoise_BFJHWC"]
    )
    worst = 0.0
    for residue in range(STEPS):
        video = windows(tiny(), drawn(residue), jnp.int32(FRAMES), gradient=False)
        done = [block for block in range(FRAMES) if (block + STEPS - 1) % STEPS == residue]
        worst = max(worst, relative(video[:, np.array(done)], whole[:, np.array(done)]))
        others = np.array([block for block in range(FRAMES) if block not in done])
        assert relative(video[:, others], whole[:, others]) > 0.01
        assert float(jnp.min(jnp.std(video, axis=(0, 2, 3, 4)))) > 0.1
    print(f"blocks that are done: {worst:.1e}")
    assert worst < 1e-5


def plain_loop(model, residue: int, count: int) -> jax.Array:
    """Window after window of a ring, those that were drawn with gradient; the windows exist whole or not at all."""
    kv, frozen = embed_text(model, text()), stop_gradient(model)
    frozen_kv, layout = stop_gradient(kv), rolling_layout(BLOCKS, STEPS)
    noise, fresh = draws()["noise_BFHWC"], draws()["renoise_BFJHWC"]
    cache, out, noisy = empty_cache(CONFIG, SHAPE, layout), {}, {}
    for number in range(count + STEPS - 1):
        at = number - STEPS + 1
        noisy[number] = noise[:, number : number + 1]
        frames = [frame for frame in range(max(at, 0), min(number + 1, count))]
        level = np.array([SIGMAS[number - frame] for frame in frames], np.float32)
        x = stop_gradient(jnp.concatenate([noisy[frame] for frame in frames], axis=1))
        sigma_BF = jnp.broadcast_to(level, x.shape[:2])
        place = Place(frames[0], 0, count)
        with_gradient = number % STEPS == residue
        weights, rows = (model, kv) if with_gradient else (frozen, frozen_kv)
        x0 = x0_from_flow(window_flow(weights, x, sigma_BF, rows, cache, place, layout), x, sigma_BF)
        for i, frame in enumerate(frames):
            made, own = number - frame, x0[:, i : i + 1]
            if with_gradient:
                out[frame] = own
            if made < STEPS - 1:
                noisy[frame] = add_noise(stop_gradient(own), fresh[:, frame : frame + 1, made], SIGMAS[made + 1])
        if at >= 0:
            done = stop_gradient(x0[:, :1])
            cache = commit_block(frozen, done, frozen_kv, cache, jnp.int32(at), layout)
    return jnp.concatenate([out[frame] for frame in range(count)], axis=1)


def test_the_gradient_is_the_plain_loops():
    """Also of a video that ends earlier than what is drawn, whose last frames are zeros."""
    residue, count = 1, 3
    weight = normal(9, SHAPE)

    @partial(jax.grad, has_aux=True)
    def gradient(model, by) -> tuple[jax.Array, jax.Array]:
        video = by(model)
        return jnp.sum(video * weight[:, : video.shape[1]]), video

    ours = lambda model: windows(model, drawn(residue), jnp.int32(count), gradient=True)
    plain = jax.jit(lambda model: plain_loop(model, residue, count))
    (got, video), (expected, wanted) = gradient(tiny(), ours), gradient(tiny(), plain)
    assert relative(video[:, :count], wanted) < 1e-5 and not np.any(video[:, count:])
    got, expected = named_leaves(got), named_leaves(expected)
    norm = max(float(jnp.linalg.norm(x)) for x in expected.values())
    errors = [
        float(jnp.linalg.norm(got[name] - x)) / max(float(jnp.linalg.norm(x)), 1e-3 * norm)
        for name, x in expected.items()
    ]
    worst = np.max(errors)  # of NaN, too
    print(f"windows {residue}, {count} blocks: worst gradient {worst:.1e}")
    assert worst < 1e-4 and norm > 1.0


def test_half_of_the_rollouts_are_by_windows():
    config = SelfForcing(SIGMAS, rolling=0.5)
    found = jax.jit(jax.vmap(lambda key: draw_rollout(key, (1, 4, 1, 1, 1), config, Blocks(1))))(
        jax.random.split(jax.random.key(0), 3000)
    )
    assert np.mean(found["rolls"]) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(np.bincount(found["residue"]) / 3000, np.full(3, 1 / 3), atol=0.03)
    assert abs(np.corrcoef(found["rolls"], found["residue"])[0, 1]) < 0.06
    assert not {"rolls", "residue"} & draw_rollout(jax.random.key(0), SHAPE, SelfForcing(SIGMAS), BLOCKS).keys()


@pytest.mark.slow
def test_what_was_drawn_is_rolled_out():
    config, short = SelfForcing(SIGMAS, rolling=0.5), (BATCH, 4, *SHAPE[2:])
    known = draw_rollout(jax.random.key(3), short, config, BLOCKS)
    roll = jax.jit(lambda drawn: student_rollout(tiny(), text_kv(), drawn, config, BLOCKS, gradient=False)[0])
    one = jax.jit(lambda drawn: video_by_windows(tiny(), text_kv(), drawn, config, BLOCKS, gradient=False)[0])
    other = jax.jit(lambda drawn: video_by_blocks(tiny(), text_kv(), drawn, config, BLOCKS, gradient=False)[0])
    for rolls, wanted in ((True, one), (False, other)):
        assert relative(roll({**known, "rolls": jnp.bool_(rolls)}), wanted(known)) < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfForcing(SIGMAS, rolling=1.5), "objective.rolling=1.5: a share"),
        (lambda: SelfForcing(SIGMAS, first_sigmas=(1.0,), rolling=0.5), "objective.first_steps: with"),
        (
            lambda: DMDConfig(SelfForcing(SIGMAS, rolling=0.5), student_input="noised_data"),
            "objective.rolling=0.5 needs objective.student_input=self_rollout",
        ),
    ],
)
def test_what_does_not_go_together_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()
