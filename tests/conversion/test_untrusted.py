"""Untrusted weights: nothing is read outside their folder, sizes are bounded, and NaN is reported by tensor."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cfjax.conversion.sources import copy_tokenizer, open_source
from cfjax.core.errors import UserError
from tests import synthetic
from tests.conversion.test_files import STEM, complaint, index_of, rewrite

torch.set_num_threads(1)


@pytest.fixture
def release(tmp_path):
    """A release's transformer in three shards."""
    folder = tmp_path / "release"
    folder.mkdir()
    synthetic.write_config(folder)
    synthetic.save_safetensors(folder, STEM, synthetic.dit_weights(), 3)
    return folder


def test_shards_lie_beside_their_index(release):
    index = index_of(release)
    shard = f"{STEM}-00001-of-00003.safetensors"
    (release / shard).rename(release.parent / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(release.parent / "elsewhere.safetensors"), 3):
        moved = {key: name if file == shard else file for key, file in index["weight_map"].items()}
        rewrite(release, {**index, "weight_map": moved})
        assert "index.json" in complaint(release)
    rewrite(release, index)
    (release / shard).symlink_to(release.parent / "elsewhere.safetensors")
    assert "leads to" in complaint(release) and "outside of" in complaint(release)


def test_a_download_into_a_cache_is_links_into_its_blobs(release, tmp_path):
    blobs = tmp_path / "hub" / "models--Wan-AI--Wan2.1" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0a1b"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(release.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    assert [each.role for each in open_source(snapshot).found] == ["student"]


def test_a_tokenizers_links_are_not_followed_out_of_it(tmp_path):
    folder, secret = tmp_path / "tokenizer", tmp_path / "secret"
    folder.mkdir()
    (folder / "below").mkdir()
    secret.write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    copy_tokenizer(folder, tmp_path / "copy")
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]
    (folder / "more.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"more\.json leads to .*secret, outside of"):
        copy_tokenizer(folder, tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_numbers_that_are_not_finite_are_reported_by_their_tensor(tmp_path):
    synthetic.write_config(tmp_path)
    weights = synthetic.dit_weights()
    weights["blocks.1.ffn.0.weight"][3, 5] = np.nan
    synthetic.save_safetensors(tmp_path, STEM, weights)
    arrays = open_source(tmp_path).found[0].network.arrays
    with pytest.raises(UserError, match=rf"{STEM}\.safetensors: blocks\.1\.ffn\.0\.weight holds numbers that are NaN"):
        arrays["blocks/ffn/up/kernel"].read()
    assert arrays["blocks/ffn/down/kernel"].read().shape == (2, 64, 48)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.999999999.norm3.bias": torch.zeros(1)}, "blocks.999999999: no number of a layer"),
        ({"blocks.99999.norm3.bias": torch.zeros(1)}, "100000 layers"),
        ({"blocks..norm3.bias": torch.zeros(1)}, "no number of a layer"),
        ({"patch_embedding.weight": torch.zeros(48, 16, 1, 0, 0)}, "sizes must be 1 to"),
        ({"head.head.bias": torch.zeros(1).expand(2**40)}, "an expanded tensor"),
    ],
    ids=["far too many layers", "too many layers", "no layer", "no size", "expanded"],
)
def test_sizes_that_nothing_is_stored_for(tmp_path, change, words):
    path = synthetic.save_pt(tmp_path / "x.pt", {**synthetic.as_torch(synthetic.dit_weights()), **change})
    assert words in complaint(path)


def test_containers_within_themselves_come_to_an_end(tmp_path):
    content: dict = {"step": 1}
    content["model"] = content
    assert "holds no tensors" in complaint(synthetic.save_pt(tmp_path / "x.pt", content))


def test_entries_of_a_pickle_are_not_unpacked(tmp_path):
    path = synthetic.save_pt(tmp_path / "x.pt", {"a": torch.zeros(1000)})
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "is compressed, which torch.save never does" in complaint(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": 0}, "eps is 0; it must be a number above 0"),
        ({"eps": True}, "eps is True"),
        ({"num_heads": True}, "num_heads is True; it must be a whole number"),
        ({"dim": 48.0}, "dim is 48.0; it must be a whole number"),
        ({"text_len": 226}, "text_len is 226; it must be 512"),
        ({"patch_size": [1, 4, 4]}, "patch_size is [1, 4, 4], but the weights have [1, 2, 2]"),
        ({"qk_norm": 1}, "qk_norm is 1; it must be True"),
    ],
)
def test_every_number_of_config_json_is_checked(tmp_path, change, words):
    synthetic.save_safetensors(tmp_path, STEM, synthetic.dit_weights())
    synthetic.write_config(tmp_path, **change)
    assert words in complaint(tmp_path)


@pytest.mark.parametrize("content", ['{"eps": NaN}', '{"eps": 1e999}', '{"dim": 48, "dim": 48}', "[" * 100_000, "[]"])
def test_json_that_is_none(tmp_path, content):
    synthetic.save_safetensors(tmp_path, STEM, synthetic.dit_weights())
    (tmp_path / "config.json").write_text(content)
    assert "config.json: " in complaint(tmp_path)


def test_a_pipelines_index_is_checked(tmp_path):
    for content in ([], {"vae": "AutoencoderKLWan"}, {"vae": [1, 2]}, {"transformer_2": True}):
        (tmp_path / "model_index.json").write_text(json.dumps(content))
        assert "model_index.json: " in complaint(Path(tmp_path))
