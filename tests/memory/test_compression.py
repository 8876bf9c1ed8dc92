"""Participative compression: which tokens stay, at which positions they are read, and what is really attended."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.bank import CHOSEN
from cfjax.memory.compression import DeepForcing, participation
from cfjax.memory.policies import DeepSink
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from tests.memory.states import LAYOUT, TOKENS, streamed
from tests.memory.test_heads import (
    DIM,
    FRAMES,
    HEADS,
    SHAPE,
    attended,
    keys_and_values,
    rolled,
    softmax_attention,
    turn,
    turned,
)
from tests.tiny import BATCH, normal, relative

CHUNK = Blocks(3)
SMALL = DeepForcing(8, 2, capacity=6, recent=3)  # six slots; four once tokens are chosen, one of them of tokens


def run(*spans) -> tuple[int, ...]:
    """Frames of some inclusive runs."""
    return tuple(x for a, b in spans for x in range(a, b + 1))


def test_deep_forcing_sees_what_the_public_code_lets_it_see():
    """Blocks of 3: 16 frames when tokens have just been chosen, 19 in the block after, then 16 again."""
    code, paper, chosen = DeepForcing(gap=3), DeepForcing(), (CHOSEN, CHOSEN)
    plan = code.plan(30, CHUNK)
    assert plan[6].frames == plan[6].positions == run((0, 17))
    assert plan[7][1:] == ((*run((0, 9)), *chosen, 20), (*run((5, 14)), *chosen, 20), (21, 22, 23))
    assert plan[8].frames == (*run((0, 9)), *chosen, *run((20, 23)))
    assert plan[8].positions == (*run((5, 14)), *chosen, *run((20, 23)))
    assert plan[9][1:3] == ((*run((0, 9)), *chosen, 26), (*run((11, 20)), *chosen, 26))
    assert paper.plan(30, CHUNK)[7].positions == (*run((8, 17)), *chosen, 20)
    assert replace(paper, window=100).plan(30, CHUNK) == DeepSink(100).plan(30, CHUNK)  # nothing has to leave


def simulated(k: np.ndarray, q: np.ndarray, layer: int, row: int) -> list[tuple[list[tuple[int, int]], int]]:
    """In NumPy: before every block, the (frame, token) pairs behind the sink, and how many frames' worth it sees."""
    turned_k, sums = turned(k)[layer, row], turned(q)[layer, row].sum(1)
    behind, count, found = list[tuple[int, int]](), 0, []
    for start in range(0, FRAMES, 2):
        found.append((list(behind), count))
        behind += [(f, t) for f in (start, start + 1) if f >= SMALL.sink for t in range(TOKENS)]
        count += 2
        if count > 6:
            queries = sums[max(start - 1, 0) : start + 2].sum(0)  # of the last three frames
            score = {(f, t): (queries * turned_k[f, t]).sum() for f, t in behind}
            whole = [pair for pair in behind if pair[0] == start + 1]
            pool = [pair for pair in behind if pair not in whole]
            best = sorted(pool, key=lambda pair: -score[pair])[:TOKENS]
            behind, count = [pair for pair in pool if pair in best] + whole, 4
    return found


def test_deep_forcing_attends_to_what_it_says():
    """Against a softmax in NumPy, of every block, layer, head and video; each layer and video has tokens of its own."""
    k, v = keys_and_values()
    q = np.asarray(normal(5, k.shape)) + 0.3
    turned_q, turned_k = turned(q), turned(k)
    states = rolled(SMALL, k, v, q)
    plan, worst, kept = SMALL.plan(FRAMES, LAYOUT), 0.0, set()
    for number, start in enumerate(range(0, FRAMES, 2)):
        state, own = states[number], slice(start, start + 2)
        told = plan[number]
        assert tuple(np.asarray(state.frame_F)[: int(state.count)].tolist()) == told.frames
        found = attended(SMALL, state, start, *(x[:, :, own] for x in (q, k, v)))
        sink = [(f, p) for f, p in zip(told.frames, told.positions, strict=True) if 0 <= f < 2]
        for layer, row in np.ndindex(len(k), BATCH):
            behind, count = simulated(k, q, layer, row)[number]
            assert count == len(told.frames)
            kept.add(tuple(behind[:TOKENS])) if number == 4 else None
            for head in range(HEADS):
                at_sink = [np.asarray(turn(jnp.asarray(k[layer, row, None, f, None]), jnp.array([p])))[0, 0, :, head]
                           for f, p in sink]  # fmt: skip
                keys = [*at_sink, *(turned_k[layer, row, f, t, head][None] for f, t in behind)]
                values = [
                    *(v[layer, row, f, :, head] for f, _ in sink),
                    *(v[layer, row, f, t, head][None] for f, t in behind),
                ]
                keys = np.concatenate([*keys, *turned_k[layer, row, own, :, head]])
                values = np.concatenate([*values, *v[layer, row, own, :, head]])
                wanted = softmax_attention(turned_q[layer, row, own, :, head], keys, values)
                worst = max(worst, np.abs(found[layer, row, :, :, head] - wanted).max())
    print(f"deep_forcing: {worst:.1e}")
    assert worst < 5e-6 and len(kept) == len(k) * BATCH


def test_scores_do_not_depend_on_a_common_rotation():
    """All positions later by the same number, of keys and queries: the same scores."""
    k, q = normal(0, (1, 3, TOKENS, HEADS, DIM)), normal(1, (1, 2, TOKENS, HEADS, DIM))
    found = []
    for later in (0, 50):
        queries = rotate_time(q, jnp.arange(3, 5) + later).sum((1, 2))
        position = jnp.broadcast_to((jnp.arange(3) + later)[:, None], (1, 3, TOKENS))
        found.append(participation(k, position, queries))
    assert relative(*found) < 2e-5


def test_committing_a_block_again_changes_nothing():
    """Bit for bit, where tokens are chosen too."""
    k, v = keys_and_values()
    once, twice = (rolled(SMALL, k, v, again=again)[-1] for again in (False, True))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokens_that_were_not_chosen_are_forgotten():
    """Values of frames that lost all their tokens, or some, leave no trace but in those that were chosen."""
    k, v = keys_and_values()
    states = rolled(SMALL, k, v)
    assert len({tuple(x.shape for x in jax.tree.leaves(state)) for state in states}) == 1
    marked = np.broadcast_to(np.arange(FRAMES * TOKENS, dtype=np.float32).reshape(FRAMES, TOKENS, 1, 1), v.shape)
    state = rolled(SMALL, k, marked)[5]
    for layer, row in np.ndindex(len(k), BATCH):
        behind, count = simulated(k, k, layer, row)[5]
        held = np.asarray(state.v)[layer, row, SMALL.sink : count, :, 0, 0].ravel()
        assert held.tolist() == [frame * TOKENS + token for frame, token in behind]


@pytest.mark.slow
def test_a_network_with_deep_forcing():
    """The queries of the network reach it; videos do not meet, and the time does not matter."""
    inputs = normal(1, SHAPE), normal(2, SHAPE)
    state, flow = streamed(SMALL, *inputs)
    full = streamed(None, *inputs)[1]
    assert relative(flow[:, :8], full[:, :8]) < 2e-6 and relative(flow[:, 8:], full[:, 8:]) > 1e-3
    assert np.asarray(state.frame_F).tolist()[2] == CHOSEN and np.abs(state.extra.query_LBFNK).min() > 0
    late, flow_late = streamed(SMALL, *inputs, start=10_000)
    assert relative(flow_late, flow) < 2e-5  # angles of frame 10,000 in float32
    slots = slice(SMALL.sink, int(state.count))
    np.testing.assert_array_equal(
        late.extra.position_LBFT[:, :, slots] - 10_000, state.extra.position_LBFT[:, :, slots]
    )
    _, changed = streamed(SMALL, inputs[0].at[1].add(1.0), inputs[1].at[1].add(1.0))
    assert relative(changed[0], flow[0]) < 2e-6 and relative(changed[1], flow[1]) > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": 14}, "capacity=14 must be more than sink=10 and recent=4 together, and at most window=21"),
        ({"capacity": 22}, "capacity=22 must be"),
        ({"recent": 2}, "needs recent=3 or more"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        replace(DeepForcing(), **changes).slots(CHUNK)
