"""Rolling Forcing: which frames every pass sees, where and at which levels (golden), and what a whole video is."""

from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.codecs import Codec
from cfjax.memory.names import with_memory
from cfjax.memory.rolling import Place, RollingForcing
from cfjax.memory.slots import Memory
from cfjax.models.cache import init_cache
from cfjax.models.wan import backbone
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from cfjax.rollout import rolling
from cfjax.rollout import stream as streaming
from cfjax.rollout.generate import FewStep, ManyStep, generate_few_step, layout_of, network_calls
from cfjax.rollout.rolling import generate_rolling, rolling_layout, window_flow
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.stream import Pipeline, prompt_kv, seeded_noise, stream_latents
from tests.tiny import BATCH, CONFIG, SIDE, normal, relative, text_kv, tiny

CHUNK, MEMORY = Blocks(3), RollingForcing()
TOKENS = CONFIG.tokens_per_frame(SIDE, SIDE)


def run(*spans) -> tuple[int, ...]:
    """Frames of some inclusive runs of blocks of 3."""
    return tuple(x for a, b in spans for x in range(3 * a, 3 * b + 3))


# ---- golden: the trace of the reference's pipeline (13 blocks, 4 steps)


@pytest.mark.parametrize(
    ("window", "anchor", "working", "own"),
    [
        (0, None, (), (0, 0)),
        (3, None, (), (0, 3)),
        (4, 0, (), (1, 4)),
        (6, 0, ((1, 2),), (3, 6)),
        (9, 9, ((4, 5),), (6, 9)),
        (12, 18, ((7, 8),), (9, 12)),
        (13, 18, ((7, 9),), (10, 12)),
        (15, 18, ((7, 11),), (12, 12)),
    ],
)
def test_a_windows_trace_is_the_references(window, anchor, working, own):
    """In blocks; the anchor, which is block 0, by the frame at which it is read."""
    found = MEMORY.plan_windows(39, CHUNK, 4)
    assert len(found) == 13 + 4 - 1
    seen, first = found[window], () if anchor is None else run((0, 0))
    assert seen.frames == (*first, *run(*working)) and seen.own == run(own)
    assert seen.positions[: len(first)] == (() if anchor is None else tuple(range(anchor, anchor + 3)))
    assert seen.positions[len(first) :] == run(*working)
    together = (*seen.positions, *seen.own)
    assert together == tuple(range(together[0], together[0] + len(together))) and len(together) <= 21


def test_a_commits_trace_is_the_references():
    """Window w commits block w - 3: the first ones see all, from window 10 on the latest 7, their own counted."""
    for block, seen in enumerate(MEMORY.plan(39, CHUNK)):
        assert seen.frames == seen.positions == run((max(0, block - 6), block - 1))
        assert (0 in seen.frames) == (1 <= block <= 6)


def trace_of_the_code(num_blocks: int, steps: int, kept: int, most: int) -> list[tuple]:
    """(frames, positions) that denoising calls see besides their own, by the code's arithmetic on a cache of slots."""
    slots, end_global, end_local, found = np.full(kept, -1), 0, 0, []
    for window in range(num_blocks + steps - 1):
        first, last = max(0, window - steps + 1), min(num_blocks - 1, window)
        start, queries = 3 * first, 3 * (last - first + 1)
        new = start + 3 - end_global
        if new > 0 and new + end_local > kept:
            evicted = new + end_local - kept
            rolled = end_local - evicted - 3
            slots[3 : 3 + rolled] = slots[3 + evicted : 3 + evicted + rolled].copy()
            end = end_local + new - evicted
        else:
            end = end_local + new
        slots[end - 3 : end] = range(start, start + 3)
        if new > 0:
            end_global, end_local = start + 3, end
        if end == 3:
            found.append(((), ()))
            continue
        working = slots[max(3, end - 3 - (most - queries - 3)) : end - 3]
        anchor = start - len(working) - 3
        found.append(((0, 1, 2, *working), (*range(anchor, anchor + 3), *working)))
    return found


@pytest.mark.parametrize(("num_blocks", "steps"), [(1, 4), (3, 4), (20, 4), (12, 2), (9, 1)])
def test_the_plan_is_the_codes_arithmetic(num_blocks, steps):
    plan = MEMORY.plan_windows(3 * num_blocks, CHUNK, steps)
    assert [seen[1:3] for seen in plan] == trace_of_the_code(num_blocks, steps, 24, 21)
    assert replace(MEMORY, stored=60).plan_windows(3 * num_blocks, CHUNK, steps) == plan


def test_every_pass_is_at_its_levels(monkeypatch):
    """The passes of a streamed video of 5 blocks and 3 steps: frames, levels, and commits between them."""
    calls: list[tuple] = []

    def flow(model, x, sigma_BF, kv, cache, place, blocks):
        exist = [number for number in range(place.at, place.at + x.shape[1]) if place.first <= number < place.stop]
        levels = np.asarray(sigma_BF)[0, exist[0] - int(place.at) :]
        calls.append((tuple(exist), tuple(np.round(1000 * levels[: len(exist)], 2).tolist())))
        return x * 0.5

    monkeypatch.setattr(rolling, "window_flow", flow)
    monkeypatch.setattr(streaming, "commit_block", lambda m, x, kv, cache, at, blocks: calls.append(int(at)) or cache)
    sampler, blocks = FewStep((1000, 750, 250), rolling=True), Blocks(1, window=6)
    noise = lambda number, shape, steps: (jnp.full(shape, number + 1.0), jnp.zeros((steps - 1, *shape)))
    found = stream_latents(
        Pipeline(tiny(), None, sampler, blocks), text_kv(), noise, num_frames=5, latent_shape=(4, 4, 4), batch=BATCH,
        call=lambda f, *args, **static: getattr(f, "__wrapped__", f)(*args, **static),
    )  # fmt: skip
    made = [float(x[0, 0, 0, 0, 0]) for x in found]
    a, b, c = 1000.0, 937.5, 625.0
    assert calls == [
        ((0,), (a,)), ((0, 1), (b, a)), ((0, 1, 2), (c, b, a)),
        0, ((1, 2, 3), (c, b, a)), 1, ((2, 3, 4), (c, b, a)), 2, ((3, 4), (c, b)), 3, ((4,), (c,)),
    ]  # fmt: skip
    assert network_calls(sampler, blocks, 5) == len(calls) == 2 * 5 + 3 - 2
    steps = np.prod([1 - 0.5 * sigma for sigma in (1.0, 0.9375, 0.625)]) * (1 - 0.9375) * (1 - 0.625)
    np.testing.assert_allclose(made, steps * np.arange(1, 6), rtol=1e-5)


# ---- what is attended


def softmax_over(q, keys, values) -> np.ndarray:
    scores = np.einsum("bftnk,bgsnk->bnftgs", q, keys) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max((-2, -1), keepdims=True))
    return np.einsum("bnftgs,bgsnk->bftnk", weights / weights.sum((-2, -1), keepdims=True), values)


@pytest.mark.parametrize("stored", [0, 20], ids=["ring", "all stored"])
def test_passes_attend_to_what_the_plans_say(stored):
    """One layer against the state, window after window and commit after commit, and a softmax in NumPy."""
    memory, steps, frames = RollingForcing(9, 2, stored=stored), 3, 20
    blocks, config = Blocks(2, memory=memory), replace(CONFIG, num_layers=1)
    shape = (1, frames, 1, CONFIG.num_heads, CONFIG.head_dim)
    raw_k, v, q = (np.asarray(normal(i, shape)) for i in range(3))
    state, worst = memory.init(config, 1, 1, blocks), 0.0
    look = jax.jit(lambda state, at, *qkv: memory.window_attention(
        config, state, Place(at, 0, frames), 6, blocks)(*qkv, 0))  # fmt: skip
    see = jax.jit(lambda state, at, *qkv: memory.attention(config, state, at, 2, blocks)(*qkv, 0))
    commit = jax.jit(lambda state, at, k, v: memory.commit(state, k[None], v[None], at))
    turn = jax.jit(rotate_time)
    rotated = lambda x, at: np.asarray(turn(jnp.asarray(x), jnp.asarray(at, jnp.int32)))
    commits = memory.plan(frames, blocks)

    def wanted(told) -> np.ndarray:
        own = slice(*told.span)
        past = list(told.frames)
        keys = [rotated(raw_k[:, own], told.own)]
        if past:
            keys = [rotated(raw_k[:, past], told.positions), *keys]
        values = np.concatenate([v[:, past], v[:, own]], axis=1)
        return softmax_over(rotated(q[:, own], told.own), np.concatenate(keys, axis=1), values)

    for number, told in enumerate(memory.plan_windows(frames, blocks, steps)):
        at = (number - steps + 1) * 2
        index = np.clip(np.arange(at, at + 6), 0, frames - 1)  # any numbers, where no frame is
        position = np.arange(at, at + 6)
        given = (rotated(q[:, index], position), rotated(raw_k[:, index], position), v[:, index])
        found = np.asarray(look(state, jnp.int32(at), *given))[:, told.span[0] - at : told.span[1] - at]
        worst = max(worst, np.abs(found - wanted(told)).max())
        if at >= 0:
            own = slice(at, at + 2)
            given = tuple(rotated(x[:, own], [at, at + 1]) for x in (q, raw_k))
            worst = max(
                worst, np.abs(np.asarray(see(state, jnp.int32(at), *given, v[:, own])) - wanted(commits[at // 2])).max()
            )
            state = commit(state, jnp.int32(at), given[1], jnp.asarray(v[:, own]))
    print(f"stored={stored}: {worst:.1e}")
    assert worst < 5e-6


# ---- whole videos

FRAMES, STEPS, LAYOUT = 6, FewStep((1000, 750, 500), rolling=True), Blocks(1, memory=RollingForcing(5, 1))
SHAPE = (BATCH, FRAMES, SIDE, SIDE, CONFIG.in_dim)
whole = jax.jit(generate_rolling, static_argnames="blocks")


@cache
def inputs():
    return normal(1, SHAPE), normal(2, (BATCH, FRAMES, 2, SIDE, SIDE, CONFIG.in_dim))


@cache
def video():
    return whole(tiny(), *inputs(), STEPS.sigmas(), text_kv(), LAYOUT)


@pytest.mark.slow
def test_a_video_is_the_naive_loops():
    """Windows of the blocks that exist alone, against a list of committed keys, with a plain softmax."""
    (noise, fresh), levels, model, kv = inputs(), STEPS.sigmas(), tiny(), text_kv()
    windows, commits = LAYOUT.memory.plan_windows(FRAMES, LAYOUT, 3), LAYOUT.memory.plan(FRAMES, LAYOUT)
    raw: dict[int, tuple] = {}

    @partial(jax.jit, static_argnames="emit")
    def forward(x, sigma_BF, past_k, past_v, past_F, own_F, *, emit):
        def attend(q, k, v, past):
            k = jnp.concatenate([rotate_time(past[0], past_F), k], axis=1) if len(past_F) else k
            v = jnp.concatenate([past[1], v], axis=1) if len(past_F) else v
            weights = jax.nn.softmax(jnp.einsum("bftnk,bgsnk->bnftgs", q, k) * q.shape[-1] ** -0.5, axis=(-2, -1))
            return jnp.einsum("bnftgs,bgsnk->bftnk", weights, v)

        flow, own = backbone(model, x, sigma_BF, kv, own_F, attend, layer_input=(past_k, past_v), emit_kv=True)
        return (jax.vmap(rotate_time, (0, None))(own.k_LBFTNK, -own_F), own.v_LBFTNK) if emit else flow

    def known(seen):
        empty = jnp.zeros((CONFIG.num_layers, BATCH, 0, TOKENS, CONFIG.num_heads, CONFIG.head_dim))
        k, v = (jnp.concatenate([raw[f][i] for f in seen.frames], axis=2) if seen.frames else empty for i in (0, 1))
        return k, v, jnp.asarray(seen.positions, jnp.int32), jnp.asarray(seen.own, jnp.int32)

    noisy, done = {}, []
    for number, seen in enumerate(windows):
        if number < FRAMES:
            noisy[number] = noise[:, number : number + 1]
        made = [number - frame for frame in seen.own]  # steps that each frame has made
        x = jnp.concatenate([noisy[frame] for frame in seen.own], axis=1)
        sigma_BF = jnp.broadcast_to(jnp.asarray([levels[j] for j in made]), x.shape[:2])
        x0 = x - sigma_BF[..., None, None, None] * forward(x, sigma_BF, *known(seen), emit=False)
        for i, (frame, j) in enumerate(zip(seen.own, made, strict=True)):
            if j < 2:
                sigma = levels[j + 1]
                noisy[frame] = (1 - sigma) * x0[:, i : i + 1] + sigma * fresh[:, frame : frame + 1, j]
        if number >= 2:
            done.append(x0[:, :1])
            raw[seen.own[0]] = forward(x0[:, :1], jnp.zeros((BATCH, 1)), *known(commits[seen.own[0]]), emit=True)
    error = relative(video(), jnp.concatenate(done, axis=1))
    print(f"a video and the naive loop: {error:.1e}")
    assert error < 1e-5


def test_a_stream_is_the_whole_video():
    noise, fresh = inputs()
    at = lambda number, shape, steps: (noise[:, number : number + 1], jnp.moveaxis(fresh[:, number : number + 1], 2, 0))
    pipeline = Pipeline(tiny(), None, STEPS, Blocks(1, window=5))
    chunks = list(stream_latents(
        pipeline, text_kv(), at, num_frames=FRAMES, latent_shape=SHAPE[2:], batch=BATCH))  # fmt: skip
    error = relative(jnp.concatenate(chunks, axis=1), video())
    print(f"streamed and whole: {error:.1e}")
    assert len(chunks) == FRAMES and error < 1e-5


def test_a_window_of_one_block_and_one_step_is_plain_block_autoregression():
    """While the memory holds everything."""
    noise, _ = inputs()
    one, kv = FewStep((1000,)), text_kv()
    plain = generate_few_step(tiny(), noise[:, :4], kv, jax.random.key(0), one, Blocks(2), fused_commit="off")
    roll = replace(one, rolling=True)
    error = relative(generate_few_step(tiny(), noise[:, :4], kv, jax.random.key(0), roll, Blocks(2)), plain)
    print(f"one block, one step: {error:.1e}")
    assert error < 1e-5


def test_a_window_at_one_level_without_a_past_is_bidirectional():
    x, sigma_BF = normal(3, SHAPE)[:, :4], jnp.full((BATCH, 4), 0.6)
    blocks = Blocks(1, memory=RollingForcing(5, 1))
    state = init_cache(CONFIG, BATCH, 4, TOKENS, blocks)
    flow = jax.jit(window_flow, static_argnames="blocks")
    found = flow(tiny(), x, sigma_BF, text_kv(), state, Place(0, 0, 4), blocks)
    assert relative(found, jax.jit(tiny())(x, sigma_BF, text_kv())) < 2e-6


@pytest.mark.slow
def test_a_rolling_video_goes_on_from_given_frames():
    """The first frames of a video without a window beyond it: what a commit sees is the same."""
    noise, fresh = (x[:, :4] for x in inputs())
    given = normal(5, SHAPE)[:, :2]
    found = whole(tiny(), noise, fresh, STEPS.sigmas(), text_kv(), LAYOUT, given_BFHWC=given)
    np.testing.assert_array_equal(found[:, :2], given)
    at = lambda n, shape, steps: (noise[:, n - 2 : n - 1], jnp.moveaxis(fresh[:, n - 2 : n - 1], 2, 0))
    pipeline = Pipeline(tiny(), None, STEPS, Blocks(1, window=5))
    sizes = {"num_frames": 4, "latent_shape": SHAPE[2:], "batch": BATCH, "given_BFHWC": given}
    chunks = list(stream_latents(pipeline, text_kv(), at, **sizes))
    assert relative(jnp.concatenate(chunks, axis=1), found[:, 2:]) < 1e-5
    assert relative(found[:, 2:], video()[:, :4]) > 0.05
    assert network_calls(STEPS, LAYOUT, 4, 2) == 2 + (4 + 2) + 3


# ---- what does not go together


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FewStep((1000, 500), (1000,), rolling=True), "kind='rolling' has one list of steps"),
        (lambda: FewStep((1000, 500), strength=0.5, rolling=True), "strength=0.5: not with sampler.kind='rolling'"),
        (lambda: rolling_layout(None, 4), "needs a causal network"),
        (
            lambda: rolling_layout(Blocks(3, memory=Memory(12, 3)), 4),
            "memory=window.window=12.: sampler.kind=",
        ),
        (lambda: rolling_layout(Blocks(3, window=12), 4), "window=12 must hold .* 4 blocks .*: use 15 or more"),
        (lambda: rolling_layout(Blocks(3, window=21, sink=1), 4), "sink=1: .* keeps the first block; use 3"),
        (lambda: rolling_layout(Blocks(3, independent_first_frame=True), 4), "no first frame of its own"),
        (lambda: layout_of(FewStep(), with_memory(CHUNK, "rolling_forcing")), "is for sampler.kind='rolling'"),
        (lambda: layout_of(ManyStep(), with_memory(CHUNK, "rolling_forcing")), "is for sampler.kind='rolling'"),
        (lambda: with_memory(Blocks(1), "rolling_forcing"), "use sink=1, not 3"),
    ],
)
def test_what_does_not_go_together_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_layouts():
    assert rolling_layout(CHUNK, 4).memory == MEMORY
    assert rolling_layout(Blocks(2, window=12, sink=2), 3).memory == RollingForcing(12, 2)
    quantised = with_memory(CHUNK, "rolling_forcing(window=18, codec=int8)")
    assert layout_of(FewStep(rolling=True), quantised).memory == RollingForcing(18, 3, Codec("int8"))
    assert MEMORY.slots(CHUNK) + 3 == 24  # the reference's cache, of which a block takes its slots before it is seen
    assert layout_of(FewStep(), CHUNK) is CHUNK and layout_of(ManyStep(), None) is None


# ---- sessions


def session(**changes) -> Session:
    rows = {name: np.asarray(normal(200 + i, (3, CONFIG.text_dim))) for i, name in enumerate("ab")}
    pipeline = Pipeline(tiny(), Plain(), STEPS, Blocks(1, window=5))
    encode = lambda prompts: np.stack([rows[prompt] for prompt in prompts])
    return Session(pipeline, Text(encode), "a", **{"latent_shape": SHAPE[2:], "seed": 7} | changes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plain:
    """A codec whose pixels are the latents."""

    def init_state(self, batch: int):
        return jnp.float32(0.0)

    def decode_step(self, latents, state):
        return latents, state


def test_a_session_rolls_on_and_looks_ahead():
    """Its blocks are those of a video that ends later; a change of the prompt reaches what is half made; it forks."""
    stream = session()
    kv = prompt_kv(tiny(), jnp.asarray(stream._text.encode(["a"])), jnp.zeros((3, CONFIG.text_dim)), STEPS)
    sizes = {"num_frames": 8, "latent_shape": SHAPE[2:]}
    wanted = list(stream_latents(stream._pipeline, kv, seeded_noise(np.array([7], np.uint32)), **sizes))
    found = [stream.next() for _ in range(5)]
    error = max(relative(x.latents_BFHWC, y) for x, y in zip(found, wanted, strict=False))
    print(f"a session and a video: {error:.1e}")
    assert error < 1e-5 and [x.start for x in found] == list(range(5))
    same, other = stream.fork(), stream.fork()
    other.set_prompt("b", "recache")
    own = stream.next().latents_BFHWC
    np.testing.assert_array_equal(same.next().latents_BFHWC, own)
    assert relative(other.next().latents_BFHWC, own) > 0.01
    assert other.state.cache.frame_F.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.set_prompt("b", "cut"), "half made; use mode='keep' or 'recache'"),
        (lambda s: s.set_memory("infinity_rope"), "memory=infinity_rope: sampler.kind='rolling' has its own"),
        (lambda s: s.set_memory("full"), "memory=full: sampler.kind='rolling' has its own"),
        (lambda s: s.set_memory("rolling_forcing(window=3, sink=1)"), "use 4 or more"),
        (lambda s: s.set_prompt("b", recache="unmasked"), "is LongLive's"),
        (lambda s: s.next(np.zeros((1, 1, 4, 4, 3))), "video to video is not with sampler.kind='rolling'"),
    ],
)
def test_what_a_rolling_session_refuses(act, message):
    stream = session()
    before = stream.state
    with pytest.raises(UserError, match=message):
        act(stream)
    assert stream.state is before
