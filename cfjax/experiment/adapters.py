"""Roles that train adapters beside a frozen network (`models.lora`), and losses that see the two as one network.

A role with `lora.rank` above 0 becomes two: ROLE, whose trained leaves are the adapters, and the frozen ROLE_base,
where ROLE starts from, stored as `storage` and `offload` say. Where another frozen role is that very network, stored
and computed alike (a critic's teacher, say), it is the one below, and no weights are held twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.core.sharding import place
from cfjax.experiment.data import Shapes
from cfjax.experiment.lora import lora_record, records_of
from cfjax.experiment.networks import NetworkRole, Role
from cfjax.models.lora import LoraConfig, abstract_lora, attach, make_lora
from cfjax.models.weight_storage import with_shardings
from cfjax.objectives.stage import Batch, Models, Stage
from cfjax.training.loop import SampleFn
from cfjax.training.metrics import EventWriter
from cfjax.training.state import TrainState

BASE = "_base"


@dataclass(frozen=True)
class LoraRole(NetworkRole):
    """The trained adapters of a network.

    Attributes:
      settings: the adapters'.
      below: the name of the frozen role that they are beside.
    """

    settings: LoraConfig
    below: str

    def template(self, shapes: Shapes, mesh: Mesh | None = None) -> Any:
        """The adapters as shapes, float32, each with its sharding."""
        return with_shardings(abstract_lora(self.network(shapes), self.settings), mesh, offload=False)

    def initial(self, shapes: Shapes, seed: int, mesh: Mesh | None = None) -> Any:
        """The adapters at the start, placed: the network is the frozen one."""
        made = make_lora(self.network(shapes), self.settings, self._key(seed))
        if mesh is None:
            return made
        return jax.tree.map(lambda x, like: place(x, like.sharding), made, self.template(shapes, mesh))

    def empty(self, shapes: Shapes, mesh: Mesh | None = None) -> Any:
        """The adapters, all zeros, placed: for a run that resumes with a checkpoint's."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self.template(shapes, mesh))


def lora_settings(name: str, c: ConfigDict) -> LoraConfig | None:
    """`roles.NAME.lora`; None where its rank is 0, or an older config has none.

    Raises:
      UserError: a value that it cannot have.
    """
    if "lora" not in c or not c.lora.rank:
        return None
    try:
        return LoraConfig(c.lora.rank, c.lora.alpha or float(c.lora.rank), c.lora.targets)
    except UserError as error:
        raise UserError(f"roles.{name}.{error}") from None


def adapted(c: ConfigDict, stage: Stage, roles: Mapping[str, Role]) -> tuple[Stage, dict[str, Role]]:
    """The stage and its roles, those with adapters in two, and losses that see them as one.

    Raises:
      UserError: adapters on a role that is not trained, has a classifier branch, or starts from nothing.
    """
    found = {name: lora_settings(name, c.roles[name]) for name in c.roles}
    out: dict[str, Role] = dict(roles)
    for name, settings in found.items():
        role = roles[name]
        if settings is None or not isinstance(role, NetworkRole):
            continue
        if name not in stage.losses:
            raise UserError(f"roles.{name}.lora.rank={settings.rank}: {name} is frozen; leave it at 0")
        if role.branch is not None:
            raise UserError(f"roles.{name}.lora.rank={settings.rank}: a critic with a classifier branch has no LoRA")
        if not role.init:
            raise UserError(f"roles.{name}.lora.rank={settings.rank}: name the weights below it by roles.{name}.init")
        if f"{name}{BASE}" in roles:
            raise UserError(f"roles.{name}{BASE}: the network below roles.{name}.lora has this name; use another")
        below = _below(role, stage, out)
        out.setdefault(below, replace(role, name=below))
        values = {field: getattr(role, field) for field in NetworkRole.__dataclass_fields__}
        out[name] = LoraRole(**{**values, "storage": "float32", "offload": False}, settings=settings, below=below)
    below_of = bases_of(out)
    if not below_of:
        return stage, out
    return replace(stage, losses={role: _seeing_whole(loss, below_of) for role, loss in stage.losses.items()}), out


def _below(role: NetworkRole, stage: Stage, roles: Mapping[str, Role]) -> str:
    """The frozen role with the same weights, stored and used in the same way, if there is one; else ROLE_base."""
    same = lambda other: replace(other, name=role.name, init_stages=role.init_stages) == role
    frozen = ((name, other) for name, other in roles.items() if name not in stage.losses)
    found = (name for name, other in frozen if type(other) is NetworkRole and same(other))
    return next(found, f"{role.name}{BASE}")


def _seeing_whole(loss: Callable[..., Any], below_of: Mapping[str, str]) -> Callable[..., Any]:
    """A loss of whole networks, as one of adapters and what is below them."""

    def of_both(models: Models, batch: Batch, key: jax.Array, *rollout: Any) -> Any:
        return loss(attached(models, below_of), batch, key, *rollout)

    return of_both


def attached(models: Models, below_of: Mapping[str, str]) -> dict[str, Any]:
    """Models by role, those with adapters, and their averages, as whole networks.

    Args:
      below_of: role -> the frozen role below its adapters.
    """
    out = dict(models)
    for name, below in below_of.items():
        for which in (name, f"{name}_ema"):
            if which in out:
                out[which] = attach(models[below], out[which])
    return out


def bases_of(roles: Mapping[str, Role]) -> dict[str, str]:
    """The roles that train adapters -> the frozen roles below them."""
    return {name: role.below for name, role in roles.items() if isinstance(role, LoraRole)}


def lora_records(roles: Mapping[str, Role]) -> dict[str, Any]:
    """What a run's record says of its adapters, by role.

    Raises:
      UserError: the weights below are gone.
    """
    found = {name: role for name, role in roles.items() if isinstance(role, LoraRole)}
    return {name: lora_record(r.settings, r.init, r.init_role, r.init_ema) for name, r in found.items()}


def check_bases(roles: Mapping[str, Role], earlier: Mapping[str, Any], workdir: object) -> None:
    """Checks that a resumed run's adapters go on beside the weights that they were trained on.

    Args:
      earlier: the record of its checkpoint.

    Raises:
      UserError: they do not.
    """
    then = records_of(earlier, str(workdir))
    for name, now in lora_records(roles).items():
        if name in then and then[name]["base"]["hash"] != now["base"]["hash"]:
            raise UserError(
                f"--workdir={workdir}: the LoRA of {name} was trained on other weights than"
                f" roles.{name}.init={now['base']['init']!r} now holds; bring those back there"
            )


def sampling_whole(
    sample: Callable[[TrainState, int, EventWriter], None] | None, frozen: Models, below_of: Mapping[str, str]
) -> SampleFn | None:
    """What samples states of whole networks, for states of adapters."""
    if sample is None or not below_of:
        return sample

    def of_both(state: TrainState, step: int, writer: EventWriter) -> None:
        averages = {f"{name}_ema": average for name, average in state.ema.items()}
        whole = attached({**frozen, **state.params, **averages}, below_of)
        params = {name: whole[name] for name in state.params}
        ema = {name: whole[f"{name}_ema"] for name in state.ema}
        sample(replace(state, params=params, ema=ema), step, writer)

    return of_both
