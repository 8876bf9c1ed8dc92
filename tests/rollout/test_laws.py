"""Streaming equals one masked pass: the laws that tie training to inference (float32, tolerance 1e-5)."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.models.cache import init_cache
from cfjax.models.context import clean_context
from cfjax.models.wan import teacher_forced
from cfjax.nn.visibility import FULL, Blocks, Visibility
from cfjax.planning.flops import count_flops
from cfjax.rollout.blocks import commit_and_denoise, commit_block, denoise_block, scan_blocks
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, SIDE, TEXT_LEN, normal, relative, text_kv, tiny

TOKENS = CONFIG.tokens_per_frame(SIDE, SIDE)
LAYOUTS = {
    "chunkwise": (Blocks(3), FRAMES),
    "framewise": (Blocks(1), FRAMES),
    "first_frame": (Blocks(2, independent_first_frame=True), 5),
    "window": (Blocks(2, window=4), FRAMES),
    "window_sink": (Blocks(2, window=4, sink=1), FRAMES),
    "window_sink_first_frame": (Blocks(2, independent_first_frame=True, window=4, sink=2), 7),
    "narrow": (Blocks(2, window=2), FRAMES),
    "narrow_sink": (Blocks(2, window=5, sink=3), FRAMES),
}


def sigma_per_block(blocks: Blocks, frames: int) -> jax.Array:
    levels = [0.9, 0.35, 0.7, 0.55, 0.2, 0.8, 0.45]
    row = [levels[i] for i, (a, b) in enumerate(blocks.spans(frames)) for _ in range(a, b)]
    return jnp.broadcast_to(jnp.array(row, jnp.float32), (BATCH, frames))


@pytest.fixture(params=LAYOUTS, ids=list(LAYOUTS))
def layout(request):
    blocks, frames = LAYOUTS[request.param]
    shape = (BATCH, frames, *SHAPE[2:])
    return blocks, frames, normal(1, shape), normal(2, shape), sigma_per_block(blocks, frames)


def stream(blocks: Blocks, frames: int, noisy, kept, sigma, kept_sigma):
    """Block by block: denoise `noisy` against the cache, then commit `kept` at its own noise level."""

    @jax.jit
    def run(model, kv, noisy, kept, sigma):
        cache = init_cache(CONFIG, BATCH, frames, TOKENS, blocks)

        def step(cache, start, inputs):
            (x, clean, s_BF), _ = inputs
            v = denoise_block(model, x, s_BF[0, 0], kv, cache, start, blocks)
            level = s_BF[0, 0] if kept_sigma else 0.0
            return commit_block(model, clean, kv, cache, start, blocks, sigma=level), v

        return scan_blocks(step, cache, (noisy, kept, sigma), None, frames, blocks)

    return run(tiny(), text_kv(), noisy, kept, sigma)


def test_teacher_forced_pass_is_a_rollout_over_clean_blocks(layout):
    blocks, frames, noisy, clean, sigma = layout
    full = jax.jit(lambda m, n, c, s, kv: teacher_forced(m, n, s, c, kv, blocks))(
        tiny(), noisy, clean, sigma, text_kv()
    )
    _, streamed = stream(blocks, frames, noisy, clean, sigma, kept_sigma=False)
    error = relative(streamed, full)
    print(f"teacher forcing vs KV cache: {error:.2e}")
    assert error < 1e-5


def test_diffusion_forcing_pass_is_a_rollout_over_noisy_blocks(layout):
    blocks, frames, noisy, _, sigma = layout
    visibility = Visibility("block_causal", blocks)
    full = jax.jit(lambda m, n, s, kv: m(n, s, kv, visibility))(tiny(), noisy, sigma, text_kv())
    _, streamed = stream(blocks, frames, noisy, noisy, sigma, kept_sigma=True)
    error = relative(streamed, full)
    print(f"diffusion forcing vs KV cache: {error:.2e}")
    assert error < 1e-5


@partial(jax.jit, static_argnames="blocks")
def two_ways(model, kv, clean, x, cache, start, noise, *, blocks):
    """A commit and a step as one pass, and as two: each a flow and a cache."""
    before = start - clean.shape[1]
    apart = commit_block(model, clean, kv, cache, before, blocks, sigma=noise)
    flow = denoise_block(model, x, 0.7, kv, apart, start, blocks)
    fused = commit_and_denoise(model, clean, x, 0.7, kv, cache, start, blocks, commit_sigma=noise)
    return fused, (flow, apart)


def test_a_fused_pass_is_a_commit_and_a_step(layout):
    """The flow of the next block, and every slot of the cache, also where the window does not hold both blocks."""
    blocks, frames, noisy, clean, _ = layout
    cache, worst = init_cache(CONFIG, BATCH, frames, TOKENS, blocks), 0.0
    for (a, b), (_, c) in pairwise(blocks.spans(frames)):
        given = clean[:, a:b], noisy[:, b:c], cache, jnp.int32(b), jnp.float32(0.1 * a)
        fused, apart = two_ways(tiny(), text_kv(), *given, blocks=blocks)
        np.testing.assert_array_equal(fused[1].frame_F, apart[1].frame_F)
        pairs = [(fused[0], apart[0]), (fused[1].k_LBFTNK, apart[1].k_LBFTNK), (fused[1].v_LBFTNK, apart[1].v_LBFTNK)]
        worst, cache = max(worst, *(relative(one, two) for one, two in pairs)), apart[1]
    print(f"one pass vs two: {worst:.1e}")
    assert worst < 1e-6


def test_what_nobody_reads_of_a_commit_is_not_computed():
    """Of the last layer keys and values alone, and no head: counted in products, and by XLA on what is left of them."""
    blocks, x, at, frames = Blocks(2), normal(1)[:, :2], jnp.int32(2), 2
    cache = init_cache(CONFIG, BATCH, FRAMES, TOKENS, blocks)
    step = count_flops(lambda: denoise_block(tiny(), x, 0.7, text_kv(), cache, at, blocks))
    commit = count_flops(lambda: commit_block(tiny(), x, text_kv(), cache, at, blocks))
    fused = count_flops(lambda: commit_and_denoise(tiny(), x, x, 0.7, text_kv(), cache, at, blocks))
    rows, dim = BATCH * frames * TOKENS, CONFIG.dim
    linear = 2 * rows * (2 * dim * dim + 2 * dim * dim + 2 * dim * CONFIG.ffn_dim)  # q, o; of the text; feed-forward
    attention = 2 * 2 * rows * dim * (FRAMES * TOKENS + TEXT_LEN)
    head = 2 * rows * dim * CONFIG.out_dim * CONFIG.patch[0] * CONFIG.patch[1]
    assert step - commit == linear + attention + head
    clean_keys = 2 * 2 * rows * dim * frames * TOKENS * CONFIG.num_layers  # which a cache of every frame holds already
    assert fused <= step + commit + clean_keys


def test_cache_holds_the_block_causal_pass():
    blocks, clean = Blocks(2), normal(2)
    context = jax.jit(lambda m, c, kv: clean_context(m, c, kv, blocks))(tiny(), clean, text_kv())
    cache, _ = stream(blocks, FRAMES, normal(1), clean, sigma_per_block(blocks, FRAMES), kept_sigma=False)
    assert relative(cache.k_LBFTNK, context.k_LBFTNK) < 1e-5
    assert relative(cache.v_LBFTNK, context.v_LBFTNK) < 1e-5


def test_one_block_over_all_frames_is_bidirectional():
    noisy, sigma = normal(1), jnp.full(SHAPE[:2], 0.6)
    bidirectional = jax.jit(lambda m, x, s, kv: m(x, s, kv, FULL))(tiny(), noisy, sigma, text_kv())
    one_block = Blocks(FRAMES)
    causal = tiny()(noisy, sigma, text_kv(), Visibility("block_causal", one_block))
    _, streamed = stream(one_block, FRAMES, noisy, noisy, sigma, kept_sigma=False)
    assert relative(causal, bidirectional) < 1e-5
    assert relative(streamed, bidirectional) < 1e-5


def test_causality():
    """Changing a later frame changes nothing before its block, and something in it."""
    blocks, noisy, clean = Blocks(3), normal(1), normal(2)
    sigma = sigma_per_block(blocks, FRAMES)
    flow = jax.jit(lambda n, c: teacher_forced(tiny(), n, sigma, c, text_kv(), blocks))
    base, moved = flow(noisy, clean), flow(noisy.at[:, 4].add(1.0), clean.at[:, 3].add(1.0))
    assert float(jnp.max(jnp.abs(base[:, :3] - moved[:, :3]))) == 0.0
    assert float(jnp.max(jnp.abs(base[:, 3:] - moved[:, 3:]))) > 1e-2


def test_windowed_cache_is_constant_memory():
    blocks = Blocks(2, window=4, sink=1)
    assert init_cache(CONFIG, 1, 1000, TOKENS, blocks).k_LBFTNK.shape[2:4] == (4, TOKENS)
