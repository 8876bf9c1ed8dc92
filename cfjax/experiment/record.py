"""The record of a run or an exported model: read, and validated before it is used."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.core.limits import FRAMES, LATENT_NUMBERS, SIDE, STEPS, TEXT_ROWS
from cfjax.core.paths import path_of
from cfjax.core.schema import (
    SIZE,
    Rule,
    checked,
    each_of,
    either,
    flag,
    load_json,
    number,
    one_of,
    row,
    several,
    table,
    text,
    whole,
)
from cfjax.data.shapes import SHAPES_RULE
from cfjax.training.checkpoint import read_meta
from cfjax.worlds.assets import META_FILE, asset

_BLOCKS = table(
    {"frames": whole(1, FRAMES), "independent_first_frame": flag},
    {"window": whole(0, FRAMES), "sink": whole(0, FRAMES), "memory": text(256)},
    closed=True,
)
_SHIFT = number(0, 1000, above=True)
_LEVELS = several(whole(0, 1000), 0, 1000)
_FEW = table(
    {"kind": one_of("few_step", "rolling"), "steps": _LEVELS, "shift": _SHIFT}, {"first_steps": _LEVELS}, closed=True
)
_MANY = table(
    {"kind": one_of("many_step", "bidirectional"), "steps": whole(1, STEPS), "shift": _SHIFT},
    {"guidance": number(-1000, 1000), "solver": text(64)},
    closed=True,
)
_PLACE = text(4096)
_TOY = table(
    {
        "source": one_of("shapes"),
        "path": _PLACE,
        "assets": _PLACE,
        "channels": SIZE,
        "text_length": whole(1, TEXT_ROWS),
        "shapes": SHAPES_RULE,
    }
)


def _latents(name: str, value: Any) -> str:
    """(F, H, W, C) of a clip."""
    wrong = row(whole(1, FRAMES), whole(1, SIDE), whole(1, SIDE), SIZE)(name, value)
    many = not wrong and math.prod(value) > LATENT_NUMBERS
    return f"{name} is {value}, more than {LATENT_NUMBERS} numbers" if many else wrong


START = table({"stage": text(64), "blocks": _BLOCKS})  # what a role that starts from these weights asks for
MODELS = table({}, {"models": each_of(table({}))})  # what sizes a role that starts from these weights
SIZES = table({"models": each_of(table({}))}, {"world_path": _PLACE})  # what moving its weights asks for
RUN = table(
    {
        "stage": text(64),
        "step": whole(),
        "config": table(
            {
                "blocks": _BLOCKS,
                "sampler": either(_MANY, _FEW),
                "ema": each_of(table({})),
                "data": either(_TOY, table({"source": one_of("")})),
            }
        ),
        "models": each_of(table({})),
        "blocks": _BLOCKS,
        "latent_shape": _latents,
        "world": text(64),
    },
    {"world_path": _PLACE, "records": whole(), "image_start": flag},
)


def read_run(name: str | Path, rule: Rule = RUN) -> dict[str, Any]:
    """The record of a run directory, or of an exported model by its path or shipped name.

    Args:
      rule: its schema.

    Raises:
      UserError: there is none, it is broken, or a key is missing or has a value that it cannot have.
    """
    exported = asset(str(name), META_FILE)
    if exported is None:
        meta = read_meta(path_of(name))
    else:
        try:
            meta = load_json(exported)
        except (OSError, ValueError) as error:
            raise UserError(f"{exported}: cannot be read as JSON ({error}); copy it again") from None
    return checked(rule, meta, exported or name)


def config_from_meta(meta: Mapping[str, Any]) -> ConfigDict:
    """The config that a run was trained with."""
    return thawed(meta["config"])


def thawed(value: Any) -> Any:
    """The values of a ConfigDict from JSON: lists become tuples again."""
    if isinstance(value, Mapping):
        return ConfigDict({key: thawed(item) for key, item in value.items()})
    return tuple(thawed(item) for item in value) if isinstance(value, list | tuple) else value
