"""`cfjax precompute`: clips to latents and text rows, or an AR teacher's ODE pairs; once, before training."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.data.precompute import LatentWriter
from cfjax.experiment import Data, blocks_of, initial_model, open_data
from cfjax.objectives.ode_regression import PairsConfig, ode_pairs

DESCRIPTION = """Makes a dataset under the config's data.path: the clips that the config's data.source describes, or,
with configs/ode_pairs.py, the AR teacher's ODE trajectories. What exists already is left as it is."""


def main(argv: Sequence[str]) -> int:
    """Parses the command line and precomputes."""
    c, _, _ = parse("precompute", argv, description=DESCRIPTION, default_workdir="runs/precompute")
    if c.stage == "ode_pairs":
        precompute_pairs(c)
    else:
        data = open_data(c)
        say(f"{data.dataset.path}: {len(data.dataset)} clips of latents {data.dataset.latent_shape}")
    return 0


def precompute_pairs(c: ConfigDict) -> Path:
    """Solves the AR teacher's PF-ODE for `c.pairs` clips and writes `data.path`/`output`, whole or not at all.

    Raises:
      UserError: more pairs than clips, or a teacher of another stage.
    """
    data = open_data(c)
    target = Path(c.data.path) / c.output
    if target.exists():
        say(f"{target} exists already; remove it to make it anew")
        return target
    if c.pairs > len(data.dataset):
        raise UserError(f"pairs={c.pairs}, but {c.data.path}/{c.data.name} holds {len(data.dataset)} clips")
    if c.pairs % c.data.batch_size:
        raise UserError(f"pairs={c.pairs} must be a multiple of data.batch_size={c.data.batch_size}")
    values = c.objective.to_dict()
    method = values.pop("method")
    if method not in ("full", "cached"):
        raise UserError(f"objective.method={method!r}: use full or cached")
    config = PairsConfig(**values)
    teacher = initial_model("teacher", c.roles.teacher, data, c.seed)
    solve = jax.jit(partial(ode_pairs, config=config, blocks=blocks_of(c), method=method))
    _write_pairs(c, data, target, config, teacher, solve)
    say(f"{target}: {c.pairs} ODE pairs at timesteps {tuple(config.steps)}")
    return target


def _write_pairs(c: ConfigDict, data: Data, target: Path, config: PairsConfig, teacher, solve) -> None:
    dataset = data.dataset
    negative = jnp.asarray(dataset.negative_text_SE)
    writer = LatentWriter(
        target,
        records=c.pairs,
        latent_shape=dataset.latent_shape,
        trajectory_points=len(config.steps) + 1,
        description={**_described(dataset.manifest), "pairs": c.to_dict()},
    )
    with writer:
        starts = range(0, c.pairs, c.data.batch_size)
        for start in tqdm(starts, desc="ODE pairs", unit="batch", disable=not c.progress, dynamic_ncols=True):
            records = [dataset[i] for i in range(start, start + c.data.batch_size)]
            clean = jnp.asarray(np.stack([r["latents_FHWC"] for r in records]), jnp.float32)
            text = jnp.asarray(np.stack([r["text_SE"] for r in records]))
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(c.seed), start), clean.shape)
            against = jnp.broadcast_to(negative[None], text.shape)
            trajectory = solve(teacher, clean, text, against, noise)
            ids = np.asarray(dataset.caption_ids[start : start + len(records)])
            writer.append(np.asarray(clean), ids, np.asarray(trajectory))
        writer.write_text(dataset.captions, dataset.text_table, dataset.negative_text_SE)


def _described(manifest: dict) -> dict:
    """The entries of a manifest that say where clips came from."""
    return {key: manifest[key] for key in ("codec", "text_encoder", "source") if key in manifest}
