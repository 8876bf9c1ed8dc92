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
from cfjax.models.wan import KV, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout import stream as stream_module
from cfjax.rollout.blocks import commit_block, denoise_block
from cfjax.rollout.generate import FewStep, ManyStep, generate, generate_few_step, generate_many_step, network_calls
from cfjax.rollout.stream import block_noise, stream
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, SIDE, TEXT_LEN, normal, relative, text, text_kv, tiny

BLOCKS, WINDOW = Blocks(2), Blocks(2, window=4, sink=1)
TOKENS = CONFIG.tokens_per_frame(SIDE, SIDE)
FOUR, TWO = (1000, 750, 500, 250), (1000, 500)
SIGMA_OF = {1000: 1.0, 750: 0.9375, 500: 0.8333333, 250: 0.625}  # reference 3.4
KEY = jax.random.key(0)
NEGATIVE = normal(102, (TEXT_LEN, CONFIG.text_dim))

denoise = jax.jit(denoise_block, static_argnames="blocks")
commit = jax.jit(commit_block, static_argnames="blocks")


def empty_cache():
    return init_cache(CONFIG, BATCH, FRAMES, TOKENS, BLOCKS)


@cache
def negative_kv() -> KV:
    return embed_text(tiny(), jnp.broadcast_to(NEGATIVE[None], text().shape))


@cache
def few_step(sampler: FewStep, blocks: Blocks):
    """The compiled sampler; noise and fresh noise [B, F, J, H, W, C] are given."""
    return jax.jit(
        lambda noise, fresh: generate_few_step(tiny(), noise, text_kv(), KEY, sampler, blocks, renoise_BFJHWC=fresh)
    )


@pytest.mark.parametrize("sampler", [FewStep(FOUR), FewStep(TWO, FOUR)], ids=["one_list", "first_list"])
def test_few_step_is_the_references_loop(sampler):
    """Predict x0, add fresh noise at the next level; after the last level commit x0 as it is (reference 7.1)."""
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


# ---- network calls


@pytest.fixture
def calls(monkeypatch):
    """Counts evaluations of the network per clip, at run time, through a network that costs nothing to compile."""
    counted = []

    def backbone(model, latents, sigma_BF, text_kv, position_F, self_attend, *, layer_input=None, emit_kv=False):
        jax.debug.callback(lambda: counted.append(latents.shape[0] // BATCH))
        tokens = latents.shape[1] * TOKENS
        kv = jnp.zeros((CONFIG.num_layers, latents.shape[0], tokens, CONFIG.num_heads, CONFIG.head_dim))
        return latents, KV(kv, kv)

    monkeypatch.setattr(wan, "_backbone", backbone)
    return counted


SAMPLERS = {
    "four_step": (FewStep(FOUR), BLOCKS),
    "two_step": (FewStep(TWO, FOUR), Blocks(1)),
    "independent_first_frame": (FewStep((1000,)), Blocks(5, independent_first_frame=True)),
    "unipc": (ManyStep("unipc", 5), BLOCKS),
    "heun": (ManyStep("heun", 5), BLOCKS),
    "bidirectional": (ManyStep("unipc", 5), None),
    "bidirectional_heun": (ManyStep("heun", 5), None),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_are_what_a_sampler_makes(calls, name):
    sampler, blocks = SAMPLERS[name]
    sample = jax.jit(partial(generate, sampler=sampler, blocks=blocks))
    jax.block_until_ready(sample(tiny(), normal(1), text(), text()[0], KEY))
    jax.effects_barrier()
    assert sum(calls) == network_calls(sampler, blocks, FRAMES)


def test_network_calls_of_the_published_models():
    """Reference 0.1, 21 latent frames."""
    chunk, frame = Blocks(3), Blocks(1)
    assert network_calls(FewStep(FOUR), chunk, 21) == 35
    assert network_calls(FewStep(FOUR), frame, 21) == 105
    assert network_calls(FewStep(TWO, FOUR), frame, 21) == 65
    assert network_calls(FewStep((1000,), FOUR), frame, 21) == 45
    assert network_calls(ManyStep(), chunk, 21) == 7 * (50 * 2 + 2)
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


def streamed(sampler: FewStep, blocks: Blocks) -> list[tuple[np.ndarray, np.ndarray]]:
    sizes = {"num_frames": FRAMES, "latent_shape": SHAPE[2:], "batch": BATCH}
    return list(stream(tiny(), Plain(), text_kv(), KEY, sampler, blocks, **sizes))


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


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_the_sampler_block_by_block(name):
    """The same video from the same noise; one compile per block function, whatever the length of the stream."""
    sampler, blocks, compiles = STREAMS[name]
    stream_module._next_block.clear_cache()
    chunks = streamed(sampler, blocks)
    assert stream_module._next_block._cache_size() == compiles
    assert [video.shape[1] for video, _ in chunks] == [2, 2, 2]
    latents = np.concatenate([latents for _, latents in chunks], axis=1)
    error = relative(latents, few_step(sampler, blocks)(*stream_noise(sampler, blocks)))
    print(f"{name}: stream vs sampler {error:.1e}")
    assert error < 1e-5
    for index, (video, latents) in enumerate(chunks):  # the codec's state went from block to block
        np.testing.assert_allclose(video, latents + index, rtol=1e-6)


def test_a_second_stream_compiles_nothing():
    streamed(FewStep(FOUR), BLOCKS)
    before = stream_module._next_block._cache_size()
    streamed(FewStep(FOUR), BLOCKS)
    assert stream_module._next_block._cache_size() == before
