"""`cfjax export`: a run's averaged weights and its world as one small folder, with the record of how it was made."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cfjax.core.checksums import write_sums
from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import path_of, reporting_storage_errors
from cfjax.core.staging import contents, place, roll_back, staging
from cfjax.core.tensor_files import save_tensors
from cfjax.core.tree import named_leaves
from cfjax.evaluation.curves import draw_curves, read_curves
from cfjax.experiment.lora import LORA
from cfjax.experiment.measure import evaluate_run
from cfjax.experiment.runs import open_run
from cfjax.training.checkpoint import read_meta
from cfjax.worlds.assets import META_FILE, MODEL_FILE

DESCRIPTION = """Writes a run's averaged weights (bf16 safetensors), its codec and text encoder, an evaluation of the
rounded weights and the training curves to the workdir. An older export there is replaced; other files stay."""


def main(argv: Sequence[str]) -> int:
    """Parses the command line and exports."""
    c, workdir, _ = parse("export", argv, description=DESCRIPTION, default_config="configs/export.py")
    with holding(workdir):
        roll_back(workdir)
        if contents(workdir) and not (workdir / META_FILE).exists():
            raise UserError(f"--workdir={workdir} is not an export; choose another folder")
        with reporting_storage_errors(workdir, "nothing was changed there"):
            export(c, workdir)
    return 0


def export(c: ConfigDict, workdir: Path) -> None:
    """Writes the run of `c`, files beside each other in `workdir`; other files there stay."""
    run = open_run(c.run)
    named = {name: leaf.astype(jnp.bfloat16) for name, leaf in named_leaves(run.model).items()}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), run.model)
    run = replace(run, model=rounded)
    result = evaluate_run(run, clips=c.clips, batch=60, seed=11)
    record = {
        **{key: value for key, value in read_meta(c.run).items() if key != LORA},  # the weights are merged
        "parameters": sum(leaf.size for leaf in named.values()),
        "note": c.note,
        "evaluation": {name: result[name] for name in ("summary", "network_calls", "frames_per_second")},
    }
    with staging(workdir) as partial:
        run.toy.save(partial)
        save_tensors(partial / MODEL_FILE, named)
        (partial / META_FILE).write_text(json.dumps(record, indent=1))
        curves = read_curves(path_of(c.run), every=200)
        (partial / "curves.json").write_text(json.dumps(curves))
        draw_curves(partial / "curves.svg", curves)
        write_sums(partial)
        names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name == META_FILE, name))
        place(workdir, names)
    say(f"{workdir}: {record['parameters'] / 1e6:.2f} M parameters, all correct {result['summary']['all_correct']:.3f}")
