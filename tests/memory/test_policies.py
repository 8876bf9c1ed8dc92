"""Memory policies: who sees whom at which positions (golden tables of public codes), and what is really attended."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.bank import MemoryBank
from cfjax.memory.codecs import Codec
from cfjax.memory.names import POLICIES, memory_name, parse_memory
from cfjax.memory.policies import ContextRecompute, DeepSink, EmaSink, MemoryTokens, RollingSink, SlotRelative
from cfjax.memory.slots import MERGED, Memory, rotate_rows
from cfjax.models.cache import init_cache
from cfjax.models.context import clean_context
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from tests.memory.states import LAYOUT, TOKENS, committed, layout, stream, streamed
from tests.tiny import BATCH, CONFIG, SIDE, normal, relative, text_kv, tiny

CHUNK = Blocks(3)


def seen(memory: Memory, block: int, blocks: Blocks = CHUNK):
    return memory.plan(blocks.frames * (block + 1), blocks)[block]


def run(*spans) -> tuple[int, ...]:
    """Frames of some inclusive runs."""
    return tuple(x for a, b in spans for x in range(a, b + 1))


# ---- golden tables: frames that each block sees before its own, and positions


@pytest.mark.parametrize(
    ("window", "sink", "block", "frames"),
    [
        (21, 3, 6, run((0, 17))),
        (21, 3, 7, run((0, 2), (6, 20))),
        (21, 3, 8, run((0, 2), (9, 23))),
        (21, 0, 7, run((3, 20))),
        (21, 0, 8, run((6, 23))),
        (12, 3, 3, run((0, 8))),
        (12, 3, 4, run((0, 2), (6, 11))),
        (12, 3, 8, run((0, 2), (18, 23))),
        (6, 1, 1, run((0, 2))),
        (6, 1, 2, (0, 4, 5)),
        (6, 1, 3, (0, 7, 8)),
    ],
)
def test_sliding_window(window, sink, block, frames):
    found = seen(Memory(window, sink), block)
    assert found.frames == found.positions == frames
    spans = Blocks(3, window=window, sink=sink).visible_before(3 * block, 3 * block + 3)
    assert frames == tuple(f for a, b in spans for f in range(a, b))


def test_infinity_rope():
    memory = SlotRelative(6, 1)
    assert seen(memory, 0)[1:] == ((), (), (0, 1, 2))
    assert seen(memory, 1)[1:] == ((0, 1, 2), (0, 1, 2), (3, 4, 5))
    assert seen(memory, 2)[1:] == ((0, 4, 5), (0, 1, 2), (3, 4, 5))
    assert seen(memory, 7)[1:] == ((0, 19, 20), (0, 1, 2), (3, 4, 5))


def test_longlive_infinity():
    assert seen(SlotRelative(12, 3), 5)[1:] == (run((0, 2), (9, 14)), run((0, 8)), (9, 10, 11))


def test_deep_sink():
    """The public code's gap, and the paper's positions, right before the recent frames'."""
    code, paper = DeepSink(16, 10, gap=3), DeepSink(16, 10)
    assert seen(code, 7)[1:] == (run((0, 9), (18, 20)), run((5, 14), (18, 20)), (21, 22, 23))
    assert seen(paper, 7).positions == run((8, 20))
    assert seen(DeepSink(21, 10), 5).positions == run((0, 14))  # nothing has left


def test_ema_sink():
    memory = EmaSink()
    assert seen(memory, 2)[1:] == (run((0, 5)), run((0, 5)), (6, 7, 8))
    assert seen(memory, 3)[1:] == (run((0, 2), (6, 8)), run((0, 5)), (6, 7, 8))


def test_memory_tokens():
    memory = MemoryTokens()
    assert seen(memory, 3)[1:] == (run((0, 8)), run((0, 8)), (9, 10, 11))
    assert seen(memory, 4)[1:] == ((0, 1, 2, MERGED, MERGED, 8, 9, 10, 11), run((0, 8)), (9, 10, 11))
    assert seen(memory, 9).frames == (0, 1, 2, MERGED, MERGED, 23, 24, 25, 26)


@pytest.mark.parametrize(
    ("commit", "replayed"), [(21, (17, 16, 15)), (24, (14, 13, 12)), (36, (2, 1, 0)), (39, (0, 1, 2))]
)
def test_rolling_sink(commit, replayed):
    """What the frames before the committed block become, at their own positions."""
    found = seen(RollingSink(), commit // 3 + 1)
    at = found.positions.index(commit - 3)
    assert found.frames[at : at + 3] == replayed
    assert found.positions == run((commit + 3 - 18, commit + 2)) and found.frames[-3:] == run((commit, commit + 2))


@pytest.mark.parametrize(
    ("block", "bank"),
    [(0, ()), (1, (0,)), (3, (0,)), (4, (0, 9)), (6, (0, 9)), (7, (0, 9, 18)), (9, (0, 9, 18)), (10, (-3, -3, 27))],
)
def test_memory_bank(block, bank):
    """Behind the window's frames; from block 10 on the prompt decides which two stay beside the newest."""
    found, window = seen(MemoryBank(), block), seen(Memory(12, 3), block)
    assert found.frames == (*window.frames, *bank) and found.own == window.own


# ---- the traced policies do what their plans say

SMALL = {
    "window": Memory(5, 1),
    "slot_relative": SlotRelative(5, 1),
    "deep_sink": DeepSink(6, 2),
    "ema_sink": EmaSink(6, 2, alpha=0.8),
    "memory_tokens": MemoryTokens(7, 1, slow_rate=0.2, fast_rate=0.5),
    "rolling_sink": RollingSink(6),
    "int8": SlotRelative(5, 1, Codec("int8")),
}
FRAMES = 12
SHAPE = (BATCH, FRAMES, SIDE, SIDE, CONFIG.in_dim)


@pytest.fixture(scope="module")
def inputs():
    return normal(1, SHAPE), normal(2, SHAPE)


@pytest.fixture(scope="module")
def rolled(inputs):
    """The last state and the flows of one policy, in a network."""
    return streamed(SMALL["memory_tokens"], *inputs)


@pytest.mark.parametrize("name", SMALL)
def test_plan_is_what_is_attended(name):
    """One layer of attention against the state, block after block, and a softmax over the planned frames in NumPy.

    Merged frames are checked by the laws below; here they are taken from the state itself.
    """
    memory = replace(SMALL[name], codec=Codec())
    blocks, (heads, dim) = layout(memory), (CONFIG.num_heads, CONFIG.head_dim)
    config = replace(CONFIG, num_layers=1)
    frames, worst = FRAMES, 0.0
    raw_k, v, q = (np.asarray(normal(i, (1, frames, TOKENS, heads, dim))) for i in range(3))
    state = memory.init(config, 1, TOKENS, blocks)
    attend = jax.jit(lambda state, start, q, k, v: memory.attention(config, state, start, 2, blocks)(q, k, v, 0))
    commit = jax.jit(lambda state, start, k, v: memory.commit(state, k[None], v[None], start))
    turn = jax.jit(rotate_time)
    for told in memory.plan(frames, blocks):
        start, stop = told.span
        count = int(state.count)
        assert told.frames == tuple(np.asarray(state.frame_F)[:count].tolist())
        own_F = memory.own_positions(state, jnp.int32(start), 2)
        assert told.own == tuple(own_F.tolist())
        rotated = lambda x, at: turn(jnp.asarray(x), jnp.asarray(at, jnp.int32))
        own_q, own_k = rotated(q[:, start:stop], told.own), rotated(raw_k[:, start:stop], told.own)
        known = [
            (state.k[0][:, i], state.v[0][:, i]) if frame == MERGED or (isinstance(memory, EmaSink) and i < memory.sink)
            else (raw_k[:, frame], v[:, frame]) for i, frame in enumerate(told.frames)
        ]  # fmt: skip
        past_k = [np.asarray(rotated(k[:, None], [at])) for (k, _), at in zip(known, told.positions, strict=True)]
        keys = np.concatenate([*past_k, np.asarray(own_k)], axis=1)
        values = np.concatenate([*(np.asarray(x)[:, None] for _, x in known), v[:, start:stop]], axis=1)
        scores = np.einsum("bftnk,bgsnk->bnftgs", np.asarray(own_q), keys) * dim**-0.5
        weights = np.exp(scores - scores.max((-2, -1), keepdims=True))
        weights /= weights.sum((-2, -1), keepdims=True)
        wanted = np.einsum("bnftgs,bgsnk->bftnk", weights, values)
        found = attend(state, jnp.int32(start), own_q, own_k, jnp.asarray(v[:, start:stop]))
        worst = max(worst, np.abs(found - wanted).max())
        state = commit(state, jnp.int32(start), own_k, jnp.asarray(v[:, start:stop]))
    print(f"{name}: {worst:.1e}")
    assert worst < 5e-6


# ---- laws


@pytest.mark.parametrize("name", SMALL)
def test_a_policy_that_holds_everything_is_the_full_cache(name):
    """L1: with nothing left out, every earlier frame is seen at its own position."""
    for told in replace(SMALL[name], window=FRAMES + 2).plan(FRAMES, LAYOUT):
        assert told.frames == told.positions == tuple(range(told.span[0])) and told.own == tuple(range(*told.span))


def test_a_network_with_a_wide_policy_is_one_with_a_full_cache(inputs):
    short = [x[:, :6] for x in inputs]
    _, full = streamed(None, *short)
    _, flow = streamed(replace(SMALL["deep_sink"], window=6), *short)
    assert relative(flow, full) < 2e-6


def test_a_network_with_a_window_is_one_with_a_ring(inputs):
    blocks = Blocks(2, window=5, sink=1)
    state = init_cache(CONFIG, BATCH, FRAMES, TOKENS, blocks)
    _, plain = stream(tiny(), text_kv(), *inputs, jnp.int32(0), state, blocks=blocks)
    assert relative(streamed(SMALL["window"], *inputs)[1], plain) < 2e-6


def test_a_network_that_recomputes_everything_is_one_with_a_full_cache(inputs):
    """And with two slots, a prompt change reaches what is remembered with the next commit."""
    short = [x[:, :6] for x in inputs]
    assert relative(streamed(ContextRecompute(6, 1), *short)[1], streamed(None, *short)[1]) < 2e-6
    state, _ = streamed(ContextRecompute(4, 1), *inputs)
    assert state.frame_F.tolist() == [0, FRAMES - 1]
    both = jnp.stack([inputs[1][:, 0], inputs[1][:, -1]], axis=1)
    context = clean_context(tiny(), both, text_kv(), LAYOUT)
    assert relative(state.v, context.v_LBFTNK) < 2e-6
    assert relative(jax.vmap(rotate_time, (0, None))(state.k, jnp.arange(2)), context.k_LBFTNK) < 2e-6


def test_a_weight_is_a_share_of_the_attention():
    """Softmax weights of remembered frames but the first times beta, before they are normalised."""
    memory, config = ContextRecompute(6, 1, weight=0.3), replace(CONFIG, num_layers=1)
    shape = (1, 6, 1, CONFIG.num_heads, CONFIG.head_dim)
    k, v, q = (normal(i, shape) for i in range(3))
    state = memory.init(config, 1, 1, LAYOUT)
    state = replace(state, k=k[None, :, :4], v=v[None, :, :4], frame_F=jnp.arange(4), count=jnp.int32(4))
    found = jax.jit(lambda *qkv: memory.attention(config, state, jnp.int32(4), 2, LAYOUT)(*qkv, 0))(
        q[:, 4:], k[:, 4:], v[:, 4:]
    )
    keys = jnp.concatenate([rotate_time(k[:, :4], jnp.arange(4)), k[:, 4:]], axis=1)
    logits = np.einsum("bftnk,bgsnk->bnftgs", q[:, 4:], keys) * CONFIG.head_dim**-0.5
    weights = np.exp(logits) * np.array([1.0, 0.3, 0.3, 0.3, 1.0, 1.0]).reshape(1, 1, 1, 1, 6, 1)
    weights /= weights.sum((-2, -1), keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bnftgs,bgsnk->bftnk", weights, v), atol=2e-6)
    with pytest.raises(UserError, match=r"weight=0\.0: use a number above 0"):
        ContextRecompute(weight=0.0)


def test_slot_positions_do_not_depend_on_the_time(rolled, inputs):
    """L2: a video that begins at frame 10,000 is the same."""
    _, late = streamed(SMALL["memory_tokens"], *inputs, start=10_000)
    assert relative(late, rolled[1]) < 2e-6


def test_rows_of_a_batch_do_not_meet(rolled, inputs):
    turned = [x[::-1] for x in inputs]
    kv = jax.tree.map(lambda x: x[:, ::-1], text_kv())
    blocks = layout(SMALL["memory_tokens"])
    _, flow = stream(
        tiny(), kv, *turned, jnp.int32(0), init_cache(CONFIG, BATCH, FRAMES, TOKENS, blocks), blocks=blocks
    )
    assert relative(flow[::-1], rolled[1]) < 2e-6


@pytest.mark.parametrize("name", SMALL)
def test_committing_a_block_again_changes_nothing(name):
    """L3, bit for bit."""
    numbers = np.random.default_rng(0).normal(size=14)
    once = committed(SMALL[name], numbers, 7)
    for a, b in zip(
        jax.tree.leaves(committed(SMALL[name], numbers, 7, again=True)), jax.tree.leaves(once), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SMALL)
def test_what_left_is_forgotten(name):
    """L6: what no slot holds any more leaves no trace, but in a policy that merges it."""
    memory, numbers = SMALL[name], np.random.default_rng(0).normal(size=14)
    held = set(memory.plan(16, LAYOUT)[-1].frames) | set(range(4 if name == "rolling_sink" else 0))
    gone = next(frame for frame in range(2, 14) if frame not in held)
    changed = numbers + (np.arange(14) == gone)
    states = [jax.tree.leaves((s.k, s.v)) for s in (committed(memory, x, 7) for x in (numbers, changed))]
    same = all(np.array_equal(a, b) for a, b in zip(*states, strict=True))
    assert same != isinstance(memory, EmaSink | MemoryTokens)


def test_an_ema_sink_is_the_closed_form():
    """sink_k = alpha^k S_0 + (1 - alpha) sum_j alpha^(k - j) S_j; keys and values alike."""
    memory, k = EmaSink(6, 2, alpha=0.8), np.random.default_rng(0).normal(size=14)
    state = committed(memory, k, 7)
    gone = k[2:12].reshape(5, 2)  # blocks 1 to 5; the slots hold 6
    wanted = 0.8**5 * k[:2] + 0.2 * sum(0.8 ** (4 - j) * gone[j] for j in range(5))
    np.testing.assert_allclose(state.v[0, 0, :2, 0, 0, 0], wanted, rtol=1e-6)
    np.testing.assert_allclose(state.k[0, 0, :2, 0, 0, 0], wanted, rtol=1e-5)
    still = committed(replace(memory, alpha=1.0), k, 7)
    np.testing.assert_array_equal(np.asarray(still.v[0, 0, :2, 0, 0, 0]), k[:2].astype(np.float32))


def test_memory_tokens_are_the_closed_form():
    memory, k = MemoryTokens(7, 1, slow_rate=0.2, fast_rate=0.5), np.random.default_rng(0).normal(size=12)
    state = committed(memory, k, 6)  # slots: 0 | slow fast | two; 5 slots before the third block
    assert state.frame_F.tolist() == [0, MERGED, MERGED, 10, 11]
    first = k[1:4].mean()  # frames 1 and 2 make room for the memories, 3 for the new block
    slow = fast = first
    for gone in (k[4:6], k[6:8], k[8:10]):
        slow, fast = slow + 0.2 * (gone.mean() - slow), fast + 0.5 * (gone.mean() - fast)
    np.testing.assert_allclose(state.v[0, 0, 1:3, 0, 0, 0], [slow, fast], rtol=1e-5)


def test_a_bank_keeps_what_fits_the_prompt(inputs):
    """Recorded every second block; when it is full, the frame with the lowest score in NumPy leaves, layer by layer."""
    memory, rng = MemoryBank(5, 1, bank=2, interval=2), np.random.default_rng(0)
    config = replace(CONFIG, num_layers=2)
    state = memory.init(config, 1, TOKENS, LAYOUT)
    commit = jax.jit(memory.commit)
    keys = rng.normal(size=(2, 1, 12, TOKENS, CONFIG.num_heads, CONFIG.head_dim)).astype(np.float32)
    text = rng.normal(size=(2, 1, CONFIG.num_heads, CONFIG.head_dim)).astype(np.float32)
    banks = [[], []]
    for start in range(0, 12, 2):
        own = keys[:, :, start : start + 2]
        state = commit(state, own, own + 1, jnp.int32(start), text)
        for layer, bank in enumerate(banks):
            if start % 4 == 0:
                if len(bank) == 2:
                    score = [np.mean(np.sum(text[layer, 0] * keys[layer, 0, f].mean(0), -1)) for f in bank]
                    del bank[int(np.argmin(score))]
                bank.append(start)
            assert state.extra.frame_LBF[layer, 0, : len(bank)].tolist() == bank
    np.testing.assert_allclose(state.extra.k[1, 0, 1], rotate_time(keys[1, :, 8:9], -jnp.array([8]))[0, 0], atol=1e-5)
    again = commit(memory.forget(state), keys[:, :, 8:10], keys[:, :, 8:10], jnp.int32(8), text)
    np.testing.assert_array_equal(again.extra.frame_LBF, state.extra.frame_LBF)
    # What is attended: the slots, the bank, the own frames.
    q, k, v = (np.asarray(x) for x in (keys[0][:, 4:6], keys[0][:, 6:8], keys[0][:, 8:10]))
    found = jax.jit(lambda *qkv: memory.attention(config, state, jnp.int32(12), 2, LAYOUT)(*qkv, 0))(q, k, v)
    past = jax.vmap(rotate_time, (0, None))(state.k, state.position_F)[0]
    all_k = np.concatenate([past, rotate_rows(state.extra.k[0], state.extra.position_LBF[0]), k], axis=1)
    all_v = np.concatenate([state.v[0], state.extra.v[0], v], axis=1)
    logits = np.einsum("bftnk,bgsnk->bnftgs", q, all_k) * CONFIG.head_dim**-0.5
    weights = np.exp(logits - logits.max((-2, -1), keepdims=True))
    weights /= weights.sum((-2, -1), keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bnftgs,bgsnk->bftnk", weights, all_v), atol=5e-6)


def test_a_bank_asks_the_prompt_of_the_stream(inputs):
    """In a network: the mean of the text's keys reaches it, and another prompt keeps other frames."""
    memory = MemoryBank(5, 1, bank=2, interval=1)
    state, _ = streamed(memory, *inputs)
    assert state.extra.frame_LBF[:, :, -1].tolist() == [[10, 10], [10, 10]]
    assert len({tuple(x) for x in state.extra.frame_LBF.reshape(-1, 2).tolist()}) > 1


def test_a_cut_moves_the_next_block_away():
    """Infinity-RoPE's: own frames at 45 to 47, once; the context stays. LongLive 2.0's: a lasting gap."""
    memory = SlotRelative(6, 1)
    state = memory.cut(committed(memory, np.ones(12), 6), 45)
    assert memory.own_positions(state, jnp.int32(12), 2).tolist() == [45, 46]
    with pytest.raises(UserError, match="inside the window"):
        memory.cut(state, 5)
    window = Memory(6, 1)
    state = window.cut(committed(window, np.ones(12), 6), 8)
    assert window.own_positions(state, jnp.int32(12), 2).tolist() == [20, 21]
    assert state.position_F.tolist() == [0, 9, 10, 11]


def test_bytes_do_not_grow_with_the_video():
    for memory in SMALL.values():
        state = jax.eval_shape(lambda m=memory: init_cache(CONFIG, 1, 10_000, TOKENS, layout(m)))
        assert state.frame_F.shape[0] == memory.window - 2


# ---- names


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_named_by_a_text(name):
    assert parse_memory(name) == POLICIES[name].policy
    assert memory_name(parse_memory(name)) == name
    other = parse_memory(f"{name}(window=30, codec=int8)")
    assert other == replace(POLICIES[name].policy, window=30, codec=Codec("int8"))
    assert parse_memory(memory_name(other)) == other


def test_the_documentation_has_every_policy_and_its_settings():
    page = Path("docs/memory.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    for name, named in POLICIES.items():
        told = rows[name].rsplit("|", 2)[1]
        assert parse_memory(f"{name}({told.strip().strip('`')})") == named.policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("infinty_rope", "did you mean infinity_rope"),
        ("ema_sink(apha=0.1)", "'apha=0.1' is no setting of ema_sink; it has window, sink, codec, alpha"),
        ("ema_sink(alpha=much)", "alpha='much' is not a number"),
        ("ema_sink(alpha=1.5)", "alpha=1.5: use a number from 0 to 1"),
        ("ema_sink(sink=0)", "an EMA sink needs sink=1"),
        ("window(window=2.5)", "window='2.5' is not a whole number"),
        ("window(codec=int2)", "codec='int2': use one of none, bf16, fp8, int8, int4"),
        ("window(window=3, sink=3)", "window=3 must hold 3 protected frames"),
        ("rolling_sink(sink=2)", "leave sink=2 out"),
        ("", "use full, window"),
    ],
)
def test_what_is_no_policy_is_said(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_memory(text)


def test_a_window_must_hold_a_block():
    with pytest.raises(UserError, match="at least 7"):
        Memory(6, 4).slots(CHUNK)
    with pytest.raises(UserError, match="whole blocks of 3"):
        RollingSink(22).slots(CHUNK)
    with pytest.raises(UserError, match="set them there"):
        Blocks(3, window=6, memory=Memory())
