"""Miniature releases in the file layouts of the original releases and diffusers: names and shapes from their
specifications, random numbers.

    python tests/synthetic.py DIR

writes `DIR/Wan2.1-T2V-1.3B`, `DIR/Wan2.1-I2V-14B-480P`, `DIR/Wan2.2-TI2V-5B` and `DIR/Wan2.2-T2V-A14B` (original
releases), `DIR/longlive_2.pt`,
`DIR/Wan2.1-T2V-1.3B-Diffusers`, `DIR/causal_forcing.pt`, `DIR/self_forcing.pt`, `DIR/lora.safetensors`,
`DIR/taew2_1.pth`, `DIR/prompts.txt` and `DIR/clips` (videos of 2.5 seconds with captions). The shapes below are written
from the published modules and know nothing of cfjax's conversion tables; called with the published sizes they give the
published numbers of tensors and parameters.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

NEEDED = ("torch", "diffusers", "transformers")  # which write the files

Shapes = dict[str, tuple[int, ...]]
KINDS = ("weight", "bias")

DIT = {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 2, "freq_dim": 256, "in_dim": 16, "out_dim": 16}
TEXT_DIM, TEXT_HEADS, TEXT_FFN, TEXT_LAYERS = 32, 4, 64, 2
VAE_DIM, Z_DIM = 8, 16
CLIP = {"dim": 160, "ffn_dim": 32, "layers": 3, "image_size": 28, "patch": 14}
IMAGE = {"in_dim": 36, "image_dim": CLIP["dim"]}  # of an image-to-video transformer
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def _linear(name: str, out_dim: int, in_dim: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def _conv(name: str, out_dim: int, in_dim: int, *window: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim, *window), f"{name}.bias": (out_dim,)}


def dit_shapes(
    dim: int,
    ffn_dim: int,
    num_heads: int,
    num_layers: int,
    freq_dim: int,
    in_dim: int,
    out_dim: int,
    text_dim: int,
    image_dim: int = 0,
) -> Shapes:
    """The original Wan2.1 transformer's state dict, in its order: T2V's, or with `image_dim` I2V's."""
    shapes = {"patch_embedding.weight": (dim, in_dim, 1, 2, 2), "patch_embedding.bias": (dim,)}
    for room, width in (("text_embedding", text_dim), ("time_embedding", freq_dim)):
        shapes |= _linear(f"{room}.0", dim, width) | _linear(f"{room}.2", dim, dim)
    shapes |= _linear("time_projection.1", 6 * dim, dim)
    for i in range(num_layers):
        block = {"modulation": (1, 6, dim)}
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                block |= _linear(f"{attention}.{part}", dim, dim)
            block |= {f"{attention}.norm_{part}.weight": (dim,) for part in "qk"}
            if attention == "self_attn":
                block |= {"norm3.weight": (dim,), "norm3.bias": (dim,)}
        if image_dim:  # `WanI2VCrossAttention`
            block |= _linear("cross_attn.k_img", dim, dim) | _linear("cross_attn.v_img", dim, dim)
            block |= {"cross_attn.norm_k_img.weight": (dim,)}
        block |= _linear("ffn.0", ffn_dim, dim) | _linear("ffn.2", dim, ffn_dim)
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    shapes |= {"head.modulation": (1, 2, dim)} | _linear("head.head", 4 * out_dim, dim)
    if image_dim:  # `MLPProj`
        shapes |= {f"img_emb.proj.{i}.{kind}": (image_dim if i == 0 else dim,) for i in (0, 4) for kind in KINDS}
        shapes |= _linear("img_emb.proj.1", image_dim, image_dim) | _linear("img_emb.proj.3", dim, image_dim)
    return shapes


def clip_shapes(dim: int, ffn_dim: int, layers: int, image_size: int, patch: int, words: int) -> Shapes:
    """models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth (`wan/modules/clip.py`, `XLMRobertaCLIP`): both halves.

    Of the text half (`wan/modules/xlm_roberta.py`) the sizes are a few: nothing reads it.
    """
    places, wide = 1 + (image_size // patch) ** 2, 8
    shapes: Shapes = {"log_scale": (), "visual.cls_embedding": (1, 1, dim), "visual.pos_embedding": (1, places, dim)}
    shapes |= {"visual.patch_embedding.weight": (dim, 3, patch, patch), "visual.head": (dim, wide)}
    for norm in ("pre_norm", "post_norm", *(f"transformer.{i}.norm{j}" for i in range(layers) for j in (1, 2))):
        shapes |= {f"visual.{norm}.{kind}": (dim,) for kind in KINDS}
    for i in range(layers):
        block = f"visual.transformer.{i}"
        shapes |= _linear(f"{block}.attn.to_qkv", 3 * dim, dim) | _linear(f"{block}.attn.proj", dim, dim)
        shapes |= _linear(f"{block}.mlp.0", ffn_dim, dim) | _linear(f"{block}.mlp.2", dim, ffn_dim)
    for table, rows in (("token", words), ("type", 1), ("pos", 6)):
        shapes |= {f"textual.{table}_embedding.weight": (rows, wide)}
    for i in range(2):
        block = f"textual.blocks.{i}"
        for part in ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.0", "ffn.2"):
            shapes |= _linear(f"{block}.{part}", wide, wide)
        shapes |= {f"{block}.norm{j}.{kind}": (wide,) for j in (1, 2) for kind in KINDS}
    shapes |= {f"textual.norm.{kind}": (wide,) for kind in KINDS}
    return shapes | {"textual.head.0.weight": (wide, wide), "textual.head.2.weight": (wide, wide)}


def t5_shapes(vocab: int, dim: int, attn_dim: int, ffn_dim: int, num_heads: int, num_layers: int) -> Shapes:
    """Wan2.1's copy of the umT5 encoder; 32 relative buckets in every layer, no biases."""
    shapes: Shapes = {"token_embedding.weight": (vocab, dim)}
    for i in range(num_layers):
        block = {"norm1.weight": (dim,)}
        block |= {f"attn.{part}.weight": (attn_dim, dim) for part in "qkv"} | {"attn.o.weight": (dim, attn_dim)}
        block |= {"norm2.weight": (dim,), "ffn.gate.0.weight": (ffn_dim, dim), "ffn.fc1.weight": (ffn_dim, dim)}
        block |= {"ffn.fc2.weight": (dim, ffn_dim), "pos_embedding.embedding.weight": (32, num_heads)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return shapes | {"norm.weight": (dim,)}


def _vae_res(name: str, in_dim: int, out_dim: int) -> Shapes:
    shapes = {f"{name}.residual.0.gamma": (in_dim, 1, 1, 1)} | _conv(f"{name}.residual.2", out_dim, in_dim, 3, 3, 3)
    shapes |= {f"{name}.residual.3.gamma": (out_dim, 1, 1, 1)} | _conv(f"{name}.residual.6", out_dim, out_dim, 3, 3, 3)
    return shapes | (_conv(f"{name}.shortcut", out_dim, in_dim, 1, 1, 1) if in_dim != out_dim else {})


def _vae_middle(name: str, dim: int) -> Shapes:
    shapes = _vae_res(f"{name}.middle.0", dim, dim) | {f"{name}.middle.1.norm.gamma": (dim, 1, 1)}
    shapes |= _conv(f"{name}.middle.1.to_qkv", 3 * dim, dim, 1, 1) | _conv(f"{name}.middle.1.proj", dim, dim, 1, 1)
    return shapes | _vae_res(f"{name}.middle.2", dim, dim)


def _vae_head(name: str, out_dim: int, in_dim: int) -> Shapes:
    return {f"{name}.head.0.gamma": (in_dim, 1, 1, 1)} | _conv(f"{name}.head.2", out_dim, in_dim, 3, 3, 3)


def vae_shapes(base: int, z_dim: int) -> Shapes:
    """Wan2.1_VAE.pth: widths 1, 2, 4, 4 times `base`, two residual blocks per level (three in the decoder)."""
    widths = [base, base, 2 * base, 4 * base, 4 * base]
    down, index = {}, 0
    for level, (width_in, width) in enumerate(pairwise(widths)):
        for block in range(2):
            down |= _vae_res(f"encoder.downsamples.{index}", width if block else width_in, width)
            index += 1
        if level < 3:
            down |= _conv(f"encoder.downsamples.{index}.resample.1", width, width, 3, 3)
            down |= _conv(f"encoder.downsamples.{index}.time_conv", width, width, 3, 1, 1) if level else {}
            index += 1
    up, index = {}, 0
    for level, (width_in, width) in enumerate([(4, 4), (2, 4), (2, 2), (1, 1)]):
        for block in range(3):
            up |= _vae_res(f"decoder.upsamples.{index}", (width if block else width_in) * base, width * base)
            index += 1
        if level < 3:
            up |= _conv(f"decoder.upsamples.{index}.resample.1", width * base // 2, width * base, 3, 3)
            up |= (
                _conv(f"decoder.upsamples.{index}.time_conv", 2 * width * base, width * base, 3, 1, 1)
                if level < 2
                else {}
            )
            index += 1
    top = 4 * base
    encoder = _conv("encoder.conv1", base, 3, 3, 3, 3) | down | _vae_middle("encoder", top)
    encoder |= _vae_head("encoder", 2 * z_dim, top)
    between = _conv("conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1) | _conv("conv2", z_dim, z_dim, 1, 1, 1)
    decoder = _conv("decoder.conv1", top, z_dim, 3, 3, 3) | _vae_middle("decoder", top) | up
    return encoder | between | decoder | _vae_head("decoder", 3, base)


def vae_2_2_shapes(base: int, decoder_base: int, z_dim: int) -> Shapes:
    """Wan2.2_VAE.pth (`wan/modules/vae2_2.py`): patches of 2 x 2 pixels; blocks and resamplings are nested by level."""

    def levels(half: str, widths: Sequence[int], blocks: int, timed: Sequence[bool]) -> Shapes:
        shapes: Shapes = {}
        for level, (width_in, width) in enumerate(pairwise(widths)):
            name = f"{half}.{level}.{half.partition('.')[2]}"
            for block in range(blocks):
                shapes |= _vae_res(f"{name}.{block}", width if block else width_in, width)
            if level < 3:
                shapes |= _conv(f"{name}.{blocks}.resample.1", width, width, 3, 3)
                out = width if half.startswith("encoder") else 2 * width
                shapes |= _conv(f"{name}.{blocks}.time_conv", out, width, 3, 1, 1) if timed[level] else {}
        return shapes

    top, down = 4 * decoder_base, [base, base, 2 * base, 4 * base, 4 * base]
    up = [top, top, top, 2 * decoder_base, decoder_base]
    encoder = _conv("encoder.conv1", base, 12, 3, 3, 3)
    encoder |= levels("encoder.downsamples", down, 2, (False, True, True))
    encoder |= _vae_middle("encoder", 4 * base) | _vae_head("encoder", 2 * z_dim, 4 * base)
    between = _conv("conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1) | _conv("conv2", z_dim, z_dim, 1, 1, 1)
    decoder = _conv("decoder.conv1", top, z_dim, 3, 3, 3) | _vae_middle("decoder", top)
    decoder |= levels("decoder.upsamples", up, 3, (True, True, False))
    return encoder | between | decoder | _vae_head("decoder", 12, decoder_base)


def taehv_shapes(
    width: int = 64, widths: Sequence[int] = (256, 128, 64, 64), z_dim: int = 16, patch: int = 1
) -> Shapes:
    """taew2_1.pth, or with `patch` 2 and 48 channels taew2_2.pth.

    Three levels; time is pooled in the encoder's first two, grown in the decoder's last two.
    """

    def mem(name: str, dim: int) -> Shapes:
        return _conv(f"{name}.conv.0", dim, 2 * dim, 3, 3) | {
            key: shape for i in (2, 4) for key, shape in _conv(f"{name}.conv.{i}", dim, dim, 3, 3).items()
        }

    shapes = _conv("encoder.0", width, 3 * patch**2, 3, 3)
    for first, stride in ((2, 2), (7, 2), (12, 1)):
        shapes |= {f"encoder.{first}.conv.weight": (width, stride * width, 1, 1)}
        shapes |= {f"encoder.{first + 1}.weight": (width, width, 3, 3)}
        for i in range(first + 2, first + 5):
            shapes |= mem(f"encoder.{i}", width)
    shapes |= _conv("encoder.17", z_dim, width, 3, 3) | _conv("decoder.1", widths[0], z_dim, 3, 3)
    for level, (first, stride) in enumerate(((3, 1), (9, 2), (15, 2))):
        here, after = widths[level], widths[level + 1]
        for i in range(first, first + 3):
            shapes |= mem(f"decoder.{i}", here)
        shapes |= {f"decoder.{first + 4}.conv.weight": (stride * here, here, 1, 1)}
        shapes |= {f"decoder.{first + 5}.weight": (after, here, 3, 3)}
    return shapes | _conv("decoder.22", 3 * patch**2, widths[3], 3, 3)


def random_weights(shapes: Shapes, seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Numbers that keep activations near one: kernels by fan-in, biases small, scales (`gamma`, norms) near one."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape, np.float32)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            x = 1.0 + 0.1 * x
        elif len(shape) > 1 and "embedding.weight" not in name and "modulation" not in name:
            x = x / math.sqrt(math.prod(shape[1:]))
        else:
            x = 0.1 * x
        out[name] = x.astype(dtype)
    return out


def as_torch(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The same numbers as torch tensors, bfloat16 included."""
    import torch

    def tensor(x: np.ndarray) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(x))

    return {name: tensor(x) for name, x in weights.items()}


def save_pt(path: Path, content: Any) -> Path:
    """torch.save."""
    import torch

    torch.save(content, path)
    return path


def _split(weights: Mapping[str, np.ndarray], shards: int) -> Iterator[dict[str, np.ndarray]]:
    names = list(weights)
    size = -(-len(names) // shards)
    for start in range(0, len(names), size):
        yield {name: weights[name] for name in names[start : start + size]}


def save_safetensors(folder: Path, stem: str, weights: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """One `stem.safetensors`, or `stem-0000i-of-0000n.safetensors` with `stem.safetensors.index.json`."""
    if shards == 1:
        save_file(dict(weights), folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return folder / f"{stem}.safetensors"
    parts = list(_split(weights, shards))
    where = {}
    for i, part in enumerate(parts):
        file = f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(x.nbytes for x in weights.values())
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    return index


def dit_weights(seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """The miniature transformer's state dict, original layout, float32."""
    return random_weights(dit_shapes(**{**DIT, "text_dim": TEXT_DIM, **sizes}), seed)


def vae_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The miniature VAE's state dict, original layout, float32."""
    return random_weights(vae_shapes(VAE_DIM, Z_DIM), seed + 1)


def vae_2_2_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The miniature of Wan2.2's VAE, original layout, float32."""
    return random_weights(vae_2_2_shapes(VAE_DIM // 2, VAE_DIM, 48), seed + 4)


def clip_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The miniature of CLIP, both halves, original layout, float32."""
    return random_weights(clip_shapes(**CLIP, words=10), seed + 5)


def t5_weights(vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The miniature text encoder's state dict, original layout, bfloat16."""
    shapes = t5_shapes(vocab, TEXT_DIM, TEXT_DIM, TEXT_FFN, TEXT_HEADS, TEXT_LAYERS)
    return random_weights(shapes, seed + 2, ml_dtypes.bfloat16)


def taehv_weights(seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """The miniature tiny autoencoder's state dict, float32; `sizes` as of `taehv_shapes`."""
    return random_weights(taehv_shapes(8, (16, 8, 8, 8), **sizes), seed + 3)


def write_config(folder: Path, **changes: Any) -> Path:
    """The original release's config.json, of the miniature."""
    record = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", **DIT, "eps": 1e-6}
    record |= {"model_type": "t2v", "text_len": 512, **changes}
    path = folder / "config.json"
    path.write_text(json.dumps(dict(sorted(record.items())), indent=2))
    return path


def write_tokenizer(folder: Path) -> int:
    """The tokenizer's files; returns its number of ids."""
    from tests.tiny_tokenizer import vocab_size
    from tests.tiny_tokenizer import write_tokenizer as write

    write(folder)
    return vocab_size()


def write_wan_folder(root: Path, seed: int = 0, shards: int = 3, tokenizer: bool = True, vocab: int = 0) -> Path:
    """A miniature `Wan2.1-T2V-1.3B` as released (with `shards` > 1 as the 14B is); returns `root`.

    Args:
      tokenizer: write google/umt5-xxl/ too.  vocab: rows of the token embedding; 0 for the tokenizer's.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    write_config(root)
    save_safetensors(root, "diffusion_pytorch_model", dit_weights(seed), shards)
    if tokenizer:
        folder = root / "google" / "umt5-xxl"
        folder.mkdir(parents=True, exist_ok=True)
        vocab = vocab or write_tokenizer(folder)
    save_pt(root / "models_t5_umt5-xxl-enc-bf16.pth", as_torch(t5_weights(vocab or 300, seed)))
    save_pt(root / "Wan2.1_VAE.pth", as_torch(vae_weights(seed)))
    return root


def write_ti2v_folder(root: Path, seed: int = 0, vocab: int = 0) -> Path:
    """A miniature `Wan2.2-TI2V-5B` as released; arguments as `write_wan_folder`."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    channels = {"in_dim": 48, "out_dim": 48}
    write_config(root, model_type="ti2v", **channels)
    save_safetensors(root, "diffusion_pytorch_model", dit_weights(seed, **channels), 3)
    folder = root / "google" / "umt5-xxl"
    folder.mkdir(parents=True, exist_ok=True)
    save_pt(root / "models_t5_umt5-xxl-enc-bf16.pth", as_torch(t5_weights(vocab or write_tokenizer(folder), seed)))
    save_pt(root / "Wan2.2_VAE.pth", as_torch(vae_2_2_weights(seed)))
    return root


def write_i2v_folder(root: Path, seed: int = 0, vocab: int = 0) -> Path:
    """A miniature `Wan2.1-I2V-14B-480P` as released; arguments as `write_wan_folder`."""
    root = write_wan_folder(root, seed, 1, vocab=vocab)
    write_config(root, model_type="i2v", in_dim=IMAGE["in_dim"])
    save_safetensors(root, "diffusion_pytorch_model", dit_weights(seed, **IMAGE))
    name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    save_pt(root / name, as_torch(clip_weights(seed)))
    return root


def write_a14b_folder(root: Path, seed: int = 0) -> Path:
    """A miniature `Wan2.2-T2V-A14B` as released: two transformers in folders of their own, Wan2.1's other parts."""
    write_wan_folder(root, seed, 1)
    for i, name in enumerate(("high_noise_model", "low_noise_model")):
        (root / name).mkdir(exist_ok=True)
        write_config(root / name)
        save_safetensors(root / name, "diffusion_pytorch_model", dit_weights(seed + 20 + i))
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        (root / file).unlink()
    return root


def prefixed(weights: Mapping[str, Any], prefix: str = "model.", block_prefix: str = "") -> dict[str, Any]:
    """Keys as a wrapper writes them: `prefix` in front, `block_prefix` behind every `blocks.<i>.`."""

    def key(name: str) -> str:
        parts = name.split(".")
        if parts[0] == "blocks":
            name = f"blocks.{parts[1]}.{block_prefix}{'.'.join(parts[2:])}"
        return prefix + name

    return {key(name): value for name, value in weights.items()}


def write_causal_forcing_pt(
    path: Path,
    keys: Sequence[str] = ("generator",),
    prefix: str = "model.",
    block_prefix: str = "",
    seed: int = 10,
    dtype: Any = np.float32,
) -> Path:
    """A training checkpoint {key: state dict}; entry i has the weights of seed `seed + i`.

    `prefix` may be "model._fsdp_wrapped_module.", "_orig_mod.model." and so on; `block_prefix` for instance
    "_fsdp_wrapped_module._checkpoint_wrapped_module.".
    """
    entries = {
        key: prefixed(as_torch({k: v.astype(dtype) for k, v in dit_weights(seed + i).items()}), prefix, block_prefix)
        for i, key in enumerate(keys)
    }
    return save_pt(Path(path), entries)


def write_lora(path: Path, seed: int = 0, rank: int = 4) -> Path:
    """A LoRA of the miniature transformer as the originals' files have them; its attention and feed-forward layers."""
    shapes, rng, state = dit_shapes(**DIT, text_dim=TEXT_DIM), np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and len(shape) == 2:
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            for half, size in (("lora_down", (rank, shape[1])), ("lora_up", (shape[0], rank))):
                state[f"{module}.{half}.weight"] = (0.1 * rng.standard_normal(size)).astype(np.float32)
            state[f"{module}.alpha"] = np.array(rank, np.float32)
    save_file(state, path)
    return Path(path)


def write_taehv(path: Path, seed: int = 0) -> Path:
    """A miniature taew2_1.pth."""
    return save_pt(Path(path), as_torch(taehv_weights(seed)))


def write_diffusers_folder(root: Path, seed: int = 0) -> Path:
    """A miniature `Wan2.1-T2V-1.3B-Diffusers`, written by diffusers and transformers themselves."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    root = Path(root)
    files = root / "tokenizer"
    files.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(files)
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=DIT["num_heads"],
        attention_head_dim=DIT["dim"] // DIT["num_heads"],
        in_channels=DIT["in_dim"],
        out_channels=DIT["out_dim"],
        text_dim=TEXT_DIM,
        freq_dim=DIT["freq_dim"],
        ffn_dim=DIT["ffn_dim"],
        num_layers=DIT["num_layers"],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    vae = AutoencoderKLWan(
        base_dim=VAE_DIM, z_dim=Z_DIM, latents_mean=list(LATENTS_MEAN), latents_std=list(LATENTS_STD)
    )
    sizes = {"vocab_size": vocab, "d_model": TEXT_DIM, "d_kv": TEXT_DIM // TEXT_HEADS, "d_ff": TEXT_FFN}
    text = UMT5EncoderModel(UMT5Config(**sizes, num_heads=TEXT_HEADS, num_layers=TEXT_LAYERS))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipeline = WanPipeline(
        tokenizer=T5TokenizerFast.from_pretrained(files),
        text_encoder=text.to(torch.bfloat16),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
    )
    pipeline.save_pretrained(root)
    return root


def write_clips(folder: Path, count: int = 4, seed: int = 0) -> Path:
    """Videos of 40 frames of 64 x 96 pixels, 16 a second: drifting waves of colour; captions in captions.csv."""
    from tests.data.videos import write_video

    rng, lines = np.random.default_rng(seed), ["file,caption"]
    time, y, x = np.meshgrid(np.arange(40), np.arange(64), np.arange(96), indexing="ij")
    for n in range(count):
        speed, turn = rng.uniform(0.1, 0.4, 3), rng.uniform(0, 2 * math.pi, 3)
        phase = (x + y)[..., None] / 12 + speed * time[..., None] + turn
        write_video(folder / f"{n}.mp4", 40, video=(127.5 + 120 * np.sin(phase)).astype(np.uint8))
        lines.append(f"{n}.mp4,Waves of colour number {n}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def main(folder: str) -> None:
    """Writes everything into `folder`.

    Raises:
      SystemExit: PyTorch, diffusers or transformers are missing; nothing is written.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f'tests/synthetic.py needs {", ".join(missing)}: in the clone, pip install ".[compare]"')
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    write_wan_folder(root / "Wan2.1-T2V-1.3B")
    write_ti2v_folder(root / "Wan2.2-TI2V-5B")
    save_pt(root / "longlive_2.pt", {"generator": prefixed(as_torch(dit_weights(7, in_dim=48, out_dim=48)))})
    write_a14b_folder(root / "Wan2.2-T2V-A14B")
    write_i2v_folder(root / "Wan2.1-I2V-14B-480P")
    write_diffusers_folder(root / "Wan2.1-T2V-1.3B-Diffusers")
    write_causal_forcing_pt(root / "causal_forcing.pt")
    write_causal_forcing_pt(
        root / "self_forcing.pt", ("generator", "critic", "generator_ema"), "model._fsdp_wrapped_module."
    )
    write_taehv(root / "taew2_1.pth")
    write_lora(root / "lora.safetensors")
    write_clips(root / "clips")
    (root / "prompts.txt").write_text("A cat surfs on a wave\nA paper boat in the rain\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1])
