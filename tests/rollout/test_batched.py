"""Sessions that go through the device together make the blocks that each makes alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.programs import Programs
from cfjax.memory.policies import ContextRecompute, EmaSink, SlotRelative
from cfjax.nn.visibility import Blocks
from cfjax.rollout import batched
from cfjax.rollout.batched import SIZES, compile_sizes, groups, step_together
from cfjax.rollout.generate import FewStep, ManyStep, few_step_block
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.stream import Pipeline
from tests.rollout.test_reencode import Same
from tests.rollout.test_session import FEW, OBSERVING, SLOTS, encode, session
from tests.tiny import SHAPE, relative, tiny

SLOW = pytest.mark.slow
LONG = {"max_frames": 24}


def stream(number: int = 0, blocks: Blocks = SLOTS, sampler=FEW, **changes):
    """A session with a prompt, a seed and a position of its own."""
    ahead = changes.pop("ahead", (0, 1, 4)[number % 3])
    made = session(blocks, sampler, **{"prompt": "abc"[number % 3], "seed": 11 + number} | LONG | changes)
    for _ in range(ahead):
        made.next()
    return made


def together(streams, count: int = 1) -> list[np.ndarray]:
    """The latents of so many blocks of each."""
    steps = [step_together(streams) for _ in range(count)]
    return [np.concatenate([np.asarray(step[i].latents_BFHWC) for step in steps], 1) for i in range(len(streams))]


def alone(one, count: int = 1) -> np.ndarray:
    return np.concatenate([np.asarray(one.next().latents_BFHWC) for _ in range(count)], axis=1)


CASES = {
    "full": (Blocks(2), FEW),
    "slot_relative": (SLOTS, FEW),
    "window and sink": (Blocks(2, window=5, sink=1), FEW),
    "deep_forcing": (Blocks(2, memory=OBSERVING["deep_forcing"]), FEW),
    "many-step": (SLOTS, ManyStep("euler", steps=2)),
}
MORE = {
    "ema_sink": (Blocks(2, memory=EmaSink(6, 2)), FEW),
    "context_recompute": (Blocks(2, memory=ContextRecompute(6, 2)), FEW),
    "first frame": (Blocks(2, independent_first_frame=True, memory=SlotRelative(5, 1)), FEW),
    "first list": (SLOTS, FewStep((1000, 500), (1000, 750, 500))),
    **{name: (Blocks(2, memory=memory), FEW) for name, memory in OBSERVING.items() if name != "deep_forcing"},
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=SLOW) for name in MORE)])
def test_together_is_alone(name):
    """At different positions, with different prompts and seeds, while their memories fill and when they are full."""
    streams = [stream(i, *(CASES | MORE)[name]) for i in range(3)]
    wanted = [alone(one.fork(), 4) for one in streams]
    error = max(relative(a, b) for a, b in zip(together(streams, 4), wanted, strict=True))
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


def test_what_comes_with_a_block():
    """The number, the first frame, the prompt, the pixels and the decoder's state are the session's own."""
    streams = [stream(i) for i in range(3)]
    copies = [one.fork() for one in streams]
    for block, one in zip(step_together(streams), copies, strict=True):
        other = one.next()
        assert (block.index, block.start, block.prompt) == (other.index, other.start, other.prompt)
        np.testing.assert_allclose(block.video_BPHWC, other.video_BPHWC, rtol=1e-4, atol=1e-5)
        assert block.network_s > 0 and block.decode_s > 0
    for one, other in zip(streams, copies, strict=True):
        assert [start for start, _ in one.state.recent] == [start for start, _ in other.state.recent]
        assert float(one.state.decoder) == float(other.state.decoder)


def test_pixels_leave_before_the_commit():
    new, old = stream(0), stream(1)
    step_together([new, old])
    assert [int(one.state.cache.count) for one in (new, old)] == [0, 2]
    assert new.state.pending[0] == 0 and old.state.pending[0] == 2


def test_a_row_depends_on_nothing_but_itself():
    """Bit for bit within a batch size, whoever else is in it; to rounding between batch sizes and alone."""
    first, *others = [stream(i) for i in range(4)]
    (known,) = together([first.fork(), *[one.fork() for one in others]], 2)[:1]
    (padded,) = together([first.fork(), *[one.fork() for one in others[:2]]], 2)[:1]
    np.testing.assert_array_equal(known, padded)  # the fourth row is a copy of the first
    *_, last = together([*[one.fork() for one in others], first.fork()], 2)
    assert relative(last, known) < 1e-6
    for size in (1, 2):
        (found,) = together([first.fork(), *[one.fork() for one in others[: size - 1]]], 2)[:1]
        assert relative(found, known) < 1e-5
    assert relative(together([first.fork(seed=5), *others[:2]], 2)[0], known) > 0.1


def test_snapshots_are_values():
    streams = [stream(i) for i in range(3)]
    step_together(streams)
    before = streams[1].snapshot()
    first = together(streams, 2)
    streams[1].restore(before)
    copies = [stream(0), streams[1], stream(2)]  # others, elsewhere
    np.testing.assert_array_equal(together(copies, 2)[1], first[1])


@pytest.mark.parametrize("mode", ["recache", "keep", "cut"])
def test_a_prompt_switch_is_nobody_elses(mode):
    streams = [stream(i, ahead=3) for i in range(3)]
    copies = [one.fork() for one in streams]
    single = streams[1].fork()
    for one in (streams[1], single):
        one.set_prompt("a", mode, blend_blocks=2)
    switched, plain = together(streams, 3), together(copies, 3)
    for i in (0, 2):
        np.testing.assert_array_equal(switched[i], plain[i])
    assert relative(switched[1], alone(single, 3)) < 1e-5
    assert relative(switched[1], plain[1]) > 1e-3


def test_commits_that_need_pixels_are_a_sessions_own():
    memory = ContextRecompute(4, 1, reencode=True)
    parts, words = Pipeline(tiny(), Same(), FEW, Blocks(1)), Text(encode)
    streams = [Session(parts, words, "ab"[i], latent_shape=SHAPE[2:], seed=i, memory=memory) for i in range(2)]
    copies = [one.fork() for one in streams]
    assert [len(group) for group in groups(streams)] == [2]
    for found, one in zip(together(streams, 3), copies, strict=True):
        assert relative(found, alone(one, 3)) < 1e-5


# ---- programs


def test_a_program_per_batch_size():
    """Whatever the rows' positions, how full their memories are, and whether one begins: one for the network, one for
    the decoder.
    """
    programs = Programs()
    streams = [stream(i, call=programs) for i in range(3)]
    counted = lambda function: [key for key in programs._compiled if key[0] is function]
    for now in (streams, [*streams, stream(3, call=programs)], streams[:2], streams[1:2]):
        for _ in range(3):
            step_together(now)
    assert len(counted(batched._next_blocks)) == len(counted(batched._decode)) == 3
    programs = Programs()
    compile_sizes(stream(0, call=programs), (1, 2, 4))
    assert len(counted(batched._next_blocks)) == len(counted(batched._decode)) == 3


def test_a_batch_has_no_conditional_and_no_scatter():
    """Under vmap, a conditional over lengths would compute every branch, and a row's own place would be a scatter."""
    streams = [stream(i) for i in range(2)]
    plan = batched._plan(streams[0], 2)
    rows, numbers = zip(
        *(batched._row(one.state, (1, 2, *SHAPE[2:]), 2, tiny().config) for one in streams), strict=True
    )
    columns = batched.Numbers(*(np.asarray(column) for column in zip(*numbers, strict=True)))
    text = batched._next_blocks.lower(tiny(), rows, columns, plan=plan).as_text()
    assert "dot_general" in text and "stablehlo.case" not in text and "stablehlo.scatter" not in text
    assert "stablehlo.case" in jax.jit(lambda: alone_denoised(streams[0])).lower().as_text()


def alone_denoised(one):
    state, shape = one.state, (1, 2, *SHAPE[2:])
    levels = one.pipeline.sampler.sigmas()
    fresh = jnp.zeros((1, *shape))
    return few_step_block(tiny(), jnp.zeros(shape), fresh, levels, state.text_kv, state.cache, jnp.int32(2), one.layout)


# ---- who goes together


def numbers_of(found, streams) -> list[list[int]]:
    return [[streams.index(one) for one in group] for group in found]


def test_sessions_of_one_program_go_together():
    """Not those of another policy or network, a first block that has a list of its own, or a rolling sampler."""
    rolling = lambda: session(Blocks(2), FewStep((1000, 500), rolling=True), max_frames=12)
    lists = FewStep((1000, 500), (1000, 750, 500))
    streams = [
        *(stream(0), stream(1, memory="infinity_rope"), stream(2), stream(3, memory="infinity_rope")),
        *(rolling(), rolling()),
        *(stream(0, sampler=lists), stream(1, sampler=lists), stream(2, sampler=lists)),
    ]
    assert numbers_of(groups(streams), streams) == [[0, 2], [1, 3], [4], [5], [6], [7, 8]]
    other = stream(0)
    other._pipeline = replace(other.pipeline, model=jax.tree.map(lambda x: x, tiny()))
    assert numbers_of(groups([streams[0], other]), [streams[0], other]) == [[0], [1]]


def test_little_of_a_batch_is_padding():
    one = stream(0)
    sizes = {n: [len(group) for group in groups([one.fork() for _ in range(n)])] for n in (1, 3, 5, 6, 7, 8, 9, 13, 20)}
    assert sizes == {1: [1], 3: [3], 5: [4, 1], 6: [6], 7: [7], 8: [8], 9: [8, 1], 13: [8, 4, 1], 20: [8, 8, 4]}
    assert groups([]) == [] and step_together([]) == []


def test_nobody_waits_for_others_twice():
    """Eight clients under three policies that come back after 0 to 2 of the device's turns: fair to 1.2."""
    rng, memories = np.random.default_rng(0), ("infinity_rope", "ema_sink", "window")
    streams = [stream(i, ahead=0, memory=memories[i % 3]) for i in range(8)]
    waiting, away, counts = list(streams), list[list]([]), dict.fromkeys(map(id, streams), 0)
    for _ in range(300):
        away = [[turns - 1, one] for turns, one in away]
        waiting += [one for turns, one in away if turns < 0]
        away = [item for item in away if item[0] >= 0]
        if not waiting:
            continue
        group = groups(waiting)[0]
        waiting = [one for one in waiting if one not in group]
        for one in group:
            counts[id(one)] += 1
            away.append([int(rng.integers(3)), one])
    assert max(counts.values()) <= 1.2 * min(counts.values()), counts


def test_sessions_of_different_groups_in_one_call():
    streams = [stream(0), stream(1, blocks=Blocks(2)), stream(2), session(Blocks(2), max_frames=8)]
    wanted = [alone(one.fork()) for one in streams]
    for found, known in zip(together(streams), wanted, strict=True):
        assert relative(found, known) < 1e-5


def test_one_error_before_anybody_goes_on():
    streams = [stream(0), stream(2)]
    closed, full = stream(1), session(Blocks(2), max_frames=4)
    closed.close()
    full.next(), full.next()
    for bad, message in (
        ([*streams, closed], "this session is closed: open another one"),
        ([*streams, full], "remembers all of at most 4: give max_frames"),
        ([*streams, streams[0]], "a session is there twice"),
    ):
        before = [one.state for one in streams]
        with pytest.raises(UserError, match=message):
            step_together(bad)
        assert all(one.state is state for one, state in zip(streams, before, strict=True))
    assert numbers_of(groups([*streams, closed, full]), [*streams, closed, full]) == [[0, 1], [2], [3]]


def test_the_sizes_are_powers_of_two_up_to_eight():
    assert SIZES == (1, 2, 4, 8)
