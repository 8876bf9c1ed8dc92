"""Recipes: each is a chain of configs that exist, and runs from the command line from a teacher of one's own."""

import itertools
import json
from contextlib import suppress
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest

from cfjax.core.errors import UserError
from cfjax.experiment.data import data_of
from cfjax.experiment.runs import open_run
from cfjax.quickstart import main, recipe
from tests.commands import ROOT, cfjax, tiny


def config_module(name: str):
    spec = util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUICKSTART = config_module("quickstart")


EVALUATE = config_module("evaluate")
LONG, MODES = EVALUATE.get_config("long").memories, EVALUATE.get_config("switch").modes
RECIPES = QUICKSTART.RECIPES
FEW_STEP = [name for name in RECIPES if any(QUICKSTART.STAGES[key][1] == "dmd" for key in RECIPES[name])]
CASES = [(name, "") for name in RECIPES]
CASES += [(name, ",framewise,2step") for name in FEW_STEP if name != "bidirectional"]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_recipe_is_a_chain_of_configs(name, layout):
    c = QUICKSTART.get_config(name + layout)
    steps = recipe(c, Path("runs"))
    trained = ["teacher"]
    for stage in c.stages:
        file, _, words = stage.config.removeprefix("configs/").partition(":")
        config = config_module(file.removesuffix(".py")).get_config(words)
        whole = stage.key == "bidirectional_dmd"  # one block of all frames, whatever the layout
        assert config.blocks.frames == (12 if whole else 1 if layout else 3)
        assert stage.budget in c.budgets.default and set(stage.init.values()) <= set(trained)
        assert set(stage.init) <= set(config.roles)
        if config.stage == "dmd":
            assert config.sampler.steps == ((1000, 500) if layout else (1000, 750, 500, 250))
        trained.append(stage.key)
    shown = [step.key.removeprefix("evaluate ") for step in steps if step.verb == "evaluate"]
    streams = ["long", "switch"] if name in FEW_STEP and name != "bidirectional" else []
    assert c.streams == bool(streams) and shown[len(shown) - len(streams) :] == streams
    assert shown[0] == "teacher" and set(shown) - set(streams) == set(c.titles)


def test_a_regression_takes_the_pairs_of_its_recipe_and_no_others():
    """The AR teacher's in the layout that they were made in; the bidirectional teacher's, which have none, in any."""
    layouts, made, regressions = ("toy", "toy,framewise"), {}, {}
    for layout, (key, (_, file, own, *_)) in itertools.product(layouts, QUICKSTART.STAGES.items()):
        if file in ("ode_pairs", "ode_regression"):
            c = config_module(file).get_config(",".join((layout, *own)))
            (made if file == "ode_pairs" else regressions)[key, layout] = c
    suits = set()
    for (of, c), (pairs, theirs) in itertools.product(regressions.items(), made.items()):
        manifest = json.loads(json.dumps({"source": {"pairs": theirs.to_dict()}}))
        dataset = SimpleNamespace(path="pairs", has_latents=True, trajectory_points=5, manifest=manifest)
        with suppress(UserError):
            data_of(c)._suitable(dataset)
            suits.add((of, pairs))
    bidirectional = itertools.product(("bi_pairs_ode", "bi_ode"), layouts, ("bi_pairs",), layouts)
    causal = {(("ode", layout), ("pairs", layout)) for layout in layouts}
    assert suits == causal | {((a, b), (c, d)) for a, b, c, d in bidirectional}


@pytest.mark.parametrize(
    "words",
    [
        "bidirectional,framewise",
        *(f"{name},{few}" for name in RECIPES if name not in FEW_STEP for few in ("2step", "1step")),
    ],
)
def test_a_recipe_refuses_a_layout_that_it_has_not(words):
    with pytest.raises(UserError, match="exclude each other"):
        QUICKSTART.get_config(words)


def test_a_workdir_belongs_to_one_budget_and_layout(tmp_path):
    (tmp_path / "quickstart.json").write_text("{}")
    with pytest.raises(UserError, match="other settings"):
        main([f"--config={ROOT}/configs/quickstart.py:causvid", f"--workdir={tmp_path}"])


def test_every_stage_is_in_the_teachers_world():
    """Keys that differ from the shipped world's go to the stages that make or read clips."""
    c = QUICKSTART.get_config("")
    steps = recipe(c, Path("runs"), shapes={"data.shapes.colours": "red,orange"})
    given = {step.key for step in steps if "--config.data.shapes.colours=red,orange" in step.argv}
    assert given == {"ar", "pairs", "ode", "dmd"}


@pytest.mark.slow
def test_quickstart_runs_from_an_exported_teacher(tmp_path):
    root, teacher = tmp_path / "own", tmp_path / "teacher"
    keys = {**tiny(root), "data__shapes__frames": 12, "data__shapes__colours": "red,orange,white"}
    assert cfjax("train", "bidirectional.py:toy", root, **keys) == 0
    assert cfjax("export", "export.py", teacher, run=root, clips=60) == 0
    keys = {"budget": "tiny", "teacher": teacher}
    assert cfjax("quickstart", "quickstart.py", tmp_path / "all", **keys) == 0
    assert (tmp_path / "all" / "report" / "index.html").stat().st_size > 10_000
    assert open_run(str(tmp_path / "all" / "dmd"), with_model=False).toy.shapes.colours == ("red", "orange", "white")
    stages = json.loads((tmp_path / "all" / "report" / "metrics.json").read_text())["stages"]
    assert {name: stages[name]["network_calls"] for name in ("teacher", "ar", "ode", "dmd")} == {
        "teacher": 100,
        "ar": 406,
        "ode": 19,
        "dmd": 19,
    }
    # another recipe in the same workdir: the teacher is not measured again
    streams = json.loads((tmp_path / "all" / "report" / "metrics.json").read_text())
    assert list(streams["long"]["policies"]) == LONG.split("|") and list(streams["switch"]["modes"]) == MODES.split("|")
    assert cfjax("quickstart", "quickstart.py:causvid", tmp_path / "all", guard=False, streams=False, **keys) == 0
    stages = json.loads((tmp_path / "all" / "report_causvid" / "metrics.json").read_text())["stages"]
    assert stages["bi_ode_causvid"]["network_calls"] == 19 and "ar" not in stages
    assert cfjax("evaluate", "evaluate.py:table", tmp_path / "t", evaluations=f"{tmp_path}/all/evaluation/*") == 0
    assert {"teacher", "ar", "ode", "dmd", "bi_ode", "bi_ode_causvid"} == set(
        json.loads((tmp_path / "t" / "table.json").read_text())
    )
