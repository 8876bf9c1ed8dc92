"""umT5's tables: the published file's names and sizes, bits kept both ways, and transformers reads what we write."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import UMT5Config as TorchConfig
from transformers import UMT5EncoderModel

from cfjax.conversion.rules import import_plan
from cfjax.conversion.umt5 import (
    DIFFUSERS,
    EMBEDDING,
    ORIGINAL,
    TIED,
    abstract_umt5,
    config_json_umt5,
    export_umt5,
    import_umt5,
    infer_config_umt5,
    untied_umt5,
)
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.tree import named_leaves
from cfjax.models.umt5 import PRESETS, UMT5Config, encode_by_layer
from tests.synthetic import t5_shapes, t5_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "umt5_original.npz"
SMALL = UMT5Config(vocab_size=64, dim=32, heads=4, head_dim=8, ffn_dim=64, layers=2)
WEIGHTS = t5_weights(SMALL.vocab_size)


def shapes_of(weights):
    return {name: x.shape for name, x in weights.items()}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def theirs():
    """transformers' own encoder with the miniature's sizes, in bfloat16."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2}
    return UMT5EncoderModel(TorchConfig(**sizes)).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def their_folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_encoder")
    theirs.save_pretrained(folder)
    return folder


def test_the_published_file():
    """242 arrays, 5,680,910,336 numbers; nothing is allocated."""
    shapes = t5_shapes(256384, 4096, 4096, 10240, 64, 24)
    assert len(shapes) == 242
    config = infer_config_umt5(shapes, "original")
    assert config == PRESETS["umt5_xxl"]
    dtype = np.dtype(ml_dtypes.bfloat16)
    arrays = {name: LazyArray(shape, dtype, ()) for name, shape in shapes.items()}
    plan = import_plan(ORIGINAL, arrays, named_leaves(abstract_umt5(config)), config)
    assert sum(x.size for x in plan.values()) == 5_680_910_336
    assert {x.dtype for x in plan.values()} == {dtype}


def test_equals_the_original_encoder():
    """Rows recorded from the original release's own module; see golden/record_umt5.py."""
    golden = np.load(GOLDEN)
    model = jax.tree.map(jnp.asarray, import_umt5(WEIGHTS, infer_config_umt5(shapes_of(WEIGHTS), "original")))
    rows_BSE = np.asarray(encode_by_layer(model, golden["ids_BS"], golden["mask_BS"]))[:, ::9]
    error = np.abs(rows_BSE - golden["text_BSE"]).max() / np.abs(golden["text_BSE"]).max()
    print(f"umT5, original release against ours: max relative error {error:.1e}")
    assert error < 5e-6


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_every_bit_comes_back(layout, their_folder):
    if layout == "original":
        weights, table, config = WEIGHTS, ORIGINAL, infer_config_umt5(shapes_of(WEIGHTS), "original")
    else:
        weights, table = load_file(their_folder / "model.safetensors"), DIFFUSERS
        about = json.loads((their_folder / "config.json").read_text())
        config = infer_config_umt5(shapes_of(weights), "diffusers", about)
    assert config == SMALL
    model = import_umt5(weights, config, table)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(ml_dtypes.bfloat16)}
    again = export_umt5(model, table)
    assert again.keys() == weights.keys()
    assert all(same_bits(again[name], x) for name, x in weights.items())


def test_transformers_reads_what_we_write(theirs, their_folder, tmp_path):
    weights = load_file(their_folder / "model.safetensors")
    written = export_umt5(import_umt5(weights, SMALL, DIFFUSERS), DIFFUSERS)
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    about = config_json_umt5(SMALL, "diffusers")
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert infer_config_umt5(shapes_of(written), "diffusers", about) == SMALL
    model, info = UMT5EncoderModel.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.bfloat16)
    assert not any(info.values()), info
    for name, value in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert config_json_umt5(SMALL, "original") is None


def test_an_embedding_under_two_names():
    """Older files hold it twice, or under its second name only; both must say the same."""
    once = export_umt5(import_umt5(WEIGHTS, SMALL), DIFFUSERS)
    twice, second = {**once, TIED: once[EMBEDDING].copy()}, {TIED if k == EMBEDDING else k: v for k, v in once.items()}
    about = config_json_umt5(SMALL, "diffusers")
    for weights in (twice, second):
        assert infer_config_umt5(shapes_of(weights), "diffusers", about) == SMALL
        again = export_umt5(import_umt5(weights, SMALL, DIFFUSERS), DIFFUSERS)
        assert again.keys() == once.keys() and all(same_bits(again[name], x) for name, x in once.items())
    twice[TIED][3, 3] += 1
    with pytest.raises(UserError, match="must be the same table"):
        untied_umt5(twice)
    assert untied_umt5(WEIGHTS) == WEIGHTS


def test_files_that_do_not_fit():
    config = config_json_umt5(SMALL, "diffusers")
    weights = export_umt5(import_umt5(WEIGHTS, SMALL), DIFFUSERS)
    shapes = shapes_of(weights)
    with pytest.raises(UserError, match="layout 'taehv'"):
        infer_config_umt5(shapes, "taehv")
    with pytest.raises(UserError, match=r"token_embedding\.weight is missing"):
        infer_config_umt5(shapes, "original")
    assert infer_config_umt5(shapes, "diffusers", None) == SMALL  # as ComfyUI's files are: umT5's own constants
    for key, value in {"d_ff": 65, "model_type": "t5", "num_layers": 3, "feed_forward_proj": "relu"}.items():
        with pytest.raises(UserError, match=rf"{key} is '?{value}"):
            infer_config_umt5(shapes, "diffusers", {**config, key: value})
    with pytest.raises(UserError, match="layer_norm_epsilon is missing"):
        infer_config_umt5(shapes, "diffusers", {k: v for k, v in config.items() if k != "layer_norm_epsilon"})
    short = {name: x for name, x in WEIGHTS.items() if name != "blocks.1.attn.q.weight"}
    with pytest.raises(UserError, match=r"missing \['blocks\.1\.attn\.q\.weight'\]"):
        import_umt5(short, SMALL)
    with pytest.raises(UserError, match="left over"):
        import_umt5({**WEIGHTS, "head.weight": WEIGHTS["norm.weight"]}, SMALL)
