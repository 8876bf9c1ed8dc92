"""Resuming a run with a changed config: changes are reported, and refused where they matter.

Every key of a config has a kind (`CHANGES`), and a changed one is reported in a line. Keys that decide what the run
learns, and from what, may change only with `accept_changes`; those that its checkpoint's arrays depend on may not.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cfjax.core.cli import keys_of
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.paths import is_folder
from cfjax.experiment.data import Data
from cfjax.experiment.record import thawed
from cfjax.training.checkpoint import FOLDER, read_meta
from cfjax.training.plain import from_json, to_json

SHOWN = 3  # keys that a refusal names


class Kind(Enum):
    """The effect of a changed key on a resumed run."""

    FREE = "how fast, how long, where, how often"
    MEANING = "what is learned, or from what"
    FIXED = "which arrays a checkpoint holds"
    NO_EFFECT = "nothing"
    UNREPORTED = "nothing, nor is it worth a line"


# First match wins. Roles that the stage trains are "trained" here, the others "frozen", in place of "roles.NAME".
CHANGES = (
    (r"accept_changes", Kind.UNREPORTED),
    (r"stage|roles|optim|ema", Kind.FIXED),
    (r"trained(\.preset|\.branch(\..+)?)?", Kind.FIXED),
    (r"trained\.lora(\.(rank|targets))?", Kind.FIXED),
    (r"(trained|frozen)\.actions(\..+)?", Kind.FIXED),
    (r"optim\.\w+(\.name)?", Kind.FIXED),
    (r"ema\.\w+", Kind.FIXED),
    (r"trained\.init(_role|_ema|_stages)?", Kind.NO_EFFECT),
    (r"steps|log_every|save_every|keep|checksums|loss_growth", Kind.FREE),
    (r"sample_every|sample_clips|progress|profile|stall_seconds", Kind.FREE),
    (r"(mesh|guard|sampler)(\..+)?", Kind.FREE),
    (r"optim\.\w+\.(lr|adam_lr|schedule|warmup|decay_fraction)", Kind.FREE),
    (r"optim\.\w+\.(b1|b2|eps|weight_decay|clip|accumulate)", Kind.FREE),
    (r"(trained|frozen)\.(remat|attention|storage|offload)", Kind.FREE),
    (r"frozen\.init_stages", Kind.FREE),
    (r"data\.(path|lmdb|batch_size|max_corrupt)", Kind.FREE),
    (r"objective\.(codec_world|save_activations)", Kind.FREE),
    (r"objective\.new_frames", Kind.FIXED),
    (r"(objective|blocks|data|cadence)(\..+)?", Kind.MEANING),
    (r"ema\.\w+\.(decay|start)", Kind.MEANING),
    (r"seed|reference", Kind.MEANING),
    (r"trained\.(precision|lora\.alpha)", Kind.MEANING),
    (r"frozen\.lora(\..+)?", Kind.FREE),
    (r"frozen(\.(preset|precision|init|init_role|init_ema))?", Kind.MEANING),
)
# With objective.new_frames the rollout is in the checkpoint, and its arrays depend on these.
_OF_ROLLOUT = r"data\.batch_size|objective\.window_frames|blocks\.(window|sink|memory)"
_CHOSEN = r"(roles|optim|ema)\.\w+(\.branch|\.actions)?"  # groups that are there or not by choice, not by version


@dataclass(frozen=True)
class Change:
    """A key whose value is not the checkpoint's."""

    key: str
    text: str
    kind: Kind

    def line(self, step: int) -> str:
        """The line that reports it."""
        notes = {Kind.MEANING: " (accepted)", Kind.NO_EFFECT: " (without effect: the run goes on with its own weights)"}
        return f"changed since step {step}: {self.text}{notes.get(self.kind, '')}"


def rule_name(key: str, trained: Collection[str]) -> str:
    """The name of a key in `CHANGES`."""
    return re.sub(r"^roles\.(\w+)", lambda found: "trained" if found[1] in trained else "frozen", key)


def kind_of(key: str, trained: Collection[str]) -> Kind | None:
    """The kind of a key; None where the table does not know it."""
    name = rule_name(key, trained)
    return next((kind for pattern, kind in CHANGES if re.fullmatch(pattern, name)), None)


def checkpoint_of(workdir: Path, stage: str) -> dict[str, Any] | None:
    """The meta record of the checkpoint from which a run of `stage` in `workdir` resumes; None if it has none.

    Raises:
      UserError: another stage, converted weights, or nothing that can be read.
    """
    folder = workdir / FOLDER
    if not is_folder(folder) or not any(entry.name.isdigit() for entry in folder.iterdir()):
        return None
    meta = read_meta(workdir, stages=(stage,))
    if "source" in meta:
        raise UserError(
            f"--workdir={workdir} holds converted weights, no training run; name another --workdir, and start from "
            f"these with --config.roles.student.init={workdir}"
        )
    return meta


def changes(
    recorded: Mapping[str, Any], config: Mapping[str, Any], trained: Collection[str], given: Collection[str] = ()
) -> list[Change]:
    """Every key at which a config differs from a recorded one, in its own order; values compare as JSON keeps them.

    A key that the record lacks is an older version's, which had no such choice: it differs only where the command line
    sets it. A key that the config lacks, or a role, an optimiser or an average that one of them lacks, is a change.
    Keys that the table does not know, as those of one's own config, change the meaning; those of older versions do not.

    Args:
      trained: roles that the stage trains.  given: keys that the command line set.
    """
    recorded_values, own = (_keys(values, trained) for values in (recorded, from_json(to_json(dict(config)))))
    adapted = {role for role in trained if own.get(f"roles.{role}.lora.rank")}  # what they start from stays below them
    out, goes_on = list[Change](), bool(own.get("objective.new_frames", 0))
    for key in [*own, *(key for key in recorded_values if key not in own)]:
        below = ".init" in key and key.split(".")[1] in adapted
        held = goes_on and re.fullmatch(_OF_ROLLOUT, key)
        known = Kind.FIXED if held else kind_of(key, () if below else trained)
        if known is Kind.UNREPORTED or any(key.startswith(f"{change.key}.") for change in out):
            continue
        if key not in recorded_values:
            if key in given:
                out.append(Change(key, f"{key} (not there then) -> {own[key]!r}", known or Kind.MEANING))
            elif re.fullmatch(_CHOSEN, key):
                out.append(Change(key, f"{key} (not there then)", known or Kind.MEANING))
        elif key not in own:
            was = "" if isinstance(recorded_values[key], ConfigDict) else f"{recorded_values[key]!r} -> "
            out.append(Change(key, f"{key} {was}(not there now)", known or Kind.FREE))
        elif not isinstance(own[key], ConfigDict) and own[key] != recorded_values[key]:
            out.append(Change(key, f"{key} {recorded_values[key]!r} -> {own[key]!r}", known or Kind.MEANING))
    return out


def _keys(values: Mapping[str, Any], trained: Collection[str]) -> dict[str, Any]:
    """Groups and leaves by dotted key, lists as tuples; every trained role has a cadence."""
    keys = keys_of(thawed(values))
    return keys | {key: 1 for role in trained if (key := f"cadence.{role}") not in keys}


def report_changes(found: Sequence[Change], meta: Mapping[str, Any], workdir: Path, *, accept: bool) -> None:
    """Reports what changed, once for all processes.

    Args:
      meta: the checkpoint's record.  accept: whether the run's meaning may change.

    Raises:
      UserError: it may not, or the checkpoint's arrays do not allow a change.
    """
    step, start = meta["step"], f"--config.roles.student.init={workdir}"
    if fixed := [change for change in found if change.kind is Kind.FIXED]:
        raise UserError(
            f"--workdir={workdir}: its checkpoint of step {step} does not fit {_some(fixed)}; set {_them(fixed)} back, "
            f"or name another --workdir: a new run starts from these weights with {start} "
            f"--config.roles.student.init_stages=\"('{meta['stage']}',)\""
        )
    if (meaning := [change for change in found if change.kind is Kind.MEANING]) and not accept:
        raise UserError(
            f"--workdir={workdir}: {_some(meaning)} since its checkpoint of step {step}, which changes what the run "
            f"learns; set {_them(meaning)} back, or go on so with --config.accept_changes=True"
        )
    _say(found, step)


def report_dataset(meta: Mapping[str, Any], data: Data, workdir: Path, *, accept: bool) -> None:
    """Reports how the dataset differs from the one of the checkpoint; what the record lacks is no difference.

    Raises:
      UserError: it is another one, and `accept` is not set.
    """
    own = {
        "clip shape": data.dataset.latent_shape,
        "records": len(data.dataset),
        "world": data.dataset.manifest.get("text_encoder", {}).get("world", ""),
    }
    recorded_values = {
        "clip shape": tuple(meta["latent_shape"]),
        "records": meta.get("records"),
        "world": meta["world"],
    }
    found = [
        Change(name, f"{name} of {data.dataset.path} {was!r} -> {own[name]!r}", Kind.MEANING)
        for name, was in recorded_values.items()
        if was and own[name] and was != own[name]
    ]
    if found and not accept:
        raise UserError(
            f"--workdir={workdir}: {_some(found)} since its checkpoint of step {meta['step']}; name the dataset that "
            "the run had, or go on with this one by --config.accept_changes=True"
        )
    _say(found, meta["step"])


def _some(found: Sequence[Change]) -> str:
    """The first changes, and how many there are."""
    texts, more = [change.text for change in found[:SHOWN]], len(found) - SHOWN
    return ", ".join(texts) + (f" and {more} more ({len(found)} in all)" if more > 0 else "")


def _them(found: Sequence[Change]) -> str:
    return "it" if len(found) == 1 else "them"


def _say(found: Sequence[Change], step: int) -> None:
    if jax.process_index() == 0:
        for change in found:
            say(change.line(step))
