"""Commands of the toy world as tests give them: two steps on a few short clips."""

import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from cfjax.__main__ import main
from cfjax.training.checkpoint import open_role, stored_roles

ROOT = Path(__file__).parents[1]


def cfjax(verb: str, config: str, workdir: Path | str, **keys: object) -> int:
    """Runs one command; `a__b=1` is --config.a.b=1."""
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in keys.items()]
    return main([verb, f"--config={ROOT}/configs/{config}", f"--workdir={workdir}", *overrides])


def tiny_data(root: Path) -> dict[str, object]:
    return {
        "data__path": root / "data",
        "data__assets": "",
        "data__clips": 64,
        "data__batch_size": 4,
        "data__shapes__frames": 6,
        "progress": False,
    }


def tiny(root: Path, trained: str = "student") -> dict[str, object]:
    """Two steps on six frames; nothing is sampled, which would only take longer to compile."""
    quiet = {"sample_clips": 0, "guard__enabled": False}
    return {**tiny_data(root), "steps": 2, "log_every": 1, **quiet, f"roles__{trained}__remat": "none"}


def train_stopped_and_whole(config: str, root: Path, **keys: object) -> Path:
    """Trains in one go, and again from the last checkpoint but one: weights and averages are the same bits.

    Returns the whole run.
    """
    whole, stopped = root / "whole", root / "stopped"
    assert cfjax("train", config, whole, **keys) == 0
    shutil.copytree(whole, stopped)
    before, last = sorted((stopped / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    assert int(before.name) < int(last.name)
    shutil.rmtree(last)
    with redirect_stdout(io.StringIO()) as output:
        assert cfjax("train", config, stopped, **keys) == 0
    assert f"going on from step {before.name}\n" in output.getvalue()  # from the start it would end alike too
    assert stored_roles(whole) == stored_roles(stopped)
    for role, ema in stored_roles(whole):
        one, other = (open_role(run, role, ema=ema) for run in (whole, stopped))
        assert one.keys() == other.keys()
        for name, leaf in one.items():
            np.testing.assert_array_equal(leaf.read(), other[name].read(), err_msg=f"{role}/{name}")
    return whole
