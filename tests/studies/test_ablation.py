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
from cfjax.core.errors import UserError
from cfjax.nn.visibility import Blocks
from cfjax.objectives.ode_regression import PairsConfig, Regression, ode_regression
from cfjax.quickstart import recipe
from cfjax.studies.ablation import MEASURED, compare_networks, left_open, open_table, verdicts
from cfjax.study import _gathered, _pairs_of, _recipe_config
from configs.quickstart import TITLES
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
    against = {key: "cd" if key == "asymmetric_cd" else "ode" for key in BEFORE}
    assert pairs["Before DMD"] == list(against.items())
    assert [a for a, _ in pairs["After DMD"]] == ["dmd", *(f"{key}_dmd" for key in BEFORE[1:])]
    assert {b for a, b in pairs["After DMD"] if a != "asymmetric_cd_dmd"} == {"dmd"}
    assert ("asymmetric_cd_dmd", "cd_dmd") in pairs["After DMD"]
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
    same = {m: {"values": [0.5, 0.51, 0.52]} for m, *_ in MEASURED}
    other = {**same, "step": {"values": [0.1, 0.11, 0.12]}}
    (table,), tests = compare_networks(
        {"ode": same, "bi_ode": other}, {"Before DMD": [("ode", "ode"), ("bi_ode", "ode")]}, NAMES
    )
    assert [row[:3] for row in table.rows] == [[NAMES["ode"], "", "3"], [NAMES["bi_ode"], NAMES["ode"], "3"]]
    motion = table.head.index("motion, px/frame")
    assert table.rows[0][motion] == "0.510 [0.485, 0.535]"
    # one of five tests: p is five times Welch's
    assert table.rows[1][motion].startswith("0.110 [0.085, 0.135], p ")
    assert float(table.rows[1][motion].rpartition(" ")[2]) < 0.01
    assert table.rows[1][3] == "51.0 [48.5, 53.5], p 1.0000"
    by_measure = {test["measure"]: test for test in tests}
    assert by_measure["step"]["welch_holm"] == pytest.approx(5 * by_measure["step"]["welch"])
    assert by_measure["step"]["paired"] == 0.0 and by_measure["all_correct"]["paired"] == 1.0  # seed by seed


def test_a_claim_holds_by_its_direction_and_p():
    worse, better = {"values": [0.4, 0.41, 0.42]}, {"values": [0.9, 0.91, 0.92]}
    numbers = {
        "bi_pairs_ode": {"all_correct": worse, "step": better},
        "ode": {"all_correct": better, "step": worse},
        "ar": {"all_correct": {"values": [0.5, 0.9, 0.7]}},
        "diffusion_forcing": {"all_correct": {"values": [0.4, 0.8, 0.6]}},
    }
    numbers["bi_pairs_ode"]["diversity"], numbers["ode"]["diversity"] = worse, better
    found = verdicts(numbers, {})
    # lower and sure; higher and sure; less diverse; lower, but not sure
    assert [v.outcome for v in found] == ["holds", "reversed", "holds", "not significant"]
    assert found[0].numbers.startswith("caption all right, %: 41.0 against 91.0, p ")
    bi, ar = (
        [[0.3, 0.1, 0.1], [0.31, 0.1, 0.12], [0.3, 0.1, 0.1]],
        [[0.1, 0.1, 0.1], [0.11, 0.1, 0.12], [0.1, 0.1, 0.1]],
    )
    both = verdicts(numbers, {"bi_pairs_ode": {"left": bi}, "ode": {"left": ar}})
    assert [v.outcome for v in both[4:]] == ["holds", "not significant"] and both[0].p > found[0].p  # one family
    assert len(verdicts(numbers, {"ode": {"left": ar}})) == 4


def test_the_variance_given_the_past_is_shown_too():
    opened = {"ode": {"left": [[0.1, 0.02], [0.1, 0.04]], "shuffled": [[1.0, 0.04], [1.0, 0.04]]}}
    rows = open_table(opened, NAMES).rows
    assert [row[1] for row in rows] == ["left open", "the same with another pair's noise", "ratio of the two"]
    assert [row[-1].split()[0] for row in rows] == ["0.030", "0.040", "0.750"] and rows[0][2] == "2"
    assert len(open_table({"ode": {"left": [[0.1]]}}, NAMES).rows) == 1  # a record without the second number


def test_only_the_named_networks_and_seeds_are_gathered(tmp_path):
    c = parse("study ablation", [STUDY, "--workdir=unused"], description="")[0]
    c.update({"seeds": 11, "recipes": ("none",), "forcings": ()})
    for seed in range(12):
        for network in ("teacher", "ar", "ar_dmd", "sid"):
            folder = tmp_path / f"seed{seed}" / "evaluation" / network
            folder.mkdir(parents=True)
            found = {"summary": {"step": seed}, "network_calls": 1}
            (folder / "evaluation.json").write_text(json.dumps(found))
    gathered = _gathered(c, tmp_path)
    assert set(gathered) == {"teacher", "ar", "ar_dmd"}
    assert [found["summary"]["step"] for found in gathered["ar"]] == list(range(11))  # in order, for paired tests


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
        opened = left_open(model, records, blocks, past=past)
        assert np.mean(np.asarray(opened["left"]) * prior) == pytest.approx(expected, rel=1e-5)
        trajectory_of_others = np.roll(trajectory, 1, axis=0)
        trajectory_of_others[:, -1] = trajectory[:, -1]
        shuffled = {**batch, "trajectory_BJFHWC": trajectory_of_others}
        expected = float(loss({"student": model}, shuffled, jax.random.key(0), draws)[0])
        assert np.mean(np.asarray(opened["shuffled"]) * prior) == pytest.approx(expected, rel=1e-5)
    parts = left_open(model, records, blocks, past="endpoint", batch=24)  # of 22, 21 and 21: none is left out
    assert parts["left"] == pytest.approx(opened["left"], rel=1e-5)
    with pytest.raises(UserError, match=r"^pairs=1: "):
        left_open(model, records[:1], blocks, past="clip")


@pytest.mark.slow
def test_an_ablation_runs_and_goes_on(tmp_path, capsys):
    keys = {"seeds": 1, "budget": "tiny", "recipes": "('causal_forcing','none')", "forcings": "('diffusion_forcing',)"}
    argv = ["study", "ablation", STUDY, f"--workdir={tmp_path}", *(f"--config.{k}={v}" for k, v in keys.items())]
    assert main(argv) == 0
    record = json.loads((tmp_path / "study.json").read_text())
    assert {"teacher", "ar", "ode", "dmd", "ar_dmd", "diffusion_forcing"} == set(record["numbers"])
    assert [table["title"] for table in record["tables"][:3]] == ["Before DMD", "After DMD", "Stage 1"]
    assert record["tables"][3]["rows"][1][1] == "the same with another pair's noise"
    assert set(record["left_open"]["ode"]) == {"left", "shuffled"} and len(record["tables"]) == 4
    assert record["made"]["seed0 none"]["commit"] in record["commit"]  # which may change while it runs
    assert "NaN" not in json.dumps(record)
    assert "One change" in (tmp_path / "report" / "index.html").read_text()
    seconds = (tmp_path / "seed0" / "seconds.json").stat().st_size
    assert main(argv) == 0 and (tmp_path / "seed0" / "seconds.json").stat().st_size == pytest.approx(seconds, abs=40)
    assert "is done already" in capsys.readouterr().out
    assert main([*argv, "--config.budget=short"]) == 2
    assert "other settings" in capsys.readouterr().err
