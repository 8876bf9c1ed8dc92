"""`cfjax precompute`: clips, LMDBs and prompts to latents and text rows, or an AR teacher's ODE pairs; once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.cli import Flag, given_keys, parse
from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.paths import is_folder, local_path, path_of, read_if_whole
from cfjax.core.progress import Progress, compiling
from cfjax.data.captions import Columns
from cfjax.data.check import check_dataset
from cfjax.data.clips import read_listing
from cfjax.data.ingest import ClipSource, EncodeVideo, LmdbSource, PromptSource, Source, ingest
from cfjax.data.latents import read_json
from cfjax.data.listing import listed
from cfjax.data.lmdb_files import is_lmdb
from cfjax.data.lmdb_paths import default_text_path, describe_lmdb, is_same_job, lmdb_job
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.merge import merge, merge_writer, name_of, open_members
from cfjax.data.parts import SetWriter
from cfjax.data.pictures import ClipFormat, Unusable
from cfjax.data.precompute import digest
from cfjax.data.records import MANIFEST, Layout
from cfjax.data.sets import identity
from cfjax.experiment.data import Data, data_of, data_root, difference, pairs_layout
from cfjax.experiment.networks import check_blocks, check_pictures, networks_in, roles_of, sized
from cfjax.experiment.reference import apply_reference
from cfjax.experiment.stage import blocks_of
from cfjax.models.codec import Codec
from cfjax.models.vae import WanVAE
from cfjax.models.vae_tiling import encode_in_steps
from cfjax.objectives.ode_regression import METHODS, PairsConfig, ode_pairs
from cfjax.training.checkpoint import FOLDER, read_meta
from cfjax.worlds.open import open_world
from cfjax.worlds.world import World, WorldParts

DESCRIPTION = """Encodes a folder of clips, an LMDB or a file of prompts (configs/precompute.py), solves the AR
teacher's ODE trajectories (configs/ode_pairs.py), or makes the toy's clips (a toy config). What is there is kept."""
CHECK = Flag("check", "instead: look at every record of this dataset; exit code 1 if one is bad", default="")
MERGE = Flag(
    "merge", "instead: join these sets, as data/a,data/b, to --config.output; one alone gets new parts", default=""
)
SHOWN = 10
PAIRS_AT_LEAST = 16  # ODE pairs of a part: each takes a minute or more


def main(argv: Sequence[str]) -> int:
    """Parses the command line and precomputes, or checks; 1 when a check finds fault."""
    c, _, own = parse(
        "precompute",
        argv,
        description=DESCRIPTION,
        extra_flags=[CHECK, MERGE],
        default_config="configs/precompute.py",
        default_workdir="runs/precompute",
    )
    if own["check"]:
        return check(own["check"], c)
    if own["merge"]:
        merge_sets(own["merge"], c)
    elif "source" in c:
        precompute_source(c)
    elif c.stage == "ode_pairs":
        precompute_pairs(apply_reference(c, given_keys(argv)))
    else:
        data = data_of(c).open()
        say(f"{data.dataset.path}: {counted(len(data.dataset), 'clip')} of latents {data.dataset.latent_shape}")
    return 0


def check(path: str, c: ConfigDict) -> int:
    """Says every fault of the dataset at `path`; 1 if there is any."""
    faults = partial(check_dataset, path, progress=c.progress)
    if "source" in c:
        faults = partial(faults, ground_truth=c.ground_truth, fallback_shape=tuple(c.latent_shape), lmdb=c.lmdb)
    count = 0
    for fault in faults():
        say(str(fault))
        count += 1
    say(f"{path}: {counted(count, 'fault')}" if count else f"{path}: every record is good")
    return int(count > 0)


# ---- clips, LMDBs, prompts


def precompute_source(c: ConfigDict) -> Path:
    """Encodes this process's share of `c.source` and writes it to `c.output`.

    Raises:
      UserError: no such source or world, sizes that do not go together, or nothing that can be used.
    """
    if not c.source:
        raise UserError("source='': give --config.source=FOLDER of clips, an LMDB, or a .txt file of prompts")
    for key in ("source", "output", "world"):
        local_path(c[key], f"--config.{key}", "cfjax precompute reads and writes folders of this machine")
    lmdb = is_lmdb(c.source)
    if c.pictures and (lmdb or not Path(c.source).is_dir()):
        raise UserError(f"pictures=True: source={c.source!r} has no pixels to take pictures of; give a folder of clips")
    if not c.output and not lmdb:
        raise UserError("output='': give the folder of the new dataset, --config.output=data/wan/clips")
    cache = c.text_cache or str(Path(c.world).absolute().parent / "text_cache")
    world = open_world(c.world, WorldParts(with_text=False, text_cache=cache))
    open_source = _open_lmdb if lmdb else _open_prompts if Path(c.source).is_file() else _open_clips
    source, layout, about, encode_video = open_source(c, world)
    for line in about.get("say", {}).values():
        say(line)
    job = {"world": world.fingerprint(), **about["job"]}
    text_encoder = {"name": world.text_name, "world": world.fingerprint()}
    writer = SetWriter(
        output_of(c),
        items=len(source),
        part_items=c.part_items,
        layout=layout,
        job=job,
        description={"world_path": c.world, "text_encoder": text_encoder, **about["manifest"]},
        listing=listed(source) if isinstance(source, ClipSource) else None,
        same={"lmdb": partial(is_same_job, rows=source.rows)} if isinstance(source, LmdbSource) else None,
    )
    shard, shards = shard_of(c)
    before = set(writer.skipped())
    with writer.share(shard, shards) as todo:
        if todo or writer.lacks_negative():
            items = (item for index in todo for item in writer.items_of(index))
            world.cache_text(captions_of(source, items), progress=c.progress)
            writer.write_negative(world.negative_text_SE())
        complete = ingest(
            writer,
            source,
            encode_text=world.encode_prompts,
            encode_video=encode_video,
            shard=shard,
            shards=shards,
            batch_size=c.batch_size,
            workers=c.workers,
            progress=c.progress,
            report=about.get("report", {}),
        )
    _report(writer, complete, [s for s in writer.skipped() if s not in before])
    return writer.path


def output_of(c: ConfigDict) -> Path:
    """The new set's folder: `c.output`, or beside an LMDB."""
    return Path(c.output) if c.output else default_text_path(c.source)


def _report(writer: SetWriter, complete: bool, skipped: Sequence[Any]) -> None:
    for one in skipped[:SHOWN]:
        say(f"left out {one.name}: {one.reason}")
    if len(skipped) > SHOWN:
        say(f"left out {len(skipped) - SHOWN} more")
    if complete:
        out, items = len(writer.skipped()), writer.items
        records = counted(items - out, "record")
        say(f"{writer.path}: {records} of {counted(items, 'item')}, {out} left out (report.json says why)")
    else:
        there = sum(map(writer.done, range(writer.parts)))
        say(f"{writer.path}: {there} of {counted(writer.parts, 'part')} are there; the other shards make the rest")


def shard_of(c: ConfigDict) -> tuple[int, int]:
    """(this process's number, how many share the job): `c.shard` of `c.shards`, by default JAX's processes."""
    shards = c.shards or jax.process_count()
    return (jax.process_index() if c.shard < 0 else c.shard), shards


About = dict[str, dict[str, Any]]
Opened = tuple[Source, Layout, About, EncodeVideo | None]


def _open_clips(c: ConfigDict, world: World) -> Opened:
    wanted = ClipFormat(c.frames, c.height, c.width, c.fps, c.fit, c.max_crop, c.upscale)
    wanted.check_stride(world.codec.stride)
    found = read_listing(c.source, c.captions, columns=columns_of(c), encoding=c.encoding, parts=c.parts)
    clips = found.clips
    shape = jax.ShapeDtypeStruct((1, c.frames, c.height, c.width, 3), jnp.float32)
    latent = jax.eval_shape(lambda codec, video: codec.encode(video), world.codec, shape).shape[1:]
    codec = world.codec.describe()
    listing = digest({"clips": [[clip.label(), clip.caption, clip.fault] for clip in clips]})
    about: About = {
        "job": {"clips": listing, "format": asdict(wanted), "codec": codec},
        "manifest": {"codec": codec, "source": {"name": "clips", "path": c.source, **asdict(wanted)}},
        "report": {"passed_over": dict(found.passed_over)},
        "say": found.notes(),
    }
    encode = video_encoder(world.codec, c.encode_frames, shown=c.progress)
    return ClipSource(c.source, clips, wanted), _layout(c, world, latent, pictures=c.pictures), about, encode


def columns_of(c: ConfigDict) -> Columns:
    """How the tables of captions and prompts are read."""
    return Columns(c.file_column, c.caption_column, c.caption_choice)


def _open_lmdb(c: ConfigDict, world: World) -> Opened:
    rows = LmdbRows(c.source, ground_truth=c.ground_truth, fallback_shape=tuple(c.latent_shape))
    source = {"name": "lmdb", "path": c.source, "ground_truth": c.ground_truth}
    about: About = {
        "job": {"lmdb": lmdb_job(rows)},
        "manifest": {"lmdb": describe_lmdb(rows, output_of(c)), "source": source},
    }
    layout = _layout(
        c,
        world,
        rows.latent_shape,
        kept_in="records" if c.copy_latents else "lmdb",
        trajectory_points=rows.trajectory_points,
    )
    return LmdbSource(rows, copy=c.copy_latents), layout, about, None


def _open_prompts(c: ConfigDict, world: World) -> Opened:
    source = PromptSource.read(c.source, columns_of(c), c.encoding)
    if len(c.latent_shape) != 4 or c.latent_shape[-1] != world.codec.latent_channels:
        raise UserError(f"latent_shape={c.latent_shape}: give (F, H, W, {world.codec.latent_channels})")
    about: About = {
        "job": {"prompts": digest({"prompts": source.prompts})},
        "manifest": {"source": {"name": "prompts", "path": c.source}},
    }
    return source, _layout(c, world, tuple(c.latent_shape), kept_in="none"), about, None


def _layout(c: ConfigDict, world: World, latent_shape: tuple[int, ...], **values: Any) -> Layout:
    frames, height, width, channels = latent_shape
    shape = (frames, height, width, channels)
    return Layout(shape, world.text_length, world.text_width, dtype=c.dtype, text_dtype=c.text_dtype, **values)


# ---- joining sets


def merge_sets(given: str, c: ConfigDict) -> Path:
    """Joins the sets of `given`, as "data/a,data/b", to `c.output`; of a single one it makes other parts.

    Raises:
      UserError: sets that are not alike, no output, or a source besides.
    """
    if "source" not in c or c.source or not c.output:
        raise UserError("--merge: use configs/precompute.py without a source, and name the new --config.output=FOLDER")
    local_path(c.output, "--config.output", "cfjax precompute writes folders of this machine")
    members = open_members(given.split(","), c.lmdb)
    writer = merge_writer(members, c.output, c.part_items)
    shard, shards = shard_of(c)
    with writer.share(shard, shards):
        complete, twice = merge(writer, members, shard=shard, shards=shards, progress=c.progress)
    for item, earlier in twice[:SHOWN]:
        say(f"the same twice: {name_of(members, item)}, and {name_of(members, earlier)}")
    if twice:
        say(f"{len(twice)} records hold the same as one of another set (report.json says which); all are kept")
    _report(writer, complete, writer.skipped())
    return writer.path


# ---- encoding


def captions_of(source: Source, items: Iterable[int]) -> Iterator[str]:
    """The captions of these items; those that cannot be used have none."""
    for item in items:
        with suppress(Unusable):
            yield source.caption(item)


def video_encoder(codec: Codec, frames: int, *, shown: bool = False) -> EncodeVideo:
    """[B, P, H, W, 3], 0 to 255, to float32 latents_BFHWC; Wan's VAE takes `frames` latent frames at a time (0: all).

    Args:
      shown: say that the first call compiles.
    """

    @jax.jit
    def encode(codec: Any, video: jax.Array) -> jax.Array:
        scaled = video.astype(jnp.float32) * (2.0 / 255.0) - 1.0
        if frames and isinstance(codec, WanVAE):
            return encode_in_steps(codec, scaled, frames)
        return codec.encode(scaled)

    return _said_once(lambda video: np.asarray(encode(codec, video), np.float32), "the encoder of clips", shown)


def _said_once(function: Callable[..., Any], what: str, shown: bool) -> Callable[..., Any]:
    """The function; its first call says that it compiles."""
    called = False

    def call(*args: Any) -> Any:
        nonlocal called
        if called:
            return function(*args)
        called = True
        with compiling(f"{what}, with a first batch", shown=shown):
            return function(*args)

    return call


# ---- ODE pairs


def precompute_pairs(c: ConfigDict) -> Path:
    """Solves the AR teacher's PF-ODE for `c.pairs` clips and writes this process's share to `data.path`/`output`.

    Raises:
      UserError: more pairs than clips, a teacher of another stage or layout, or pairs there of other settings.
    """
    target = data_root(c.data.path) / c.output
    if read_if_whole(target / MANIFEST) is not None:
        _check_made(c, target)
        say(f"{target} exists already; remove it to make it again")
        return target
    values = c.objective.to_dict()
    method = values.pop("method")
    if method not in METHODS:  # before any file is touched, or any clip rendered
        raise UserError(f"objective.method={method!r}: use one of {', '.join(METHODS)}")
    roles = sized(roles_of(c))
    check_pictures("ODE pairs", roles)
    check_blocks(blocks_of(c), roles.values())
    data = data_of(c).open()
    if c.pairs > len(data.dataset):
        raise UserError(f"pairs={c.pairs}, but {c.data.path}/{c.data.name} holds {counted(len(data.dataset), 'clip')}")
    config = PairsConfig(**values)
    networks_in(roles)["teacher"].check_fit(data.shapes, data.dataset.path)
    writer = _pairs_writer(c, data, target, config)
    shard, shards = shard_of(c)
    with writer.share(shard, shards) as todo:
        if todo or writer.lacks_negative():
            writer.write_negative(data.dataset.negative_text_SE)
        if todo:
            teacher = roles["teacher"].initial(data.shapes, c.seed)
            solve = jax.jit(partial(ode_pairs, config=config, blocks=blocks_of(c), method=method))
            solved = lambda *batch: np.asarray(solve(teacher, *batch))
            _solve_parts(c, data, writer, todo, _said_once(solved, "the teacher's solver", c.progress))
        complete = writer.finish()
    _report(writer, complete, writer.skipped())
    return target


def _check_made(c: ConfigDict, target: Path) -> None:
    """Refuses a complete set unless this config would make the same one, however it cut the job."""
    made = read_json(target / MANIFEST).get("source", {}).get("pairs")
    if not made:
        raise UserError(
            f"{target} holds a dataset that configs/ode_pairs.py did not make; choose another --config.output"
        )
    teacher = [f"roles.teacher.{name}" for name in ("init", "init_role", "init_ema")]
    objective = [f"objective.{name}" for name in c.objective]
    keys = [
        *objective,
        *pairs_layout(c.to_dict(), c.objective.method),
        *teacher,
        "data.name",
        "pairs",
        "seed",
        "text_dtype",
    ]
    if mismatch := difference(made, c.to_dict(), keys):
        raise UserError(
            f"{target} was made with {mismatch}; choose another --config.output, or remove it to make it again"
        )


def _pairs_writer(c: ConfigDict, data: Data, target: Path, config: PairsConfig) -> SetWriter:
    dataset, role = data.dataset, c.roles.teacher
    trained = role.init and is_folder(path_of(role.init) / FOLDER)
    step = read_meta(role.init)["step"] if trained else 0
    rows, width = dataset.text_shape
    layout = Layout(
        dataset.latent_shape,
        rows,
        width,
        trajectory_points=len(config.steps) + 1,
        text_dtype=c.text_dtype,
    )
    job = {
        "clips": identity(dataset),
        "teacher": {"init": role.init, "role": role.init_role, "ema": role.init_ema, "step": step},
        "objective": c.objective.to_dict(),
        "blocks": c.blocks.to_dict(),
        "seed": c.seed,
    }
    described: dict[str, Any] = {
        key: dataset.manifest[key] for key in ("codec", "text_encoder", "world_path") if key in dataset.manifest
    }
    source = {"name": "ode_pairs", "of": dataset.manifest.get("source", {}), "pairs": c.to_dict()}
    return SetWriter(
        target,
        items=c.pairs,
        part_items=c.part_items,
        at_least=PAIRS_AT_LEAST,
        layout=layout,
        job=job,
        description={**described, "source": source},
        same={"clips": lambda found: found == digest(dataset.manifest)},  # as older versions noted it
    )


def _solve_parts(c: ConfigDict, data: Data, writer: SetWriter, todo: Sequence[int], solve: Any) -> None:
    """The trajectories of some parts. Pair i's noise depends on the seed and i alone, however the job is cut."""
    dataset, size = data.dataset, c.data.batch_size
    negative = jnp.asarray(dataset.negative_text_SE)
    draw = jax.jit(
        jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(c.seed), i), dataset.latent_shape))
    )
    total = sum(len(writer.items_of(index)) for index in todo)
    with Progress(total, "pair", "ODE pairs", shown=c.progress) as bar:
        for index in todo:
            with writer.part(index) as part:
                for start in range(part.items.start, part.items.stop, size):
                    items = list(range(start, min(start + size, part.items.stop)))
                    records = [dataset[i] for i in items]
                    filled = items + items[-1:] * (size - len(items))  # one shape, one compiled program
                    clean, text = (
                        jnp.asarray(np.stack([records[min(n, len(records) - 1)][name] for n in range(size)]))
                        for name in ("latents_FHWC", "text_SE")
                    )
                    against = jnp.broadcast_to(negative[None], text.shape)
                    trajectory = solve(clean, text, against, draw(jnp.asarray(filled)))
                    for item, record, states in zip(items, records, trajectory, strict=False):
                        latents = record["latents_FHWC"]
                        part.add(
                            f"{dataset.path.name}/{item}",
                            item,
                            dataset.caption(int(record["index"])),  # a stand-in has its own
                            record["text_SE"],
                            latents=latents,
                            trajectory=states,
                        )
                    bar.update(len(items))
