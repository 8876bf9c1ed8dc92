"""What every key of a config means: one sentence, its unit and its choices, for `--help` and docs/config.md.

The sentences are in `core.keys_experiment` (what stages have in common) and `core.keys_verbs` (every other verb's);
ranges of numbers are in `core.settings`, where they are also checked.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from cfjax.core.key import Key
from cfjax.core.keys_experiment import EXPERIMENT
from cfjax.core.keys_verbs import VERBS
from cfjax.core.reference_names import REFERENCE_NAMES
from cfjax.core.settings import Range, rule_of

STAGED = "experiment"  # the kind of the stages' configs; the others are called as the verb that reads them
_SHOWN = 3  # keys that a message offers
_CLOSE = 0.1  # and how much less alike than the first


def kind_of(verb: str, names: Collection[str]) -> str:
    """The kind of a config by its keys: a verb may take several, as `cfjax plan` takes stages and streams."""
    if "stage" in names:
        return STAGED
    if verb == "plan":
        return "bench" if "preset" in names else "generate"
    return verb


@cache
def keys_for(kind: str) -> tuple[Key, ...]:
    """The keys of a kind of config, in the order in which they match."""
    if kind == STAGED:
        return EXPERIMENT
    inner = EXPERIMENT if kind == "convert" else ()
    return (*VERBS.get(kind, ()), *(Key(rf"experiment\.(?:{key.pattern})", *key[1:]) for key in inner))


@cache
def key_of(kind: str, name: str) -> Key | None:
    """What a key means; None for a key of one's own."""
    return next((key for key in keys_for(kind) if re.fullmatch(key.pattern, name)), None)


def range_of(kind: str, name: str) -> Range | None:
    """The range of a number; None where there is none."""
    return (rule_of("train", name) or rule_of("precompute", name)) if kind == STAGED else rule_of(kind, name)


def values_of(kind: str, name: str, value: Any) -> str:
    """What a key may be, as "more than 0" or "adamw, muon", with its unit; "" for any text."""
    key = key_of(kind, name)
    if isinstance(value, bool):
        return "True, False"
    if key and key.choices:
        named = ", ".join(choice or "''" for choice in key.choices)
        return f"some of {named}" if isinstance(value, tuple) else named
    unit, allowed = key.unit if key else "", range_of(kind, name)
    items = value if isinstance(value, tuple) else (value,)
    if allowed is None or not all(isinstance(n, (int, float)) for n in items):
        return unit
    bounds = f"each {allowed}" if isinstance(value, tuple) else str(allowed)
    return f"{unit}: {bounds}" if unit else bounds


def help_lines(verb: str, settings: Mapping[str, Any]) -> list[str]:
    """The lines of `--help` for a config's leaves, by their dotted names."""
    kind, lines = kind_of(verb, settings), list[str]()
    for name, value in settings.items():
        allowed, key = values_of(kind, name, value), key_of(kind, name)
        lines.append(f"  --config.{name}={value!r}" + (f"  [{allowed}]" if allowed else ""))
        if key:
            lines.append(f"      {key.text}")
    return lines


# ---- keys that are not there


def hint_for(name: str, known: Collection[str]) -> str:
    """What a message says of a key that is not `known`: the nearest ones, or why the reference's name has none."""
    word = name.rpartition(".")[2]
    notes = [f"{ours}, {note}" if ours else note for theirs, ours, note in REFERENCE_NAMES if word == theirs]
    if notes and not any(key in known for key in reference_keys(name)):
        return f"; of this name of the PyTorch reference docs/config.md says: {notes[0]}"
    near = nearest_keys(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def nearest_keys(name: str, known: Collection[str]) -> list[str]:
    """The keys that a mistyped one may stand for, the likeliest first; [] where none is near.

    A key whose last word is the same, wherever it is, comes before one that only looks alike. A name of the PyTorch
    reference's YAML files stands for ours.
    """
    ours = [key for key in reference_keys(name) if key in known]
    if ours:
        return ours[:_SHOWN]
    scores = {leaf: _likeness(name, leaf) for leaf in known}
    best = max(scores.values(), default=0.0)
    found = sorted((leaf for leaf, score in scores.items() if score >= max(0.6, best - _CLOSE)), key=scores.__getitem__)
    return found[::-1][:_SHOWN]


def _likeness(name: str, leaf: str) -> float:
    """From 0 to 2: how alike the last words are, and then the groups before them."""
    group, _, word = name.rpartition(".")
    of, _, last = leaf.rpartition(".")
    alike = difflib.SequenceMatcher(None, word, last).ratio()
    if word == last:
        alike = 1.2
    groups = difflib.SequenceMatcher(None, group, of).ratio() if group else 0.0
    student = 0.05 if ".student." in f".{leaf}." else 0.0  # the role that every stage has
    whole = difflib.SequenceMatcher(None, name, leaf).ratio()
    return max(alike + 0.4 * groups + student if alike >= 0.75 else 0.0, whole)


def reference_keys(name: str) -> list[str]:
    """Our keys for a name in a YAML file of the PyTorch reference, whatever group it is given in."""
    word = name.rpartition(".")[2]
    for theirs, ours, _ in REFERENCE_NAMES:
        if name == theirs or word == theirs:
            return [key.strip() for key in ours.split(",") if key]
    return []
