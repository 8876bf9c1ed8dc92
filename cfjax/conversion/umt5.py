"""The umT5 encoder in the layouts of the original Wan release (models_t5_umt5-xxl-enc-bf16.pth) and of transformers.

Both are PyTorch: linear weights [out, in], one set of arrays per layer. "diffusers" is the `text_encoder` folder of a
diffusers pipeline, which is transformers' `UMT5EncoderModel`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from cfjax.conversion.rules import SAME, TRANSPOSED, Rule, export_module, import_module, layer_count
from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from cfjax.core.limits import VOCABULARY
from cfjax.core.schema import EPS, SIZE, checked, table, whole
from cfjax.models.umt5 import UMT5, UMT5Config, make_umt5

ORIGINAL = (
    Rule("token_embedding", "token_embedding.weight", SAME),
    Rule("layers/attention_norm/scale", "blocks.{layer}.norm1.weight", SAME),
    Rule("layers/([qkvo])/kernel", r"blocks.{layer}.attn.\1.weight", TRANSPOSED),
    Rule("layers/position_bias", "blocks.{layer}.pos_embedding.embedding.weight", SAME),
    Rule("layers/ffn_norm/scale", "blocks.{layer}.norm2.weight", SAME),
    Rule("layers/gate/kernel", "blocks.{layer}.ffn.gate.0.weight", TRANSPOSED),
    Rule("layers/up/kernel", "blocks.{layer}.ffn.fc1.weight", TRANSPOSED),
    Rule("layers/down/kernel", "blocks.{layer}.ffn.fc2.weight", TRANSPOSED),
    Rule("final_norm/scale", "norm.weight", SAME),
)

ATTENTION, FFN = "encoder.block.{layer}.layer.0", "encoder.block.{layer}.layer.1"
DIFFUSERS = (
    Rule("token_embedding", "shared.weight", SAME),
    Rule("layers/attention_norm/scale", f"{ATTENTION}.layer_norm.weight", SAME),
    Rule("layers/([qkvo])/kernel", ATTENTION + r".SelfAttention.\1.weight", TRANSPOSED),
    Rule("layers/position_bias", f"{ATTENTION}.SelfAttention.relative_attention_bias.weight", SAME),
    Rule("layers/ffn_norm/scale", f"{FFN}.layer_norm.weight", SAME),
    Rule("layers/gate/kernel", f"{FFN}.DenseReluDense.wi_0.weight", TRANSPOSED),
    Rule("layers/up/kernel", f"{FFN}.DenseReluDense.wi_1.weight", TRANSPOSED),
    Rule("layers/down/kernel", f"{FFN}.DenseReluDense.wo.weight", TRANSPOSED),
    Rule("final_norm/scale", "encoder.final_layer_norm.weight", SAME),
)

LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}
# Some of transformers' files hold the token embedding under its second name as well, or only under that.
EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"
# config.json -> ours, for sizes that are in the weights' shapes as well, and for those that are not.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "num_heads": "heads",
    "d_kv": "head_dim",
    "d_ff": "ffn_dim",
    "num_layers": "layers",
    "relative_attention_num_buckets": "buckets",
}
CONSTANTS = {"relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "eps"}
FIXED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"}
ABOUT = table(
    {},
    {
        **dict.fromkeys(SIZES, SIZE),
        "vocab_size": whole(1, VOCABULARY),
        "relative_attention_max_distance": SIZE,
        "layer_norm_epsilon": EPS,
    },
)


def untied_umt5(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers' weights with the token embedding once, under its first name; the original's pass unchanged.

    Args:
      weights: name -> array or `LazyArray`; the embedding is read only where both names are there.

    Raises:
      UserError: the two names hold different numbers.
    """
    out = dict(weights)
    if TIED not in out:
        return out
    second = out.pop(TIED)
    first = out.setdefault(EMBEDDING, second)
    if first is not second:
        a, b = (np.ascontiguousarray(x.read()) for x in as_lazy({EMBEDDING: first, TIED: second}).values())
        if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            raise UserError(f"{EMBEDDING} and {TIED} must be the same table and differ; convert from one that is whole")
    return out


def infer_config_umt5(
    shapes: Mapping[str, tuple[int, ...]], layout: str, about: Mapping[str, Any] | None = None
) -> UMT5Config:
    """Sizes from the shapes of a file's arrays; in transformers' layout config.json must agree, and has the rest.

    Args:
      shapes: their names and shapes.
      layout: "original" or "diffusers".
      about: transformers' config.json; without one (the original's layout, ComfyUI's files) umT5's own bias distance
        (128) and eps (1e-6).

    Raises:
      UserError: an unknown layout, an array that gives a size is missing, or config.json says otherwise.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}: a umT5 encoder is in layout {' or '.join(LAYOUTS)}")
    names = {rule.ours: rule.theirs.replace("{layer}", "0") for rule in LAYOUTS[layout]}
    if layout == "diffusers" and EMBEDDING not in shapes:
        names["token_embedding"] = TIED

    def matrix(ours: str) -> tuple[int, int]:
        name = names[ours].replace(r"\1", "q")
        if len(shapes.get(name, ())) != 2:
            raise UserError(f"{name} is missing or no matrix: these are not a umT5 encoder's weights ({layout} layout)")
        rows, columns = shapes[name]
        return rows, columns

    (vocab_size, dim), (buckets, heads) = matrix("token_embedding"), matrix("layers/position_bias")
    start = names["layers/position_bias"].split("0")[0]
    sized = partial(
        UMT5Config,
        vocab_size=vocab_size,
        dim=dim,
        heads=heads,
        head_dim=matrix("layers/([qkvo])/kernel")[0] // heads,
        ffn_dim=matrix("layers/gate/kernel")[0],
        layers=layer_count(shapes, start),
        buckets=buckets,
    )
    if layout == "original" or about is None:
        return sized()
    checked(ABOUT, about, "text encoder's config.json")
    for key, value in {**FIXED, **{key: sized.keywords[name] for key, name in SIZES.items()}}.items():
        if key not in about or about[key] != value:
            raise UserError(f"text encoder's config.json: {key} is {about.get(key)!r}, these weights need {value!r}")
    missing = [key for key in CONSTANTS if key not in about]
    if missing:
        raise UserError(f"text encoder's config.json: {missing[0]} is missing")
    return sized(max_distance=about["relative_attention_max_distance"], eps=about["layer_norm_epsilon"])


def config_json_umt5(config: UMT5Config, layout: str) -> dict[str, Any] | None:
    """config.json of `UMT5EncoderModel`; None in the original layout, which has none."""
    if layout == "original":
        return None
    return {
        "architectures": ["UMT5EncoderModel"],
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "num_decoder_layers": config.layers,
        "pad_token_id": 0,
        "scalable_attention": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        **FIXED,
        **{key: getattr(config, name) for key, name in {**SIZES, **CONSTANTS}.items()},
    }


def abstract_umt5(config: UMT5Config) -> UMT5:
    """The encoder's structure with shapes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda key: make_umt5(config, key), jax.random.key(0))


def import_umt5(weights: Mapping[str, Any], config: UMT5Config, table: tuple[Rule, ...] = ORIGINAL) -> UMT5:
    """`rules.import_module` of a state dict in the layout `ORIGINAL` or `DIFFUSERS`; see `untied_umt5`."""
    return import_module(abstract_umt5(config), table, untied_umt5(weights), config)


def export_umt5(model: UMT5, table: tuple[Rule, ...] = ORIGINAL) -> dict[str, np.ndarray]:
    """`rules.export_module`: the state dict that `import_umt5` reads back."""
    return export_module(table, model)
