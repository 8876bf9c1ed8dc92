"""Quantised weights: float8 with scales and GGUF, dequantised as their own definitions say; without scales, refused."""

import os
import re
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from cfjax.conversion.files import read_weights
from cfjax.conversion.quantised import dequantised
from cfjax.conversion.sources import open_source
from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from tests import synthetic
from tests.conversion.repacked import FLOAT8, comfy_t5, gguf_header, is_matrix, save_gguf, save_raw, scaled
from tests.conversion.test_files import complaint

torch.set_num_threads(1)
SIZES = {"dim": 256, "num_heads": 2, "ffn_dim": 256, "text_dim": 256}  # Q4_K's blocks are 256 numbers of a row
WEIGHTS = synthetic.dit_weights(3, **SIZES)
SMALL = synthetic.dit_weights(4, dim=128, num_heads=1)


def check(path: Path, meant, widened=np.float32, **options) -> tuple[str, ...]:
    """The notes on a file that holds one network, which is exactly these weights."""
    (found,) = open_source(path, **options).found
    back = found.network.exported(found.network.layout)
    assert back.keys() == meant.keys()
    for name, x in meant.items():
        expected = x.astype(widened) if is_matrix(name, x) else x
        assert back[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(back[name].read(), expected, err_msg=name)
    return found.network.notes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", ["comfy", "channel", "mixed", "block"])
def test_float8_with_scales(tmp_path, form, prefix):
    stored, meant = scaled(SMALL, form)
    path = save_raw(tmp_path / "x.safetensors", {prefix + name: x for name, x in stored.items()})
    notes = check(path, meant)
    assert notes[0] == "dequantised to float32: 26 of float8_e4m3fn"
    assert notes[1:] == (("left out: scales of 26 layers' inputs",) if form == "comfy" else ())
    largest = max(np.abs(meant[name] - x).max() / np.abs(x).max() for name, x in SMALL.items())
    assert largest < 0.04  # half a step of float8's three bits, at the top of its range


def test_float8_in_a_pickle_and_in_other_dtypes(tmp_path):
    stored, meant = scaled(SMALL, "channel")
    bits = {name: x.view(np.uint8) if x.dtype == FLOAT8 else x for name, x in stored.items()}
    tensors = synthetic.as_torch(bits)
    tensors = {k: x.view(torch.float8_e4m3fn) if stored[k].dtype == FLOAT8 else x for k, x in tensors.items()}
    path = synthetic.save_pt(tmp_path / "x.pt", {"generator": tensors})
    check(path, meant)
    for name in ("bfloat16", "float16"):
        check(path, meant, np.dtype(name), dtype=name)
    assert "--config.dequantize=float64: use one of float32" in complaint(path, dtype="float64")


def test_layers_of_several_kinds_become_one(tmp_path):
    """Files that keep some layers in 16 bits."""
    stored, meant = scaled(SMALL, "channel")
    name = "blocks.1.ffn.0.weight"
    stored[name] = meant[name] = SMALL[name].astype(ml_dtypes.bfloat16)
    del stored[f"{name}_scale"]
    check(save_raw(tmp_path / "x.safetensors", stored), meant | {name: meant[name].astype(np.float32)})


def test_float8_without_scales_is_refused(tmp_path):
    stored, _ = scaled(SMALL, "comfy")
    lost = {name: x for name, x in stored.items() if name != "blocks.1.ffn.0.scale_weight"}
    line = complaint(save_raw(tmp_path / "x.safetensors", lost))
    assert "blocks.1.ffn.0.weight are float8_e4m3fn (fp8 or int8) without their scales" in line
    marked = {name: x for name, x in stored.items() if "scale_" not in name}
    assert "and 25 more are float8_e4m3fn (fp8 or int8) without" in complaint(
        save_raw(tmp_path / "x.safetensors", marked)
    )
    assert "without their scales" in complaint(tmp_path / "x.safetensors", unscaled=True)


def test_a_plain_cast_is_one_if_the_user_says_so(tmp_path):
    """Nothing in the file tells it from a scaled one that has lost its scales."""
    cast = {name: x.astype(FLOAT8) if is_matrix(name, x) else x.astype(np.float16) for name, x in SMALL.items()}
    path = save_raw(tmp_path / "x.safetensors", cast)
    line = complaint(path)
    assert "float8_e4m3fn (fp8) and no tensor has a scale" in line and "--config.unscaled=True" in line
    check(path, {name: x.astype(np.float32) if is_matrix(name, x) else x for name, x in cast.items()}, unscaled=True)


def test_scales_that_do_not_fit():
    weight = np.ones((64, 48), np.float32).astype(FLOAT8)
    for shape in ((3,), (7, 5), (65, 1), (2, 2, 2), (0, 1)):
        with pytest.raises(UserError, match=re.escape(f"a.weight (64, 48) has a scale of shape {shape}")):
            dequantised(as_lazy({"a.weight": weight, "a.weight_scale": np.ones(shape, np.float32)}), "float32")
    four = {"a.weight": weight, "a.weight_scale": np.ones(1, np.float32)}
    four["a.comfy_quant"] = np.frombuffer(b'{"format": "nvfp4"}', np.uint8)
    with pytest.raises(UserError, match=r"nvfp4.* is a format that is not known here"):
        dequantised(as_lazy(four), "float32")


def test_int8_with_scales():
    rng = np.random.default_rng(0)
    whole, scale = rng.integers(-127, 128, (6, 4)).astype(np.int8), rng.random((6, 1)).astype(np.float32)
    out, _ = dequantised(as_lazy({"a.weight": whole, "a.weight_scale": scale}), "float32")
    np.testing.assert_array_equal(out["a.weight"].read(), whole * scale)
    with pytest.raises(UserError, match=r"a\.weight are int8"):
        dequantised(as_lazy({"a.weight": whole}), "float32", unscaled=True)


def test_scales_that_are_not_finite_are_reported_by_their_weight(tmp_path):
    stored, _ = scaled(SMALL, "comfy")
    stored["blocks.0.ffn.0.scale_weight"][:] = np.nan
    (found,) = open_source(save_raw(tmp_path / "x.safetensors", stored)).found
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0\.weight holds numbers that are NaN"):
        found.network.arrays["blocks/ffn/up/kernel"].read()


# ---- GGUF


def blocks(name: str, x: np.ndarray, seed: int) -> tuple[str, bytes, np.ndarray]:
    """(kind, bytes, the numbers that they stand for) of a matrix in Q8_0 or Q4_K, of anything else in F32 or F16."""
    if not is_matrix(name, x):
        kind = "BF16" if "norm" in name else "F16" if "patch" in name else "F32"
        plain = x.astype({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind])
        return kind, plain.tobytes(), plain
    if "ffn" not in name:
        raw = quants.quantize(x, GGMLQuantizationType.Q8_0)
        return "Q8_0", raw.tobytes(), quants.dequantize(raw, GGMLQuantizationType.Q8_0)
    rng = np.random.default_rng(seed)  # the package does not write Q4_K: any bits, with small scales
    raw = rng.integers(0, 256, (x.shape[0], x.shape[1] // 256 * 144), dtype=np.uint8)
    raw[:, 0:4] = np.frombuffer(np.float16([0.01, 0.02]).tobytes(), np.uint8)
    return "Q4_K", raw.tobytes(), quants.dequantize(raw, GGMLQuantizationType.Q4_K)


@pytest.fixture(scope="module")
def quantised_dit() -> tuple[dict, dict]:
    """(tensors of a GGUF file, the weights that they stand for)."""
    tensors, meant = {}, {}
    for seed, (name, x) in enumerate(WEIGHTS.items()):
        kind, raw, meant[name] = blocks(name, x, seed)
        tensors[name] = (kind, x.shape, raw)
    return tensors, meant


def test_gguf_is_what_its_package_says(tmp_path, quantised_dit):
    tensors, meant = quantised_dit
    path = save_gguf(tmp_path / "x.gguf", tensors, {"general.architecture": "wan"})
    notes = check(path, meant)
    assert notes == ("dequantised to float32: 4 of Q4_K, 22 of Q8_0",)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert read.keys() == meant.keys()  # the miniature is such a file
    assert [*read["blocks.0.ffn.0.weight"].shape] == [256, 256]


def test_gguf_with_folded_shapes_and_prefixes(tmp_path, quantised_dit):
    """ComfyUI-GGUF's way with five axes, which ggml does not have."""
    tensors, meant = quantised_dit
    name = "model.diffusion_model.patch_embedding.weight"
    folded = {f"model.diffusion_model.{key}": x for key, x in tensors.items()}
    kind, shape, raw = folded[name]
    folded[name] = (kind, (shape[0], int(np.prod(shape[1:]))), raw)
    check(save_gguf(tmp_path / "x.gguf", folded, {f"comfy.gguf.orig_shape.{name}": list(shape)}), meant)
    line = complaint(save_gguf(tmp_path / "x.gguf", folded, {f"comfy.gguf.orig_shape.{name}": [1, 2]}))
    assert "should be [1, 2]; it is broken" in line


def test_the_text_encoder_in_float8(tmp_path):
    """umt5_xxl_fp8_e4m3fn_scaled.safetensors: transformers' names, the embedding in 16 bits, no config.json."""
    stored, meant = {}, {}
    for name, x in comfy_t5(synthetic.t5_weights(300)).items():
        kept = "shared" in name or "bias" in name
        one, other = ({name: x}, {name: x}) if kept else scaled({name: x.astype(np.float32)}, "comfy")
        stored, meant = stored | one, meant | other
    (found,) = open_source(save_raw(tmp_path / "x.safetensors", stored)).found
    back = found.network.exported("diffusers")
    assert found.role == "text_encoder" and back.keys() == meant.keys()
    assert all(back[name].read().tobytes() == x.tobytes() for name, x in meant.items())


def test_the_text_encoder_in_gguf(tmp_path):
    """By llama.cpp's names."""
    words = {"encoder.block.": "enc.blk.", "encoder.final_layer_norm.": "enc.output_norm.", "shared.": "token_embd."}
    words |= {f"layer.0.SelfAttention.{part}.": f"attn_{part}." for part in "qkvo"}
    words |= {"layer.0.SelfAttention.relative_attention_bias.": "attn_rel_b.", "layer.0.layer_norm.": "attn_norm."}
    words |= {"layer.1.layer_norm.": "ffn_norm.", "layer.1.DenseReluDense.wi_0.": "ffn_gate."}
    words |= {"layer.1.DenseReluDense.wi_1.": "ffn_up.", "layer.1.DenseReluDense.wo.": "ffn_down."}
    tensors, meant = {}, comfy_t5(synthetic.t5_weights(300))
    for name, x in meant.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        tensors[name] = ("BF16", x.shape, x.tobytes())
    (found,) = open_source(save_gguf(tmp_path / "t5.gguf", tensors, {"general.architecture": "t5encoder"})).found
    back = found.network.exported("diffusers")
    assert found.role == "text_encoder" and back.keys() == meant.keys()
    assert all(back[name].read().tobytes() == x.tobytes() for name, x in meant.items())


def test_gguf_that_is_broken(tmp_path, quantised_dit):
    tensors, _ = quantised_dit
    path = save_gguf(tmp_path / "x.gguf", tensors)
    whole = path.read_bytes()
    for size in (4, 20, 100, 3000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        assert "broken or cut short" in complaint(path)
    far = 2**62
    for start, form, value in ((8, "<Q", far), (16, "<Q", far), (24, "<Q", far), (4, "<I", 9)):
        data = bytearray(whole)
        struct.pack_into(form, data, start, value)
        path.write_bytes(data)
        assert "broken or cut short" in complaint(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"x", 9, 8, far) + bytes(99))
    assert "its header ends beyond the file" in complaint(path)
    path.write_bytes(b"GGUF" + bytes(64))
    assert "version 0" in complaint(path)
    odd = {**tensors, "head.head.bias": ("F32", (999,), b"")}
    assert "broken or cut short" in complaint(save_gguf(path, odd))


def test_gguf_without_its_package(tmp_path, monkeypatch, quantised_dit):
    tensors, _ = quantised_dit
    path = save_gguf(tmp_path / "x.gguf", tensors)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install gguf" in complaint(path)
    plain = {name: ("F32", x.shape, x.tobytes()) for name, x in SMALL.items()}
    check(save_gguf(path, plain), SMALL)


def test_headers_of_14b_are_read_without_its_numbers(tmp_path):
    """Files of 14 GB with holes in them: nothing is read, and nothing of their size is allocated."""
    shapes = synthetic.dit_shapes(5120, 13824, 40, 40, 256, 16, 16, 4096)
    kinds = {name: "Q8_0" if len(shape) == 2 else "F32" for name, shape in shapes.items()}
    head, size = gguf_header(shapes, kinds, {"general.architecture": "wan"})
    (tmp_path / "x.gguf").write_bytes(head)
    os.truncate(tmp_path / "x.gguf", len(head) + size)
    (found,) = open_source(tmp_path / "x.gguf").found
    assert sum(x.size for x in found.network.arrays.values()) == 14_288_491_584
    assert (tmp_path / "x.gguf").stat().st_size > 14e9
    first = read_weights(tmp_path / "x.gguf").entries[""]["blocks.0.self_attn.q.weight"]
    assert (first.shape, not first.read().any()) == ((5120, 5120), True)
