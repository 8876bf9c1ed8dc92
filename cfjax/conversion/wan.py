"""Wan2.1's transformer in the layouts of diffusers (`WanTransformer3DModel`) and of the original release.

Both are PyTorch: linear weights [out, in], the patch embedding a 3-d convolution, and a head's channels stored as
(real, imaginary) pairs where ours are [real parts, imaginary parts] (see `nn.rope`). The head's 64 outputs are ordered
(p, q, c) everywhere. Names of the original: those of the release.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange

from cfjax.conversion.rules import SAME, Layout, Rule, load_named, save_named
from cfjax.core.tree import from_named, named_leaves
from cfjax.models.wan import Wan, WanConfig

KERNEL = Layout(load=lambda x, _: x.T, save=lambda x, _: x.T)
TABLE = Layout(load=lambda x, _: x.reshape(x.shape[1:]), save=lambda x, _: x[None])
# Conv3d [d, c, 1, p, q] with kernel = stride is a linear layer over (c p q).
PATCH = Layout(
    load=lambda x, config: rearrange(x, "d c 1 p q -> (c p q) d", p=config.patch[0], q=config.patch[1]),
    save=lambda x, config: rearrange(x, "(c p q) d -> d c 1 p q", p=config.patch[0], q=config.patch[1]),
)
# Output channels of q and k: pairs (real, imaginary) per head <-> halves [real, imaginary] per head.
HALVES = Layout(
    load=lambda x, config: rearrange(x, "(n j two) -> (n two j)", n=config.num_heads, two=2),
    save=lambda x, config: rearrange(x, "(n two j) -> (n j two)", n=config.num_heads, two=2),
)
HALVES_KERNEL = Layout(
    load=lambda x, config: rearrange(x, "(n j two) d -> d (n two j)", n=config.num_heads, two=2),
    save=lambda x, config: rearrange(x, "d (n two j) -> (n j two) d", n=config.num_heads, two=2),
)

# Cross-attention has no RoPE: its channels keep their order.
DIFFUSERS = (
    Rule("patch_embedding/kernel", "patch_embedding.weight", PATCH),
    Rule("patch_embedding/bias", "patch_embedding.bias", SAME),
    Rule("(text|time)_embedding/up/kernel", r"condition_embedder.\1_embedder.linear_1.weight", KERNEL),
    Rule("(text|time)_embedding/up/bias", r"condition_embedder.\1_embedder.linear_1.bias", SAME),
    Rule("(text|time)_embedding/down/kernel", r"condition_embedder.\1_embedder.linear_2.weight", KERNEL),
    Rule("(text|time)_embedding/down/bias", r"condition_embedder.\1_embedder.linear_2.bias", SAME),
    Rule("time_projection/kernel", "condition_embedder.time_proj.weight", KERNEL),
    Rule("time_projection/bias", "condition_embedder.time_proj.bias", SAME),
    Rule("blocks/modulation", "blocks.{layer}.scale_shift_table", TABLE),
    Rule("blocks/self_attn/([qk])/kernel", r"blocks.{layer}.attn1.to_\1.weight", HALVES_KERNEL),
    Rule("blocks/self_attn/([qk])/bias", r"blocks.{layer}.attn1.to_\1.bias", HALVES),
    Rule("blocks/self_attn/(norm_[qk])/scale", r"blocks.{layer}.attn1.\1.weight", HALVES),
    Rule("blocks/self_attn/v/kernel", "blocks.{layer}.attn1.to_v.weight", KERNEL),
    Rule("blocks/self_attn/v/bias", "blocks.{layer}.attn1.to_v.bias", SAME),
    Rule("blocks/self_attn/o/kernel", "blocks.{layer}.attn1.to_out.0.weight", KERNEL),
    Rule("blocks/self_attn/o/bias", "blocks.{layer}.attn1.to_out.0.bias", SAME),
    Rule("blocks/norm3/scale", "blocks.{layer}.norm2.weight", SAME),
    Rule("blocks/norm3/bias", "blocks.{layer}.norm2.bias", SAME),
    Rule("blocks/cross_attn/([qkv])/kernel", r"blocks.{layer}.attn2.to_\1.weight", KERNEL),
    Rule("blocks/cross_attn/([qkv])/bias", r"blocks.{layer}.attn2.to_\1.bias", SAME),
    Rule("blocks/cross_attn/(norm_[qk])/scale", r"blocks.{layer}.attn2.\1.weight", SAME),
    Rule("blocks/cross_attn/o/kernel", "blocks.{layer}.attn2.to_out.0.weight", KERNEL),
    Rule("blocks/cross_attn/o/bias", "blocks.{layer}.attn2.to_out.0.bias", SAME),
    Rule("blocks/ffn/up/kernel", "blocks.{layer}.ffn.net.0.proj.weight", KERNEL),
    Rule("blocks/ffn/up/bias", "blocks.{layer}.ffn.net.0.proj.bias", SAME),
    Rule("blocks/ffn/down/kernel", "blocks.{layer}.ffn.net.2.weight", KERNEL),
    Rule("blocks/ffn/down/bias", "blocks.{layer}.ffn.net.2.bias", SAME),
    Rule("head_modulation", "scale_shift_table", TABLE),
    Rule("head/kernel", "proj_out.weight", KERNEL),
    Rule("head/bias", "proj_out.bias", SAME),
)

ORIGINAL = (
    Rule("patch_embedding/kernel", "patch_embedding.weight", PATCH),
    Rule("patch_embedding/bias", "patch_embedding.bias", SAME),
    Rule("(text|time)_embedding/up/kernel", r"\1_embedding.0.weight", KERNEL),
    Rule("(text|time)_embedding/up/bias", r"\1_embedding.0.bias", SAME),
    Rule("(text|time)_embedding/down/kernel", r"\1_embedding.2.weight", KERNEL),
    Rule("(text|time)_embedding/down/bias", r"\1_embedding.2.bias", SAME),
    Rule("time_projection/kernel", "time_projection.1.weight", KERNEL),
    Rule("time_projection/bias", "time_projection.1.bias", SAME),
    Rule("blocks/modulation", "blocks.{layer}.modulation", TABLE),
    Rule("blocks/self_attn/([qk])/kernel", r"blocks.{layer}.self_attn.\1.weight", HALVES_KERNEL),
    Rule("blocks/self_attn/([qk])/bias", r"blocks.{layer}.self_attn.\1.bias", HALVES),
    Rule("blocks/self_attn/(norm_[qk])/scale", r"blocks.{layer}.self_attn.\1.weight", HALVES),
    Rule("blocks/self_attn/([vo])/kernel", r"blocks.{layer}.self_attn.\1.weight", KERNEL),
    Rule("blocks/self_attn/([vo])/bias", r"blocks.{layer}.self_attn.\1.bias", SAME),
    Rule("blocks/norm3/scale", "blocks.{layer}.norm3.weight", SAME),
    Rule("blocks/norm3/bias", "blocks.{layer}.norm3.bias", SAME),
    Rule("blocks/cross_attn/([qkvo])/kernel", r"blocks.{layer}.cross_attn.\1.weight", KERNEL),
    Rule("blocks/cross_attn/([qkvo])/bias", r"blocks.{layer}.cross_attn.\1.bias", SAME),
    Rule("blocks/cross_attn/(norm_[qk])/scale", r"blocks.{layer}.cross_attn.\1.weight", SAME),
    Rule("blocks/ffn/up/kernel", "blocks.{layer}.ffn.0.weight", KERNEL),
    Rule("blocks/ffn/up/bias", "blocks.{layer}.ffn.0.bias", SAME),
    Rule("blocks/ffn/down/kernel", "blocks.{layer}.ffn.2.weight", KERNEL),
    Rule("blocks/ffn/down/bias", "blocks.{layer}.ffn.2.bias", SAME),
    Rule("head_modulation", "head.modulation", TABLE),
    Rule("head/kernel", "head.head.weight", KERNEL),
    Rule("head/bias", "head.head.bias", SAME),
)


def abstract_wan(config: WanConfig) -> Wan:
    """The network's structure with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0))


def import_wan(weights: Mapping[str, Any], config: WanConfig, table: tuple[Rule, ...] = DIFFUSERS) -> Wan:
    """A network from a state dict of arrays, in float32 host memory.

    Args:
      weights: name -> array (NumPy's, or anything `np.asarray` takes).
      config: sizes; the state dict must fit exactly.
      table: `DIFFUSERS` or `ORIGINAL`.

    Raises:
      UserError: the state dict does not fit.
    """
    template = abstract_wan(config)
    return from_named(template, load_named(table, weights, named_leaves(template), config))


def export_wan(model: Wan, table: tuple[Rule, ...] = DIFFUSERS) -> dict[str, np.ndarray]:
    """The state dict that `import_wan` reads back; works on anything shaped like a network, gradients too."""
    return save_named(table, named_leaves(model), model.config)
