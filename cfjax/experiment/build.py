"""`build`: a config becomes an `Experiment`, once; training, plans and preview samples see no ConfigDict."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax.core.cli import keys_of
from cfjax.core.errors import UserError
from cfjax.core.precision import to_record
from cfjax.core.sharding import make_mesh
from cfjax.experiment.adapters import BASE, adapted, lora_records
from cfjax.experiment.data import Data, DataSource, data_of
from cfjax.experiment.lora import LORA
from cfjax.experiment.networks import (
    CodecRole,
    NetworkRole,
    Role,
    check_pictures,
    check_roles,
    networks_in,
    roles_of,
    sized,
)
from cfjax.experiment.reference import apply_reference, unused_keys
from cfjax.experiment.stage import (
    Objective,
    blocks_of,
    objective_of,
    optimizers_of,
    sampler_of,
    sampling_blocks,
    stage_of,
)
from cfjax.memory.names import blocks_record
from cfjax.models.wan import Wan
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig
from cfjax.objectives.stage import Stage
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.training.loop import Schedule
from cfjax.training.observe import trace_window


@dataclass(frozen=True)
class Preview:
    """What a run samples while it trains.

    Attributes:
      clips: of the toy, in the "samples" video.
      guard: whether samples are measured and warned about.  prompts, seeds: how many of them.
      world: decodes Wan latents; "" is the one that the dataset was made in.
    """

    clips: int
    guard: bool
    prompts: int
    seeds: int
    world: str


@dataclass(frozen=True)
class Experiment:
    """A training stage with everything that it depends on.

    Attributes:
      stage: losses by trained role, cadence, averages.  objective: the choices that the losses were made from.
      blocks: the block layout of the causal networks.  sampling_blocks: the sampler's; None for a bidirectional one.
      roles: every network by name, and the frozen codec where the objective needs one.
      optimizers: by trained role.
      mesh: axis -> size.  trace: iterations [first, end) to profile.
      accept_changes: whether a resumed run may go on with settings that change its meaning (`experiment.resume`).
      config: the config as plain values, for records.  given: its keys that the command line set.
      used_keys: its keys that have an effect, as advice may name them.
    """

    stage: Stage
    objective: Objective
    blocks: Blocks
    sampler: FewStep | ManyStep
    sampling_blocks: Blocks | None
    roles: Mapping[str, Role]
    optimizers: Mapping[str, optax.GradientTransformation]
    data: DataSource
    schedule: Schedule
    preview: Preview
    mesh: Mapping[str, int]
    seed: int
    trace: tuple[int, int] | None
    accept_changes: bool
    config: Mapping[str, Any]
    given: frozenset[str]
    used_keys: frozenset[str]

    @property
    def networks(self) -> dict[str, NetworkRole]:
        """The roles that are networks."""
        return networks_in(self.roles)

    @property
    def frozen(self) -> list[str]:
        """The names of the roles that are not trained."""
        return [name for name in self.roles if name not in self.stage.losses]

    def accumulate(self, role: str) -> int:
        """Microbatches per update of a trained role."""
        return self.schedule.accumulate.get(role, 1)

    def with_codec(self, data: Data) -> "Experiment":
        """The same experiment, its frozen codec (if it has one) opened from the dataset's world.

        Raises:
          UserError: see `CodecRole.opened`.
        """
        opened = {name: role.opened(data) for name, role in self.roles.items() if isinstance(role, CodecRole)}
        return replace(self, roles={**self.roles, **opened})

    def with_sizes(self, models: Mapping[str, Any] | None = None) -> "Experiment":
        """The same experiment, its networks as large as the weights that they start from.

        Args:
          models: the networks in the record of a resumed run.

        Raises:
          UserError: see `NetworkRole.sized`; or networks that the stage cannot train (`networks.check_pictures`).
        """
        roles = sized(self.roles, models)
        check_pictures(self.stage.name, roles)
        return replace(self, roles=roles)

    def make_mesh(self) -> Mesh | None:
        """The mesh of all devices, or None for one device of one process."""
        sizes = self.mesh
        if jax.process_count() == 1 and all(size == 1 for size in sizes.values()):
            return None
        return make_mesh(data=sizes["data"], fsdp=sizes["fsdp"], context=sizes["context"], tensor=sizes["tensor"])

    def meta(self, data: Data, models: Mapping[str, Wan]) -> dict[str, Any]:
        """What a checkpoint records, so that other verbs need no config.

        Args:
          models: the networks by role.
        """
        made, records = data.dataset.manifest, lora_records(self.roles)
        begins = isinstance(self.objective, DiffusionConfig) and self.objective.image_start > 0
        below = {f"{role}{BASE}" for role in records}  # as they are where the record of the adapters says
        return {
            "stage": self.stage.name,
            "config": dict(self.config),
            "models": {role: to_record(model.config) for role, model in models.items() if role not in below},
            "blocks": blocks_record(self.blocks),
            "latent_shape": list(data.dataset.latent_shape),
            "records": len(data.dataset),
            "world": made.get("text_encoder", {}).get("world", ""),
            "world_path": made.get("world_path", ""),
            **({LORA: records} if records else {}),
            **({"image_start": True} if begins and self.sampling_blocks is None else {}),
        }


def build(c: ConfigDict, given: Collection[str] = ()) -> Experiment:
    """The experiment that a config describes; reads no file and allocates nothing.

    Args:
      given: keys that the command line set, which `c.reference` must not overrule.

    Raises:
      UserError: an unknown stage, something missing, or a value that it cannot have.
    """
    c = apply_reference(c, given)
    stage, roles = adapted(c, stage_of(c), roles_of(c))
    check_roles(stage, roles)
    return Experiment(
        stage=stage,
        objective=objective_of(c),
        blocks=blocks_of(c),
        sampler=sampler_of(c),
        sampling_blocks=sampling_blocks(c),
        roles=roles,
        optimizers=optimizers_of(c, stage),
        data=data_of(c),
        schedule=schedule_of(c),
        preview=preview_of(c),
        mesh=c.mesh.to_dict(),
        seed=c.seed,
        trace=trace_window(c.profile),
        accept_changes=c.accept_changes,
        config=c.to_dict(),
        given=frozenset(given),
        used_keys=frozenset(keys_of(c).keys() - unused_keys(c)),
    )


def schedule_of(c: ConfigDict) -> Schedule:
    """How long a run is, and how often it logs, saves and samples."""
    return Schedule(
        steps=c.steps,
        log_every=c.log_every,
        save_every=c.save_every,
        sample_every=c.sample_every,
        accumulate={role: c.optim[role].accumulate for role in c.optim},
        keep=c.keep,
        checksums=c.checksums,
        loss_growth=c.loss_growth,
        stall_seconds=c.stall_seconds,
        progress=c.progress,
    )


def preview_of(c: ConfigDict) -> Preview:
    """What is sampled while training.

    Raises:
      UserError: guard.prompts or guard.seeds are not positive.
    """
    if c.guard.enabled and min(c.guard.prompts, c.guard.seeds) < 1:
        raise UserError(f"guard.prompts={c.guard.prompts}, guard.seeds={c.guard.seeds}: use 1 or more")
    return Preview(c.sample_clips, c.guard.enabled, c.guard.prompts, c.guard.seeds, c.guard.world)
