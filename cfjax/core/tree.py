"""Named leaves and ordered rule tables, used for sharding, freezing, weight decay and conversion."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from cfjax.core.errors import UserError

T = TypeVar("T")
IsLeaf = Callable[[Any], bool]


def _name(path: Sequence[Any]) -> str:
    """'blocks/self_attn/q/kernel' from a key path; the `.value` that nnx adds below a Param is dropped."""
    kept = [key for key in path if getattr(key, "name", "") != "value"]
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in kept)


def named_leaves(tree: Any, is_leaf: IsLeaf | None = None) -> dict[str, Any]:
    """The leaves of a pytree by slash-separated name, in flattening order; `is_leaf` as in `jax.tree.map`."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def map_named(fn: Callable[[str, Any], Any], tree: Any, is_leaf: IsLeaf | None = None) -> Any:
    """Like `jax.tree.map`, with the leaf's name as the first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_name(path), leaf), tree, is_leaf=is_leaf)


def from_named(template: Any, named: Mapping[str, Any]) -> Any:
    """Fills `template`'s structure with the arrays of `named`; strict both ways, shapes included.

    Raises:
      UserError: a leaf is missing, left over, or of another shape.
    """
    check_fit(named_leaves(template), named)
    return map_named(lambda name, _: named[name], template)


def check_fit(expected: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Raises UserError where names or shapes differ."""
    missing, extra = sorted(expected.keys() - named.keys()), sorted(named.keys() - expected.keys())
    if missing or extra:
        raise UserError(f"weights do not fit the model: missing {missing[:3]}, left over {extra[:3]}")
    for name, leaf in expected.items():
        if tuple(leaf.shape) != tuple(named[name].shape):
            raise UserError(f"weights do not fit the model: {name} is {named[name].shape}, expected {leaf.shape}")


def match(rules: Sequence[tuple[str, T]], names: Iterable[str]) -> dict[str, T]:
    """Gives every name the value of the first rule whose regex matches it fully.

    Raises:
      UserError: a name matches no rule, or a rule is the first match of no name.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    out: dict[str, T] = {}
    used: set[int] = set()
    for name in names:
        hit = next((i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(name)), None)
        if hit is None:
            raise UserError(f"no rule matches {name!r}; add one to the table")
        used.add(hit)
        out[name] = compiled[hit][1]
    for i, (pattern, _) in enumerate(compiled):
        if i not in used:
            raise UserError(f"rule {pattern.pattern!r} matches nothing; remove it or correct its regex")
    return out
