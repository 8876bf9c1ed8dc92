"""`cfjax train`: one stage of an experiment. To resume, run the same command again."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax.core.cli import given_keys, parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import check_checkpoints
from cfjax.core.sharding import batch_rows, make_mesh, on_mesh, place, place_rows, replicated
from cfjax.core.topology import peak_flops
from cfjax.data.latents import LatentIterator, make_iterator
from cfjax.data.tolerant import TolerantDataset
from cfjax.experiment.config import (
    Data,
    codec_of,
    open_data,
    optimizers_of,
    run_meta,
    stage_of,
)
from cfjax.experiment.networks import (
    as_shapes,
    check_blocks,
    check_roles,
    empty_model,
    initial_model,
    same_blocks,
    stage_memory,
)
from cfjax.experiment.preview import make_monitor
from cfjax.experiment.reference import faithful
from cfjax.experiment.resume import changes, checkpoint_of, report_changes, report_dataset
from cfjax.models.codec import Codec
from cfjax.models.wan import Wan, preset
from cfjax.objectives.stage import Stage
from cfjax.plan import Shapes, whole_flops
from cfjax.training.loop import fit
from cfjax.training.memory import check_memory, memory_limit, memory_table
from cfjax.training.metrics import EventWriter
from cfjax.training.observe import Work, trace_window
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
        train(c, workdir, given=given_keys(argv))
    return 0


def train(c: ConfigDict, workdir: Path, *, given: Collection[str] = ()) -> TrainState:
    """Runs the stage of `c` in `workdir` to its last step, from its newest checkpoint if it has one.

    `given`: the keys that the command line set, which `c.reference` must not overrule.

    Raises:
      UserError: a bad config, missing data, a checkpoint that this config does not go on from, or a non-finite loss.
    """
    c = faithful(c, given)
    stage = stage_of(c)
    check_roles(c, stage)
    earlier = _earlier(c, stage, workdir, given)
    data = _in_turn(lambda: open_data(c))
    if earlier:
        report_dataset(earlier, data, workdir, accept=c.accept_changes)
    codec = codec_of(c, data)
    check_mesh(c, data.dataset.latent_shape)
    txs, mesh = optimizers_of(c, stage), mesh_of(c)
    memory = stage_memory(c, stage, txs, data.channels, data.text_width, mesh, codec=as_shapes(codec, mesh))
    say(f"{c.stage}: {len(data.dataset)} clips, {c.steps} steps in {workdir}; GiB per device, before activations:")
    say("\n".join(memory_table(memory)))
    check_memory(memory, memory_limit(jax.local_devices()[0]))
    windows = idle_windows(c, data.dataset.latent_shape[0])
    for note in filter(None, (differing_levels(c), idle_devices(mesh, jax.local_devices()), *windows)):
        say(note)
    models = _models(c, stage, data, mesh, going_on=earlier is not None)
    trained = {name: models[name] for name in stage.losses}
    frozen: dict[str, Any] = {name: model for name, model in models.items() if name not in stage.losses}
    if codec is not None:
        frozen["codec"] = jax.tree.map(partial(place, sharding=replicated(mesh)), codec) if mesh else codec
    monitor = make_monitor(c, data, workdir, mesh)
    rows = batch_rows(mesh, c.data.batch_size) if mesh else range(c.data.batch_size)
    state = init_state(stage, trained, txs, c.seed)
    with on_mesh(mesh), EventWriter(workdir, enabled=jax.process_index() == 0) as writer:
        writer.config(0, c.to_dict())
        return fit(
            stage,
            place_state(state, mesh) if mesh else state,
            frozen,
            _batches(c, data, rows),
            txs,
            steps=c.steps,
            workdir=workdir,
            log_every=c.log_every,
            save_every=c.save_every,
            keep=c.keep,
            checksums=c.checksums,
            loss_growth=c.loss_growth,
            accumulate={name: c.optim[name].accumulate for name in stage.losses},
            writer=writer,
            meta=run_meta(c, data, models),
            sample_fn=monitor,
            sample_every=c.sample_every,
            sample_first=monitor is not None and monitor.wants_start,
            progress=c.progress,
            stall_seconds=c.stall_seconds,
            work=work_of(c, stage, data, codec),
            put_batch=partial(place_batch, mesh=mesh, rows=rows, batch_size=c.data.batch_size),
            going_on=earlier is not None,
        )


def _earlier(c: ConfigDict, stage: Stage, workdir: Path, given: Collection[str]) -> dict[str, Any] | None:
    """The record of the checkpoint that `workdir` goes on from, if it has one; what `c` changes since then is told.

    Raises:
      UserError: weights of other blocks, there or where a role starts from; a change that needs a word or cannot be.
    """
    earlier = checkpoint_of(workdir, c.stage)
    if earlier is None:
        check_blocks(c)
        return None
    same_blocks(c, earlier, f"--workdir={workdir}: the run in it", "name another workdir")
    check_blocks(c, set(c.roles) - set(stage.losses))  # those that train go on with their own weights
    found = changes(earlier["config"], c, stage.losses, given)
    report_changes(found, earlier, workdir, accept=c.accept_changes)
    return earlier


def _models(c: ConfigDict, stage: Stage, data: Data, mesh: Mesh | None, *, going_on: bool) -> dict[str, Wan]:
    """Every role's network where it will rest; those that train are empty where a checkpoint will fill them."""
    return {
        name: empty_model(role, data, mesh)
        if going_on and name in stage.losses
        else initial_model(name, role, data, c.seed, mesh)
        for name, role in c.roles.items()
    }


def _batches(c: ConfigDict, data: Data, rows: Sequence[int]) -> LatentIterator:
    """The stream of batches, of which this process reads `rows`."""
    log = say if jax.process_index() == 0 else lambda _: None
    return make_iterator(data.dataset, c.data.batch_size, c.seed, rows=rows, accept_changes=c.accept_changes, log=log)


def work_of(c: ConfigDict, stage: Stage, data: Data, codec: Codec | None = None) -> Work:
    """What the curves of time need to know; FLOPs are counted where the devices' peak is known.

    Args:
      codec: the frozen role, where the stage needs it.

    Raises:
      UserError: `profile` is no window of iterations.
    """
    shape, window = data.dataset.latent_shape, trace_window(c.profile)
    tokens = c.data.batch_size * shape[0] * preset(c.roles.student.preset).tokens_per_frame(*shape[1:3])
    peak = sum(peak_flops(device.device_kind) for device in jax.devices())
    shapes = Shapes(shape, data.dataset.text_shape)
    count = partial(whole_flops, c, shapes, remat=False, codec=as_shapes(codec))
    flops = {role: count(role) for role in stage.losses} if peak else {}
    tolerant = data.dataset if isinstance(data.dataset, TolerantDataset) else None
    counts = (lambda: {"data/broken_records": float(len(tolerant.corrupt))}) if tolerant else dict
    return Work(float(tokens), flops, peak, window, counts)


def _in_turn(make: Callable[[], T]) -> T:
    """What `make` returns, called by the first process before the others: it may write files that they read."""
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("cfjax_in_turn")
        return make()
    out = make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("cfjax_in_turn")
    return out


def mesh_of(c: ConfigDict) -> Mesh | None:
    """The mesh of `c.mesh`, or None for one device of one process."""
    sizes = c.mesh.to_dict()
    alone = jax.process_count() == 1 and all(size == 1 for size in sizes.values())
    return None if alone else make_mesh(**sizes)


def idle_devices(mesh: Mesh | None, devices: Sequence[jax.Device]) -> str:
    """One line when accelerators of this process would have nothing to do; "" when not."""
    count = len(devices)
    if count == 1 or devices[0].platform == "cpu" or mesh is not None:
        return ""
    return f"note: the mesh has one place and {count} devices are here; --config.mesh.fsdp={count} uses them all"


def differing_levels(c: ConfigDict) -> str:
    """One line when a few-step student would sample at other levels than it is trained at; "" when not."""
    keys = [key for key in ("steps", "first_steps", "shift") if key in c.objective and c.sampler.kind == "few_step"]
    trained, sampled = ({key: c[part][key] for key in keys} for part in ("objective", "sampler"))
    if trained == sampled:
        return ""
    return f"note: objective trains at {trained}, but sampler (samples while training, cfjax generate) has {sampled}"


def idle_windows(c: ConfigDict, clip_frames: int) -> list[str]:
    """One line for a window that reaches further back than any video, and one for scores that see more than a clip."""
    shown, rolled = (c.objective.get(key, 0) for key in ("window_frames", "max_frames"))
    frames, out = rolled or clip_frames, []
    if c.blocks.window > frames:
        out.append(f"note: blocks.window={c.blocks.window} hides nothing: training videos have {frames} latent frames")
    if shown > clip_frames:
        out.append(
            f"note: objective.window_frames={shown} shows the scores more than the dataset's clips of {clip_frames} "
            "latent frames; it should be what they were trained on"
        )
    return out


def check_mesh(c: ConfigDict, latent_shape: Sequence[int]) -> None:
    """Frames divide over the context axis.

    Raises:
      UserError: the tokens of a role's frames do not.
    """
    for name, role in c.roles.items():
        tokens = preset(role.preset).tokens_per_frame(*latent_shape[1:3])
        if tokens % c.mesh.context:
            raise UserError(f"mesh.context={c.mesh.context} must divide the {tokens} tokens per frame of roles.{name}")


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
