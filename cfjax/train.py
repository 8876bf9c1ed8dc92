"""`cfjax train`: one stage of an experiment. To resume, run the same command again."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.sharding import batch_sharding, make_mesh, replicated
from cfjax.data.latents import make_iterator
from cfjax.experiment import (
    META_FILE,
    codec_of,
    open_data,
    optimizers_of,
    run_meta,
    stage_of,
)
from cfjax.monitor import make_monitor
from cfjax.roles import check_roles, initial_model, stage_memory
from cfjax.training.checkpoint import read_meta
from cfjax.training.loop import fit
from cfjax.training.memory import check_memory, memory_limit, memory_table
from cfjax.training.metrics import EventWriter
from cfjax.training.state import TrainState, init_state
from cfjax.training.step import has_batch_axis
from cfjax.world import asset

DESCRIPTION = """Trains one stage: bidirectional, ar_diffusion, ode_regression or dmd, as the config says.
Checkpoints, TensorBoard events and metrics.jsonl go to the workdir. To resume, run the same command again."""


def main(argv: Sequence[str]) -> int:
    """Parses the command line and trains."""
    c, workdir, _ = parse("train", argv, description=DESCRIPTION)
    train(c, workdir)
    return 0


def train(c: ConfigDict, workdir: Path) -> TrainState:
    """Runs the stage of `c` in `workdir` to its last step, from its newest checkpoint if it has one.

    Raises:
      UserError: a bad config, missing data, another stage's checkpoint, or a non-finite loss.
    """
    data = open_data(c)
    stage = stage_of(c)
    check_roles(c, stage)
    check_blocks(c)
    codec = codec_of(c, data)
    txs, mesh = optimizers_of(c, stage), mesh_of(c)
    memory = stage_memory(c, stage, txs, data.channels, data.text_width, mesh)
    say(f"{c.stage}: {len(data.dataset)} clips, {c.steps} steps in {workdir}; GiB per device, before activations:")
    say("\n".join(memory_table(memory)))
    check_memory(memory, memory_limit(jax.local_devices()[0]))
    models = {name: initial_model(name, role, data, c.seed, mesh) for name, role in c.roles.items()}
    put_batch = partial(place_batch, mesh=mesh) if mesh else None
    trained = {name: models[name] for name in stage.losses}
    frozen: dict[str, Any] = {name: model for name, model in models.items() if name not in stage.losses}
    if codec is not None:
        frozen["codec"] = jax.device_put(codec, replicated(mesh)) if mesh else codec
    writer = EventWriter(workdir, enabled=jax.process_index() == 0)
    writer.config(0, c.to_dict())
    monitor = make_monitor(c, data, workdir, mesh)
    iterator = make_iterator(
        data.dataset,
        c.data.batch_size,
        c.seed,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
    state = fit(
        stage,
        init_state(stage, trained, txs, c.seed),
        frozen,
        iterator,
        txs,
        steps=c.steps,
        workdir=workdir,
        log_every=c.log_every,
        save_every=c.save_every,
        keep=c.keep,
        accumulate={name: c.optim[name].accumulate for name in stage.losses},
        writer=writer,
        meta=run_meta(c, data, models),
        sample_fn=monitor,
        sample_every=c.sample_every,
        sample_first=monitor is not None and monitor.wants_start,
        progress=c.progress,
        **({"put_batch": put_batch} if put_batch else {}),
    )
    writer.close()
    return state


def check_blocks(c: ConfigDict) -> None:
    """A causal network goes on with the blocks that it was trained with: chunk-wise weights are no frame-wise ones.

    Raises:
      UserError: a role starts from a causal run of another layout.
    """
    own = (c.blocks.frames, c.blocks.independent_first_frame)
    for name, role in c.roles.items():
        if not role.init or asset(role.init, META_FILE) or not Path(role.init).is_dir():
            continue
        meta = read_meta(role.init)
        theirs = (meta["blocks"]["frames"], meta["blocks"]["independent_first_frame"])
        if meta["stage"] != "bidirectional" and theirs != own:
            raise UserError(
                f"roles.{name}.init={role.init!r} was trained with blocks.frames={theirs[0]}, "
                f"blocks.independent_first_frame={theirs[1]}, not {own[0]}, {own[1]}; "
                "name a run of the same layout, or set these keys to its own"
            )


def mesh_of(c: ConfigDict) -> Mesh | None:
    """The mesh of `c.mesh`, or None for one device."""
    sizes = c.mesh.to_dict()
    return None if all(size == 1 for size in sizes.values()) else make_mesh(**sizes)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Leaves with a batch axis cut over `data` and `fsdp`, the others on every device."""
    cut, whole = batch_sharding(mesh), replicated(mesh)
    return {
        name: jax.make_array_from_process_local_data(cut if has_batch_axis(name) else whole, np.asarray(leaf))
        for name, leaf in batch.items()
    }
