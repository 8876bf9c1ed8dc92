"""umT5: parity with transformers on the same random weights, the published size, and what the toy encoder is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import UMT5Config as TorchConfig
from transformers import UMT5EncoderModel

from cfjax.conversion.umt5 import DIFFUSERS, import_umt5
from cfjax.core.errors import UserError
from cfjax.core.precision import BF16, Policy
from cfjax.core.tree import from_named, named_leaves
from cfjax.models import umt5
from cfjax.models.text import TextEncoder, text_fingerprint, weights_fingerprint
from cfjax.models.tokenizer import CaptionTokenizer, load_tokenizer
from cfjax.models.umt5 import PRESETS, UMT5Config, encode_by_layer, encode_text, make_umt5, relative_buckets
from tests.tiny_tokenizer import vocab_size, write_tokenizer

encode = jax.jit(encode_text, static_argnames="policy")
SMALL = UMT5Config(vocab_size=50, dim=32, heads=3, head_dim=8, ffn_dim=48, layers=3)


def rms(x):
    return np.sqrt(np.mean(np.square(x), axis=-1))


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
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return jax.tree.map(jnp.asarray, import_umt5(state, SMALL, DIFFUSERS)), theirs


def random_batch(length):
    """Ids, and masks of a full caption, a half one, one token, and one with padding in front and in the middle."""
    rng = np.random.default_rng(0)
    mask_BS = np.arange(length) < np.array([length, length // 2, 1, length])[:, None]
    mask_BS[3, [0, length // 2]] = False
    return np.where(mask_BS, rng.integers(2, 50, mask_BS.shape), 0).astype(np.int32), mask_BS


@pytest.mark.parametrize("length", [12, 140])
def test_equals_transformers(pair, length):
    ours, theirs = pair
    ids_BS, mask_BS = random_batch(length)
    text_BSE = np.asarray(encode(ours, ids_BS, mask_BS))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids_BS).long(), torch.from_numpy(mask_BS).long()).last_hidden_state.numpy()
    error = np.abs(text_BSE - expected)[mask_BS].max() / np.abs(expected).max()
    print(f"umT5 at {length} rows, transformers against ours: max relative error {error:.1e}")
    assert error < 3e-6, error
    assert not text_BSE[~mask_BS].any()


def test_every_layer_has_its_own_position_bias(pair):
    """Exchanging two layers' tables changes the rows: the parity above does not rest on equal ones."""
    model, _ = pair
    ids_BS, mask_BS = random_batch(12)
    bias = model.layers.position_bias[...]
    swapped = {**named_leaves(model), "layers/position_bias": bias[jnp.array([1, 0, 2])]}
    change = encode(from_named(model, swapped), ids_BS, mask_BS) - encode(model, ids_BS, mask_BS)
    assert rms(np.asarray(change))[0].min() > 0.01


def test_layer_by_layer_is_the_same(pair):
    model, _ = pair
    ids_BS, mask_BS = random_batch(12)
    by_layer, at_once = (np.asarray(f(model, ids_BS, mask_BS)) for f in (encode_by_layer, encode))
    assert np.abs(by_layer - at_once).max() < 3e-6 * np.abs(at_once).max()


def test_padding_does_not_change_the_rows(pair):
    model, _ = pair
    ids_BS, mask_BS = random_batch(12)
    longer = [np.pad(a, ((0, 0), (0, 5))) for a in (ids_BS, mask_BS)]
    np.testing.assert_allclose(encode(model, *longer)[:, :12], encode(model, ids_BS, mask_BS), atol=1e-5)


def test_bfloat16_compute_stays_close(pair):
    model, _ = pair
    ids_BS, mask_BS = random_batch(12)
    exact = encode(model, ids_BS, mask_BS)
    products_only, everything = (
        rms(np.asarray(encode(model, ids_BS, mask_BS, policy=policy) - exact)).max() / rms(np.asarray(exact)).max()
        for policy in (BF16, Policy("bfloat16", "bfloat16"))
    )
    print(f"bfloat16 products: {products_only:.1e}; bfloat16 residual stream and norms too: {everything:.1e}")
    assert 0 < products_only < 0.03
    assert products_only < everything < 0.06


def test_bfloat16_weights_stay_so(pair):
    """Weights that were bfloat16 all along give the same rows as their float32 copies, and are not copied."""
    model, _ = pair
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    ids_BS, mask_BS = random_batch(12)
    rows = encode(narrow, ids_BS, mask_BS)
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, encode(wide, ids_BS, mask_BS), atol=1e-5)
    again = from_named(jax.eval_shape(lambda: make_umt5(SMALL, jax.random.key(0))), named_leaves(narrow))
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype("bfloat16")}


def test_memory_at_the_published_size():
    """A compiled layer of the 11 GB encoder needs less than 1 GB beside the weights; nothing is allocated."""
    config = dataclasses.replace(PRESETS["umt5_xxl"], vocab_size=8)
    shapes = jax.eval_shape(lambda: make_umt5(config, jax.random.key(0)))
    model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    x_BSE, mask_BS = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32), jax.ShapeDtypeStruct((1, 512), bool)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    memory = umt5.compiled_layer.lower(model, index, x_BSE, mask_BS, policy=BF16).compile().memory_analysis()
    print(f"weights {memory.argument_size_in_bytes / 1e9:.1f} GB, beside them {memory.temp_size_in_bytes / 1e9:.2f} GB")
    assert memory.argument_size_in_bytes < 9.4e9
    assert memory.temp_size_in_bytes < 1e9


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


def test_all_words_differ(encoder):
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


@pytest.fixture(scope="module")
def wan_text(tmp_path_factory):
    """umT5's tokenizer and a bfloat16 encoder behind it, at the published text length."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    config = dataclasses.replace(SMALL, vocab_size=vocab_size() + 6)

    @jax.jit
    def make():
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_umt5(config, jax.random.key(0)))

    return TextEncoder(tokenizer, make(), 512)


def test_rows_at_the_published_length(wan_text):
    """Short captions are computed short and long ones are cut; all as if 512 rows had been computed for each."""
    captions = ["a red cat", "", "walks over fresh snow, " * 5, "very long " * 400]
    text_BSE = wan_text.encode(captions)
    assert text_BSE.shape == (4, 512, 32) and text_BSE.dtype == np.float32
    ids_BS, mask_BS = wan_text.tokenizer.encode(captions, 512)
    assert mask_BS.sum(axis=1).tolist()[1] == 1 and 64 < mask_BS[2].sum() <= 128 and mask_BS[3].all()
    np.testing.assert_allclose(text_BSE, encode(wan_text.model, ids_BS, mask_BS), atol=2e-5)
    assert not text_BSE[~mask_BS].any() and (rms(text_BSE)[mask_BS] > 0.1).all()


def test_a_saved_encoder_keeps_its_pieces_and_its_dtype(wan_text, tmp_path):
    wan_text.save(tmp_path)
    again = TextEncoder.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(again.model)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(again.encode(["a red cat"]), wan_text.encode(["a red cat"]))
    assert again.fingerprint() == wan_text.fingerprint()


def test_fingerprints(encoder, wan_text):
    assert len(encoder.fingerprint()) == 16
    trained = {name: np.asarray(x) + 1e-3 for name, x in named_leaves(encoder.model).items()}
    others = [
        wan_text,
        dataclasses.replace(encoder, model=from_named(encoder.model, trained)),
        dataclasses.replace(encoder, tokenizer=CaptionTokenizer.build(["a whale"])),
        dataclasses.replace(encoder, policy=BF16),
        dataclasses.replace(encoder, weights="from a record"),
    ]
    assert len({encoder.fingerprint(), *(other.fingerprint() for other in others)}) == 6
    assert dataclasses.replace(encoder, length=12).fingerprint() == encoder.fingerprint()
    # As one who has not loaded the weights gets it from their record.
    weights = weights_fingerprint(named_leaves(wan_text.model))
    assert text_fingerprint(weights, wan_text.model.config, wan_text.tokenizer) == wan_text.fingerprint()
