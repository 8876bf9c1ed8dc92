"""LoRA merged into a transformer's weights as they are read: W + s B A, one tensor at a time.

In float32, then rounded to W's own dtype once, after all LoRAs: bit for bit what peft's `tuners/lora/layer.py`,
`Linear.merge`, gives for float32 weights where both multiply alike. `lora_files` has the files' forms.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.conversion.kinds import KINDS, Network
from cfjax.conversion.lora_files import LoraFile, parse_loras, read_lora
from cfjax.conversion.rules import DTYPES, export_plan, import_plan, their_names
from cfjax.conversion.wan import abstract_wan, layouts_wan
from cfjax.conversion.weight_file import listed
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, all_finite
from cfjax.core.paths import local_path
from cfjax.core.tree import named_leaves
from cfjax.models.wan import WanConfig

KOHYA = ("lora_unet_", "lora_transformer_")
Arrays = Mapping[str, LazyArray]


@dataclass(frozen=True)
class Change:
    """What one LoRA adds to one tensor [out, ...]: factor B A, or factor times a difference.

    Attributes:
      file: of the LoRA.
      up, down: B [out, rank] and A [rank, in], or of a convolution [out, rank, 1, ...] and [rank, in, ...]; of a
        difference, itself and None.
    """

    file: Path
    factor: float
    up: LazyArray
    down: LazyArray | None = None

    def of(self, shape: tuple[int, ...]) -> np.ndarray:
        """In float32."""
        up = self.up.read().astype(np.float32)
        if self.down is not None:
            down = self.down.read().astype(np.float32)
            up = up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)
        return (up * np.float32(self.factor)).reshape(shape)


def open_loras(asked: str, key: str = "--config.lora") -> list[LoraFile]:
    """The LoRAs of "FILE[:WEIGHT][|FILE[:WEIGHT]...]", in order; [] of "".

    Raises:
      UserError: one cannot be read.
    """
    found = parse_loras(asked, key)
    return [read_lora(local_path(file, key, "weights are mapped into memory"), weight) for file, weight in found]


def with_loras(network: Network, loras: Sequence[LoraFile]) -> Network:
    """The transformer with LoRAs added to its weights when they are read.

    Raises:
      UserError: it is no transformer, or a LoRA is of another one.
    """
    if not loras:
        return network
    if network.kind != "dit":
        raise UserError(f"{network.file}: a {KINDS[network.kind].title}; a LoRA is of a Wan transformer")
    notes = tuple(f"with the LoRA {lora.path.name}, weight {lora.weight:g}" for lora in loras)
    arrays = merged(network.arrays, network.config, loras)
    return replace(network, arrays=arrays, notes=(*network.notes, *notes))


def merged(arrays: Arrays, config: WanConfig, loras: Sequence[LoraFile]) -> dict[str, LazyArray]:
    """A transformer's weights by our names with LoRAs added; nothing is read yet.

    Args:
      arrays: in float32, bfloat16 or float16.

    Raises:
      UserError: a LoRA does not fit the network.
    """
    theirs = export_plan(layouts_wan(config)["original"], arrays, config)
    changes: dict[str, list[Change]] = {}
    for lora in loras:
        for name, one in changes_of(lora, {name: x.shape for name, x in theirs.items()}, config).items():
            changes.setdefault(name, []).extend(one)
    added = {name: _added(name, x, changes[name]) if name in changes else x for name, x in theirs.items()}
    return import_plan(layouts_wan(config)["original"], added, named_leaves(abstract_wan(config)), config)


def their_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors by the original's names."""
    template = named_leaves(abstract_wan(config))
    ours = {name: LazyArray(x.shape, np.dtype(np.float32), ()) for name, x in template.items()}
    return {name: x.shape for name, x in export_plan(layouts_wan(config)["original"], ours, config).items()}


def check_loras(loras: Sequence[LoraFile], config: WanConfig) -> None:
    """Checks that LoRAs fit a network of these sizes, before any weight is read.

    Raises:
      UserError: one does not.
    """
    shapes = their_shapes(config)
    for lora in loras:
        changes_of(lora, shapes, config)


def _added(name: str, array: LazyArray, changes: Sequence[Change]) -> LazyArray:
    def read(own: Callable[[], np.ndarray]) -> np.ndarray:
        weight = own()
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            total = weight.astype(np.float32)
            for change in changes:
                total += change.of(weight.shape)
            total = total.astype(weight.dtype)
        if not all_finite(total):
            raise UserError(
                f"{changes[-1].file}: {name} becomes infinite with it in {weight.dtype.name}; use less weight"
            )
        return total

    return replace(array, parts=tuple(partial(read, part) for part in array.parts))


def changes_of(lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], config: WanConfig) -> dict[str, list[Change]]:
    """What a LoRA adds to the tensors of a network, by the original's names; every shape is checked, nothing read.

    Args:
      shapes: of the network's tensors, by the original's names.

    Raises:
      UserError: parts are missing, or names or shapes are another network's; the line begins with the file's name.
    """
    targets, out = _targets(config), dict[str, list[Change]]()
    flat = {module.replace(".", "_"): module for module in targets}
    unknown: list[str] = []
    seen: dict[str, str] = {}
    for module, parts in lora.modules.items():
        own = _module(module, targets, flat)
        if own is None:
            unknown += [name for name, _ in parts.values()]
            continue
        first = next(iter(targets[own].values()))  # one tensor of it, whichever layout the file's names are of
        if (other := seen.setdefault(first, module)) != module:
            raise UserError(f"{lora.path}: {other} and {module} are both of {own}; save the LoRA of one network")
        for kind, name, change in _changes(lora, module, parts):
            target = targets[own].get(kind)
            if target is None:
                raise UserError(f"{lora.path}: {name}: {own} has no {kind}; it is a LoRA of another network")
            _check_fit(lora, name, change, target, shapes[target])
            out.setdefault(target, []).append(change)
    if unknown:
        raise UserError(
            f"{lora.path}: {len(unknown)} tensors belong to nothing in the network: {listed(sorted(unknown))}; it is a"
            " LoRA of another network"
        )
    return out


def _targets(config: WanConfig) -> dict[str, dict[str, str]]:
    """Module, as the original and diffusers name it -> weight, bias or modulation -> the original's tensor."""
    template = named_leaves(abstract_wan(config))
    original, other = (their_names(layouts_wan(config)[name], template) for name in ("original", "diffusers"))
    out: dict[str, dict[str, str]] = {}
    for names in (original, other):
        for name, own in zip(names, original, strict=True):
            module, _, kind = name.rpartition(".")
            out.setdefault(module, {})[kind] = own
    return out


def _module(name: str, known: Mapping[str, Any], flat: Mapping[str, str]) -> str | None:
    """The module that a file names, behind any prefix; of kohya's names, whose words are joined by underscores."""
    for prefix in KOHYA:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix))
    words = name.split(".")
    ends = (".".join(words[i:]) for i in range(len(words)))
    return next((end for end in ends if end in known), None)


def _changes(
    lora: LoraFile, module: str, parts: Mapping[str, tuple[str, LazyArray]]
) -> Iterator[tuple[str, str, Change]]:
    """(weight, bias or modulation; a tensor's name; the change) of every change of a module."""
    arrays = {part: _readable(lora, *found) for part, found in parts.items()}
    missing = {"up", "down"} - arrays.keys()
    if missing != {"up", "down"} and missing:
        there, absent = ("A", "B") if "up" in missing else ("B", "A")
        raise UserError(f"{lora.path}: {module} has lora_{there} and no lora_{absent}; the file is not whole")
    if missing and (alone := arrays.keys() & {"alpha", "bias"}):
        raise UserError(f"{lora.path}: {parts[min(alone)][0]} stands without lora_A and lora_B; the file is not whole")
    if not missing:
        (down, up), rank = (arrays["down"], arrays["up"]), arrays["down"].shape[:1]
        if min(len(down.shape), len(up.shape)) < 2 or up.shape[1:2] != rank or 0 in rank:
            raise UserError(
                f"{lora.path}: {module}: lora_A {down.shape} and lora_B {up.shape} have no rank in common; it is broken"
            )
        alpha = _alpha(lora, *parts["alpha"]) if "alpha" in arrays else None
        try:
            factor = lora.weight * lora.scaling.factor(module, rank[0], alpha)
        except UserError as error:
            raise UserError(f"{lora.path}: {error}") from None
        yield "weight", parts["up"][0], Change(lora.path, factor, up, down)
        if "bias" in arrays:
            yield "bias", parts["bias"][0], Change(lora.path, factor, arrays["bias"])
    for part, kind in (("diff", "weight"), ("diff_b", "bias"), ("diff_m", "modulation")):
        if part in arrays:
            yield kind, parts[part][0], Change(lora.path, lora.weight, arrays[part])


def _readable(lora: LoraFile, name: str, array: LazyArray) -> LazyArray:
    """The tensor, which raises when read if it holds NaN or infinite numbers."""
    if array.dtype not in DTYPES:
        known = ", ".join(dtype.name for dtype in DTYPES)
        raise UserError(f"{lora.path}: {name} has dtype {array.dtype.name}; a LoRA's must be one of {known}")

    def read(own: Callable[[], np.ndarray]) -> np.ndarray:
        found = own()
        if not all_finite(found):
            raise UserError(f"{lora.path}: {name} holds numbers that are NaN or infinite; the file is of no use")
        return found

    return replace(array, parts=tuple(partial(read, part) for part in array.parts))


def _alpha(lora: LoraFile, name: str, array: LazyArray) -> float:
    if array.size != 1:
        raise UserError(f"{lora.path}: {name} has shape {array.shape}; it must be one number")
    alpha = float(array.read().reshape(()).astype(np.float32))
    if not abs(alpha) < float("inf"):
        raise UserError(f"{lora.path}: {name} is {alpha}; it must be a finite number")
    return alpha


def _check_fit(lora: LoraFile, name: str, change: Change, target: str, shape: tuple[int, ...]) -> None:
    """UserError unless a change has its target's shape."""
    up, down = change.up.shape, change.down.shape if change.down else None
    found = up if down is None else (*up[:1], *down[1:])
    if found != shape or (down is not None and set(up[2:]) - {1}):
        both = f"{up}" if down is None else f"{up} times {down}"
        raise UserError(f"{lora.path}: {name}: {both} does not fit {target} {shape}; it is a LoRA of another network")
