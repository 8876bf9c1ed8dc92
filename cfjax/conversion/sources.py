"""Whole systems of weights to read: a Wan release, a diffusers pipeline, a training checkpoint, or a single file."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from cfjax.conversion.files import read_weights
from cfjax.conversion.folders import PIPELINE, files_of, of_deepspeed, opened, weight_files
from cfjax.conversion.foreign import is_own, what_else
from cfjax.conversion.kinds import KINDS, Arrays, Network, imported, recognised
from cfjax.conversion.prefixes import AVERAGED, CRITICS, FROZEN, PLAIN, SPIECE
from cfjax.conversion.weight_file import WeightFile, read_json
from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.inside import resolved_inside
from cfjax.core.lazy import LazyArray
from cfjax.core.limits import TOKENIZER_BYTES
from cfjax.core.schema import checked, either, one_of, several, table, text
from cfjax.models.tokenizer import SENTENCEPIECE_FILE

COMPONENTS = ("transformer", "vae", "text_encoder", "image_encoder")
TOKENIZERS = ("tokenizer", "google/umt5-xxl")
TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE_FILE)
# Entries of a training checkpoint as the reference calls them (`trainer/diffusion.py`).
GENERATOR, AVERAGE, CRITIC = "generator", "generator_ema", "critic"
OTHER = "other"
TRAINERS = {GENERATOR, "generator_state_dict", "student"}
# model_index.json: [library, class] of every component, [null, null] of one that is not there.
COMPONENT = several(either(text(), one_of(None)), 2, 2)
INDEX_RULE = table({}, {name: COMPONENT for name in (*COMPONENTS, "transformer_2")})


@dataclass(frozen=True)
class Found:
    """A network and the role it plays in a run: `role` "student" or "critic" for a transformer, else its kind.

    `entry` is the name that it has in its file, "" where that holds nothing else.
    """

    network: Network
    role: str
    ema: bool = False
    entry: str = ""

    @property
    def of_training(self) -> bool:
        """Whether it comes from a training checkpoint, which does not say what it was trained for."""
        return self.role == CRITIC or self.ema or not TRAINERS.isdisjoint(self.entry.split("."))


@dataclass(frozen=True)
class Source:
    """Everything that a source holds, not yet read.

    Attributes:
      tokenizer: folder of the text encoder's tokenizer, or the spiece.model in its weights' file; where there is one.
      ignored: what was skipped, for a message.
    """

    found: list[Found]
    tokenizer: Path | LazyArray | None = None
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
      parts: kinds to take; empty for all there are.
      key: the entry of a file to take; "" takes the generator (or else an average) for the student, and a further
        average and a critic for what they are.
      assumed: a config.json for transformers of its `dim` that have none beside them.
      dtype, unscaled: of what is quantised, see `quantised.dequantised`.
    """

    parts: Collection[str] = ()
    key: str = ""
    assumed: Mapping[str, Any] | None = None
    dtype: str = "float32"
    unscaled: bool = False


def open_source(path: str | Path, reading: Reading = Reading(), **options: Any) -> Source:
    """Opens a release folder, a diffusers folder, a trainer's or a file, and checks all names, shapes and dtypes.

    Args:
      reading: how.  options: the fields of `Reading` one by one, in its place.

    Raises:
      UserError: nothing there, unknown or broken or unfit files, two files with one kind of network.
    """
    reading = Reading(**options) if options else reading
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    folder = opened(path) if path.is_dir() else None
    if folder and (folder / PIPELINE).exists():
        files = list(_pipeline_files(folder, reading.parts))
    else:
        files = weight_files(folder) if folder else [path]
    if not files:
        raise UserError(f"{path}: no weight files here; give a Wan release, a diffusers folder or a file")
    if folder:
        files = [resolved_inside(file, folder) for file in files]
    found: dict[tuple[str, bool], Found] = {}
    ignored: list[str] = []
    inner: list[LazyArray] = []
    for file in files:
        weights = _read(file, inner)
        ignored += weights.ignored
        for each in _networks(weights, reading, ignored):
            if (each.role, each.ema) in found:
                other = found[each.role, each.ema].network.file
                title = KINDS[each.network.kind].title
                raise UserError(f"{path}: {other} and {file.name} both hold a {title}; name one file as the source")
            found[each.role, each.ema] = each
    missing = [part for part in reading.parts if part not in {each.network.kind for each in found.values()}]
    if missing:
        if not folder:  # what it is instead, if that can be told
            list(_networks(_read(path, []), replace(reading, parts=()), []))
        raise UserError(f"{path}: holds no {missing[0]}; see --config.parts")
    tokenizer: Path | LazyArray | None = None
    if ("text_encoder", False) in found:
        tokenizer = _tokenizer(folder, inner, ignored)
    return Source(list(found.values()), tokenizer, ignored)


def _read(file: Path, inner: list[LazyArray]) -> WeightFile:
    """A file; the tokenizer within goes to `inner`."""
    weights = read_weights(file)
    about = of_deepspeed(file, [x.size for arrays in weights.entries.values() for x in arrays.values()])
    for arrays in weights.entries.values():
        if SPIECE in arrays:
            inner.append(arrays.pop(SPIECE))
    return replace(weights, about=about or weights.about)


def _pipeline_files(folder: Path, parts: Collection[str]) -> Iterator[Path]:
    index = checked(INDEX_RULE, read_json(folder / PIPELINE), folder / PIPELINE)
    if (index.get("transformer_2") or [None])[0] and (not parts or "dit" in parts):
        raise UserError(
            f"{folder}: a pipeline of two transformers (Wan2.2-A14B): a run holds one; convert its folders transformer"
            " (high noise) and transformer_2 one by one, and the rest by --config.parts=vae,text_encoder"
        )
    for component in COMPONENTS:
        wanted = not parts or {"transformer": "dit"}.get(component, component) in parts
        if not wanted or not (index.get(component) or [None])[0]:
            continue
        files = weight_files(folder / component) if (folder / component).is_dir() else []
        if not files:
            raise UserError(f"{folder / component}: no weights here, but {PIPELINE} names this component")
        yield from files


def _about(
    file: Path, assumed: Mapping[str, Any] | None, ignored: list[str]
) -> Callable[[str, str, Arrays], Mapping[str, Any] | None]:
    """config.json beside a file, for the layouts that have one; some other model's is left out, and said so."""

    def about(kind: str, layout: str, arrays: Arrays) -> Mapping[str, Any] | None:
        beside = file.parent / "config.json"
        if kind != "dit" and layout == "original":
            return None
        if layout in ("original", "diffusers") and beside.is_file():
            content = read_json(beside)
            if is_own(kind, content):
                return content
            if (note := f"{beside} (of some other model)") not in ignored:
                ignored.append(note)
        patch = arrays.get("patch_embedding.weight")
        fits = kind == "dit" and layout == "original" and assumed and patch and patch.shape[0] == assumed["dim"]
        return {key: assumed[key] for key in ("num_heads", "eps")} if fits and assumed else None

    return about


def _role(entry: str) -> str:
    """What an entry's name says it is: a generator, an average of one, a critic, or some other network."""
    words = entry.split(".")
    if any(word in CRITICS for word in words):
        return CRITIC
    if any(word in FROZEN for word in words):
        return OTHER
    if any(AVERAGED.fullmatch(word) for word in words):
        return AVERAGE
    return GENERATOR if all(word in PLAIN or not word for word in words) else OTHER


def _networks(weights: WeightFile, reading: Reading, ignored: list[str]) -> Iterator[Found]:
    """The networks of a file with their roles; what is left out goes to `ignored`."""
    entries, about = weights.entries, _about(weights.path, reading.assumed, ignored)

    def read(entry: str) -> Network:
        network = imported(entries[entry], weights.path, about, dtype=reading.dtype, unscaled=reading.unscaled)
        ignored.extend(note.removeprefix("left out: ") for note in network.notes if note.startswith("left out: "))
        return replace(network, notes=(*filter(None, [weights.about]), *network.notes))

    if reading.key and reading.key not in entries:
        raise UserError(f"{weights.path}: --config.key={reading.key}: {_names(entries)}")
    if reading.key:
        if not reading.parts or _kind(entries[reading.key]) in reading.parts:
            network = read(reading.key)
            yield Found(network, "student" if network.kind == "dit" else network.kind, entry=reading.key)
        return
    kinds = {entry: _kind(arrays) for entry, arrays in entries.items()}
    if not any(kinds.values()) and not reading.parts:
        read(next((entry for entry in entries if _role(entry) == GENERATOR), next(iter(entries))))  # says what it is
    wanted = {entry: kind for entry, kind in kinds.items() if kind and (not reading.parts or kind in reading.parts)}
    chosen = _transformers([entry for entry, kind in wanted.items() if kind == "dit"], weights.path)
    others = {entry: (kind, False) for entry, kind in wanted.items() if kind != "dit"}
    for entry, (role, ema) in (chosen | others).items():
        yield Found(read(entry), role, ema, entry)
    ignored += [_left(entry, arrays) for entry, arrays in entries.items() if entry not in chosen | others]


def _names(entries: Collection[str]) -> str:
    return f"the file's entries are {', '.join(entries)}; name one of them"


def _kind(arrays: Arrays) -> str:
    """The kind of network, "" where none is known."""
    try:
        return recognised(arrays)[0]
    except UserError:
        return ""


def _left(entry: str, arrays: Arrays) -> str:
    """An entry that is not taken, for a message."""
    return f"{entry or 'the rest'} ({'a LoRA' if what_else(arrays) else counted(len(arrays), 'tensor')})"


def _transformers(entries: list[str], path: Path) -> dict[str, tuple[str, bool]]:
    """Which of a file's transformers are taken, as (role, whether an average).

    Raises:
      UserError: none is the student's for sure.
    """
    roles: dict[str, list[str]] = {role: [] for role in (GENERATOR, AVERAGE, CRITIC, OTHER)}
    for entry in entries:
        roles[_role(entry)].append(entry)
    order = lambda entry: PLAIN.index(word) if (word := entry.partition(".")[0]) in PLAIN else len(PLAIN)
    students = [*sorted(roles[GENERATOR], key=order)[:1], *roles[AVERAGE]]
    if not students and entries:
        if len(entries) > 1 or roles[CRITIC]:
            raise UserError(f"{path}: --config.key: {_names(entries)}")
        students = entries
    out = {entry: ("student", i > 0) for i, entry in enumerate(students[:2])}
    return out | {entry: ("critic", False) for entry in roles[CRITIC][:1]}


def _tokenizer(folder: Path | None, inner: list[LazyArray], ignored: list[str]) -> Path | LazyArray | None:
    """The tokenizer's folder in a release or pipeline, or else the file within the weights; None of a bare file."""
    for name in TOKENIZERS if folder else ():
        if folder and any((folder / name / file).is_file() for file in TOKENIZER_FILES):
            return _own_tokenizer(resolved_inside(folder / name, folder))
    if inner and (fault := _fault(inner[0])):
        ignored.append(f"{SPIECE} ({fault})")
    elif inner:
        return inner[0]
    if folder and not inner:
        raise UserError(f"{folder}: no tokenizer ({' or '.join(TOKENIZERS)}) beside the text encoder; copy it there")
    return None


def _fault(spiece: LazyArray) -> str:
    """Why a tensor is no spiece.model, "" if it is one."""
    if spiece.nbytes > TOKENIZER_BYTES:
        return f"{spiece.nbytes} bytes are no tokenizer's"
    try:
        SentencePieceProcessor(model_proto=spiece.read().tobytes())
    except (RuntimeError, ValueError, TypeError):
        return "no SentencePiece model; copy the tokenizer's folder into the world"
    return ""


def _own_tokenizer(folder: Path) -> Path:
    """The folder, after checking that none of its files is a link out of it."""
    for file in files_of(folder):
        resolved_inside(file, folder)
    return folder


def copy_tokenizer(source: Path | LazyArray, target: Path) -> None:
    """Copies a tokenizer's files into the new folder `target`, following links; or writes the one in a weight file.

    Raises:
      UserError: a link leads out of the folder.
    """
    if isinstance(source, LazyArray):
        target.mkdir(parents=True)
        (target / SENTENCEPIECE_FILE).write_bytes(source.read().tobytes())
        return
    own = _own_tokenizer(resolved_inside(source, source.parent))
    target.mkdir(parents=True)
    for file in files_of(own):
        shutil.copyfile(file, target / file.name)
