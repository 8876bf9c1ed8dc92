"""Action conditioning: how a network is told the keys that are held in each latent frame. Off by default.

Two forms, both with a zero-initialised output, so that a pretrained network starts unchanged:

    embedding   an MLP of the frame's keys, added to its time embedding (as the discrete actions of HY-WorldPlay,
                `worldplay_1_5_transformer.py`, `action_in`)
    attention   in every block, after the cross-attention: a frame's tokens attend to the keyboard of this frame and of
                those before it, causally, within a window (Matrix-Game-2, arXiv 2508.13009; its keyboard branch in
                FastVideo, `models/dits/matrixgame2/action_module.py`)

Keys are a multi-hot row per latent frame, keys_BFA: those that act between the frame before and this one. Frame 0 has
keys without an effect, and frames before the first one have its keys again.

As the keyboard's keys and values depend on what is held alone, the attention needs no cache: a pass is given the rows
of its window. Departures from Matrix-Game-2: it has the module in the first half of its blocks, actions per pixel
frame, and a mouse beside the keyboard; its masks are causal by block, here by frame, so that no frame depends on later
keys.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.precision import Policy
from cfjax.nn import layers
from cfjax.nn.rope import rotate

if TYPE_CHECKING:
    from cfjax.models.wan import KV, Block, WanConfig

FORMS = ("embedding", "attention")
THETA = 256.0  # base of the rotary frequencies over time, Matrix-Game-2's


@dataclass(frozen=True)
class ActionConfig:
    """How actions enter a network.

    Attributes:
      form: one of `FORMS`.
      keys: how many there are.
      window: of the attention, frames: the latest ones.
      frames: of the attention, latent frames whose rows make one frame's key and value.
      width: of the attention's embedding of a row.
    """

    form: str = "embedding"
    keys: int = 4
    window: int = 6
    frames: int = 3
    width: int = 64

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"actions.form={self.form!r}: use {' or '.join(FORMS)}")
        if min(self.keys, self.window, self.frames, self.width) < 1:
            raise UserError("actions: keys, window, frames and width must be 1 or more")

    @property
    def context(self) -> int:
        """How many frames before a frame have a part in what it is told."""
        return self.window + self.frames - 2 if self.form == "attention" else 0


class SteeredKV(NamedTuple):
    """The text's keys and values of every layer, and for every frame of a pass the rows of its window, oldest first."""

    k_LBSNK: jax.Array
    v_LBSNK: jax.Array
    image: "KV | None"
    rows_LBFIA: jax.Array


def rows_of(text: object, config: ActionConfig, batch: int, frames: int) -> jax.Array:
    """Every frame's rows, [B, F, I, A], I = context + 1; none is held where the text comes without actions.

    Args:
      text: of one layer, or of all.
    """
    if isinstance(text, SteeredKV):
        rows = text.rows_LBFIA
        return rows[0] if rows.ndim == 5 else rows
    return jnp.zeros((batch, frames, config.context + 1, config.keys), jnp.float32)


def action_mlp(config: ActionConfig, dim: int, key: jax.Array) -> layers.Mlp:
    """The embedding of a frame's keys: Linear, SiLU, Linear, whose last kernel is zero."""
    mlp = layers.Mlp((config.keys, dim, dim), jax.nn.silu, key)
    mlp.down = layers.Linear(dim, dim, key, kernel_init=layers.zeros)
    return mlp


class ActionAttention(nnx.Module):
    """A frame's tokens attend to the keyboard rows of its window."""

    def __init__(self, config: ActionConfig, dim: int, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.embed = layers.Mlp((config.keys, config.width, config.width), jax.nn.silu, keys[0])
        self.q = layers.Linear(dim, dim, keys[1])
        self.k, self.v = (layers.Linear(config.frames * config.width, dim, k) for k in keys[2:])
        self.norm_q, self.norm_k = layers.RMSNorm(dim), layers.RMSNorm(dim)
        self.o = layers.Linear(dim, dim, key, kernel_init=layers.zeros)

    def __call__(
        self, h_BFTD: jax.Array, rows_BFIA: jax.Array, config: ActionConfig, heads: int, eps: float, policy: Policy
    ) -> jax.Array:
        """What is added to the stream, [B, F, T, D].

        Args:
          rows_BFIA: the rows of each frame's window, I = `config.context` + 1.
        """
        split = lambda x: rearrange(x, "... (n k) -> ... n k", n=heads)
        embedded = self.embed(rows_BFIA, policy.compute)
        joined = jnp.concatenate([embedded[:, :, i : i + config.window] for i in range(config.frames)], axis=-1)
        q = split(self.norm_q(self.q(h_BFTD, policy.compute), eps))
        k = split(self.norm_k(self.k(joined, policy.compute), eps))
        v = split(self.v(joined, policy.compute))
        # Only differences of times matter: queries, and the newest frame of every window, are at 0.
        k = rotate(k, _table(np.arange(1 - config.window, 1), k.shape[-1]))
        logits = jnp.einsum("bftnk,bfwnk->bfntw", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(policy.to_norm_dtype(logits) * k.shape[-1] ** -0.5, axis=-1)
        attended = jnp.einsum("bfntw,bfwnk->bftnk", weights.astype(v.dtype), v)
        return policy.to_norm_dtype(self.o(rearrange(attended, "b f t n k -> b f t (n k)"), policy.compute))


def _table(position_I: np.ndarray, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [1, I, K/2] of times, for all pairs of a head."""
    omega = THETA ** (-np.arange(head_dim // 2) / (head_dim // 2))
    angle = jnp.asarray(position_I[None, :, None] * omega, jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)


@jax.named_scope("action_attention")
def attend_actions(block: "Block", stream_BFTD: jax.Array, text: "KV | SteeredKV", config: "WanConfig") -> jax.Array:
    """The stream of a layer after its tokens have attended to the keyboard; as it was in a network without."""
    actions, policy = config.actions, config.precision
    if actions is None or actions.form != "attention":
        return stream_BFTD
    h = policy.to_compute(layers.layer_norm(stream_BFTD, config.eps, policy))
    rows = rows_of(text, actions, *stream_BFTD.shape[:2])
    return stream_BFTD + block.action_attn(h, rows, actions, config.num_heads, config.eps, policy)
