"""Parallel replay: the gradient of the sequential loop, in one pass, with one compile whatever the exit step."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.models.cache import KVCache, init_cache
from cfjax.models.wan import FrameKV, Wan, embed_text, forward_block, replay
from cfjax.nn.visibility import Blocks
from cfjax.planning.flops import count_flops
from cfjax.rollout import blocks as blocks_module
from cfjax.rollout import self_forcing
from cfjax.rollout.blocks import commit_block, denoise_block
from cfjax.rollout.self_forcing import SelfForcing, draw_rollout, replay_exit, rollout
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, SIDE, normal, relative, text, text_kv, tiny

BLOCKS = Blocks(2)
TOKENS = CONFIG.tokens_per_frame(SIDE, SIDE)
SIGMAS = (1.0, 0.9375, 0.8333333, 0.625)
# The loop is Python's, not compiled as a whole: a pass of the network, and its gradient, is one program for all blocks.
forward = jax.jit(forward_block, static_argnames="blocks")
commit = jax.jit(commit_block, static_argnames="blocks")
embed = jax.jit(embed_text)


def sequential(model, text_BSE, draws, config, exits, blocks):
    """The loop of `SelfForcingTrainingPipeline.inference_with_trajectory` in Python, differentiated directly."""
    kv_text = embed(model, text_BSE)
    frozen, frozen_kv = jax.lax.stop_gradient((model, kv_text))
    clean = init_cache(CONFIG, BATCH, FRAMES, TOKENS, blocks)
    seen = clean  # what later blocks attend to: values of `clean`, gradient by kv_gradient
    outputs = []
    for b, (start, stop) in enumerate(blocks.spans(FRAMES)):
        sigmas = config.first_sigmas if b == 0 and config.first_sigmas else config.sigmas
        x = draws["noise_BFHWC"][:, start:stop]
        at = jnp.int32(start)
        for j in range(exits[b]):
            level = jnp.full((BATCH, stop - start), sigmas[j])
            v, _ = forward(frozen, x, level, frozen_kv, clean, at, blocks=blocks)
            eps = draws["renoise_BFJHWC"][:, start:stop, j]
            x = add_noise(x0_from_flow(v, x, level), eps, sigmas[j + 1])
        x = jax.lax.stop_gradient(x)
        level = jnp.full((BATCH, stop - start), sigmas[exits[b]])
        v, own = forward(model, x, level, kv_text, seen, at, blocks=blocks)
        x0 = x0_from_flow(v, x, level)
        outputs.append(x0)
        committed = add_noise(jax.lax.stop_gradient(x0), draws["context_BFHWC"][:, start:stop], config.context_noise)
        clean = jax.lax.stop_gradient(commit(frozen, committed, frozen_kv, clean, at, blocks=blocks))
        cut = slice(start, stop)

        def through(cached, exit_kv, own_part, cut=cut):
            if config.kv_gradient == "detached":
                return own_part
            straight = own_part[:, :, cut] + exit_kv - jax.lax.stop_gradient(exit_kv)
            return cached.at[:, :, cut].set(straight)

        seen = KVCache(
            through(seen.k_LBFTNK, own.k_LBFTNK, clean.k_LBFTNK),
            through(seen.v_LBFTNK, own.v_LBFTNK, clean.v_LBFTNK),
            clean.frame_F,
        )
    return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
    ("kv_gradient", "first", "saves"),
    [
        pytest.param("detached", (), (False,), id="one_list-detached"),
        pytest.param("straight_through", SIGMAS, (False, True), id="first_list-straight_through"),
        pytest.param("straight_through", (), (False,), id="one_list-straight_through", marks=pytest.mark.slow),
        pytest.param("detached", SIGMAS, (True,), id="first_list-detached", marks=pytest.mark.slow),
    ],
)
def test_replay_is_the_sequential_gradient(kv_gradient, first, saves):
    config = SelfForcing(SIGMAS[:3], first, context_noise=0.005, kv_gradient=kv_gradient)
    exits = [3, 1, 1] if first else [2, 2, 2]
    draws = draw_rollout(jax.random.key(3), SHAPE, config, BLOCKS)
    draws["exit_G"] = jnp.array(exits, jnp.int32)
    weight = normal(9)

    def by_loop(model):
        x0 = sequential(model, text(), draws, config, exits, BLOCKS)
        return jnp.sum(x0 * weight), x0

    def by_replay(model, save):
        kv = embed_text(model, text())
        rolled = rollout(jax.lax.stop_gradient(model), jax.lax.stop_gradient(kv), draws, config, BLOCKS, save=save)
        x0 = replay_exit(model, kv, rolled, config, BLOCKS)
        return jnp.sum(x0 * weight), (x0, rolled.x0_BFHWC)

    grad_loop, x0_loop = jax.grad(by_loop, has_aux=True)(tiny())
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(grad_loop))
    for save in saves:
        found = jax.jit(partial(jax.grad(by_replay, has_aux=True), save=save))(tiny())
        grad_replay, (x0_replay, x0_rolled) = found
        assert relative(x0_rolled, x0_loop) < 1e-5
        assert relative(x0_replay, x0_loop) < 1e-5
        worst = max(
            float(jnp.max(jnp.abs(a - b)))
            for a, b in zip(jax.tree.leaves(grad_replay), jax.tree.leaves(grad_loop), strict=True)
        )
        print(f"{kv_gradient}, {save=}: gradient error {worst / scale:.2e}")
        assert worst < 1e-5 * scale


def test_saved_activations_spare_the_replays_forward_pass():
    """Of a network with full rematerialisation, whose replay has two; the blocks' part of it, counted in products."""
    model = jax.eval_shape(lambda key: Wan(replace(CONFIG, remat="full"), key), jax.random.key(0))
    config, x = SelfForcing(SIGMAS), jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    draws = draw_rollout(jax.random.key(3), SHAPE, config, BLOCKS)

    def value(model, kv, save):
        rolled = rollout(*jax.lax.stop_gradient((model, kv)), draws, config, BLOCKS, save=save)
        return jnp.sum(replay_exit(model, kv, rolled, config, BLOCKS))

    def forward(model, kv, x):
        sigma, context = jnp.ones(SHAPE[:2]), rollout(model, kv, draws, config, BLOCKS).context
        return context, replay(model, x, sigma, kv, context, BLOCKS)

    kv = jax.eval_shape(embed_text, model, text())
    plain, saved = (count_flops(partial(jax.grad(value), save=save), model, kv) for save in (False, True))
    loop = count_flops(lambda model, kv: rollout(model, kv, draws, config, BLOCKS).context, model, kv)
    one_pass = count_flops(forward, model, kv, x) - loop
    assert saved < plain - 0.8 * one_pass  # a sixth of so small a network is patches and the time embedding


@pytest.mark.slow
def test_the_two_kv_gradients_differ():
    """Otherwise the test above could not tell them apart."""
    grads = {}
    for kv_gradient in ("detached", "straight_through"):
        config = SelfForcing(SIGMAS[:3], kv_gradient=kv_gradient)
        draws = draw_rollout(jax.random.key(3), SHAPE, config, BLOCKS)

        def value(model, config=config, draws=draws):
            kv = embed_text(model, text())
            rolled = rollout(jax.lax.stop_gradient(model), jax.lax.stop_gradient(kv), draws, config, BLOCKS)
            return jnp.sum(replay_exit(model, kv, rolled, config, BLOCKS) * normal(9))

        grads[kv_gradient] = jax.jit(jax.grad(value))(tiny()).blocks.self_attn.v.kernel[...]
    assert relative(grads["straight_through"], grads["detached"]) > 0.05


def test_one_compile_for_every_exit_step():
    config = SelfForcing(SIGMAS)
    run = jax.jit(lambda m, kv, d: rollout(m, kv, d, config, BLOCKS).x0_BFHWC)
    kv = embed_text(tiny(), text())
    outs = []
    for exit_step in range(4):
        draws = draw_rollout(jax.random.key(3), SHAPE, config, BLOCKS)
        draws["exit_G"] = jnp.full((3,), exit_step, jnp.int32)
        outs.append(run(tiny(), kv, draws))
    assert run._cache_size() == 1
    assert all(relative(a, b) > 1e-3 for a, b in itertools.pairwise(outs))


def test_exit_draws():
    """One exit for all blocks, uniform, or one for each; with a first-chunk list the first block draws its own."""

    def exits(config: SelfForcing, count: int) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), count)
        return jax.vmap(lambda key: draw_rollout(key, (1, 6, 1, 1, 1), config, BLOCKS)["exit_G"])(keys)

    draws = exits(SelfForcing(SIGMAS), 400)
    assert bool(jnp.all(draws == draws[:, :1]))
    assert int(jnp.bincount(draws[:, 0], length=4).min()) > 60
    draws = exits(SelfForcing(SIGMAS[:1], SIGMAS), 100)
    assert set(draws[:, 0].tolist()) == {0, 1, 2, 3} and bool(jnp.all(draws[:, 1:] == 0))
    draws = exits(SelfForcing(SIGMAS, same_exit=False), 400)
    pairs = jnp.stack([jnp.bincount(4 * draws[:, a] + draws[:, b], length=16) for a, b in ((0, 1), (0, 2), (1, 2))])
    assert int(pairs.min()) > 8  # any two blocks: 400 / 16 of each combination
    draws = exits(SelfForcing(SIGMAS[:2], SIGMAS, same_exit=False), 100)
    assert set(draws[:, 0].tolist()) == {0, 1, 2, 3} and set(map(tuple, draws[:, 1:].tolist())) == {
        *itertools.product((0, 1), repeat=2)
    }


LAYOUTS = {
    "blocks": (BLOCKS, None, [0, 2]),
    "first_frame": (Blocks(1, independent_first_frame=True), None, [0, 1, 2, 3, 4]),
    "window": (Blocks(2, window=4), None, [0, 2]),
    "two_of_three": (BLOCKS, 2, [0]),
    "more_than_drawn": (BLOCKS, 9, [0, 2]),
    "first_frame_alone": (Blocks(1, independent_first_frame=True), 1, []),
    "one_block": (Blocks(FRAMES), None, []),
}


@pytest.mark.parametrize(("blocks", "count", "committed"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_network_is_called_for_each_step_and_each_commit_that_is_read(monkeypatch, blocks, count, committed):
    """No block sees the last one, and none is replayed against its own context: it is not committed."""
    calls = {"denoise_block": [], "commit_block": []}

    def counted(name: str, given: int):
        def call(*args, **_):
            jax.debug.callback(lambda start: calls[name].append(int(start)), args[-2])
            return args[given]

        return call

    monkeypatch.setattr(self_forcing, "denoise_block", counted("denoise_block", 1))
    monkeypatch.setattr(blocks_module, "commit_block", counted("commit_block", 3))
    config, number = SelfForcing(SIGMAS), len(blocks.spans(FRAMES))
    draws = {**draw_rollout(jax.random.key(3), SHAPE, config, blocks), "exit_G": jnp.full((number,), 1, jnp.int32)}
    made = {} if count is None else {"count": jnp.int32(count)}
    jax.block_until_ready(rollout(tiny(), text_kv(), draws, config, blocks, **made))
    jax.effects_barrier()
    assert sorted(calls["commit_block"]) == committed
    assert len(calls["denoise_block"]) == 2 * (len(committed) + 1)


def test_a_video_of_one_block_costs_its_steps_alone():
    config, blocks = SelfForcing(SIGMAS), Blocks(FRAMES)
    draws = draw_rollout(jax.random.key(3), SHAPE, config, blocks)
    cache = init_cache(CONFIG, BATCH, FRAMES, TOKENS, blocks)
    step = lambda x: denoise_block(tiny(), x, jnp.float32(1.0), text_kv(), cache, jnp.int32(0), blocks)
    call = count_flops(step, normal(0))
    roll = lambda draws: rollout(tiny(), text_kv(), draws, config, blocks)
    assert [count_flops(roll, draws, trip_counts={self_forcing.BEFORE_EXIT: steps}) for steps in (0, 3)] == [
        call,
        4 * call,
    ]


def test_generated_context_is_what_inference_would_cache():
    config = SelfForcing(SIGMAS)
    draws = draw_rollout(jax.random.key(4), SHAPE, config, BLOCKS)
    kv = embed_text(tiny(), text())
    rolled = rollout(tiny(), kv, draws, config, BLOCKS)
    assert isinstance(rolled.context, FrameKV)
    assert rolled.context.k_LBFTNK.shape[2:4] == (FRAMES, TOKENS)
