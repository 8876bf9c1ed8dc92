"""A rollout that goes on: where its chunks begin, what the student remembers between them, what the scores see."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.policies import EmaSink, RollingSink
from cfjax.memory.slots import Memory
from cfjax.models.wan import embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.self_forcing import SelfForcing, draw_rollout, rollout
from cfjax.rollout.streaming import NEVER, Streaming, add_chunk, draw_chunk, empty_rollout, next_chunk
from tests.rollout.test_long_video import Fading
from tests.tiny import BATCH, CONFIG, SHAPE, SIDE, relative, text, tiny

CHUNKS = Blocks(3)
STREAMING = Streaming(window_frames=6, max_frames=14, new_frames=2)
BLOCKS = Blocks(2, memory=EmaSink(6, 2, alpha=0.8))
CONFIG_OF_ROLLOUT = SelfForcing((1.0, 0.625))
CODEC, TOKENS = Fading(), CONFIG.tokens_per_frame(SIDE, SIDE)


def lengths(streaming: Streaming, blocks: Blocks, updates: int, share: float = 0.0) -> list[tuple[int, int]]:
    """(frames before, new frames) of so many chunks, by the traced rule."""
    step = jax.jit(partial(next_chunk, streaming=streaming, blocks=blocks))
    length, found = 0, []
    for _ in range(updates):
        before, new = map(int, step(jnp.int32(length), jnp.float32(share)))
        found.append((before, new))
        length = before + new
    return found


def test_longlives_chunks():
    """240 frames, 21 seen, 18 new: 13 chunks, 237 frames, whatever is drawn; then from the start."""
    for share in (0.0, 0.999):
        found = lengths(Streaming(), CHUNKS, 14, share)
        assert found[:2] == [(0, 21), (21, 18)] and found[12] == (219, 18) and found[13] == (0, 21)
        assert [new for _, new in found[1:13]] == [18] * 12
    assert list(Streaming().switch_frames()) == [21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201]
    assert Streaming().expected(CHUNKS) == (13, 18)


def test_a_chunk_is_whole_blocks_and_ends_in_time():
    """From 9 to 18 new frames, of which the rollout's end leaves fewer."""
    streaming = Streaming(21, 60, 9, switch_prompts=False)
    assert lengths(streaming, CHUNKS, 5) == [(0, 21), (21, 9), (30, 9), (39, 9), (48, 9)]
    assert lengths(streaming, CHUNKS, 5, 0.999) == [(0, 21), (21, 18), (39, 18), (0, 21), (21, 18)]
    step = jax.jit(jax.vmap(partial(next_chunk, streaming=streaming, blocks=CHUNKS), (None, 0)))
    for length, most in ((21, 18), (45, 15), (48, 12), (51, 9)):
        _, new = step(jnp.int32(length), jnp.linspace(0.0, 0.9999, 64))
        assert set(new.tolist()) == set(range(9, most + 1, 3))
    draws = jax.vmap(lambda key: draw_chunk(key, Streaming())["switch"])(jax.random.split(jax.random.key(0), 200))
    assert set(draws.tolist()) == set(Streaming().switch_frames())
    assert int(draw_chunk(jax.random.key(0), streaming)["switch"]) == NEVER


@cache
def chunk():
    @partial(jax.jit, static_argnames=("streaming", "blocks"))
    def run(model, state, text_BSE, draws, *, streaming, blocks):
        made = add_chunk(model, state, text_BSE, draws, CONFIG_OF_ROLLOUT, streaming, blocks, CODEC, gradient=False)
        return made.x0_BFHWC, made.counted_F, made.text_BSE, made.state

    return run


def drawn(number: int, switch: int = NEVER, share: float = 0.0) -> dict[str, jax.Array]:
    draws = draw_rollout(jax.random.key(number), SHAPE, CONFIG_OF_ROLLOUT, Blocks(2))
    more = {"new_share": jnp.float32(share), "switch": jnp.int32(switch)}
    return {**draws, "exit_G": jnp.full_like(draws["exit_G"], number % 2), **more}


def before_any():
    return empty_rollout(CONFIG, SHAPE, text().shape, STREAMING, BLOCKS)


def test_chunks_are_one_rollout():
    """Five chunks of 6, 2, 2, 2, 2 frames are the rollout of 14 frames at once, bit by bit remembered; one program."""
    state, video, programs = before_any(), [], chunk()._cache_size()
    parts = [drawn(number) for number in range(5)]
    for number, draws in enumerate(parts):
        x0, counted, prompt, state = chunk()(tiny(), state, text(), draws, streaming=STREAMING, blocks=BLOCKS)
        new = 2 if number else 6
        assert counted.tolist() == [False] * (6 - new) + [True] * new
        assert np.array_equal(prompt, text()) and int(state.length) == 6 + 2 * number
        video.append(x0[:, 6 - new :])
        if number:  # the first latent is made anew of what was generated; the others are as they were
            kept = jnp.concatenate(video, axis=1)
            assert np.array_equal(x0[:, 1:], kept[:, -5:])
            pictures = CODEC.decode(kept[:, -6 - new :])  # of the frames that were kept before
            assert relative(x0[:, :1], CODEC.encode(pictures[:, new : new + 1])) < 1e-5
    assert chunk()._cache_size() == programs + 1
    tail = lambda name, axis: jnp.concatenate(
        [parts[0][name]] + [jax.lax.slice_in_dim(p[name], -axis, None, axis=1) for p in parts[1:]], axis=1
    )
    whole = {name: tail(name, 2) for name in ("noise_BFHWC", "renoise_BFJHWC", "context_BFHWC")}
    whole["exit_G"] = jnp.asarray([0, 0, 0, 1, 0, 1, 0], jnp.int32)
    kv = embed_text(tiny(), text())
    expected = jax.jit(lambda draws: rollout(tiny(), kv, draws, CONFIG_OF_ROLLOUT, BLOCKS).x0_BFHWC)(whole)
    print(f"chunks against one rollout: {relative(jnp.concatenate(video, axis=1), expected):.1e}")
    assert relative(jnp.concatenate(video, axis=1), expected) < 1e-5
    *_, state = chunk()(tiny(), state, -text(), drawn(7), streaming=STREAMING, blocks=BLOCKS)
    assert int(state.length) == 6 and np.array_equal(state.text_BSE, -text())  # another rollout, another prompt
    *_, alone = chunk()(tiny(), before_any(), -text(), drawn(7), streaming=STREAMING, blocks=BLOCKS)
    jax.tree.map(np.testing.assert_array_equal, state, alone)


def test_a_prompt_switches_at_a_border_and_what_is_remembered_is_committed_under_it():
    state, new_prompt = before_any(), -text()
    for number, prompt in enumerate((text(), new_prompt, new_prompt, 2 * text())):
        before = state
        x0, _, used, state = chunk()(tiny(), state, prompt, drawn(number, 7), streaming=STREAMING, blocks=BLOCKS)
        assert np.array_equal(used, new_prompt if number >= 2 else text())  # 6 is before 7, 8 is not; and once only
        if number == 2:
            kv, memory = embed_text(tiny(), new_prompt), BLOCKS.memory.init(CONFIG, BATCH, TOKENS, BLOCKS)
            commit = jax.jit(partial(commit_block, blocks=BLOCKS))
            for i in range(3):
                memory = commit(tiny(), before.latents_BFHWC[:, 2 * i : 2 * i + 2], kv, memory, jnp.int32(2 + 2 * i))
            made = {**drawn(2, 7), "switch": jnp.int32(NEVER)}
            other = replace(before, memory=memory, text_BSE=new_prompt, switch=jnp.int32(NEVER))
            again, *_ = chunk()(tiny(), other, new_prompt, made, streaming=STREAMING, blocks=BLOCKS)
            print(f"recommitted: {relative(again, x0):.1e}")
            assert relative(again, x0) < 1e-5


def test_after_a_switch_the_sink_is_moved():
    """LongLive's `global_sink=False`: a switch at 42 with a window of 12, 3 of them sink, leaves 30-32 and 36-41."""
    memory, layout = Memory(12, 3), Blocks(3, memory=Memory(12, 3))
    config = replace(CONFIG, num_layers=1)
    state, kv = memory.init(config, 1, 1, layout), jnp.zeros((1, 1, 3, 1, CONFIG.num_heads, CONFIG.head_dim))
    commit = jax.jit(memory.commit)
    for start in (30, 33, 36, 39):
        state = commit(state, kv, kv, jnp.int32(start))
    assert state.frame_F.tolist() == [30, 31, 32, *range(36, 42)]


@pytest.mark.parametrize(
    ("change", "blocks", "message"),
    [
        ({"new_frames": 6}, BLOCKS, "objective.new_frames=6, window_frames=6"),
        ({"max_frames": 13}, BLOCKS, "objective.max_frames=13: use a multiple of blocks.frames=2"),
        ({"max_frames": 8}, BLOCKS, "needs objective.max_frames=10 or more"),
        ({}, Blocks(2), "needs blocks.window or blocks.memory"),
        ({}, Blocks(2, memory=RollingSink(6)), "use another policy, or objective.switch_prompts=False"),
        ({}, Blocks(2, window=4, independent_first_frame=True), "no independent first frame"),
    ],
)
def test_mistakes_are_named(change, blocks, message):
    with pytest.raises(UserError, match=message):
        replace(STREAMING, **change).check(blocks)
