"""The same work for cfjax and for diffusers: a pass over all frames of a clip, and decoding it.

diffusers has no causal Wan: what both have is the bidirectional pass and the autoencoder.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cfjax.comparison.case import random_weights
from cfjax.comparison.diffusers import flow_of
from cfjax.comparison.twins import dit_twin, from_torch, to_torch, vae_twin
from cfjax.conversion import vae as vae_files
from cfjax.conversion.wan import export_wan
from cfjax.models.vae import VAEConfig, WanVAE, make_vae
from cfjax.models.wan import Wan, WanConfig

LEVEL = 0.5  # of the noise
Calls = tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]


def dit_calls(config: WanConfig, shape: tuple[int, ...], text_rows: int, seed: int) -> Calls:
    """(ours, theirs): the flow of latents_BFHWC of a shape, with random weights, theirs in `config`'s compute dtype."""
    dtype = getattr(torch, config.precision.compute)
    model = random_weights(Wan(config, jax.random.key(seed)), seed)
    rng = np.random.default_rng(seed)
    latents, text = (rng.standard_normal(x, np.float32) for x in (shape, (shape[0], text_rows, config.text_dim)))
    sigma = jnp.full(shape[:2], LEVEL)
    twin = dit_twin(config, export_wan(model)).to(dtype)
    theirs_in = [to_torch(latents).to(dtype), torch.full(shape[:1], 1000.0 * LEVEL), torch.tensor(text).to(dtype)]
    given = model, jnp.asarray(latents), sigma, jnp.asarray(text)

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return from_torch(twin(*theirs_in, return_dict=False)[0].float())

    return lambda: np.asarray(flow_of(*given)), theirs


def vae_calls(config: VAEConfig, shape: tuple[int, ...], seed: int) -> Calls:
    """(ours, theirs): a clip's latents decoded, with random weights."""
    dtype = getattr(torch, config.precision.compute)
    model = random_weights(make_vae(config, jax.random.key(seed)), seed)
    latents = np.random.default_rng(seed).standard_normal(shape, np.float32)
    twin: Any = vae_twin(config, vae_files.export_vae(model, vae_files.layouts_vae(config)["diffusers"])).to(dtype)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    decode, given = jax.jit(WanVAE.decode), jnp.asarray(latents)

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return from_torch(twin.decode((to_torch(latents) * std + mean).to(dtype), return_dict=False)[0].float())

    return lambda: np.asarray(decode(model, given)), theirs
