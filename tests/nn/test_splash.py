"""The TPU kernel, interpreted on CPU, against dense attention: values, gradients, meshes, and what it skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from cfjax.core.errors import UserError
from cfjax.core.sharding import make_mesh, on_mesh
from cfjax.nn import splash
from cfjax.nn.attention import attend, dense, pick_backend
from cfjax.nn.visibility import Blocks, Visibility

BATCH, HEADS, DIM = 2, 2, 4
FIRST = Blocks(2, independent_first_frame=True, window=3, sink=1)
CASES = {
    "full": (Visibility("full"), 3, 70),
    "block_causal": (Visibility("block_causal", Blocks(2)), 4, 50),
    "replay": (Visibility("replay", Blocks(1)), 3, 50),
    "teacher_forced, window": (Visibility("teacher_forced", FIRST), 5, 50),
}


def arrays(queries: int, keys: int) -> tuple[jax.Array, ...]:
    shapes = [(BATCH, queries, HEADS, DIM), *[(BATCH, keys, HEADS, DIM)] * 2, (BATCH, queries, HEADS, DIM)]
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


def both(call, *given: jax.Array) -> dict[str, jax.Array]:
    """Values and gradients of one backend."""
    *inputs, weight = given
    out, vjp = jax.vjp(call, *inputs)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *vjp(weight)), strict=True))


def backends(call, *names: str):
    """Values and gradients by each backend, compiled."""
    return [jax.jit(lambda *given, b=b: both(lambda *x: call(*x, b), *given)) for b in names]


def errors(got: dict[str, jax.Array], expected: dict[str, jax.Array]) -> dict[str, float]:
    """Relative error by norm."""
    return {name: float(jnp.linalg.norm(got[name] - expected[name]) / jnp.linalg.norm(expected[name])) for name in got}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of scores, some skipped, on tiny inputs."""
    monkeypatch.setattr(splash, "LARGEST", 128)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_dense_attention_under_every_visibility(name):
    visibility, frames, tokens = CASES[name]
    q_frames = frames * (2 if visibility.kind == "teacher_forced" else 1)
    k_frames = frames * (2 if visibility.kind in ("teacher_forced", "replay") else 1)
    call = lambda q, k, v, b: attend(q, k, v, visibility, num_frames=frames, backend=b)
    given = arrays(q_frames * tokens, k_frames * tokens)
    found = errors(*(run(*given) for run in backends(call, "splash_interpreted", "xla")))
    print(name, {k: f"{v:.1e}" for k, v in found.items()})
    assert max(found.values()) < 2e-6, found


def test_a_part_of_every_frames_queries():
    """Context parallelism by tokens: fewer queries per frame than keys."""
    visibility = Visibility("block_causal", Blocks(2))
    q, k, v, _ = arrays(4 * 10, 4 * 20)
    parts = [attend(q, k, v, visibility, num_frames=4, backend=b) for b in ("splash_interpreted", "xla")]
    np.testing.assert_allclose(*parts, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_the_kernel_reads_a_cache_through_a_traced_mask():
    """Slots of 64 keys of which a block sees some, and its own 64 behind them: one program whatever it sees."""
    *given, weight = arrays(64, 5 * 64)
    splashed, dense_xla = (
        jax.jit(lambda mask, *g, b=b: both(lambda *x: dense(*x, key_mask_T=mask, backend=b), *g))
        for b in ("splash_interpreted", "xla")
    )
    for seen in [(), (0, 1), (2,), (0, 3)]:
        mask = jnp.repeat(jnp.asarray([slot in seen or slot == 4 for slot in range(5)]), 64)
        found = errors(splashed(mask, *given, weight), dense_xla(mask, *given, weight))
        print(seen, {k: f"{v:.1e}" for k, v in found.items()})
        assert max(found.values()) < 2e-6, found
    assert splashed._cache_size() == 1


def test_the_kernel_runs_on_a_mesh():
    """Batch and heads are cut; values and gradients stay."""
    visibility = Visibility("block_causal", Blocks(2))
    given = arrays(4 * 50, 4 * 50)
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    splashed, xla = backends(
        lambda q, k, v, b: attend(q, k, v, visibility, num_frames=4, backend=b), "splash_interpreted", "xla"
    )
    expected = xla(*given)
    with on_mesh(mesh):
        got = splashed(*jax.device_put(given, jax.NamedSharding(mesh, jax.P("data", None, "tensor"))))
    for leaf in got.values():
        assert len(leaf.sharding.device_set) == 4 and leaf.addressable_shards[0].data.shape == (1, 200, 1, DIM)
    found = errors({name: jax.device_get(leaf) for name, leaf in got.items()}, expected)
    print({k: f"{v:.1e}" for k, v in found.items()})
    assert max(found.values()) < 2e-6, found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["block_causal", "replay"])
@pytest.mark.parametrize("blocks", [Blocks(2), Blocks(1, window=3, sink=1), FIRST], ids=["plain", "window", "first"])
def test_seen_blocks_are_those_of_jax_own_mask_processing(kind, blocks):
    """Which blocks of scores are computed, against the library's tables of the same mask, made score by score."""
    visibility, frames, tokens = Visibility(kind, blocks), 7 if blocks is FIRST else 6, 50
    keys = frames * tokens * (2 if visibility.kind == "replay" else 1)
    rule = splash.Rule(visibility.kind, keys, *(n * tokens for n in (blocks.frames, blocks.window, blocks.sink)))
    ends = np.pad(splash.block_ends(visibility, frames, tokens, tokens), (0, -frames * tokens % 128), mode="edge")
    seen = splash.seen_blocks(rule, ends, 128, 128)
    scores = rule(ends[:, None], np.arange(keys + -keys % 128)[None])
    info, _ = mask_info.process_mask(masks.MultiHeadMask([masks.NumpyMask(scores)]), (128, 128), shrink_grid=False)
    np.testing.assert_array_equal(seen, np.asarray(info.block_mask[0]) > 0)
    np.testing.assert_array_equal(splash._next_seen(seen)[seen], np.asarray(info.data_next[0])[seen])
    assert 0 < seen.sum() < seen.size


def test_blocks_pad_little():
    """Text rows, a frame, a chunk of three frames, a video of 480 x 832."""
    sizes = {length: splash.block_size(length) for length in (512, 1560, 4680, 32760)}
    assert sizes == {512: 512, 1560: 896, 4680: 1024, 32760: 1024}
    padded = [-(-length // size) * size / length for length, size in sizes.items()]
    assert max(padded) < 1.15 and padded[-1] < 1.001


def test_the_platform_picks_the_kernel():
    half, single = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    assert [pick_backend("auto", half, p) for p in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "per_head"]
    assert pick_backend("auto", single, "gpu") == "xla" and pick_backend("splash", half, "cpu") == "splash"
    with pytest.raises(UserError, match="attention='flash': use one of auto, xla, cudnn, splash, splash_interpreted"):
        pick_backend("flash", half)


def test_a_few_queries_at_a_time_is_the_same_attention():
    given = arrays(150, 140)
    call = lambda q, k, v, b: dense(q, k, v, key_mask_T=jnp.arange(140) < 90, backend=b)
    found = errors(*(run(*given) for run in backends(call, "chunked", "xla")))
    assert max(found.values()) < 2e-6, found
