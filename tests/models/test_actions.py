"""Action conditioning: absent it changes nothing, fresh it changes nothing, and one semantics holds in every pass."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.precision import to_record
from cfjax.core.tree import map_named, named_leaves
from cfjax.models.actions import ActionConfig, SteeredKV
from cfjax.models.context import clean_context
from cfjax.models.fresh import with_actions
from cfjax.models.steered import steered
from cfjax.models.wan import Wan, WanConfig, embed_text, replay, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_and_denoise, commit_block, denoise_block, empty_cache
from cfjax.worlds.records import config_from_record
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, normal, relative, text, text_kv, tiny

EMBEDDING = ActionConfig("embedding")
ATTENTION = ActionConfig("attention", window=3, frames=2, width=8)
FORMS = [pytest.param(form, id=form.form) for form in (EMBEDDING, ATTENTION)]
FORMS_SLOWLY = [pytest.param(EMBEDDING, id="embedding", marks=pytest.mark.slow), FORMS[1]]
BLOCKS = Blocks(2)
KEYS = np.random.default_rng(0).integers(0, 2, (BATCH, FRAMES, 4)).astype(np.float32)


def config(actions: ActionConfig) -> WanConfig:
    return replace(CONFIG, actions=actions)


@cache
def told(actions: ActionConfig) -> Wan:
    """A network whose action parameters are random too."""
    with jax.ensure_compile_time_eval():
        fresh, rng = with_actions(tiny(), config(actions), jax.random.key(5)), np.random.default_rng(1)

        def leaf(name: str, x: jax.Array) -> jax.Array:
            own = "action" in name
            return x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) if own else x

        return map_named(leaf, fresh)


@jax.jit
def forced(model, noisy, sigma_BF, clean):
    return teacher_forced(model, noisy, sigma_BF, clean, text_kv(), BLOCKS)


@jax.jit
def streamed(model, noisy, clean, sigma):
    """Block after block: the flow of the noisy one, then the clean one is committed."""
    cache, flows = empty_cache(model.config, SHAPE, BLOCKS), []
    for start, stop in BLOCKS.spans(FRAMES):
        flows.append(denoise_block(model, noisy[:, start:stop], sigma, text_kv(), cache, jnp.int32(start), BLOCKS))
        cache = commit_block(model, clean[:, start:stop], text_kv(), cache, jnp.int32(start), BLOCKS)
    return jnp.concatenate(flows, axis=1), cache


def test_without_actions_there_is_no_trace_of_them():
    """The same parameters, record and program as ever; a network that cannot be steered is never wrapped."""
    assert not [name for name in named_leaves(tiny()) if "action" in name]
    record = to_record(CONFIG)
    assert "actions" not in record and config_from_record(WanConfig, record) == CONFIG
    assert steered(tiny(), KEYS) is tiny()
    noisy, sigma_BF = normal(1), jnp.full(SHAPE[:2], 0.5)
    plain = jax.jit(lambda m, x: m(x, sigma_BF, text_kv())).lower(tiny(), noisy).as_text()
    assert "action" not in plain


@pytest.mark.parametrize("actions", FORMS)
def test_fresh_parameters_change_nothing(actions):
    """A pretrained network with fresh actions, told any keys or none, is what it was."""
    fresh = with_actions(tiny(), config(actions), jax.random.key(9))
    own = named_leaves(tiny())
    assert {name for name in named_leaves(fresh) if name not in own} and all(
        (named_leaves(fresh)[name] == leaf).all() for name, leaf in own.items()
    )
    args = (normal(1), jnp.full(SHAPE[:2], 0.5), normal(2))
    wanted = forced(tiny(), *args)
    for model in (fresh, steered(fresh, KEYS)):
        found = forced(model, *args)
        if actions.form == "embedding":
            np.testing.assert_array_equal(found, wanted)
        else:  # zeros are added to the stream, and XLA fuses what is around them otherwise: 2e-7
            assert relative(found, wanted) < 1e-6
    record = to_record(fresh.config)
    assert config_from_record(WanConfig, record).actions == actions


@pytest.mark.parametrize("actions", FORMS_SLOWLY)
def test_every_pass_tells_the_same(actions):
    """Teacher forcing, a KV-cached rollout, a replay, and a stream that is given each block's rows alone."""
    model, noisy, clean = steered(told(actions), KEYS), normal(1), normal(2)
    sigma_BF = jnp.full(SHAPE[:2], 0.7)
    wanted = forced(model, noisy, sigma_BF, clean)
    by_blocks, cache = streamed(model, noisy, clean, jnp.float32(0.7))
    context = jax.jit(lambda m: clean_context(m, clean, text_kv(), BLOCKS))(model)
    again = jax.jit(lambda m: replay(m, noisy, sigma_BF, text_kv(), context, BLOCKS))(model)
    fused = jax.jit(
        lambda m: commit_and_denoise(
            m, clean[:, :2], noisy[:, 2:4], jnp.float32(0.7), text_kv(),
            empty_cache(m.config, SHAPE, BLOCKS), jnp.int32(2), BLOCKS,
        )[0]
    )(model)  # fmt: skip
    padded = np.concatenate([np.repeat(KEYS[:, :1], actions.context, 1), KEYS], 1)[:, 4 : 6 + actions.context]
    block = steered(told(actions), padded, jnp.int32(4), padded=True)
    before = jax.tree.map(lambda x: x, cache)  # frames from 4 on are masked by their numbers
    alone = denoise_block(block, noisy[:, 4:], jnp.float32(0.7), text_kv(), before, jnp.int32(4), BLOCKS)
    errors = {
        "stream": relative(by_blocks, wanted),
        "replay": relative(again, wanted),
        "fused": relative(fused, wanted[:, 2:4]),
        "one block": relative(alone, wanted[:, 4:]),
    }
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5
    assert relative(forced(told(actions), noisy, sigma_BF, clean), wanted) > 1e-2  # and it matters what is held


@pytest.mark.parametrize("actions", FORMS)
def test_keys_reach_their_own_frame_and_later_ones_alone(actions):
    """In one pass over clean blocks: the frames before a changed key are as they were."""
    args = (normal(1), jnp.full(SHAPE[:2], 0.5), normal(2))
    other = KEYS.copy()
    other[:, 4:] = 1 - other[:, 4:]
    a, b = (forced(steered(told(actions), keys), *args) for keys in (KEYS, other))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert relative(a[:, 4:], b[:, 4:]) > 1e-3


def test_the_attention_is_what_numpy_says():
    """Independently, row by row: windows of rows, rotary phases, softmax; no frame sees later keys."""
    module, h = told(ATTENTION).blocks.action_attn, normal(3, (1, 2, 3, CONFIG.dim))
    layer = jax.tree.map(lambda x: x[0], module)
    rows = np.random.default_rng(2).integers(0, 2, (1, 2, ATTENTION.context + 1, 4)).astype(np.float32)
    found = layer(h, jnp.asarray(rows), ATTENTION, CONFIG.num_heads, CONFIG.eps, CONFIG.precision)
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(layer).items()}
    linear = lambda name, x: x @ leaves[f"{name}/kernel"] + leaves[f"{name}/bias"]
    norm = lambda name, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.eps) * leaves[f"{name}/scale"]
    silu = lambda x: x / (1 + np.exp(-x))
    heads, half = CONFIG.num_heads, CONFIG.head_dim // 2
    phase = 256.0 ** (-np.arange(half) / half)

    def turn(x, at):
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * at * phase)
        return np.concatenate([z.real, z.imag], -1)

    for f in range(2):
        embedded = linear("embed/down", silu(linear("embed/up", rows[0, f])))
        keys, values = [], []
        for w in range(ATTENTION.window):
            joined = embedded[w : w + ATTENTION.frames].reshape(-1)
            keys.append(turn(norm("norm_k", linear("k", joined)).reshape(heads, -1), w - ATTENTION.window + 1))
            values.append(linear("v", joined).reshape(heads, -1))
        for t in range(3):
            q = norm("norm_q", linear("q", np.asarray(h[0, f, t], np.float64))).reshape(heads, -1)
            logits = np.einsum("nk,wnk->nw", q, np.array(keys)) / np.sqrt(CONFIG.head_dim)
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            wanted = linear("o", np.einsum("nw,wnk->nk", weights, np.array(values)).reshape(-1))
            np.testing.assert_allclose(found[0, f, t], wanted, rtol=1e-5, atol=1e-6)


def test_rows_are_those_of_each_frames_window():
    """Oldest first; before the first frame its keys again; twice for the two halves of teacher forcing."""
    model = steered(told(ATTENTION), KEYS)
    given = model.told(text_kv(), 0, BATCH, FRAMES, twice=True)
    assert isinstance(given, SteeredKV)
    rows = given.rows_LBFIA[0]
    assert rows.shape == (BATCH, 2 * FRAMES, ATTENTION.context + 1, 4)
    for frame in range(FRAMES):
        wanted = KEYS[:, np.clip(np.arange(frame - ATTENTION.context, frame + 1), 0, None)]
        np.testing.assert_array_equal(rows[:, frame], wanted)
        np.testing.assert_array_equal(rows[:, FRAMES + frame], wanted)


def test_a_guided_batch_is_told_its_keys_twice():
    model = steered(told(EMBEDDING), KEYS)
    both = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), embed_text(model, text()))
    noisy, sigma_BF = normal(1), jnp.full(SHAPE[:2], 0.5)
    twice = model(jnp.concatenate([noisy, noisy]), jnp.concatenate([sigma_BF, sigma_BF]), both)
    assert relative(twice[:BATCH], twice[BATCH:]) == 0
    assert relative(twice[:BATCH], model(noisy, sigma_BF, text_kv())) < 1e-5


@pytest.mark.parametrize("actions", FORMS)
def test_every_action_parameter_learns(actions):
    """From fresh ones on: the output's own first, as it is zero, then all."""

    def loss(model, keys):
        return jnp.mean(jnp.square(forced(steered(model, keys), normal(1), jnp.full(SHAPE[:2], 0.5), normal(2))))

    grads = named_leaves(jax.grad(loss)(told(actions), KEYS))
    silent = [name for name, g in grads.items() if "action" in name and not jnp.any(g)]
    assert silent == []


def test_mistakes_are_named():
    with pytest.raises(UserError, match="3 keys for a network of 4"):
        steered(told(EMBEDDING), KEYS[..., :3])
    with pytest.raises(UserError, match="use embedding or attention"):
        ActionConfig("mouse")
    with pytest.raises(UserError, match="do not fit"):
        with_actions(tiny(), replace(config(EMBEDDING), dim=48), jax.random.key(0))
