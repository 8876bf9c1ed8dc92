"""The networks of a Wan system, the layouts of their weights, and recognising both by a file's names."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.conversion import clip, tiny_vae, umt5, vae, wan
from cfjax.conversion.foreign import what_else
from cfjax.conversion.prefixes import is_extra
from cfjax.conversion.quantised import NO_WEIGHTS, dequantised
from cfjax.conversion.rules import Rule, export_plan, import_plan, their_names
from cfjax.conversion.weight_file import listed
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, all_finite
from cfjax.core.limits import AXIS, RANK
from cfjax.core.tree import named_leaves
from cfjax.models.clip import CLIPConfig, abstract_clip
from cfjax.models.tiny_vae import TinyVAEConfig
from cfjax.models.umt5 import UMT5Config
from cfjax.models.vae import VAEConfig
from cfjax.models.wan import WanConfig

Arrays = Mapping[str, LazyArray]
ENOUGH = 0.5  # of the names must be a network's for the file to be taken for its


@dataclass(frozen=True)
class Kind:
    """One network's conversion.

    Attributes:
      title: for messages.
      tables: config -> table by name of the layout.
      abstract: config -> the module with shapes in place of arrays.
      infer: (shapes, layout, config.json or None) -> config.
      config_json: (config, layout) -> config.json or None.
      examples: configs whose names are every config's, but for the numbers in them.
      prepare: what to do to a file's arrays first.  finish: and its inverse, of those of a layout, at the end.
    """

    title: str
    tables: Callable[[Any], Mapping[str, tuple[Rule, ...]]]
    abstract: Callable[[Any], Any]
    infer: Callable[[Mapping[str, tuple[int, ...]], str, Mapping[str, Any] | None], Any]
    config_json: Callable[[Any, str], Mapping[str, Any] | None]
    examples: tuple[Any, ...]
    prepare: Callable[[Arrays], dict[str, LazyArray]] = dict
    finish: Callable[[Arrays, str], dict[str, LazyArray]] = lambda arrays, _: dict(arrays)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts' names."""
        return tuple(self.tables(self.examples[0]))

    def template(self, config: Any) -> dict[str, Any]:
        """Our names with shapes."""
        return named_leaves(self.abstract(config))


KINDS = {
    "dit": Kind(
        "Wan transformer",
        wan.layouts_wan,
        wan.abstract_wan,
        wan.infer_config_wan,
        wan.config_json_wan,
        tuple(WanConfig(dim=4, ffn_dim=4, num_heads=2, num_layers=1, image_dim=width) for width in (0, 4)),
        wan.read_wan,
    ),
    "vae": Kind(
        "Wan VAE",
        vae.layouts_vae,
        vae.abstract_vae,
        vae.infer_config_vae,
        vae.config_json_vae,
        (VAEConfig(base_dim=2), VAEConfig(base_dim=2, residual=True)),
    ),
    "text_encoder": Kind(
        "umT5 encoder",
        lambda _: umt5.LAYOUTS,
        umt5.abstract_umt5,
        umt5.infer_config_umt5,
        umt5.config_json_umt5,
        (UMT5Config(vocab_size=4, dim=4, heads=2, head_dim=2, ffn_dim=4, layers=1),),
        umt5.untied_umt5,
    ),
    "tiny_vae": Kind(
        "tiny VAE",
        lambda _: tiny_vae.LAYOUTS,
        tiny_vae.abstract_tiny_vae,
        tiny_vae.infer_config_tiny_vae,
        tiny_vae.config_json_tiny_vae,
        (TinyVAEConfig(),),
    ),
    "image_encoder": Kind(
        "CLIP vision transformer",
        lambda _: clip.LAYOUTS,
        abstract_clip,
        clip.infer_config_clip,
        clip.config_json_clip,
        (CLIPConfig(dim=4, ffn_dim=4, heads=2, layers=2, image_size=2, patch=1),),
        clip.read_clip,
        clip.written_clip,
    ),
}


@dataclass(frozen=True)
class Network:
    """One network's weights in our names, not yet read.

    Attributes:
      kind: a key of `KINDS`.
      layout, file: what it came in.
      notes: what was done to the file's tensors, for a message.
    """

    kind: str
    config: Any
    arrays: Arrays
    layout: str
    file: str
    notes: tuple[str, ...] = ()

    def exported(self, layout: str) -> dict[str, LazyArray]:
        """The weights by another layout's names."""
        row = KINDS[self.kind]
        return row.finish(export_plan(row.tables(self.config)[layout], self.arrays, self.config), layout)

    def about(self, layout: str) -> Mapping[str, Any] | None:
        """config.json in another layout."""
        return KINDS[self.kind].config_json(self.config, layout)


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


@cache
def _signature(kind: str, layout: str, index: int) -> frozenset[str]:
    row = KINDS[kind]
    example = row.examples[index]
    return frozenset(map(_numberless, their_names(row.tables(example)[layout], row.template(example))))


def recognised(names: Iterable[str]) -> tuple[str, str]:
    """(kind, layout) whose names, but for numbers, are most like these.

    Raises:
      UserError: none comes near.
    """
    names = list(names)
    found = frozenset(_numberless(name) for name in names if not NO_WEIGHTS.fullmatch(name))
    likeness = {
        (kind, layout): max(
            len(found & own) / len(found | own)
            for own in (_signature(kind, layout, index) for index in range(len(row.examples)))
        )
        for kind, row in KINDS.items()
        for layout in row.layouts
    }
    best = max(likeness, key=lambda key: likeness[key])
    if likeness[best] < ENOUGH:
        if other := what_else(names):
            raise UserError(other)
        known = ", ".join(f"{row.title} ({', '.join(row.layouts)})" for row in KINDS.values())
        raise UserError(f"no known network: names such as {sorted(names)[:2]}; known are {known}")
    return best


def _check_shapes(arrays: Arrays) -> None:
    """Every size is at least 1, so that none divides by zero, and none is beyond use."""
    for name, array in arrays.items():
        if len(array.shape) > RANK or not all(0 < size <= AXIS for size in array.shape):
            raise UserError(f"{name} has shape {array.shape}; sizes must be 1 to {AXIS}, and at most {RANK} of them")


def _finite(name: str, file: Path, array: LazyArray) -> LazyArray:
    """The array, which raises when read if it holds NaN or infinite numbers."""

    def telling(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        def checked() -> np.ndarray:
            found = read()
            if not all_finite(found):
                raise UserError(f"{file}: {name} holds numbers that are NaN or infinite; the file is of no use")
            return found

        return checked

    return replace(array, parts=tuple(map(telling, array.parts)))


def imported(
    arrays: Arrays,
    file: Path,
    about: Callable[[str, str, Arrays], Mapping[str, Any] | None],
    *,
    dtype: str = "float32",
    unscaled: bool = False,
) -> Network:
    """A file's network, every name, shape and dtype checked, nothing read.

    Args:
      about: (kind, layout, arrays) -> config.json that describes such weights, or None.
      dtype, unscaled: of what is quantised, see `quantised.dequantised`.

    Raises:
      UserError: unknown or unfit weights; the line begins with the file's name.
    """
    try:
        if adapter := what_else(arrays):
            raise UserError(adapter)
        whole, notes = dequantised(arrays, dtype, unscaled=unscaled)
        kind, layout = recognised(whole)
        row = KINDS[kind]
        own = frozenset[str]().union(*(_signature(kind, layout, index) for index in range(len(row.examples))))
        extras = [name for name, x in whole.items() if _numberless(name) not in own and is_extra(name, x)]
        weights = {name: _finite(name, file, x) for name, x in whole.items() if name not in extras}
        _check_shapes(weights)
        theirs = row.prepare(weights)
        config = row.infer({name: x.shape for name, x in theirs.items()}, layout, about(kind, layout, theirs))
        ours = import_plan(row.tables(config)[layout], theirs, row.template(config), config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    notes += [f"left out: {listed(extras)}"] if extras else []
    return Network(kind, config, ours, layout, file.name, tuple(notes))
