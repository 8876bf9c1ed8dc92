"""docs/config.md: every key of every shipped config, and our keys for the names of the PyTorch reference's YAML files.

    python benchmarks/config_page.py            writes the page
    python benchmarks/config_page.py --check    compares it instead; exit code 1 if it is another

The sentences are those of `cfjax/core/keys_experiment.py` and `keys_verbs.py`, the ranges those of
`cfjax/core/settings.py`, the names those of `cfjax/core/reference_names.py`.
"""

import argparse
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from ml_collections import ConfigDict

from cfjax.core.cli import keys_of
from cfjax.core.key import Key
from cfjax.core.keys import STAGED, key_of, keys_for, values_of
from cfjax.core.keys_experiment import GROUPS
from cfjax.core.paths import write_atomically
from cfjax.core.reference_names import REFERENCE_NAMES

ROOT = Path(__file__).parents[1]
PAGE = "docs/config.md"
STAGES = ("bidirectional", "ar_diffusion", "ode_pairs", "ode_regression", "consistency", "dmd")
# Kind of config -> its heading, its configs, and a line about them.
SECTIONS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "generate": ("cfjax generate", ("generate",), "Also `cfjax plan` of a stream. Rules: [wan.md](wan.md)."),
    "precompute": ("cfjax precompute", ("precompute",), "Of clips, LMDBs and prompts: [data.md](data.md)."),
    "convert": (
        "cfjax convert",
        ("convert",),
        "`experiment.KEY` is every key of the stage that the switches name, as [above](#stages).",
    ),
    "evaluate": ("cfjax evaluate", ("evaluate",), ""),
    "serve": ("cfjax serve", ("serve",), "[serving.md](serving.md)."),
    "play": ("cfjax play", ("play",), "[serving.md](serving.md)."),
    "bench": ("cfjax bench", ("bench",), "[performance.md](performance.md)."),
    "compare": ("cfjax compare", ("compare",), "[compare.md](compare.md)."),
    "quickstart": ("cfjax quickstart", ("quickstart",), ""),
    "export": ("cfjax export", ("export",), ""),
    "profile_heads": ("cfjax profile_heads", ("profile_heads",), "[memory.md](memory.md)."),
    "study injectivity": ("cfjax study injectivity", ("study",), "[theory.md](theory.md)."),
    "study ablation": ("cfjax study ablation", ("study:ablation",), ""),
    "study uncertain": ("cfjax study uncertain", ("study:uncertain",), ""),
}
HEAD = """# Config keys

Every key of every shipped config: `--config.KEY=value` sets it. `cfjax VERB --config=configs/NAME.py:SWITCH --help`
says the same for one config with its own defaults; a mistyped key is told the nearest. Defaults here are those without
a switch, several where the configs differ. What may change when a run resumes:
[pods.md](pods.md#changing-a-run). This page is written by `python benchmarks/config_page.py`.

- [Names of the PyTorch reference](#names-of-the-pytorch-reference)
- [Stages](#stages): `cfjax train`, `cfjax plan`, `cfjax precompute` of ODE pairs
"""
NAMES = """## Names of the PyTorch reference

What a YAML file of the reference says, and our key for it, which a command line with such a name is told.
`--config.reference=True` sets the reference's own numbers and quirks of a stage: [compare.md](compare.md). "Read, never
set": its code reads the name, and no shipped file has it.

| theirs | ours | note |
|---|---|---|
"""
STAGE_HEAD = """## Stages

The configs of the stages (`configs/bidirectional.py` to `configs/dmd.py`) and of ODE pairs (`configs/ode_pairs.py`).
ROLE is student, critic, teacher or real_score.
"""
TABLE = "| key | default | values | what it is |\n|---|---|---|---|\n"


@cache
def get_config(spec: str) -> ConfigDict:
    """`NAME:arg` of configs/."""
    name, _, arg = spec.partition(":")
    found = importlib.util.spec_from_file_location(f"page_{name}", ROOT / "configs" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    make = module.get_config
    return make(arg) if inspect.signature(make).parameters else make()


def general(name: str) -> str:
    """A key without the name of its role, scorer or budget."""
    name = re.sub(r"^(roles|optim|ema|cadence)\.\w+", r"\1.ROLE", name)
    name = re.sub(r"^scorers\.\w+", "scorers.NAME", name)
    return re.sub(r"^titles\..*", "titles.NAME", re.sub(r"^budgets\.\w+", "budgets.NAME", name))


def cell(text: str) -> str:
    """A table's cell, with links to the pages that it names."""
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text.replace("|", r"\|"))


def default(values: list[object]) -> str:
    """The values that the configs have, each once."""
    shown = [f"`{value}`" for value in dict.fromkeys(map(repr, values))]
    joined = ", ".join(shown)
    return joined if len(joined) <= 60 else "by config" if len(shown) > 1 else "a list"


def rows(kind: str, keys: Iterable[Key], specs: Sequence[str]) -> str:
    """A table of some keys of a kind, from the configs that have them."""
    found: dict[Key, dict[str, list[tuple[str, object]]]] = {key: {} for key in keys}
    for spec in specs:
        for name, value in keys_of(get_config(spec)).items():
            key = None if isinstance(value, ConfigDict) else key_of(kind, name)
            if key in found and (spec in specs[: len(STAGES)] or not found[key].get(general(name))):
                found[key].setdefault(general(name), []).append((name, value))
    lines = []
    for key, names in found.items():
        if names:
            every = [pair for pairs in names.values() for pair in pairs]
            named = ", ".join(f"`{name}`" for name in names)
            said = values_of(kind, *every[0])
            values = default([value for _, value in every])
            lines.append(f"| {named} | {cell(values)} | {cell(said)} | {cell(key.text)} |\n")
    return TABLE + "".join(lines)


def page() -> str:
    """The whole page."""
    anchor = lambda title: title.replace(" ", "-")
    parts = [HEAD + "".join(f"- [{title}](#{anchor(title)})\n" for title, _, _ in SECTIONS.values())]
    lines = []
    for theirs, ours, note in REFERENCE_NAMES:
        named = ", ".join(f"`{key.strip()}`" for key in ours.split(",") if key)
        lines.append(f"| `{theirs}` | {named} | {cell(note)} |\n")
    parts += [NAMES + "".join(lines), STAGE_HEAD]
    variants = [*STAGES, "ar_diffusion:toy", "ar_diffusion:toy,actions", "dmd:gan"]  # switches that add keys
    for title, keys in GROUPS.items():
        parts.append(f"### {title}\n\n{rows(STAGED, keys, variants)}")
    for kind, (title, specs, about) in SECTIONS.items():
        lead = " ".join(filter(None, (*(f"`configs/{spec.partition(':')[0]}.py`." for spec in specs), about)))
        own = [key for key in keys_for(kind) if not key.pattern.startswith("experiment")]
        parts.append(f"## {title}\n\n{lead}\n\n{rows(kind, own, specs)}")
    return "\n".join(parts)


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given, file = parser.parse_args(), ROOT / PAGE
    if given.check:
        return int(file.read_text() != page())
    write_atomically(file, page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
