"""The umT5 text encoder (arXiv 2304.09151), which turns token ids into the rows that the video network attends to.

Pre-norm transformer encoder without biases: every layer has its own relative position bias, attention logits are not
scaled, the feed-forward is gated tanh-GELU, norms are RMS. Same function as transformers' `UMT5EncoderModel`. Weights
are `nnx.Param` leaves in `[in, out]` layout, with the layers stacked on a leading axis (L) and run by `lax.scan`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.limits import LAYERS, VOCABULARY
from cfjax.core.precision import F32, Policy
from cfjax.core.schema import EPS, SIZE, table, whole
from cfjax.nn.layers import RMSNorm, gelu_tanh

# What a record may say of a `UMT5Config`.
UMT5_RULE = table(
    dict.fromkeys(("dim", "heads", "head_dim", "ffn_dim"), SIZE)
    | {"vocab_size": whole(1, VOCABULARY), "layers": whole(1, LAYERS)},
    {"buckets": SIZE, "max_distance": SIZE, "eps": EPS},
    closed=True,
)


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of one encoder. `dim` is also the width E of the text rows; `heads * head_dim` may differ from it."""

    vocab_size: int
    dim: int
    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.dim, self.heads, self.head_dim, self.ffn_dim, self.layers, self.max_distance)
        if min(sizes) < 1 or self.buckets < 4 or self.buckets % 4:
            raise UserError(f"text encoder sizes must be positive and buckets a multiple of 4, got {self}")
        if self.max_distance <= self.buckets // 4:  # distances below that have buckets of their own
            raise UserError(
                f"text encoder max_distance={self.max_distance} must be above buckets / 4, {self.buckets // 4}"
            )


PRESETS = {
    "umt5_xxl": UMT5Config(vocab_size=256384, dim=4096, heads=64, head_dim=64, ffn_dim=10240, layers=24),
    # Give it the tokenizer's vocabulary: dataclasses.replace(PRESETS["toy"], vocab_size=tokenizer.vocab_size).
    "toy": UMT5Config(vocab_size=256, dim=64, heads=4, head_dim=16, ffn_dim=128, layers=2),
}


def relative_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """The bias bucket of every (query, key) pair, int32 [S, S].

    Half of the buckets are for keys after the query. Of each half, one half counts single positions and the other
    grows logarithmically up to `max_distance`, where the last bucket begins to hold everything.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # float32 and this order of operations, as in the original: bucket edges depend on the rounding.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)).astype(np.int32)


class Dense(nnx.Module):
    """x @ kernel, no bias; the product runs in the policy's compute dtype."""

    def __init__(self, key: jax.Array, d_in: int, d_out: int, std: float):
        self.kernel = nnx.Param(std * jax.random.normal(key, (d_in, d_out), jnp.float32))

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        return policy.to_compute(x) @ policy.to_compute(self.kernel[...])


class Layer(nnx.Module):
    """Self-attention and gated feed-forward, each pre-normed and residual; standard deviations are T5's own init."""

    def __init__(self, key: jax.Array, config: UMT5Config):
        keys = jax.random.split(key, 8)
        dim, inner, ffn = config.dim, config.heads * config.head_dim, config.ffn_dim
        self.attention_norm = RMSNorm(dim)
        self.q = Dense(keys[0], dim, inner, (dim * config.head_dim) ** -0.5)
        self.k = Dense(keys[1], dim, inner, dim**-0.5)
        self.v = Dense(keys[2], dim, inner, dim**-0.5)
        self.o = Dense(keys[3], inner, dim, inner**-0.5)
        bias = dim**-0.5 * jax.random.normal(keys[4], (config.buckets, config.heads), jnp.float32)
        self.position_bias = nnx.Param(bias)
        self.ffn_norm = RMSNorm(dim)
        self.gate = Dense(keys[5], dim, ffn, dim**-0.5)
        self.up = Dense(keys[6], dim, ffn, dim**-0.5)
        self.down = Dense(keys[7], ffn, dim, ffn**-0.5)

    def attend(
        self, x_BSE: jax.Array, bucket_SS: jax.Array, mask_BS: jax.Array, config: UMT5Config, policy: Policy
    ) -> jax.Array:
        """Softmax in float32, logits unscaled, padding keys at the lowest float32."""
        heads = (*x_BSE.shape[:-1], config.heads, config.head_dim)
        q, k, v = (dense(x_BSE, policy).reshape(heads) for dense in (self.q, self.k, self.v))
        logits = jnp.einsum("bqnk,bsnk->bnqs", q, k, preferred_element_type=jnp.float32)
        bias_NSS = self.position_bias[...].astype(jnp.float32)[bucket_SS].transpose(2, 0, 1)
        logits = jnp.where(mask_BS[:, None, None, :], logits + bias_NSS[None], jnp.finfo(jnp.float32).min)
        weights = policy.to_compute(jax.nn.softmax(logits, axis=-1))
        return self.o(jnp.einsum("bnqs,bsnk->bqnk", weights, v).reshape(*x_BSE.shape[:-1], -1), policy)

    def __call__(
        self, x_BSE: jax.Array, bucket_SS: jax.Array, mask_BS: jax.Array, config: UMT5Config, policy: Policy
    ) -> jax.Array:
        normed = self.attention_norm(x_BSE, config.eps)
        x_BSE = x_BSE + policy.to_norm_dtype(self.attend(normed, bucket_SS, mask_BS, config, policy))
        normed = self.ffn_norm(x_BSE, config.eps)
        hidden = gelu_tanh(self.gate(normed, policy)) * self.up(normed, policy)
        return x_BSE + policy.to_norm_dtype(self.down(hidden, policy))


class UMT5(nnx.Module):
    """The encoder: embedding, stacked layers, final norm. A value: never assigned to after `make_umt5`."""

    def __init__(self, config: UMT5Config, key: jax.Array):
        embed_key, layers_key = jax.random.split(key)
        self.config = config
        # Unit variance (T5's init): with random weights, the residual branches do not drown the word itself.
        table = jax.random.normal(embed_key, (config.vocab_size, config.dim), jnp.float32)
        self.token_embedding = nnx.Param(table)
        self.layers = jax.vmap(lambda k: Layer(k, config))(jax.random.split(layers_key, config.layers))
        self.final_norm = RMSNorm(config.dim)

    def embed(self, ids_BS: jax.Array, policy: Policy) -> jax.Array:
        """The first residual stream x_BSE, in the norm dtype."""
        return policy.to_norm_dtype(self.token_embedding[...][ids_BS])

    def buckets_SS(self, length: int) -> jax.Array:
        """Bias buckets for `length` rows; the same for every layer, which has its own bias for each."""
        return jnp.asarray(relative_buckets(length, self.config.buckets, self.config.max_distance))

    def layer(self, index: jax.Array, x_BSE: jax.Array, mask_BS: jax.Array, policy: Policy) -> jax.Array:
        """The residual stream after layer `index`."""
        one = jax.tree.map(lambda leaf: leaf[index], self.layers)
        return one(x_BSE, self.buckets_SS(x_BSE.shape[1]), mask_BS.astype(bool), self.config, policy)

    def finish(self, x_BSE: jax.Array) -> jax.Array:
        """float32 rows of the last residual stream."""
        return self.final_norm(x_BSE, self.config.eps).astype(jnp.float32)

    def __call__(self, ids_BS: jax.Array, mask_BS: jax.Array, policy: Policy = F32) -> jax.Array:
        """The text rows, float32 [B, S, E]; rows of padding are whatever the layers make of them."""
        mask_BS, bucket_SS = mask_BS.astype(bool), self.buckets_SS(ids_BS.shape[1])

        def run(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return layer(x, bucket_SS, mask_BS, self.config, policy), None

        return self.finish(jax.lax.scan(run, self.embed(ids_BS, policy), self.layers)[0])


def make_umt5(config: UMT5Config, key: jax.Array) -> UMT5:
    """A randomly initialised encoder; under `jax.eval_shape`, the template that loaded weights must fit."""
    return UMT5(config, key)


def zero_padding(rows_BSE: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Rows of padding set to zero, which the DiT expects (reference: `utils/wan_wrapper.py`, `WanTextEncoder`)."""
    return jnp.where(mask_BS.astype(bool)[..., None], rows_BSE, 0.0)


def encode_text(model: UMT5, ids_BS: jax.Array, mask_BS: jax.Array, policy: Policy = F32) -> jax.Array:
    """What the video network attends to: float32 text_BSE with the rows of padding set to zero.

    Args:
      ids_BS: int32 token ids. mask_BS: true (or 1) at real tokens, EOS included; at least one per caption.
    """
    return zero_padding(model(ids_BS, mask_BS, policy), mask_BS)


_embed = jax.jit(UMT5.embed, static_argnames="policy")
compiled_layer = jax.jit(UMT5.layer, static_argnames="policy", donate_argnames="x_BSE")
_finish = jax.jit(lambda model, x_BSE, mask_BS: zero_padding(model.finish(x_BSE), mask_BS))


def encode_by_layer(model: UMT5, ids_BS: jax.Array, mask_BS: jax.Array, policy: Policy = F32) -> jax.Array:
    """`encode_text` as one compiled layer called once per layer, for weights that fill the memory.

    Weights in bfloat16 are then cast to float32, where the products need it, one layer at a time: inside one loop, XLA
    on CPU casts the whole stack first, which for umT5-XXL takes 22 GB besides the 11.
    """
    x_BSE = _embed(model, ids_BS, policy=policy)
    for index in range(model.config.layers):
        x_BSE = compiled_layer(model, jnp.int32(index), x_BSE, mask_BS, policy=policy)
    return _finish(model, x_BSE, mask_BS)
