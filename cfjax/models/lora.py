"""Low-rank adapters to train in a network's place: W + s A B beside frozen weights (LoRA, arXiv 2106.09685).

The trained leaves of a role are `lora/LAYER/down` (the paper's A) and `lora/LAYER/up` (its B) of every adapted layer,
and nothing else: gradients, optimiser states, averages and checkpoints are of these alone. `attach` puts them beside
the frozen network's kernels, which may be stored in any way (`models.weight_storage`); the network then runs as ever,
each of its products x W + s (x A) B. `merged` is the network that computes the same without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.quantize import Adapted, is_quantized
from cfjax.core.tree import map_named, match, named_leaves
from cfjax.models.wan import Wan, WanConfig

M = TypeVar("M")
# Which kernels are adapted, by the names of all leaves.
TARGETS: dict[str, tuple[tuple[str, bool], ...]] = {
    "attention": ((r"blocks/(self|cross)_attn/[qkvo]/kernel", True), (r".*", False)),
    # As LongLive's and peft's users have it: every linear layer of the blocks (`utils/lora_utils.py`,
    # `configure_lora_for_model`).
    "blocks": ((r"blocks/((self|cross)_attn/[qkvo]|ffn/(up|down))/kernel", True), (r".*", False)),
    "all": (
        (r"blocks/((self|cross)_attn/[qkvo]|ffn/(up|down))/kernel", True),
        (r"(text|time)_embedding/(up|down)/kernel|time_projection/kernel|head/kernel", True),
        (r".*", False),
    ),
}
DOWN, UP = "down", "up"


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    Attributes:
      rank: of the matrices.
      alpha: the product is scaled by alpha / rank.
      targets: a key of `TARGETS`.
    """

    rank: int
    alpha: float
    targets: str = "blocks"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}: use 1 or more")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha={self.alpha}: use more than 0")
        if self.targets not in TARGETS:
            raise UserError(f"lora.targets={self.targets!r}: use one of {', '.join(TARGETS)}")

    @property
    def factor(self) -> float:
        """s, in front of A B."""
        return self.alpha / self.rank


@partial(jax.tree_util.register_dataclass, data_fields=["lora"], meta_fields=["config", "settings"])
@dataclass(frozen=True)
class Lora:
    """The trained leaves of an adapted network.

    Attributes:
      lora: layer ("blocks/ffn/up") -> {"down": [L, in, rank], "up": [L, rank, out]}, without L outside the blocks.
      config: of the network below.
    """

    lora: dict[str, dict[str, Any]]
    config: WanConfig
    settings: LoraConfig


def adapted_layers(names: Mapping[str, Any], targets: str) -> list[str]:
    """The layers of a network with these leaves that are adapted, such as "blocks/ffn/up"."""
    return [name.removesuffix("/kernel") for name, chosen in match(TARGETS[targets], names).items() if chosen]


def abstract_lora(config: WanConfig, settings: LoraConfig) -> Lora:
    """The leaves as shapes, float32; allocates nothing."""
    names = named_leaves(jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0)))

    def pair(layer: str) -> dict[str, jax.ShapeDtypeStruct]:
        *lead, into, out = names[f"{layer}/kernel"].shape
        sizes = {DOWN: (*lead, into, settings.rank), UP: (*lead, settings.rank, out)}
        return {half: jax.ShapeDtypeStruct(shape, jnp.dtype("float32")) for half, shape in sizes.items()}

    layers = adapted_layers(names, settings.targets)
    return Lora({layer: pair(layer) for layer in layers}, config, settings)


def make_lora(config: WanConfig, settings: LoraConfig, key: jax.Array) -> Lora:
    """The start: up is zero, so that the network is the frozen one; down uniform up to 1 / sqrt(in).

    (peft `tuners/lora/layer.py`, `reset_lora_parameters`: Kaiming with a = sqrt(5).)
    """
    template = abstract_lora(config, settings)

    def leaf(i: int, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        if name.endswith(UP):
            return jnp.zeros(like.shape, like.dtype)
        bound = like.shape[-2] ** -0.5
        return jax.random.uniform(jax.random.fold_in(key, i), like.shape, like.dtype, -bound, bound)

    places = {name: i for i, name in enumerate(named_leaves(template))}
    return map_named(lambda name, like: leaf(places[name], name, like), template)


def attach(network: M, lora: Lora) -> M:
    """The network with its adapters beside its kernels; moves no array.

    Raises:
      UserError: they are of layers that it has not, or of other widths.
    """
    kernels = {f"{layer}/kernel": pair for layer, pair in lora.lora.items()}
    own = named_leaves(network, is_quantized)
    for name, pair in kernels.items():
        needed = tuple(own[name].shape) if name in own else ()
        if (*pair[DOWN].shape[:-1], pair[UP].shape[-1]) != needed:
            raise UserError(f"{name} {needed}: adapters {pair[DOWN].shape}, {pair[UP].shape} are of another network")

    def leaf(name: str, x: Any) -> Any:
        pair = kernels.get(name)
        return x if pair is None else Adapted(x, pair[DOWN], pair[UP], lora.settings.factor)

    return map_named(leaf, network, is_quantized)


def scaled(lora: Lora, weight: float) -> Lora:
    """Adapters that add `weight` times as much."""
    pairs = {layer: {DOWN: pair[DOWN], UP: weight * pair[UP]} for layer, pair in lora.lora.items()}
    return replace(lora, lora=pairs)


def merged(network: M, lora: Lora) -> M:
    """The network with W + s A B in the adapted kernels' place, summed in float32 and stored as W is."""
    pairs = {f"{layer}/kernel": pair for layer, pair in lora.lora.items()}

    def leaf(name: str, x: jax.Array) -> jax.Array:
        if name not in pairs:
            return x
        product = pairs[name][DOWN] @ pairs[name][UP]
        return (x.astype(jnp.float32) + lora.settings.factor * product).astype(x.dtype)

    return map_named(leaf, network)


def merged_arrays(
    network: Mapping[str, LazyArray], lora: Mapping[str, LazyArray], factor: float
) -> dict[str, LazyArray]:
    """`merged` of weights by name that are not yet read, on the host, one layer at a time.

    Args:
      lora: leaves by the names of a `Lora`.  factor: alpha / rank.

    Raises:
      UserError: a leaf is of no kernel of the network, or of another shape.
    """
    halves = {name.removeprefix("lora/"): x for name, x in lora.items()}
    out = dict(network)
    for layer in sorted({name.rpartition("/")[0] for name in halves}):
        name, down, up = f"{layer}/kernel", halves.get(f"{layer}/{DOWN}"), halves.get(f"{layer}/{UP}")
        if name not in network or down is None or up is None:
            raise UserError(f"lora/{layer}: the network below has no {name}, or half of the pair is missing")
        if (*down.shape[:-1], up.shape[-1]) != network[name].shape or down.shape[-1] != up.shape[-2]:
            raise UserError(f"lora/{layer}: {down.shape} and {up.shape} do not fit {name} {network[name].shape}")
        out[name] = _merged_array(network[name], down, up, factor)
    return out


def _merged_array(weight: LazyArray, down: LazyArray, up: LazyArray, factor: float) -> LazyArray:
    def one(read: Any, read_down: Any, read_up: Any) -> np.ndarray:
        kernel = read()
        product = read_down().astype(np.float32) @ read_up().astype(np.float32)
        return (kernel.astype(np.float32) + np.float32(factor) * product).astype(kernel.dtype)

    if len(weight.shape) == 2:
        return replace(weight, parts=(partial(one, weight.read, down.read, up.read),), stacked=False)
    readers = zip(weight.entries(), down.entries(), up.entries(), strict=True)
    return replace(weight, parts=tuple(partial(one, *each) for each in readers), stacked=True)
