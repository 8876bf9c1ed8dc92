"""Evaluations side by side: which folders are seeds of one row, and the arithmetic."""

import json

import pytest

from cfjax.core.errors import UserError
from cfjax.evaluation.tables import gather, write_table


def result(correct: float, calls: int = 20) -> dict[str, object]:
    return {"stage": "dmd", "summary": {"all_correct": correct, "step": 1.5}, "network_calls": calls}


def write(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(value if isinstance(value, str) else json.dumps(value))


def test_folders_of_one_name_are_seeds_of_one_row(tmp_path):
    for seed, correct in enumerate((0.9, 1.0, 0.8)):
        write(tmp_path / f"seed{seed}" / "dmd", result(correct))
    write(tmp_path / "seed0" / "ar", result(0.5, calls=408))
    (tmp_path / "seed1" / "unfinished").mkdir()
    text = write_table(tmp_path / "out", gather(f"{tmp_path}/seed*/*"), {"dmd": "DMD"})
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert rows["dmd"]["seeds"] == 3 and rows["ar"]["seeds"] == 1
    number = rows["dmd"]["numbers"]["all_correct"]
    assert number["mean"] == pytest.approx(0.9) and number["sd"] == pytest.approx(0.1)  # of the sample
    assert number["values"] == [0.9, 1.0, 0.8]
    assert rows["ar"]["numbers"]["all_correct"]["sd"] is None
    assert text == (tmp_path / "out" / "table.md").read_text().strip()
    assert "| DMD | 3 | 90.0 ± 10.0 | 1.50 ± 0.00 |  |  |  | 20 |" in text
    assert "| ar | 1 | 50.0 | 1.50 |  |  |  | 408 |" in text


def test_nothing_to_show_is_reported(tmp_path):
    with pytest.raises(UserError, match="run cfjax evaluate first"):
        gather(f"{tmp_path}/*")
    for wrong in ("{", "{}", "[]", '{"summary": {}}'):
        write(tmp_path / "dmd", wrong)
        with pytest.raises(UserError, match=r"dmd/evaluation\.json is no evaluation"):
            gather(f"{tmp_path}/*")
