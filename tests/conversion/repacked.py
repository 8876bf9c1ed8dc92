"""Miniature weights as others save them: float8 with scales, GGUF, distributed checkpoints, trainers' folders.

Layouts from the code that writes them: ComfyUI `comfy/ops.py` (`scaled_fp8_ops`), ComfyUI-GGUF `tools/convert.py`, ggml
`docs/gguf.md`, torch `distributed/checkpoint`, DeepSpeed `runtime/engine.py`, accelerate `checkpointing.py`.
"""

import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.synthetic import Shapes, as_torch, save_pt

FLOAT8 = ml_dtypes.float8_e4m3fn
GGUF_KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "BF16": (30, 1, 2)}
ST_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
T5_WORDS = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
    **{f"attn.{part}.weight": f"layer.0.SelfAttention.{part}.weight" for part in "qkvo"},
}


def save_raw(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A safetensors file of any dtype, float8 too, which the library's NumPy side does not write."""
    header, start = {}, 0
    for name, x in arrays.items():
        header[name] = {"dtype": ST_NAMES[x.dtype.name], "shape": x.shape, "data_offsets": [start, start + x.nbytes]}
        start += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in arrays.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def is_matrix(name: str, x: np.ndarray) -> bool:
    """Whether ComfyUI's files have it in float8: matrices of linear layers."""
    return x.ndim == 2 and name.endswith("weight")


def scaled(weights: Mapping[str, np.ndarray], form: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(the file's arrays, the float32 weights that they stand for).

    Args:
      form: "comfy" (`scale_weight`, `scale_input`, `scaled_fp8`), "channel" (`weight_scale` [out, 1]), "mixed"
        (`weight_scale` and `comfy_quant`) or "block" (`weight_scale_inv` per 128 x 128).
    """
    stored: dict[str, np.ndarray] = {}
    meant: dict[str, np.ndarray] = {}
    for name, x in weights.items():
        if not is_matrix(name, x):
            stored[name] = meant[name] = x
            continue
        block = {"channel": (1, x.shape[1]), "block": (128, 128)}.get(form, x.shape)
        rows, columns = (np.arange(size) // part for size, part in zip(x.shape, block, strict=True))
        scale = np.zeros((rows[-1] + 1, columns[-1] + 1), np.float32)
        np.maximum.at(scale, (rows[:, None], columns[None]), np.abs(x).astype(np.float32))
        scale /= 448
        eight = (x / scale[rows[:, None], columns[None]]).astype(FLOAT8)
        layer = name.removesuffix(".weight")
        stored[name], meant[name] = eight, eight.astype(np.float32) * scale[rows[:, None], columns[None]]
        if form == "comfy":
            stored |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": np.ones(1, np.float32)}
        elif form == "block":
            stored[f"{name}_scale_inv"] = scale
        else:
            stored[f"{name}_scale"] = scale if form == "channel" else scale.reshape(())
        if form == "mixed":
            about = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = np.frombuffer(about, np.uint8)
    if form == "comfy":
        stored["scaled_fp8"] = np.zeros(2, np.uint8).astype(FLOAT8)
    return stored, meant


def gguf_header(shapes: Shapes, kinds: Mapping[str, str], values: Mapping[str, Any] = {}) -> tuple[bytes, int]:
    """(a GGUF file up to its numbers, how many bytes those take)."""
    text = lambda word: struct.pack("<Q", len(word.encode())) + word.encode()
    out = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(values))
    for name, value in values.items():
        if isinstance(value, str):
            out += text(name) + struct.pack("<I", 8) + text(value)
        else:
            out += text(name) + struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    start = 0
    for name, shape in shapes.items():
        kind, block, size = GGUF_KINDS[kinds[name]]
        out += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", kind, start)
        start += -(-int(np.prod(shape)) // block * size // 32) * 32
    return out + bytes(-len(out) % 32), start


def save_gguf(path: Path, tensors: Mapping[str, tuple[str, Any, bytes]], values: Mapping[str, Any] = {}) -> Path:
    """A GGUF file of {name: (kind, shape, bytes)}."""
    shapes = {name: tuple(shape) for name, (_, shape, _) in tensors.items()}
    head, _ = gguf_header(shapes, {name: kind for name, (kind, *_) in tensors.items()}, values)
    path.write_bytes(head + b"".join(raw + bytes(-len(raw) % 32) for *_, raw in tensors.values()))
    return path


def comfy_t5(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The original's text encoder by transformers' names, as ComfyUI's files have it."""
    out = {}
    for name, x in weights.items():
        if name.startswith("blocks."):
            _, number, word = name.split(".", 2)
            out[f"encoder.block.{number}.{T5_WORDS[word]}"] = x
        else:
            out["shared.weight" if name.startswith("token") else "encoder.final_layer_norm.weight"] = x
    return out


def save_distributed(folder: Path, state: Mapping[str, Any]) -> Path:
    """torch.distributed.checkpoint's folder, written by one process."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def save_deepspeed(folder: Path, weights: Mapping[str, np.ndarray], *, stage: int) -> Path:
    """DeepSpeed's folder of ZeRO stage 2 or 3: latest, global_step7/ with the network's and the optimizer's files."""
    import torch

    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    (folder / "zero_to_fp32.py").write_text("# makes one file\n")
    state = {f"model.{name}": x if stage < 3 else torch.zeros(0) for name, x in as_torch(weights).items()}
    beside = {"buffer_names": [], "optimizer": None, "lr_scheduler": {}, "global_steps": 7, "ds_version": "0.16.0"}
    whole = "mp_rank_00_model_states.pt" if stage < 3 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    save_pt(step / whole, {"module": state, "param_shapes": [], **beside})
    save_pt(step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", {"optimizer_state_dict": {"zero_stage": stage}})
    return folder
