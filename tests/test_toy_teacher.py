"""The teacher that ships with the package: small, documented, and it follows captions that it never saw."""

import json
import os
import shutil

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.evaluation.shapes_metrics import evaluate_shapes, measure_shapes
from cfjax.experiment.networks import load_shipped
from cfjax.experiment.runs import open_run
from cfjax.worlds.assets import ASSETS
from cfjax.worlds.toy import evaluation_clips, held_out_captions

FOLDER = ASSETS / "toy_teacher"


def test_it_is_small_and_says_how_it_was_made():
    record = json.loads((FOLDER / "model.json").read_text())
    assert 1e6 < record["parameters"] < 5e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6
    assert "cfjax train --config=configs/bidirectional.py:toy" in record["note"]
    assert record["evaluation"]["summary"]["all_correct"] >= 0.95
    curve = json.loads((FOLDER / "curves.json").read_text())["student/loss"]
    assert curve[0][1] > 2 * curve[-1][1]


@pytest.mark.parametrize("cut", [1, 1_000_000])
def test_one_that_is_cut_short_is_named(tmp_path, cut):
    copy = shutil.copytree(FOLDER, tmp_path / "copy")
    os.truncate(copy / "model.safetensors", (copy / "model.safetensors").stat().st_size - cut)
    with pytest.raises(UserError, match=r"model\.safetensors: broken or cut short .*; copy it again"):
        load_shipped(str(copy), None)


def test_it_follows_held_out_captions():
    run = open_run("toy_teacher")
    assert (
        sum(leaf.size for leaf in named_leaves(run.model).values())
        == json.loads((FOLDER / "model.json").read_text())["parameters"]
    )
    clips = evaluation_clips(run.world.shapes, 2 * len(held_out_captions(run.world.shapes)))
    video = run.sample([clip["caption"] for clip in clips], seed=3)
    summary = evaluate_shapes(video, [clip["factors"] for clip in clips], run.world.shapes)["summary"]
    print({name: round(float(summary[name]), 3) for name in ("all_correct", "presence", "step", "residual")})
    assert summary["all_correct"] >= 0.9
    real = np.mean([np.linalg.norm(np.diff(clip["factors"]["centres"][0], axis=0), axis=-1) for clip in clips])
    assert abs(summary["step"] / real - 1) < 0.15


# ---- the second one, of the world whose future is uncertain


def test_the_branching_teacher_turns_as_often_as_its_clips():
    """Small, with its recipe; its videos turn about as often as clips, to both sides. Its limits: docs/results.md."""
    folder = ASSETS / "branching_teacher"
    record = json.loads((folder / "model.json").read_text())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6 and record["parameters"] < 1e6
    assert "cfjax train --config=configs/bidirectional.py:toy,branching" in record["note"]
    summary = record["evaluation"]["summary"]
    assert summary["shape_correct"] >= 0.95 and summary["presence"] >= 0.95 and abs(summary["step"] - 1.0) < 0.1
    run = open_run("branching_teacher")
    shapes = run.toy.shapes
    assert shapes.branching == 0.5 and run.latent_shape[0] == shapes.frames == 9
    captions = held_out_captions(shapes)
    video = run.sample(captions * (96 // len(captions)), seed=3)
    table = measure_shapes(video, shapes)
    turned = table["turn_side"]
    print(f"turned {np.mean(turned != 0):.3f}, to the left {np.mean(turned < 0):.3f}, step {table['step'].mean():.3f}")
    assert 0.3 < np.mean(turned != 0) < 0.7 and min(np.mean(turned < 0), np.mean(turned > 0)) > 0.1
