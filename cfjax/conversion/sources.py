"""Whole systems of weights to read: a Wan release, a diffusers pipeline, a training checkpoint, or a single file."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfjax.conversion.files import INDEX, PICKLES, SAFETENSORS, WeightFile, read_index, read_json, read_weights
from cfjax.conversion.kinds import KINDS, Arrays, Network, imported, recognised
from cfjax.core.errors import UserError
from cfjax.core.inside import resolved_inside
from cfjax.core.schema import checked, either, one_of, several, table, text

PIPELINE = "model_index.json"
COMPONENTS = ("transformer", "vae", "text_encoder")
TOKENIZERS = ("tokenizer", "google/umt5-xxl")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
# Entries of a training checkpoint, in the order of preference for the generator (reference: `trainer/diffusion.py`).
GENERATOR, AVERAGE, CRITIC = "generator", "generator_ema", "critic"
GENERATORS = (GENERATOR, "model", AVERAGE, "state_dict", "")
# model_index.json: [library, class] of every component, [null, null] of one that is not there.
COMPONENT = several(either(text(), one_of(None)), 2, 2)
INDEX_RULE = table({}, {name: COMPONENT for name in (*COMPONENTS, "transformer_2")})


@dataclass(frozen=True)
class Found:
    """A network and the role it plays in a run: `role` "student" or "critic" for a transformer, else its kind."""

    network: Network
    role: str
    ema: bool = False


@dataclass(frozen=True)
class Source:
    """Everything that a source holds, not yet read.

    Attributes:
      tokenizer: folder of the text encoder's tokenizer, where there is one.
      ignored: what was skipped, for a message.
    """

    found: list[Found]
    tokenizer: Path | None = None
    ignored: list[str] = field(default_factory=list)


def open_source(
    path: str | Path, *, parts: Collection[str] = (), key: str = "", assumed: Mapping[str, Any] | None = None
) -> Source:
    """Opens a release folder, a diffusers folder or a file, and checks all names, shapes and dtypes.

    Args:
      parts: kinds to take; empty for all there are.
      key: the entry of a .pt to take; "" takes generator, model or generator_ema (the first there is) for the student,
        and a further generator_ema and critic for what they are.
      assumed: a config.json for transformers of its `dim` that have none beside them.

    Raises:
      UserError: nothing there, unknown or broken or unfit files, two files with one kind of network.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and (path / PIPELINE).exists():
        files = list(_pipeline_files(path, parts))
    else:
        files = _weight_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no weight files here; give a Wan release, a diffusers folder or a file")
    if path.is_dir():
        files = [resolved_inside(file, path) for file in files]
    found: dict[tuple[str, bool], Found] = {}
    ignored: list[str] = []
    for file in files:
        weights = read_weights(file)
        ignored += weights.ignored
        for each in _roles(weights, key, parts, _about(file, assumed)):
            if (each.role, each.ema) in found:
                other = found[each.role, each.ema].network.file
                title = KINDS[each.network.kind].title
                raise UserError(f"{path}: {other} and {file.name} both hold a {title}; name one file as the source")
            found[each.role, each.ema] = each
    missing = [part for part in parts if part not in {each.network.kind for each in found.values()}]
    if missing:
        raise UserError(f"{path}: holds no {missing[0]}; see --config.parts")
    wants_tokenizer = ("text_encoder", False) in found and path.is_dir()
    return Source(list(found.values()), _tokenizer(path) if wants_tokenizer else None, ignored)


def _weight_files(folder: Path) -> list[Path]:
    """Indices, what no index covers, and pickles, directly in a folder."""
    names = [file.name for file in _files(folder)]
    indices = [name for name in names if name.endswith(INDEX)]
    covered = {shard for name in indices for shard in read_index(folder / name)["weight_map"].values()}
    single = [name for name in names if name.endswith(SAFETENSORS) and name not in covered]
    return [folder / name for name in [*indices, *single, *(name for name in names if name.endswith(PICKLES))]]


def _pipeline_files(folder: Path, parts: Collection[str]) -> Iterator[Path]:
    index = checked(INDEX_RULE, read_json(folder / PIPELINE), folder / PIPELINE)
    if (index.get("transformer_2") or [None])[0]:
        raise UserError(f"{folder}: a pipeline of two transformers (Wan2.2) is not supported; give one of its folders")
    for component in COMPONENTS:
        wanted = not parts or {"transformer": "dit"}.get(component, component) in parts
        if not wanted or not (index.get(component) or [None])[0]:
            continue
        files = _weight_files(folder / component) if (folder / component).is_dir() else []
        if not files:
            raise UserError(f"{folder / component}: no weights here, but {PIPELINE} names this component")
        yield from files


def _about(file: Path, assumed: Mapping[str, Any] | None) -> Callable[[str, str, Arrays], Mapping[str, Any] | None]:
    """config.json beside a file, for the layouts that have one."""

    def about(kind: str, layout: str, arrays: Arrays) -> Mapping[str, Any] | None:
        beside = file.parent / "config.json"
        if kind != "dit" and layout == "original":
            return None
        if layout in ("original", "diffusers") and beside.is_file():
            return read_json(beside)
        patch = arrays.get("patch_embedding.weight")
        fits = kind == "dit" and layout == "original" and assumed and patch and patch.shape[0] == assumed["dim"]
        return {key: assumed[key] for key in ("num_heads", "eps")} if fits and assumed else None

    return about


def _roles(
    weights: WeightFile, key: str, parts: Collection[str], about: Callable[[str, str, Arrays], Any]
) -> Iterator[Found]:
    """The networks of a file with their roles."""
    entries = weights.entries
    first = key or next((name for name in GENERATORS if name in entries), "")
    if first not in entries:
        hint = "--config.key" if not key else f"--config.key={key}"
        raise UserError(f"{weights.path}: {hint}: the file's entries are {', '.join(entries)}; name one of them")
    if parts and not _wanted(entries[first], parts):
        return
    network = imported(entries[first], weights.path, about)
    yield Found(network, "student" if network.kind == "dit" else network.kind)
    if key or network.kind != "dit":
        return
    if AVERAGE in entries and first != AVERAGE:
        yield Found(imported(entries[AVERAGE], weights.path, about), "student", ema=True)
    if CRITIC in entries:
        yield Found(imported(entries[CRITIC], weights.path, about), "critic")


def _wanted(arrays: Arrays, parts: Collection[str]) -> bool:
    try:
        return recognised(arrays)[0] in parts
    except UserError:
        return False


def _tokenizer(folder: Path) -> Path:
    for name in TOKENIZERS:
        if any((folder / name / file).is_file() for file in TOKENIZER_FILES):
            return _own_tokenizer(resolved_inside(folder / name, folder))
    raise UserError(f"{folder}: no tokenizer ({' or '.join(TOKENIZERS)}) beside the text encoder; copy it there")


def _own_tokenizer(folder: Path) -> Path:
    """The folder, after checking that none of its files is a link out of it."""
    for file in _files(folder):
        resolved_inside(file, folder)
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copies a tokenizer's files into the new folder `target`, following links.

    Raises:
      UserError: a link leads out of the folder.
    """
    own = _own_tokenizer(resolved_inside(folder, folder.parent))
    target.mkdir(parents=True)
    for file in _files(own):
        shutil.copyfile(file, target / file.name)
