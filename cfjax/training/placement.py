"""Shardings of a train state: weights by the tables of `core.sharding`, and everything shaped like them likewise."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from cfjax.core.errors import UserError
from cfjax.core.sharding import activation_spec, on_mesh, place, replicated, shardings
from cfjax.core.tree import map_named, named_leaves
from cfjax.nn.frames import kv_axes
from cfjax.training.state import TrainState

FEW = 16  # elements of an optimiser's constants, such as Muon's three coefficients: on every device


def state_shardings(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """The sharding of every leaf: averages and optimiser states like their weights; small constants are replicated.

    Raises:
      UserError: an optimiser's array has no weight's shape, so that its sharding is unknown.
    """
    weights = {role: named_leaves(model) for role, model in state.params.items()}
    by_role = {role: shardings(model, mesh) for role, model in state.params.items()}

    carried = {} if state.rollout is None else named_leaves(rollout_shardings(state.rollout, mesh))

    def where(name: str, leaf: Any) -> NamedSharding:
        part, _, rest = name.partition("/")
        if part == "rollout":
            return carried[rest]
        role, _, rest = rest.partition("/")
        if part in ("params", "ema"):
            return by_role[role][rest]
        if part == "opt":
            for own, sharding in by_role[role].items():
                if rest.endswith(f"/{own}") and leaf.shape == weights[role][own].shape:
                    return sharding
        if leaf.size > FEW:
            raise UserError(f"{name} {leaf.shape} is shaped like no weight of its role; its sharding is unknown")
        return replicated(mesh)

    return map_named(where, state)


def rollout_shardings(rollout: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of what losses carry: rows of a batch, and keys and values as in a KV cache; small arrays on every
    device.
    """
    with on_mesh(mesh):

        def where(name: str, leaf: Any) -> NamedSharding:
            axes: tuple[str | None, ...] = (None,) * leaf.ndim
            if leaf.ndim == 6:  # [L, B, slots, T, N, K], or what a codec makes of it
                axes = (None, *kv_axes(leaf.shape[1:]))
            elif leaf.ndim > 1:
                at = 1 if name.startswith("memory/") else 0
                axes = (*(None,) * at, "batch", *(None,) * (leaf.ndim - at - 1))
            return NamedSharding(mesh, activation_spec(leaf.shape, axes))

        return map_named(where, rollout)


def place_state(state: TrainState, mesh: Mesh | None) -> TrainState:
    """The state on the mesh; each process holds all of `state` and provides its own shards.

    Without a mesh every leaf is committed to the device where it is. Weights that were read from files are, fresh
    arrays are not, and all that an update returns is where one of its arguments was: it would be compiled for the first
    iteration, again for the second, and a third time where a run goes on.
    """
    if mesh is None:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)
    return jax.tree.map(place, state, state_shardings(state, mesh))


def placement_of(state: TrainState) -> TrainState | None:
    """The shardings of a state on a mesh, for `make_update`; None for one on a single device."""
    leaves = jax.tree.leaves(state)
    on_mesh = all(isinstance(leaf.sharding, NamedSharding) for leaf in leaves)
    return jax.tree.map(lambda leaf: leaf.sharding, state) if on_mesh else None
