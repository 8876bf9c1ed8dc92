"""`cfjax compare --against=diffusers`: agreement on random and on converted weights, and every kind of failure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cfjax import compare
from cfjax.__main__ import main
from cfjax.comparison import diffusers, diffusers_parts
from tests.commands import ROOT, cfjax
from tests.synthetic import write_wan_folder

SMALL = {"frames": 3, "height": 32, "width": 48, "text_length": 12, "steps": 4}


def run_compare(workdir: Path, *flags: str, **keys: object) -> tuple[int, dict[str, dict]]:
    """(exit code, rows by "part: what")."""
    torch.set_num_threads(1)
    overrides = [f"--config.{name}={value}" for name, value in {**SMALL, **keys}.items()]
    config = f"--config={ROOT}/configs/compare.py"
    code = main(["compare", "--against=diffusers", config, f"--workdir={workdir}", *flags, *overrides])
    file = workdir / "compare.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return code, {f"{row['part']}: {row['what']}": row for row in rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A miniature release, converted."""
    root = tmp_path_factory.mktemp("release")
    assert cfjax("convert", "convert.py", root / "run", source=write_wan_folder(root), progress=False) == 0
    return root / "run"


def perturbed(monkeypatch, module, twin_of: str, name: str, change) -> None:
    """Their side with one weight changed."""
    make = getattr(module, twin_of)

    def wrapped(config, named):
        named[name] = change(np.array(named[name]))
        return make(config, named)

    monkeypatch.setattr(module, twin_of, wrapped)


@pytest.mark.slow
def test_a_converted_release_agrees_in_every_part(run, tmp_path, capsys):
    code, rows = run_compare(tmp_path, "--seed=3", run=run)
    said = capsys.readouterr().out
    print(said)
    assert code == 0
    parts = {name.split(":")[0] for name in rows}
    here = {*diffusers.CHECKS} - {"image_encoder"}  # this release has none
    assert parts == {"dit", "gradients", "vae", "text", "tokenizer", "unipc", "sampling"} == here
    assert all(row["max_rel"] < 2e-5 for name, row in rows.items() if "gradients" not in name)
    assert rows["gradients: of all parameters"]["max_rel"] < 1e-4
    assert rows["tokenizer: ids"]["max_abs"] == 0.0 and rows["unipc: sigmas"]["max_abs"] == 0.0
    assert rows["vae: decode, streamed"]["shape"] == [1, 9, 32, 48, 3]
    assert f"all {len(rows)} within their tolerance" in said

    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["ok"] is True and record["against"] == "diffusers" and record["seed"] == 3
    assert record["command"].startswith("cfjax compare --against=diffusers ") and "--seed=3" in record["command"]
    assert record["config"]["run"] == str(run) and record["device"]["jax"] == "cpu: cpu"
    assert record["versions"]["torch"] == torch.__version__ and record["seconds"].keys() == parts
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]


def test_random_weights_agree_with_nothing_on_disk(tmp_path, capsys):
    code, rows = run_compare(tmp_path, "--only=dit,unipc")
    print(capsys.readouterr().out)
    assert code == 0
    assert len([name for name in rows if name.startswith("dit: flow")]) == 5
    assert all(row["max_rel"] < 5e-6 and row["cosine"] > 1 - 1e-9 for row in rows.values())


def test_an_image_to_video_network_and_its_clip_agree(tmp_path, capsys):
    code, rows = run_compare(tmp_path, "--only=dit,image_encoder", random="i2v_toy")
    print(capsys.readouterr().out)
    assert code == 0 and "image_encoder: features before the last block" in rows
    assert all(row["max_rel"] < 5e-6 for row in rows.values())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.1.ffn.net.2.weight", "blocks.1"),
        ("blocks.0.attn1.norm_k.weight", "blocks.0"),
        ("condition_embedder.text_embedder.linear_1.bias", "text_embedding"),
        ("condition_embedder.time_proj.weight", "time_projection"),
        ("patch_embedding.bias", "patch_embedding"),
        ("proj_out.bias", "head"),
    ],
)
def test_a_changed_weight_is_found_in_its_layer(run, tmp_path, monkeypatch, name, layer):
    def change(weight):
        weight.flat[3] += 0.5
        return weight

    perturbed(monkeypatch, diffusers, "dit_twin", name, change)
    code, rows = run_compare(tmp_path, "--only=dit", run=run)
    assert code == 1
    assert {row["first_divergent_layer"] for what, row in rows.items() if "per frame" not in what} == {layer}
    assert not any(row["ok"] for row in rows.values())


def test_a_changed_weight_of_the_autoencoder_is_found_in_its_layer(run, tmp_path, monkeypatch, capsys):
    perturbed(monkeypatch, diffusers_parts, "vae_twin", "decoder.up_blocks.1.resnets.2.conv1.bias", lambda w: w + 0.5)
    code, rows = run_compare(tmp_path, "--only=vae", run=run)
    print(capsys.readouterr().out)
    assert code == 1 and rows["vae: encode"]["ok"] and not rows["vae: decode, streamed"]["ok"]
    assert rows["vae: decode"]["first_divergent_layer"] == "decoder.up.6"


def test_a_changed_weight_of_the_text_encoder_is_found_in_its_layer(run, tmp_path, monkeypatch):
    name = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    perturbed(monkeypatch, diffusers_parts, "text_twin", name, lambda w: w.astype(np.float32) * 1.5)
    code, rows = run_compare(tmp_path, "--only=text", run=run)
    assert code == 1 and rows["text: rows of random tokens"]["first_divergent_layer"] == "layers.1"


def test_nan_is_a_failure_that_says_so(run, tmp_path, monkeypatch, capsys):
    perturbed(monkeypatch, diffusers, "dit_twin", "proj_out.weight", lambda w: w * np.nan)
    code, rows = run_compare(tmp_path, "--only=dit", run=run)
    assert code == 1 and "FAIL" in capsys.readouterr().out
    assert rows["dit: flow at t=500"]["note"] == "theirs has 1152 NaN of 1152"
    assert rows["dit: flow at t=500"]["max_rel"] is None


def test_tolerance_overrides_each_checks_own(run, tmp_path, capsys):
    code, rows = run_compare(tmp_path, "--only=dit", "--tolerance=1e-12", run=run)
    assert code == 1 and {row["tolerance"] for row in rows.values()} == {1e-12}
    assert "5 of 5 past their tolerance" in capsys.readouterr().out


def test_a_world_without_a_run_has_parts_to_compare(run, tmp_path, capsys):
    code, rows = run_compare(tmp_path, "--only=tokenizer", world=run / "world")
    assert code == 0 and rows.keys() == {"tokenizer: ids", "tokenizer: mask"}
    assert f"weights: {run / 'world'}" in capsys.readouterr().out


def complaint(capsys, *args: str, **keys: object) -> str:
    """The one line that a mistaken command gets."""
    config = [f"--config={ROOT}/configs/compare.py", *(f"--config.{name}={value}" for name, value in keys.items())]
    assert main(["compare", *config, *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_mistakes_are_one_line(run, tmp_path, monkeypatch, capsys):
    against, workdir = "--against=diffusers", f"--workdir={tmp_path}"
    message = complaint(capsys, against, "--only=dit,vea", workdir)
    assert "--only=dit,vea: no check 'vea'; use dit, gradients, vae" in message
    assert "--against is missing" in complaint(capsys, workdir)
    assert "multiples of 16 pixels" in complaint(capsys, against, workdir, width=40)
    assert "--config.steps=0" in complaint(capsys, against, workdir, steps=0)
    assert "use toy or full" in complaint(capsys, against, workdir, random="huge")
    assert "no such run" in complaint(capsys, against, workdir, run=tmp_path / "none")
    assert "holds student" in complaint(capsys, against, workdir, run=run, role="critic")
    assert "no Wan world here" in complaint(capsys, against, workdir, world=tmp_path)
    assert "--only=vae: there is no VAE" in complaint(capsys, against, workdir, "--only=vae", run="toy_teacher")
    assert "--only=dit: there is no dit" in complaint(capsys, against, workdir, "--only=dit", world=run / "world")
    assert "--only=tokenizer: there is no tokenizer" in complaint(capsys, against, workdir, "--only=tokenizer")
    assert "needs --reference_dir" in complaint(capsys, "--against=reference", workdir)
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None if name == "diffusers" else name)
    assert "needs diffusers: pip install -e '.[compare]'" in complaint(capsys, against, workdir)
    assert not list(tmp_path.iterdir())
