"""benchmarks/recipes.py: which runs it asks for, and how it tabulates what they leave."""

import importlib.util
import json
import sys

import pytest

from tests.commands import ROOT


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "benchmarks" / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("measure", None)


def evaluated(folder, calls: int, **summary: float) -> None:
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps({"summary": summary, "network_calls": calls}))


def test_what_seeds_and_layouts_left_is_one_table(recipes, tmp_path, monkeypatch):
    """Rows in the pipeline's order, layouts apart; the shipped teacher once; commits of the first training only."""
    asked = []

    def quickstart(argv):
        asked.append(argv)
        return 0

    monkeypatch.setattr(recipes, "cfjax", quickstart)
    for seed, captions in ((0, 0.5), (1, 0.75)):
        for key in ("dmd", "ar", "teacher"):
            evaluated(tmp_path / f"seed{seed}" / "evaluation" / key, 20, all_correct=captions, step=1.5)
    evaluated(tmp_path / "framewise_2step_seed0" / "evaluation" / "dmd", 38, all_correct=1.0, step=1.25)
    for commit in ("first", "second"):
        monkeypatch.setattr(recipes, "commit", lambda commit=commit: commit)
        recipes.train(tmp_path, [0], ["causal_forcing", "causal_forcing,framewise,2step"], "tiny")
    places = [next(word for word in argv if word.startswith("--workdir")) for argv in asked]
    assert [place.rpartition("/")[2] for place in places] == ["seed0", "framewise_2step_seed0"] * 2
    assert "--config.seed=0" in asked[0] and "--config.budget=tiny" in asked[0]

    recipes.save(tmp_path / "out.json", tmp_path, "tiny", "a note")
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(row["key"], row["seeds"]) for row in record["rows"]] == [
        ("teacher", 1), ("ar", 2), ("dmd", 2), ("framewise_2step_dmd", 1),
    ]  # fmt: skip
    assert record["rows"][2]["numbers"]["all_correct"]["mean"] == 0.625
    assert record["commits"] == {"causal_forcing": ["first"], "causal_forcing,framewise,2step": ["first"]}
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert "| 2 | 62.5 ± 17.7 | 1.50 ± 0.00 |" in lines[4] and lines[5].startswith(
        "| DMD student (stage 3): framewise, 2step"
    )


def test_a_recipe_that_fails_ends_the_command(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "cfjax", lambda argv: 2)
    with pytest.raises(SystemExit, match="causvid, seed 3: failed; run again to go on"):
        recipes.train(tmp_path, [3], ["causvid"], "tiny")
