"""What a run with adapters records of them, and its networks' weights with the adapters merged.

A checkpoint of such a run holds the adapters alone. The frozen network below is where the role started from, in the run
directory or exported model `roles.ROLE.init`: its record names it, with a hash of its checkpoint, so that another one,
or one that was trained further, is refused.
"""

from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, as_lazy
from cfjax.core.limits import AXIS
from cfjax.core.paths import is_folder, path_of
from cfjax.core.schema import checked, each_of, flag, number, table, text, whole
from cfjax.models.lora import LoraConfig, merged_arrays
from cfjax.training.checkpoint import checkpoint_hash, open_role, read_meta
from cfjax.worlds.assets import META_FILE, MODEL_FILE, asset

LORA = "lora"  # key of the record: role -> what follows
_RECORD = each_of(
    table(
        {
            "rank": whole(1, AXIS),
            "alpha": number(0, 1e6, above=True),
            "targets": text(64),
            "base": table({"init": text(4096), "role": text(64), "ema": flag, "hash": text(64)}),
        }
    )
)


def base_hash(init: str) -> str:
    """A hash of the weights of a run directory or an exported model, without reading a run's: copies have the same.

    Raises:
      UserError: there is none.
    """
    if exported := asset(init, MODEL_FILE):
        with exported.open("rb") as content:
            return file_digest(content, "sha256").hexdigest()[:16]
    if not init or not is_folder(path_of(init)):
        raise UserError(f"{init!r}: no such run directory or exported model; a LoRA needs the weights below it")
    return checkpoint_hash(path_of(init), int(read_meta(init)["step"]))


def lora_record(settings: LoraConfig, init: str, role: str, ema: bool) -> dict[str, Any]:
    """What a run's record says of one role's adapters: see `open_network`."""
    base = {"init": init, "role": role, "ema": ema, "hash": base_hash(init)}
    return {"rank": settings.rank, "alpha": settings.alpha, "targets": settings.targets, "base": base}


def records_of(meta: Mapping[str, Any], run: str | Path) -> dict[str, Any]:
    """The adapters that a run's record names, by role; {} of a run without any.

    Raises:
      UserError: a value that it cannot have.
    """
    return checked(_RECORD, meta.get(LORA, {}), f"{run}: lora") if meta.get(LORA) else {}


def settings_of(record: Mapping[str, Any]) -> LoraConfig:
    """The settings in a record of `lora_record`."""
    return LoraConfig(record["rank"], record["alpha"], record["targets"])


def open_network(
    run: str | Path,
    role: str,
    *,
    ema: bool = False,
    stages: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    together: bool = False,
) -> dict[str, LazyArray]:
    """A role's network in a run directory by our names, its adapters merged where it has any; not yet read.

    Args:
      meta: the run's record, if it was read already.
      stages, together: see `training.checkpoint.open_role`.

    Raises:
      UserError: no run or no such role; the network below is not there, or is not the one that the adapters are for.
    """
    own = open_role(run, role, ema=ema, stages=stages, together=together)
    record = records_of(meta if meta is not None else read_meta(run), run).get(role)
    if record is None:
        return own
    return merged_arrays(open_base(record, run, together=together), own, settings_of(record).factor)


def open_base(record: Mapping[str, Any], run: str | Path, *, together: bool = False) -> dict[str, LazyArray]:
    """The network below a run's adapters; not yet read.

    Raises:
      UserError: it is not there, or not the one that they were trained on.
    """
    base = record["base"]
    try:
        found = base_hash(base["init"])
    except UserError as error:
        raise UserError(f"{run}: the network below its LoRA is gone ({error}); bring it back there") from None
    if found != base["hash"]:
        raise UserError(
            f"{run}: its LoRA was trained on other weights than {base['init']!r} now holds ({found}, then"
            f" {base['hash']}); bring those back there"
        )
    if file := asset(base["init"], META_FILE) and asset(base["init"], MODEL_FILE):
        try:
            return as_lazy({name: np.asarray(x).astype(np.float32) for name, x in load_file(file).items()})
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: broken or cut short ({error}); copy it again") from None
    return open_network(base["init"], base["role"], ema=base["ema"], together=together)
