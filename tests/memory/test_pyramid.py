"""Anchor, wave and veil heads: golden tables of the public code, and what is really attended."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.sharding import make_mesh, on_mesh
from cfjax.memory.compression import DeepForcing
from cfjax.memory.names import memory_name, parse_memory
from cfjax.memory.profile import LABELS, HeadLabels
from cfjax.memory.pyramid import PyramidHeads, merge_tokens, squares_of
from cfjax.memory.slots import MERGED
from cfjax.nn.rope import rope_table, rotate
from cfjax.nn.visibility import Blocks
from tests.memory.states import LAYOUT, TOKENS, layout, streamed
from tests.memory.test_heads import (
    DEEP,
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
from tests.memory.test_heads import SMALL as HEAD_POLICIES
from tests.tiny import BATCH, CONFIG, normal, relative

CHUNK = Blocks(3)
TABLE = HeadLabels("table", ((1, -1), (2, 1), (-1, 2)))
KINDS = {label: kind for kind, label in LABELS.items()}
PUBLIC = PyramidHeads(profile=HeadLabels("public", ((1,),)))
# Three slots: a sink of two, the newest frame; two frames between
SMALL = PyramidHeads(7, 2, profile=TABLE, period=3, capacity=2, merged=2, near=2, far=4, patch=1)


def test_what_is_kept_is_what_the_public_code_keeps():
    """After 27 frames: every sixth; the last four of each remainder; means of four, named by their last frames."""
    assert PUBLIC.kept_between("anchor", 27) == [6, 12, 18, 24]
    assert PUBLIC.kept_between("veil", 27) == [11, 15, 19, 23]
    wave = PUBLIC.kept_between("wave", 27)
    assert [[t for t in wave if t % 6 == phase] for phase in (0, 3)] == [[6, 12, 18, 24], [3, 9, 15, 21]]
    assert [PUBLIC.far_position(t, np) for t in (0, 18, 21, 24, 30, 69)] == [0, 0, 0, 3, 9, 48]


def test_what_a_block_sees():
    """The ninth: its first frame, 24, and its second; what is among the newest is not seen twice."""
    told = PUBLIC.plan(27, CHUNK)[8]
    assert told.frames == (0, 1, 2, 23, 6, 12, 18) and told.positions == (3, 3, 3, 23, 3, 3, 3)
    assert PUBLIC.plan(27, CHUNK, "veil")[8].frames == (0, 1, 2, 23, MERGED, MERGED, MERGED)
    assert PUBLIC.plan(27, CHUNK, "wave")[8].frames == (0, 23, 6, 12, 18)
    told = PUBLIC.plan(27, CHUNK, "wave", 1)[8]
    assert told.frames == (0, 23, 1, 7, 13, 19) and told.positions == (4, 23, 4, 4, 4, 4)
    assert PUBLIC.plan(27, CHUNK, "wave")[0].frames == () and PUBLIC.plan(27, CHUNK, "wave")[1].frames == (0, 2)


def first_place(x: np.ndarray) -> np.ndarray:
    """Keys [..., T, N, K] of a frame of two rows and columns, all rotated to the place of the first."""
    cos, sin = rope_table(jnp.zeros(1, jnp.int32), 2, 2, x.shape[-1])
    return np.asarray(rotate(jnp.asarray(x.reshape(-1, *x.shape[-3:])), (cos, -sin))).reshape(x.shape)


@pytest.mark.parametrize("patch", [1, 2])
def test_pyramid_attends_to_what_it_says(patch):
    """Against a softmax in NumPy, of every frame, layer, head and video, with means of keys and values.

    A frame has 2 x 2 tokens: with patch=2 a mean is one key and one value.
    """
    k, v = keys_and_values()
    q, placed = np.asarray(normal(5, k.shape)), first_place(k)
    memory = replace(SMALL, patch=patch)
    states = rolled(memory, k, v)
    turned_q, turned_k, worst, means = turned(q), turned(k), 0.0, 0
    at = lambda x, position: np.asarray(turn(jnp.asarray(x[None, None, :, None]), jnp.array([position])))[0, 0, :, 0]
    for number, start in enumerate(range(0, FRAMES, 2)):
        own = slice(start, start + 2)
        found = attended(memory, states[number], start, *(x[:, :, own] for x in (q, k, v)))
        for layer, row, head, frame in np.ndindex(3, BATCH, HEADS, 2):
            kind = KINDS[TABLE.label_LN[layer][head]]
            told = SMALL.plan(FRAMES, LAYOUT, kind, frame)[number]
            last = iter(t for t in SMALL.kept_between(kind, start) if t < start - 1)
            keys, values = [], []
            for t, position in zip(told.frames, told.positions, strict=True):
                known = [x[layer, row, :, :, head] for x in (k, v)]
                if t == MERGED:
                    end = next(last)
                    means += 1
                    known[0] = placed[layer, row, :, :, head] if patch > 1 else known[0]
                    key, value = (x[end - 1 : end + 1].mean(0) for x in known)
                    if patch > 1:
                        key, value = (x.mean(0, keepdims=True) for x in (key, value))
                else:
                    key, value = (x[t] for x in known)
                keys.append(at(key, position))
                values.append(value)
            keys = np.concatenate([*keys, *turned_k[layer, row, own, :, head]])
            values = np.concatenate([*values, *v[layer, row, own, :, head]])
            wanted = softmax_attention(turned_q[layer, row, start + frame, :, head], keys, values)
            worst = max(worst, np.abs(found[layer, row, frame, :, head] - wanted).max())
    print(f"pyramid: {worst:.1e}")
    assert worst < 5e-6 and means > 0


def test_a_square_is_one_token_at_the_place_of_its_first():
    """As in the public code's test, 4 x 2 tokens are two squares; and an odd grid has smaller ones at its edges.

    Keys that were rotated to their own places come out as the mean of the raw keys, rotated to the first one's place.
    """
    two = squares_of(8, 2, 2)
    assert two.square.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and two.sizes.tolist() == [4, 4]
    for height, width in ((4, 2), (3, 5)):
        squares, raw = squares_of(height * width, width, 2), np.asarray(normal(7, (2, 1, height * width, 2, 16)))
        cos, sin = rope_table(jnp.zeros(1, jnp.int32), height, width, 16)
        first = [int(np.argmax(squares.square == square)) for square in range(len(squares.sizes))]
        assert [(t // width % 2, t % width % 2) for t in first] == [(0, 0)] * len(first)
        mean = np.stack([raw[:, 0, squares.square == square].mean(1) for square in range(len(first))], axis=1)
        found = merge_tokens(rotate(raw[:, 0], (cos, sin))[:, None], squares, width, 2, keys=True)
        assert relative(found[:, 0], rotate(mean, (cos[np.array(first)], sin[np.array(first)]))) < 2e-6
        values = merge_tokens(jnp.asarray(raw), squares, width, 2, keys=False)
        np.testing.assert_allclose(values[:, 0], mean, atol=1e-6)


def test_squares_need_to_know_a_row():
    with pytest.raises(ValueError, match="width=0: patch=2 needs the tokens of a row, of 4"):
        replace(SMALL, patch=2).init(DEEP, 1, TOKENS, LAYOUT)


def test_heads_may_all_be_of_one_kind():
    """Anchors, whose groups of waves and veils are empty in every layer, are those of a table with all three."""
    k, v = keys_and_values()
    own, anchors = slice(10, 12), replace(SMALL, profile=HeadLabels("anchors", ((1, 1),) * 3), patch=2)
    one, other = (
        attended(memory, rolled(memory, k, v)[5], 10, *(x[:, :, own] for x in (k, k, v))) for memory in (SMALL, anchors)
    )
    assert relative(one[0, ..., 0, :], other[0, ..., 0, :]) < 2e-6 < relative(one[2], other[2])


def test_a_mean_of_equal_frames_is_that_frame():
    """And so veil heads whose frames are all alike have the slots' keys between, too."""
    k, v = (np.repeat(x[:, :, :1], FRAMES, axis=2) for x in keys_and_values())
    state = rolled(SMALL, k, v)[-1]
    veil, heads = state.extra.kept[2], SMALL.groups.heads[2]
    assert veil.frame_F.tolist() == [9, 11]
    for layer, head in ((1, 0), (2, 1)):
        np.testing.assert_allclose(veil.v[layer, :, 0, :, 0], v[layer, :, 0, :, head], atol=1e-6)
        np.testing.assert_allclose(veil.k[layer, :, 0, :, 0], k[layer, :, 0, :, head], atol=1e-5)
        assert heads[layer, 0] == head


def test_committing_a_block_again_changes_nothing():
    """Bit for bit; and blocks that are committed once more under another prompt are not taken in twice."""
    k, v = keys_and_values()
    once, twice = (rolled(SMALL, k, v, again=again)[-1] for again in (False, True))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(a, b)
    commit = jax.jit(SMALL.commit)
    again = commit(SMALL.forget(once), turned(k)[:, :, 10:], v[:, :, 10:], jnp.int32(10))
    for a, b in zip(jax.tree.leaves(again.extra), jax.tree.leaves(once.extra), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.frame_F.tolist() == once.frame_F.tolist() and int(again.count) == int(once.count)


def test_what_left_is_forgotten():
    """A frame that is neither strided, nor of a kept remainder, nor among the last means leaves no trace."""
    k, v = keys_and_values()
    states, changed = rolled(SMALL, k, v), k.copy()
    changed[:, :, 4] += 1.0  # 4 = 1 modulo 3, after which 7 and 10 came; its mean made room for others
    for a, b in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(rolled(SMALL, changed, v)[-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({tuple(x.shape for x in jax.tree.leaves(state)) for state in states}) == 1


@pytest.mark.slow
def test_a_network_with_pyramid_heads():
    """Late enough, the time does not matter but for its remainders; videos do not meet."""
    inputs = normal(1, SHAPE), normal(2, SHAPE)
    memory = replace(SMALL, profile=HeadLabels("flat", ((1, 2), (-1, 1))))
    _, flow = streamed(memory, *inputs, start=600)
    _, late = streamed(memory, *inputs, start=6000)
    assert relative(late, flow) < 2e-5
    _, changed = streamed(memory, inputs[0].at[1].add(1.0), inputs[1].at[1].add(1.0), start=600)
    assert relative(changed[0], flow[0]) < 2e-6 and relative(changed[1], flow[1]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"context": 2}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize(
    "memory",
    [*HEAD_POLICIES.values(), DeepForcing(8, 2, capacity=6, recent=3), SMALL],
    ids=[*HEAD_POLICIES, "deep_forcing", "pyramid"],
)
def test_attention_on_a_mesh(memory, axes):
    """Groups of one head are not cut into two: their tokens are."""
    k, v = keys_and_values()
    state, own = rolled(memory, k, v)[5], slice(10, 12)
    work = (memory, state, 10, k[:, :, own] + 1, k[:, :, own], v[:, :, own])
    expected = attended(*work)
    with on_mesh(make_mesh(**axes, devices=jax.devices()[: 2 if "context" in axes else 4])):
        assert relative(attended(*work), expected) < 2e-6


# ---- tables and settings


def test_a_policy_reads_its_labels(tmp_path):
    file = tmp_path / "best_labels.csv"
    file.write_text("1,-1\n2,1\n-1,2\n")
    memory = parse_memory(f"pyramid(profile={file}, period=3)")
    assert memory.profile.label_LN == TABLE.label_LN and memory_name(memory) == f"pyramid(profile={file}, period=3)"
    memory.check(DEEP)
    with pytest.raises(UserError, match=r"labels for 3 layers of 2 heads, and the network has 2 of 2"):
        memory.init(CONFIG, 1, TOKENS, layout(memory))
    for text, message in (("1,0\n", "'0' is no label"), ("1\n1,1\n", "as many labels"), ("", "a line for every layer")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            parse_memory(f"pyramid(profile={file})")
    with pytest.raises(UserError, match="cannot be read"):
        parse_memory(f"pyramid(profile={tmp_path / 'none.csv'})")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": HeadLabels()}, "needs profile=FILE.csv"),
        ({"window": 10}, "at least 11"),
        ({"period": 0}, "period=0: use 1 or more"),
        ({"near": 22}, "near=22: use 0 or more, at most far=21"),
        ({"patch": 0}, "patch=0: use 1 or more"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        replace(PUBLIC, **changes).slots(CHUNK)
