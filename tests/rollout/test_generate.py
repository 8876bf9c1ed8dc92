"""Samplers: against plain Python loops, their network calls counted, and the stream that repeats them by blocks."""

from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.guidance import guide
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.flow.schedule import unipc_grid
from cfjax.flow.solvers import unipc
from cfjax.models import wan
from cfjax.models.cache import init_cache
from cfjax.models.wan import KV, FrameKV, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout import blocks as blocks_module
from cfjax.rollout import stream as stream_module
from cfjax.rollout.blocks import commit_block, denoise_block, fuses, layout_from
from cfjax.rollout.generate import (
    FewStep,
    ManyStep,
    both_prompts,
    generate,
    generate_few_step,
    generate_many_step,
    network_calls,
)
from cfjax.rollout.stream import Pipeline, block_noise, seeded_noise, stream, stream_latents
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, SIDE, TEXT_LEN, normal, relative, text, text_kv, tiny

BLOCKS, WINDOW = Blocks(2), Blocks(2, window=4, sink=1)
TOKENS = CONFIG.tokens_per_frame(SIDE, SIDE)
FOUR, TWO = (1000, 750, 500, 250), (1000, 500)
SIGMA_OF = {1000: 1.0, 750: 0.9375, 500: 0.8333333, 250: 0.625}  # reference 3.4
KEY = jax.random.key(0)
NEGATIVE = normal(102, (TEXT_LEN, CONFIG.text_dim))

denoise = jax.jit(denoise_block, static_argnames="blocks")
commit = jax.jit(commit_block, static_argnames="blocks")
forward = jax.jit(lambda model, *args: model(*args))


def empty_cache():
    return init_cache(CONFIG, BATCH, FRAMES, TOKENS, BLOCKS)


@cache
def negative_kv() -> KV:
    return embed_text(tiny(), jnp.broadcast_to(NEGATIVE[None], text().shape))


@cache
def few_step(sampler: FewStep, blocks: Blocks, fused: str = "off"):
    """The compiled sampler; noise and fresh noise [B, F, J, H, W, C] are given, and perhaps the first frames."""

    def sample(noise, fresh, given=None):
        draws = {"renoise_BFJHWC": fresh, "given_BFHWC": given, "fused_commit": fused}
        return generate_few_step(tiny(), noise, text_kv(), KEY, sampler, blocks, **draws)

    return jax.jit(sample)


@pytest.mark.parametrize("sampler", [FewStep(FOUR), FewStep(TWO, FOUR)], ids=["one_list", "first_list"])
def test_few_step_is_the_references_loop(sampler):
    """Predict x0, add fresh noise at the next level; commit the last x0 as it is (`CausalInferencePipeline`)."""
    noise, fresh = normal(1), normal(2, (BATCH, FRAMES, 3, *SHAPE[2:]))
    cache, clips = empty_cache(), []
    for start, stop in BLOCKS.spans(FRAMES):
        x = noise[:, start:stop]
        steps = sampler.first_steps if start == 0 and sampler.first_steps else sampler.steps
        levels = [SIGMA_OF[step] for step in steps]
        for j, sigma in enumerate(levels):
            v = denoise(tiny(), x, sigma, text_kv(), cache, jnp.int32(start), blocks=BLOCKS)
            x = x0_from_flow(v, x, sigma)
            if j + 1 < len(levels):
                x = add_noise(x, fresh[:, start:stop, j], levels[j + 1])
        cache = commit(tiny(), x, text_kv(), cache, jnp.int32(start), blocks=BLOCKS)
        clips.append(x)
    error = relative(few_step(sampler, BLOCKS)(noise, fresh), jnp.concatenate(clips, axis=1))
    print(f"few-step sampler vs loop: {error:.1e}")
    assert error < 1e-5


def test_only_the_first_block_uses_the_first_list():
    noise, fresh = normal(1), normal(2, (BATCH, FRAMES, 3, *SHAPE[2:]))
    plain, mixed = few_step(FewStep(FOUR), BLOCKS)(noise, fresh), few_step(FewStep(TWO, FOUR), BLOCKS)(noise, fresh)
    assert relative(mixed[:, :2], plain[:, :2]) < 1e-6
    assert relative(mixed[:, 2:], plain[:, 2:]) > 1e-2


def test_many_step_is_unipc_block_by_block():
    """A fresh solver per block, the two prompts with caches of their own (reference 7.2)."""
    sampler = ManyStep("unipc", steps=4, guidance=3.0)
    sigmas, timesteps = unipc_grid(4, 5.0)

    @jax.jit
    def solve(model, noise, pos, neg, pos_cache, neg_cache, start):
        def velocity(x, sigma):
            v_pos = denoise_block(model, x, sigma, pos, pos_cache, start, BLOCKS)
            v_neg = denoise_block(model, x, sigma, neg, neg_cache, start, BLOCKS)
            return v_neg + 3.0 * (v_pos - v_neg)

        return unipc(velocity, noise, sigmas, model_sigmas=timesteps / 1000.0)

    pos, neg = text_kv(), negative_kv()
    pos_cache, neg_cache, clips = empty_cache(), empty_cache(), []
    for start, stop in BLOCKS.spans(FRAMES):
        at = jnp.int32(start)
        clips.append(solve(tiny(), normal(1)[:, start:stop], pos, neg, pos_cache, neg_cache, at))
        pos_cache = commit(tiny(), clips[-1], pos, pos_cache, at, blocks=BLOCKS)
        neg_cache = commit(tiny(), clips[-1], neg, neg_cache, at, blocks=BLOCKS)
    got = jax.jit(partial(generate_many_step, sampler=sampler, blocks=BLOCKS))(tiny(), normal(1), pos, neg)
    error = relative(got, jnp.concatenate(clips, axis=1))
    print(f"many-step sampler vs loop: {error:.1e}")
    assert error < 1e-5


def test_bidirectional_is_one_solve_over_all_frames():
    sampler = ManyStep("euler", steps=3, guidance=2.0)
    flow = jax.jit(lambda m, x, s, kv: m(x, jnp.full(SHAPE[:2], s), kv))
    x, (grid, _) = normal(1), sampler.grid()
    for sigma, lower in pairwise(grid):
        v = guide(flow(tiny(), x, sigma, text_kv()), flow(tiny(), x, sigma, negative_kv()), 2.0)
        x = x + float(lower - sigma) * v
    sample = jax.jit(partial(generate, sampler=sampler, blocks=None))
    assert relative(sample(tiny(), normal(1), text(), NEGATIVE, KEY), x) < 1e-5


FUSED = {
    "chunkwise": (FewStep(FOUR), BLOCKS, FRAMES, 0),
    "first_list_window_sink_given": (FewStep(TWO, FOUR), WINDOW, FRAMES, 2),
    "one_step_first_frame": (FewStep((1000,)), Blocks(2, independent_first_frame=True), 5, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_commits_make_the_same_video(name):
    """In the sampler and in the stream, whose programs are as many: one in the steady state."""
    sampler, blocks, frames, given = FUSED[name]
    noise, fresh = (x[:, given:frames] for x in (normal(1), normal(2, (BATCH, FRAMES, 3, *SHAPE[2:]))))
    first = normal(3)[:, :given] if given else None
    plain = few_step(sampler, blocks)(noise, fresh, first)
    fused = few_step(sampler, blocks, fused="on")(noise, fresh, first)
    pipeline = Pipeline(tiny(), Plain(), sampler, blocks, fused_commit="on")
    starts = [start for start, _ in layout_from(blocks, given).spans(frames - given)]

    def drawn(index: int, shape: tuple[int, ...], steps: int) -> tuple[jax.Array, jax.Array]:
        own = slice(starts[index - bool(given)], starts[index - bool(given)] + shape[1])
        return noise[:, own], jnp.moveaxis(fresh[:, own], 2, 0)[: steps - 1]

    sizes = {"num_frames": frames - given, "latent_shape": SHAPE[2:], "batch": BATCH, "given_BFHWC": first}
    streamed = np.concatenate([x0 for _, x0 in stream(pipeline, text_kv(), drawn, **sizes)], axis=1)
    errors = relative(fused, plain), relative(streamed, plain)
    print(f"{name}: fused sampler {errors[0]:.1e}, fused stream {errors[1]:.1e}")
    assert max(errors) < 1e-6


def test_where_commits_are_fused():
    assert [fuses("auto", platform) for platform in ("cpu", "gpu", "tpu")] == [False, True, True]
    assert fuses("on") and not fuses("off", "tpu")
    with pytest.raises(UserError, match="fused_commit='always': use one of auto, on, off"):
        fuses("always")


# ---- given frames: image to video, extension of a video

GIVEN = {
    "chunkwise": (FewStep(FOUR), BLOCKS, 4),
    "framewise_image": (FewStep(FOUR), Blocks(1), 1),
    "image_of_its_own": (FewStep(FOUR), Blocks(5, independent_first_frame=True), 1),
    "window_sink": (FewStep(FOUR), WINDOW, 4),
}


@pytest.mark.parametrize("name", GIVEN)
def test_an_extension_is_the_longer_videos_end(name):
    """Given a video's first frames and the same noise, the sampler makes the rest of that video."""
    sampler, blocks, given = GIVEN[name]
    noise, fresh = normal(1), normal(2, (BATCH, FRAMES, 3, *SHAPE[2:]))
    whole = few_step(sampler, blocks)(noise, fresh)
    extended = few_step(sampler, blocks)(noise[:, given:], fresh[:, given:], whole[:, :given])
    np.testing.assert_array_equal(extended[:, :given], whole[:, :given])
    error = relative(extended, whole)
    print(f"{name}: extension vs longer video {error:.1e}")
    assert error < 1e-5
    other = few_step(sampler, blocks)(noise[:, given:], fresh[:, given:], whole[:, :given] + 0.5)
    assert relative(other[:, given:], whole[:, given:]) > 1e-2  # the given frames are looked at


def test_the_first_list_is_for_the_first_generated_block():
    """Given frames are committed block by block as they are; then the loop begins, with the first list."""
    sampler, noise, fresh = FewStep(TWO, FOUR), normal(1), normal(2, (BATCH, FRAMES, 3, *SHAPE[2:]))
    given, cache, clips = normal(3)[:, :2], empty_cache(), []
    cache = commit(tiny(), given, text_kv(), cache, jnp.int32(0), blocks=BLOCKS)
    for start, stop in [(2, 4), (4, 6)]:
        x, levels = noise[:, start:stop], [SIGMA_OF[step] for step in (FOUR if start == 2 else TWO)]
        for j, sigma in enumerate(levels):
            v = denoise(tiny(), x, sigma, text_kv(), cache, jnp.int32(start), blocks=BLOCKS)
            x = x0_from_flow(v, x, sigma)
            if j + 1 < len(levels):
                x = add_noise(x, fresh[:, start:stop, j], levels[j + 1])
        cache = commit(tiny(), x, text_kv(), cache, jnp.int32(start), blocks=BLOCKS)
        clips.append(x)
    got = few_step(sampler, BLOCKS)(noise[:, 2:], fresh[:, 2:], given)
    assert relative(got, jnp.concatenate([given, *clips], axis=1)) < 1e-5


def test_given_frames_must_fill_blocks():
    with pytest.raises(UserError, match="1 given latent frames end inside a block: give a multiple of 2, or"):
        generate_few_step(tiny(), normal(1), text_kv(), KEY, FewStep(FOUR), BLOCKS, given_BFHWC=normal(3)[:, :1])
    with pytest.raises(UserError, match=r"give 1 \+ a multiple of 5"):
        network_calls(FewStep(FOUR), Blocks(5, independent_first_frame=True), 5, given=2)


def test_all_frames_at_once_after_a_clean_one():
    """Every step sees it at noise level 0, as Wan2.2-TI2V-5B was trained: Euler's two steps, by hand."""
    sampler, noise, first = ManyStep("euler", steps=2), normal(1)[:, 1:], normal(3)[:, :1]
    got = generate(tiny(), noise, text(), NEGATIVE, KEY, sampler, None, first)
    sigmas, x = sampler.grid()[0], noise
    for here, after in pairwise(sigmas):
        levels = jnp.concatenate([jnp.zeros((BATCH, 1)), jnp.full(x.shape[:2], here)], axis=1)
        whole = jnp.concatenate([first, x], axis=1)
        v, w = (forward(tiny(), whole, levels, rows)[:, 1:] for rows in (text_kv(), negative_kv()))
        x = x + (after - here) * (w + sampler.guidance * (v - w))
    assert relative(got, jnp.concatenate([first, x], axis=1)) < 1e-5


# ---- network calls


@pytest.fixture
def calls(monkeypatch):
    """Counts evaluations of the network per clip, at run time, through a network that costs nothing to compile."""
    counted = []

    def kv_of(latents: jax.Array) -> FrameKV:
        shape = (*latents.shape[:2], TOKENS, CONFIG.num_heads, CONFIG.head_dim)
        kv = jnp.zeros((CONFIG.num_layers, *shape))
        return FrameKV(kv, kv)

    def called(latents: jax.Array, number: int = 1) -> jax.Array:
        jax.debug.callback(lambda: counted.append(number * latents.shape[0] // BATCH))
        return latents

    monkeypatch.setattr(wan, "backbone", lambda model, x, *_, **__: (called(x), kv_of(x)))
    monkeypatch.setattr(blocks_module, "forward_kv", lambda model, x, *_: kv_of(called(x)))
    fused = lambda model, clean, level, x, *_: (called(x, 2), kv_of(clean))
    monkeypatch.setattr(blocks_module, "forward_fused", fused)
    return counted


SAMPLERS = {
    "four_step": (FewStep(FOUR), BLOCKS, 0),
    "two_step": (FewStep(TWO, FOUR), Blocks(1), 0),
    "two_step_extension": (FewStep(TWO, FOUR), BLOCKS, 4),
    "independent_first_frame": (FewStep((1000,)), Blocks(5, independent_first_frame=True), 0),
    "unipc": (ManyStep("unipc", 5), BLOCKS, 0),
    "unipc_extension": (ManyStep("unipc", 5), Blocks(1), 2),
    "heun": (ManyStep("heun", 5), BLOCKS, 0),
    "bidirectional": (ManyStep("unipc", 5), None, 0),
    "bidirectional_heun": (ManyStep("heun", 5), None, 0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_are_what_a_sampler_makes(calls, name):
    sampler, blocks, given = SAMPLERS[name]
    sample = jax.jit(partial(generate, sampler=sampler, blocks=blocks))
    first = normal(3)[:, :given] if given else None
    jax.block_until_ready(sample(tiny(), normal(1)[:, given:], text(), text()[0], KEY, given_BFHWC=first))
    jax.effects_barrier()
    assert sum(calls) == network_calls(sampler, blocks, FRAMES - given, given)


@pytest.mark.parametrize("given", [0, 2])
def test_a_fused_pass_counts_as_a_commit_and_a_step(calls, given):
    sampler = FewStep(TWO, FOUR)
    first = normal(3)[:, :given] if given else None
    sample = partial(generate_few_step, sampler=sampler, blocks=BLOCKS, fused_commit="on", given_BFHWC=first)
    jax.block_until_ready(jax.jit(sample)(tiny(), normal(1)[:, given:], text_kv(), KEY))
    jax.effects_barrier()
    blocks = (FRAMES - given) // 2
    assert sum(calls) == network_calls(sampler, BLOCKS, FRAMES - given, given)
    assert len(calls) == len(FOUR) + (blocks - 1) * len(TWO)  # passes


def test_network_calls_of_the_published_models():
    """Reference 0.1, 21 latent frames, but for the last block's commit, which the reference makes."""
    chunk, frame = Blocks(3), Blocks(1)
    assert network_calls(FewStep(FOUR), chunk, 21) == 35 - 1
    assert network_calls(FewStep(FOUR), frame, 21) == 105 - 1
    assert network_calls(FewStep(TWO, FOUR), frame, 21) == 65 - 1
    assert network_calls(FewStep((1000,), FOUR), frame, 21) == 45 - 1
    assert network_calls(ManyStep(), chunk, 21) == 7 * (50 * 2 + 2) - 2
    assert network_calls(ManyStep(), None, 21) == 100


def test_an_unknown_solver_is_named():
    with pytest.raises(UserError, match=r"sampler\.solver='rk4': use one of"):
        ManyStep("rk4")


# ---- the stream


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plain:
    """A codec whose pixels are the latents, and whose state counts the blocks."""

    def init_state(self, batch: int) -> jax.Array:
        return jnp.int32(0)

    def decode_step(self, latents_BFHWC: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return latents_BFHWC + state, state + 1


def streamed(sampler, blocks: Blocks, kv: KV | None = None, given=None) -> list[tuple[np.ndarray, np.ndarray]]:
    frames = FRAMES if given is None else FRAMES - given.shape[1]
    sizes = {"num_frames": frames, "latent_shape": SHAPE[2:], "batch": BATCH, "given_BFHWC": given}
    pipeline = Pipeline(tiny(), Plain(), sampler, blocks)
    return list(stream(pipeline, kv or text_kv(), partial(block_noise, KEY), **sizes))


def joined(chunks: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.concatenate([latents for _, latents in chunks], axis=1)


def stream_noise(sampler: FewStep, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """The noise that `stream` draws, in the form `generate_few_step` takes; what a short list leaves over is zero."""
    width = max(len(sampler.sigmas()), len(sampler.first_sigmas())) - 1
    noises, fresh = [], []
    for index, (start, stop) in enumerate(blocks.spans(FRAMES)):
        steps = len(sampler.first_sigmas() if index == 0 else sampler.sigmas())
        noise, between_JBFHWC = block_noise(KEY, index, (BATCH, stop - start, *SHAPE[2:]), steps)
        between = jnp.moveaxis(between_JBFHWC, 0, 2)
        noises.append(noise)
        fresh.append(jnp.pad(between, [(0, 0), (0, 0), (0, width - between.shape[2])] + [(0, 0)] * 3))
    return jnp.concatenate(noises, axis=1), jnp.concatenate(fresh, axis=1)


STREAMS = {
    "one_list": (FewStep(FOUR), BLOCKS, 1),
    "first_list": (FewStep(TWO, FOUR), BLOCKS, 2),
    "window_sink": (FewStep(FOUR), WINDOW, 1),
}


def test_a_block_is_there_before_its_commit():
    """And the last one has none: between two blocks one commit, in a program of its own or as the next one's first."""
    for fused in ("off", "on"):
        called = []

        def call(function, *args, called=called, **static):
            called.append(function)
            return function(*args, **static)

        pipeline = Pipeline(tiny(), Plain(), FewStep(FOUR), BLOCKS, fused_commit=fused)
        sizes = {"num_frames": FRAMES, "latent_shape": SHAPE[2:], "batch": BATCH}
        made = stream_latents(pipeline, text_kv(), partial(block_noise, KEY), **sizes, call=call)
        done = [len(called) for _ in made]
        one, other, both = stream_module.next_block, stream_module._commit, stream_module._commit_and_next_block
        assert called[1:] == ([one, both, both] if fused == "on" else [one, other, one, other, one])
        assert done == ([2, 3, 4] if fused == "on" else [2, 4, 6])


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_the_sampler_block_by_block(name):
    """The same video from the same noise; one compile per block function, whatever the length of the stream."""
    sampler, blocks, compiles = STREAMS[name]
    stream_module.next_block.clear_cache()
    chunks = streamed(sampler, blocks)
    assert stream_module.next_block._cache_size() == compiles
    assert [video.shape[1] for video, _ in chunks] == [2, 2, 2]
    error = relative(joined(chunks), few_step(sampler, blocks)(*stream_noise(sampler, blocks)))
    print(f"{name}: stream vs sampler {error:.1e}")
    assert error < 1e-5
    for index, (video, latents) in enumerate(chunks):  # the codec's state went from block to block
        np.testing.assert_allclose(video, latents + index, rtol=1e-6)


def test_a_second_stream_compiles_nothing():
    streamed(FewStep(FOUR), BLOCKS)
    before = stream_module.next_block._cache_size()
    streamed(FewStep(FOUR), BLOCKS)
    assert stream_module.next_block._cache_size() == before


def test_a_stream_goes_on_from_given_frames():
    """As the longer stream of the same key did; the given frames come out first, decoded by the same codec state."""
    whole = streamed(FewStep(FOUR), BLOCKS)
    chunks = streamed(FewStep(FOUR), BLOCKS, given=whole[0][1])
    assert relative(joined(chunks), joined(whole)) < 1e-5
    for (video, _), (same, _) in zip(chunks, whole, strict=True):
        np.testing.assert_allclose(video, same, atol=1e-5)


def test_a_many_step_stream_is_its_sampler():
    sampler, kv = ManyStep("unipc", steps=4), both_prompts(text_kv(), negative_kv())
    noise = stream_noise(FewStep(FOUR), BLOCKS)[0]
    got = jax.jit(partial(generate_many_step, sampler=sampler, blocks=BLOCKS))(tiny(), noise, text_kv(), negative_kv())
    chunks = streamed(sampler, BLOCKS, kv)
    assert relative(joined(chunks), got) < 1e-5
    assert relative(joined(streamed(sampler, BLOCKS, kv, given=joined(chunks[:2]))), got) < 1e-5


def test_a_video_follows_its_own_seed_alone():
    """Whatever stands beside it in the batch; and every block and every step draws afresh."""
    shape = (2, 1, 2, 2, 3)
    pair, fresh = seeded_noise(np.array([3, 4], np.uint32))(1, shape, 3)
    alone, alone_fresh = seeded_noise(np.array([4], np.uint32))(1, (1, *shape[1:]), 3)
    np.testing.assert_array_equal(pair[1:], alone)
    np.testing.assert_array_equal(fresh[:, 1:], alone_fresh)
    draws = [pair[0], pair[1], fresh[0, 0], fresh[1, 0], seeded_noise(np.array([3, 4], np.uint32))(2, shape, 3)[0][0]]
    assert len({np.asarray(draw).tobytes() for draw in draws}) == len(draws)


def test_a_windowed_stream_of_any_length_is_one_program():
    """Its cache has the window's slots, so a longer video begins as the shorter one does and compiles nothing."""
    short = streamed(FewStep(FOUR), WINDOW)
    before = stream_module.next_block._cache_size()
    sizes = {"num_frames": 2 * FRAMES, "latent_shape": SHAPE[2:], "batch": BATCH}
    pipeline = Pipeline(tiny(), Plain(), FewStep(FOUR), WINDOW)
    long = list(stream(pipeline, text_kv(), partial(block_noise, KEY), **sizes))
    assert stream_module.next_block._cache_size() == before
    assert joined(long).shape[1] == 2 * FRAMES
    np.testing.assert_array_equal(joined(long)[:, :FRAMES], joined(short))
