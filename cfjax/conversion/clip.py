"""CLIP's vision transformer in the layouts of the original Wan release and of transformers.

Original: `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` (`wan/modules/clip.py`, `XLMRobertaCLIP`), whose
`visual.` is the encoder; its projection (`head`) and the whole text half (`textual.`, `log_scale`) are read by nothing.
"diffusers" is the `image_encoder` folder of a pipeline, transformers' `CLIPVisionModel`. Both are PyTorch: linear
weights [out, in], the patch embedding a 2-d convolution without a bias, one set of arrays per block. The original's q,
k and v are one matrix.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from einops import rearrange

from cfjax.conversion.rules import SAME, Layout, Rule, export_module, import_module, kernel_bias, layer_count
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, as_lazy
from cfjax.core.schema import EPS, SIZE, checked, one_of, table
from cfjax.models.clip import MEAN, STD, CLIPConfig, CLIPVision, abstract_clip

# Conv2d [d, c, p, q] with kernel = stride is a linear layer over (c p q).
PATCH = Layout(
    load=lambda x, config: rearrange(x, "d c p q -> (c p q) d", p=config.patch, q=config.patch),
    save=lambda x, config: rearrange(x, "(c p q) d -> d c p q", p=config.patch, q=config.patch),
)
FIRST = Layout(load=lambda x, _: x.reshape(x.shape[1:]), save=lambda x, _: x[None])
TOKEN = Layout(load=lambda x, _: x.reshape(x.shape[2:]), save=lambda x, _: x[None, None])


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}/scale", f"{theirs}.weight", SAME), Rule(f"{ours}/bias", f"{theirs}.bias", SAME)


ORIGINAL = (
    Rule("patch_kernel", "patch_embedding.weight", PATCH),
    Rule("class_embedding", "cls_embedding", TOKEN),
    Rule("position_embedding", "pos_embedding", FIRST),
    *_norm("norm_in", "pre_norm"),
    *_norm("norm_out", "post_norm"),
    *_norm("blocks/(norm[12])", r"transformer.{layer}.\1"),
    *kernel_bias("blocks/([qkv])", r"transformer.{layer}.attn.to_\1"),  # after `read_clip`
    *kernel_bias("blocks/o", "transformer.{layer}.attn.proj"),
    *kernel_bias("blocks/ffn/up", "transformer.{layer}.mlp.0"),
    *kernel_bias("blocks/ffn/down", "transformer.{layer}.mlp.2"),
)
DIFFUSERS = (
    Rule("patch_kernel", "embeddings.patch_embedding.weight", PATCH),
    Rule("class_embedding", "embeddings.class_embedding", SAME),
    Rule("position_embedding", "embeddings.position_embedding.weight", SAME),
    *_norm("norm_in", "pre_layrnorm"),
    *_norm("norm_out", "post_layernorm"),
    *_norm("blocks/norm([12])", r"encoder.layers.{layer}.layer_norm\1"),
    *kernel_bias("blocks/([qkv])", r"encoder.layers.{layer}.self_attn.\1_proj"),
    *kernel_bias("blocks/o", "encoder.layers.{layer}.self_attn.out_proj"),
    *kernel_bias("blocks/ffn/up", "encoder.layers.{layer}.mlp.fc1"),
    *kernel_bias("blocks/ffn/down", "encoder.layers.{layer}.mlp.fc2"),
)
LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}
# What stands before every name in files: of the original release, of transformers before its fifth version.
PREFIXES = {"original": "visual.", "diffusers": "vision_model."}
HEAD_DIM = 80  # of ViT-H/14; the original's weights alone do not determine it
UNREAD, JOINED, PARTS = "head", ".attn.to_qkv.", "qkv"
SIZES = {
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "layers",
    "image_size": "image_size",
    "patch_size": "patch",
}
FIXED = {"hidden_act": "gelu", "num_channels": 3}
ABOUT = table(
    {"num_attention_heads": SIZE},
    {**dict.fromkeys(SIZES, SIZE), **{key: one_of(value) for key, value in FIXED.items()}, "layer_norm_eps": EPS},
)


def read_clip(weights: Mapping[str, Any]) -> dict[str, LazyArray]:
    """The original's weights with q, k and v apart and without the projection; transformers' pass unchanged."""
    out: dict[str, LazyArray] = {}
    for name, x in as_lazy(weights).items():
        if JOINED not in name:
            out |= {} if name == UNREAD else {name: x}
            continue
        if x.shape[0] % 3:
            raise UserError(f"{name} has shape {x.shape}; it holds q, k and v, whose sizes are alike")
        rows = x.shape[0] // 3
        for i, part in enumerate(PARTS):
            reads = tuple(_reader(partial(_rows, i * rows, rows), (read,)) for read in x.parts)
            out[name.replace(JOINED, f".attn.to_{part}.")] = replace(x, shape=(rows, *x.shape[1:]), parts=reads)
    return out


def _rows(start: int, count: int, array: np.ndarray) -> np.ndarray:
    return array[start : start + count]


def _reader(make: Callable[..., np.ndarray], reads: tuple[Callable[[], np.ndarray], ...]) -> Callable[[], np.ndarray]:
    return lambda: make(*(read() for read in reads))


def written_clip(weights: Mapping[str, LazyArray], layout: str) -> dict[str, LazyArray]:
    """The names and arrays of a layout's files: the inverse of `read_clip`, and what stands before names."""
    out: dict[str, LazyArray] = {}
    for name, x in weights.items():
        split = next((part for part in PARTS if f".attn.to_{part}." in name), "")
        if layout == "original" and split:
            if split != PARTS[0]:
                continue
            others = [weights[name.replace(".attn.to_q.", f".attn.to_{part}.")] for part in PARTS]
            reads = tuple(
                _reader(lambda *parts: np.concatenate(parts), some)
                for some in zip(*(y.parts for y in others), strict=True)
            )
            x = replace(x, shape=(3 * x.shape[0], *x.shape[1:]), parts=reads)
            name = name.replace(".attn.to_q.", JOINED)
        out[PREFIXES[layout] + name] = x
    return out


def infer_config_clip(
    shapes: Mapping[str, tuple[int, ...]], layout: str, about: Mapping[str, Any] | None = None
) -> CLIPConfig:
    """Sizes from the shapes of a file's arrays; in transformers' layout config.json must agree, and has the heads.

    Args:
      about: transformers' config.json; without one 80 channels per head and eps 1e-5, as ViT-H/14 has.

    Raises:
      UserError: an array that gives a size is missing, or config.json says otherwise.
    """
    original = layout == "original"

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != rank:
            raise UserError(
                f"{name} is missing or not of rank {rank}: these are not CLIP's vision transformer's weights"
            )
        return shapes[name]

    dim, _, patch, _ = shape("patch_embedding.weight" if original else "embeddings.patch_embedding.weight", 4)
    places = shape("pos_embedding", 3)[1] if original else shape("embeddings.position_embedding.weight", 2)[0]
    side = round((places - 1) ** 0.5)
    if side < 1 or side**2 + 1 != places:
        raise UserError(f"{places} positions are not those of a square of patches and one more")
    before = "transformer." if original else "encoder.layers."
    sized = partial(
        CLIPConfig,
        dim=dim,
        ffn_dim=shape(f"{before}0.mlp.{'0' if original else 'fc1'}.weight", 2)[0],
        layers=layer_count(shapes, before),
        image_size=side * patch,
        patch=patch,
    )
    sizes = sized.keywords
    vision = (about or {}).get("vision_config") or about or {}
    if vision:
        checked(ABOUT, vision, "image encoder's config.json")
        for key, name in SIZES.items():
            if key in vision and vision[key] != sizes[name]:
                raise UserError(
                    f"image encoder's config.json: {key} is {vision[key]}, but the weights have {sizes[name]}"
                )
    elif dim % HEAD_DIM:
        raise UserError(
            f"no config.json gives the number of heads, and {dim} channels of the image encoder are no multiple of"
            f" {HEAD_DIM}"
        )
    return sized(heads=vision.get("num_attention_heads", dim // HEAD_DIM), eps=vision.get("layer_norm_eps", 1e-5))


def config_json_clip(config: CLIPConfig, layout: str) -> dict[str, Any] | None:
    """config.json of `CLIPVisionModel`; None in the original layout, which has none."""
    if layout == "original":
        return None
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.heads,
        "layer_norm_eps": config.eps,
        **FIXED,
        **{key: getattr(config, name) for key, name in SIZES.items()},
    }


def processor_json_clip(config: CLIPConfig) -> dict[str, Any]:
    """preprocessor_config.json of transformers' `CLIPImageProcessor`, which a pipeline has beside its image encoder."""
    side = {"height": config.image_size, "width": config.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "rescale_factor": 1 / 255,
        **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True),
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def import_clip(weights: Mapping[str, Any], config: CLIPConfig, table: tuple[Rule, ...] = DIFFUSERS) -> CLIPVision:
    """`rules.import_module` of a state dict, without what stands before its names, in `DIFFUSERS` or `ORIGINAL`."""
    return import_module(abstract_clip(config), table, read_clip(weights), config)


def export_clip(model: CLIPVision, table: tuple[Rule, ...] = DIFFUSERS) -> dict[str, np.ndarray]:
    """`rules.export_module`: transformers' names, or the original's with q, k and v apart."""
    return export_module(table, model)
