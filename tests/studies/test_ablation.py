"""The learned part: which networks are compared, how, and that the commands run (slow)."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.quickstart import TITLES, recipe
from cfjax.study import COMPARED, _pairs_of, _recipe_config, compare_networks
from tests.commands import ROOT

CONFIG = f"--config={ROOT}/configs/study.py:ablation"


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    """Recipes name their configs as a user in a clone would."""
    monkeypatch.chdir(ROOT)


BEFORE = ("ode", "bi_pairs_ode", "cd", "asymmetric_cd", "ar", "bi_ode")


def test_only_the_initialisations_teacher_changes():
    c = parse("study ablation", [CONFIG, "--workdir=unused"], description="")[0]
    assert isinstance(c, ConfigDict) and c.seeds >= 5
    pairs = _pairs_of(c)
    assert pairs["Before DMD"] == [(k, "ode") for k in BEFORE]
    assert [a for a, _ in pairs["After DMD"]] == ["dmd", *(f"{key}_dmd" for key in BEFORE[1:])]
    assert pairs["Stage 1"] == [("ar", "ar"), ("diffusion_forcing", "ar")]
    # the same regression from the same start: the pairs alone differ, and so what their clean past is
    ode, changed = (parse("train", step.argv, description="")[0] for step in ode_steps(c))
    assert (ode.data.name, changed.data.name) == ("pairs", "bidirectional_pairs")
    assert (ode.objective.past, changed.objective.past) == ("clip", "endpoint")
    changed.data.name, changed.objective.past = ode.data.name, ode.objective.past
    assert changed == ode


def ode_steps(c):
    """Stage 2's command of the first two recipes."""
    for recipe_name, key in zip(c.recipes[:2], BEFORE[:2], strict=True):
        steps = recipe(_recipe_config(c, recipe_name, 0), Path("runs"))
        yield next(step for step in steps if step.key == key)


def test_a_difference_has_an_interval_and_a_corrected_p():
    same = {m: {"values": [0.5, 0.51, 0.52]} for m, *_ in COMPARED}
    other = {**same, "step": {"values": [0.1, 0.11, 0.12]}}
    (table,) = compare_networks({"ode": same, "bi_ode": other}, {"Before DMD": [("ode", "ode"), ("bi_ode", "ode")]})
    assert [row[0] for row in table.rows] == [TITLES["ode"][0], TITLES["bi_ode"][0]]
    motion = [title for _, title, *_ in COMPARED].index("motion, px/frame") + 1
    assert table.rows[0][motion] == "0.510 [0.485, 0.535]"
    # one of five tests: p is five times Welch's
    assert table.rows[1][motion].startswith("0.110 [0.085, 0.135], p ")
    assert float(table.rows[1][motion].rpartition(" ")[2]) < 0.01
    assert table.rows[1][1] == "51.0 [48.5, 53.5], p 1.0000"


@pytest.mark.slow
def test_an_ablation_runs_and_goes_on(tmp_path, capsys):
    keys = {"seeds": 1, "budget": "tiny", "recipes": "('none',)", "forcings": "('diffusion_forcing',)"}
    argv = ["study", "ablation", CONFIG, f"--workdir={tmp_path}", *(f"--config.{k}={v}" for k, v in keys.items())]
    assert main(argv) == 0
    record = json.loads((tmp_path / "study.json").read_text())
    assert {"teacher", "ar", "ar_dmd", "diffusion_forcing"} == set(record["numbers"])
    assert [table["title"] for table in record["tables"]] == ["Before DMD", "After DMD", "Stage 1"]
    assert "One change" in (tmp_path / "report" / "index.html").read_text()
    seconds = (tmp_path / "seed0" / "seconds.json").stat().st_size
    assert main(argv) == 0 and (tmp_path / "seed0" / "seconds.json").stat().st_size == pytest.approx(seconds, abs=40)
    assert "is done already" in capsys.readouterr().out
    assert main([*argv, "--config.budget=short"]) == 2
    assert "other settings" in capsys.readouterr().err
