"""Transformers as trainers and user interfaces save them: the same bits come in as from the release."""

import argparse
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from cfjax.conversion.files import read_weights
from cfjax.conversion.kinds import KINDS
from cfjax.conversion.prefixes import ANCHORS
from cfjax.conversion.rules import their_names
from cfjax.conversion.sources import open_source
from tests import synthetic
from tests.conversion.repacked import save_deepspeed, save_distributed
from tests.conversion.test_files import STEM, complaint

torch.set_num_threads(1)
SIZES = {"dim": 128, "num_heads": 1}  # 128 channels per head: no config.json is needed
WEIGHTS = synthetic.dit_weights(3, **SIZES)
TENSORS = synthetic.as_torch(WEIGHTS)


def same(path: Path, weights=WEIGHTS, **options) -> list[str]:
    """What was left out of a source that holds one transformer, with exactly these weights."""
    source = open_source(path, **options)
    (found,) = source.found
    assert (found.role, found.ema, found.network.config.num_heads) == ("student", False, 1)
    back = found.network.exported(found.network.layout)
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        assert back[name].dtype == x.dtype and back[name].read().tobytes() == np.ascontiguousarray(x).tobytes(), name
    return source.ignored


PREFIXES = (
    *("model.", "model.diffusion_model.", "diffusion_model.", "module.", "net.", "pipe.dit.", "transformer.", "dit."),
    *("generator.", "generator.model.", "_orig_mod.module.model.", "wan.network."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_whatever_stands_before_every_name_is_taken_off(tmp_path, prefix):
    assert same(synthetic.save_safetensors(tmp_path, STEM, {prefix + k: x for k, x in WEIGHTS.items()})) == []


def test_every_layout_has_an_anchor():
    """A name that its every file has, by which prefixes are found."""
    for kind, row in KINDS.items():
        for example in row.examples:
            for layout, table in row.tables(example).items():
                assert set(ANCHORS) & set(their_names(table, row.template(example))), (kind, layout)


def test_networks_under_prefixes_of_their_own_in_one_file(tmp_path):
    """ComfyUI's checkpoints hold all three; a trainer's flat state its critic, average and discriminator."""
    vae, t5 = synthetic.vae_weights(), synthetic.t5_weights(300)
    parts = {"model.diffusion_model.": WEIGHTS, "vae.": vae, "text_encoders.umt5xxl.transformer.": t5}
    whole = {prefix + k: x for prefix, part in parts.items() for k, x in part.items()}
    path = synthetic.save_safetensors(tmp_path, "all_in_one", whole | {"cond_stage.logit_scale": np.ones(1)})
    source = open_source(path)
    assert {each.role for each in source.found} == {"student", "vae", "text_encoder"}
    assert source.ignored == ["cond_stage.logit_scale"]
    assert [each.role for each in open_source(path, parts=["vae"]).found] == ["vae"]
    roles = ("generator.model.", "fake_score.model.", "generator_ema.model.", "real_score.model.")
    flat = {prefix + k: x + i for i, prefix in enumerate(roles) for k, x in WEIGHTS.items()}
    found = open_source(
        synthetic.save_safetensors(tmp_path, "flat", {**flat, "discriminator.0.weight": np.ones((2, 2))})
    )
    assert [(each.role, each.ema) for each in found.found] == [("student", False), ("student", True), ("critic", False)]
    assert found.ignored == ["discriminator.0.weight", "real_score (69 tensors)"]
    biases = [each.network.arrays["head/bias"].read()[0] - WEIGHTS["head.head.bias"][0] for each in found.found]
    np.testing.assert_allclose(biases, [0, 2, 1], atol=1e-6)


BESIDE = {
    "a step": {"step": torch.tensor(750)},
    "a random state": {"rng_state": torch.get_rng_state(), "numpy": np.random.RandomState(0).get_state()},
    "flags": {"args": argparse.Namespace(lr=1e-6, steps=[1, 2]), "loss": np.float64(0.5)},
    "an optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-6}]}},
    "FSDP's optimizer": {"optim": {"state": {"model.blocks.0.ffn.0.bias": {"exp_avg": torch.zeros(2)}}}},
    "nothing": {"scheduler": None},
}
INSIDE = {
    "TransformerEngine's state": {"model.blocks.0.self_attn.q._extra_state": None},
    "that as bytes": {"model.blocks.0.self_attn.q._extra_state": torch.zeros(0, dtype=torch.uint8)},
    "RoPE's table": {"model.freqs": torch.zeros(4, 4, dtype=torch.complex128)},
    "RoPE's cosines": {"model.rope.cosines": torch.zeros(4, 4)},
    "torch's counter of averages": {"n_averaged": torch.tensor(3)},
    "a number": {"model.step": 7},
    "a number in a tensor": {"model.learning_rate": torch.tensor(1e-6)},
    "a text": {"note": "trained on Tuesday"},
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_trainers_put_beside_the_network_is_left_out(tmp_path, beside):
    path = synthetic.save_pt(tmp_path / "model.pt", {"generator": synthetic.prefixed(TENSORS), **beside})
    assert same(path) == list(beside)


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_what_is_no_weight_inside_the_network_is_left_out(tmp_path, inside):
    state = {**synthetic.prefixed(TENSORS), **inside}
    (told,) = same(synthetic.save_pt(tmp_path / "model.pt", {"generator_ema": state}))
    (name,) = inside
    assert told.endswith(name.removeprefix("model."))


def test_a_weight_that_the_network_does_not_have_is_refused(tmp_path):
    """Another architecture's: leaving it out would change what the network computes."""
    state = {**TENSORS, "blocks.0.to_gate_compress.weight": torch.zeros(128, 128)}
    assert "left over ['blocks.0.to_gate_compress.weight']" in complaint(synthetic.save_pt(tmp_path / "x.pt", state))


@pytest.mark.parametrize(
    "key", ["ema", "model_ema", "generator_ema", "ema_state_dict", "module", "student", "anything"]
)
def test_the_only_network_of_a_file_is_the_student(tmp_path, key):
    same(synthetic.save_pt(tmp_path / "x.pt", {key: {"module": synthetic.prefixed(TENSORS)}, "step": 3}))


def sharded(folder: Path, suffix: str, shards: int = 3) -> Path:
    """An index of safetensors or of pickles; returns it."""
    folder.mkdir(exist_ok=True)
    index = synthetic.save_safetensors(folder, STEM, WEIGHTS, shards)
    if suffix == ".safetensors":
        return index
    about = json.loads(index.read_text())
    index.unlink()
    for file in sorted(set(about["weight_map"].values())):
        part = {k: TENSORS[k] for k, where in about["weight_map"].items() if where == file}
        synthetic.save_pt(folder / file.replace(".safetensors", suffix), part)
        (folder / file).unlink()
    about["weight_map"] = {k: file.replace(".safetensors", suffix) for k, file in about["weight_map"].items()}
    out = folder / f"{STEM}{suffix}.index.json"
    out.write_text(json.dumps(about))
    return out


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_shards_whose_index_says_what_it_likes(tmp_path, suffix):
    index = sharded(tmp_path / "x", suffix)
    about = json.loads(index.read_text())
    size = sum(x.nbytes for x in WEIGHTS.values())
    for metadata, told in (
        ({}, False),
        ({"total_size": 0}, False),
        ({"total_size": str(size)}, False),
        ({"total_size": float(size), "total_parameters": 5, "format": ["pt"]}, False),
        ({"total_size": size // 2}, True),
        ({"total_size": "unknown"}, True),
        ([], False),
    ):
        index.write_text(json.dumps({**about, "metadata": metadata}))
        ignored = same(tmp_path / "x")
        assert ["total_size" in line for line in ignored] == ([True] if told else []), metadata
    index.write_text(json.dumps({"weight_map": about["weight_map"]}))
    assert same(index) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_an_index(tmp_path, suffix):
    sharded(tmp_path, suffix).unlink()
    assert same(tmp_path) == same(tmp_path / f"{STEM}-00002-of-00003{suffix}") == []
    (tmp_path / f"{STEM}-00002-of-00003{suffix}").rename(tmp_path / "kept")
    assert f"{STEM}-00002-of-00003{suffix} is missing" in complaint(tmp_path)
    (tmp_path / f"{STEM}-00002-of-00003{suffix}").write_bytes(
        (tmp_path / f"{STEM}-00001-of-00003{suffix}").read_bytes()
    )
    assert "is in another shard too" in complaint(tmp_path)


def test_folders_that_accelerate_saves(tmp_path):
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    synthetic.save_safetensors(folder, "model", WEIGHTS)
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-6}]}
    for name in ("optimizer.bin", "optimizer_1.bin", "scheduler.bin", "sampler.bin", "scaler.pt", "optimizer.pt"):
        synthetic.save_pt(folder / name, adam)
    (folder / "random_states_0.pkl").write_bytes(b"x")
    (folder / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")  # macOS's
    assert same(folder) == same(tmp_path) == []
    (tmp_path / "checkpoint-600").mkdir()
    synthetic.save_safetensors(tmp_path / "checkpoint-600", "model", WEIGHTS)
    assert "several folders of weights in it (checkpoint-500, checkpoint-600)" in complaint(tmp_path)


def test_folders_that_deepspeed_saves(tmp_path):
    """Below stage 3 the network is whole, in one file; its pieces are for DeepSpeed to join."""
    same(save_deepspeed(tmp_path / "two", WEIGHTS, stage=2))
    same(tmp_path / "two" / "global_step7" / "mp_rank_00_model_states.pt")
    assert "ZeRO pieces" in complaint(save_deepspeed(tmp_path / "three", WEIGHTS, stage=3))
    step = tmp_path / "three" / "global_step7"
    (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").rename(step / "mp_rank_00_model_states.pt")
    assert "python zero_to_fp32.py FOLDER model.pt" in complaint(step)
    (step / "mp_rank_01_model_states.pt").write_bytes(b"x")
    assert "DeepSpeed's pieces of a network (mp_rank_00" in complaint(step)
    (tmp_path / "three" / "latest").write_text("global_step8")
    assert "global_step8: no such folder, but latest names it" in complaint(tmp_path / "three")
    (tmp_path / "three" / "latest").write_text("../two/global_step7")
    assert "no name of a file" in complaint(tmp_path / "three")


def test_folders_that_torch_distributed_saves(tmp_path):
    state = {"model": synthetic.prefixed(TENSORS, "generator.model."), "optim": {"exp_avg": torch.zeros(3)}, "step": 4}
    folder = save_distributed(tmp_path / "pytorch_model_fsdp_0", state)  # as accelerate calls it
    shutil.copytree(folder, tmp_path / "optimizer_0")
    assert same(folder) == same(tmp_path) == ["step", "optim.exp_avg"]
    assert open_source(folder).found[0].network.notes == ("a torch distributed checkpoint (.metadata and *.distcp)",)
    file = next(folder.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "missing or cut short" in complaint(folder)
    (folder / ".metadata").unlink()
    assert "whose .metadata is missing" in complaint(folder) and "dcp_to_torch FOLDER" in complaint(folder)
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "it holds os.system" in complaint(folder) or "it holds posix.system" in complaint(folder)


def test_pieces_of_a_distributed_checkpoint_are_put_together(tmp_path):
    """A tensor that two processes saved in halves."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    whole = torch.arange(12.0).reshape(4, 3)
    folder = save_distributed(tmp_path / "dcp", {"a.x": whole[:2].clone(), "a.y": whole[2:].clone()})
    import pickle

    meta = pickle.loads((folder / ".metadata").read_bytes())
    about = meta.state_dict_metadata.pop("a.y")
    meta.storage_data[MetadataIndex("a.x", [2, 0])] = meta.storage_data.pop(MetadataIndex("a.y", [0, 0]))
    half = meta.state_dict_metadata["a.x"]
    half.size, half.chunks = (
        torch.Size([4, 3]),
        [
            *half.chunks,
            ChunkStorageMetadata(torch.Size([2, 0]), about.chunks[0].sizes),
        ],
    )
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    np.testing.assert_array_equal(read_weights(folder).entries[""]["a.x"].read(), whole.numpy())
    half.chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    assert "without all pieces of a.x" in complaint(folder)


def test_a_cache_is_opened_at_its_snapshot(tmp_path):
    root = tmp_path / "models--Wan-AI--Wan2.1"
    for number in ("abc", "def"):
        (root / "snapshots" / number).mkdir(parents=True)
        synthetic.save_safetensors(root / "snapshots" / number, STEM, WEIGHTS)
        if number == "abc":
            same(root)
            (tmp_path / "links").mkdir()
            (tmp_path / "links" / "weights").symlink_to(root / "snapshots" / "abc")
            assert "outside of" in complaint(tmp_path / "links")
    assert "several folders of weights in it (snapshots/abc, snapshots/def)" in complaint(root)


def test_half_precision_stays_half(tmp_path):
    half = {name: x.astype(np.float16) for name, x in WEIGHTS.items()}
    assert same(synthetic.save_safetensors(tmp_path, STEM, half), half) == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_codecs_in_half_precision_and_under_prefixes(tmp_path, prefix, dtype):
    """wan_2.1_vae.safetensors and taew2_1.safetensors, as user interfaces have them."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    for kind, weights in (("vae", synthetic.vae_weights()), ("tiny_vae", synthetic.taehv_weights())):
        half = {name: x.astype(dtype) for name, x in weights.items()}
        path = synthetic.save_safetensors(tmp_path, kind, {prefix + name: x for name, x in half.items()})
        (found,) = open_source(path).found
        back = found.network.exported(found.network.layout)
        assert found.role == kind and back.keys() == half.keys()
        assert all(back[name].dtype == dtype and back[name].read().tobytes() == x.tobytes() for name, x in half.items())


ADAPTERS = {
    "kohya": {"lora_unet_blocks_0_ffn_0.lora_down.weight": (4, 256), "lora_unet_blocks_0_ffn_0.alpha": ()},
    "lightx2v": {
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": (64, 4),
        "diffusion_model.blocks.0.ffn.0.diff_b": (64,),
    },
    "peft": {"base_model.model.blocks.0.ffn.0.lora_A.weight": (4, 256)},
    "diffusers": {"transformer.blocks.0.attn1.to_q.lora_B.weight": (256, 4)},
    "LoKr": {"diffusion_model.blocks.0.ffn.0.lokr_w1": (4, 4)},
}


@pytest.mark.parametrize("shapes", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_is_told_as_one(tmp_path, shapes):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    path = synthetic.save_safetensors(tmp_path, "x", arrays)
    assert all("it is a LoRA (an adapter)" in complaint(path, parts=parts) for parts in ([], ["dit"]))
    unmerged = {**WEIGHTS, "blocks.0.ffn.0.lora_A.default.weight": np.zeros((4, 128), np.float32)}
    assert "it is a LoRA (an adapter)" in complaint(synthetic.save_safetensors(tmp_path, "y", unmerged))


def test_another_models_config_json_is_not_believed(tmp_path):
    path = synthetic.save_pt(tmp_path / "x.pt", {"generator": synthetic.prefixed(TENSORS)})
    for foreign in (
        {"model_type": "llama", "num_heads": 8, "eps": 1e-5},
        {"num_heads": 4, "eps": 1e-5, "hidden_size": 128},
        {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 4},
        {"architectures": ["LlamaForCausalLM"], "num_layers": 10**9},
    ):
        (tmp_path / "config.json").write_text(json.dumps(foreign))
        assert same(path) == [f"{tmp_path / 'config.json'} (of some other model)"]
        assert open_source(path).found[0].network.config.eps == 1e-6
    synthetic.write_config(tmp_path, dim=128, num_heads=1, _class_name="CausalWanModel", local_attn_size=21, eps=1e-5)
    assert same(path) == [] and open_source(path).found[0].network.config.eps == 1e-5
    synthetic.write_config(tmp_path, dim=128, num_heads=1, num_layers=10**9)
    assert "num_layers is 1000000000; it must be" in complaint(path)


def test_channels_in_and_out_must_be_the_same(tmp_path):
    wide = synthetic.dit_weights(0, **SIZES, in_dim=32)
    path = synthetic.save_safetensors(tmp_path, STEM, wide)
    assert "takes 32 latent channels and gives 16" in complaint(path)
    assert "takes 16 latent channels and gives 16.25" in complaint(
        synthetic.save_safetensors(tmp_path, STEM, {**WEIGHTS, "head.head.weight": np.zeros((65, 128), np.float32)})
    )
