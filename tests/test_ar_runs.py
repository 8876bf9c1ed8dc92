"""Stage 1 from the command line, where its past is the network's own: a run that stopped goes on exactly."""

import json

import numpy as np
import pytest

from tests.commands import tiny, train_stopped_and_whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "keys"),
    [("bagger", {"objective__bagger_steps": 2, "objective__bagger": 1.0}), ("resampling_forcing", {})],
)
def test_a_stopped_run_ends_as_the_whole_one(tmp_path, strategy, keys):
    """Four steps, and again from the second; all of BAgger's learn from rollouts of the average, which is restored."""
    start = {"roles__student__init": "", "steps": 4, "save_every": 2}
    whole = train_stopped_and_whole(f"ar_diffusion.py:toy,{strategy}", tmp_path, **tiny(tmp_path) | start | keys)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(np.isfinite(row["student/loss"]) for row in rows)
