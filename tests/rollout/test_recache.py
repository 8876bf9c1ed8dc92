"""Commits of what is remembered, again: by blocks, and all at once as LongLive does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.slots import Memory
from cfjax.models.wan import backbone
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep
from cfjax.rollout.stream import prompt_kv
from tests.rollout.test_session import NEGATIVE, encode, session
from tests.tiny import SHAPE, normal, relative, tiny

ONE = FewStep((1000,))


def slots(*spans) -> list[int]:
    return [frame for first, last in spans for frame in range(first, last + 1)]


@pytest.mark.parametrize(("move_sink", "sink"), [(False, (0, 2)), pytest.param(True, (30, 32), marks=pytest.mark.slow)])
def test_longlives_switch_at_frame_42(move_sink, sink):
    """Golden: what block 14 and block 17 see besides themselves, of 12 frames with a sink of 3."""
    given = normal(1, (1, 42, *SHAPE[2:]))
    stream = session(Blocks(3, memory=Memory(12, 3)), ONE, given_BFHWC=given)
    assert stream.state.cache.frame_F.tolist() == slots((0, 2), (36, 41))
    before = np.asarray(stream.state.cache.v)
    stream.set_prompt("b", recache="unmasked", move_sink=move_sink)
    stream.next()
    after = np.asarray(stream.state.cache.v)  # block 14 is committed when the next is asked for
    assert stream.state.cache.frame_F.tolist() == slots(sink, (36, 41))
    assert (relative(after[:, :, :3], before[:, :, :3]) == 0.0) != move_sink
    assert relative(after[:, :, 3:], before[:, :, 3:]) > 1e-2
    for _ in range(3):
        stream.next()
    assert stream.state.cache.frame_F.tolist() == slots(sink, (45, 50))


@partial(jax.jit, static_argnames="dropped")
def keys_and_values(latents, past_k, past_v, past_F, own_F, text_kv, *, dropped=0):
    """Keys (time axis not rotated) and values of frames that see a past and each other, but not the first `dropped`."""

    def attend(q, k, v, past):
        k = jnp.concatenate([rotate_time(past[0], past_F), k[:, dropped:]], axis=1)
        v = jnp.concatenate([past[1], v[:, dropped:]], axis=1)
        weights = jax.nn.softmax(jnp.einsum("bftnk,bgsnk->bnftgs", q, k) * q.shape[-1] ** -0.5, axis=(-2, -1))
        return jnp.einsum("bnftgs,bgsnk->bftnk", weights, v)

    sigma_BF = jnp.zeros(latents.shape[:2])
    known = (past_k, past_v)
    _, own = backbone(tiny(), latents, sigma_BF, text_kv, own_F, attend, layer_input=known, emit_kv=True)
    return jax.vmap(rotate_time, (0, None))(own.k_LBFTNK, -own_F), own.v_LBFTNK


@pytest.mark.parametrize(
    ("how", "first", "kept", "dropped"),
    [
        ({"recache": "unmasked"}, 3, 1, 1),  # LongLive's 5 frames, of which the first one's keys are dropped
        ({"recache": "unmasked", "move_sink": True}, 3, 0, 0),
        ({}, 6, 1, 0),  # one block, with the sink
    ],
    ids=["unmasked", "moved sink", "blocks"],
)
def test_what_is_committed_again_is_attention_over_it(how, first, kept, dropped):
    """Against a plain softmax: 8 frames of which slots hold a sink of 1 and 2 more."""
    given = normal(2, (1, 8, *SHAPE[2:]))
    stream = session(Blocks(2, memory=Memory(5, 1)), ONE, given_BFHWC=given)
    old = stream.state.cache
    stream.set_prompt("b", **how)
    stream.next()
    found = stream.state.cache
    kv = prompt_kv(tiny(), jnp.asarray(encode(["b"])), jnp.asarray(NEGATIVE), ONE)
    past, own_F = (old.k[:, :, :kept], old.v[:, :, :kept], jnp.arange(kept)), jnp.arange(first, 8)
    wanted = keys_and_values(given[:, first:], *past, own_F, kv, dropped=dropped)
    order = np.array([0, *(frame - first for frame in (6, 7))])
    error = 0.0
    for got, whole, was in zip((found.k, found.v), wanted, (old.k, old.v), strict=True):
        expected = whole[:, :, order]
        if kept:
            expected = jnp.concatenate([was[:, :, :1], expected[:, :, 1:]], axis=2)
        error = max(error, relative(got, expected))
    print(f"{how}: {error:.1e}")
    assert error < 2e-6
    assert found.frame_F.tolist() == [0 if kept else 3, 6, 7]


@pytest.mark.slow
def test_before_anything_has_left_all_frames_are_made_again():
    """And of a stream of one block, the pass without a mask is the masked one."""
    for frames in (2, 4):
        given, found = normal(3, (1, frames, *SHAPE[2:])), []
        for how in ("blocks", "unmasked"):
            stream = session(Blocks(2, memory=Memory(8, 2)), ONE, given_BFHWC=given)
            stream.set_prompt("b", recache=how)
            stream.next()
            found.append(stream.state.cache)
        assert [state.frame_F.tolist()[:frames] for state in found] == [list(range(frames))] * 2
        apart = relative(found[0].v[:, :, :frames], found[1].v[:, :, :frames])
        assert apart < 2e-6 if frames == 2 else apart > 1e-3


@pytest.mark.parametrize(
    ("memory", "how", "message"),
    [
        (Memory(5, 1), {"recache": "all"}, "recache='all': use blocks or unmasked"),
        (Memory(5, 1), {"move_sink": True}, "move_sink=True is of recache='unmasked'"),
        (Memory(5, 0), {"recache": "unmasked", "move_sink": True}, "has no sink"),
        (Memory(5, 1), {"recache": "unmasked", "mode": "keep"}, "are of mode='recache'"),
        ("ema_sink(window=6, sink=1)", {"recache": "unmasked"}, "is LongLive's, of memory=window, longlive_infinity"),
    ],
)
def test_what_cannot_be_is_said(memory, how, message):
    stream = session(Blocks(2), ONE, memory=memory)
    before = stream.state
    with pytest.raises(UserError, match=message):
        stream.set_prompt("b", **how)
    assert stream.state is before
