"""What is no network of a Wan system though it looks like one: adapters, and other models' config.json."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cfjax.core.console import counted

# Names in adapters: peft's and diffusers' (lora_A), kohya's and the originals' (lora_down), LyCORIS's, full deltas.
ADAPTER = re.compile(
    r"(^|\.)(lora_(A|B|down|up|mid)|lora_embedding_[AB]|lora_magnitude_vector|dora_scale|hada_w\d_[ab]|lokr_w\d(_[ab])?"
    r"|lora|diff|diff_[bm]|base_layer)(\.|$)|^lora_(unet|te)|_lora\.(up|down)\."
)
BITS = re.compile(r".*\.(absmax|quant_map|nested_absmax|quant_state\..*|SCB|qweight|qzeros|g_idx)")
# Who a config.json of each kind of network says it is of.
OWN_CLASS = {
    "dit": "Wan",
    "vae": "Autoencoder",
    "text_encoder": "T5",
    "tiny_vae": "Autoencoder",
    "image_encoder": "CLIP",
}
OWN_KEYS = {
    "dit": ({"dim", "ffn_dim", "num_layers", "num_heads"}, {"num_attention_heads", "attention_head_dim", "ffn_dim"}),
    "vae": ({"z_dim", "base_dim"},),
    "text_encoder": ({"d_model", "d_ff", "num_layers"},),
    "tiny_vae": (),
    "image_encoder": ({"hidden_size", "intermediate_size", "num_hidden_layers"}, {"vision_config"}),
}


def what_else(names: Iterable[str]) -> str:
    """What weights of these names are, where they are no network by themselves; "" where nothing tells."""
    names = list(names)
    layers = [name for name in names if ADAPTER.search(name)]
    if layers:
        rest = sum(not ADAPTER.search(name) and not name.endswith(".alpha") for name in names)
        beside = f" ({counted(rest, 'other tensor')} beside it)" if rest else ""
        return (
            f"it is a LoRA (an adapter), {counted(len(layers), 'tensor')} such as {layers[0]}{beside}, not a network: "
            "name the weights that it was trained on by --config.source, and this file by --config.lora"
        )
    packed = next(filter(BITS.fullmatch, names), "")
    if packed:
        return f"it is quantised by bitsandbytes or GPTQ ({packed}), which is not read; take the bf16 or fp16 file"
    return ""


def is_own(kind: str, about: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a network of this kind, not of some other model whose files lie there too."""
    named = [about.get("_class_name"), *_texts(about.get("architectures")), about.get("model_type")]
    classes = [name for name in named[:-1] if isinstance(name, str)]
    if classes:
        return any(OWN_CLASS[kind].lower() in name.lower() for name in classes)
    if kind == "text_encoder" and isinstance(named[-1], str):
        return "t5" in named[-1].lower()
    return any(keys <= about.keys() for keys in OWN_KEYS[kind])


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
