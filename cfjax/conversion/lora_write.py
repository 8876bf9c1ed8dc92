"""Trained adapters as files that others read: peft's folder, and the originals' names with alpha (`lora_files`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.conversion.rules import LAYER, TRANSPOSED, Layout, their_names
from cfjax.conversion.wan import HALVES_KERNEL, abstract_wan, layouts_wan
from cfjax.conversion.write import write_json
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.tensor_files import save_tensors
from cfjax.core.tree import match, named_leaves
from cfjax.models.lora import LoraConfig
from cfjax.models.wan import WanConfig

FORMS = ("peft", "lora")  # of `--config.to`


def lora_tensors(lora: Mapping[str, LazyArray], config: WanConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module, by the original's name -> (A [rank, in], B [out, rank]).

    Args:
      lora: leaves of a `models.lora.Lora` by name.

    Raises:
      UserError: a layer whose weight is not a matrix alone in the original.
    """
    template = named_leaves(abstract_wan(config))
    rules = match([(rule.ours, rule) for rule in layouts_wan(config)["original"]], template)
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for layer in sorted({name.rpartition("/")[0].removeprefix("lora/") for name in lora}):
        kernel = f"{layer}/kernel"
        if kernel not in rules or rules[kernel].layout not in (TRANSPOSED, HALVES_KERNEL):
            raise UserError(f"lora/{layer}: a layer that the original release has not as a matrix")
        stacked, layout = LAYER in rules[kernel].theirs, rules[kernel].layout
        names = their_names([rules[kernel]], {kernel: template[kernel]})
        halves = [_matrices(lora[f"lora/{layer}/{half}"], stacked) for half in ("down", "up")]
        for name, down, up in zip(names, *halves, strict=True):
            out[name.removesuffix(".weight")] = _theirs(down, up, layout, config)
    return out


def _matrices(array: LazyArray, stacked: bool) -> list[np.ndarray]:
    whole = array.read()
    return list(whole) if stacked else [whole]


def _theirs(down: np.ndarray, up: np.ndarray, layout: Layout, config: WanConfig) -> tuple[np.ndarray, np.ndarray]:
    """A has the input's channels, which keep their order; B the output's, laid out as the kernel's are."""
    return np.ascontiguousarray(down.T), np.ascontiguousarray(layout.save(up, config))


def write_lora(
    form: str, folder: Path, tensors: Mapping[str, tuple[np.ndarray, np.ndarray]], settings: LoraConfig, base: str
) -> int:
    """Writes adapters into a folder; returns the number of tensors.

    Args:
      form: "peft": adapter_model.safetensors and adapter_config.json, as `PeftModel.save_pretrained` writes them.
        "lora": lora.safetensors, the originals' names with `diffusion_model.` before them, and alpha.
      base: what peft's config names as the weights below.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if form == "peft":
        prefix, names, file = "base_model.model.", ("lora_A.weight", "lora_B.weight"), "adapter_model.safetensors"
        write_json(folder / "adapter_config.json", _peft_config(sorted(tensors), settings, base))
    else:
        prefix, names, file = "diffusion_model.", ("lora_down.weight", "lora_up.weight"), "lora.safetensors"
    out = {
        f"{prefix}{module}.{name}": x for module, pair in tensors.items() for name, x in zip(names, pair, strict=True)
    }
    if form != "peft":
        out |= {f"{prefix}{module}.alpha": np.array(settings.alpha, np.float32) for module in tensors}
    save_tensors(folder / file, out, {"format": "pt"})
    return len(out)


def _peft_config(modules: list[str], settings: LoraConfig, base: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": modules,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
