"""CLIP's vision transformer, whose features of a picture Wan2.1's image-to-video networks attend to.

ViT-H/14 (arXiv 2103.00020, 2212.07143) as open-clip trained it with XLM-RoBERTa: pre-norm blocks with biases, exact
GELU, a norm before the first block. Wan takes the stream before the last block, the class token first, without a norm.
Reference, of Wan2.1's release: `wan/modules/clip.py`, `VisionTransformer` and `CLIPModel.visual`. Same function as
`hidden_states[-2]` of transformers' `CLIPVisionModel`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.limits import LAYERS
from cfjax.core.precision import F32, Policy
from cfjax.core.schema import EPS, SIZE, table, whole
from cfjax.nn import layers
from cfjax.nn.attention import dense

# What a record may say of a `CLIPConfig`.
CLIP_RULE = table(
    dict.fromkeys(("dim", "ffn_dim", "heads"), SIZE)
    | {"layers": whole(2, LAYERS), "image_size": whole(1, 4096), "patch": whole(1, 256)},
    {"eps": EPS},
    closed=True,
)
# Of pixels from 0 to 1, by channel; OpenAI's (`clip/clip.py`, `_transform`).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CUBIC = -0.75  # PyTorch's bicubic kernel


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of one encoder: `dim` is also the width of the features; `image_size` and `patch` are in pixels."""

    dim: int = 1280
    ffn_dim: int = 5120
    heads: int = 16
    layers: int = 32
    image_size: int = 224
    patch: int = 14
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise UserError(f"image encoder: {self.heads} heads do not divide {self.dim} channels")
        if self.image_size % self.patch:
            raise UserError(f"image encoder: a patch of {self.patch} pixels does not divide {self.image_size}")
        if self.layers < 2:
            raise UserError(f"image encoder: layers={self.layers}; features are those before the last of 2 or more")

    @property
    def tokens(self) -> int:
        """Features of a picture: one of the whole, then one of every patch."""
        return 1 + (self.image_size // self.patch) ** 2


class Block(nnx.Module):
    """Self-attention and feed-forward, each pre-normed and residual."""

    def __init__(self, config: CLIPConfig, key: jax.Array):
        keys, dim = jax.random.split(key, 5), config.dim
        self.norm1, self.norm2 = layers.LayerNorm(dim), layers.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (layers.Linear(dim, dim, k) for k in keys[:4])
        self.ffn = layers.Mlp((dim, config.ffn_dim, dim), partial(jax.nn.gelu, approximate=False), keys[4])

    def __call__(self, x_BTD: jax.Array, config: CLIPConfig, policy: Policy) -> jax.Array:
        normed = self.norm1(x_BTD, config.eps, policy)
        q, k, v = (
            rearrange(linear(normed, policy.compute), "b t (n k) -> b t n k", n=config.heads)
            for linear in (self.q, self.k, self.v)
        )
        attended = rearrange(dense(q, k, v, backend="xla"), "b t n k -> b t (n k)")
        x_BTD = x_BTD + policy.to_norm_dtype(self.o(attended, policy.compute))
        return x_BTD + policy.to_norm_dtype(self.ffn(self.norm2(x_BTD, config.eps, policy), policy.compute))


class CLIPVision(nnx.Module):
    """The encoder. Its last block and last norm are kept for its files; no feature passes through them."""

    def __init__(self, config: CLIPConfig, key: jax.Array):
        keys, small = jax.random.split(key, 4), layers.normal(0.02)
        self.config = config
        self.patch_kernel = nnx.Param(small(keys[0], (3 * config.patch**2, config.dim)))
        self.class_embedding = nnx.Param(small(keys[1], (config.dim,)))
        self.position_embedding = nnx.Param(small(keys[2], (config.tokens, config.dim)))
        self.norm_in, self.norm_out = layers.LayerNorm(config.dim), layers.LayerNorm(config.dim)
        self.blocks = jax.vmap(lambda k: Block(config, k))(jax.random.split(keys[3], config.layers))

    def __call__(self, pixels_BHWC: jax.Array, policy: Policy = F32) -> jax.Array:
        """Features, float32 [B, T, D], of normalised pictures [B, image_size, image_size, 3]; see `clip_pixels`."""
        config = self.config
        patches = rearrange(pixels_BHWC, "b (h p) (w q) c -> b (h w) (c p q)", p=config.patch, q=config.patch)
        rows = layers.project(policy.to_compute(patches), self.patch_kernel.get_value())
        first = jnp.broadcast_to(self.class_embedding[...][None, None], (rows.shape[0], 1, config.dim))
        stream = jnp.concatenate([policy.to_norm_dtype(first), policy.to_norm_dtype(rows)], axis=1)
        stream = self.norm_in(stream + policy.to_norm_dtype(self.position_embedding[...])[None], config.eps, policy)

        def run(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            return jax.tree.map(lambda leaf: leaf[index], self.blocks)(x, config, policy), None

        return jax.lax.scan(run, stream, jnp.arange(config.layers - 1))[0].astype(jnp.float32)


def make_clip(config: CLIPConfig, key: jax.Array) -> CLIPVision:
    """A randomly initialised encoder; under `jax.eval_shape`, the template that loaded weights must fit."""
    return CLIPVision(config, key)


def _bicubic(size: int, target: int) -> np.ndarray:
    """The matrix, float32 [target, size], of a bicubic change of length as PyTorch's `interpolate` has it.

    Pixels are squares (`align_corners=False`), the border is repeated, and a reduction is not smoothed first.
    """
    a = CUBIC
    at = (np.arange(target) + 0.5) * size / target - 0.5
    low = np.floor(at).astype(int)
    out = np.zeros((target, size))
    for offset in range(-1, 3):
        x = np.abs(at - (low + offset))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(out, (np.arange(target), np.clip(low + offset, 0, size - 1)), np.where(x <= 1, near, far))
    return out.astype(np.float32)


def clip_pixels(picture_BHWC: jax.Array, image_size: int) -> jax.Array:
    """What the encoder takes of pictures in [-1, 1]: square (the whole, not a part), normalised by channel.

    As the release does (`CLIPModel.visual`); diffusers' pipeline takes the middle square.
    """
    rows, columns = (jnp.asarray(_bicubic(size, image_size)) for size in picture_BHWC.shape[1:3])
    square = jnp.einsum("yh,bhwc,xw->byxc", rows, picture_BHWC, columns, precision="highest")
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (MEAN, STD))
    return ((square * 0.5 + 0.5) - mean) / std


@jax.jit
def encode_pictures(model: CLIPVision, picture_BHWC: jax.Array) -> jax.Array:
    """Features, float32 [B, T, D], of pictures in [-1, 1] of any size."""
    return model(clip_pixels(picture_BHWC, model.config.image_size))


def abstract_clip(config: CLIPConfig) -> Any:
    """The encoder's structure with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda key: make_clip(config, key), jax.random.key(0))
