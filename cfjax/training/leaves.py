"""A train state as the flat dict of named arrays that a checkpoint holds, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.tree import from_named, named_leaves


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flatten(tree: Any) -> dict[str, Any]:
    """Named leaves with PRNG keys as their uint32 data."""
    return {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named_leaves(tree).items()}


def unflatten(template: Any, named: Mapping[str, jax.Array]) -> Any:
    """`template` filled with restored arrays, keys rewrapped, and left uncommitted where the template's leaves are."""
    filled = dict(named)
    for name, leaf in named_leaves(template).items():
        if not getattr(leaf, "committed", True):
            filled[name] = jnp.asarray(np.array(filled[name]))
        if _is_key(leaf):
            filled[name] = jax.random.wrap_key_data(filled[name], impl=jax.random.key_impl(leaf))
    return from_named(template, filled)


def host_copy(leaf: jax.Array) -> jax.Array:
    """A copy on the host: on CPU, `np.asarray` aliases the device buffer, which the next step donates."""
    on_cpu = all(device.platform == "cpu" for device in leaf.devices())
    return jnp.copy(leaf) if on_cpu else leaf


def check_leaves(folder: Path, wanted: Mapping[str, Any], saved: Mapping[str, Any], *, whole: bool) -> None:
    """UserError unless every wanted leaf was saved with its shape (and, for `whole`, nothing else was)."""
    missing = sorted(wanted.keys() - saved.keys())
    extra = sorted(saved.keys() - wanted.keys()) if whole else []
    if missing or extra:
        raise UserError(
            f"{folder}: the checkpoint does not fit this config: missing {missing[:3]}, left over {extra[:3]}"
        )
    for name, leaf in wanted.items():
        if list(leaf.shape) != list(saved[name]):
            raise UserError(f"{folder}: {name} has shape {tuple(saved[name])}, this config needs {tuple(leaf.shape)}")
