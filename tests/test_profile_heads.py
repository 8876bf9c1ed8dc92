"""`cfjax profile_heads`: a table of the toy's heads, which a memory policy reads; what it cannot measure is said."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cfjax import profile_heads
from cfjax.experiment.runs import open_run
from cfjax.memory.names import parse_memory
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep
from tests.commands import cfjax


@pytest.fixture
def causal(monkeypatch):
    """The shipped teacher as a causal run, which it is not: what it makes does not matter here."""
    run = replace(open_run("toy_teacher"), blocks=Blocks(3), sampler=FewStep((1000, 500)))
    monkeypatch.setattr(profile_heads, "open_run", lambda *_, **__: run)
    return run


def test_the_toy_is_profiled(causal, tmp_path, capsys):
    """Two videos at two levels; the table is of its network, and its file is read by the policy."""
    keys = {"videos": 1, "levels": 2, "batch": 2}
    assert cfjax("profile_heads", "profile_heads.py", tmp_path, **keys) == 0
    file, said = tmp_path / "heads.json", capsys.readouterr().out
    assert f"written to {file}" in said and f"written to {tmp_path / 'labels.csv'}" in said
    record, config = json.loads(file.read_text()), causal.model.config
    mass = np.array(record["mass"])
    assert mass.shape == (config.num_layers, config.num_heads, causal.latent_shape[0])
    np.testing.assert_allclose(mass.sum(-1), 1.0, atol=1e-4)
    shares = mass[..., -4:].sum(-1) / mass[..., 1:].sum(-1)
    np.testing.assert_allclose(record["share"], shares, atol=1e-4)
    assert record["static"] == (np.array(record["share"]) >= 0.8).tolist() and record["levels"] == [1.0, 0.833333]
    latents = np.random.default_rng(0).normal(size=causal.latent_shape).astype(np.float32)
    np.savez(tmp_path / "given.npz", latents)
    assert cfjax("profile_heads", "profile_heads.py", tmp_path / "given", latents=tmp_path / "given.npz", **keys) == 0
    other = json.loads((tmp_path / "given" / "heads.json").read_text())
    assert other["latents"].endswith("given.npz") and np.abs(np.array(other["mass"]) - mass).max() > 1e-4
    memory = parse_memory(f"forcing_kv(profile={file}, window=7)")
    memory.check(config)
    assert len(memory.plan(9, Blocks(3))) == 3
    pyramid = parse_memory(f"pyramid(profile={tmp_path / 'labels.csv'})")
    pyramid.check(config)
    assert [list(row) for row in pyramid.profile.label_LN] == record["labels"]["label"]
    assert len(pyramid.plan(9, Blocks(3))) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"frames": 5}, "frames=5: blocks of 3"),
        ({"recent": 11}, "12 latent frames are no more than sink=1 and recent=11"),
        ({"latents": "/nowhere.npz"}, "cannot read the latents"),
        ({"prompt": "a red zzz moving left"}, "prompt "),
    ],
)
def test_what_cannot_be_measured_is_said(causal, tmp_path, capsys, keys, message):
    assert cfjax("profile_heads", "profile_heads.py", tmp_path, **keys) == 2
    assert message in capsys.readouterr().err


def test_a_bidirectional_run_has_no_blocks(tmp_path, capsys):
    assert cfjax("profile_heads", "profile_heads.py", tmp_path, run="toy_teacher") == 2
    assert "--config.run=toy_teacher: it is bidirectional" in capsys.readouterr().err


def test_levels_are_of_the_sampler():
    few = profile_heads.levels_of(FewStep((1000, 750, 500, 250)), 2)
    assert few.tolist() == [1.0, FewStep((1000, 750, 500, 250)).sigmas()[-1]]
    many = profile_heads.levels_of(ManyStep(steps=10), 4)
    assert len(many) == 4 and many[0] == ManyStep(steps=10).grid()[0][0] and (many > 0).all()
