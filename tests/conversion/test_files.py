"""Weight files: every layout is read as it is, every mistake is one line that names the file and a fix."""

import json
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from cfjax.conversion.files import read_weights
from cfjax.conversion.prefixes import split
from cfjax.conversion.sources import open_source
from cfjax.conversion.write import write_pickle, write_safetensors
from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from tests import synthetic

torch.set_num_threads(1)
STEM = "diffusion_pytorch_model"


def complaint(path: Path, **keys: object) -> str:
    """The one line that opening `path` as a source ends in."""
    with pytest.raises(UserError) as caught:
        open_source(path, **keys)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    return line


@pytest.fixture
def release(tmp_path):
    """A release's transformer in three shards."""
    synthetic.write_config(tmp_path)
    synthetic.save_safetensors(tmp_path, STEM, synthetic.dit_weights(), 3)
    return tmp_path


def index_of(folder: Path) -> dict:
    return json.loads((folder / f"{STEM}.safetensors.index.json").read_text())


def rewrite(folder: Path, index: dict) -> None:
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def test_the_miniatures_are_releases_in_small():
    """The shapes in tests/synthetic.py, at the published sizes, have the published counts."""
    count = lambda shapes: (len(shapes), sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()))
    assert count(synthetic.dit_shapes(1536, 8960, 12, 30, 256, 16, 16, 4096)) == (825, 1_418_996_800)
    assert count(synthetic.dit_shapes(5120, 13824, 40, 40, 256, 16, 16, 4096)) == (1095, 14_288_491_584)
    assert count(synthetic.t5_shapes(256384, 4096, 4096, 10240, 64, 24)) == (242, 5_680_910_336)
    assert count(synthetic.vae_shapes(96, 16)) == (194, 126_892_531)


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_come_as_they_are(tmp_path, shards):
    weights = {**synthetic.dit_weights(), "half": np.arange(5, dtype=np.float16)}
    weights["brain"] = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    read = read_weights(synthetic.save_safetensors(tmp_path, STEM, weights, shards)).entries[""]
    assert read.keys() == weights.keys()
    for name, array in weights.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name].read(), array)


WRAPPED = {
    "plain": ("model.", ""),
    "bare": ("", ""),
    "fsdp": ("model._fsdp_wrapped_module.", ""),
    "fsdp of blocks, checkpointed": (
        "model._fsdp_wrapped_module.",
        "_fsdp_wrapped_module._checkpoint_wrapped_module.",
    ),
    "compiled": ("_orig_mod.model.", "_orig_mod."),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("prefix", "block"), WRAPPED.values(), ids=WRAPPED)
def test_training_checkpoints_come_without_their_wrappers(tmp_path, prefix, block, dtype):
    path = synthetic.write_causal_forcing_pt(
        tmp_path / "model.pt", ("generator", "critic"), prefix, block, seed=3, dtype=dtype
    )
    entries = read_weights(path).entries
    assert list(entries) == ["generator", "critic"]
    for seed, entry in enumerate(entries.values(), start=3):
        weights = synthetic.dit_weights(seed)
        assert entry.keys() == weights.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(entry[name].read(), array.astype(dtype))


def test_old_and_nested_pickles(tmp_path):
    """PyTorch's format before 1.6 cannot be mapped; trainers put counters and optimisers beside the weights."""
    weights = synthetic.as_torch({"a.weight": np.eye(3, dtype=np.float32)})
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(read_weights(tmp_path / "old.pth").entries[""]["a.weight"].read(), np.eye(3))
    content = {"generator": {"model": weights}, "step": 600, "optimizer": {"lr": 1e-3}}
    nested = read_weights(synthetic.save_pt(tmp_path / "nested.pt", content))
    assert list(nested.entries["generator"]) == ["a.weight"] and nested.ignored == ["step", "optimizer"]


def test_two_names_may_not_become_one(tmp_path):
    arrays = as_lazy({"a._orig_mod.b": np.zeros(1), "a.b": np.zeros(1)})
    with pytest.raises(UserError, match=r"x.pt: a._orig_mod.b and a.b are both a.b without their wrappers' names"):
        split(arrays, Path("x.pt"))


def test_pickles_that_could_run_code_are_refused(tmp_path):
    for entry, name in ((torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), (Path("x"), "pathlib.PosixPath")):
        content = {"generator": {"a": torch.zeros(2)}, "more": entry}
        assert f"refused: it holds {name}, and what is not" in complaint(synthetic.save_pt(tmp_path / "x.pt", content))
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"x": print}, protocol=2))
    assert "refused: it holds print" in complaint(tmp_path / "evil.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"x": print}))
    assert "refused: it is no file of torch.save" in complaint(tmp_path / "evil.pt")


def test_other_files_by_the_name_of_weights(tmp_path):
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert "a Git LFS pointer" in complaint(tmp_path / name)
        (tmp_path / name).write_bytes(b"hello world")
        assert "broken or cut short" in complaint(tmp_path / name)


def test_what_is_no_tensor_is_reported(tmp_path):
    state = {"a.weight": torch.zeros(2), "a.mask": torch.zeros(2).to_sparse()}
    assert "a.mask is a tensor of layout torch.sparse_coo" in complaint(synthetic.save_pt(tmp_path / "x.pt", state))
    assert "holds a list, not a state dict" in complaint(synthetic.save_pt(tmp_path / "y.pt", [torch.zeros(2)]))
    assert "holds no tensors, only step" in complaint(synthetic.save_pt(tmp_path / "z.pt", {"step": 1}))


def test_truncated_files(tmp_path, release):
    path = synthetic.write_causal_forcing_pt(tmp_path / "model.pt")
    os.truncate(path, path.stat().st_size // 2)
    assert "broken or cut short" in complaint(path)
    shard = release / f"{STEM}-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    path.unlink()
    assert f"{shard}: broken or cut short" in complaint(release)


def test_shards_and_index_must_agree(release):
    index = index_of(release)
    index["weight_map"]["blocks.9.norm3.bias"] = f"{STEM}-00001-of-00003.safetensors"
    rewrite(release, index)
    assert f"blocks.9.norm3.bias should be in {STEM}-00001" in complaint(release)
    del index["weight_map"]["blocks.9.norm3.bias"], index["weight_map"]["head.head.bias"]
    rewrite(release, index)
    assert "head.head.bias is not in the index" in complaint(release)
    (release / f"{STEM}-00003-of-00003.safetensors").unlink()
    assert f"{STEM}-00003-of-00003.safetensors is missing" in complaint(release)
    (release / f"{STEM}.safetensors.index.json").write_text("{")
    assert "cannot be read as JSON" in complaint(release)


def broken(folder: Path, change) -> str:
    """What is said of a release whose transformer's state dict went through `change`."""
    weights = synthetic.dit_weights()
    change(weights)
    synthetic.save_safetensors(folder, STEM, weights)
    return complaint(folder)


def test_misfits_are_reported_before_anything_is_written(tmp_path):
    synthetic.write_config(tmp_path)
    assert "missing ['blocks.1.norm3.bias']" in broken(tmp_path, lambda w: w.pop("blocks.1.norm3.bias"))
    assert "left over ['blocks.1.extra']" in broken(tmp_path, lambda w: w.update({"blocks.1.extra": np.zeros(3)}))
    wrong = {"blocks.1.ffn.0.bias": np.zeros(3, np.float32)}
    assert "blocks.1.ffn.0.bias has shape (3,)" in broken(tmp_path, lambda w: w.update(wrong))
    whole = {"head.head.bias": np.zeros(64, np.int64)}
    assert "head.head.bias has dtype int64" in broken(tmp_path, lambda w: w.update(whole))
    half = {"blocks.1.ffn.0.bias": np.zeros(64, np.float16)}
    assert "blocks.1.ffn.0.bias has dtype float16, another layer's is float32" in broken(
        tmp_path, lambda w: w.update(half)
    )
    image = {"blocks.0.cross_attn.k_img.weight": np.zeros((48, 48), np.float32)}
    assert "left over ['blocks.0.cross_attn.k_img.weight']" in broken(tmp_path, lambda w: w.update(image))


def test_config_json_must_agree(tmp_path):
    synthetic.save_safetensors(tmp_path, STEM, synthetic.dit_weights())
    assert "no config.json gives the number of heads" in complaint(tmp_path)
    for change, words in (
        ({"ffn_dim": 8960}, "ffn_dim is 8960, but the weights have 64"),
        ({"num_heads": 5}, "5 heads"),
        ({"model_type": "i2v"}, "an image-to-video model, but the weights take 16 channels and give as many"),
        ({"qk_norm": False}, "qk_norm is False"),
    ):
        synthetic.write_config(tmp_path, **change)
        assert words in complaint(tmp_path)
    synthetic.write_config(tmp_path)
    assert [each.network.config.num_heads for each in open_source(tmp_path).found] == [4]


def test_unknown_and_ambiguous_sources(tmp_path):
    assert "no such file or folder" in complaint(tmp_path / "nowhere")
    assert "no weight files here" in complaint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a weight file" in complaint(tmp_path / "notes.txt")
    synthetic.save_pt(tmp_path / "clip.pth", synthetic.as_torch({"visual.proj": np.zeros((2, 2), np.float32)}))
    assert "no known network: names such as ['visual.proj']" in complaint(tmp_path)
    synthetic.write_taehv(tmp_path / "taew2_1.pth")
    assert [each.role for each in open_source(tmp_path, parts=["tiny_vae"]).found] == ["tiny_vae"]
    assert "holds no vae" in complaint(tmp_path, parts=["vae"])
    (tmp_path / "clip.pth").unlink()
    synthetic.write_taehv(tmp_path / "taehv.pth")
    assert "taehv.pth and taew2_1.pth both hold a tiny VAE" in complaint(tmp_path)


def test_the_entry_of_a_checkpoint(tmp_path):
    """generator, then model, then generator_ema is the student; a further average and the critic are what they are."""
    synthetic.write_config(tmp_path)

    def roles(keys: tuple[str, ...], key: str = "") -> list[tuple[str, bool]]:
        path = synthetic.write_causal_forcing_pt(tmp_path / "model.pt", keys)
        return [(each.role, each.ema) for each in open_source(path, key=key).found]

    assert roles(("generator",)) == roles(("generator_ema",)) == roles(("model",)) == [("student", False)]
    assert roles(("critic", "generator_ema", "generator")) == [("student", False), ("student", True), ("critic", False)]
    assert roles(("generator_ema", "critic")) == [("student", False), ("critic", False)]
    assert roles(("generator", "critic"), key="critic") == [("student", False)]
    assert "--config.key=x: the file's entries are generator" in complaint(tmp_path / "model.pt", key="x")
    synthetic.write_causal_forcing_pt(tmp_path / "model.pt", ("critic", "teacher"))
    assert "--config.key: the file's entries are critic, teacher" in complaint(tmp_path / "model.pt")


def test_writers_are_read_back(tmp_path):
    weights = {**synthetic.dit_weights(), "empty": np.zeros((0, 2), np.float32), "one": np.ones((), np.float16)}
    weights["brain"] = np.arange(6, dtype=np.float32).reshape(3, 2).T.astype(ml_dtypes.bfloat16)  # not contiguous
    write_safetensors(tmp_path, STEM, as_lazy(weights), max_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    write_pickle(tmp_path / "model.pt", {"generator": as_lazy(weights)})
    assert not list(tmp_path.glob(".*"))
    sharded = read_weights(tmp_path / f"{STEM}.safetensors.index.json").entries[""]
    pickled = read_weights(tmp_path / "model.pt").entries["generator"]
    for name, array in weights.items():
        for read in (sharded[name], pickled[name]):
            assert (read.shape, read.dtype) == (array.shape, array.dtype)
            np.testing.assert_array_equal(read.read(), array)
