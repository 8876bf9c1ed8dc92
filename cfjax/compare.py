"""`cfjax compare`: the same weights and inputs through cfjax and through PyTorch, one table of errors, a verdict."""

import datetime
import importlib.metadata
import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cfjax.comparison.case import Case, random_parts
from cfjax.comparison.report import Check, exit_code, pick, run_checks, table, to_json, verdict
from cfjax.core.cli import Flag, parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.paths import is_folder, path_of, write_atomically
from cfjax.core.precision import F32
from cfjax.experiment.lora import open_network, records_of
from cfjax.experiment.networks import load_shipped
from cfjax.experiment.record import read_run
from cfjax.models.vae import published_vae
from cfjax.models.wan import Wan, WanConfig
from cfjax.models.weight_storage import fill
from cfjax.nn.visibility import Blocks
from cfjax.training.checkpoint import FOLDER, load_role
from cfjax.worlds.assets import META_FILE, asset
from cfjax.worlds.open import find_world, is_wan_world
from cfjax.worlds.records import config_from_record, placed_template
from cfjax.worlds.wan import load_codec, load_text, open_image_encoder, part_sizes, read_record

DESCRIPTION = """Compares cfjax with an independent PyTorch implementation: the same weights, inputs, noise and times
in float32. Prints one table (what, shape, largest absolute and relative error, cosine, the first layer that diverges)
and writes it as JSON. Exit code 0: all within tolerance; 1: something is not; 2: the command has a mistake."""
FLAGS = (
    Flag(
        "against",
        "diffusers: the Hugging Face classes; peft: LoRA in its hands; reference: a clone of it",
        choices=("diffusers", "peft", "reference"),
    ),
    Flag("reference_dir", "with --against=reference: your clone of Causal-Forcing or Self-Forcing", default=""),
    Flag("only", "comma-separated checks, as --only=dit,vae (empty: all)", default=""),
    Flag("tolerance", "largest relative error allowed, in place of each check's own", kind=float),
    Flag("json", "where the table goes as JSON (empty: WORKDIR/compare.json)", default=""),
    Flag("seed", "of inputs and random weights", kind=int, default=0),
)
NEEDS = {
    "diffusers": ("torch", "diffusers", "transformers"),
    "peft": ("torch", "diffusers", "transformers", "peft"),
    "reference": ("torch",),
}
PACKAGES = ("cfjax", "jax", "jaxlib", "flax", "numpy", "torch", "diffusers", "transformers", "peft")


def main(argv: Sequence[str]) -> int:
    """Parses the command line and compares; 0 if everything agrees, else 1."""
    c, workdir, flags = parse(
        "compare",
        argv,
        description=DESCRIPTION,
        extra_flags=FLAGS,
        default_config="configs/compare.py",
        default_workdir="runs/compare",
    )
    chosen = pick(checks_of(flags["against"], flags["reference_dir"]), flags["only"])
    case = open_case(c, flags["seed"], flags["tolerance"])
    file = Path(flags["json"] or workdir / "compare.json")
    device = jax.devices()[0]
    say(f"cfjax on {device.device_kind} against {flags['against']}, weights: {_whose(c)}")
    # By default accelerators multiply float32 matrices with fewer bits.
    with jax.default_matmul_precision("highest"):
        rows, seconds = run_checks(chosen, case, say, strict=bool(flags["only"]))
    meta = {
        "command": shlex.join(["cfjax", "compare", *argv]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "against": flags["against"],
        "seed": flags["seed"],
        "config": json.loads(c.to_json()),
        "device": {"jax": f"{device.platform}: {device.device_kind}", "torch": "cpu"},
        "versions": versions(),
        "seconds": seconds,
    }
    write_atomically(file, to_json(rows, meta))
    say(table(rows))
    say(f"{verdict(rows)}; {file}")
    return exit_code(rows)


def _whose(c: ConfigDict) -> str:
    named = ", ".join(name for name in (c.run, c.world) if name)
    return named or f"random, {c.random} sizes"


def versions() -> dict[str, str]:
    """Of the packages that a comparison depends on; "" for one that is not installed as a package."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {name: version(name) for name in PACKAGES}


def checks_of(against: str | None, reference_dir: str) -> Mapping[str, Check[Case]]:
    """The checks of one side.

    Raises:
      UserError: no side named, its packages or its clone are missing.
    """
    if against is None:
        raise UserError(
            "--against is missing: --against=diffusers, --against=peft, or --against=reference --reference_dir=CLONE"
        )
    missing = [name for name in NEEDS[against] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--against={against} needs {', '.join(missing)}: pip install -e '.[compare]' in the clone")
    if against == "diffusers":
        from cfjax.comparison.diffusers import CHECKS

        return CHECKS
    if against == "peft":
        from cfjax.comparison import peft

        return peft.CHECKS
    if not reference_dir:
        raise UserError("--against=reference needs --reference_dir=CLONE, the folder of your clone of Causal-Forcing")
    from cfjax.comparison.reference_checks import open_checks

    return open_checks(reference_dir)


def open_case(c: ConfigDict, seed: int, tolerance: float | None) -> Case:
    """The weights that the config names, to be read part by part, and the sizes of the inputs.

    Raises:
      UserError: no such run, role or world, or sizes that the model does not take.
    """
    for name in ("frames", "height", "width", "text_length", "steps"):
        if c[name] < 1:
            raise UserError(f"--config.{name}={c[name]}: use 1 or more")
    if c.run:
        parts = _run_parts(c)
    else:
        parts = _world_parts(path_of(c.world)) if c.world else random_parts(c.random, seed)
    stride = published_vae(parts.get("channels", 16)).stride[1]
    for name in ("height", "width"):
        if c[name] % (2 * stride):  # a patch of latents
            raise UserError(f"--config.{name}={c[name]}: a video's sides are multiples of {2 * stride} pixels")
    return Case(
        dit=parts.get("dit"),
        vae=parts.get("vae"),
        text_encoder=parts.get("text_encoder"),
        tokenizer=parts.get("tokenizer", ""),
        blocks=parts.get("blocks", Blocks()),
        frames=c.frames,
        height=c.height // stride,
        width=c.width // stride,
        text_length=c.text_length,
        steps=c.steps,
        seed=seed,
        tolerance=tolerance,
        image_encoder=parts.get("image_encoder"),
    )


def _run_parts(c: ConfigDict) -> dict[str, Any]:
    """The parts of a run and of its Wan world; without one, a network only."""
    record = asset(c.run, META_FILE)
    if record is None and not is_folder(path_of(c.run)):
        raise UserError(f"--config.run={c.run}: no such run directory, and no shipped teacher of that name")
    meta = read_run(c.run)
    if c.role not in meta["models"]:
        raise UserError(f"--config.role={c.role}: {c.run} holds {', '.join(meta['models'])}")
    averaged = c.ema and c.role in meta["config"]["ema"]
    network = replace(config_from_record(WanConfig, meta["models"][c.role]), remat="none", precision=F32)

    def dit() -> Wan:
        template = placed_template(lambda: Wan(network, jax.random.key(0)))
        if record:
            return load_shipped(c.run, template)
        if c.role in records_of(meta, c.run):
            return fill(template, open_network(c.run, c.role, ema=averaged, meta=meta))
        return load_role(c.run, c.role, template, ema=averaged)

    world = path_of(c.world) if c.world else find_world(c.run, str(meta.get("world_path", "")))
    parts = _world_parts(world) if world and is_wan_world(world) else {}  # a toy's world has none to compare
    return {"dit": dit, "blocks": Blocks(**meta["blocks"])} | parts | {"channels": network.out_dim}


def _world_parts(world: Path) -> dict[str, Any]:
    """Autoencoder, text encoder and tokenizer of a Wan world, as far as it has them.

    Raises:
      UserError: there is no Wan world.
    """
    length = int(read_record(world)["text_length"])
    have = lambda part: (world / part / FOLDER).is_dir()
    return {
        "channels": part_sizes(world, "vae")["z_dim"] if have("vae") else 16,
        "vae": partial(load_codec, world, "vae") if have("vae") else None,
        "text_encoder": (lambda: load_text(world, length).model) if have("text_encoder") else None,
        "image_encoder": partial(open_image_encoder, world) if have("image_encoder") else None,
        "tokenizer": str(world / "tokenizer") if (world / "tokenizer").is_dir() else "",
    }
