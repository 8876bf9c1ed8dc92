"""Wan2.1's diffusion transformer, bidirectional and causal, with a timestep per frame.

Reference: `wan/modules/model.py`, `WanModel`, and `wan/modules/causal_model.py`, `CausalWanModel`.

One set of weights, four uses, one backbone (`models.context` has those that make the context):

    model(latents, sigma, text)          bidirectional or diffusion forcing: the visibility decides
    teacher_forced(model, noisy, ...)    noisy blocks against clean earlier blocks, both computed here
    forward_block(model, block, ...)     one block against a KV cache; also returns the block's own keys and values
    replay(model, noisy, ..., context)   all blocks at once against such a context

All take text as keys and values (`text_kv`), and return the flow v = eps - x0. They and `embed_text` dispatch on class.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cfjax.core.bits import from_bits, to_bits
from cfjax.core.errors import UserError
from cfjax.core.precision import BF16, LATER, Policy
from cfjax.core.sharding import constrain
from cfjax.models.actions import ActionAttention, ActionConfig, action_mlp, attend_actions
from cfjax.models.attention import Attention, ImageAttention, ImageEmbedding
from cfjax.models.cache import KVCache, attend_past, view
from cfjax.models.ends import embed_frames, flow_of
from cfjax.nn import layers
from cfjax.nn.frames import attend_frames, attend_text, constrain_kv
from cfjax.nn.rope import rotate
from cfjax.nn.visibility import FULL, Blocks, Visibility

KvGradient = Literal["detached", "straight_through"]
# (q, k, v, this layer's extra input) -> attended values; all [B, F, T, N, K]
SelfAttend = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


@dataclass(frozen=True)
class WanConfig:
    """Sizes and static choices of one network.

    Attributes:
      dim, ffn_dim, num_heads, num_layers: the transformer's.
      in_dim, out_dim: latent channels.
      text_dim: width of the text rows.
      freq_dim: width of the timestep sinusoid.
      patch: patch height and width; one latent frame is `H W / (ph pw)` tokens.
      eps: of every norm.
      image_dim: width of a picture's features (CLIP's 1280) that are attended to beside the text's rows; 0: none.
      remat: "none", "full" (recompute each block) or "dots" (keep matrix products).
      attention: kernel, see `nn.attention`.
      precision: dtypes.
      actions: how it is told the keys that are held; None: it cannot be steered.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch: tuple[int, int] = (2, 2)
    eps: float = 1e-6
    remat: str = "none"
    attention: str = "auto"
    precision: Policy = field(default_factory=Policy)
    image_dim: int = field(default=0, metadata=LATER)
    actions: ActionConfig | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(f"model.dim={self.dim} must be an even multiple of model.num_heads={self.num_heads}")
        if self.remat not in ("none", "full", "dots"):
            raise UserError(f"model.remat={self.remat!r}: use none, full or dots")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame.

        Raises:
          UserError: the patch does not divide the frame.
        """
        if height % self.patch[0] or width % self.patch[1]:
            raise UserError(f"a {height} x {width} latent frame is not divisible by the {self.patch} patch")
        return (height // self.patch[0]) * (width // self.patch[1])

    def tokens_per_row(self, width: int) -> int:
        """Tokens of one row of a latent frame that is so wide."""
        return width // self.patch[1]


PRESETS = {
    "wan_1_3b": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, remat="full", precision=BF16),
    "wan_14b": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, remat="full", precision=BF16),
    "wan_i2v_14b": WanConfig(5120, 13824, 40, 40, in_dim=36, image_dim=1280, remat="full", precision=BF16),
    "wan_2_2_i2v_14b": WanConfig(5120, 13824, 40, 40, in_dim=36, remat="full", precision=BF16),
    "wan_2_2_5b": WanConfig(3072, 14336, 24, 30, in_dim=48, out_dim=48, remat="full", precision=BF16),
    "wan_mini": WanConfig(dim=48, ffn_dim=64, num_heads=4, num_layers=2, text_dim=32, remat="full"),
    "toy": WanConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64, remat="full"),
    "toy_small": WanConfig(dim=96, ffn_dim=256, num_heads=4, num_layers=4, text_dim=64, remat="full"),
}


def preset(name: str, **overrides: Any) -> WanConfig:
    """A named configuration with some fields replaced.

    Raises:
      UserError: an unknown preset or field.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset={name!r}: use one of {', '.join(PRESETS)}")
    unknown = sorted(set(overrides) - set(WanConfig.__dataclass_fields__))
    if unknown:
        raise UserError(f"model.{unknown[0]}: no such field; known are {', '.join(WanConfig.__dataclass_fields__)}")
    return replace(PRESETS[name], **overrides)


class KV(NamedTuple):
    """The text's keys and values of every layer; `image`: those of a picture's features, of networks that take some."""

    k_LBSNK: jax.Array
    v_LBSNK: jax.Array
    image: "KV | None" = None


class FrameKV(NamedTuple):
    """Keys (roped, absolute positions) and values of every layer and frame."""

    k_LBFTNK: jax.Array
    v_LBFTNK: jax.Array


class Block(nnx.Module):
    """Self-attention, cross-attention to text, feed-forward; the first and last modulated and gated per frame."""

    def __init__(self, config: WanConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.modulation = nnx.Param(layers.normal(config.dim**-0.5)(keys[0], (6, config.dim)))
        self.self_attn = Attention(config.dim, keys[1])
        self.norm3 = layers.LayerNorm(config.dim)
        self.cross_attn = (ImageAttention if config.image_dim else Attention)(config.dim, keys[2])
        self.ffn = layers.Mlp((config.dim, config.ffn_dim, config.dim), layers.gelu_tanh, keys[3])
        if config.actions is not None and config.actions.form == "attention":
            self.action_attn = ActionAttention(config.actions, config.dim, jax.random.fold_in(key, 4))


class Wan(nnx.Module):
    """The network. Immutable: use with plain jax.jit, jax.grad and jax.tree."""

    def __init__(self, config: WanConfig, key: jax.Array):
        keys = jax.random.split(key, 6)
        dim, small = config.dim, layers.normal(0.02)
        self.config, patch = config, config.patch[0] * config.patch[1]
        self.patch_embedding = layers.Linear(config.in_dim * patch, dim, keys[0])
        self.text_embedding = layers.Mlp((config.text_dim, dim, dim), layers.gelu_tanh, keys[1], kernel_init=small)
        self.time_embedding = layers.Mlp((config.freq_dim, dim, dim), jax.nn.silu, keys[2], kernel_init=small)
        self.time_projection = layers.Linear(dim, 6 * dim, keys[3])
        self.blocks = jax.vmap(lambda k: Block(config, k))(jax.random.split(keys[4], config.num_layers))
        self.head_modulation = nnx.Param(layers.normal(dim**-0.5)(keys[5], (2, dim)))
        # Folded in, not split off: the keys of the other parameters, and so their values, do not depend on it.
        self.head = layers.Linear(dim, config.out_dim * patch, jax.random.fold_in(key, 6), kernel_init=layers.zeros)
        if config.actions is not None and config.actions.form == "embedding":
            self.action_embedding = action_mlp(config.actions, dim, jax.random.fold_in(key, 7))
        if config.image_dim:
            self.image_embedding = ImageEmbedding(config.image_dim, dim, jax.random.fold_in(key, 8))

    def __call__(
        self, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_kv: KV, visibility: Visibility = FULL
    ) -> jax.Array:
        """Flow v of every frame, float32, shaped like the latents, under a `full` or `block_causal` visibility."""
        frames = latents_BFHWC.shape[1]
        self_attend = attend_by(visibility, frames, self.config)
        return backbone(self, latents_BFHWC, sigma_BF, text_kv, jnp.arange(frames), self_attend)[0]


def attend_by(visibility: Visibility, num_frames: int, config: WanConfig) -> SelfAttend:
    """`backbone`'s self-attention among the frames of one pass, without a cache; see `attend_frames`."""
    return lambda q, k, v, _: attend_frames(q, k, v, visibility, num_frames=num_frames, backend=config.attention)


@partial(jax.jit, static_argnames="config")
def make_wan(config: WanConfig, key: jax.Array) -> Wan:
    """A randomly initialised network (`WanModel.init_weights`), compiled as one program, once per configuration."""
    return Wan(config, key)


@singledispatch
@jax.named_scope("embed_text")
def embed_text(model: Wan, text_BSE: jax.Array, image_BSE: jax.Array | None = None) -> KV:
    """Cross-attention keys and values of all layers, [L, B, S, N, K]; padding rows are attended too (quirk Q18).

    Args:
      image_BSE: a picture's features (`models.clip`), of networks that take some (`WanConfig.image_dim`).

    Raises:
      UserError: the network takes a picture's features and there are none, or the other way round.
    """
    config = model.config
    if (image_BSE is not None) != bool(config.image_dim):
        raise UserError("a picture's features go with networks that take some, and with no others")
    context = model.text_embedding(text_BSE, config.precision.compute)
    picture = None if image_BSE is None else model.image_embedding(image_BSE, config.precision)

    def layer(_: None, block: Block) -> tuple[None, KV]:
        own, image = block.cross_attn, None
        if picture is not None and isinstance(own, ImageAttention):
            image = KV(*own.image_key_value(picture, config))
        return None, KV(*own.key_value(context, config), image)

    return jax.lax.scan(layer, None, model.blocks)[1]


@singledispatch
@jax.named_scope("teacher_forced")
def teacher_forced(
    model: Wan,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    clean_BFHWC: jax.Array,
    text_kv: KV,
    blocks: Blocks,
    *,
    clean_sigma_BF: jax.Array | None = None,
) -> jax.Array:
    """Flow of every noisy block given the clean earlier blocks, in one pass over [clean, noisy].

    Reference: `CausalWanModel._forward_train` with `_prepare_teacher_forcing_mask`. Gradients flow through the clean
    half too. `clean_sigma_BF` (default zeros) is the clean half's own time embedding, for noise augmentation.
    """
    frames = noisy_BFHWC.shape[1]
    visibility = Visibility("teacher_forced", blocks)
    clean_sigma = jnp.zeros_like(sigma_BF) if clean_sigma_BF is None else clean_sigma_BF

    flow, _ = backbone(
        model,
        jnp.concatenate([clean_BFHWC, noisy_BFHWC], axis=1),
        jnp.concatenate([clean_sigma, sigma_BF], axis=1),
        text_kv,
        jnp.tile(jnp.arange(frames), 2),
        attend_by(visibility, frames, model.config),
        head_frames=frames,
    )
    return flow


@singledispatch
def forward_block(
    model: Wan,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    cache: KVCache,
    start: jax.Array,
    blocks: Blocks,
) -> tuple[jax.Array, FrameKV]:
    """One block, frames [start, start + F), against the KV cache (`CausalWanModel._forward_inference`).

    Returns:
      The flow, and the block's own keys and values for `cache.write`. Reads the cache, never writes it.
    """
    frames = latents_BFHWC.shape[1]
    self_attend, numbers = attend_cached(model.config, cache, start, frames, blocks)
    positions = frame_positions(cache, start, frames, blocks)
    return backbone(model, latents_BFHWC, sigma_BF, text_kv, positions, self_attend, layer_input=numbers, emit_kv=True)


def frame_positions(cache: Any, start: jax.Array, frames: int, blocks: Blocks) -> jax.Array:
    """Time positions of the frames of a block: their indices, unless a memory policy says otherwise."""
    if blocks.memory is not None:
        return blocks.memory.own_positions(cache, start, frames)
    return start + jnp.arange(frames)


def attend_cached(
    config: WanConfig, cache: KVCache, start: jax.Array, frames: int, blocks: Blocks
) -> tuple[SelfAttend, jax.Array]:
    """Self-attention of the block from `start` on against the cache, and its extra input: every layer's number.

    So a layer reads what it sees of the stacked keys and values, and no more. No gradient passes into the cache.
    """
    if blocks.memory is not None:
        return blocks.memory.attention(config, cache, start, frames, blocks), jnp.arange(config.num_layers)
    seen = view(cache.frame_F.shape[0], start + frames, blocks)
    keys, values = to_bits((cache.k_LBFTNK, cache.v_LBFTNK))

    def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
        return attend_past(q, k, v, (keys, values, layer), seen, backend=config.attention)

    return self_attend, jnp.arange(config.num_layers)


@singledispatch
def replay(
    model: Wan,
    noisy_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    context: FrameKV,
    blocks: Blocks,
    *,
    kv_gradient: KvGradient = "detached",
    start: jax.Array | None = None,
) -> jax.Array:
    """Flow of all blocks at once, each against the context keys of the blocks before it.

    The values equal those of the sequential loop that made `context`. `kv_gradient`: the gradient from later blocks
    into earlier ones: "detached" none; "straight_through" the gradient of each earlier block's own keys and values in
    this pass, i.e. K = sg(K_context) + K_noisy - sg(K_noisy), as in `CausalWanSelfAttention.forward` (quirk Q6).

    Args:
      start: the noisy frames' first position, traced, when they are a stretch of a longer `context`; None: context and
        noisy frames are the same ones. One program for every start, at the price of masked keys.
    """
    frames = noisy_BFHWC.shape[1]
    self_attend = replay_attend(model.config, frames, blocks, kv_gradient, start)
    positions = (0 if start is None else start) + jnp.arange(frames)
    return backbone(model, noisy_BFHWC, sigma_BF, text_kv, positions, self_attend, layer_input=context)[0]


def replay_attend(
    config: WanConfig, frames: int, blocks: Blocks, kv_gradient: KvGradient, start: jax.Array | None
) -> SelfAttend:
    """`replay`'s self-attention of one layer, whose extra input is that layer's context."""
    if kv_gradient not in ("detached", "straight_through"):
        raise UserError(f"kv_gradient={kv_gradient!r}: use detached or straight_through")
    visibility = Visibility("replay", blocks)

    def with_gradient(known: jax.Array, own: jax.Array) -> jax.Array:
        known = jax.lax.stop_gradient(known.astype(own.dtype))
        if kv_gradient == "detached":
            return known
        straight = own - jax.lax.stop_gradient(own)
        if start is None:
            return known + straight
        if blocks.independent_first_frame:  # later on, the first frame ends a block that began before it
            straight = straight.at[:, 0].multiply((start == 0).astype(own.dtype))
        stretch = jax.lax.dynamic_slice_in_dim(known, start, frames, 1) + straight
        return jax.lax.dynamic_update_slice_in_dim(known, stretch, start, 1)

    def self_attend(q: jax.Array, k: jax.Array, v: jax.Array, past: FrameKV) -> jax.Array:
        keys, values = with_gradient(past.k_LBFTNK, k), with_gradient(past.v_LBFTNK, v)
        backend = config.attention
        if start is None:
            keys, values = jnp.concatenate([keys, k], axis=1), jnp.concatenate([values, v], axis=1)
            return attend_frames(q, keys, values, visibility, num_frames=frames, backend=backend)
        return _attend_stretch(q, k, v, FrameKV(keys, values), start, blocks, backend)

    return self_attend


def _attend_stretch(
    q: jax.Array, k: jax.Array, v: jax.Array, past: FrameKV, start: jax.Array, blocks: Blocks, backend: str
) -> jax.Array:
    """Every block of the frames from a traced `start` on against its own keys and those of one layer's longer past."""
    outputs = []
    for a, b in blocks.spans(q.shape[1]):
        last_stop = past.k_LBFTNK.shape[1] - q.shape[1] + b  # no start makes this block end later
        known = (past.k_LBFTNK[None, :, :last_stop], past.v_LBFTNK[None, :, :last_stop], 0)
        seen = view(last_stop, start + b, blocks, first_stop=b)
        outputs.append(attend_past(q[:, a:b], k[:, a:b], v[:, a:b], known, seen, backend=backend))
    return jnp.concatenate(outputs, axis=1)


def apply_block(
    block: Block,
    stream_BFTD: jax.Array,
    e0_BF6D: jax.Array,
    text: KV,
    past: Any,
    table: tuple[jax.Array, ...],
    self_attend: SelfAttend,
    config: WanConfig,
) -> tuple[jax.Array, FrameKV]:
    """One transformer block (`CausalWanAttentionBlock`) on a stream of frames; also its roped keys and values."""
    policy, compute = config.precision, config.precision.compute
    modulation = policy.to_norm_dtype(block.modulation[...])[None, None] + e0_BF6D
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.split(modulation, 6, axis=2)  # each [B, F, 1, D]

    with jax.named_scope("self_attention"):
        h = (layers.layer_norm(stream_BFTD, config.eps, policy) * (1 + scale_a) + shift_a).astype(compute)
        q, (k, v) = block.self_attn.query(h, config), block.self_attn.key_value(h, config)
        q, k, v = (constrain(x, "batch", None, "tokens", "channels", None) for x in (q, k, v))
        q, k = rotate(q, table), rotate(k, table)
        attended = block.self_attn.output(self_attend(q, k, v, past), config)
        stream_BFTD = stream_BFTD + gate_a * policy.to_norm_dtype(attended)
    with jax.named_scope("cross_attention"):
        q_text = block.cross_attn.query(block.norm3(stream_BFTD, config.eps, policy).astype(compute), config)
        seen = attend_text(q_text, text.k_LBSNK, text.v_LBSNK, backend=config.attention)
        if text.image is not None:
            seen += attend_text(q_text, text.image.k_LBSNK, text.image.v_LBSNK, backend=config.attention)
        stream_BFTD = stream_BFTD + policy.to_norm_dtype(block.cross_attn.output(seen, config))
    stream_BFTD = attend_actions(block, stream_BFTD, text, config)
    with jax.named_scope("feed_forward"):
        h = (layers.layer_norm(stream_BFTD, config.eps, policy) * (1 + scale_f) + shift_f).astype(compute)
        stream_BFTD = stream_BFTD + gate_f * policy.to_norm_dtype(block.ffn(h, compute))
    return constrain(stream_BFTD, "batch", None, "tokens", None), FrameKV(constrain_kv(k), constrain_kv(v))


def _remat(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    if name == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if name == "dots" else None
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def backbone(
    model: Wan,
    latents_BFHWC: jax.Array,
    sigma_BF: jax.Array,
    text_kv: KV,
    position_F: jax.Array,
    self_attend: SelfAttend,
    *,
    layer_input: Any = None,
    emit_kv: bool = False,
    tap: Callable[[jax.Array, Any], Any] | None = None,
    head_frames: int | None = None,
) -> tuple[jax.Array, Any]:
    """Patchify, scan the blocks, head, unpatchify: the flow, and what every layer emits (None: nothing).

    Args:
      position_F: absolute frame index of each frame, for RoPE.  self_attend: the self-attention of one layer.
      layer_input: pytree with a leading layer axis, passed to `self_attend` layer by layer.
      emit_kv: every layer emits its keys and values.
      tap: maps a layer's output stream [B, F, T, D] and its `layer_input` to what it emits instead.
      head_frames: the head is applied to the last so many frames only.
    """
    config = model.config
    stream, e_BFD, e0_BF6D, table = embed_frames(model, latents_BFHWC, sigma_BF, position_F, text_kv)

    def layer(stream: jax.Array, inputs: tuple[tuple[Block, Any], KV]) -> tuple[jax.Array, Any]:
        (block, past), text = from_bits(inputs[0]), inputs[1]
        stream, kv = apply_block(block, stream, e0_BF6D, text, past, table, self_attend, config)
        return stream, tap(stream, past) if tap else kv if emit_kv else None

    stacks = to_bits((model.blocks, layer_input)), text_kv
    stream, emitted = jax.lax.scan(_remat(layer, config.remat), stream, stacks)

    if head_frames is not None:
        stream, e_BFD = stream[:, -head_frames:], e_BFD[:, -head_frames:]
    return flow_of(model, stream, e_BFD, *latents_BFHWC.shape[2:4]), emitted
