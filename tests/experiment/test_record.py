"""Untrusted records of runs: every number is validated, and nothing is written where a record points."""

import json
import shutil
from pathlib import Path

import pytest

from cfjax.core.errors import UserError
from cfjax.experiment.record import read_run
from cfjax.experiment.runs import open_run
from cfjax.models.umt5 import UMT5Config
from cfjax.models.vae import VAEConfig
from cfjax.models.wan import WanConfig
from cfjax.worlds.assets import ASSETS
from cfjax.worlds.records import config_from_record
from cfjax.worlds.toy import ToyWorld
from cfjax.worlds.wan import read_record

SHIPPED = ASSETS / "toy_teacher"


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped teacher, and its record."""
    shutil.copytree(SHIPPED, tmp_path / "model")
    return tmp_path / "model", json.loads((SHIPPED / "model.json").read_text())


def rewrite(folder: Path, record: object) -> None:
    (folder / "model.json").write_text(json.dumps(record))


def test_a_run_is_opened_without_writing_where_its_record_points(model, monkeypatch):
    folder, record = model
    monkeypatch.chdir(folder.parent)
    record["config"]["data"] |= {"path": str(folder.parent / "elsewhere"), "assets": str(folder)}
    run_folder = folder.parent / "run"
    monkeypatch.setattr("cfjax.experiment.runs.asset", lambda *_: None)  # as if it were a run directory
    monkeypatch.setattr("cfjax.experiment.runs.read_run", lambda _: record)
    run_folder.mkdir()
    run = open_run(str(run_folder), with_model=False)
    assert run.toy.fingerprint() == record["world"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "run"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("step", True, "step is True"),
        ("latent_shape", [2**20, 2**15, 2**15, 16], "more than"),
        ("latent_shape", [12, 4, 4, -1], "latent_shape.3. is -1"),
        ("blocks.frames", 0, "blocks.frames is 0"),
        ("config.sampler.steps", 10**9, "config.sampler.steps is 1000000000; it must be a whole number from 1"),
        ("config.sampler.shift", "5", "config.sampler.shift is '5'; it must be a number above 0"),
        ("config.data.text_length", 10**9, "config.data.text_length is 1000000000"),
        ("config.data.shapes.size", 10**9, "config.data.shapes.size is 1000000000"),
        ("config.data.source", "other", "config.data.source is 'other'"),
        ("world", None, "world is None"),
    ],
)
def test_every_number_of_a_runs_record_is_checked(model, path, value, words):
    folder, record = model
    *groups, key = path.split(".")
    at = record
    for group in groups:
        at = at[group]
    at[key] = value
    rewrite(folder, record)
    with pytest.raises(UserError, match=words):
        read_run(folder)


def test_sizes_of_networks_are_checked(model):
    _, record = model
    sizes = record["models"]["student"]
    assert config_from_record(WanConfig, sizes).patch == (2, 2)
    for change, words in (
        ({"eps": 0}, "eps is 0"),
        ({"depth": 3}, "depth is unknown"),
        ({"num_heads": 4.0}, "num_heads"),
    ):
        with pytest.raises(UserError, match=rf"runs/x: WanConfig: .*{words}"):
            config_from_record(WanConfig, {**sizes, **change}, "runs/x")
    with pytest.raises(UserError, match=r"latents_std\[0\] is 0; it must be a number above 0"):
        config_from_record(VAEConfig, {"base_dim": 96, "z_dim": 1, "latents_std": [0], "latents_mean": [0]})
    with pytest.raises(UserError, match="layers is missing"):
        config_from_record(UMT5Config, {"vocab_size": 4, "dim": 4, "heads": 2, "head_dim": 2, "ffn_dim": 4})


def test_worlds_are_checked(tmp_path):
    record = {"kind": "wan", "format": 1, "text_length": 512, "negative_prompt": "", "fps": 16}
    for change in ({"text_length": 10**9}, {"fps": 0}, {"fps": True}, {"negative_prompt": 1}, {"format": True}):
        (tmp_path / "world.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(UserError, match=r"world\.json"):
            read_record(tmp_path)
    (tmp_path / "world.json").write_text(json.dumps(record))
    assert read_record(tmp_path) == record
    for content in (
        "[]",
        '{"shapes": []}',
        '{"shapes": {"size": NaN}}',
        '{"shapes": {"frames": 2000000000}}',
        "[" * 99_999,
    ):
        (tmp_path / "world.json").write_text(content)
        with pytest.raises(UserError, match="not a world"):
            ToyWorld.load(tmp_path)
