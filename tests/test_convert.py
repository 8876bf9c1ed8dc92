"""The verb: Wan folders, checkpoints and pipelines become run directories and come back; a mistake leaves nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cfjax.conversion.files import read_weights
from cfjax.conversion.kinds import KINDS
from cfjax.conversion.rules import save_named
from cfjax.conversion.wan import ORIGINAL, export_wan
from cfjax.core.precision import to_record
from cfjax.experiment.record import config_from_meta
from cfjax.experiment.stage import blocks_of, sampler_of
from cfjax.models.wan import WanConfig
from cfjax.training.checkpoint import CheckpointStore, open_role, read_meta, stored_roles
from cfjax.worlds.records import config_from_record
from cfjax.worlds.wan import fingerprint, read_record
from tests import synthetic
from tests.commands import ROOT, cfjax
from tests.conversion.repacked import FLOAT8, comfy_t5, save_raw, scaled
from tests.tiny import CONFIG, tiny

torch.set_num_threads(1)


def convert(source: Path | str, workdir: Path, arg: str = "", **keys: object) -> int:
    return cfjax("convert", f"convert.py:{arg}", workdir, source=source, progress=False, **keys)


def mistake(
    capsys: pytest.CaptureFixture[str], source: Path | str, workdir: Path, arg: str = "", **keys: object
) -> str:
    """The one line of a failing command; the folder is as it was before."""
    before = sorted(workdir.parent.rglob("*"))
    assert convert(source, workdir, arg, **keys) == 2
    line = capsys.readouterr().err
    assert line.startswith("cfjax convert: ") and line.count("\n") == 1
    assert sorted(workdir.parent.rglob("*")) == before
    return line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def release(root):
    return synthetic.write_wan_folder(root / "Wan2.1-T2V-1.3B")


@pytest.fixture(scope="module")
def run(release, root):
    """The release, converted, with a tiny decoder added afterwards."""
    assert convert(release, root / "wan") == 0
    assert convert(synthetic.write_taehv(root / "taew2_1.pth"), root / "wan") == 0
    return root / "wan"


@pytest.fixture(scope="module")
def student(root, run):
    """A few-step student with its average and its critic, in the release's world."""
    path = synthetic.write_causal_forcing_pt(
        root / "self_forcing.pt", ("generator", "critic", "generator_ema"), "model._fsdp_wrapped_module."
    )
    assert convert(path, root / "student", "dmd,framewise,2step", world=run / "world") == 0
    return root / "student"


def test_a_release_becomes_a_run(run):
    meta = read_meta(run)
    assert (meta["stage"], meta["step"], meta["latent_shape"]) == ("bidirectional", 0, [21, 60, 104, 16])
    config = config_from_record(WanConfig, meta["models"]["student"])
    assert (config.dim, config.num_heads, config.num_layers, config.text_dim) == (48, 4, 2, 32)
    assert (config.remat, config.precision.compute) == ("full", "bfloat16")
    c = config_from_meta(meta)
    assert c.sampler.kind == "bidirectional" and c.roles.student.preset == "wan_mini" and not c.ema
    sampler_of(c), blocks_of(c)
    assert (meta["world_path"], meta["world"]) == ("world", fingerprint(run / "world"))
    assert read_record(run / "world")["fps"] == 16
    for kind in ("vae", "text_encoder", "tiny_vae"):
        assert read_meta(run / "world" / kind, stages=(kind,))["model"]
    dtypes = read_meta(run / "world" / "text_encoder")["source"]["dtype"]
    assert set(dtypes.values()) == {"bfloat16"}
    assert (run / "world" / "tokenizer" / "spiece.model").exists()


@pytest.mark.parametrize(
    ("kind", "role", "layout", "weights"),
    [
        ("dit", "student", "original", synthetic.dit_weights),
        ("vae", "vae", "original", synthetic.vae_weights),
        ("tiny_vae", "tiny_vae", "taehv", synthetic.taehv_weights),
    ],
)
def test_what_was_stored_is_the_release(run, kind, role, layout, weights):
    folder = run if kind == "dit" else run / "world" / kind
    meta = read_meta(folder)
    config = config_from_record(
        type(KINDS[kind].examples[0]), meta["models"]["student"] if kind == "dit" else meta["model"]
    )
    exported = save_named(KINDS[kind].tables(config)[layout], open_role(folder, role), config)
    expected = weights()
    assert exported.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)


def test_a_checkpoint_remembers_what_it_was_trained_for(student, run):
    meta = read_meta(student, stages=("dmd",))
    assert meta["blocks"]["frames"] == 1
    c = config_from_meta(meta)
    assert (c.sampler.steps, c.sampler.first_steps) == ((1000, 500), (1000, 750, 500, 250))
    assert stored_roles(student) == [("critic", False), ("student", False), ("student", True)]
    assert set(meta["models"]) == {"student", "critic"} and "student" in c.ema
    assert (meta["world_path"], meta["world"]) == (str(run / "world"), fingerprint(run / "world"))
    for seed, (role, ema) in enumerate([("student", False), ("critic", False), ("student", True)], start=10):
        config = config_from_record(WanConfig, meta["models"][role])
        exported = save_named(ORIGINAL, open_role(student, role, ema=ema), config)
        np.testing.assert_array_equal(exported["head.head.weight"], synthetic.dit_weights(seed)["head.head.weight"])


def lora(path: Path, rank: int = 4, dim: int = 48) -> tuple[Path, dict[str, torch.Tensor]]:
    """(LongLive's second file: peft's names under `generator_lora`; module -> B A)."""
    make = torch.Generator().manual_seed(1)
    modules = [f"blocks.{i}.{a}_attn.{part}" for i in range(2) for a in ("self", "cross") for part in "qkvo"]
    normal = lambda *shape: torch.randn(shape, generator=make)
    pairs = {module: (normal(rank, dim), normal(dim, rank)) for module in modules}
    state = {
        f"base_model.model.{m}.lora_{k}.weight": x for m, ab in pairs.items() for k, x in zip("AB", ab, strict=True)
    }
    file = synthetic.save_pt(path, {"generator_lora": state, "critic_lora": {}, "step": 3000})
    return file, {module: b @ a for module, (a, b) in pairs.items()}


def test_a_base_and_its_lora_become_one_run(root, run, capsys):
    """LongLive's pair: the base's `generator`, and `generator_lora` in a second file."""
    base = synthetic.write_causal_forcing_pt(root / "longlive_base.pt", ("generator", "critic"))
    file, products = lora(root / "longlive_lora.pt")
    assert convert(base, root / "longlive", "dmd", world=run / "world", lora=f"{file}:0.5") == 0
    assert "with the LoRA longlive_lora.pt, weight 0.5" in capsys.readouterr().out
    meta = read_meta(root / "longlive")
    assert meta["source"]["lora"] == f"{file}:0.5"
    config = config_from_record(WanConfig, meta["models"]["student"])
    student, critic = (
        save_named(ORIGINAL, open_role(root / "longlive", role), config) for role in ("student", "critic")
    )
    for name, x in synthetic.dit_weights(10).items():
        change = products.get(name.removesuffix(".weight"))
        expected = x if change is None else (torch.from_numpy(x) + 0.5 * change).numpy()
        np.testing.assert_array_equal(student[name], expected, err_msg=name)
    for name, x in synthetic.dit_weights(11).items():
        np.testing.assert_array_equal(critic[name], x, err_msg=name)


def test_a_lora_of_another_network_leaves_nothing(root, run, student, capsys):
    base = synthetic.write_causal_forcing_pt(root / "base.pt")
    other, _ = lora(root / "wider.pt", dim=64)
    keys = {"world": run / "world", "lora": other}
    assert "it is a LoRA of another network" in mistake(capsys, base, root / "none", "dmd", **keys)
    good, _ = lora(root / "good.pt")
    both = mistake(capsys, root / "self_forcing.pt", root / "none", "dmd", world=run / "world", lora=good)
    assert "the source has generator, generator_ema; choose the LoRA's own by --config.key" in both
    assert "no transformer" in mistake(capsys, root / "taew2_1.pth", root / "none", lora=good)
    assert "no LoRA: tensors such as" in mistake(capsys, base, root / "none", "dmd", world=run / "world", lora=base)


@pytest.mark.parametrize("arg", ["ar_diffusion,framewise", "ode_regression", "consistency", "dmd,1step"])
def test_stages(root, run, arg):
    path = synthetic.write_causal_forcing_pt(root / "generator.pt", ("generator",))
    assert convert(path, root / "stages" / arg, arg, world=run / "world") == 0
    meta = read_meta(root / "stages" / arg)
    stage, *switches = arg.split(",")
    assert meta["stage"] == stage
    assert meta["blocks"]["frames"] == (1 if "framewise" in switches else 3)
    assert not meta["config"]["ema"]  # the file holds no average


def test_what_a_checkpoint_was_trained_for_is_asked_for(root, run, tmp_path, capsys):
    """Nothing in the file says it. A transformer that is no trainer's is Wan itself, without a word."""
    trained = synthetic.write_causal_forcing_pt(tmp_path / "generator.pt", ("generator",))
    assert convert(trained, tmp_path / "unsaid", world=run / "world") == 0
    said = capsys.readouterr().out
    assert "recorded as bidirectional, with 50 steps of UniPC" in said and "configs/convert.py:dmd" in said
    assert convert(trained, tmp_path / "said", "dmd", world=run / "world") == 0
    assert "recorded as bidirectional" not in capsys.readouterr().out
    assert convert(tmp_path / "unsaid", tmp_path / "plain", to="safetensors", parts="dit") == 0
    plain = tmp_path / "plain" / "diffusion_pytorch_model.safetensors"
    assert convert(plain, tmp_path / "wan", world=run / "world") == 0
    assert "recorded as bidirectional" not in capsys.readouterr().out


def test_back_out_to_the_reference(student, root, capsys):
    assert convert(student, root / "reference", to="pt") == 0
    assert "207 tensors, 271,152 parameters" in capsys.readouterr().out
    state = torch.load(root / "reference" / "model.pt", weights_only=True)
    assert sorted(state) == ["critic", "generator", "generator_ema"]
    for seed, entry in enumerate(["generator", "critic", "generator_ema"], start=10):
        expected = synthetic.dit_weights(seed)
        assert {f"model.{name}" for name in expected} == state[entry].keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(state[entry][f"model.{name}"].numpy(), array)


def test_back_out_to_a_release(run, release, root):
    """Through the run directory and back: every array of every file, T5 in bfloat16 too."""
    assert convert(run, root / "back", to="safetensors", max_shard_gb=1e-3) == 0
    pairs = {
        "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.safetensors.index.json",
        "Wan2.1_VAE.safetensors.index.json": "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.safetensors": "models_t5_umt5-xxl-enc-bf16.pth",
    }
    for ours, theirs in pairs.items():
        found, expected = read_weights(root / "back" / ours).entries[""], read_weights(release / theirs).entries[""]
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert found[name].dtype == x.dtype and found[name].read().tobytes() == x.read().tobytes(), name
    assert (root / "back" / "taew2_1.safetensors").exists()
    assert json.loads((root / "back" / "config.json").read_text())["num_heads"] == 4


def test_out_to_diffusers_and_in_again(student, run, root, capsys):
    line = mistake(capsys, student, root / "pipeline", to="diffusers", parts="dit,vae,text_encoder")
    assert "holds one transformer, the source has critic, generator, generator_ema" in line
    keys = {"to": "diffusers", "parts": "dit,vae,text_encoder", "key": "generator_ema"}
    assert convert(student, root / "pipeline", "dmd", **keys) == 0
    scheduler = json.loads((root / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 5.0
    assert convert(root / "pipeline", root / "again", "dmd") == 0
    average = open_role(student, "student", ema=True)
    again = open_role(root / "again", "student")
    assert all(again[name].read().tobytes() == x.read().tobytes() for name, x in average.items())
    assert fingerprint(root / "again" / "world") == fingerprint(run / "world")  # whatever layout it came in


def test_a_text_encoder_with_its_tokenizer_inside(release, run, root, capsys):
    """ComfyUI's file: transformers' names, spiece.model as a tensor, no config.json; the world is the release's."""
    weights = comfy_t5(torch.load(release / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True))
    folder = release / "google" / "umt5-xxl"
    spiece = np.frombuffer((folder / "spiece.model").read_bytes(), np.uint8)
    path = root / "umt5_xxl_bf16.safetensors"
    save_file({**weights, "spiece_model": torch.from_numpy(spiece.copy())}, path)
    assert convert(path, root / "comfy") == 0
    files = [file.name for file in (root / "comfy" / "world" / "tokenizer").iterdir()]
    assert files == ["spiece.model"] and "left out" not in capsys.readouterr().out
    records = [read_meta(place / "world" / "text_encoder") for place in (root / "comfy", run)]
    assert records[0]["model"] == records[1]["model"] and records[0]["fingerprint"] == records[1]["fingerprint"]
    assert convert(root / "comfy", root / "comfy_out", to="safetensors") == 0
    assert (root / "comfy_out" / "google" / "umt5-xxl" / "spiece.model").read_bytes() == spiece.tobytes()
    save_file({**weights, "spiece_model": torch.zeros(1000, dtype=torch.uint8)}, path)
    assert convert(path, root / "comfy_broken") == 0
    assert "left out: spiece_model (no SentencePiece model" in capsys.readouterr().out
    assert not (root / "comfy_broken" / "world" / "tokenizer").exists()


def test_channels_that_do_not_fit(run, root, tmp_path, capsys):
    """Network against world, codec against codec, rows of text: told before anything is written."""
    wide = synthetic.save_safetensors(tmp_path, "wide", synthetic.dit_weights(3, in_dim=48, out_dim=48))
    text = synthetic.save_safetensors(tmp_path, "text", synthetic.dit_weights(3, text_dim=64))
    synthetic.write_config(tmp_path, in_dim=48, out_dim=48)
    out, world = tmp_path / "out", run / "world"
    line = mistake(capsys, wide, out, world=world)
    assert "wide.safetensors: the Wan transformer is made for latents of 48 channels, the Wan VAE of" in line
    synthetic.write_config(tmp_path)
    assert "made for text rows of 64 channels, the umT5 encoder of" in mistake(capsys, text, out, world=world)
    tiny = synthetic.random_weights(synthetic.taehv_shapes(8, (16, 8, 8, 8), 12), 0)
    both = synthetic.save_pt(tmp_path / "tiny.pth", synthetic.as_torch(tiny))
    shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "world" / "tiny_vae")
    assert "the Wan transformer" not in (line := mistake(capsys, both, tmp_path / "other"))
    assert "the tiny VAE is made for latents of 12 channels, the Wan VAE of" in line
    assert convert(run, tmp_path / "out", to="pt") == 0  # and what fits, goes on


def test_what_the_user_says_of_quantised_weights(tmp_path, capsys):
    weights = synthetic.dit_weights(3)
    synthetic.write_config(tmp_path)
    path = save_raw(tmp_path / "fp8.safetensors", scaled(weights, "comfy")[0])
    assert convert(path, tmp_path / "run", dequantize="bfloat16") == 0
    assert "dequantised to bfloat16: 26 of float8_e4m3fn\n  left out: scales of 26 layers' inputs\n" in (
        capsys.readouterr().out
    )
    stored = open_role(tmp_path / "run", "student")
    assert (stored["head/kernel"].dtype.name, stored["head/bias"].dtype.name) == ("bfloat16", "float32")
    cast = save_raw(tmp_path / "fp8.safetensors", {k: x.astype(FLOAT8) for k, x in weights.items()})
    assert "--config.unscaled=True" in mistake(capsys, cast, tmp_path / "out")
    assert convert(cast, tmp_path / "out", unscaled=True) == 0


def test_mistakes(release, run, root, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--config.source is missing" in mistake(capsys, "", out)
    assert "--config.to='onnx'" in mistake(capsys, release, out, to="onnx")
    assert "'clip' is none of dit" in mistake(capsys, release, out, parts="dit,clip")
    assert "is a run directory already" in mistake(capsys, run, out)
    assert "no such file or folder" in mistake(capsys, tmp_path / "nowhere", out)
    assert "unknown switch '3step'" in mistake(capsys, release, out, "dmd,3step")
    assert "no Wan world here" in mistake(capsys, release, out, world=tmp_path)
    assert "checkpoints exists" in mistake(capsys, release, run)
    assert "tiny_vae exists" in mistake(capsys, root / "taew2_1.pth", run)
    assert "holds no tiny_vae" in mistake(capsys, release, out, parts="tiny_vae")
    assert "--config.key=critic" in mistake(capsys, run, out, to="pt", key="critic")
    assert "tiny_vae has no diffusers layout" in mistake(capsys, run, out, to="diffusers", parts="dit,tiny_vae")


def test_broken_sources_leave_nothing(release, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    weights = synthetic.dit_weights()
    synthetic.write_config(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    del weights["blocks.1.ffn.2.bias"]
    synthetic.save_safetensors(tmp_path, file.stem, weights)
    assert f"{file}: weights do not fit the model: missing ['blocks.1.ffn.2.bias']" in mistake(capsys, file, out)
    file.write_bytes(file.read_bytes()[:-1])
    assert "broken or cut short" in mistake(capsys, file, out)
    synthetic.save_pt(tmp_path / "evil.pt", {"generator": {"a": torch.zeros(1)}, "code": Path("x")})
    assert "refused: it holds pathlib.PosixPath" in mistake(capsys, tmp_path / "evil.pt", out)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in mistake(capsys, release / "Wan2.1_VAE.pth", out)


def test_a_failure_in_the_middle_leaves_nothing(release, tmp_path, capsys, monkeypatch):
    """Every part but the last is written when reading fails."""
    from cfjax import convert as verb
    from cfjax.core.errors import UserError

    def failing(*args: object) -> None:
        raise UserError("disk full")

    monkeypatch.setattr(verb, "_run_meta", failing)
    assert "disk full" in mistake(capsys, release, tmp_path / "out")
    assert convert(release, tmp_path / "some" / "deep" / "out") == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_written_into(release, tmp_path):
    """A mount point, or a link to another disk: it stays one, with what lies there, and nothing is put beside it."""
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    for to in ("orbax", "safetensors"):
        source = release if to == "orbax" else tmp_path / "run"
        workdir = tmp_path / "run" if to == "orbax" else tmp_path / "run" / "world" / "out"
        assert convert(source, workdir, to=to, parts="dit,vae,text_encoder") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "run"] and (tmp_path / "run").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["checkpoints", "lost+found", "world"]


def test_a_full_disk_is_reported_and_changes_nothing(run, tmp_path, capsys, monkeypatch):
    """In whose words ever; the scheduler may start it again."""
    from safetensors import SafetensorError

    def refusing(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("cfjax.conversion.write.save_tensors", refusing)
    assert convert(run, tmp_path / "out", to="safetensors") == 75
    error = capsys.readouterr().err
    assert "out: cannot be written to (SafetensorError: " in error and "; nothing was changed there" in error
    assert not list(tmp_path.iterdir())


def test_overwriting(root, run, tmp_path):
    path = synthetic.write_causal_forcing_pt(tmp_path / "x.pt", ("generator",), seed=20)
    assert convert(path, tmp_path / "out", "dmd", world=run / "world") == 0
    synthetic.write_causal_forcing_pt(path, ("generator",), seed=21)
    assert convert(path, tmp_path / "out", "dmd", world=run / "world", overwrite=True) == 0
    head = open_role(tmp_path / "out", "student")["head/bias"].read()
    np.testing.assert_array_equal(head, synthetic.dit_weights(21)["head.head.bias"])
    for shard in (1e-4, 1.0):  # many shards, then one: the old ones must go
        assert (
            convert(
                tmp_path / "out", tmp_path / "st", to="safetensors", parts="dit", overwrite=True, max_shard_gb=shard
            )
            == 0
        )
    assert [file.name for file in (tmp_path / "st").glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_a_trained_run_comes_out_too(run, tmp_path):
    """Its checkpoint has whole arrays where a converted one has layers; the world is another folder's."""
    store = CheckpointStore(tmp_path / "trained")
    meta = {"stage": "dmd", "models": {"student": to_record(CONFIG)}}
    store.save(7, {"params": {"student": tiny()}}, {}, meta)
    store.close()
    assert convert(tmp_path / "trained", tmp_path / "out", to="safetensors", world=run / "world") == 0
    found = read_weights(tmp_path / "out" / "diffusion_pytorch_model.safetensors").entries[""]
    expected = export_wan(tiny(), ORIGINAL)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].read(), array, err_msg=name)
    assert (tmp_path / "out" / "Wan2.1_VAE.safetensors").exists()


def test_a_trained_run_is_never_replaced(release, tmp_path, capsys):
    store = CheckpointStore(tmp_path / "out")
    store.save(3, {"params": {"student": {"x": jnp.zeros(2)}}}, {}, {"stage": "dmd"})
    store.close()
    assert "holds a run that was trained here" in mistake(capsys, release, tmp_path / "out", overwrite=True)


@pytest.mark.slow
def test_memory(tmp_path):
    """At most the largest shard and one converted array are held, whichever way; the release is several times larger.

    About 20 s: a release of 350 MB in eight shards is written and converted in a process of its own. There glibc gives
    freed arrays back at once: what it would keep in its arenas depends on how threads meet (95 to 137 MB were counted,
    where 41 to 52 MB are in use).
    """
    script = ROOT / "tests" / "conversion" / "peak_memory.py"
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    out = subprocess.run([sys.executable, script, tmp_path], env=env, check=True, capture_output=True, text=True).stdout
    sizes = json.loads(out.splitlines()[-1])
    print({name: f"{value / 1e6:.0f} MB" for name, value in sizes.items()})
    bound = sizes["shard"] + sizes["stacked"]
    assert sizes["total"] > 2.5 * bound
    assert max(sizes[way] for way in ("orbax", "safetensors", "pt", "fp8", "gguf")) < bound
