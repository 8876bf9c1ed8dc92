"""Streams that are steered: the blocks of a whole video with the same keys, alone and together, back and forth."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.policies import ContextRecompute, SlotRelative
from cfjax.models.actions import ActionConfig
from cfjax.models.steered import steered
from cfjax.nn.visibility import Blocks
from cfjax.rollout.batched import step_together
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.steering import KEPT, Held
from cfjax.rollout.stream import Pipeline, prompt_kv, seeded_noise, stream_latents
from tests.models.test_actions import ATTENTION, EMBEDDING, told
from tests.rollout.test_session import CODEC, FEW, NEGATIVE, SEED, encode, session
from tests.tiny import SHAPE, relative

LAYOUT = Blocks(2, memory=SlotRelative(5, 1))
HELD = ([1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0])  # of each block


def opened(
    actions: ActionConfig = ATTENTION, *, sampler=FEW, layout=LAYOUT, seed: int = SEED, prompt: str = "a"
) -> Session:
    pipeline = Pipeline(told(actions), CODEC, sampler, layout)
    words = Text(encode, NEGATIVE)
    return Session(pipeline, words, prompt, latent_shape=SHAPE[2:], seed=seed, max_frames=12)


def steer(one: Session, held=HELD) -> list[np.ndarray]:
    out = []
    for keys in held:
        one.set_actions(keys)
        out.append(np.asarray(one.next().latents_BFHWC))
    return out


@pytest.mark.parametrize(
    ("actions", "sampler", "layout"),
    [
        (ATTENTION, FEW, LAYOUT),
        (EMBEDDING, FEW, Blocks(2)),
        pytest.param(EMBEDDING, ManyStep("euler", steps=2), LAYOUT, marks=pytest.mark.slow),
    ],
    ids=["attention", "embedding, everything", "guided"],
)
def test_a_session_makes_the_blocks_of_the_whole_video(actions, sampler, layout):
    keys = np.repeat(np.array([HELD], np.float32), 2, axis=1)
    model = told(actions)
    text_kv = prompt_kv(model, encode(["a"]), NEGATIVE, sampler)
    whole = stream_latents(
        Pipeline(steered(model, keys), CODEC, sampler, layout),
        text_kv,
        seeded_noise(np.array([SEED])),
        num_frames=2 * len(HELD),
        latent_shape=SHAPE[2:],
    )
    error = max(
        relative(a, b) for a, b in zip(steer(opened(actions, sampler=sampler, layout=layout)), whole, strict=True)
    )
    print(f"{error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize(
    "actions",
    [pytest.param(EMBEDDING, id="embedding", marks=pytest.mark.slow), pytest.param(ATTENTION, id="attention")],
)
def test_together_each_follows_its_own_keys(actions):
    """One ahead of the others, each with other keys; what is held of one concerns no other."""
    streams = [opened(actions, seed=i, prompt="abc"[i]) for i in range(3)]
    steer(streams[0], HELD[:2])
    copies = [one.fork() for one in streams]
    wanted = [steer(one, np.roll(HELD, i, 0)[:3]) for i, one in enumerate(copies)]
    found: list[list[np.ndarray]] = [[], [], []]
    for step in range(3):
        for i, one in enumerate(streams):
            one.set_actions(np.roll(HELD, i, 0)[step])
        for blocks, made in zip(found, step_together(streams), strict=True):
            blocks.append(np.asarray(made.latents_BFHWC))
    error = max(relative(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))
    print(f"{error:.1e}")
    assert error < 1e-5


def test_what_was_held_is_part_of_the_stream():
    """A snapshot goes on with it, and committing all again under the same prompt changes nothing."""
    one = opened(layout=Blocks(2))
    steer(one, HELD[:3])
    kept, other = one.snapshot(), one.fork()
    wanted = steer(one, HELD[3:])
    one.restore(kept)
    np.testing.assert_array_equal(np.asarray(steer(one, HELD[3:])), np.asarray(wanted))
    other.set_prompt("a", mode="recache")
    assert max(map(relative, steer(other, HELD[3:]), wanted)) < 1e-5


def test_rows_of_a_block_reach_back_and_no_further():
    held = Held(0, np.zeros((0, 2), np.float32), np.array([1, 0], np.float32)).went_on(0, 2)
    held = Held(held.first, held.rows_FA, np.array([0, 1], np.float32))
    assert held.rows(2, 2, 3)[0, :, 0].tolist() == [1, 1, 1, 0, 0]
    for block in range(1, KEPT):
        held = held.went_on(2 * block, 2)
    assert held.rows_FA.shape == (KEPT, 2) and held.first == 2 * KEPT - KEPT
    assert held.rows(0, 2, 1)[0, :, 0].tolist() == [0, 0, 0]  # long forgotten


def test_mistakes_are_named():
    with pytest.raises(UserError, match="cannot be steered"):
        session().set_actions([1, 0, 0, 0])
    one = opened()
    with pytest.raises(UserError, match="give 4 numbers"):
        one.set_actions([1, 0])
    with pytest.raises(UserError, match="context_recompute"):
        opened(layout=Blocks(2, memory=ContextRecompute(6, 2))).set_actions([1, 0, 0, 0])
    with pytest.raises(UserError, match="rolling"):
        opened(sampler=FewStep((1000, 500), rolling=True), layout=Blocks(2, window=6)).set_actions([1, 0, 0, 0])
    one.close()
    with pytest.raises(UserError, match="closed"):
        one.set_actions([1, 0, 0, 0])
