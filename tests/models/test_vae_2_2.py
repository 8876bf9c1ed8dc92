"""Wan2.2's VAE (48 channels, 16 x 16 x 4, shortcuts without weights): equal to diffusers', whole and streamed."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from cfjax.conversion.vae import DIFFUSERS_2_2, config_json_vae, export_vae
from cfjax.core.errors import UserError
from cfjax.models.vae import LATENTS_MEAN_48, LATENTS_STD_48, PRESETS, VAEConfig, WanVAE
from tests.models.test_vae import close, decode_step, drawn, encode_step, to_torch

CONFIG = VAEConfig(
    base_dim=4,
    decoder_base_dim=6,
    z_dim=48,
    residual=True,
    patch=2,
    latents_mean=LATENTS_MEAN_48,
    latents_std=LATENTS_STD_48,
)
FRAMES, SPLIT = 3, (1, 1, 1)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return drawn(CONFIG)


@pytest.fixture(scope="module")
def reference(vae) -> AutoencoderKLWan:
    torch.set_num_threads(1)
    model = AutoencoderKLWan.from_config(config_json_vae(CONFIG, "diffusers")).eval().requires_grad_(False)
    model.load_state_dict({name: torch.tensor(x) for name, x in export_vae(vae, DIFFUSERS_2_2).items()}, strict=True)
    return model


@pytest.fixture(scope="module")
def video() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (1, 1 + 4 * (FRAMES - 1), 32, 16, 3), minval=-1.0)


@pytest.fixture(scope="module")
def latents() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (1, FRAMES, 2, 1, 48))


def test_the_stride_is_the_published_one():
    assert PRESETS["wan_2_2"].stride == CONFIG.stride == (4, 16, 16)


def test_encoding_whole_and_streamed_equals_diffusers(vae, reference, video):
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(x).view(shape) for x in (LATENTS_MEAN_48, LATENTS_STD_48))
    theirs = ((reference.encode(to_torch(video)).latent_dist.mode() - mean) / std).permute(0, 2, 3, 4, 1).numpy()
    close("encode", encode_step(vae, video, vae.init_encode_state(1))[0], theirs, 1e-4)
    state, parts = vae.init_encode_state(1), []
    for first, last in ((0, 1), (1, 5), (5, 9)):
        part, state = encode_step(vae, video[:, first:last], state)
        parts.append(np.asarray(part))
    close("encode, streamed", jax.numpy.concatenate(parts, axis=1), theirs, 1e-4)


def test_decoding_whole_and_streamed_equals_diffusers(vae, reference, latents):
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(x).view(shape) for x in (LATENTS_MEAN_48, LATENTS_STD_48))
    theirs = reference.decode(to_torch(latents) * std + mean).sample.permute(0, 2, 3, 4, 1).numpy()
    assert (np.abs(theirs) < 1.0).mean() > 0.5  # not the clamp everywhere
    close("decode", decode_step(vae, latents, vae.init_state(1))[0], theirs, 1e-4)
    state, parts = vae.init_state(1), []
    for frame in range(FRAMES):
        part, state = decode_step(vae, latents[:, frame : frame + 1], state)
        parts.append(np.asarray(part))
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    close("decode, streamed", jax.numpy.concatenate(parts, axis=1), theirs, 1e-4)


def test_sides_are_multiples_of_sixteen(vae):
    with pytest.raises(UserError, match="H a multiple of 16 and W of 16"):
        vae.encode(jax.numpy.zeros((1, 1, 24, 16, 3)))
