"""Policies in which groups of heads see different frames: golden tables, and what is really attended."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.bank import CHOSEN
from cfjax.memory.codecs import Codec
from cfjax.memory.heads import GROUPS, DummyForcing, ForcingKV, most_changed, sort_heads
from cfjax.memory.names import blocks_record, memory_name, parse_memory
from cfjax.memory.profile import HeadTable, heads_record, read_heads
from cfjax.memory.slots import Memory
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from tests.memory.states import LAYOUT, ROW, TOKENS, layout, streamed
from tests.tiny import BATCH, CONFIG, SIDE, normal, relative

CHUNK = Blocks(3)
FRAMES, HEADS, DIM = 12, 2, CONFIG.head_dim
DEEP = replace(CONFIG, num_layers=3)
TABLE = HeadTable("table", ((False, False), (True, False), (False, False)), DIM, "a run")
FLAT = HeadTable("flat", ((True, True), (False, True)), DIM, "a run")  # of the tiny network
PUBLIC = HeadTable("public", ((True,),), 1, "a run")
SHAPE = (BATCH, FRAMES, SIDE, SIDE, CONFIG.in_dim)

turn = jax.jit(rotate_time)


def turned(x: np.ndarray) -> np.ndarray:
    """[L, B, F, T, N, K], rotated at the frames' own positions."""
    rows = jnp.asarray(x.reshape(-1, *x.shape[2:]))
    return np.asarray(turn(rows, jnp.arange(x.shape[2]))).reshape(x.shape)


def keys_and_values(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys that are not rotated in time, and values, [L, B, F, T, N, K]."""
    shape = (DEEP.num_layers, BATCH, FRAMES, TOKENS, HEADS, DIM)
    return np.asarray(normal(seed, shape)), np.asarray(normal(seed + 1, shape))


@partial(jax.jit, static_argnames="memory")
def commit(state, q, k, v, start, text, *, memory: Memory):
    """A block's keys, values and queries, not rotated in time: one program for all states of a policy."""
    blocks, frames = layout(memory), LAYOUT.frames
    at = memory.own_positions(state, start, frames)
    q, k = (jax.vmap(rotate_time, (0, None))(x, at) for x in (q, k))
    observe = memory.observer(DEEP, state, start, frames, blocks)
    seen = observe and jax.lax.map(lambda x: observe(*x), (q, k, jnp.arange(len(k))))
    return memory.commit(state, k, v, start, text, seen)


def rolled(memory: Memory, k: np.ndarray, v: np.ndarray, q: np.ndarray | None = None, *, again: bool = False):
    """The states before every block and after the last, of blocks of two frames committed with these keys and queries.

    They are not rotated in time; without queries, keys are taken for them.
    """
    frames, q = LAYOUT.frames, k if q is None else q
    text = normal(9, (len(k), BATCH, HEADS, DIM))
    state = memory.init(DEEP, BATCH, TOKENS, layout(memory), ROW)
    states = [state]
    for start in range(0, k.shape[2], frames):
        own = slice(start, start + frames)
        for _ in range(2 if again else 1):
            state = commit(state, *(x[:, :, own] for x in (q, k, v)), jnp.int32(start), text, memory=memory)
        states.append(state)
    return states


@partial(jax.jit, static_argnames="memory")
def attend(state, start, q, k, v, *, memory: Memory):
    at = memory.own_positions(state, start, 2)
    self_attend = memory.attention(DEEP, state, start, 2, layout(memory))
    one = lambda q, k, v, layer: self_attend(rotate_time(q, at), rotate_time(k, at), v, layer)
    return jax.lax.map(lambda x: one(*x), (q, k, v, jnp.arange(len(q))))


def attended(memory: Memory, state, start: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The attention of a block of two frames, layer by layer, [L, B, F, T, N, K]; q and k not rotated in time."""
    return np.asarray(attend(state, jnp.int32(start), q, k, v, memory=memory))


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head of one video: queries [F, T, K] against keys [S, K]."""
    scores = q @ k.T * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


# ---- Forcing-KV


def public(**changes) -> ForcingKV:
    return ForcingKV(profile=PUBLIC, **changes)


def seen(group: str, block: int) -> tuple[int, ...]:
    return public().plan(3 * (block + 1), CHUNK, group)[block].frames


def test_forcing_kv_sees_what_the_public_code_lets_it_see():
    """Blocks of 3: sink, the newest frame, and runs of three frames before that; before the third block none yet."""
    assert [seen("static", block) for block in (0, 1, 2, 3, 8)] == [(), (0, 2), (0, 5), (0, 8), (0, 23)]
    assert [seen("dynamic", block) for block in (1, 2)] == [(0, 2), (0, 5)]
    assert [seen("dynamic", block) for block in (3, 8)] == [(0, 8, CHOSEN), (0, 23, CHOSEN)]
    assert public().candidates(9, CHUNK) == (5, 6, 7) and public().candidates(24, CHUNK) == (20, 21, 22)
    assert public().plan(9, CHUNK)[2].own == (6, 7, 8)


def chosen_runs(k: np.ndarray, start: int, runs: int, number: int) -> list[list[tuple[int, int]]]:
    """Of each video, the (frame, run) that the commit of the block at `start` keeps, by layer 1's dynamic head."""
    found, length = [], TOKENS // runs
    for row in k[1, :, :, :, 1]:  # [F, T, K]
        scores = {}
        for frame in range(start - 1, start + 1):
            for i in range(runs):
                a, b = (row[f, i * length : (i + 1) * length] for f in (frame, frame + 1))
                cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
                scores[frame, i] = cosine.mean()
        found.append(sorted(sorted(scores, key=lambda run: scores[run])[:number]))
    return found


def test_forcing_kv_attends_to_what_it_says():
    """Against a softmax in NumPy, of every block, layer and head; every video has runs of its own."""
    memory = ForcingKV(5, 1, profile=TABLE, dynamic=1, runs=2)
    k, v = keys_and_values()
    q = np.asarray(normal(5, k.shape))
    states = rolled(memory, k, v)
    turned_q, turned_k = turned(q), turned(k)
    plans = {group: memory.plan(FRAMES, LAYOUT, group) for group in ("static", "dynamic")}
    worst, own_choices = 0.0, False
    for number, start in enumerate(range(0, FRAMES, 2)):
        own = slice(start, start + 2)
        found = attended(memory, states[number], start, *(x[:, :, own] for x in (q, k, v)))
        runs = chosen_runs(k, start - 2, 2, 2) if number > 2 else [[], []]
        own_choices |= number > 2 and runs[0] != runs[1]
        for layer, row, head in np.ndindex(3, BATCH, HEADS):
            dynamic = layer > 0 and not TABLE.static_LN[layer][head]
            told = plans["dynamic" if dynamic else "static"][number].frames
            assert (CHOSEN in told) == (dynamic and number > 2)
            parts = [(f, slice(None)) for f in told if f != CHOSEN] + [
                (f, slice(None)) for f in range(start, start + 2)
            ]
            if dynamic:
                parts += [(frame, slice(2 * i, 2 * i + 2)) for frame, i in runs[row]]
            keys, values = (
                np.concatenate([x[layer, row, frame, tokens, head] for frame, tokens in parts]) for x in (turned_k, v)
            )
            wanted = softmax_attention(turned_q[layer, row, own, :, head], keys, values)
            worst = max(worst, np.abs(found[layer, row, :, :, head] - wanted).max())
    print(f"forcing_kv: {worst:.1e}")
    assert worst < 5e-6 and own_choices


def test_runs_of_everything_are_a_longer_window():
    """With as many runs as leave, a dynamic head is one of a window that is a block longer, and a static one is not."""
    k, v = keys_and_values()
    q = np.asarray(normal(5, k.shape))[:, :, 10:]
    memory, window = ForcingKV(6, 1, profile=TABLE, dynamic=2, runs=2), Memory(6, 1)
    one, other = (attended(m, rolled(m, k, v)[5], 10, q, k[:, :, 10:], v[:, :, 10:]) for m in (memory, window))
    assert relative(one[2], other[2]) < 2e-6 and relative(one[1, ..., 1, :], other[1, ..., 1, :]) < 2e-6
    assert relative(one[1, ..., 0, :], other[1, ..., 0, :]) > 0.01


def test_heads_that_are_all_static_have_a_window():
    """A group may be empty in every layer."""
    k, v = keys_and_values()
    q = np.asarray(normal(5, k.shape))[:, :, 10:]
    static = replace(TABLE, static_LN=((True, True),) * 3)
    one, other = (
        attended(m, rolled(m, k, v)[5], 10, q, k[:, :, 10:], v[:, :, 10:])
        for m in (ForcingKV(5, 1, profile=static, runs=2), Memory(4, 1))
    )
    assert relative(one, other) < 2e-6


def test_what_does_not_move_has_ties_that_the_earlier_runs_win():
    still = jnp.broadcast_to(normal(0, (1, 1, TOKENS, 2, DIM)), (1, 3, TOKENS, 2, DIM))
    assert most_changed(still, 2, 2, 2).tolist() == [[0, 1]]
    moved = still.at[0, 2, 2:].set(normal(1, (TOKENS - 2, 2, DIM)))  # the second half, from the second frame on
    assert most_changed(moved, 2, 2, 2).tolist() == [[0, 3]]


def test_heads_are_sorted_and_come_back():
    group_LN = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]])
    groups = sort_heads(group_LN, 2)
    assert [heads.shape for heads in groups.heads] == [(3, 4), (3, 3)]
    for layer, row in enumerate(group_LN):
        sorted_heads = np.concatenate([heads[layer] for heads in groups.heads])
        assert sorted_heads[groups.place_LN[layer]].tolist() == [0, 1, 2, 3]
        assert all(
            (groups.place_LN[layer][head] >= groups.heads[0].shape[1]) == bool(group) for head, group in enumerate(row)
        )


# ---- Dummy Forcing


def test_dummy_forcing_sees_what_the_public_code_lets_it_see():
    """Blocks of 3, grouped at the commit of the second."""
    of = lambda group, block: DummyForcing().plan(27, CHUNK, group)[block].frames
    assert [of(group, 1) for group in GROUPS] == [(0, 1, 2)] * 3
    assert [of(group, 2) for group in GROUPS] == [(0,), (3, 4, 5), (5,)]
    assert [of(group, 8) for group in GROUPS] == [(0,), (21, 22, 23), (23,)]
    assert DummyForcing().plan(27, CHUNK)[8].positions == (0, 21, 22, 23)


def grouped(q: np.ndarray, k: np.ndarray, row: int, dummies: int) -> np.ndarray:
    """In NumPy: every head's group, [L, N], by the attention of the second block of a video."""
    shares = np.zeros((len(k), HEADS, 2))
    for layer, head in np.ndindex(len(k), HEADS):
        scores = np.einsum("ftk,gsk->ftgs", q[layer, row, 2:4, :, head], k[layer, row, :4, :, head]) * DIM**-0.5
        weights = np.exp(scores)
        mass = (weights / weights.sum((-2, -1), keepdims=True)).sum(-1).mean((0, 1))
        shares[layer, head] = mass[:2]
    shares /= shares.sum((0, 1))
    groups = np.where(shares[..., 0] >= shares[..., 1], 0, 1)
    groups[shares.max(-1) <= np.sort(shares.max(-1).ravel())[dummies - 1]] = 2
    return groups


def test_dummy_forcing_attends_to_what_it_says():
    """Against a softmax in NumPy, of every block, layer and head; every video has groups of its own."""
    memory = DummyForcing(5, 1, dummies=1 / 3)
    k, v = keys_and_values()
    q = np.asarray(normal(5, k.shape))
    states = rolled(memory, k, v, q)
    turned_q, turned_k = turned(q), turned(k)
    groups_BLN = np.stack([grouped(turned_q, turned_k, row, 2) for row in range(BATCH)])
    np.testing.assert_array_equal(states[2].extra.group_LBN, groups_BLN.swapaxes(0, 1) + 1)
    assert (groups_BLN[0] != groups_BLN[1]).any() and set(groups_BLN.ravel().tolist()) == {0, 1, 2}
    plans, worst = [memory.plan(FRAMES, LAYOUT, group) for group in GROUPS], 0.0
    for number, start in enumerate(range(0, FRAMES, 2)):
        own = slice(start, start + 2)
        found = attended(memory, states[number], start, *(x[:, :, own] for x in (q, k, v)))
        for layer, row, head in np.ndindex(3, BATCH, HEADS):
            frames = [*plans[groups_BLN[row, layer, head]][number].frames, start, start + 1]
            keys, values = (np.concatenate(x[layer, row, frames, :, head]) for x in (turned_k, v))
            wanted = softmax_attention(turned_q[layer, row, own, :, head], keys, values)
            worst = max(worst, np.abs(found[layer, row, :, :, head] - wanted).max())
    print(f"dummy_forcing: {worst:.1e}")
    assert worst < 5e-6


def test_heads_that_are_never_grouped_have_a_window():
    k, v = keys_and_values()
    q = np.asarray(normal(5, k.shape))[:, :, 10:]
    one, other = (
        attended(m, rolled(m, k, v)[5], 10, q, k[:, :, 10:], v[:, :, 10:])
        for m in (DummyForcing(5, 1, warmup=100), Memory(5, 1))
    )
    assert relative(one, other) < 2e-6


# ---- laws of both

SMALL = {
    "forcing_kv": ForcingKV(5, 1, profile=TABLE, runs=2),
    "dummy_forcing": DummyForcing(5, 1),
    "dummy_int8": DummyForcing(5, 1, Codec("int8")),
}


@pytest.mark.parametrize("name", SMALL)
def test_committing_a_block_again_changes_nothing(name):
    """Bit for bit."""
    once, twice = (rolled(SMALL[name], *keys_and_values(), again=again)[-1] for again in (False, True))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_what_left_is_forgotten(name):
    """Frames that no head sees any more leave no trace; a state does not grow."""
    memory, (k, v) = SMALL[name], keys_and_values()
    states, changed = rolled(memory, k, v), k.copy()
    changed[:, :, 4:6] += 1.0
    for a, b in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(rolled(memory, changed, v)[-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({tuple(x.shape for x in jax.tree.leaves(state)) for state in states}) == 1


def test_what_is_committed_again_is_as_it_was():
    """After a change of the prompt to the same: as many of the newest blocks as the choice of runs needs."""
    memory, (k, v) = SMALL["forcing_kv"], keys_and_values()
    state, turned_k = rolled(memory, k, v)[-1], turned(k)
    after, commit = memory.forget(state), jax.jit(memory.commit)
    assert memory.missing(after, LAYOUT) == 3  # frames: two blocks
    for start in (8, 10):
        after = commit(after, turned_k[:, :, start : start + 2], v[:, :, start : start + 2], jnp.int32(start))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",  # six slots: nothing has left before the fifth block
    [ForcingKV(9, 1, profile=FLAT, runs=2), DummyForcing(8, 1, warmup=3)],
    ids=["forcing_kv", "dummy_forcing"],
)
def test_a_network(memory):
    """One that leaves nothing out has the flows of a full cache; videos do not meet; the time does not matter."""
    inputs = normal(1, SHAPE), normal(2, SHAPE)
    _, flow = streamed(memory, *inputs)
    assert relative(flow[:, :8], streamed(None, *inputs)[1][:, :8]) < 2e-6
    _, late = streamed(memory, *inputs, start=10_000)
    assert relative(late, flow) < 2e-5  # angles of frame 10,000 in float32
    _, changed = streamed(memory, inputs[0].at[1].add(1.0), inputs[1].at[1].add(1.0))
    assert relative(changed[0], flow[0]) < 2e-6 and relative(changed[1], flow[1]) > 0.01


# ---- tables


def write_table(tmp_path, network=DEEP, **changes) -> str:
    mass = np.full((network.num_layers, network.num_heads, 6), 1 / 6)
    mass[1, 0] = [0.5, 0.01, 0.01, 0.02, 0.06, 0.4]
    record = heads_record("a run", network, mass, {"sink": 1, "recent": 2, "threshold": 0.8}) | changes
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(record))
    return str(file)


def test_a_policy_reads_its_table(tmp_path):
    """0.46 / 0.5 of head 0 in layer 1 is recent, 2 / 5 of every other's; the text of the policy names the file."""
    path = write_table(tmp_path)
    memory = parse_memory(f"forcing_kv(profile={path}, runs=2)")
    assert memory.profile.static_LN == ((False, False), (True, False), (False, False))
    assert memory_name(memory) == f"forcing_kv(profile={path}, runs=2)" and parse_memory(memory_name(memory)) == memory
    memory.check(DEEP)
    other = parse_memory(f"forcing_kv(profile={write_table(tmp_path, static=[[True, True]] * 3)}, runs=2)")
    before, after = (blocks_record(replace(CHUNK, memory=m)) for m in (memory, other))
    assert before["memory"] == after["memory"] and before["heads"] != after["heads"]  # the file is another one
    with pytest.raises(UserError, match=r"heads\.json: it is of 3 layers of 2 heads of 12 channels \(a run\), and the"):
        memory.init(CONFIG, 1, TOKENS, layout(memory))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "kind is 'other'"),
        ({"static": [[True, False]]}, "static must have a row for each of 3 layers and 2 heads"),
        ({"static": [[1, 0]] * 3}, r"static\[0\]\[0\] is 1; it must be true or false"),
        ({"share": [[2.0, 0.0]] * 3}, r"share\[0\]\[0\] is 2.0"),
    ],
)
def test_a_table_that_is_none_is_said(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_heads(write_table(tmp_path, **changes))


def test_a_missing_table_is_said(tmp_path):
    with pytest.raises(UserError, match=r"profile=.*none\.json: cannot be read .* cfjax profile_heads writes one"):
        parse_memory(f"forcing_kv(profile={tmp_path / 'none.json'})")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": HeadTable()}, "needs profile=FILE"),
        ({"window": 5}, r"window=5 must hold the sink, a frame, dynamic=1 and one block: at least 6"),
        ({"dynamic": 4}, "dynamic=4: use at most 3"),
        ({"dynamic": 0}, "dynamic=0: use 1 or more"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        replace(public(), **changes).slots(CHUNK)


def test_runs_divide_a_frame():
    """Three would not: two runs of two of the four tokens."""
    state = ForcingKV(profile=TABLE, runs=3).init(DEEP, 1, TOKENS, CHUNK)
    assert state.extra.k.shape == (3, 1, 2, 2, 2, DIM)
