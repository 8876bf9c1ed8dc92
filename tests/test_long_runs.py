"""Runs on long rollouts: which codec they take, what they refuse; the toy's trains and makes long videos."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.precision import to_record
from cfjax.core.tree import map_named, named_leaves
from cfjax.experiment import presets
from cfjax.experiment.data import Shapes
from cfjax.experiment.networks import codec_role
from cfjax.models.vae import VAEConfig, WanVAE, abstract_vae
from cfjax.training.streamed import write_streamed
from tests.commands import cfjax, tiny, train_stopped_and_whole

VAE = VAEConfig(base_dim=4)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return map_named(lambda _, like: jnp.full(like.shape, 0.1), abstract_vae(VAE))


@pytest.fixture(scope="module")
def world(vae, tmp_path_factory):
    """A Wan world of an autoencoder and nothing else."""
    path = tmp_path_factory.mktemp("wan") / "world"
    arrays = {f"params/vae/{name}": LazyArray.of(leaf) for name, leaf in named_leaves(vae).items()}
    write_streamed(path / "vae", arrays, {"stage": "vae", "model": to_record(VAE), "fingerprint": "0"})
    (path / "world.json").write_text(json.dumps({"kind": "wan", "format": 1, "text_length": 3}))
    return path


def config(**objective):
    c = presets.experiment("dmd", steps=600)
    c.data = presets.wan_data("data")
    c.objective = {"window_frames": 21, "max_frames": 27, "codec_world": "", "codec_decoder": "vae", **objective}
    return c


def data(channels: int = 16, **manifest):
    dataset = SimpleNamespace(path="data/prompts", manifest=manifest)
    return SimpleNamespace(dataset=dataset, world=None, shapes=Shapes((21, 60, 104, channels), (512, 4096)))


def test_the_codec_is_that_of_the_datasets_world(vae, world):
    made_with = {"fingerprint": vae.describe()["fingerprint"]}
    for c, data_ in (
        (config(), data(world_path=str(world), codec=made_with)),
        (config(codec_world=str(world)), data()),
    ):
        assert codec_role(c).opened(data_).codec.describe()["fingerprint"] == made_with["fingerprint"]


def test_the_toys_codec_is_its_worlds_and_short_rollouts_need_none():
    toy = SimpleNamespace(dataset=None, world=SimpleNamespace(codec="patches"))
    assert codec_role(config()).opened(toy).codec == "patches"
    assert codec_role(config(max_frames=0, window_frames=0)) is None


@pytest.mark.parametrize(
    ("objective", "dataset", "message"),
    [
        ({}, {}, "does not say which world it was made in, .*name it with --config.objective.codec_world"),
        ({"codec_world": "nowhere"}, {}, "nowhere has no vae"),
        ({"codec_decoder": "best"}, {"world_path": "nowhere"}, "decoder='best': use "),
        ({}, {"world_path": True, "codec": {"fingerprint": "other"}}, "was made with another VAE than"),
        ({}, {"world_path": True, "channels": 48}, "has latents of 16 channels, data/prompts of 48"),
    ],
)
def test_a_codec_that_is_not_there_or_does_not_fit_is_named(world, objective, dataset, message):
    if dataset.get("world_path") is True:
        dataset = {**dataset, "world_path": str(world)}
    with pytest.raises(UserError, match=message):
        codec_role(config(**objective)).opened(data(**dataset))


WINDOW = {"objective__window_frames": 6, "objective__max_frames": 12, "blocks__window": 6}
EACH = {"save_every": 1, "cadence__student": 1}  # both roles learn before the stop and after it


@pytest.mark.slow
def test_the_toy_plays_a_gan_with_long_rollouts(tmp_path):
    """Clips of 12 frames, of which the first 6 are real to the critic; it goes on exactly."""
    roles = {f"roles__{role}__{key}": value for role in ("student", "critic")
             for key, value in (("init", ""), ("remat", "none"))}  # fmt: skip
    run = train_stopped_and_whole("dmd.py:toy,gan,long", tmp_path, **tiny(tmp_path) | roles | WINDOW | EACH)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["critic/loss"]) and "student/loss" in row for row in rows)


@pytest.mark.slow
def test_the_toy_trains_on_long_rollouts_and_makes_long_videos(tmp_path, monkeypatch, capsys):
    """Rollouts of 6 to 12 frames under a window of 6, counted as on a device of known peak; it goes on exactly; then a
    video of 18.
    """
    monkeypatch.setattr("cfjax.train.peak_flops", lambda _: 1e12)
    roles = {f"roles__{role}__{key}": value for role in ("student", "critic", "real_score")
             for key, value in (("init", ""), ("remat", "none"))}  # fmt: skip
    run = train_stopped_and_whole("dmd.py:toy,long", tmp_path, **tiny(tmp_path) | roles | WINDOW | EACH)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and "student/loss" in rows[1] and "\ncodec " in capsys.readouterr().out
    assert "perf/mfu" in (run / "performance.jsonl").read_text()
    videos = {"run": run, "videos": 1, "frames": 18, "progress": False}
    assert cfjax("generate", "generate.py", tmp_path / "videos", **videos) == 0
    assert json.loads((tmp_path / "videos" / "settings.json").read_text())["network_calls"] == 6 * 5 - 1


@pytest.mark.slow
def test_the_toy_trains_on_windows_of_blocks_and_makes_videos_by_them(tmp_path):
    """Rolling Forcing: half of the rollouts by windows of two blocks; it goes on exactly; then a video."""
    roles = {f"roles__{role}__{key}": value for role in ("student", "critic", "real_score")
             for key, value in (("init", ""), ("remat", "none"))}  # fmt: skip
    keys = tiny(tmp_path) | roles | WINDOW | EACH | {"blocks__window": 9}
    run = train_stopped_and_whole("dmd.py:toy,rolling", tmp_path, **keys)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["student/loss"]) for row in rows)
    videos = {"run": run, "videos": 1, "frames": 18, "progress": False}
    assert cfjax("generate", "generate.py", tmp_path / "videos", **videos) == 0
    record = json.loads((tmp_path / "videos" / "settings.json").read_text())
    assert record["network_calls"] == 2 * 6 + 2 - 2 and record["sampler"]["rolling"]
    assert record["blocks"]["memory"] == "rolling_forcing(window=9)"


@pytest.mark.slow
def test_the_toy_trains_on_one_rollout_under_a_policy_and_streams_with_it(tmp_path):
    """Chunks of 6, 3, 3, 3 frames, the roles' in turn; it goes on exactly amid the rollout, whose prompt switches."""
    roles = {f"roles__{role}__remat": "none" for role in ("student", "critic", "real_score")}
    roles |= {
        "roles__student__init": "toy_teacher",
        "roles__student__init_stages": (),
    }  # its videos depend on its memory
    policy = "ema_sink(window=6, alpha=0.9)"
    streaming = {"objective__window_frames": 6, "objective__max_frames": 15, "objective__new_frames": 3}
    blocks = {"blocks__window": 0, "blocks__sink": 0, "blocks__memory": policy}
    run = train_stopped_and_whole(
        "dmd.py:toy,streaming", tmp_path, **tiny(tmp_path) | roles | streaming | blocks | EACH
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["student/rollout_frames"] for row in rows] == [6, 12]
    assert [row["critic/rollout_frames"] for row in rows] == [9, 15]
    videos = {"run": run, "videos": 1, "frames": 12, "progress": False}
    assert cfjax("generate", "generate.py", tmp_path / "videos", **videos) == 0
    assert json.loads((tmp_path / "videos" / "settings.json").read_text())["blocks"]["memory"] == policy
