"""Who sees whom: the worked examples of the reference, rectangles against a brute-force mask, and their cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.nn.attention import attend, dense
from cfjax.nn.visibility import FULL, Blocks, Visibility


def seen(visibility: Visibility, num_frames: int) -> np.ndarray:
    """Dense frame mask [queries, keys] painted from the rectangles."""
    halves = {"teacher_forced": (2, 2), "replay": (1, 2)}.get(visibility.kind, (1, 1))
    mask = np.zeros((halves[0] * num_frames, halves[1] * num_frames), bool)
    for r in visibility.rectangles(num_frames):
        for a, b in r.keys:
            mask[r.queries[0] : r.queries[1], a:b] = True
    return mask


def frames_seen(mask_row: np.ndarray) -> list[int]:
    return np.flatnonzero(mask_row).tolist()


def test_local_window_example():
    # reference (`CausalWanModel._prepare_blockwise_causal_attn_mask`): l=3, nfb=2, F=6 -> frames (0,1) see {0,1}; (2,3)
    # see {1,2,3}; (4,5) see {3,4,5}
    mask = seen(Visibility("block_causal", Blocks(2, window=3)), 6)
    assert [frames_seen(mask[f]) for f in (0, 1, 2, 3, 4, 5)] == [[0, 1]] * 2 + [[1, 2, 3]] * 2 + [[3, 4, 5]] * 2


def test_independent_first_frame_example():
    # nfb=2, F=5 -> frames see 1, 3, 3, 5, 5 frames
    mask = seen(Visibility("block_causal", Blocks(2, independent_first_frame=True)), 5)
    assert mask.sum(1).tolist() == [1, 3, 3, 5, 5]


@pytest.mark.parametrize(
    "blocks, expected",
    [
        (Blocks(2, window=6), [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9]]),
        (Blocks(2, window=6, sink=1), [None, None, None, [0, 3, 4, 5, 6, 7], [0, 5, 6, 7, 8, 9]]),
        (Blocks(3, window=6, sink=3), [None, None, [0, 1, 2, 6, 7, 8], [0, 1, 2, 9, 10, 11]]),
    ],
)
def test_window_and_sink_examples(blocks, expected):
    # reference (`CausalWanSelfAttention.forward`), worked examples of its KV cache
    mask = seen(Visibility("block_causal", blocks), blocks.frames * len(expected))
    for block, frames in enumerate(expected):
        if frames is not None:
            assert frames_seen(mask[block * blocks.frames]) == frames


@pytest.mark.parametrize("blocks", [Blocks(1), Blocks(2), Blocks(3), Blocks(2, window=4, sink=1)])
def test_teacher_forcing_rule(blocks):
    # clean query: clean blocks 0..b; noisy query: clean blocks 0..b-1 and noisy block b only
    frames = 6
    mask = seen(Visibility("teacher_forced", blocks), frames)
    block = np.arange(frames) // blocks.frames
    clean = block[:, None] >= block[None, :]
    if blocks.window:
        end = (block + 1) * blocks.frames
        key = np.arange(frames)
        clean &= (key[None] >= end[:, None] - (blocks.window - blocks.sink)) | (key[None] < blocks.sink)
    own = block[:, None] == block[None, :]
    expected = np.block([[clean, np.zeros_like(clean)], [clean & ~own, own]])
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(seen(Visibility("replay", blocks), frames), expected[frames:])


@pytest.mark.parametrize("kind", ["full", "block_causal", "teacher_forced", "replay"])
def test_attend_equals_masked_softmax(kind):
    frames, tokens = 4, 3
    visibility = Visibility(kind, Blocks(2, window=3)) if kind != "full" else FULL
    mask = np.kron(seen(visibility, frames), np.ones((tokens, tokens), bool))
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, mask.shape[0], 2, 8))
    k, v = (jax.random.normal(key, (2, mask.shape[1], 2, 8)) for key in keys[1:])
    scores = np.einsum("bqnk,btnk->bnqt", q, k) / np.sqrt(8)
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnqt,btnk->bqnk", weights, v)
    got = attend(q, k, v, visibility, num_frames=frames)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_teacher_forced_flops_are_the_rectangles():
    """XLA's own count of the compiled attention is the rectangles' arithmetic, not a dense 2L x 2L mask's."""
    frames, tokens, heads, head_dim = 21, 8, 2, 128
    visibility = Visibility("teacher_forced", Blocks(3))
    q = jax.ShapeDtypeStruct((1, 2 * frames * tokens, heads, head_dim), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attend(q, k, v, visibility, num_frames=frames)).lower(q, q, q).compile()
    pairs = (
        sum((r.queries[1] - r.queries[0]) * sum(b - a for a, b in r.keys) for r in visibility.rectangles(frames))
        * tokens**2
    )
    arithmetic = 4 * pairs * heads * head_dim
    dense_arithmetic = 4 * (2 * frames * tokens) ** 2 * heads * head_dim
    counted = compiled.cost_analysis()["flops"]
    print(f"flops: counted {counted:.4g}, rectangles {arithmetic:.4g}, dense mask {dense_arithmetic:.4g}")
    assert abs(counted / arithmetic - 1) < 0.15
    assert counted < 0.35 * dense_arithmetic


def test_key_mask_hides_keys():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (1, 4, 2, 8)) for key in keys)
    mask = jnp.array([True, False, True, False])
    np.testing.assert_allclose(dense(q, k, v, key_mask_T=mask), dense(q, k[:, mask], v[:, mask]), atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "auto", "chunked", "splash_interpreted"])
def test_heads_may_have_masks_of_their_own(backend):
    """Per video and head, on every backend (but xla, they have chunked compute it)."""
    q, k, v = (np.asarray(jax.random.normal(jax.random.key(i), (2, 6, 2, 8))) for i in range(3))
    mask = np.random.default_rng(0).random((2, 2, 6)) < 0.5
    mask[..., 0] = True
    weights = np.exp(np.einsum("bqnk,bsnk->bnqs", q, k) * 8**-0.5) * mask[:, :, None]
    weights /= weights.sum(-1, keepdims=True)
    found = jax.jit(lambda *qkv: dense(*qkv, key_mask_T=jnp.asarray(mask), backend=backend))(q, k, v)
    np.testing.assert_allclose(found, np.einsum("bnqs,bsnk->bqnk", weights, v), atol=2e-6)


def test_bad_layouts_are_refused():
    with pytest.raises(UserError, match="do not divide"):
        Blocks(3).spans(7)
    with pytest.raises(UserError, match=r"blocks\.window"):
        Blocks(3, window=4, sink=2)
    with pytest.raises(UserError, match=r"blocks\.sink"):
        Blocks(3, sink=1)
    with pytest.raises(UserError, match=r"blocks\.frames"):
        Blocks(0)


@pytest.mark.parametrize("backend", ["xla", "per_head", "chunked", "splash_interpreted"])
def test_a_bias_is_added_to_the_logits(backend, monkeypatch):
    """Per key, on every backend (splash has chunked compute it); -inf hides a key."""
    monkeypatch.setattr("cfjax.nn.attention.SMALL", 0)
    q, k, v = (np.asarray(jax.random.normal(jax.random.key(i), (1, 6, 2, 8))) for i in range(3))
    bias = np.array([0.0, -1.0, -np.inf, 0.5, 0.0, -np.inf], np.float32)
    logits = np.einsum("bqnk,bsnk->bnqs", q, k) * 8**-0.5 + bias.reshape(1, 1, 1, -1)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = jax.jit(lambda *qkv: dense(*qkv, key_bias_T=jnp.asarray(bias), backend=backend))(q, k, v)
    np.testing.assert_allclose(found, np.einsum("bnqs,bsnk->bqnk", weights, v), atol=2e-6)
