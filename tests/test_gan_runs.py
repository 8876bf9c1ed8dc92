"""The GAN from the command line: a run that stopped goes on exactly, and its student generates and is evaluated."""

import json

import pytest

from cfjax.training.checkpoint import open_role, stored_roles
from tests.commands import cfjax, tiny, train_stopped_and_whole

ROLES = [("critic", False), ("student", False), ("student", True)]  # the last is the average


@pytest.mark.slow
def test_a_stopped_run_ends_as_the_whole_one_and_its_student_is_used(tmp_path):
    """Four iterations in one go, and again from the checkpoint of the second; the branch is the critic's."""
    inits = {f"roles__{role}__{key}": value for role in ("student", "critic")
             for key, value in (("init", ""), ("remat", "none"))}  # fmt: skip
    few = {"steps": 4, "save_every": 2, "cadence__student": 2, "objective__gan__r1_weight": 0.1}
    whole = train_stopped_and_whole("dmd.py:toy,gan", tmp_path, **tiny(tmp_path) | inits | few)
    assert stored_roles(whole) == ROLES
    for role, ema in ROLES:
        assert any(name.startswith("branch/") for name in open_role(whole, role, ema=ema)) == (role == "critic")
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert ["student/loss" in row for row in rows] == [True, False, True, False]
    assert all(row["critic/r1"] >= 0.0 for row in rows)

    assert cfjax("generate", "generate.py", tmp_path / "videos", run=whole, videos=1) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    assert cfjax("evaluate", "evaluate.py", tmp_path / "figures", run=whole, clips=2, batch=2) == 0
    assert json.loads((tmp_path / "figures" / "evaluation.json").read_text())["stage"] == "dmd"
