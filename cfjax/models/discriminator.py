"""A Wan network with a classifier branch on its features, the discriminator of real and generated clips.

After each chosen layer a learned register token attends to the layer's output through a cross-attention block; the
tokens together, or the tokens and the time embedding, are classified (reference: `wan/modules/model.py`,
`GanAttentionBlock` and `RegisterTokens`; after "adversarial post-training", arXiv 2501.08316). The network itself is
unchanged: it is called, sharded and checkpointed like any other `Wan`, and has a few more leaves, `branch/...`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from cfjax.core.errors import UserError
from cfjax.core.tree import from_named, named_leaves
from cfjax.models.attention import Attention
from cfjax.models.ends import embed_time
from cfjax.models.wan import KV, Wan, WanConfig, attend_by, backbone
from cfjax.nn import layers
from cfjax.nn.attention import dense
from cfjax.nn.visibility import FULL

TAP = "tapped_layer"  # scope of the conditional that applies a token's block after the tapped layers only
TIME_SCALE = 10.0  # of the time embedding beside the tokens (reference: `wan/modules/model.py`, `WanModel._forward`)
CLASSIFIER_EPS = 1e-5  # of its norm alone: PyTorch's default, which the reference leaves
DEPTHS = (14 / 30, 22 / 30, 1.0)  # of the reference's taps, after layers 13, 21 and 29 of 30


@dataclass(frozen=True)
class BranchConfig:
    """The classifier branch.

    Attributes:
      layers: whose outputs are classified, counted from 0; () is the reference's depths, see `tapped_layers`.
      ffn_dim: of the tokens' blocks; 0 is the network's own (the reference has 8192 beside 8960).
      num_class: logits per clip.
      time_embedding: classify the network's time embedding with the tokens.
    """

    layers: tuple[int, ...] = ()
    ffn_dim: int = 0
    num_class: int = 1
    time_embedding: bool = False

    def __post_init__(self) -> None:
        if list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"roles.critic.branch.layers={self.layers}: name layers once each, in ascending order")
        if self.num_class < 1:
            raise UserError(f"roles.critic.branch.num_class={self.num_class}: use 1 or more")


def tapped_layers(branch: BranchConfig, num_layers: int) -> tuple[int, ...]:
    """The layers whose outputs the branch reads: 13, 21 and 29 of 30 by default, at the same depths in others.

    Raises:
      UserError: the network has no such layer.
    """
    if not branch.layers:
        return tuple(sorted({max(round(depth * num_layers), 1) - 1 for depth in DEPTHS}))
    if branch.layers[0] < 0 or branch.layers[-1] >= num_layers:
        raise UserError(f"roles.critic.branch.layers={branch.layers}: the critic's layers are 0 to {num_layers - 1}")
    return branch.layers


class TokenBlock(nnx.Module):
    """A token attends to a layer's normed features, then its feed-forward; both residual, neither modulated."""

    def __init__(self, config: WanConfig, ffn_dim: int, key: jax.Array):
        key_attn, key_ffn = jax.random.split(key)
        self.norm3 = layers.LayerNorm(config.dim)
        self.cross_attn = Attention(config.dim, key_attn)
        self.ffn = layers.Mlp((config.dim, ffn_dim, config.dim), layers.gelu_tanh, key_ffn)

    def __call__(self, stream_BFTD: jax.Array, token_D: jax.Array, config: WanConfig) -> jax.Array:
        """The token after the block, [B, D]."""
        policy, compute = config.precision, config.precision.compute
        batch = stream_BFTD.shape[0]
        features = self.norm3(stream_BFTD, config.eps, policy).astype(compute)
        k, v = (rearrange(x, "b f t n k -> b (f t) n k") for x in self.cross_attn.key_value(features, config))
        q_NK = self.cross_attn.query(token_D, config)
        q_B1NK = jnp.broadcast_to(q_NK[None, None], (batch, 1, *q_NK.shape))
        # One query has few scores: no flash kernel, whose query tiles would be empty.
        attended = self.cross_attn.output(dense(q_B1NK, k, v, backend="xla"), config)[:, 0]
        token = policy.to_norm_dtype(token_D)[None] + policy.to_norm_dtype(attended)
        h = layers.layer_norm(token, config.eps, policy).astype(compute)
        return token + policy.to_norm_dtype(self.ffn(h, compute))


class Branch(nnx.Module):
    """Register tokens, a block for each, and the classifier."""

    def __init__(self, config: WanConfig, branch: BranchConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        count = len(tapped_layers(branch, config.num_layers))
        width = config.dim * (count + branch.time_embedding)
        self.registers = nnx.Param(layers.normal(0.02)(keys[0], (count, config.dim)))
        self.norm_registers = layers.RMSNorm(config.dim)
        ffn_dim = branch.ffn_dim or config.ffn_dim
        self.blocks = jax.vmap(lambda k: TokenBlock(config, ffn_dim, k))(jax.random.split(keys[1], count))
        self.norm = layers.LayerNorm(width)
        self.classifier = layers.Mlp((width, config.dim, branch.num_class), jax.nn.silu, keys[2])


class Discriminator(Wan):
    """A `Wan` with a branch."""

    def __init__(self, config: WanConfig, branch: BranchConfig, key: jax.Array):
        super().__init__(config, key)
        self.branch_config = branch
        self.branch = Branch(config, branch, jax.random.fold_in(key, 1))

    def classify(self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV) -> jax.Array:
        """Logits [B, num_class], float32, of noised clips, positive for real ones; bidirectional.

        The time embedding, where it is used, is the first frame's: a clip has one level.
        """
        config, branch, frames = self.config, self.branch, latents_BFHWC.shape[1]
        tapped = tapped_layers(self.branch_config, config.num_layers)
        tokens_LD = branch.norm_registers(branch.registers[...], config.eps)
        place = [tapped.index(layer) if layer in tapped else -1 for layer in range(config.num_layers)]

        def attend_token(stream_BFTD: jax.Array, index: jax.Array) -> jax.Array:
            block = jax.tree.map(lambda x: x[index], branch.blocks)
            return block(stream_BFTD, tokens_LD[index], config)

        def tap(stream_BFTD: jax.Array, index: jax.Array) -> jax.Array:
            """A token [B, D] in place of the stream: no layer's features outlive it; zeros after the other layers."""
            nothing = jnp.zeros((stream_BFTD.shape[0], config.dim), tokens_LD.dtype)
            with jax.named_scope(TAP):
                return jax.lax.cond(index < 0, lambda _: nothing, lambda x: attend_token(x, index), stream_BFTD)

        _, seen_LBD = backbone(
            self,
            latents_BFHWC,
            sigma_BF,
            text_kv,
            jnp.arange(frames),
            attend_by(FULL, frames, config),
            layer_input=jnp.array(place, jnp.int32),
            tap=tap,
        )
        seen = [seen_LBD[layer] for layer in tapped]
        if self.branch_config.time_embedding:
            seen.append(TIME_SCALE * embed_time(self, sigma_BF[:, :1])[0][:, 0])
        policy = config.precision
        h = branch.norm(jnp.concatenate(seen, axis=-1), CLASSIFIER_EPS, policy)
        return branch.classifier(h, policy.norm).astype(jnp.float32)


def with_branch(network: Wan, branch: BranchConfig, key: jax.Array) -> Discriminator:
    """The network's own weights and a branch of random ones; the key is used for the branch alone."""
    config = network.config
    template = jax.eval_shape(lambda k: Discriminator(config, branch, k), key)
    made = jax.jit(lambda k: Branch(config, branch, k))(key)
    own = {f"branch/{name}": x for name, x in named_leaves(made).items()}
    return from_named(template, {**named_leaves(network), **own})
