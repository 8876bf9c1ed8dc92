"""Previews while training: samples of a Wan world, their baselines, and that a failing preview never ends training."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.conversion.tiny_vae import import_tiny_vae
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.precision import to_record
from cfjax.core.sharding import make_mesh, on_mesh, shard_model
from cfjax.core.tree import map_named, named_leaves
from cfjax.experiment import presets
from cfjax.experiment.build import build
from cfjax.experiment.preview import decode_clip, make_monitor, spread_captions
from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig
from cfjax.training.metrics import EventWriter
from cfjax.training.streamed import write_streamed
from cfjax.worlds.open import open_decoder
from configs import dmd
from tests.golden.record_taehv import random_weights
from tests.synthetic import taehv_shapes
from tests.tiny import CONFIG, FRAMES, SIDE, TEXT_LEN, tiny

CODEC = TinyVAEConfig(latent_channels=CONFIG.in_dim, encoder_width=8, decoder_widths=(16, 8, 8, 8))


class Prompts:
    """A dataset of three captions in eight records."""

    negative_text_SE = np.zeros((TEXT_LEN, CONFIG.text_dim), np.float32)
    latent_shape = (FRAMES, SIDE, SIDE, CONFIG.in_dim)

    def __init__(self, world, has_latents):
        self.path, self.manifest, self.has_latents = "data/prompts", {"world_path": str(world)}, has_latents

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        text = rng.normal(size=(TEXT_LEN, CONFIG.text_dim)).astype(np.float32)
        return {"latents_FHWC": rng.normal(size=self.latent_shape).astype(np.float32), "text_SE": text}

    def caption(self, index):
        return "aaabbbcc"[index]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Wan world of a tiny decoder and nothing else."""
    path = tmp_path_factory.mktemp("wan") / "world"
    codec = import_tiny_vae(random_weights(taehv_shapes(8, (16, 8, 8, 8), z_dim=CONFIG.in_dim)), CODEC)
    arrays = {f"params/tiny_vae/{name}": LazyArray.of(leaf) for name, leaf in named_leaves(codec).items()}
    write_streamed(path / "tiny_vae", arrays, {"stage": "tiny_vae", "model": to_record(CODEC), "fingerprint": "0"})
    (path / "world.json").write_text(json.dumps({"kind": "wan", "format": 1, "text_length": 3}))
    return path


def config(**guard):
    c = dmd.get_config("toy,gan")
    c.guard.update({"prompts": 2, "seeds": 2, **guard})
    c.sample_every, c.save_every, c.cadence.student = 100, 50, 5
    c.sampler = presets.few_step((1000,))  # without fresh noise, so that a row follows its number alone
    return build(c)


def state(model):
    return SimpleNamespace(ema={}, params={"student": model})


def data(world, has_latents):
    return SimpleNamespace(dataset=Prompts(world, has_latents), world=None)


def look(monitor, workdir, step, model=None):
    with EventWriter(workdir) as writer:
        monitor(state(tiny() if model is None else model), step, writer)


def curves(workdir):
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def prompts_run(world, tmp_path_factory):
    """A monitor of a set of prompts alone that has looked once, and its workdir."""
    workdir = tmp_path_factory.mktemp("run")
    monitor = make_monitor(config(), data(world, False), workdir)
    look(monitor, workdir, 0)
    return monitor, workdir


def test_a_set_of_prompts_is_held_against_its_own_start(prompts_run, capsys):
    monitor, workdir = prompts_run
    assert monitor.wants_start
    look(monitor, workdir, 100)
    assert "guard" not in capsys.readouterr().out  # the same network: the same numbers
    first, second = curves(workdir)
    assert (first["step"], second["step"], second["guard/warnings"]) == (0, 100, 0)
    for name in ("motion", "frozen", "travel", "luma_drift", "saturation", "sharpness", "seam", "diversity"):
        assert np.isfinite(first[f"guard/{name}"]) and first[f"guard/{name}"] == second[f"guard/{name}"]
    kept = json.loads((workdir / "guard.json").read_text())
    assert kept["prompts"] == ["a", "a", "c", "c"] and kept["baseline"]["origin"] == "step 0"


def loud():
    """The network with an output of 30 times the size: everything runs into black or full."""
    return map_named(lambda name, x: 30 * x if name.startswith("head/") else x, tiny())


def test_a_collapse_is_reported_and_a_resumed_run_remembers_its_baseline(prompts_run, world, capsys, caplog):
    _, workdir = prompts_run
    again = make_monitor(config(), data(world, False), workdir)
    before = (workdir / "guard.json").read_bytes()
    look(again, workdir, 200, loud())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("guard: step 200:")]
    assert said and all("in step 0); try: " in line for line in said)
    assert any("raise cadence.student" in line for line in said) and not any("real_guidance" in line for line in said)
    assert curves(workdir)[-1]["guard/warnings"] == len(said)
    assert not [r for r in caplog.records if "step 200" in r.getMessage()]  # once, not in the log too
    look(again, workdir, 300, loud())
    assert "guard" not in capsys.readouterr().out  # said already, and still so
    look(again, workdir, 400)
    look(again, workdir, 500, loud())
    assert capsys.readouterr().out.count("guard: step 500:") == len(said)
    assert (workdir / "guard.json").read_bytes() == before


def test_real_clips_are_the_baseline_where_there_are_any(world, tmp_path, capsys):
    monitor = make_monitor(config(), data(world, True), tmp_path)
    said = capsys.readouterr().out
    assert said == "guard: 4 clips of 3 network calls every 100 steps, compared with real clips\n"
    assert not monitor.wants_start
    look(monitor, tmp_path, 100)
    kept = json.loads((tmp_path / "guard.json").read_text())["baseline"]
    assert kept["real"] and "diversity" not in kept["values"]  # one clip per prompt
    dataset, codec = Prompts(world, True), open_decoder(world)
    video = decode_clip(codec, dataset[0]["latents_FHWC"])
    whole = np.asarray(jax.jit(TinyVAE.decode)(codec, jnp.asarray(dataset[0]["latents_FHWC"])[None]))[0]
    assert video.shape == (21, 32, 32, 3) and video.dtype == np.uint8
    np.testing.assert_allclose(video, np.clip(whole / 2 + 0.5, 0, 1) * 255, atol=1.001)


def test_rows_follow_their_numbers_and_a_mesh_changes_nothing(prompts_run, world, tmp_path):
    """One row at a time on one device, or two at a time on two."""
    alone = prompts_run[0]._draw(tiny())
    assert alone.shape == (4, FRAMES, SIDE, SIDE, CONFIG.in_dim) and np.abs(alone[0] - alone[1]).mean() > 0.1
    mesh = make_mesh(data=2, context=2, devices=jax.devices()[:4])
    monitor = make_monitor(config(), data(world, False), tmp_path, mesh)
    with on_mesh(mesh):
        np.testing.assert_allclose(monitor._draw(shard_model(tiny(), mesh)), alone, atol=2e-4)


def test_training_goes_on_without_a_look(prompts_run, world, tmp_path, capsys):
    monitor, _ = prompts_run
    broken = jax.tree.map(lambda x: x * jnp.nan, tiny())
    for step, said in (
        (5, []),  # nothing is saved yet
        (60, ["guard: step 60: samples hold NaN or infinities"]),
    ):
        look(monitor, tmp_path, step, broken)
        assert capsys.readouterr().out.splitlines() == said
    again = make_monitor(config(), data(world, False), tmp_path)
    capsys.readouterr()
    look(again, tmp_path, 100, broken)
    assert capsys.readouterr().out.splitlines()[-1:] == [
        "guard: step 100: samples hold NaN or infinities; go on from an earlier checkpoint"
    ]
    failing = make_monitor(config(), data(world, False), tmp_path)
    failing._sample = lambda *_: 1 / 0
    capsys.readouterr()
    look(failing, tmp_path, 7)
    look(failing, tmp_path, 9)
    off = "guard: off from step 7 on (division by zero); training goes on"
    assert capsys.readouterr().out.splitlines() == ["compiling the sampler of the previews, once ...", off]
    assert curves(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "guard: off from start on (nowhere/world.json: no world here ("),
        ("", "does not say which world it was made in; name it with --config.guard.world"),
    ],
)
def test_without_a_world_the_guard_is_off(tmp_path, capsys, place, message):
    monitor = make_monitor(config(), data(place, False), tmp_path)
    out = capsys.readouterr().out
    assert monitor is None and message in out and out.count("\n") == 1 and out.endswith("; training goes on\n")


def test_a_guard_without_prompts_is_a_mistake():
    with pytest.raises(UserError, match="use 1 or more"):
        config(prompts=0)


def test_a_guard_switched_off_looks_at_nothing(world, tmp_path):
    assert make_monitor(config(enabled=False), data(world, True), tmp_path) is None


def test_captions_are_distinct_and_spread():
    assert spread_captions(Prompts("", False), 2) == {"a": 0, "c": 7}
    assert spread_captions(Prompts("", False), 9) == {"a": 0, "b": 3, "c": 6}
