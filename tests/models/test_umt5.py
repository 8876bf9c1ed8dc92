"""umT5: parity with transformers on the same random weights, the published size, and what the toy encoder is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import UMT5Config as TorchConfig
from transformers import UMT5EncoderModel

from cfjax.core.errors import UserError
from cfjax.core.precision import BF16
from cfjax.core.tree import from_named, named_leaves
from cfjax.models.text import TextEncoder
from cfjax.models.umt5 import PRESETS, UMT5Config, encode_text, make_umt5, relative_buckets

encode = jax.jit(encode_text, static_argnames="policy")
SMALL = UMT5Config(vocab_size=50, dim=32, heads=3, head_dim=8, ffn_dim=48, layers=3)


def rms(x):
    return np.sqrt(np.mean(np.square(x), axis=-1))


def weights_of(torch_model):
    """transformers' state dict in cfjax's names and layout (kernels transposed, layers stacked)."""
    state = {name: value.numpy() for name, value in torch_model.state_dict().items()}
    attention, ffn = "layer.0.SelfAttention.", "layer.1.DenseReluDense."
    table = {f"{n}/kernel": f"{attention}{n}.weight" for n in "qkvo"}
    table |= {"gate/kernel": f"{ffn}wi_0.weight", "up/kernel": f"{ffn}wi_1.weight", "down/kernel": f"{ffn}wo.weight"}
    table |= {"position_bias": f"{attention}relative_attention_bias.weight"}
    table |= {"attention_norm/scale": "layer.0.layer_norm.weight", "ffn_norm/scale": "layer.1.layer_norm.weight"}
    named = {"token_embedding": state["shared.weight"], "final_norm/scale": state["encoder.final_layer_norm.weight"]}
    for ours, theirs in table.items():
        stacked = np.stack([state[f"encoder.block.{i}.{theirs}"] for i in range(SMALL.layers)])
        named[f"layers/{ours}"] = stacked.swapaxes(1, 2) if ours.endswith("kernel") else stacked
    return named


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    theirs = UMT5EncoderModel(
        TorchConfig(
            vocab_size=SMALL.vocab_size, d_model=SMALL.dim, d_kv=SMALL.head_dim, d_ff=SMALL.ffn_dim,
            num_layers=SMALL.layers, num_heads=SMALL.heads, feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        # Scales start at 1 and position biases small, which would hide errors.
        for name, weight in theirs.named_parameters():
            if "norm" in name or "relative" in name:
                weight.add_(0.5 * torch.randn_like(weight))
    template = jax.eval_shape(lambda: make_umt5(SMALL, jax.random.key(0)))
    return from_named(template, {k: jnp.asarray(v) for k, v in weights_of(theirs).items()}), theirs


def random_batch(length):
    rng = np.random.default_rng(0)
    mask_BS = np.arange(length) < np.array([length, length // 2, 1])[:, None]
    return np.where(mask_BS, rng.integers(2, 50, (3, length)), 0).astype(np.int32), mask_BS


@pytest.mark.parametrize("length", [12, 140])
def test_equals_transformers(pair, length):
    ours, theirs = pair
    ids_BS, mask_BS = random_batch(length)
    text_BSE = np.asarray(encode(ours, ids_BS, mask_BS))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids_BS).long(), torch.from_numpy(mask_BS).long()).last_hidden_state.numpy()
    error = np.abs(text_BSE - expected)[mask_BS].max() / np.abs(expected).max()
    assert error < 3e-6, error
    assert not text_BSE[~mask_BS].any()


def test_padding_does_not_change_the_rows(pair):
    model, _ = pair
    ids_BS, mask_BS = random_batch(12)
    longer = [np.pad(a, ((0, 0), (0, 5))) for a in (ids_BS, mask_BS)]
    np.testing.assert_allclose(encode(model, *longer)[:, :12], encode(model, ids_BS, mask_BS), atol=1e-5)


def test_bfloat16_compute_stays_close(pair):
    model, _ = pair
    ids_BS, mask_BS = random_batch(12)
    exact, rough = encode(model, ids_BS, mask_BS), encode(model, ids_BS, mask_BS, policy=BF16)
    assert rough.dtype == jnp.float32
    assert 0 < rms(np.asarray(rough - exact)).max() < 0.05 * rms(np.asarray(exact)).max()


def test_relative_buckets():
    golden = [*range(8), *[8] * 4, *[9] * 4, *[10] * 7, *[11] * 9, *[12] * 14, *[13] * 18, *[14] * 27, *[15] * 59]
    buckets = relative_buckets(150)
    np.testing.assert_array_equal(buckets[-1, ::-1], golden)
    np.testing.assert_array_equal(buckets[0, 1:], np.array(golden[1:]) + 16)


def test_published_size():
    template = jax.eval_shape(lambda: make_umt5(PRESETS["umt5_xxl"], jax.random.key(0)))
    assert sum(leaf.size for leaf in named_leaves(template).values()) == 5_680_910_336


def test_impossible_sizes():
    with pytest.raises(UserError, match="must be positive"):
        UMT5Config(vocab_size=0, dim=4, heads=1, head_dim=4, ffn_dim=8, layers=1)


CAPTIONS = [f"a {c} {s} moves {d}" for c in ("red", "blue") for s in ("circle", "square") for d in ("left", "up")]


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.build(CAPTIONS, 10)


def test_one_different_word_changes_its_row_most_and_the_others_a_little(encoder):
    red, blue, empty = encoder.encode(["a red circle moves left", "a blue circle moves left", ""])
    np.testing.assert_allclose(rms(red[:6]), 1.0, atol=1e-3)
    change = rms(red - blue)
    assert change[1] > 0.9
    others = change[[0, 2, 3, 4, 5]]
    assert (others > 0.1).all() and (others < 0.6).all()
    assert not change[6:].any()
    np.testing.assert_allclose(rms(empty[0]), 1.0, atol=1e-3)
    assert not empty[1:].any()


def test_all_words_are_told_apart(encoder):
    rows = encoder.encode(["red blue circle square left up a"])[0, :7]
    distance = rms(rows[:, None] - rows[None])
    assert distance[~np.eye(7, dtype=bool)].min() > 0.7


def test_encoding_does_not_depend_on_the_batch(encoder):
    many = encoder.encode(CAPTIONS * 2)
    assert many.shape == (16, 10, 64) and many.dtype == np.float32
    np.testing.assert_array_equal(many[:8], many[8:])
    np.testing.assert_array_equal(encoder.encode(CAPTIONS[3:4])[0], many[3])
    assert encoder.encode([]).shape == (0, 10, 64)


def test_round_trip_through_a_folder(encoder, tmp_path):
    encoder.save(tmp_path / "text")
    again = TextEncoder.load(tmp_path / "text")
    assert again.length == 10 and again.width == 64
    np.testing.assert_array_equal(again.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_same_seed_same_encoder(encoder):
    np.testing.assert_array_equal(TextEncoder.build(CAPTIONS, 10).encode(["a"]), encoder.encode(["a"]))
    assert np.abs(TextEncoder.build(CAPTIONS, 10, seed=1).encode(["a"]) - encoder.encode(["a"])).max() > 0.1


def test_broken_folders(encoder, tmp_path):
    with pytest.raises(UserError, match=r"text_encoder\.json: cannot read"):
        TextEncoder.load(tmp_path)
    encoder.save(tmp_path)
    (tmp_path / "text_encoder.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"text_encoder\.safetensors: cannot read"):
        TextEncoder.load(tmp_path)
    TextEncoder.build(["two words"], 10).save(tmp_path / "other")
    encoder.save(tmp_path)
    (tmp_path / "other/text_encoder.safetensors").rename(tmp_path / "text_encoder.safetensors")
    with pytest.raises(UserError, match="weights do not fit the model"):
        TextEncoder.load(tmp_path)
    (tmp_path / "text_encoder.json").write_text("{}")
    with pytest.raises(UserError, match=r"text_encoder\.json: not a text encoder"):
        TextEncoder.load(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(encoder):
    small = TextEncoder.build(["two words"], 10)
    with pytest.raises(UserError, match="do not belong together"):
        TextEncoder(encoder.tokenizer, small.model, 10)
