"""A stand-in for the VAE of long rollouts, on both sides: every picture depends on all latents before it.

It encodes to something else than it decoded, so that a picture taken too early or too late, or not encoded, is seen.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import torch

from cfjax.comparison.reference import NoEncoder

KEEP, SCALE, SHIFT = 0.5, 0.7, 0.1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FadingCodec:
    """picture_f = latent_f + picture_(f-1) / 2, one picture per latent; latent = 0.7 picture + 0.1."""

    latent_channels: int = field(default=4, metadata={"static": True})

    @property
    def stride(self) -> tuple[int, int, int]:
        return (1, 1, 1)

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        """One latent per picture."""
        return SCALE * video_BPHWC + SHIFT

    def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
        """One picture per latent."""
        return self.decode_step(latents_BFHWC, self.init_state(latents_BFHWC.shape[0]))[0]

    def init_state(self, batch: int) -> jax.Array:
        """The picture before the first."""
        return jnp.zeros((batch, 1, 1, 1, 1))

    def decode_step(self, latents_BFHWC: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next pictures, and the last of them."""
        pictures = []
        for latent in jnp.split(latents_BFHWC, latents_BFHWC.shape[1], axis=1):
            state = latent + KEEP * state
            pictures.append(state)
        return jnp.concatenate(pictures, axis=1), state

    def describe(self) -> dict[str, Any]:
        """For the protocol."""
        return {"name": "fading"}


class FadingVAE(NoEncoder):
    """The same in the reference's layout: latents [B, F, C, H, W], pictures to encode [B, C, F, H, W]."""

    def decode_to_pixel(self, latents: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        """Pictures [B, F, C, H, W]."""
        pictures = [latents[:, :1]]
        for latent in latents[:, 1:].split(1, dim=1):
            pictures.append(latent + KEEP * pictures[-1])
        return torch.cat(pictures, dim=1)

    def encode_to_latent(self, pixel: torch.Tensor) -> torch.Tensor:
        """Latents [B, F, C, H, W]."""
        return SCALE * pixel.transpose(1, 2) + SHIFT
