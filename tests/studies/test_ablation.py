"""The learned part: which networks are compared, how, and that the commands run (slow)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.nn.visibility import Blocks
from cfjax.objectives.ode_regression import PairsConfig, Regression, ode_regression
from cfjax.quickstart import TITLES, recipe
from cfjax.studies.ablation import COMPARED, compare_networks, left_open, opened_verdicts, verdicts
from cfjax.study import _pairs_of, _recipe_config
from tests.commands import ROOT
from tests.tiny import CONFIG, normal, random_weights, text

STUDY = f"--config={ROOT}/configs/study.py:ablation"


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    """Recipes name their configs as a user in a clone would."""
    monkeypatch.chdir(ROOT)


NAMES = {key: title for key, (title, *_) in TITLES.items()}
BEFORE = ("ode", "bi_pairs_ode", "cd", "asymmetric_cd", "ar", "bi_ode")


def test_only_the_initialisations_teacher_changes():
    c = parse("study ablation", [STUDY, "--workdir=unused"], description="")[0]
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
    (table,) = compare_networks(
        {"ode": same, "bi_ode": other}, {"Before DMD": [("ode", "ode"), ("bi_ode", "ode")]}, NAMES
    )
    assert [row[0] for row in table.rows] == [NAMES["ode"], NAMES["bi_ode"]]
    motion = [title for _, title, *_ in COMPARED].index("motion, px/frame") + 1
    assert table.rows[0][motion] == "0.510 [0.485, 0.535]"
    # one of five tests: p is five times Welch's
    assert table.rows[1][motion].startswith("0.110 [0.085, 0.135], p ")
    assert float(table.rows[1][motion].rpartition(" ")[2]) < 0.01
    assert table.rows[1][1] == "51.0 [48.5, 53.5], p 1.0000"


def test_a_claim_holds_by_its_direction_and_p():
    worse, better = {"values": [0.4, 0.41, 0.42]}, {"values": [0.9, 0.91, 0.92]}
    numbers = {
        "bi_pairs_ode": {"all_correct": worse, "step": better},
        "ode": {"all_correct": better, "step": worse},
        "ar": {"all_correct": {"values": [0.5, 0.9, 0.7]}},
        "diffusion_forcing": {"all_correct": {"values": [0.4, 0.8, 0.6]}},
    }
    found = verdicts(numbers)
    assert [v.holds for v in found] == [True, False, False]  # lower and sure; higher; lower, but not sure
    assert found[0].numbers.startswith("caption all right, %: 41.0 against 91.0, p ")
    opened = {"bi_pairs_ode": [[0.3, 0.1, 0.1], [0.31, 0.1, 0.12]], "ode": [[0.1, 0.1, 0.1], [0.11, 0.1, 0.12]]}
    assert [v.holds for v in opened_verdicts(opened)] == [True, False] and opened_verdicts({"ode": [[0.1]]}) == []


def test_what_is_left_open_is_the_regressions_error():
    """Blocks, weighted by the variance of their end points, give the loss of stage 2 at pure noise."""
    config, blocks = PairsConfig(steps=(1000, 500)), Blocks(2)
    shape = (64, 4, 4, 4, CONFIG.in_dim)
    trajectory = np.stack([normal(n, shape) for n in range(3)], axis=1)
    rows = np.broadcast_to(text()[:1], (64, *text().shape[1:]))
    batch = {"trajectory_BJFHWC": trajectory, "latents_BFHWC": normal(5, shape), "text_BSE": jnp.asarray(rows)}
    records = [
        {"trajectory_JFHWC": trajectory[i], "latents_FHWC": batch["latents_BFHWC"][i], "text_SE": rows[i]}
        for i in range(64)
    ]
    model = random_weights(CONFIG)
    for past in ("clip", "endpoint"):
        loss = ode_regression(config, blocks, how=Regression(past=past))
        draws = {"level_BF": jnp.zeros(shape[:2], int)}
        expected = float(loss({"student": model}, batch, jax.random.key(0), draws)[0])
        prior = np.var(trajectory[:, -1], axis=0).mean(axis=(1, 2, 3)).reshape(2, 2).mean(axis=1)
        got = np.mean(np.asarray(left_open(model, records, blocks, past=past)) * prior)
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_an_ablation_runs_and_goes_on(tmp_path, capsys):
    keys = {"seeds": 1, "budget": "tiny", "recipes": "('none',)", "forcings": "('diffusion_forcing',)"}
    argv = ["study", "ablation", STUDY, f"--workdir={tmp_path}", *(f"--config.{k}={v}" for k, v in keys.items())]
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
