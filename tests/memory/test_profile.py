"""Tables of heads: the attention that is measured is the network's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.memory.names import parse_memory
from cfjax.memory.profile import (
    CHUNK,
    LABELS,
    attention_mass,
    frame_masses,
    head_labels,
    head_shares,
    heads_record,
    labels_text,
    read_labels,
)
from cfjax.models.cache import init_cache
from cfjax.models.context import forward_kv, forward_observed, layer_of
from cfjax.models.ends import embed_frames
from cfjax.models.wan import apply_block, attend_cached
from cfjax.nn.visibility import Blocks
from cfjax.rollout.head_masses import last_block_mass
from tests.memory.states import TOKENS, streamed
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, normal, relative, text_kv, tiny


def softmax_mass(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Mean attention of queries [B, F, T, N, K] to every key frame, [B, N, F]."""
    scores = np.einsum("bftnk,bgsnk->bnftgs", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max((-2, -1), keepdims=True))
    return (weights / weights.sum((-2, -1), keepdims=True)).sum(-1).mean((2, 3))


def test_mass_is_a_softmax_summed_over_frames():
    """Of more queries than are scored at a time; frames that are not seen have none."""
    q, k = (np.asarray(normal(seed, (2, frames, 50, 2, 6))) for seed, frames in ((0, 3), (1, 5)))
    assert q.shape[1] * q.shape[2] > CHUNK
    found = jax.jit(attention_mass)(q, k)
    worst = np.abs(found - softmax_mass(q, k)).max()
    apart = jax.jit(frame_masses)(q, k)
    worst = max(worst, *(np.abs(apart[:, :, i] - softmax_mass(q[:, i : i + 1], k)).max() for i in range(3)))
    seen = jax.jit(attention_mass)(q, k, jnp.array([True, False, True, True, False]))
    worst = max(worst, np.abs(seen[..., jnp.array([0, 2, 3])] - softmax_mass(q, k[:, [0, 2, 3]])).max())
    print(f"mass: {worst:.1e}")
    assert worst < 1e-6 and not np.asarray(seen)[..., [1, 4]].any()


def test_shares_are_of_what_lies_behind_the_sink():
    mass_LNF = np.array([[[0.5, 0.1, 0.1, 0.3], [0.0, 0.5, 0.25, 0.25]]])
    np.testing.assert_allclose(head_shares(mass_LNF, 1, 2), [[0.8, 0.5]])
    about = {"sink": 1, "recent": 2, "threshold": 0.79}
    assert heads_record("a run", CONFIG, mass_LNF, about)["static"] == [[True, False]]


def masses(kind: str, frames: int, period: float, noise: float) -> np.ndarray:
    """Attention of a block of three frames to `frames` key frames, [Q, F]: of a known kind, not exactly so."""
    rng, key = np.random.default_rng(frames), np.arange(frames)
    query = frames - 3 + np.arange(3)[:, None]
    score = {
        "anchor": 0.05 * (key - query),
        "wave": np.cos(2 * np.pi * (key - query) / period) + 0.1 * (key - query),
        "veil": np.where((key == 0) | (key >= frames - 4), 3.0, 0.0) + 0.0 * query,
    }[kind]
    weights = np.exp(score + noise * rng.normal(size=score.shape))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(("frames", "period"), [(12, 3), (21, 6), (23, 5), (40, 6), (41, 9)])
def test_heads_of_known_kinds_get_their_labels(frames, period, noise):
    """Whether or not the period divides the number of frames; a wave need not attend evenly otherwise."""
    mass_LNFF = np.stack([[masses(kind, frames, period, noise) for kind in LABELS]])
    found = head_labels(mass_LNFF, 1, 4, 0.5, 0.5)
    assert found.label.tolist() == [list(LABELS.values())]
    assert abs(found.period[0, 1] - period) <= 0.2 * period and found.power[0, 1] > 0.5


def test_labels_follow_their_thresholds_and_no_number_is_too_small():
    """Uniform attention is an anchor's; none at all between, a veil's; with three frames between nothing is a wave."""
    uniform = np.full((1, 1, 3, 12), 1 / 12)
    assert head_labels(uniform, 1, 4, 0.0, 0.99).label.tolist() == [[LABELS["anchor"]]]
    assert head_labels(uniform, 1, 4, 0.0, 1.1).label.tolist() == [[LABELS["veil"]]]
    np.testing.assert_allclose(head_labels(uniform, 1, 4, 0.5, 0.5).between, 1.0)
    none = np.zeros((1, 1, 3, 12))
    none[..., 0] = 1.0
    found = head_labels(none, 1, 4, 0.5, 0.5)
    assert found.label.tolist() == [[LABELS["veil"]]] and all(np.isfinite(x).all() for x in found)
    wave = np.stack([[masses("wave", 8, 2, 0.0)]])
    assert head_labels(wave, 1, 4, 0.5, 0.0).label.tolist() == [[LABELS["anchor"]]]
    assert head_labels(wave, 0, 4, 0.5, 0.0).label.tolist() == [[LABELS["wave"]]]


def test_labels_are_read_as_they_are_written(tmp_path):
    label_LN, file = np.array([[1, -1, 2], [2, 2, -1]]), tmp_path / "labels.csv"
    file.write_text(labels_text(label_LN))
    assert read_labels(str(file)).label_LN == ((1, -1, 2), (2, 2, -1))


@pytest.mark.slow
def test_the_labels_of_a_network_run_in_it(tmp_path):
    """Measured, written, read, streamed; the first block sees nothing before it, and is as under a full cache."""
    mass = last_block_mass(
        tiny(), normal(4, SHAPE), normal(5, (BATCH, 2, *SHAPE[2:])), 0.6, text_kv(), blocks=Blocks(2)
    )
    label_LN = head_labels(np.asarray(mass).mean(1), 1, 2, 0.5, 0.5).label
    (tmp_path / "labels.csv").write_text(labels_text(label_LN))
    settings = "window=7, sink=2, period=3, capacity=2, merged=2, near=2, far=4"
    memory = parse_memory(f"pyramid(profile={tmp_path / 'labels.csv'}, {settings})")
    assert memory is not None
    inputs = [normal(seed, (BATCH, 12, *SHAPE[2:])) for seed in (1, 2)]
    _, flow = streamed(memory, *inputs)
    full = streamed(None, *inputs)[1]
    assert relative(flow[:, :2], full[:, :2]) < 2e-6 and relative(flow[:, 10:], full[:, 10:]) > 1e-3
    assert np.isfinite(flow).all()


def test_what_a_commit_observes_is_what_attention_gets():
    """Queries and keys of a block against a cache, layer by layer, beside those that `apply_block` hands on."""
    model, blocks, sigma = tiny(), Blocks(2), jnp.full((BATCH, 2), 0.3)
    latents, start = normal(3)[:, :2], jnp.int32(2)
    cache = init_cache(CONFIG, BATCH, FRAMES, TOKENS, blocks)
    work = (latents, sigma, text_kv(), cache, start, blocks)
    kv, (q, k, number) = jax.jit(lambda model: forward_observed(model, *work, lambda *seen: seen))(model)
    plain = jax.jit(lambda model: forward_kv(model, *work))(model)
    assert max(relative(a, b) for a, b in zip(kv, plain, strict=True)) < 2e-6
    assert relative(k, kv.k_LBFTNK) == 0 and number.tolist() == [0, 1]

    @jax.jit
    def handed_on(model):
        given = []
        stream, _, e0, table = embed_frames(model, latents, sigma, start + jnp.arange(2))
        attend, _ = attend_cached(CONFIG, cache, start, 2, blocks)
        for layer in range(CONFIG.num_layers):
            self_attend = lambda *qkv: given.append(qkv[:2]) or attend(*qkv)
            block, text = layer_of((model.blocks, text_kv()), layer)
            stream, _ = apply_block(block, stream, e0, text, jnp.int32(layer), table, self_attend, CONFIG)
        return given

    for layer, given in enumerate(handed_on(model)):
        assert relative(q[layer], given[0]) < 2e-6 and relative(k[layer], given[1]) < 2e-6


def test_mass_of_the_last_block():
    """All frames are seen, those before the block without noise: as if these were committed and it were observed."""
    clean, noise, blocks = normal(4, SHAPE), normal(5, (BATCH, 2, *SHAPE[2:])), Blocks(2, window=4, sink=1)
    found = last_block_mass(tiny(), clean, noise, jnp.float32(0.6), text_kv(), blocks=blocks)
    assert found.shape == (CONFIG.num_layers, BATCH, CONFIG.num_heads, 2, FRAMES)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)
    other = last_block_mass(tiny(), clean.at[1].add(1.0), noise, jnp.float32(0.6), text_kv(), blocks=blocks)
    assert relative(other[:, 0], found[:, 0]) < 2e-6 and relative(other[:, 1], found[:, 1]) > 1e-3
