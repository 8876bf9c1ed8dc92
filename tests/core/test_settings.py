"""The table of settings: every number of every shipped config has its range, and values outside are errors."""

import importlib
import math
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cfjax.core.cli import keys_of, parse
from cfjax.core.errors import UserError
from cfjax.core.settings import EVALUATED, RULES, TOGETHER, check_settings, rule_of
from cfjax.core.tree import match
from cfjax.experiment.presets import NEVER
from cfjax.quickstart import recipe
from cfjax.study import kind_of
from tests.commands import ROOT
from tests.test_configs import CASES, get_config

STAGES = ("ar_diffusion", "bidirectional", "consistency", "dmd", "ode_regression")
EMPTY = {"generate": {"seeds", "sampler.steps", "sampler.first_steps"}, "train": {"roles.critic.branch.layers"}}
EMPTY["bench"] = EMPTY["generate"] - {"seeds"}
EMPTY |= dict.fromkeys(("plan", "precompute"), EMPTY["train"])
READS = {  # the configs that a verb takes
    "train": STAGES,
    "plan": STAGES,
    "precompute": ("precompute", "ode_pairs", *STAGES),
    "study injectivity": ("study",),
    "study ablation": ("study",),
    "study uncertain": ("study",),
}


def numbers_of(c: ConfigDict) -> set[str]:
    """Keys of numbers, and of tuples of them; an empty tuple may hold either."""
    whole = {key: value if isinstance(value, tuple) else (value,) for key, value in keys_of(c).items()}
    return {key for key, value in whole.items() if value and all(type(n) in (int, float) for n in value)}


@cache
def shipped() -> dict[tuple[str, str], ConfigDict]:
    """Every config with every word, and some of them together, by the file's name and the words."""
    out = {}
    for path, arg in CASES:
        with suppress(UserError):  # words that exclude each other
            out[path.stem, arg] = get_config(path)(arg) if arg else get_config(path)()
    return out


def read_by(verb: str) -> list[ConfigDict]:
    names, kind = READS.get(verb, (verb,)), verb.removeprefix("study ")
    return [c for (name, _), c in shipped().items() if name in names and (name != "study" or kind_of(c) == kind)]


def settings_of(verb: str) -> set[str]:
    """The names of a verb's numbers: its configs' and its flags'; those of tuples that are empty, as numbers may be."""
    out = set().union(*map(numbers_of, read_by(verb))) | EMPTY.get(verb, set())
    if verb == "convert":  # whatever a stage's config may hold
        out |= {f"experiment.{name}" for name in settings_of("train")}
    flags = getattr(importlib.import_module(f"cfjax.{verb.partition(' ')[0]}"), "FLAGS", ())
    return out | {f"--{flag.name}" for flag in flags if flag.kind in (int, float)}


@pytest.mark.parametrize("verb", RULES)
def test_every_number_of_every_config_has_its_range(verb):
    """Both ways: no number without a rule, no rule without a number."""
    match(RULES[verb], settings_of(verb))


def test_every_shipped_config_is_within():
    for verb in RULES:
        for c in read_by(verb):
            check_settings(verb, keys_of(c))


@pytest.mark.parametrize(
    ("verb", "settings", "message"),
    [
        ("train", {"keep": 0}, "--config.keep=0: use 1 or more"),
        ("train", {"save_every": 0}, "save_every=0: use 1 or more"),
        ("train", {"log_every": -1}, "log_every=-1"),
        ("train", {"steps": 0}, "steps=0"),
        ("train", {"steps": 10**12}, "steps=1000000000000: use 1 or more, at most 2147483647"),
        ("train", {"steps": 1e5}, "steps=100000.0: use a whole number, 1 or more"),
        ("train", {"seed": 2**32}, "seed=4294967296: use 0 to 4294967295"),
        ("train", {"seed": -1}, "seed=-1"),
        ("train", {"data.batch_size": 0}, "data.batch_size=0"),
        ("train", {"optim.student.lr": -1e-6}, "lr=-1e-06: use more than 0"),
        ("train", {"optim.critic.lr": math.nan}, "lr=nan: use more than 0"),
        ("train", {"optim.critic.eps": 1e-60}, "eps=1e-60: use more; that is 0 in float32"),
        ("train", {"objective.shift": 1e-12}, "shift=1e-12: use 0.001 to 1000"),
        ("train", {"optim.critic.b2": 1.0}, "b2=1.0: use 0 or more, less than 1"),
        ("train", {"ema.student.decay": 1.5}, "decay=1.5"),
        ("train", {"objective.guidance": math.inf}, "guidance=inf: use -1000 to 1000"),
        ("train", {"my.own": math.nan}, "--config.my.own=nan: use a finite number"),
        ("train", {"my.own": (1.0, -math.inf)}, "my.own"),
        ("train", {"data.shapes.speed": (1.0,)}, "give 2 numbers"),
        ("train", {"sampler.steps": (1000, 0)}, "1 to 1000"),
        ("train", {"sampler.steps": 10**9}, "1 to 1000"),
        ("convert", {"experiment.optim.student.lr": 0.0}, "--config.experiment.optim.student.lr=0.0"),
        ("convert", {"latents": (21, 60)}, "give 3 numbers"),
        ("generate", {"fps": 0.0}, "fps=0.0: use 0.001 to 1000"),
        ("generate", {"fps": 1e9}, "fps=1000000000.0"),
        ("generate", {"scale": 0}, "scale=0"),
        ("generate", {"sampler.guidance": math.nan}, "guidance=nan"),
        ("generate", {"sampler.shift": 1e-9}, "shift=1e-09: use 0, or 0.001 to 1000"),
        ("generate", {"batch": 0}, "batch=0"),
        ("generate", {"seeds": (1, -1)}, r"seeds=\(1, -1\): use 0 to"),
        ("precompute", {"max_crop": 1.5}, "max_crop=1.5: use 0 to 1"),
        ("precompute", {"latent_shape": (21, -60, 104, 16)}, "latent_shape"),
        ("plan", {"--frames": -3}, "^--frames=-3"),
        ("evaluate", {"clips": 100, "batch": 60}, r"--config.clips=100: must divide by batch = 60"),
        ("export", {"clips": 100}, "a multiple of 60"),
        ("train", {"data.source": "shapes", "data.clips": 0}, "data.clips=0: use 1 or more"),
        (
            "train",
            {"data.batch_size": 6, "mesh.data": 1, "mesh.fsdp": 2, "optim.critic.accumulate": 2},
            r"data.batch_size=6: must divide by mesh.data \* mesh.fsdp \* optim.critic.accumulate = 4",
        ),
        ("quickstart", {"budget": "a", "budgets.a.pairs": 5, "budgets.a.clips": 4}, "pairs=5: use .*clips=4 or fewer"),
        ("quickstart", {"budget": "a", "budgets.a.evaluation": 61}, "evaluation=61: use up to 60"),
    ],
)
def test_what_is_outside_is_reported(verb, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        check_settings(verb, {"stage": "dmd", **settings})
    assert "\n" not in str(caught.value)


def test_ends_that_people_use_are_within():
    check_settings(
        "train", {"ema.student.start": NEVER, "ema.student.decay": 0.0, "seed": 2**32 - 1, "sample_every": 0}
    )
    check_settings(
        "train", {"optim.student.clip": 0, "stall_seconds": 0.0, "data.max_corrupt": 1.0, "steps": 2**31 - 1}
    )
    check_settings(
        "generate", {"window": -1, "sink": -1, "sampler.guidance": -1.0, "sampler.shift": 0.0, "fps": 23.976}
    )
    check_settings("precompute", {"shard": -1, "shards": 0, "encode_frames": 0})
    check_settings("study injectivity", {"seeds": 0, "anything": "a word", "nothing": None, "flag": True})


def test_a_table_names_verbs_alone():
    assert {verb.partition(" ")[0] for verb in RULES} <= set(importlib.import_module("cfjax.__main__").VERBS)
    assert TOGETHER.keys() <= RULES.keys() and rule_of("train", "keep").low == 1 and rule_of("train", "own") is None


def test_a_quickstart_evaluates_in_whole_batches(tmp_path):
    """`EVALUATED` is the batch that its commands ask for."""
    c = get_config(ROOT / "configs" / "quickstart.py")()
    (asked,) = {arg for step in recipe(c, tmp_path) for arg in step.argv if arg.startswith("--config.batch=")}
    assert asked == f"--config.batch={EVALUATED}"


@pytest.mark.parametrize("given", ["", " ", "/", "//", "a\nb", "file", "file/run", "dangling"])
def test_a_workdir_that_is_no_place_for_a_run(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="--workdir=") as caught:
        parse("train", ["--config=configs/dmd.py:toy", f"--workdir={given}"], description="")
    assert "\n" not in str(caught.value) and sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_workdirs_that_are_places(tmp_path, monkeypatch):
    """The current folder goes by its own name, so that a file may be put beside it."""
    (tmp_path / "here" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "in")
    for given, whole in ((".", tmp_path / "here" / "in"), ("..", tmp_path / "here"), ("a b/é", Path("a b/é"))):
        argv = ["--config=configs/dmd.py:toy", f"--workdir={given}"]
        assert parse("train", argv, description="")[1] == whole
