"""VBench's quality, semantic and total of its own results: its script's numbers; none where a dimension is missing."""

import json
from pathlib import Path

import pytest

from cfjax.__main__ import main
from cfjax.core.errors import UserError
from cfjax.evaluation.vbench_total import DIMENSIONS, read_results, summary, total_lines
from tests.commands import ROOT

ROWS = json.loads((ROOT / "tests" / "golden" / "vbench_total.json").read_text())["rows"]
SUMS = ("quality", "semantic", "total")


def written(folder: Path, scores: dict[str, float], name: str = "model") -> Path:
    """As `VBench.evaluate` writes them."""
    file = folder / f"{name}_eval_results.json"
    videos = [{"video_path": "a.mp4", "video_results": 1.0}]
    file.write_text(json.dumps({key.replace(" ", "_"): [score, videos] for key, score in scores.items()}, indent=4))
    return file


@pytest.mark.parametrize("row", [row for row in ROWS if not row["lacking"]])
def test_the_sums_are_those_of_vbenchs_script(row, tmp_path):
    found = summary(read_results(str(written(tmp_path, row["scores"]))))
    assert [found[name] for name in SUMS] == pytest.approx([row[name] for name in SUMS], rel=1e-14)


def test_a_missing_dimension_is_not_a_zero(tmp_path):
    """VBench's script counts it as 0, which its range takes below 0; its other group still has its score."""
    (row,) = [row for row in ROWS if row["lacking"]]
    scores = {name: score for name, score in row["scores"].items() if name not in row["lacking"]}
    read = read_results(str(written(tmp_path, scores)))
    assert summary(read) == {"quality": None, "semantic": None, "total": None}
    assert total_lines(read)[-1].startswith("missing: subject_consistency, color; ")
    found = summary(read | {"subject_consistency": 0.0})
    assert found["quality"] == pytest.approx(row["quality"], rel=1e-14) and found["total"] is None
    assert summary(read | {"subject_consistency": 0.0, "color": 0.0})["total"] == pytest.approx(row["total"], rel=1e-14)


def test_a_folder_of_results_is_one_table(tmp_path, capsys):
    """Dimensions may have been scored on different machines, each with a file of its own."""
    names = list(ROWS[0]["scores"].items())
    for number, some in enumerate((names[:5], names[5:])):
        (tmp_path / "r" / str(number)).mkdir(parents=True)
        written(tmp_path / "r" / str(number), dict(some))
    assert main(["evaluate", f"--config.vbench={tmp_path / 'r'}", f"--workdir={tmp_path / 'out'}"]) == 0
    said, record = capsys.readouterr().out, json.loads((tmp_path / "out" / "vbench.json").read_text())
    assert f"{'total':26s} {100 * ROWS[0]['total']:6.2f}\n" in said and record["missing"] == []
    assert record["total"] == pytest.approx(ROWS[0]["total"]) and record["scores"].keys() == DIMENSIONS.keys()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "no results of VBench"),
        ('{"colour": [0.5, []]}', "'colour' is no dimension of VBench; those are subject_consistency"),
        ('{"color": 0.5}', "color: its score must be a number from 0 to 1, in a list"),
        ('{"imaging_quality": [68.2, []]}', "imaging_quality: its score must be a number from 0 to 1"),
        ('{"color": [true, []]}', "color: its score must be a number"),
        ('{"color": [0.5, []]', "x_eval_results.json"),
    ],
)
def test_what_is_no_result_is_told(content, told, tmp_path):
    (tmp_path / "x_eval_results.json").write_text(content)
    with pytest.raises(UserError, match=told.replace("(", r"\(").replace("[", r"\[")):
        read_results(str(tmp_path))


def test_other_questions_are_not_dropped(tmp_path, capsys):
    asked = [f"--config.vbench={tmp_path}", "--config.against=other", f"--workdir={tmp_path / 'out'}"]
    assert main(["evaluate", *asked]) == 2
    assert "leave against out" in capsys.readouterr().err


def test_two_scores_of_one_dimension_are_told(tmp_path):
    written(tmp_path, {"color": 0.5}, "a")
    written(tmp_path, {"color": 0.6}, "b")
    with pytest.raises(UserError, match=r"b_eval_results.json: color is 0.6, in .*a_eval_results.json 0.5"):
        read_results(str(tmp_path))
    with pytest.raises(UserError, match=r"no \*_eval_results.json in it"):
        read_results(str(ROOT / "tests" / "golden"))
