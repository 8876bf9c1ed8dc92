"""The patch codec: a faithful round trip, streaming equal to whole decoding, strict files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.data.shapes import ShapesConfig, ShapesSource
from cfjax.models.codec import Codec, PatchCodec, fit_patch_codec


@pytest.fixture(scope="module")
def source():
    return ShapesSource(ShapesConfig(), 0, 10_000)


@pytest.fixture(scope="module")
def codec(source):
    return fit_patch_codec(source[i]["video_PHWC"] for i in range(200))


@pytest.fixture(scope="module")
def held_out(source):
    return source.videos(range(5000, 5032))


def psnr(a, b):
    return 10 * np.log10(4 / np.mean(np.square(np.asarray(a) - np.asarray(b))))


def test_held_out_clips_survive_the_round_trip(codec, held_out):
    latents = codec.encode(held_out)
    assert latents.shape == (32, 12, 4, 4, 16) and latents.dtype == jnp.float32
    assert psnr(codec.decode(latents), held_out) > 31


def test_latents_have_unit_variance_overall_and_are_partly_whitened(codec, held_out):
    latents = np.asarray(codec.encode(held_out))
    assert abs(latents.var() - 1) < 0.1 and abs(latents.mean()) < 0.05
    std = latents.std((0, 1, 2, 3))
    assert 1.5 < std.max() / std.min() < 6


def test_encode_inverts_decode(codec):
    latents = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 16))
    np.testing.assert_allclose(codec.encode(codec.decode(latents)), latents, atol=1e-4)


@pytest.mark.parametrize("chunks", [(12,), (3, 3, 3, 3), (1, 4, 7)])
def test_streaming_equals_whole_decode(codec, held_out, chunks):
    latents = codec.encode(held_out[:2])
    state, parts, start = codec.init_state(2), [], 0
    for size in chunks:
        part, state = codec.decode_step(latents[:, start : start + size], state)
        parts.append(part)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), codec.decode(latents), atol=1e-5)
    np.testing.assert_array_equal(state, [12, 12])


def test_codec_is_a_pytree_that_jit_takes_as_an_argument(codec, held_out):
    decode = jax.jit(lambda codec, latents: codec.decode(latents))
    latents = codec.encode(held_out[:1])
    np.testing.assert_allclose(decode(codec, latents), codec.decode(latents), atol=1e-5)
    as_protocol: Codec = codec
    assert as_protocol.stride == (1, 8, 8) and as_protocol.latent_channels == 16


def test_fit_is_deterministic_and_more_channels_are_better(source, held_out):
    def fit(channels):
        return fit_patch_codec((source[i]["video_PHWC"] for i in range(60)), channels=channels)

    np.testing.assert_array_equal(fit(16).basis, fit(16).basis)
    few, many = fit(8), fit(32)
    assert psnr(few.decode(few.encode(held_out)), held_out) + 3 < psnr(many.decode(many.encode(held_out)), held_out)


def test_save_and_load_are_exact(codec, tmp_path):
    codec.save(tmp_path / "deep" / "codec.safetensors")
    loaded = PatchCodec.load(tmp_path / "deep" / "codec.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, codec)
    assert loaded.describe() == codec.describe()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["codec.safetensors"]


def test_fingerprint_differs_between_fits(codec, source):
    other = fit_patch_codec(source[i]["video_PHWC"] for i in range(40))
    assert other.describe() != codec.describe()


def test_missing_broken_and_foreign_files_are_named(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(UserError, match=r"nothing\.safetensors: cannot read"):
        PatchCodec.load(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match=r"broken\.safetensors: cannot read"):
        PatchCodec.load(tmp_path / "broken.safetensors")
    save_file({"x": np.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a patch codec"):
        PatchCodec.load(tmp_path / "foreign.safetensors")


def test_wrong_shapes_are_refused(codec):
    with pytest.raises(UserError, match="multiples of 8"):
        codec.encode(jnp.zeros((1, 2, 30, 32, 3)))
    with pytest.raises(UserError, match="need"):
        codec.decode(jnp.zeros((1, 2, 4, 4, 8)))
    with pytest.raises(UserError, match=r"codec\.channels"):
        fit_patch_codec([], channels=500)
    with pytest.raises(UserError, match="more clips"):
        fit_patch_codec([])
