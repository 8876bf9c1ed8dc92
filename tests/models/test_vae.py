"""The Wan VAE: equal to diffusers' with the same weights, to itself in any split of the frames, and frugal."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from cfjax.conversion.vae import DIFFUSERS, config_json_vae, export_vae
from cfjax.core.errors import UserError
from cfjax.core.precision import BF16
from cfjax.core.tree import from_named, map_named, named_leaves
from cfjax.models import vae_tiling
from cfjax.models.vae import VAEConfig, WanVAE, abstract_vae, make_vae
from cfjax.models.vae_tiling import (
    decode_in_steps,
    decode_tiled,
    encode_in_steps,
    encode_tiled,
)

CONFIG = VAEConfig(base_dim=4)
BATCH, HEIGHT, WIDTH = 2, 2, 3  # latent sides

# Whole clips and streams share programs.
decode_step = jax.jit(WanVAE.decode_step, donate_argnames="state")
encode_step = jax.jit(WanVAE.encode_step, donate_argnames="state")


def whole(vae: WanVAE, x: jax.Array) -> jax.Array:
    """`vae.decode` or `vae.encode`, which are one step of the stream over everything, compiled as that step."""
    if x.shape[-1] == CONFIG.z_dim:
        return decode_step(vae, x, vae.init_state(x.shape[0]))[0]
    return encode_step(vae, x, vae.init_encode_state(x.shape[0]))[0]


def drawn(config: VAEConfig) -> WanVAE:
    """Every parameter random: kernels that keep the scale of what passes, scales near 1, biases near 0."""
    rng = np.random.default_rng(0)

    def leaf(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        size = np.prod(like.shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.2
        return jnp.asarray(size * rng.standard_normal(like.shape) + name.endswith("scale"), jnp.float32)

    return map_named(leaf, abstract_vae(config))


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return drawn(CONFIG)


@pytest.fixture(scope="module")
def reference(vae) -> AutoencoderKLWan:
    """diffusers' own with the same weights."""
    torch.set_num_threads(1)
    model = AutoencoderKLWan.from_config(config_json_vae(CONFIG, "diffusers")).eval().requires_grad_(False)
    weights = {name: torch.tensor(x) for name, x in export_vae(vae, DIFFUSERS).items()}
    model.load_state_dict(weights, strict=True)
    return model


def video(frames: int, height: int = 8 * HEIGHT, width: int = 8 * WIDTH, batch: int = BATCH) -> jax.Array:
    return jax.random.uniform(jax.random.key(frames), (batch, frames, height, width, 3), jnp.float32, -1, 1)


def latents(frames: int, height: int = HEIGHT, width: int = WIDTH, batch: int = BATCH) -> jax.Array:
    return jax.random.normal(jax.random.key(frames), (batch, frames, height, width, CONFIG.z_dim), jnp.float32)


def to_torch(x: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).permute(0, 4, 1, 2, 3)


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(CONFIG.latents_mean).view(shape), torch.tensor(CONFIG.latents_std).view(shape)


def their_encode(reference: AutoencoderKLWan, x: jax.Array) -> np.ndarray:
    mean, std = statistics()
    return ((reference.encode(to_torch(x)).latent_dist.mode() - mean) / std).permute(0, 2, 3, 4, 1).numpy()


def their_decode(reference: AutoencoderKLWan, x: jax.Array) -> np.ndarray:
    mean, std = statistics()
    return reference.decode(to_torch(x) * std + mean).sample.permute(0, 2, 3, 4, 1).numpy()


def close(name: str, ours: jax.Array, theirs: np.ndarray, tolerance: float) -> None:
    error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
    print(f"{name}: greatest error {error:.2e}, of values up to {np.abs(theirs).max():.2f}")
    assert ours.shape == theirs.shape
    assert ours.dtype == jnp.float32
    assert error < tolerance


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_equals_diffusers(reference, vae, frames):
    pixels = 1 + 4 * (frames - 1)
    close(f"encode {pixels}", whole(vae, video(pixels)), their_encode(reference, video(pixels)), 1e-5)
    theirs = their_decode(reference, latents(frames))
    assert theirs.shape[1] == pixels
    assert (np.abs(theirs) < 1.0).mean() > 0.5  # not the clamp everywhere
    close(f"decode {frames}", whole(vae, latents(frames)), theirs, 1e-5)


@pytest.mark.parametrize("split", [(1, 1, 1), (2, 1), (1, 2)])
def test_a_stream_equals_the_whole_clip(vae, split):
    z, x = latents(sum(split)), video(1 + 4 * (sum(split) - 1))
    decoding, encoding, at = vae.init_state(BATCH), vae.init_encode_state(BATCH), 0
    frames, codes = [], []
    for size in split:
        before = (decoding, encoding)
        frame, decoding = decode_step(vae, z[:, at : at + size], decoding)
        first, last = (4 * at - 3 if at else 0), 4 * (at + size) - 3
        code, encoding = encode_step(vae, x[:, first:last], encoding)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # the states were donated
        assert frame.shape[1] == last - first
        at += size
        frames.append(frame)
        codes.append(code)
        assert decoding.frames_B.tolist() == encoding.frames_B.tolist() == [at] * BATCH
    close(f"decode {split}", jnp.concatenate(frames, axis=1), whole(vae, z), 1e-5)
    close(f"encode {split}", jnp.concatenate(codes, axis=1), whole(vae, x), 1e-5)


def test_tiles_equal_diffusers(reference, vae, monkeypatch):
    """Tiles of 16 x 16 px every 8 px (decoding: only across), the last ones cut off by the edge."""
    for name, program in (("_decode_raw_jit", vae_tiling._decode_raw), ("_encode_jit", encode_in_steps)):
        monkeypatch.setattr(vae_tiling, name, jax.jit(program, static_argnames="frames"))
    z, x = latents(2)[:1], video(1, 24, 24, 1)
    reference.enable_tiling(16, 16, 16, 8)
    ours = decode_tiled(vae, z, tile=(16, 16), stride=(16, 8))
    close("decode in tiles", ours, their_decode(reference, z), 1e-5)
    assert np.abs(np.asarray(ours) - np.asarray(whole(vae, latents(2))[:1])).max() > 1e-3  # neighbours are not seen
    reference.enable_tiling(16, 16, 8, 8)
    ours = encode_tiled(vae, x, tile=(16, 16), stride=(8, 8))
    close("encode in tiles", ours, their_encode(reference, x), 1e-5)
    reference.disable_tiling()


def test_encoding_in_steps_equals_the_whole_clip(vae):
    close("in steps", jax.jit(encode_in_steps, static_argnums=2)(vae, video(9), 1), whole(vae, video(9)), 1e-5)


def test_decoding_in_steps_takes_less_memory():
    """Temporary bytes of compiled decoders, 9 latent frames of 4 x 4: at once and one at a time."""
    wide, z = drawn(VAEConfig(base_dim=16)), latents(9, 4, 4, 1)

    def compiled(frames: int) -> tuple[int, jax.Array]:
        program = jax.jit(decode_in_steps, static_argnums=2).lower(wide, z, frames).compile()
        return program.memory_analysis().temp_size_in_bytes, program(wide, z)

    (clip, at_once), (steps, one_by_one) = compiled(9), compiled(1)
    print(f"temporary MB: whole {clip / 1e6:.1f}, in steps {steps / 1e6:.1f}")
    close("in steps", one_by_one, at_once, 1e-5)
    assert steps < 0.6 * clip


def test_bfloat16_is_near(vae):
    """Convolutions and stored activations in bfloat16, norms and softmax in float32."""
    half = from_named(abstract_vae(replace(CONFIG, precision=BF16)), named_leaves(vae))
    fine, (coarse, state) = whole(vae, latents(2)), decode_step(half, latents(2), half.init_state(BATCH))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.past))
    error = float(jnp.linalg.norm(fine - coarse) / jnp.linalg.norm(fine))
    print(f"bfloat16: relative error {error:.3f}")
    assert 0 < error < 0.05


def test_a_fingerprint_sees_one_bit(vae):
    described = vae.describe()
    assert described == jax.tree.map(jnp.copy, vae).describe()
    assert {"name": "wan_vae", "channels": 16, "stride": [4, 8, 8]}.items() <= described.items()
    leaves, treedef = jax.tree.flatten(vae)
    leaves[5] = leaves[5].at[(0,) * leaves[5].ndim].set(jnp.nextafter(leaves[5].ravel()[0], 9.0))
    assert described != jax.tree.unflatten(treedef, leaves).describe()
    other = VAEConfig(base_dim=CONFIG.base_dim, latents_mean=(0.0,) * 16)
    moved = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda k: WanVAE(other, k), jax.random.key(0))), leaves
    )
    assert described["fingerprint"] != moved.describe()["fingerprint"]


def test_a_fresh_one_keeps_the_scale():
    made = jax.jit(make_vae.__wrapped__, static_argnums=0)(CONFIG, jax.random.key(0))
    assert jax.tree.structure(made) == jax.tree.structure(abstract_vae(CONFIG))
    assert 0.01 < float(jnp.std(whole(made, latents(1)))) < 2.0


def test_mistakes_are_reported(vae):
    raises = partial(pytest.raises, UserError)
    for frames in (0, 2, 4, 6):
        with raises(match=rf"{frames} frames do not encode; use 1 \+ 4 k"):
            vae.encode(jnp.zeros((1, frames, 16, 16, 3)))
    with raises(match="H a multiple of 8 and W of 8"):
        vae.encode(jnp.zeros((1, 1, 16, 20, 3)))
    with raises(match=r"need \[B,F,H,W,16\]"):
        vae.decode(jnp.zeros((1, 1, 2, 2, 4)))
    with raises(match="a batch of 1 does not continue a stream of 2"):
        vae.decode_step(jnp.zeros((1, 1, 2, 2, 16)), vae.init_state(2))
    later = jax.eval_shape(vae.encode_step, video(1), vae.init_encode_state(BATCH))[1]
    with raises(match="3 frames do not encode; use 4 k"):
        vae.encode_step(video(3), later)
    with raises(match=r"stride=\(24, 8\) leaves gaps between tiles of \(16, 16\)"):
        decode_tiled(vae, latents(1), tile=(16, 16), stride=(24, 8))
    with raises(match=r"tile=\(20, 16\) must be multiples of \(8, 8\) pixels"):
        encode_tiled(vae, video(1), tile=(20, 16), stride=(8, 8))
    with raises(match="frames=0 at a time"):
        decode_in_steps(vae, latents(1), 0)
    with raises(match="2 entries, one per downsampling"):
        VAEConfig(multipliers=(1, 2, 4))
    with raises(match="need 8 entries, one per latent channel"):
        VAEConfig(z_dim=8)
