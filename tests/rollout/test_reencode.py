"""Krea's context: a first frame that is encoded anew from the decoded pixels."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.names import memory_name, parse_memory
from cfjax.memory.policies import ContextRecompute
from cfjax.models.context import clean_context
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep
from cfjax.rollout.stream import prompt_kv
from tests.rollout import test_session
from tests.rollout.test_session import NEGATIVE, encode
from tests.tiny import SHAPE, normal, relative, tiny

ONE = FewStep((1000,))
KREA = ContextRecompute(reencode=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Numbered:
    """Four pixel frames per latent (the first: one), whose pixels are the latents plus their place in it."""

    @property
    def stride(self):
        return 4, 1, 1

    def init_state(self, batch: int):
        return jnp.int32(0)

    def decode_step(self, latents, state):
        places = jnp.arange(4.0).reshape(1, 1, 4, 1, 1, 1)
        video = (latents[:, :, None] + places).reshape(latents.shape[0], -1, *latents.shape[2:])
        return jax.lax.cond(state == 0, lambda x: x.at[:, 3].set(x[:, 0]), lambda x: x, video), state + 1

    def encode(self, video):
        return video + 100.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Same:
    """A codec whose pixels are the latents."""

    @property
    def stride(self):
        return 1, 1, 1

    def init_state(self, batch: int):
        return jnp.int32(0)

    def decode_step(self, latents, state):
        return latents, state

    def encode(self, video):
        return video


def session(monkeypatch, codec, **changes):
    monkeypatch.setattr(test_session, "CODEC", codec)
    return test_session.session(Blocks(3), ONE, memory=KREA, **changes)


def context_of(stream) -> np.ndarray:
    """The latents that the next block sees, [3, H, W, C]."""
    return np.asarray(stream.state.cache.extra).reshape(3, *SHAPE[2:])


def test_the_plan_is_kreas():
    """Golden: block 2 sees the end of latent 3, encoded, 4 and 5; with the first frame kept 0, 4, 5."""
    plan = KREA.plan(12, Blocks(3))
    assert [seen.frames for seen in plan] == [(), (0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert all(seen.positions == tuple(range(len(seen.frames))) for seen in plan)
    assert plan[2].own == plan[3].own == (3, 4, 5)
    assert [seen.frames for seen in ContextRecompute().plan(12, Blocks(3))[2:]] == [(0, 4, 5), (0, 7, 8)]


def test_the_first_frame_is_the_last_pixel_before_the_others(monkeypatch):
    """9 pixel frames stay, the oldest of which is the last one of its latent; it is encoded as one picture."""
    stream = session(monkeypatch, Numbered())
    made = [np.asarray(stream.next().latents_BFHWC)[0] for _ in range(2)]
    np.testing.assert_allclose(context_of(stream), made[0], rtol=1e-6)
    made.append(np.asarray(stream.next().latents_BFHWC)[0])
    np.testing.assert_allclose(context_of(stream)[0], made[1][0] + 3 + 100, rtol=1e-6)
    np.testing.assert_allclose(context_of(stream)[1:], made[1][1:], rtol=1e-6)
    assert stream.state.cache.frame_F.tolist() == [3, 4, 5] and stream.state.pixels_BPHWC.shape[1] == 9
    again = stream.fork()
    again.set_prompt("b", "recache")  # the last block's commit, under another prompt
    again.next(), stream.next()
    np.testing.assert_allclose(context_of(again), context_of(stream), rtol=1e-6)
    assert relative(again.state.cache.v, stream.state.cache.v) > 1e-3


def test_with_a_perfect_codec_the_context_is_the_newest_frames(monkeypatch):
    """Their keys and values at positions from 0 on, in one block-causal pass; also after given frames."""
    given = normal(4, (1, 6, *SHAPE[2:]))
    stream = session(monkeypatch, Same(), given_BFHWC=given)
    assert relative(context_of(stream), given[0, 3:]) < 1e-6
    kv = prompt_kv(tiny(), jnp.asarray(encode(["a"])), jnp.asarray(NEGATIVE), ONE)
    context = jax.jit(clean_context, static_argnames="blocks")(tiny(), given[:, 3:], kv, Blocks(3))
    cache = stream.state.cache
    assert relative(cache.v, context.v_LBFTNK) < 2e-6
    assert relative(jax.vmap(rotate_time, (0, None))(cache.k, jnp.arange(3)), context.k_LBFTNK) < 2e-6


def test_names_and_what_cannot_be(monkeypatch):
    assert memory_name(KREA) == "context_recompute(reencode=True)" and parse_memory(memory_name(KREA)) == KREA
    with pytest.raises(UserError, match="reencode='1': use True or False"):
        parse_memory("context_recompute(reencode=1)")
    with pytest.raises(UserError, match="use sink=1, not 2"):
        ContextRecompute(sink=2, reencode=True)
    with pytest.raises(UserError, match="does not encode; open the run with decoder='vae'"):
        session(monkeypatch, test_session.Counting())
    stream = session(monkeypatch, Same(), given_BFHWC=normal(4, (1, 3, *SHAPE[2:])))
    with pytest.raises(UserError, match="needs a stream's first frames"):
        stream.set_memory(KREA)
    with pytest.raises(UserError, match="needs the decoded pixels"):
        KREA.commit_latents(None, None, None, None)
