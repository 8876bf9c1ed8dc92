"""What a stream needs, by arithmetic: against the matrix products of the network's own passes."""

import jax
import jax.numpy as jnp
import pytest

from cfjax.experiment.speed import network_size, passes_of
from cfjax.models.cache import init_cache
from cfjax.models.wan import Wan, WanConfig, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.planning.flops import count_flops
from cfjax.planning.stream_cost import Need, NetworkSize, Pass, pass_flops, stream_need, text_flops
from cfjax.rollout.blocks import denoise_block
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.rollout.sizes import Sizes

CONFIG = WanConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_dim=8, freq_dim=16)
ROWS, TOKENS = 5, 6  # 4 x 6 latents in patches of 2 x 2


def network() -> Wan:
    return jax.eval_shape(lambda: Wan(CONFIG, jax.random.key(0)))


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_pass_is_the_products_of_the_network():
    model, frames = network(), 3
    text_kv = jax.eval_shape(embed_text, model, shape(1, ROWS, 8))
    call = lambda model, x, sigma, text_kv: model(x, sigma, text_kv)
    counted = count_flops(call, model, shape(1, frames, 4, 6, 4), shape(1, frames), text_kv)
    size, tokens = network_size(model), frames * TOKENS
    assert pass_flops(size, Pass(frames, tokens, tokens), ROWS) == counted
    assert text_flops(size, ROWS) == count_flops(embed_text, model, shape(1, ROWS, 8))


def test_a_commit_leaves_out_the_end_of_the_last_layer_and_the_head():
    size = network_size(network())
    whole, commit = (pass_flops(size, Pass(1, TOKENS, 12, commits), ROWS) for commits in (False, True))
    last = TOKENS * 16 * (4 * 16 + 4 * 12 + 4 * 16 + 4 * ROWS + 4 * 24)
    assert whole - commit == last + 2 * TOKENS * 16 * 16


def test_a_cached_step_computes_at_least_what_is_needed():
    """Of the last block's step, whose cache is full but for its own slots; the program may take more slots."""
    model, blocks = network(), Blocks(2)
    text_kv = jax.eval_shape(embed_text, model, shape(1, ROWS, 8))
    cache = jax.eval_shape(lambda: init_cache(CONFIG, 1, 6, TOKENS, blocks))
    call = lambda model, x, text_kv, cache: denoise_block(
        model, x, jnp.float32(0.5), text_kv, cache, jnp.int32(4), blocks
    )
    counted = count_flops(call, model, shape(1, 2, 4, 6, 4), text_kv, cache)
    needed = pass_flops(network_size(model), Pass(2, 2 * TOKENS, 6 * TOKENS), ROWS)
    assert needed <= counted < 1.2 * needed


def test_passes_see_their_window_and_the_last_block_is_not_committed():
    passes = passes_of(FewStep(steps=(1000, 500)), Blocks(2, window=4), Sizes(6, 0, 4, 6, (1, 8, 8)), TOKENS)
    assert [(p.keys // TOKENS, p.commits) for p in passes] == [
        *[(2, False), (2, False), (2, True)],
        *[(4, False), (4, False), (4, True)],
        *[(4, False), (4, False)],
    ]
    assert {(p.frames, p.tokens) for p in passes} == {(2, 2 * TOKENS)}


def test_first_steps_given_frames_and_guidance_count():
    sizes = Sizes(6, 2, 4, 6, (1, 8, 8))
    few = passes_of(FewStep(steps=(1000,), first_steps=(1000, 500)), Blocks(2), sizes, TOKENS)
    assert [p.commits for p in few] == [True, False, False, True, False]
    many = passes_of(ManyStep(steps=3), Blocks(2), sizes, TOKENS)
    assert [p.commits for p in many] == [True] * 2 + [False] * 6 + [True] * 2 + [False] * 6
    assert len(passes_of(ManyStep(steps=3), None, Sizes(6, 0, 4, 6, (1, 8, 8)), TOKENS)) == 6


def test_the_slower_of_computing_and_reading_bounds():
    need = Need(flops=100.0, bytes=30.0) + Need(flops=0.0, bytes=10.0)
    assert need.seconds(10.0, 20.0) == 10.0 and need.seconds(1000.0, 20.0) == 2.0
    assert need.seconds(0.0, 0.0) == 0.0 and need.seconds(10.0, 0.0) == 10.0


@pytest.mark.parametrize("batch", [1, 3])
def test_weights_are_read_once_a_pass_whatever_the_batch(batch):
    size = NetworkSize(8, 8, 2, 4, 4, 4, 4, weight_bytes=1000, cache_bytes=2)
    need = stream_need(size, [Pass(1, 4, 4), Pass(1, 4, 8)], 3, batch)
    assert need.bytes == 2000 + batch * 2 * 2 * 8 * 2 * (4 + 3 + 8 + 3)
    assert need.flops == batch * sum(pass_flops(size, Pass(1, 4, keys), 3) for keys in (4, 8))
