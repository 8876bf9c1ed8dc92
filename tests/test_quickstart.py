"""The whole recipe from the command line, from a teacher of one's own, on the tiny budget."""

import json

import pytest

from tests.commands import cfjax, tiny


@pytest.mark.slow
def test_quickstart_runs_from_an_exported_teacher(tmp_path):
    root, teacher = tmp_path / "own", tmp_path / "teacher"
    keys = {**tiny(root), "data__shapes__frames": 12}
    assert cfjax("train", "bidirectional.py:toy", root, **keys) == 0
    assert cfjax("export", "export.py", teacher, run=root, clips=60) == 0
    keys = {"budget": "tiny", "teacher": teacher}
    assert cfjax("quickstart", "quickstart.py", tmp_path / "all", **keys) == 0
    assert (tmp_path / "all" / "report" / "index.html").stat().st_size > 10_000
    stages = json.loads((tmp_path / "all" / "report" / "metrics.json").read_text())["stages"]
    assert {name: stages[name]["network_calls"] for name in ("teacher", "ar", "ode", "dmd")} == {
        "teacher": 100,
        "ar": 408,
        "ode": 20,
        "dmd": 20,
    }
