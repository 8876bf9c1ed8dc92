"""Memory of every role of a stage on each device, from shapes and shardings, before anything is allocated.

Weights, optimiser states and averages are counted exactly, and so are the gradients of the one role that is being
updated. Activations and the compiler's temporaries come on top; only the compiler knows these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from cfjax.core.errors import UserError
from cfjax.core.offload import is_on_host
from cfjax.core.quantize import Quantized, is_quantized
from cfjax.core.tree import named_leaves
from cfjax.objectives.stage import Stage
from cfjax.training.placement import state_shardings
from cfjax.training.state import TrainState

GIB = 1 << 30


@dataclass(frozen=True)
class RoleMemory:
    """One role's share of a device, in bytes.

    parameters: their number, of the whole network.  stored: the dtype of most.  host: bytes in host memory instead.
    gradients: only while the role is updated.
    """

    role: str
    parameters: int
    stored: str
    weights: int
    host: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0

    @property
    def persistent(self) -> int:
        """Bytes on the device between updates."""
        return self.weights + self.optimizer + self.ema

    @property
    def device(self) -> int:
        """Bytes on the device while this role is updated."""
        return self.persistent + self.gradients


def abstract_state(
    stage: Stage,
    models: Mapping[str, Any],
    txs: Mapping[str, optax.GradientTransformation],
    mesh: Mesh | AbstractMesh | None = None,
) -> TrainState:
    """`init_state` without arrays: shapes and dtypes, and on a mesh the shardings that the real one has.

    Args:
      models: role -> network of `jax.ShapeDtypeStruct`s, at least of the trained roles.
    """
    params = {role: models[role] for role in stage.losses}
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(
        step=step,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        params=params,
        opt={role: jax.eval_shape(txs[role].init, named_leaves(params[role])) for role in stage.losses},
        ema={role: jax.tree.map(lambda x: x.update(dtype=jnp.dtype("float32")), params[role]) for role in stage.ema},
    )
    if mesh is None:
        return state
    return jax.tree.map(lambda x, where: x.update(sharding=where), state, state_shardings(state, mesh))


def device_bytes(tree: Any, *, on_host: bool = False) -> int:
    """Bytes of arrays or shapes in the memory of one device, or of its host; a leaf without a sharding counts fully."""

    def one(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree) if is_on_host(leaf) == on_host)


def _stored(model: Any) -> str:
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(model, is_leaf=is_quantized):
        if isinstance(leaf, Quantized):
            return "int8"
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.size
    return max(sizes, key=lambda name: sizes[name])


def count_weights(model: Any) -> int:
    """Number of parameters; a quantised kernel's scales are none."""
    leaves = jax.tree.leaves(model, is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def role_memory(
    stage: Stage,
    models: Mapping[str, Any],
    txs: Mapping[str, optax.GradientTransformation],
    mesh: Mesh | AbstractMesh | None,
    *,
    accumulate: Mapping[str, int],
) -> list[RoleMemory]:
    """Every role's share of one device.

    Args:
      models: role -> network as it will be stored: `jax.ShapeDtypeStruct`s with shardings.
      mesh: None for one device.
      accumulate: microbatches per update of the trained roles; more than one keeps their sum beside each gradient.
    """
    state, rows = abstract_state(stage, models, txs, mesh), []
    for role, model in models.items():
        trained = role in stage.losses
        weights = device_bytes(model)
        rows.append(
            RoleMemory(
                role=role,
                parameters=count_weights(model),
                stored=_stored(model),
                weights=weights,
                host=device_bytes(model, on_host=True),
                gradients=weights * (2 if accumulate[role] > 1 else 1) if trained else 0,
                optimizer=device_bytes(state.opt[role]) if trained else 0,
                ema=device_bytes(state.ema[role]) if role in state.ema else 0,
            )
        )
    return rows


def needed_bytes(rows: Sequence[RoleMemory]) -> int:
    """Bytes that all roles need at least on a device: everything between updates, and the largest gradients."""
    return sum(row.persistent for row in rows) + max((row.gradients for row in rows), default=0)


def memory_table(rows: Sequence[RoleMemory]) -> list[str]:
    """Lines for a terminal, GiB per device."""
    head = ("role", "parameters", "stored as", "weights", "gradients", "optimizer", "EMA", "sum", "on host")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        sizes = (row.weights, row.gradients, row.optimizer, row.ema, row.device, row.host)
        cells.append((row.role, f"{row.parameters / 1e6:,.2f} M", row.stored, *(_gib(size) for size in sizes)))
    total = [sum(getattr(row, field) for row in rows) for field in ("weights", "optimizer", "ema", "host")]
    most = max((row.gradients for row in rows), default=0)
    cells.append(("at once", "", "", *map(_gib, (total[0], most, total[1], total[2], needed_bytes(rows), total[3]))))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    pad = [str.ljust, str.rjust, str.ljust, *[str.rjust] * 6]
    return ["  ".join(f(text, width) for f, text, width in zip(pad, line, widths, strict=True)) for line in cells]


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}" if size >= GIB / 100 or not size else f"{size / GIB:.4f}"


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that programs may use on this device, if its runtime reports it (TPU, GPU)."""
    stats = device.memory_stats()
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def check_memory(rows: Sequence[RoleMemory], limit: int | None) -> None:
    """Checks that the roles fit into memory.

    Raises:
      UserError: they need more than the `limit` of a device (None: unknown).
    """
    needed = needed_bytes(rows)
    if limit is not None and needed > limit:
        frozen = max((row for row in rows if not row.gradients), key=lambda row: row.weights, default=None)
        large = frozen is not None and frozen.weights > needed // 100
        hint = f", or set roles.{frozen.role}.storage='int8' or .offload=True" if frozen and large else ""
        raise UserError(
            f"the roles hold {needed / GIB:.1f} GiB per device, which has {limit / GIB:.1f} GiB; "
            f"shard them over more devices with mesh.fsdp{hint}"
        )
