"""Self-rollout under memory policies: the replay's gradient is that of the plain loop, whatever is remembered."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.memory.bank import MemoryBank
from cfjax.memory.codecs import Codec
from cfjax.memory.policies import ContextRecompute, DeepSink, EmaSink, MemoryTokens, RollingSink, SlotRelative
from cfjax.memory.slots import Memory
from cfjax.models.cache import init_cache, write
from cfjax.models.wan import FrameKV, embed_text, forward_block
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.long_video import LongVideo, roll_window
from cfjax.rollout.remembered import Begin
from cfjax.rollout.self_forcing import SelfForcing, draw_rollout, replay_exit, rollout
from tests.rollout.test_long_video import Fading
from tests.tiny import BATCH, CONFIG, SHAPE, SIDE, normal, relative, text, text_kv, tiny

CONFIG_OF_ROLLOUT = SelfForcing((1.0, 0.8, 0.625), context_noise=0.005)
LONG = (BATCH, 8, *SHAPE[2:])  # four blocks of two: every policy below lets frames go before the last
COVERS = Memory(64)
POLICIES = {
    "deep_sink": DeepSink(6, 2),
    "memory_tokens": MemoryTokens(6, 1, slow_rate=0.2, fast_rate=0.5),
    "int8": EmaSink(6, 2, Codec("int8"), alpha=0.8),
    "rolling_sink": RollingSink(6),
    "memory_bank": MemoryBank(5, 1, bank=2, interval=1),
}
GRADIENTS = [pytest.param("int8"), pytest.param("memory_tokens", marks=pytest.mark.slow)]


def draws_for(shape: tuple[int, ...] = LONG, exit_step: int = 1) -> dict[str, jax.Array]:
    drawn = draw_rollout(jax.random.key(3), shape, CONFIG_OF_ROLLOUT, Blocks(2))
    return {**drawn, "exit_G": jnp.full_like(drawn["exit_G"], exit_step)}


@cache
def by_replay():
    """(gradient, (x0 of the replay, x0 of the rollout)) by model, text, draws; compiled once per policy."""

    @partial(jax.jit, static_argnames="blocks")
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(model, text_BSE, draws, weight, *, blocks):
        kv = embed_text(model, text_BSE)
        rolled = rollout(*jax.lax.stop_gradient((model, kv)), draws, CONFIG_OF_ROLLOUT, blocks)
        x0 = replay_exit(model, kv, rolled, CONFIG_OF_ROLLOUT, blocks)
        return jnp.sum(x0 * weight), (x0, rolled.x0_BFHWC)

    return gradient


passed = jax.jit(lambda *args, blocks: forward_block(*args, blocks)[0], static_argnames="blocks")
committed = jax.jit(commit_block, static_argnames="blocks")


@partial(jax.grad, argnums=(0, 1), has_aux=True)
def by_loop(model, text_BSE, draws, weight, *, blocks, exit_step):
    """The loop over blocks and steps in Python, differentiated directly; what is committed is detached."""
    kv_text, outputs = embed_text(model, text_BSE), []
    frozen, frozen_kv = jax.lax.stop_gradient((model, kv_text))
    shape = draws["noise_BFHWC"].shape
    state = init_cache(CONFIG, BATCH, shape[1], CONFIG.tokens_per_frame(SIDE, SIDE), blocks)
    for start, stop in blocks.spans(shape[1]):
        x, at = draws["noise_BFHWC"][:, start:stop], jnp.int32(start)
        for j in range(exit_step):
            level = jnp.full((BATCH, stop - start), CONFIG_OF_ROLLOUT.sigmas[j])
            x0 = x0_from_flow(passed(frozen, x, level, frozen_kv, state, at, blocks=blocks), x, level)
            x = add_noise(x0, draws["renoise_BFJHWC"][:, start:stop, j], CONFIG_OF_ROLLOUT.sigmas[j + 1])
        level = jnp.full((BATCH, stop - start), CONFIG_OF_ROLLOUT.sigmas[exit_step])
        x = jax.lax.stop_gradient(x)
        x0 = x0_from_flow(passed(model, x, level, kv_text, state, at, blocks=blocks), x, level)
        outputs.append(x0)
        clean = add_noise(jax.lax.stop_gradient(x0), draws["context_BFHWC"][:, start:stop], 0.005)
        state = jax.lax.stop_gradient(committed(frozen, clean, frozen_kv, state, at, blocks=blocks))
    x0 = jnp.concatenate(outputs, axis=1)
    return jnp.sum(x0 * weight), x0


def worst(got, expected) -> float:
    """Largest error of a gradient's leaves, relative to the largest of all their values."""
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / scale


@pytest.mark.parametrize("name", GRADIENTS)
def test_replay_is_the_loops_gradient(name):
    """Of the weights and of the text, for a policy from which frames have left; and one program for all exit steps."""
    blocks, weight = Blocks(2, memory=POLICIES[name]), normal(9, LONG)
    before = by_replay()._cache_size()
    grad, (x0, rolled) = by_replay()(tiny(), text(), draws_for(), weight, blocks=blocks)
    expected, x0_loop = by_loop(tiny(), text(), draws_for(), weight, blocks=blocks, exit_step=1)
    print(f"{name}: x0 {relative(x0, x0_loop):.1e}, gradient {worst(grad, expected):.1e}")
    assert np.array_equal(x0, rolled)
    assert relative(x0, x0_loop) < 1e-5 and worst(grad, expected) < 1e-5
    other, _ = by_replay()(tiny(), text(), draws_for(exit_step=2), weight, blocks=blocks)
    assert worst(other, grad) > 1e-3
    assert by_replay()._cache_size() == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep_sink", "rolling_sink", "memory_bank"])
def test_what_is_kept_rebuilds_what_was_remembered(name):
    """All that the gradient of a policy depends on: the states that the replay makes are those of the rollout."""
    blocks, kv = Blocks(2, memory=POLICIES[name]), text_kv()
    state = init_cache(CONFIG, BATCH, LONG[1], CONFIG.tokens_per_frame(SIDE, SIDE), blocks)
    begin = Begin(state, jnp.int32(0), jnp.int32(0))
    roll = jax.jit(lambda draws: rollout(tiny(), kv, draws, CONFIG_OF_ROLLOUT, blocks, begin=begin))
    rolled = roll(draws_for())
    put = jax.jit(lambda state, kv_, start: write(state, kv_, start, 2, blocks, text_kv=kv))
    for start, stop in blocks.spans(LONG[1]):
        state = put(state, FrameKV(*(x[:, :, start:stop] for x in rolled.context)), jnp.int32(start))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, state, rolled.state)


def test_a_policy_that_holds_everything_is_none():
    """Values and gradients of training without a policy."""
    weight = normal(9, LONG)
    got, (x0, _) = by_replay()(tiny(), text(), draws_for(), weight, blocks=Blocks(2, memory=COVERS))
    expected, (x0_plain, _) = by_replay()(tiny(), text(), draws_for(), weight, blocks=Blocks(2))
    print(f"everything: x0 {relative(x0, x0_plain):.1e}, gradient {worst(got, expected):.1e}")
    assert relative(x0, x0_plain) < 1e-5 and worst(got, expected) < 1e-5


def test_rows_of_a_batch_are_independent():
    blocks, weight = Blocks(2, memory=POLICIES["int8"]), normal(9, LONG)
    draws, alone = draws_for(), weight.at[1].set(0.0)
    other = {**draws, "noise_BFHWC": draws["noise_BFHWC"].at[1].multiply(-1.0)}
    (grad, _), (x0, _) = by_replay()(tiny(), text(), draws, alone, blocks=blocks)
    (changed, text_grad), (moved, _) = by_replay()(tiny(), text(), other, alone, blocks=blocks)
    assert np.array_equal(x0[0], moved[0]) and relative(moved[1], x0[1]) > 0.1
    assert worst(changed, grad) < 1e-6 and not np.any(text_grad[1])


@pytest.mark.parametrize(
    ("blocks", "how", "message"),
    [
        (Blocks(2, memory=ContextRecompute(6, 2)), {}, "blocks.memory='context_recompute' is for generation"),
        (Blocks(2, memory=SlotRelative(5, 1)), {"kv_gradient": "straight_through"}, "kv_gradient='straight_through'"),
        (Blocks(2, memory=SlotRelative(5, 1)), {"save_activations": True}, "save_activations=True: not with"),
    ],
)
def test_what_does_not_train_is_refused(blocks, how, message):
    config = replace(CONFIG_OF_ROLLOUT, **how)
    with pytest.raises(UserError, match=message):
        rollout(tiny(), embed_text(tiny(), text()), draws_for(), config, blocks, save=config.save_activations)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_window_at_the_end_of_a_longer_rollout(count):
    """Its gradient is the loop's, of the blocks that a loss counts; what precedes the window is rebuilt."""
    blocks, long = Blocks(2, memory=EmaSink(6, 2, alpha=0.8)), LongVideo(4, 8)
    draws, codec = {**draws_for(), "count": jnp.int32(count)}, Fading()
    start = int(long.start(draws["count"], blocks))
    counted = np.asarray(long.counted_F(draws["count"], blocks))[None, :, None, None, None]
    weight = normal(9, (BATCH, 4, *SHAPE[2:])) * counted

    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def by_window(model, text_BSE):
        kv = embed_text(model, text_BSE)
        x0 = roll_window(model, kv, draws, CONFIG_OF_ROLLOUT, long, blocks, codec, gradient=True)
        return jnp.sum(x0 * weight), x0

    grad, x0 = jax.jit(by_window)(tiny(), text())
    whole = jnp.zeros(LONG).at[:, start : start + 4].set(weight)
    expected, x0_loop = by_loop(tiny(), text(), draws_for(), whole, blocks=blocks, exit_step=1)
    print(f"{count} blocks: {worst(grad, expected):.1e}")
    assert relative(x0 * counted, x0_loop[:, start : start + 4] * counted) < 1e-5
    assert worst(grad, expected) < 1e-5
