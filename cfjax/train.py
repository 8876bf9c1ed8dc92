"""`cfjax train`: one stage of an experiment. To resume, run the same command again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cfjax.core.cli import given_keys, parse
from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import check_checkpoints
from cfjax.core.sharding import batch_rows, on_mesh, place, place_rows, replicated
from cfjax.core.topology import GIB, peak_flops
from cfjax.data.latents import LatentIterator, make_iterator
from cfjax.data.tolerant import TolerantDataset
from cfjax.experiment.adapters import bases_of, check_bases, sampling_whole
from cfjax.experiment.build import Experiment, build
from cfjax.experiment.data import Data
from cfjax.experiment.networks import check_blocks, check_host_memory, same_blocks
from cfjax.experiment.notes import differing_levels, idle_devices, idle_windows, other_sizes
from cfjax.experiment.preview import make_monitor
from cfjax.experiment.programs import rollout_before, stage_memory, whole_flops
from cfjax.experiment.resume import changes, checkpoint_of, report_changes, report_dataset
from cfjax.training.loop import RunOutput, fit
from cfjax.training.memory import check_memory, device_bytes, memory_limit, memory_table
from cfjax.training.metrics import EventWriter
from cfjax.training.observe import Work
from cfjax.training.placement import place_state
from cfjax.training.state import TrainState, init_state
from cfjax.training.step import has_batch_axis

T = TypeVar("T")

DESCRIPTION = """Trains one stage: bidirectional, ar_diffusion, ode_regression, consistency or dmd, as the config says.
Checkpoints, TensorBoard events and metrics.jsonl go to the workdir. To resume, run the same command again."""


def main(argv: Sequence[str]) -> int:
    """Parses the command line and trains."""
    c, workdir, _ = parse("train", argv, description=DESCRIPTION, bucket=True)
    check_checkpoints(workdir)
    with holding(workdir):
        train(build(c, given_keys(argv)), workdir)
    return 0


def train(e: Experiment, workdir: Path) -> TrainState:
    """Runs an experiment's stage in `workdir` to its last step, from its newest checkpoint if it has one.

    Raises:
      UserError: missing data, a checkpoint from which this experiment cannot resume, or a non-finite loss.
    """
    check_host_memory(e.roles)
    earlier = _earlier(e, workdir)
    e = e.with_sizes(earlier and earlier.get("models"))
    data = _first_process_first(e.data.open)
    if earlier:
        report_dataset(earlier, data, workdir, accept=e.accept_changes)
    for role in e.networks.values():
        role.check_fit(data.shapes, data.dataset.path)
    e = e.with_codec(data)
    check_mesh(e, data.dataset.latent_shape)
    mesh = e.make_mesh()
    _say_start(e, data, workdir, mesh)
    models = _models(e, data, mesh, going_on=earlier is not None)
    monitor = make_monitor(e, data, workdir, mesh)  # reads a decoder for its stride, before more is allocated
    carried = rollout_before(e, data.shapes, mesh)
    trained = {name: models[name] for name in e.stage.losses}
    state = init_state(e.stage, trained, e.optimizers, e.seed, rollout=carried)
    rows = batch_rows(mesh, e.data.batch_size) if mesh else range(e.data.batch_size)
    meta, frozen = e.meta(data, {name: models[name] for name in e.networks}), {name: models[name] for name in e.frozen}
    del models, trained  # the state holds copies of those that train
    with on_mesh(mesh), EventWriter(workdir, enabled=jax.process_index() == 0) as writer:
        writer.config(0, dict(e.config))
        return fit(
            e.stage,
            e.optimizers,
            place_state(state, mesh),
            frozen,
            _batches(e, data, rows),
            replace(e.schedule, sample_first=monitor is not None and monitor.wants_start),
            RunOutput(workdir, writer, meta, work_of(e, data)),
            put_batch=partial(place_batch, mesh=mesh, rows=rows, batch_size=e.data.batch_size),
            sample_fn=sampling_whole(monitor, frozen, bases_of(e.roles)),
            going_on=earlier is not None,
        )


def _earlier(e: Experiment, workdir: Path) -> dict[str, Any] | None:
    """The record of the checkpoint from which `workdir` resumes, if any; reports what changed since.

    Raises:
      UserError: weights of other blocks, there or where a role starts from; a change that needs accept_changes, or is
        not allowed.
    """
    earlier = checkpoint_of(workdir, e.stage.name)
    if earlier is None:
        check_blocks(e.blocks, e.roles.values())
        return None
    same_blocks(e.blocks, earlier, f"--workdir={workdir}: the run in it", "name another workdir")
    check_blocks(e.blocks, [e.roles[name] for name in e.frozen])  # trained roles resume with their own weights
    found = changes(earlier["config"], e.config, e.stage.losses, e.given)
    report_changes(found, earlier, workdir, accept=e.accept_changes)
    check_bases(e.roles, earlier, workdir)
    return earlier


def _say_start(e: Experiment, data: Data, workdir: Path, mesh: Mesh | None) -> None:
    """Says what will run and what its weights take, and notes settings that are probably not meant.

    Raises:
      UserError: the weights do not fit into a device's memory.
    """
    memory, clips = stage_memory(e, data.shapes, mesh), len(data.dataset)
    steps = counted(e.schedule.steps, "step")
    say(f"{e.stage.name}: {counted(clips, 'clip')}, {steps} in {workdir}; GiB per device, before activations:")
    say("\n".join(memory_table(memory)))
    if carried := device_bytes(rollout_before(e, data.shapes, mesh, abstract=True)):
        say(f"the rollout, which goes on from update to update: {carried / GIB:,.4f}")
    check_memory(memory, memory_limit(jax.local_devices()[0]))
    windows = idle_windows(e, data.dataset.latent_shape[0])
    for note in filter(None, (differing_levels(e), idle_devices(mesh, jax.local_devices()), *windows, *other_sizes(e))):
        say(note)


def _models(e: Experiment, data: Data, mesh: Mesh | None, *, going_on: bool) -> dict[str, Any]:
    """Every role's weights, placed; those that train are empty where a checkpoint will fill them."""
    empty = e.stage.losses if going_on else ()
    return {
        name: e.networks[name].empty(data.shapes, mesh) if name in empty else role.initial(data.shapes, e.seed, mesh)
        for name, role in e.roles.items()
    }


def _batches(e: Experiment, data: Data, rows: Sequence[int]) -> LatentIterator:
    """The iterator over batches, of which this process reads `rows`."""
    log = say if jax.process_index() == 0 else lambda _: None
    return make_iterator(data.dataset, e.data.batch_size, e.seed, rows=rows, accept_changes=e.accept_changes, log=log)


def work_of(e: Experiment, data: Data) -> Work:
    """Figures for the performance curves; FLOPs are counted where the devices' peak is known."""
    shape = data.dataset.latent_shape
    tokens = e.data.batch_size * shape[0] * e.networks["student"].base.tokens_per_frame(*shape[1:3])
    peak = sum(peak_flops(device.device_kind) for device in jax.devices())
    flops = {role: whole_flops(e, data.shapes, role, remat=False) for role in e.stage.losses} if peak else {}
    tolerant = data.dataset if isinstance(data.dataset, TolerantDataset) else None
    counts = (lambda: {"data/broken_records": float(len(tolerant.corrupt))}) if tolerant else dict
    return Work(float(tokens), flops, peak, e.trace, counts)


def _first_process_first(make: Callable[[], T]) -> T:
    """What `make` returns, called by the first process before the others: it may write files that they read."""
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("cfjax_in_turn")
        return make()
    out = make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("cfjax_in_turn")
    return out


def check_mesh(e: Experiment, latent_shape: Sequence[int]) -> None:
    """Tokens of a frame divide over the context axis.

    Raises:
      UserError: those of a role's frames do not.
    """
    context = e.mesh["context"]
    for name, role in e.networks.items():
        tokens = role.base.tokens_per_frame(*latent_shape[1:3])
        if tokens % context:
            raise UserError(f"mesh.context={context} must divide the {tokens} tokens per frame of roles.{name}")


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, rows: Sequence[int], batch_size: int
) -> dict[str, jax.Array]:
    """The global batch, of which this process read `rows`; leaves without a batch axis on every device."""

    def leaf(name: str, local: np.ndarray) -> jax.Array:
        if mesh is None:
            return jax.numpy.asarray(local)
        if has_batch_axis(name):
            return place_rows(rows, np.asarray(local), mesh, batch_size)
        return place(np.asarray(local), replicated(mesh))

    return {name: leaf(name, local) for name, local in batch.items()}
