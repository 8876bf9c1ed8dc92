"""The tiny autoencoder: the original's numbers, one function whether streamed or whole, and strict conversion."""

import ast
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.conversion.tiny_vae import (
    TAEHV,
    abstract_tiny_vae,
    config_json_tiny_vae,
    export_tiny_vae,
    import_tiny_vae,
    infer_config_tiny_vae,
)
from cfjax.core.errors import UserError
from cfjax.core.precision import BF16
from cfjax.core.tree import named_leaves
from cfjax.models.codec import Codec
from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig, published_tiny_vae
from tests.golden.record_taehv import FIRST_GROW, PIXELS, draw, inputs, inputs_2_2, random_weights, wide_first_grow
from tests.synthetic import taehv_shapes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "taehv.npz")
GOLDEN_2_2 = np.load(Path(__file__).parents[1] / "golden" / "taehv_2_2.npz")
SHAPES = {
    str(name): ast.literal_eval(str(shape)) for name, shape in zip(GOLDEN["names"], GOLDEN["shapes"], strict=True)
}
PUBLISHED = TinyVAEConfig()
SMALL = TinyVAEConfig(latent_channels=4, encoder_width=8, decoder_widths=(16, 8, 8, 8))

decode, encode = jax.jit(TinyVAE.decode), jax.jit(TinyVAE.encode)
decode_step, encode_step = jax.jit(TinyVAE.decode_step), jax.jit(TinyVAE.encode_step)


@cache
def small_weights() -> dict[str, np.ndarray]:
    return random_weights(taehv_shapes(8, (16, 8, 8, 8), z_dim=4))


@cache
def small() -> TinyVAE:
    return import_tiny_vae(small_weights(), SMALL)


def latents(frames: int, batch: int = 2) -> np.ndarray:
    return draw("small latents", (batch, frames, 2, 3, SMALL.latent_channels))


def video(frames: int, batch: int = 2) -> np.ndarray:
    return np.tanh(draw("small video", (batch, frames, 16, 24, 3)))


def close(ours: jax.Array, theirs: np.ndarray, tolerance: float, what: str) -> None:
    assert ours.shape == theirs.shape
    error = float(np.abs(np.asarray(ours) - theirs).max())
    print(f"{what}: {error:.1e}")
    assert error < tolerance


def test_the_original_decodes_and_encodes_the_same():
    model, given = import_tiny_vae(random_weights(SHAPES), PUBLISHED), inputs()
    # 3 latents are 9 frames: the original's first 3 of 12 are dropped, in both.
    close(decode(model, given["latents"])[PIXELS], 2 * GOLDEN["decoded"] - 1, 2e-5, "decoded")
    close(encode(model, given["video"]), GOLDEN["encoded"], 5e-5, "encoded, of numbers ~ 3.4")


def test_the_original_of_wan_2_2_decodes_and_encodes_the_same():
    """Patches of 2 x 2 pixels, 48 channels, the published sizes otherwise."""
    shapes = taehv_shapes(z_dim=48, patch=2)
    config = infer_config_tiny_vae(shapes, "taehv")
    assert config == published_tiny_vae(48) and config.side == 16
    model, given = import_tiny_vae(random_weights(shapes), config), inputs_2_2()
    close(decode(model, given["latents"])[PIXELS], 2 * GOLDEN_2_2["decoded"] - 1, 2e-5, "decoded")
    close(encode(model, given["video"]), GOLDEN_2_2["encoded"], 5e-5, "encoded")


def test_the_original_cuts_a_wide_first_grow_and_so_do_we():
    wide = wide_first_grow(random_weights(SHAPES))
    config = infer_config_tiny_vae({name: x.shape for name, x in wide.items()}, "taehv")
    assert config == PUBLISHED
    model = import_tiny_vae(wide, config)
    close(decode(model, inputs()["latents"][:1, :1])[PIXELS], 2 * GOLDEN["cut"] - 1, 2e-5, "cut")
    np.testing.assert_array_equal(export_tiny_vae(model)[FIRST_GROW], wide[FIRST_GROW][256:])


@pytest.mark.parametrize("steps", [(1, 3), (3, 1), (1, 1, 1, 1)], ids=str)
def test_streamed_decoding_is_whole_clip_decoding(steps):
    x, model = latents(4), small()
    state, frames, done = model.init_state(2), [], 0
    for count in steps:
        got, state = decode_step(model, x[:, done : done + count], state)
        assert got.shape[1] == 4 * count - (0 if frames else 3)
        frames.append(np.asarray(got))
        done += count
    close(np.concatenate(frames, axis=1), np.asarray(decode(model, x)), 1e-5, f"steps {steps}")


@pytest.mark.parametrize("steps", [(1, 4, 4), (5, 4), (3, 6)], ids=str)
def test_streamed_encoding_is_whole_clip_encoding(steps):
    x, model = video(9), small()
    state, out, done = model.init_encode_state(2), [], 0
    for count in steps:
        got, state = encode_step(model, x[:, done : done + count], state)
        done += count
        out.append(np.asarray(got))
        assert sum(part.shape[1] for part in out) == done // 4
    out.append(np.asarray(model.encode_end(state)))
    close(np.concatenate(out, axis=1), np.asarray(encode(model, x)), 1e-5, f"steps {steps}")
    # A clip that fills its last latent has nothing left.
    assert model.encode_end(encode_step(model, x[:, :4], model.init_encode_state(2))[1]).shape == (2, 0, 2, 3, 4)


def test_the_past_never_sees_the_future_and_the_future_sees_the_past():
    x = latents(4)
    before, after = decode(small(), x), decode(small(), np.concatenate([x[:, :2], x[:, 2:] + 1], axis=1))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    other_start = decode(small(), np.concatenate([x[:, :1] + 1, x[:, 1:]], axis=1))
    assert float(jnp.abs(before[:, 1:5] - other_start[:, 1:5]).max()) > 1e-3
    alone = decode(small(), x[:1])
    close(alone, np.asarray(before[:1]), 1e-6, "one clip alone, or in a batch")


def test_bfloat16_is_close_and_is_bfloat16():
    model = import_tiny_vae(small_weights(), replace(SMALL, precision=BF16))
    exact, (rough, state) = decode(small(), latents(2)), decode_step(model, latents(2), ())
    assert rough.dtype == jnp.float32 and all(x.dtype == jnp.bfloat16 for x in state)
    error = float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact))
    print(f"bfloat16 decoding: {error:.1e} by norm")
    assert 1e-4 < error < 0.05
    exact, rough = encode(small(), video(5)), encode(model, video(5))
    error = float(jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact))
    print(f"bfloat16 encoding: {error:.1e} by norm")
    assert rough.dtype == jnp.float32 and 1e-4 < error < 0.05


def test_it_is_a_codec():
    codec: Codec = small()
    assert codec.stride == (4, 8, 8) and codec.latent_channels == 4
    assert jax.eval_shape(codec.encode, video(5)).shape == (2, 2, 2, 3, 4)
    assert jax.eval_shape(codec.decode, latents(21, batch=1)).shape == (1, 81, 16, 24, 3)
    assert codec.describe() == import_tiny_vae(small_weights(), SMALL).describe()
    changed = {**small_weights(), "decoder.22.bias": small_weights()["decoder.22.bias"] + 1}
    assert codec.describe()["fingerprint"] != import_tiny_vae(changed, SMALL).describe()["fingerprint"]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: m.decode(jnp.zeros((1, 1, 2, 2, 16))), r"latents \(1, 1, 2, 2, 16\) need \[B,F,H,W,4\]"),
        (lambda m: m.decode(jnp.zeros((1, 0, 2, 2, 4))), "F > 0"),
        (lambda m: m.encode(jnp.zeros((1, 4, 8, 8, 3))), r"P = 1 \+ 4 n"),
        (lambda m: m.encode(jnp.zeros((1, 5, 8, 12, 3))), "multiples of 8"),
        (lambda m: m.encode_end(m.init_encode_state(1)), "no frame was encoded yet"),
        (lambda m: TinyVAEConfig(time_grow=(1, 1, 2)), "products must be equal"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(UserError, match=says):
        call(small())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_there_and_back_is_exact(dtype):
    weights = {name: x.astype(dtype) for name, x in random_weights(SHAPES).items()}
    again = export_tiny_vae(import_tiny_vae(weights, PUBLISHED))
    assert again.keys() == weights.keys()
    for name, array in weights.items():
        assert again[name].dtype == dtype
        np.testing.assert_array_equal(again[name], array)


def test_conversion_is_strict():
    weights = random_weights(SHAPES)
    model = import_tiny_vae(weights, PUBLISHED)
    assert jax.tree.structure(model) == jax.tree.structure(abstract_tiny_vae(PUBLISHED))
    assert sum(x.size for x in named_leaves(model).values()) == sum(x.size for x in weights.values())
    with pytest.raises(UserError, match=r"missing \['decoder.22.bias'\]"):
        import_tiny_vae({k: v for k, v in weights.items() if k != "decoder.22.bias"}, PUBLISHED)
    with pytest.raises(UserError, match=r"left over \['decoder.23.bias'\]"):
        import_tiny_vae({**weights, "decoder.23.bias": weights["decoder.22.bias"]}, PUBLISHED)
    with pytest.raises(UserError, match=rf"{FIRST_GROW} has shape \(128, 256, 1, 1\)"):
        import_tiny_vae({**weights, FIRST_GROW: weights[FIRST_GROW][:128]}, PUBLISHED)


def test_sizes_follow_from_shapes():
    assert taehv_shapes() == SHAPES  # names and shapes of the original class, from two sides
    assert infer_config_tiny_vae(SHAPES, "taehv", None) == PUBLISHED
    assert infer_config_tiny_vae({k: v.shape for k, v in small_weights().items()}, "taehv") == SMALL
    assert config_json_tiny_vae(PUBLISHED, "taehv") is None and len(TAEHV) == len(SHAPES)
    with pytest.raises(UserError, match="layout 'diffusers'"):
        infer_config_tiny_vae(SHAPES, "diffusers", None)
    with pytest.raises(UserError, match="takes 27 channels, not 3 or 12"):
        infer_config_tiny_vae({**SHAPES, "encoder.0.weight": (64, 27, 3, 3)}, "taehv", None)
    with pytest.raises(UserError, match=r"decoder.1.weight: no convolution of this name"):
        infer_config_tiny_vae({k: v for k, v in SHAPES.items() if k != "decoder.1.weight"}, "taehv", None)
