"""LoRA files as adapters beside a network (`models.lora`), for a session that switches them while it runs.

Several files are one adapter of all their ranks: B A + B' A' = [B B'] [A; A'], their factors within B. Layers of fewer
ranks, and layers that a file does not change, are filled up with zeros, which change nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cfjax.conversion.lora import Change, changes_of, check_loras, their_shapes
from cfjax.conversion.lora_files import LoraFile
from cfjax.conversion.rules import LAYER, TRANSPOSED, Rule, their_names
from cfjax.conversion.wan import HALVES_KERNEL, abstract_wan, layouts_wan
from cfjax.core.errors import UserError
from cfjax.core.tree import match, named_leaves
from cfjax.models.lora import DOWN, UP, Lora, LoraConfig
from cfjax.models.wan import WanConfig


def adapter_of(loras: Sequence[LoraFile], config: WanConfig) -> Lora:
    """The adapters of some LoRA files, in float32; their weights are within.

    Raises:
      UserError: there are none, one does not fit the network, or changes more than products can: differences, biases, a
        convolution. `merged` takes all of these.
    """
    check_loras(loras, config)
    shapes, template = their_shapes(config), named_leaves(abstract_wan(config))
    found: dict[str, list[Change]] = {}
    for lora in loras:
        for name, changes in changes_of(lora, shapes, config).items():
            found.setdefault(name, []).extend(changes)
    rules = match([(rule.ours, rule) for rule in layouts_wan(config)["original"]], template)
    out: dict[str, dict[str, Any]] = {}
    for kernel, rule in rules.items():
        names = their_names([rule], {kernel: template[kernel]})
        own = {name: found.pop(name) for name in names if name in found}
        if own:
            out[kernel.removesuffix("/kernel")] = _pair(rule, names, own, config)
    if not out:
        raise UserError("no LoRA is named: give a file with lora_A and lora_B")
    rank = max(pair[UP].shape[-2] for pair in out.values())
    return Lora(out, config, LoraConfig(rank, float(rank), "all"))


def _pair(rule: Rule, names: Sequence[str], changes: Mapping[str, list[Change]], config: WanConfig) -> dict[str, Any]:
    """A [L, in, rank] and B [L, rank, out] of one of our kernels, without L where it is of no block."""
    for name, some in changes.items():
        if rule.layout not in (TRANSPOSED, HALVES_KERNEL) or any(change.down is None for change in some):
            raise UserError(f"{some[0].file}: {name} is changed by more than a product; merge it by --config.lora")
    pairs = {name: _joined(some) for name, some in changes.items()}
    rank = max(down.shape[0] for down, _ in pairs.values())
    (into, out) = next((down.shape[1], up.shape[0]) for down, up in pairs.values())
    downs, ups = np.zeros((len(names), into, rank), np.float32), np.zeros((len(names), rank, out), np.float32)
    for i, name in enumerate(names):
        if name in pairs:
            down, up = pairs[name]
            downs[i, :, : len(down)] = down.T
            ups[i, : len(down)] = rule.layout.load(up, config)
    one = slice(None) if LAYER in rule.theirs else 0
    return {DOWN: jnp.asarray(downs[one]), UP: jnp.asarray(ups[one])}


def _joined(changes: Sequence[Change]) -> tuple[np.ndarray, np.ndarray]:
    """A [all ranks, in] and B [out, all ranks] with the factors."""
    downs = [change.down.read().astype(np.float32) for change in changes if change.down is not None]
    ups = [change.up.read().astype(np.float32) * np.float32(change.factor) for change in changes]
    return np.concatenate(downs), np.concatenate(ups, axis=1)
