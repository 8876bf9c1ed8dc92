"""LoRA files in every form: merged they are torch's W + s B A in float32, and what does not fit is told in a line.

peft's formula (`tuners/lora/layer.py`, `Linear.get_delta_weight`) in torch; the package: `comparison/test_peft.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cfjax.conversion.lora import check_loras, open_loras, with_loras
from cfjax.conversion.lora_apart import adapter_of
from cfjax.conversion.lora_files import parse_loras, read_lora
from cfjax.conversion.rules import their_names
from cfjax.conversion.sources import open_source
from cfjax.conversion.wan import DIFFUSERS, ORIGINAL, abstract_wan
from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from cfjax.core.tree import named_leaves
from cfjax.models.lora import merged_arrays
from cfjax.models.wan import WanConfig
from tests import synthetic
from tests.conversion.test_files import STEM

torch.set_num_threads(1)
RANK = 4
WEIGHTS = synthetic.dit_weights(3, dim=128, num_heads=1)
CONFIG = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=32)
MODULES = [name.removesuffix(".weight") for name, x in WEIGHTS.items() if x.ndim == 2 and name.endswith("weight")]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def pairs(rank: int = RANK, seed: int = 0, modules=MODULES) -> Pairs:
    """Module -> (A [rank, in], B [out, rank]), float32."""
    make = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=make)
    shapes = {module: WEIGHTS[f"{module}.weight"].shape for module in modules}
    return {module: (normal(rank, i) * i**-0.5, normal(o, rank) * 0.1) for module, (o, i) in shapes.items()}


def torch_merged(found: Pairs, factor: float, weights: Mapping[str, np.ndarray] = WEIGHTS) -> dict[str, np.ndarray]:
    """W + factor (B @ A) in float32."""
    out = dict(weights)
    for module, (a, b) in found.items():
        name = f"{module}.weight"
        out[name] = (torch.from_numpy(out[name]) + (b @ a) * factor).numpy()
    return out


def kohya(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


def diffusers_names() -> dict[str, str]:
    """The original's modules by diffusers' names."""
    template = named_leaves(abstract_wan(CONFIG))
    both = zip(their_names(ORIGINAL, template), their_names(DIFFUSERS, template), strict=True)
    return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in both}


THEIRS = diffusers_names()
FORMS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", str),
    "peft's own names": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", str),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", THEIRS.__getitem__),
    "diffusers, older": ("transformer.{}_lora.down.weight", "transformer.{}_lora.up.weight", THEIRS.__getitem__),
    "original": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", str),
    "any prefix": ("pipe.dit.{}.lora_A.weight", "pipe.dit.{}.lora_B.weight", str),
    "wrapped": ("_orig_mod.module.model.{}.lora_A.weight", "_orig_mod.module.model.{}.lora_B.weight", str),
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight", kohya),
    "kohya of diffusers": ("{}.lora_down.weight", "{}.lora_up.weight", lambda module: kohya(THEIRS[module])),
}


def save(path: Path, found: Pairs, form: str = "original", alpha: float | None = None, **more: torch.Tensor) -> Path:
    """A LoRA in one of the forms; with `alpha`, one per module."""
    down, up, named = FORMS[form]
    state = {down.format(named(module)): a for module, (a, _) in found.items()}
    state |= {up.format(named(module)): b for module, (_, b) in found.items()}
    if alpha is not None:
        state |= {down.format(named(module)).rpartition(".lora")[0] + ".alpha": torch.tensor(alpha) for module in found}
    save_file({name: x.contiguous() for name, x in {**state, **more}.items()}, path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    (found,) = open_source(synthetic.save_safetensors(tmp_path_factory.mktemp("base"), STEM, WEIGHTS)).found
    return found.network


def same(base, asked: str, expected: Mapping[str, np.ndarray], *, last_bits: int = 0) -> None:
    """The base with these LoRAs has exactly these weights, in the original's layout.

    Args:
      last_bits: of the largest weight by which they may differ.
    """
    back = with_loras(base, open_loras(asked)).exported("original")
    assert back.keys() == expected.keys()
    for name, x in expected.items():
        got = back[name].read()
        off = np.abs(got - x).max()
        assert got.dtype == x.dtype and off <= last_bits * 2.0**-23 * np.abs(x).max(), (name, off)


def refusal(base, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        with_loras(base, [read_lora(path)])
    line = str(caught.value)
    assert "\n" not in line and str(path.parent) in line
    return line


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_merged_bit_for_bit(tmp_path, base, form):
    """Every matrix of the network, q and k with their channels in RoPE's order too."""
    file = save(tmp_path / "x.safetensors", pairs(), form)
    same(base, str(file), torch_merged(pairs(), 1.0))


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_alpha_over_rank_times_weight(tmp_path, base, rank):
    """Without AVX-512, torch's and NumPy's products of rank 8 add in different orders: a last bit may differ."""
    file = save(tmp_path / "x.safetensors", pairs(rank), "kohya", alpha=6.0)
    same(base, f"{file}:0.5", torch_merged(pairs(rank), 0.5 * (6.0 / rank)), last_bits=min(rank - 1, 1))


def test_several_files_in_order(tmp_path, base):
    one = save(tmp_path / "one.safetensors", pairs(seed=1), "diffusers")
    other = save(tmp_path / "other.safetensors", pairs(8, seed=2, modules=MODULES[::3]), "peft")
    expected = torch_merged(pairs(8, seed=2, modules=MODULES[::3]), -0.25, torch_merged(pairs(seed=1), 1.0))
    same(base, f"{one}|{other}:-0.25", expected, last_bits=1)  # see above


def test_half_precision_is_rounded_once(tmp_path, base):
    """A bfloat16 LoRA on bfloat16 weights: the float32 sum, rounded."""
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in WEIGHTS.items()}
    (found,) = open_source(synthetic.save_safetensors(tmp_path, STEM, half)).found
    rounded = {module: (a.bfloat16(), b.bfloat16()) for module, (a, b) in pairs().items()}
    file = save(tmp_path / "x.safetensors", rounded)
    wide = {module: (a.float(), b.float()) for module, (a, b) in rounded.items()}
    expected = torch_merged(wide, 1.0, {name: x.astype(np.float32) for name, x in half.items()})
    same(found.network, str(file), {name: x.astype(ml_dtypes.bfloat16) for name, x in expected.items()})


def test_differences_of_weights_biases_norms_and_modulations(tmp_path, base):
    """lightx2v's step-distillation adapters: pairs for large matrices, differences for all else."""
    make = torch.Generator().manual_seed(5)
    state, expected = {}, dict(WEIGHTS)
    for name, x in WEIGHTS.items():
        module, _, kind = name.rpartition(".")
        diff = torch.randn(x.shape, generator=make)
        suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[kind]
        if x.ndim == 2 and "blocks." in name:
            continue
        state[f"diffusion_model.{module}.{suffix}"] = diff
        expected[name] = (torch.from_numpy(x) + diff * 0.5).numpy()
    blocks = pairs(modules=[module for module in MODULES if module.startswith("blocks.")])
    file = save(tmp_path / "x.safetensors", blocks, alpha=2.0, **state)
    same(base, f"{file}:0.5", torch_merged(blocks, 0.5 * (2.0 / RANK), expected))


def test_a_convolution_and_a_bias_of_a_pair(tmp_path, base):
    make = torch.Generator().manual_seed(6)
    weight = WEIGHTS["patch_embedding.weight"]
    a, b = torch.randn((RANK, *weight.shape[1:]), generator=make), torch.randn((weight.shape[0], RANK), generator=make)
    bias = torch.randn(128, generator=make)
    state = {"patch_embedding.lora_A.weight": a, "patch_embedding.lora_B.weight": b[:, :, None, None, None]}
    file = save(tmp_path / "x.safetensors", {}, **state, **{"patch_embedding.lora_B.bias": bias})
    expected = dict(WEIGHTS)
    expected["patch_embedding.weight"] = weight + (b @ a.flatten(1)).reshape(weight.shape).numpy()
    expected["patch_embedding.bias"] = WEIGHTS["patch_embedding.bias"] + bias.numpy()
    same(base, str(file), expected)


def test_longlives_second_file(tmp_path, base):
    """A .pt with `generator_lora`, `critic_lora` and a step; no alpha: rank and alpha are both 256 in its configs."""
    halves = [(m, half, x) for m, ab in pairs().items() for half, x in zip("AB", ab, strict=True)]
    state = {f"base_model.model.{m}.lora_{half}.weight": x for m, half, x in halves}
    critic = {name: x + 1 for name, x in state.items()}
    file = synthetic.save_pt(tmp_path / "lora.pt", {"generator_lora": state, "critic_lora": critic, "step": 3000})
    same(base, str(file), torch_merged(pairs(), 1.0))
    assert any("critic_lora" in name for name in read_lora(file).ignored)
    only = synthetic.save_pt(tmp_path / "only.pt", {"generator_lora": state, "critic_lora": {}, "step": 3000})
    same(base, str(only), torch_merged(pairs(), 1.0))


SETTINGS = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q"], "use_dora": False}


@pytest.mark.parametrize(
    ("more", "factor"),
    [({}, 8 / RANK), ({"use_rslora": True}, 8 / RANK**0.5), ({"use_rslora": False, "rank_pattern": {}}, 8 / RANK)],
)
def test_pefts_folder_says_alpha_and_rank_stabilised_scaling(tmp_path, base, more, factor):
    save(tmp_path / "adapter_model.safetensors", pairs(), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**SETTINGS, **more}))
    same(base, str(tmp_path), torch_merged(pairs(), factor))


def test_diffusers_metadata_and_patterns(tmp_path, base):
    """alpha_pattern names the ends of modules' names, as they are in the file."""
    about = {"r": RANK, "lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 12.0}, "rank_pattern": {}}
    file = save(tmp_path / "x.safetensors", pairs(), "diffusers")
    text = json.dumps({f"transformer.{key}": value for key, value in about.items()})
    save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": text})
    queries = {module: x for module, x in pairs().items() if module.endswith("self_attn.q")}
    others = {module: x for module, x in pairs().items() if module not in queries}
    same(base, str(file), torch_merged(others, 2 / RANK, torch_merged(queries, 12 / RANK)))


def test_a_diffusers_base_takes_the_originals_lora(tmp_path):
    weights = with_their_names()
    (found,) = open_source(synthetic.save_safetensors(tmp_path, STEM, weights)).found
    assert found.network.layout == "diffusers"
    file = save(tmp_path / "x.safetensors", pairs())
    same(found.network, str(file), torch_merged(pairs(), 1.0))


def with_their_names() -> dict[str, np.ndarray]:
    template = named_leaves(abstract_wan(CONFIG))
    both = zip(their_names(ORIGINAL, template), their_names(DIFFUSERS, template), strict=True)
    return {theirs: WEIGHTS[ours] for ours, theirs in both}


Q, OTHER = "diffusion_model.blocks.0.self_attn.q", "another network"
Z, WHOLE = torch.zeros, torch.tensor
DOWN, UP = {f"{Q}.lora_down.weight": Z(RANK, 128)}, {f"{Q}.lora_up.weight": Z(128, RANK)}
PAIR = DOWN | UP
TWICE = {f"other.blocks.0.self_attn.q.lora_{half}.weight": x for half, x in zip("AB", PAIR.values(), strict=True)}
LAYER = {"blocks.9.ffn.0.lora_A.weight": Z(4, 128), "blocks.9.ffn.0.lora_B.weight": Z(64, 4)}
ONLY_BIAS = {"diffusion_model.blocks.0.ffn.0.diff_b": Z(64)}
BROKEN = {
    "of a wider network": (UP | {f"{Q}.lora_down.weight": Z(RANK, 256)}, "fit blocks.0.self_attn.q.weight (128, 128)"),
    "of other ranks": (DOWN | {f"{Q}.lora_up.weight": Z(128, 8)}, "no rank in common"),
    "without A": (UP, "has lora_B and no lora_A"),
    "without B": (DOWN, "has lora_A and no lora_B"),
    "alpha alone": (ONLY_BIAS | {f"{Q}.alpha": WHOLE(4.0)}, "stands without lora_A and lora_B"),
    "an alpha of two": (PAIR | {f"{Q}.alpha": Z(2)}, "must be one number"),
    "an infinite alpha": (PAIR | {f"{Q}.alpha": WHOLE(float("inf"))}, "must be a finite number"),
    "of a layer that is not there": (LAYER, "belong to nothing in the network"),
    "of images": (
        PAIR | {"blocks.0.cross_attn.k_img.diff_b": Z(128)},
        f"k_img.diff_b; it is a LoRA of {OTHER}",
    ),
    "a wider bias": (PAIR | {f"{Q}.diff_b": Z(64)}, "does not fit blocks.0.self_attn.q.bias (128,)"),
    "DoRA": (PAIR | {f"{Q}.dora_scale": Z(128, 1)}, "is DoRA"),
    "LoHa": ({"lora_unet_blocks_0_ffn_0.hada_w1_a": Z(4, 4)}, "a LyCORIS adapter"),
    "whole tensors": (PAIR | {"diffusion_model.head.head.weight": Z(64, 128)}, "is no part of a LoRA"),
    "the network below": (PAIR | {f"{Q}.base_layer.weight": Z(128, 128)}, "save the adapter alone"),
    "a network": (synthetic.as_torch(WEIGHTS), "no LoRA"),
    "two networks": (PAIR | TWICE, "are both of blocks.0.self_attn.q"),
    "whole numbers": (PAIR | {f"{Q}.diff": Z(128, 128, dtype=torch.int32)}, "has dtype int32"),
    "no modulation": (PAIR | {f"{Q}.diff_m": Z(4)}, "has no modulation"),
}


@pytest.mark.parametrize(("state", "words"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_told_before_it_is_read(tmp_path, base, state, words):
    save_file({name: x.clone() for name, x in state.items()}, tmp_path / "x.safetensors")
    assert words in refusal(base, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"r": 8}, "adapter_config.json says 8"),
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"alpha_pattern": {"^.*q$": 3}}, "no end of a module's name"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, base, more, words):
    save(tmp_path / "adapter_model.safetensors", pairs(), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**SETTINGS, **more}))
    assert words in refusal(base, tmp_path / "adapter_model.safetensors")


def test_numbers_that_are_none_are_told_when_read(tmp_path, base):
    save_file(PAIR | {f"{Q}.diff_b": Z(128) + float("nan")}, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    check_loras([lora], CONFIG)
    with pytest.raises(UserError, match="diff_b holds numbers that are NaN"):
        with_loras(base, [lora]).exported("original")["blocks.0.self_attn.q.bias"].read()


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("", []),
        ("a.pt", [("a.pt", 1.0)]),
        ("a.pt:0.5|C:/b.pt", [("a.pt", 0.5), ("C:/b.pt", 1.0)]),
        ("a | b:-2", [("a", 1.0), ("b", -2.0)]),
    ],
)
def test_how_loras_are_named(asked, found):
    assert parse_loras(asked) == found


@pytest.mark.parametrize("asked", ["|", "a|", ":0.5", "a:nan", "a:inf"])
def test_how_they_are_not(asked):
    with pytest.raises(UserError, match=r"^--config\.lora="):
        parse_loras(asked)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        open_loras(str(tmp_path / "nothing"))


def test_files_apart_are_the_files_merged(tmp_path, base):
    """As adapters beside the network, several files of several ranks are what they are merged."""
    one = save(tmp_path / "one.safetensors", pairs(seed=1), "diffusers", alpha=2.0)
    other = save(tmp_path / "other.safetensors", pairs(8, seed=2, modules=MODULES[::3]), "peft")
    loras = open_loras(f"{one}|{other}:-0.25")
    lora = adapter_of(loras, CONFIG)
    named = as_lazy(named_leaves(lora))
    own, together = merged_arrays(base.arrays, named, lora.settings.factor), with_loras(base, loras).arrays
    errors = [np.abs(own[name].read() - x.read()).max() for name, x in together.items()]
    print(f"apart vs merged: {max(errors):.1e}")
    assert max(errors) < 1e-6 and any(np.any(own[name].read() != x.read()) for name, x in base.arrays.items())
    assert lora.lora["blocks/self_attn/k"]["down"].shape == (2, 128, RANK + 8)  # one block's k is in both


def test_what_cannot_be_apart_is_told(tmp_path):
    save_file(PAIR | {f"{Q}.diff_b": Z(128)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: .*bias is changed by more than a product; merge it"):
        adapter_of([read_lora(tmp_path / "x.safetensors")], CONFIG)
