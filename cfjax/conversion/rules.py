"""Strict two-way conversion of named arrays by an ordered table; knows nothing of any model.

A table says, for our names (regex), what the array is called in the other code base and how its layout differs. Both
directions read the same rows, so what one writes the other reads back bit for bit. Every array on either side must be
accounted for: a missing, left-over or misshapen one is an error, and so is a row that matches nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import EinopsError

from cfjax.core.errors import UserError
from cfjax.core.tree import match

Move = Callable[[np.ndarray, Any], np.ndarray]
LAYER = "{layer}"


@dataclass(frozen=True)
class Layout:
    """Two inverse moves of one array: `load` from the other layout to ours, `save` back; both also get the config."""

    load: Move
    save: Move


@dataclass(frozen=True)
class Rule:
    """One row: our name (regex), their name (a template over its groups), the layout.

    `{layer}` in `theirs` means that our array stacks their per-layer arrays along its first axis.
    """

    ours: str
    theirs: str
    layout: Layout


SAME = Layout(load=lambda x, _: x, save=lambda x, _: x)


@dataclass(frozen=True)
class _Row:
    """A rule applied to one of our names: the other side's names, one or one per layer."""

    sources: tuple[str, ...]
    stacked: bool
    layout: Layout


def _resolve(table: Sequence[Rule], ours: Mapping[str, Any]) -> dict[str, _Row]:
    rows = {}
    for name, rule in match([(rule.ours, rule) for rule in table], ours).items():
        hit = re.fullmatch(rule.ours, name)
        assert hit is not None  # `match` found it
        theirs, stacked = hit.expand(rule.theirs), LAYER in rule.theirs
        layers = range(ours[name].shape[0]) if stacked else (0,)
        rows[name] = _Row(tuple(theirs.replace(LAYER, str(i)) for i in layers), stacked, rule.layout)
    return rows


def load_named(
    table: Sequence[Rule], theirs: Mapping[str, Any], template: Mapping[str, Any], config: Any
) -> dict[str, np.ndarray]:
    """Our named arrays, float32, from theirs.

    Args:
      template: our names with shapes (`jax.ShapeDtypeStruct` will do).
      config: handed to the layouts.

    Raises:
      UserError: an array of theirs is missing, left over or of another shape, or the table does not fit the template.
    """
    rows = _resolve(table, template)
    wanted = {source for row in rows.values() for source in row.sources}
    missing, extra = sorted(wanted - theirs.keys()), sorted(theirs.keys() - wanted)
    if missing or extra:
        raise UserError(f"weights do not fit the model: missing {missing[:3]}, left over {extra[:3]}")
    out = {}
    for name, row in rows.items():
        shape = tuple(template[name].shape)
        part = shape[1:] if row.stacked else shape
        array = np.empty((len(row.sources), *part), np.float32)
        for i, source in enumerate(row.sources):
            given = np.asarray(theirs[source])
            try:
                loaded = row.layout.load(given, config)
            except (ValueError, EinopsError) as error:
                raise UserError(f"{source} has shape {given.shape}, which {name} {part} cannot take") from error
            if loaded.shape != part:
                raise UserError(f"{source} has shape {given.shape}, which {name} {part} cannot take")
            array[i] = loaded
        out[name] = array if row.stacked else array[0]
    return out


def save_named(table: Sequence[Rule], ours: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """Their named arrays from ours; the inverse of `load_named`.

    Raises:
      UserError: the table does not fit our names.
    """
    out = {}
    for name, row in _resolve(table, ours).items():
        array = np.asarray(ours[name])
        for source, part in zip(row.sources, array if row.stacked else (array,), strict=True):
            out[source] = np.ascontiguousarray(row.layout.save(part, config))
    return out
