"""Strict two-way conversion of named arrays by an ordered table; independent of models.

A table says, for our names (regex), what the array is called in the other code base and how its layout differs. Both
directions read the same rows, so what one writes the other reads back bit for bit; dtypes stay as they are. Every array
on either side must be accounted for: a missing, left-over or misshapen one is an error, and so is a row that matches
nothing. All of this is checked from names, shapes and dtypes, before the first array is read.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from einops import EinopsError

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, as_lazy
from cfjax.core.limits import LAYERS
from cfjax.core.tree import from_named, match, named_leaves

M = TypeVar("M")
Move = Callable[[np.ndarray, Any], np.ndarray]
LAYER = "{layer}"
DTYPES = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16))
SAMPLE = 4096


@dataclass(frozen=True)
class Layout:
    """Two inverse maps of one array: `load` from the other layout to ours, `save` back; both also get the config."""

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
TRANSPOSED = Layout(load=lambda x, _: x.T, save=lambda x, _: x.T)  # linear weights: PyTorch's [out, in], ours [in, out]


def kernel_bias(ours: str, theirs: str, kernel: Layout = TRANSPOSED, bias: Layout = SAME) -> tuple[Rule, Rule]:
    """A layer's kernel and bias, which PyTorch calls weight and bias."""
    return Rule(f"{ours}/kernel", f"{theirs}.weight", kernel), Rule(f"{ours}/bias", f"{theirs}.bias", bias)


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


def _listed(names: set[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{sorted(names)[:3]}{more}"


def layer_count(names: Iterable[str], before: str) -> int:
    """Number of layers in names such as `before` + "3.norm.weight": one more than the highest number.

    Raises:
      UserError: a number is none, or higher than there are names; nothing would be allocated for so many.
    """
    numbers = {name.removeprefix(before).partition(".")[0] for name in names if name.startswith(before)}
    if wrong := [text for text in numbers if not (text.isascii() and text.isdigit() and len(text) < 6)]:
        raise UserError(f"{before}{wrong[0]}: no number of a layer")
    count = 1 + max(map(int, numbers), default=-1)
    if count > LAYERS or count == 0:
        raise UserError(f"{count} layers, by the names that begin with {before}; there must be 1 to {LAYERS}")
    return count


def their_names(table: Sequence[Rule], template: Mapping[str, Any]) -> list[str]:
    """The other side's names of a model with our `template` (names with shapes)."""
    return [source for row in _resolve(table, template).values() for source in row.sources]


def check_names(wanted: Iterable[str], given: Iterable[str]) -> None:
    """UserError unless both name the same arrays."""
    names, found = set(wanted), set(given)
    missing, extra = names - found, found - names
    if missing or extra:
        raise UserError(f"weights do not fit the model: missing {_listed(missing)}, left over {_listed(extra)}")


def _moved(move: Move, shape: tuple[int, ...], config: Any) -> tuple[int, ...] | None:
    """The shape after a move, None where it cannot take that shape; nothing is allocated but bytes of one layer."""
    try:
        return move(np.broadcast_to(np.zeros((), np.bool_), shape), config).shape
    except (ValueError, EinopsError):
        return None


def _check_array(source: str, given: LazyArray, first: LazyArray, part: tuple[int, ...], name: str) -> None:
    if given.shape != first.shape:
        raise UserError(f"{source} has shape {given.shape}, which {name} {part} cannot take")
    if given.dtype not in DTYPES:
        known = ", ".join(dtype.name for dtype in DTYPES)
        raise UserError(f"{source} has dtype {given.dtype.name}; weights must be one of {known}")
    if given.dtype != first.dtype:
        raise UserError(f"{source} has dtype {given.dtype.name}, another layer's is {first.dtype.name}; make them one")


def import_plan(
    table: Sequence[Rule], theirs: Mapping[str, LazyArray], template: Mapping[str, Any], config: Any
) -> dict[str, LazyArray]:
    """Our named arrays from theirs, in their dtype; nothing is read yet.

    Args:
      template: our names with shapes (`jax.ShapeDtypeStruct` will do).
      config: handed to the layouts.

    Raises:
      UserError: an array of theirs is missing, left over, of another shape or not of `DTYPES`, the layers of a stacked
        array differ in dtype, or the table does not fit the template.
    """
    rows = _resolve(table, template)
    check_names((source for row in rows.values() for source in row.sources), theirs)
    out = {}
    for name, row in rows.items():
        shape = tuple(template[name].shape)
        part = shape[1:] if row.stacked else shape
        first = theirs[row.sources[0]]
        if _moved(row.layout.load, first.shape, config) != part:
            raise UserError(f"{row.sources[0]} has shape {first.shape}, which {name} {part} cannot take")
        for source in row.sources:
            _check_array(source, theirs[source], first, part, name)
        parts = tuple(_reader(row.layout.load, theirs[source].read, config) for source in row.sources)
        out[name] = LazyArray(shape, first.dtype, parts, row.stacked)
    return out


def export_plan(table: Sequence[Rule], ours: Mapping[str, LazyArray], config: Any) -> dict[str, LazyArray]:
    """Their named arrays from ours; the inverse of `import_plan`, nothing is read yet.

    Raises:
      UserError: the table does not fit our names.
    """
    out = {}
    for name, row in _resolve(table, ours).items():
        array = ours[name]
        shape = _moved(row.layout.save, array.shape[1:] if row.stacked else array.shape, config)
        if shape is None:
            raise UserError(f"{name} has shape {array.shape}, which {row.sources[0]} cannot take")
        readers = array.entries() if row.stacked else (array.read,)
        for source, read in zip(row.sources, readers, strict=True):
            out[source] = LazyArray(shape, array.dtype, (_reader(row.layout.save, read, config),))
    return out


def _reader(move: Move, read: Callable[[], np.ndarray], config: Any) -> Callable[[], np.ndarray]:
    return lambda: move(read(), config)


def load_named(
    table: Sequence[Rule], theirs: Mapping[str, Any], template: Mapping[str, Any], config: Any
) -> dict[str, np.ndarray]:
    """`import_plan`, read."""
    return {name: x.read() for name, x in import_plan(table, as_lazy(theirs), template, config).items()}


def save_named(table: Sequence[Rule], ours: Mapping[str, Any], config: Any) -> dict[str, np.ndarray]:
    """`export_plan`, read."""
    plan = export_plan(table, as_lazy(ours), config)
    return {name: np.asarray(x.read(), order="C") for name, x in plan.items()}


def import_module(template: M, table: Sequence[Rule], weights: Mapping[str, Any], config: Any) -> M:
    """A network from a state dict of arrays, in host memory and their dtype; `export_module` is its inverse.

    Args:
      template: the network with shapes in place of arrays, as its `abstract_...` makes it from the config.
      table: of the layout that the weights come in.
      weights: name -> array (NumPy's, or anything `np.asarray` takes).
      config: the network's; the state dict must fit it exactly.

    Raises:
      UserError: the state dict does not fit.
    """
    return from_named(template, load_named(table, weights, named_leaves(template), config))


def export_module(table: Sequence[Rule], module: Any) -> dict[str, np.ndarray]:
    """The state dict that `import_module` reads back; works on anything shaped like a network, gradients too."""
    return save_named(table, named_leaves(module), module.config)


def fingerprint(arrays: Mapping[str, LazyArray]) -> str:
    """16 hex digits of names, shapes, dtypes and the first bytes of every array's first part: cheap, layout-free."""
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.shape} {x.dtype.name} ".encode())
        digest.update(x.parts[0]().ravel()[: SAMPLE // x.dtype.itemsize].tobytes())
    return digest.hexdigest()[:16]
