"""`cfjax train`: one stage of an experiment. To resume, run the same command again."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.sharding import batch_sharding, make_mesh, replicated, shard_model
from cfjax.data.latents import make_iterator
from cfjax.evaluation.shapes_metrics import evaluate_shapes
from cfjax.evaluation.video import grid_video, to_uint8
from cfjax.experiment import (
    Data,
    blocks_of,
    count_parameters,
    initial_model,
    open_data,
    optimizers_of,
    run_meta,
    sampler_of,
    stage_of,
)
from cfjax.rollout.generate import generate
from cfjax.training.loop import SampleFn, fit
from cfjax.training.metrics import EventWriter
from cfjax.training.state import TrainState, init_state
from cfjax.training.step import has_batch_axis
from cfjax.world import evaluation_clips

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
    missing = sorted(set(stage.losses) - set(c.roles))
    if missing:
        raise UserError(f"roles.{missing[0]} is missing: stage {c.stage} trains {', '.join(stage.losses)}")
    models = {name: initial_model(name, role, data, c.seed) for name, role in c.roles.items()}
    put_batch = None
    if mesh := mesh_of(c):
        models = {name: shard_model(model, mesh) for name, model in models.items()}
        put_batch = partial(place_batch, mesh=mesh)
    trained = {name: models[name] for name in stage.losses}
    frozen = {name: model for name, model in models.items() if name not in stage.losses}
    txs = optimizers_of(c, stage)
    sizes = ", ".join(f"{name} {count_parameters(model) / 1e6:.2f} M" for name, model in models.items())
    say(f"{c.stage}: {sizes} parameters, {len(data.dataset)} clips, {c.steps} steps in {workdir}")
    writer = EventWriter(workdir)
    writer.config(0, c.to_dict())
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
        sample_fn=sample_fn(c, data),
        sample_every=c.sample_every,
        progress=c.progress,
        **({"put_batch": put_batch} if put_batch else {}),
    )
    writer.close()
    return state


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


def sample_fn(c: ConfigDict, data: Data) -> SampleFn | None:
    """Videos of held-out captions, drawn with the averaged weights, and how well they follow; toy worlds only."""
    world = data.world
    if world is None or not c.sample_clips:
        return None
    clips = evaluation_clips(world.shapes, c.sample_clips)
    text = jnp.asarray(world.text.encode([clip["caption"] for clip in clips]))
    negative = jnp.asarray(data.dataset.negative_text_SE)
    blocks = None if c.sampler.kind == "bidirectional" else blocks_of(c)
    noise = jax.random.normal(jax.random.key(c.seed + 1), (len(clips), *data.dataset.latent_shape))
    sample = jax.jit(partial(generate, sampler=sampler_of(c), blocks=blocks))

    def log(state: TrainState, step: int, writer: EventWriter) -> None:
        model = state.ema.get("student", state.params["student"])
        latents = sample(model, noise, text, negative, jax.random.key(c.seed + 2))
        video = np.asarray(world.codec.decode(latents))
        writer.video(step, "samples", grid_video(to_uint8(video), columns=4), scale=3)
        summary = evaluate_shapes(video, [clip["factors"] for clip in clips], world.shapes)["summary"]
        shown = ("all_correct", "shape_correct", "colour_correct", "direction_correct", "presence", "step", "residual")
        writer.scalars(step, {f"samples/{name}": float(summary[name]) for name in shown})

    return log
