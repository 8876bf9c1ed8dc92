"""The projections of Wan's attention, and what its image-to-video networks of Wan2.1 have besides for a picture."""

from typing import TYPE_CHECKING

import jax
from einops import rearrange
from flax import nnx

from cfjax.core.precision import Policy
from cfjax.nn import layers

if TYPE_CHECKING:
    from cfjax.models.wan import WanConfig

IMAGE_EPS = 1e-5  # PyTorch's own, of the embedding's norms


class Attention(nnx.Module):
    """q, k, v, o projections with RMSNorm of q and k over the full width."""

    def __init__(self, dim: int, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.q, self.k, self.v, self.o = (layers.Linear(dim, dim, k) for k in keys)
        self.norm_q, self.norm_k = layers.RMSNorm(dim), layers.RMSNorm(dim)

    def query(self, x: jax.Array, config: "WanConfig") -> jax.Array:
        q = self.norm_q(self.q(x, config.precision.compute), config.eps)
        return _heads(q, config)

    def key_value(self, x: jax.Array, config: "WanConfig") -> tuple[jax.Array, jax.Array]:
        k = self.norm_k(self.k(x, config.precision.compute), config.eps)
        v = self.v(x, config.precision.compute)
        return _heads(k, config), _heads(v, config)

    def output(self, attended_BFTNK: jax.Array, config: "WanConfig") -> jax.Array:
        return self.o(rearrange(attended_BFTNK, "... n k -> ... (n k)"), config.precision.compute)


def _heads(x: jax.Array, config: "WanConfig") -> jax.Array:
    return rearrange(x, "... (n k) -> ... n k", n=config.num_heads)


class ImageAttention(Attention):
    """Cross-attention with a second pair of keys and values, of a picture's features.

    Reference, of Wan2.1's release: `wan/modules/model.py`, `WanI2VCrossAttention`. What both pairs give is summed
    before `o`.
    """

    def __init__(self, dim: int, key: jax.Array):
        super().__init__(dim, key)
        # Folded in: the weights of the rest are those of a network without a picture.
        self.k_img, self.v_img = (layers.Linear(dim, dim, jax.random.fold_in(key, i)) for i in (4, 5))
        self.norm_k_img = layers.RMSNorm(dim)

    def image_key_value(self, features: jax.Array, config: "WanConfig") -> tuple[jax.Array, jax.Array]:
        k = self.norm_k_img(self.k_img(features, config.precision.compute), config.eps)
        return _heads(k, config), _heads(self.v_img(features, config.precision.compute), config)


class ImageEmbedding(nnx.Module):
    """A picture's features as wide as the network: norm, two linear layers with exact GELU between them, norm.

    Reference, of Wan2.1's release: `wan/modules/model.py`, `MLPProj`.
    """

    def __init__(self, image_dim: int, dim: int, key: jax.Array):
        keys = jax.random.split(key)
        self.norm_in, self.norm_out = layers.LayerNorm(image_dim), layers.LayerNorm(dim)
        self.up, self.down = layers.Linear(image_dim, image_dim, keys[0]), layers.Linear(image_dim, dim, keys[1])

    def __call__(self, features_BSE: jax.Array, policy: Policy) -> jax.Array:
        hidden = self.up(self.norm_in(features_BSE, IMAGE_EPS, policy), policy.compute)
        return self.norm_out(self.down(jax.nn.gelu(hidden, approximate=False), policy.compute), IMAGE_EPS, policy)
