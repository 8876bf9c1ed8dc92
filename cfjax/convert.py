"""`cfjax convert`: other people's weights into a run directory, and back out, bit for bit, one array at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cfjax.conversion.kinds import KINDS, Network
from cfjax.conversion.lora import open_loras, with_loras
from cfjax.conversion.lora_write import FORMS, lora_tensors, write_lora
from cfjax.conversion.rules import fingerprint
from cfjax.conversion.sources import (
    AVERAGE,
    CRITIC,
    GENERATOR,
    Found,
    Reading,
    Source,
    copy_tokenizer,
    open_source,
)
from cfjax.conversion.targets import entry_of, write_target
from cfjax.conversion.wan import TEXT_LENGTH, TI2V_CHANNELS, config_json_wan
from cfjax.conversion.weight_file import SAFETENSORS
from cfjax.conversion.write import write_json
from cfjax.core.cli import parse
from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import check_checkpoints, local_path, path_of, reporting_storage_errors
from cfjax.core.precision import Policy, to_record
from cfjax.core.progress import Progress
from cfjax.core.staging import contents, place, roll_back, staging
from cfjax.experiment.lora import open_network, records_of, settings_of
from cfjax.experiment.record import SIZES, read_run
from cfjax.models.wan import PRESETS, WanConfig
from cfjax.training.checkpoint import FOLDER, open_role, read_meta, stored_roles
from cfjax.training.streamed import write_streamed
from cfjax.worlds.open import find_world
from cfjax.worlds.records import config_from_record
from cfjax.worlds.wan import FORMAT, KIND, part_kinds, part_sizes, read_record
from cfjax.worlds.wan import fingerprint as world_fingerprint
from cfjax.worlds.world import RECORD

DESCRIPTION = """Reads a Wan release, a diffusers folder, a .pt of Causal Forcing, Self Forcing or CausVid, a tiny
decoder, or a run directory, and writes it as a run directory (to=orbax), the reference's .pt (pt), a release in
safetensors (safetensors) or a diffusers folder (diffusers). Every array must be known and fit; nothing half-written
stays."""
TARGETS = ("orbax", "pt", "safetensors", "diffusers", *FORMS)
WORLD, TOKENIZER = "world", "tokenizer"
LEFT_OUT = "left out: "
NO_SIZES = ("remat", "attention", "precision")  # of a network's config
# Networks that meet in what is so wide: kind, its size, kind, its size.
MEETING = (
    ("dit", "out_dim", "vae", "z_dim", "latents"),
    ("dit", "out_dim", "tiny_vae", "latent_channels", "latents"),
    ("tiny_vae", "latent_channels", "vae", "z_dim", "latents"),
    ("dit", "text_dim", "text_encoder", "dim", "text rows"),
    ("dit", "image_dim", "image_encoder", "dim", "a picture's features"),
)
UNSAID = (
    "the file does not say what it was trained for: recorded as bidirectional, with 50 steps of UniPC; if it generates "
    "block by block, convert it with --config=configs/convert.py:dmd, :ar_diffusion, :ode_regression or :consistency"
)
# Of videos of latents of so many channels: frames a second, and the latents' frames, height and width.
FPS = {16: 16, TI2V_CHANNELS: 24}
LATENTS = {16: (21, 60, 104), TI2V_CHANNELS: (31, 44, 80)}
# Of every stage and sampler (reference: `timestep_shift` in `configs/*.yaml`).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"  # noqa: RUF001
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
OF_PICTURES = "镜头晃动，"  # noqa: RUF001  # before it in Wan2.1's image to video (`wan/configs/wan_i2v_14B.py`)


def main(argv: Sequence[str]) -> int:
    """Parses the command line and converts."""
    c, workdir, _ = parse("convert", argv, description=DESCRIPTION, default_config="configs/convert.py")
    if c.to not in TARGETS:
        raise UserError(f"--config.to={c.to!r}: use one of {', '.join(TARGETS)}")
    if not c.source:
        raise UserError("--config.source is missing: name a folder or a file")
    if c.to == "orbax":
        check_checkpoints(workdir)
    started = time.monotonic()
    with holding(workdir):
        roll_back(workdir)
        if c.to in FORMS:
            return write_adapters(c, workdir)
        source = with_adapters(c.lora, _open(c, workdir))
        _check_free(c.to, source, workdir, c.overwrite)
        for each in source.found:
            _describe(each)
        if source.ignored:
            say(f"  {LEFT_OUT}{', '.join(source.ignored)}")
        if c.to == "orbax" and c.experiment.stage == "bidirectional" and any(x.of_training for x in source.found):
            say(f"  {UNSAID}")
        total = sum(x.nbytes for each in source.found for x in each.network.arrays.values())
        with (
            Progress(total, "B", "convert", shown=c.progress) as bar,
            reporting_storage_errors(workdir, "nothing was changed there"),
            staging(workdir) as partial,
        ):
            tensors = _write(c, source, partial, workdir, bar.update)
            _put(partial, workdir)
    seconds = time.monotonic() - started
    parameters = sum(x.size for each in source.found for x in each.network.arrays.values())
    size = f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.2f} MB"
    speed = f"{seconds:.1f} s, {total / 1e9 / seconds:.3f} GB/s"
    say(f"{workdir}: {counted(tensors, 'tensor')}, {counted(parameters, 'parameter')}, {size} in {speed}")
    return 0


def _describe(found: Found) -> None:
    network = found.network
    arrays = network.arrays.values()
    dtypes = "/".join(sorted({x.dtype.name for x in arrays}))
    role = f" ({entry_of(found)})" if network.kind == "dit" else ""
    tensors = sum(len(x.parts) for x in arrays)
    layout = f", {network.layout} layout" if network.layout else ""
    say(f"  {network.file}: {KINDS[network.kind].title}{role}, {counted(tensors, 'tensor')}, {dtypes}{layout}")
    for note in network.notes:
        if not note.startswith(LEFT_OUT):
            say(f"    {note}")


def _open(c: ConfigDict, workdir: Path) -> Source:
    """The source of the config, foreign or a run directory."""
    parts = [part for part in c.parts.split(",") if part]
    unknown = [part for part in parts if part not in KINDS]
    if unknown:
        raise UserError(f"--config.parts={c.parts}: {unknown[0]!r} is none of {', '.join(KINDS)}")
    path = local_path(c.source, "--config.source", "weights are mapped into memory")
    if (path / FOLDER).is_dir() or (path / WORLD / RECORD).is_file():
        if c.to == "orbax":
            raise UserError(f"--config.source={c.source} is a run directory already; say what to write by --config.to")
        source = open_run_source(path, parts=parts, key=c.key, world=c.world)
        return source if parts else _held_by(c.to, source)
    assumed = None
    if c.world:
        read_record(c.world)
        if (Path(c.world).parent / FOLDER).is_dir():
            models = read_run(Path(c.world).parent, SIZES)["models"]
            assumed = config_json_wan(config_from_record(WanConfig, models.get("student", {}), c.world), "original")
    source = open_source(path, Reading(parts, c.key, assumed, dtype=c.dequantize, unscaled=c.unscaled))
    _check_channels(source, _world_beside(c, workdir))
    return source


def with_adapters(asked: str, source: Source) -> Source:
    """The source with LoRAs merged into its student's weights as they are read.

    Args:
      asked: `--config.lora`.

    Raises:
      UserError: a LoRA cannot be read or is of another network, or it is not clear which transformer it is for.
    """
    loras = open_loras(asked)
    if not loras:
        return source
    own = [found for found in source.found if found.network.kind == "dit" and found.role == "student"]
    if len(own) != 1:
        names = ", ".join(map(entry_of, own)) or "no transformer"
        raise UserError(f"--config.lora={asked}: the source has {names}; choose the LoRA's own by --config.key")
    found = [replace(x, network=with_loras(x.network, loras)) if x is own[0] else x for x in source.found]
    ignored = [f"{name} of {lora.path.name}" for lora in loras for name in lora.ignored]
    return replace(source, found=found, ignored=[*source.ignored, *ignored])


def _world_beside(c: ConfigDict, workdir: Path) -> Path | None:
    """The world that what is written will belong to, None where there is none yet."""
    if c.to != "orbax":
        return None
    return path_of(c.world) if c.world else workdir / WORLD if (workdir / WORLD / RECORD).exists() else None


def _check_channels(source: Source, world: Path | None) -> None:
    """UserError where networks of the source, or of the world that they go to, are not made for each other's sizes."""
    sizes: dict[str, tuple[Mapping[str, Any], str]] = {}
    for kind in part_kinds(world) if world else ():
        sizes[kind] = part_sizes(str(world), kind), str(world)
    for each in source.found:
        sizes[each.network.kind] = vars(each.network.config), each.network.file
    for one, width, other, its_width, what in MEETING:
        if one not in sizes or other not in sizes or not sizes[one][0][width]:  # 0: it takes none
            continue
        if sizes[one][0][width] != sizes[other][0][its_width]:
            (ours, file), (theirs, place) = sizes[one], sizes[other]
            raise UserError(
                f"{file}: the {KINDS[one].title} is made for {what} of {ours[width]} channels, the"
                f" {KINDS[other].title} of {place} for {theirs[its_width]}; they do not belong together: name another"
                " source or --config.world"
            )


def _held_by(to: str, source: Source) -> Source:
    """What `to` is for when nobody named parts: a .pt is the transformers alone, diffusers knows no tiny decoder."""
    left = {"pt": ("vae", "text_encoder", "tiny_vae", "image_encoder"), "diffusers": ("tiny_vae",)}.get(to, ())
    kept = [found for found in source.found if found.network.kind not in left]
    if not kept or len(kept) == len(source.found):
        return source
    dropped = sorted({found.network.kind for found in source.found} & set(left))
    tokenizer = source.tokenizer if any(found.network.kind == "text_encoder" for found in kept) else None
    return Source(kept, tokenizer, [*source.ignored, *(f"{kind} (asked for by --config.parts)" for kind in dropped)])


def open_run_source(path: Path, *, parts: Sequence[str] = (), key: str = "", world: str = "") -> Source:
    """A run directory's transformers (trained or converted) and its world, as a source.

    Args:
      parts: kinds to take, empty for all.
      key: the transformer to take (generator, generator_ema, critic), "" for all.
      world: the world's folder, "" for the one that the run records.

    Raises:
      UserError: a part or the key is not there.
    """
    found = []
    meta: dict[str, Any] = {}
    if (path / FOLDER).is_dir() and (not parts or "dit" in parts):
        meta = read_run(path, SIZES)
        for role, ema in stored_roles(path):
            if role in ("student", "critic"):
                if role not in meta["models"]:
                    raise UserError(f"{path}: its record has no sizes of its {role}")
                found.append(Found(_stored("dit", path, role, ema, meta["models"][role], meta), role, ema))
        if key:
            found = [replace(each, role="student", ema=False) for each in found if entry_of(each) == key]
            if not found:
                raise UserError(f"--config.key={key}: {path} has no such network")
    world_folder = Path(world) if world else find_world(path, str(meta.get("world_path", ""))) or path / WORLD
    for kind in KINDS:
        folder = world_folder / kind
        if kind != "dit" and (folder / FOLDER).is_dir() and (not parts or kind in parts):
            record = read_meta(folder, stages=(kind,))
            found.append(Found(_stored(kind, folder, kind, False, record["model"], record), kind))
    missing = [part for part in parts if part not in {each.network.kind for each in found}]
    if missing or not found:
        raise UserError(f"{path}: holds no {missing[0] if missing else 'weights'}")
    text = any(each.network.kind == "text_encoder" for each in found)
    return Source(found, world_folder / TOKENIZER if text and (world_folder / TOKENIZER).is_dir() else None)


def _stored(kind: str, folder: Path, role: str, ema: bool, config: dict[str, Any], meta: dict[str, Any]) -> Network:
    record = config_from_record(type(KINDS[kind].examples[0]), config, folder)
    arrays = open_network(folder, role, ema=ema, meta=meta) if kind == "dit" else open_role(folder, role, ema=ema)
    return Network(kind, record, arrays, meta.get("source", {}).get("layout", ""), str(folder))


def _write(c: ConfigDict, source: Source, partial: Path, workdir: Path, watch: Callable[[int], Any]) -> int:
    """Everything into `partial`; the number of tensors."""
    if c.to != "orbax":
        shift = float(c.experiment.sampler.shift)
        return write_target(c.to, source, partial, shift=shift, max_bytes=c.max_shard_gb * 1e9, watch=watch)
    transformers = [each for each in source.found if each.network.kind == "dit"]
    for each in source.found:
        if each.network.kind != "dit":
            network = each.network
            arrays = {f"params/{each.role}/{name}": x.watched(watch) for name, x in network.arrays.items()}
            meta = {
                "stage": network.kind,
                "model": to_record(network.config),
                "fingerprint": fingerprint(network.arrays),
                "source": _source_record(network),
            }
            write_streamed(partial / WORLD / network.kind, arrays, meta)
    if source.tokenizer:
        copy_tokenizer(source.tokenizer, partial / WORLD / TOKENIZER)
    if (partial / WORLD).exists():
        record = {"kind": KIND, "format": FORMAT, "text_length": TEXT_LENGTH}
        record |= {"fps": FPS.get(_channels(source), FPS[16])}
        eyes = any(each.network.config.image_dim for each in transformers)
        write_json(partial / WORLD / RECORD, {**record, "negative_prompt": OF_PICTURES * eyes + NEGATIVE_PROMPT})
    if transformers:
        arrays = {
            f"{'ema' if each.ema else 'params'}/{each.role}/{name}": x.watched(watch)
            for each in transformers
            for name, x in each.network.arrays.items()
        }
        write_streamed(partial, arrays, _run_meta(c, transformers, partial, workdir))
    return sum(len(x.parts) for each in source.found for x in each.network.arrays.values())


def _channels(source: Source) -> int:
    """Latent channels of a source's networks, which agree; 0 where none says."""
    widths = {"dit": "out_dim", "vae": "z_dim", "tiny_vae": "latent_channels"}
    known = (each.network for each in source.found if each.network.kind in widths)
    return next((int(getattr(network.config, widths[network.kind])) for network in known), 0)


def write_adapters(c: ConfigDict, workdir: Path) -> int:
    """Writes the adapters of a run that trained some, without the network below (to=peft, to=lora); 0.

    Raises:
      UserError: the source is no such run, or something is in the way.
    """
    path = local_path(c.source, "--config.source", "weights are mapped into memory")
    if not (path / FOLDER).is_dir() or not (records := records_of(meta := read_run(path, SIZES), path)):
        raise UserError(f"--config.source={c.source}: no run that trained a LoRA, which --config.to={c.to} writes")
    stored = [(role, ema) for role, ema in stored_roles(path) if role in records]
    names = {("critic" if role == "critic" else AVERAGE if ema else GENERATOR): (role, ema) for role, ema in stored}
    key = c.key or next(iter(name for name in (AVERAGE, GENERATOR, CRITIC) if name in names))
    if key not in names:
        raise UserError(f"--config.key={key}: {path} has LoRAs of {', '.join(names)}")
    if contents(workdir) and not c.overwrite:
        raise UserError(f"{contents(workdir)[0]} exists; choose another --workdir, or add --config.overwrite=True")
    role, ema = names[key]
    config = config_from_record(WanConfig, meta["models"][role], path)
    tensors, record = lora_tensors(open_role(path, role, ema=ema), config), records[role]
    with (
        reporting_storage_errors(workdir, "nothing was changed there"),
        staging(workdir) as partial,
    ):
        count = write_lora(c.to, partial, tensors, settings_of(record), record["base"]["init"])
        _put(partial, workdir)
    say(f"{workdir}: the LoRA of {key}, {counted(count, 'tensor')} of rank {record['rank']}, alpha {record['alpha']:g}")
    return 0


def _source_record(network: Network) -> dict[str, Any]:
    dtypes = {name: x.dtype.name for name, x in network.arrays.items()}
    return {"layout": network.layout, "file": network.file, "dtype": dtypes}


def _run_meta(c: ConfigDict, transformers: list[Found], partial: Path, workdir: Path) -> dict[str, Any]:
    """What `Experiment.meta` records of a trained run, and where the weights come from."""
    experiment = c.experiment.copy_and_resolve_references()
    models = {}
    for each in transformers:
        if each.ema:
            continue
        role = experiment.roles.get(each.role, experiment.roles.student)
        config = replace(
            each.network.config,
            remat=role.remat,
            attention=role.attention,
            precision=Policy(compute=role.precision),
        )
        role.preset = preset_of(config)
        models[each.role] = to_record(config)
    if not any(each.ema for each in transformers):
        experiment.ema = ConfigDict()
    elif "student" not in experiment.ema:
        experiment.ema.student = {"decay": 0.99, "start": 0}
    beside = [run / WORLD for run in (partial, workdir) if (run / WORLD / RECORD).exists()]
    world_folder = Path(c.world) if c.world else beside[0] if len(beside) == 1 else None  # two will be merged
    student = next(each.network for each in transformers if each.role == "student")
    channels = student.config.out_dim
    usual = LATENTS.get(channels, LATENTS[16])
    return {
        "stage": experiment.stage,
        "config": experiment.to_dict(),
        "models": models,
        "blocks": experiment.blocks.to_dict(),
        "latent_shape": [*(asked or own for asked, own in zip(c.latents, usual, strict=True)), channels],
        **({"image_start": True} if channels == TI2V_CHANNELS and experiment.stage == "bidirectional" else {}),
        "world": world_fingerprint(world_folder) if world_folder else "",
        "world_path": c.world or (WORLD if beside else ""),
        "source": _source_record(student) | ({"lora": c.lora} if c.lora else {}),
    }


def preset_of(config: WanConfig) -> str:
    """The preset of these sizes; "" where there is none, and the recorded sizes are all there is."""
    same = lambda other: replace(other, **{name: getattr(config, name) for name in NO_SIZES}) == config
    return next((name for name, other in PRESETS.items() if same(other)), "")


def _check_free(to: str, source: Source, workdir: Path, overwrite: bool) -> None:
    """UserError if something is in the way that may not be replaced."""
    if to != "orbax":
        there = contents(workdir)
    else:
        kinds = {each.network.kind for each in source.found}
        units = [workdir / FOLDER] if "dit" in kinds else []
        units += [workdir / WORLD / kind for kind in sorted(kinds - {"dit"})]
        units += [workdir / WORLD / TOKENIZER] if source.tokenizer else []
        there = [unit for unit in units if unit.exists()]
    if there and not overwrite:
        raise UserError(f"{there[0]} exists; choose another --workdir, or add --config.overwrite=True")
    if workdir / FOLDER in there and "source" not in read_meta(workdir):
        raise UserError(f"{workdir} holds a run that was trained here; choose another --workdir")
    if to == "orbax" and (workdir / WORLD / RECORD).exists():
        read_record(workdir / WORLD)


def _put(partial: Path, workdir: Path) -> None:
    """Moves what was written to its place, a folder or file at a time; an existing world keeps its record and parts."""
    units = [path for path in partial.iterdir() if path.name != WORLD]
    units += [*(partial / WORLD).iterdir()] if (partial / WORLD).is_dir() else []
    if (workdir / WORLD / RECORD).exists():
        units = [path for path in units if path != partial / WORLD / RECORD]
    # The files by which a loader finds weights come last.
    units.sort(key=lambda path: (path.name == FOLDER, path.suffix == ".json", path))
    stale = [path.name for path in _stale(units, workdir)]
    names = [path.relative_to(partial).as_posix() for path in units]
    place(workdir, names, stale=[name for name in stale if name not in names])


def _stale(units: Sequence[Path], workdir: Path) -> list[Path]:
    """Shards and indices of replaced networks: a loader would take them for the new one's."""
    stems = {path.name.split(".")[0].split("-0")[0] for path in units if SAFETENSORS in path.name}
    there = [path for path in workdir.iterdir() if SAFETENSORS in path.name]
    return [path for path in there if path.name.split(".")[0].split("-0")[0] in stems]
