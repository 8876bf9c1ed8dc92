"""Wan's transformers in the layouts of diffusers (`WanTransformer3DModel`) and of the original releases.

Both are PyTorch: linear weights [out, in], the patch embedding a 3-d convolution, and a head's channels stored as
(real, imaginary) pairs where ours are [real parts, imaginary parts] (see `nn.rope`). The head's 64 outputs are ordered
(p, q, c) everywhere. Names of the original are those of the release, and of the reference's checkpoints.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from einops import rearrange

from cfjax.conversion.rules import (
    SAME,
    Layout,
    Rule,
    export_module,
    import_module,
    kernel_bias,
    layer_count,
)
from cfjax.core.errors import UserError
from cfjax.core.schema import EPS, SIZE, checked, either, one_of, table
from cfjax.models.experts import MASK, takes_picture
from cfjax.models.wan import Wan, WanConfig

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
    *kernel_bias("patch_embedding", "patch_embedding", PATCH),
    *kernel_bias("(text|time)_embedding/up", r"condition_embedder.\1_embedder.linear_1"),
    *kernel_bias("(text|time)_embedding/down", r"condition_embedder.\1_embedder.linear_2"),
    *kernel_bias("time_projection", "condition_embedder.time_proj"),
    Rule("blocks/modulation", "blocks.{layer}.scale_shift_table", TABLE),
    *kernel_bias("blocks/self_attn/([qk])", r"blocks.{layer}.attn1.to_\1", HALVES_KERNEL, HALVES),
    Rule("blocks/self_attn/(norm_[qk])/scale", r"blocks.{layer}.attn1.\1.weight", HALVES),
    *kernel_bias("blocks/self_attn/v", "blocks.{layer}.attn1.to_v"),
    *kernel_bias("blocks/self_attn/o", "blocks.{layer}.attn1.to_out.0"),
    Rule("blocks/norm3/scale", "blocks.{layer}.norm2.weight", SAME),
    Rule("blocks/norm3/bias", "blocks.{layer}.norm2.bias", SAME),
    *kernel_bias("blocks/cross_attn/([qkv])", r"blocks.{layer}.attn2.to_\1"),
    Rule("blocks/cross_attn/(norm_[qk])/scale", r"blocks.{layer}.attn2.\1.weight", SAME),
    *kernel_bias("blocks/cross_attn/o", "blocks.{layer}.attn2.to_out.0"),
    *kernel_bias("blocks/ffn/up", "blocks.{layer}.ffn.net.0.proj"),
    *kernel_bias("blocks/ffn/down", "blocks.{layer}.ffn.net.2"),
    Rule("head_modulation", "scale_shift_table", TABLE),
    *kernel_bias("head", "proj_out"),
)

ORIGINAL = (
    *kernel_bias("patch_embedding", "patch_embedding", PATCH),
    *kernel_bias("(text|time)_embedding/up", r"\1_embedding.0"),
    *kernel_bias("(text|time)_embedding/down", r"\1_embedding.2"),
    *kernel_bias("time_projection", "time_projection.1"),
    Rule("blocks/modulation", "blocks.{layer}.modulation", TABLE),
    *kernel_bias("blocks/self_attn/([qk])", r"blocks.{layer}.self_attn.\1", HALVES_KERNEL, HALVES),
    Rule("blocks/self_attn/(norm_[qk])/scale", r"blocks.{layer}.self_attn.\1.weight", HALVES),
    *kernel_bias("blocks/self_attn/([vo])", r"blocks.{layer}.self_attn.\1"),
    Rule("blocks/norm3/scale", "blocks.{layer}.norm3.weight", SAME),
    Rule("blocks/norm3/bias", "blocks.{layer}.norm3.bias", SAME),
    *kernel_bias("blocks/cross_attn/([qkvo])", r"blocks.{layer}.cross_attn.\1"),
    Rule("blocks/cross_attn/(norm_[qk])/scale", r"blocks.{layer}.cross_attn.\1.weight", SAME),
    *kernel_bias("blocks/ffn/up", "blocks.{layer}.ffn.0"),
    *kernel_bias("blocks/ffn/down", "blocks.{layer}.ffn.2"),
    Rule("head_modulation", "head.modulation", TABLE),
    *kernel_bias("head", "head.head"),
)


LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}
# What networks that take a picture's features have besides (Wan2.1's image to video).
WITH_IMAGE = {
    "original": (
        Rule("image_embedding/norm_in/scale", "img_emb.proj.0.weight", SAME),
        Rule("image_embedding/norm_in/bias", "img_emb.proj.0.bias", SAME),
        *kernel_bias("image_embedding/up", "img_emb.proj.1"),
        *kernel_bias("image_embedding/down", "img_emb.proj.3"),
        Rule("image_embedding/norm_out/scale", "img_emb.proj.4.weight", SAME),
        Rule("image_embedding/norm_out/bias", "img_emb.proj.4.bias", SAME),
        *kernel_bias("blocks/cross_attn/([kv])_img", r"blocks.{layer}.cross_attn.\1_img"),
        Rule("blocks/cross_attn/norm_k_img/scale", "blocks.{layer}.cross_attn.norm_k_img.weight", SAME),
    ),
    "diffusers": (
        Rule("image_embedding/norm_in/scale", "condition_embedder.image_embedder.norm1.weight", SAME),
        Rule("image_embedding/norm_in/bias", "condition_embedder.image_embedder.norm1.bias", SAME),
        *kernel_bias("image_embedding/up", "condition_embedder.image_embedder.ff.net.0.proj"),
        *kernel_bias("image_embedding/down", "condition_embedder.image_embedder.ff.net.2"),
        Rule("image_embedding/norm_out/scale", "condition_embedder.image_embedder.norm2.weight", SAME),
        Rule("image_embedding/norm_out/bias", "condition_embedder.image_embedder.norm2.bias", SAME),
        *kernel_bias("blocks/cross_attn/([kv])_img", r"blocks.{layer}.attn2.add_\1_proj"),
        Rule("blocks/cross_attn/norm_k_img/scale", "blocks.{layer}.attn2.norm_added_k.weight", SAME),
    ),
}
# In some of diffusers' files, whose class reads none of them (`_keys_to_ignore_on_load_unexpected`).
UNREAD = ".attn2.norm_added_q.weight"
HEAD_DIM = 128  # of every published Wan model; the weights alone do not determine it
TEXT_LENGTH = 512
TI2V_CHANNELS = 48  # of the latents of Wan2.2-TI2V-5B, which also goes on from a clean first latent frame
# What config.json calls a size, by layout.
SIZES = {
    "original": {
        "dim": "dim",
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "in_dim": "in_dim",
        "out_dim": "out_dim",
        "num_layers": "num_layers",
        "text_dim": "text_dim",
    },
    "diffusers": {
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "num_layers": "num_layers",
        "text_dim": "text_dim",
        "image_dim": "image_dim",
    },
}
# What config.json may say of switches that our network has thrown for good.
FIXED = {
    "model_type": one_of("t2v", "ti2v", "i2v"),
    "qk_norm": one_of(True, "rms_norm_across_heads"),
    "cross_attn_norm": one_of(True),
    "image_dim": either(one_of(None), SIZE),
    "added_kv_proj_dim": either(one_of(None), SIZE),
    "pos_embed_seq_len": one_of(None),
    "text_len": one_of(TEXT_LENGTH),
}
# Both ways of saying how many heads there are.
HEADS = {"original": ("num_heads",), "diffusers": ("num_attention_heads", "attention_head_dim")}
ABOUT = {
    layout: table({}, {**dict.fromkeys((*SIZES[layout], *HEADS[layout]), SIZE), "eps": EPS, **FIXED})
    for layout in SIZES
}
# The features of a first and a last picture, each with a place of its own.
TWO_PICTURES = ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed")


def layouts_wan(config: WanConfig) -> dict[str, tuple[Rule, ...]]:
    """The tables of a network of these sizes, by layout."""
    return {name: (*rows, *(WITH_IMAGE[name] if config.image_dim else ())) for name, rows in LAYOUTS.items()}


def read_wan(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors less those that nothing reads."""
    return {name: x for name, x in weights.items() if not name.endswith(UNREAD)}


def infer_config_wan(
    shapes: Mapping[str, tuple[int, ...]], layout: str, about: Mapping[str, Any] | None = None
) -> WanConfig:
    """Sizes from the weights' shapes, checked against config.json, which alone has the number of heads and eps.

    Args:
      shapes: name -> shape of every array.
      layout: "original" or "diffusers".
      about: config.json; None takes 128 channels per head and eps 1e-6, as every published Wan model has.

    Raises:
      UserError: a model of two pictures, arrays that give a size are missing, or config.json says something else.
    """
    about = about or {}
    if two := next((name for name in TWO_PICTURES if name in shapes), ""):
        raise UserError(
            f"a first-and-last-frame-to-video model ({two}) takes two pictures' features, which this network does not;"
            " convert an image-to-video (I2V) or a text-to-video (T2V) one"
        )
    checked(ABOUT[layout], about, "config.json")
    sized = _sized(shapes, LAYOUTS[layout] is ORIGINAL)
    sizes = sized.keywords
    if about.get("model_type") == "i2v" and sizes["in_dim"] == sizes["out_dim"]:
        takes = f"take {sizes['in_dim']} channels and give as many"
        raise UserError(f"config.json: model_type i2v, an image-to-video model, but the weights {takes}")
    if sizes["image_dim"] and sizes["in_dim"] == sizes["out_dim"]:
        raise UserError("the network takes a picture's features but no picture's latents; no such network is known")
    for key, name in SIZES[layout].items():
        if key in about and (about[key] or 0) != sizes[name]:
            raise UserError(f"config.json: {key} is {about[key]}, but the weights have {sizes[name]}")
    added = sizes["dim"] if sizes["image_dim"] else 0
    if "added_kv_proj_dim" in about and (about["added_kv_proj_dim"] or 0) != added:
        raise UserError(f"config.json: added_kv_proj_dim is {about['added_kv_proj_dim']}, but the weights have {added}")
    if "patch_size" in about and repr(about["patch_size"]) != repr([1, *sizes["patch"]]):
        patch = [1, *sizes["patch"]]
        raise UserError(f"config.json: patch_size is {about['patch_size']}, but the weights have {patch}")
    heads = about.get("num_heads" if layout == "original" else "num_attention_heads")
    if heads is None:
        if sizes["dim"] % HEAD_DIM:
            raise UserError(
                f"no config.json gives the number of heads, and {sizes['dim']} channels are no multiple of"
                f" {HEAD_DIM}; put the model's config.json beside the weights"
            )
        heads = sizes["dim"] // HEAD_DIM
    if (width := heads * about.get("attention_head_dim", sizes["dim"] // heads)) != sizes["dim"]:
        raise UserError(f"config.json: {heads} heads are {width} wide together, but the weights have {sizes['dim']}")
    return sized(num_heads=heads, eps=about.get("eps", 1e-6))


def _sized(shapes: Mapping[str, tuple[int, ...]], original: bool) -> partial[WanConfig]:
    """A config with every size that shapes determine; the number of heads is not among them."""
    room = "{}_embedding.0" if original else "condition_embedder.{}_embedder.linear_1"
    image = "img_emb.proj.1.weight" if original else "condition_embedder.image_embedder.ff.net.0.proj.weight"

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes or len(shapes[name]) != rank:
            raise UserError(f"{name} is missing or not of rank {rank}; these are not a Wan transformer's weights")
        return shapes[name]

    dim, in_dim, _, *patch = shape("patch_embedding.weight", 5)
    rows, pixels = shape("head.head.weight" if original else "proj_out.weight", 2)[0], patch[0] * patch[1]
    if rows != in_dim * pixels and (in_dim - MASK) * pixels != 2 * rows:
        raise UserError(
            f"the network takes {in_dim} latent channels and gives {rows / pixels:g}: generating needs as many out as"
            f" in, or (image to video) {MASK} for a mask and as many again for a picture's latents"
        )
    return partial(
        WanConfig,
        dim=dim,
        ffn_dim=shape(f"blocks.0.ffn.{'0' if original else 'net.0.proj'}.weight", 2)[0],
        num_layers=layer_count(shapes, "blocks."),
        in_dim=in_dim,
        out_dim=rows // pixels,
        text_dim=shape(f"{room.format('text')}.weight", 2)[1],
        freq_dim=shape(f"{room.format('time')}.weight", 2)[1],
        patch=(patch[0], patch[1]),
        image_dim=shape(image, 2)[1] if image in shapes else 0,
    )


def config_json_wan(config: WanConfig, layout: str) -> dict[str, Any]:
    """config.json beside the weights in this layout; `infer_config_wan` reads it back."""
    if layout == "original":
        sizes = {key: getattr(config, name) for key, name in SIZES[layout].items() if name != "text_dim"}
        kind = "i2v" if takes_picture(config) else "ti2v" if config.in_dim == TI2V_CHANNELS else "t2v"
        more = {"model_type": kind, "num_heads": config.num_heads, "eps": config.eps, "text_len": TEXT_LENGTH}
        return {"_class_name": "WanModel", **sizes, **more}
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "num_attention_heads": config.num_heads,
        "patch_size": [1, *config.patch],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        **{key: getattr(config, name) for key, name in SIZES[layout].items()},
        "image_dim": config.image_dim or None,
    }


def abstract_wan(config: WanConfig) -> Wan:
    """The network's structure with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0))


def import_wan(weights: Mapping[str, Any], config: WanConfig, table: tuple[Rule, ...] = DIFFUSERS) -> Wan:
    """`rules.import_module` of a state dict in the layout `DIFFUSERS` or `ORIGINAL`."""
    return import_module(abstract_wan(config), _of_config(table, config), weights, config)


def export_wan(model: Wan, table: tuple[Rule, ...] = DIFFUSERS) -> dict[str, np.ndarray]:
    """`rules.export_module`: the state dict that `import_wan` reads back."""
    return export_module(_of_config(table, model.config), model)


def _of_config(table: tuple[Rule, ...], config: WanConfig) -> tuple[Rule, ...]:
    """A layout's table with the rows that this network has besides."""
    return next((layouts_wan(config)[name] for name, rows in LAYOUTS.items() if rows is table), table)
