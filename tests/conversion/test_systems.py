"""Whole systems, from every layout to every other, bit for bit; diffusers and transformers load what is written."""

import contextlib
import io

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from cfjax.conversion.files import read_weights
from cfjax.conversion.sources import open_source
from cfjax.conversion.targets import write_target
from cfjax.conversion.wan import abstract_wan
from cfjax.core.errors import UserError
from cfjax.core.tree import from_named
from cfjax.models.wan import embed_text
from tests import synthetic

torch.set_num_threads(1)
MB = 1e6


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return synthetic.write_wan_folder(tmp_path_factory.mktemp("systems") / "Wan2.1-T2V-1.3B")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return synthetic.write_diffusers_folder(tmp_path_factory.mktemp("systems") / "Wan2.1-T2V-1.3B-Diffusers")


def written(kind, source, folder, **options):
    write_target(kind, source, folder, **{"shift": 5.0, "max_bytes": 0.5 * MB, **options})
    return folder


def same_files(one, two, names):
    """The arrays of each pair of weight files are equal bit for bit, names, dtypes and order of axes included."""
    for a, b in names:
        first, second = read_weights(one / a).entries, read_weights(two / b).entries
        assert first.keys() == second.keys()
        for key, arrays in first.items():
            assert arrays.keys() == second[key].keys()
            for name, x in arrays.items():
                y = second[key][name]
                assert (x.shape, x.dtype) == (y.shape, y.dtype)
                assert x.read().tobytes() == y.read().tobytes(), name


STEM, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
T5, VAE = "models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"


def test_a_release_and_back(release, tmp_path):
    source = open_source(release)
    assert [each.role for each in source.found] == ["student", "vae", "text_encoder"]
    out = written("safetensors", source, tmp_path / "safetensors")
    names = [(INDEX, STEM), (f"{T5}.pth", f"{T5}.safetensors"), (f"{VAE}.pth", f"{VAE}.safetensors.index.json")]
    same_files(release, out, names)
    assert (out / "google/umt5-xxl/spiece.model").read_bytes() == (
        release / "google/umt5-xxl/spiece.model"
    ).read_bytes()
    again = written("pt", open_source(out), tmp_path / "pt")
    same_files(release, again, [(f"{T5}.pth", f"{T5}.pth"), (f"{VAE}.pth", f"{VAE}.pth")])
    state = torch.load(again / "model.pt", weights_only=True)
    assert list(state) == ["generator"]
    for name, array in synthetic.dit_weights().items():
        np.testing.assert_array_equal(state["generator"][f"model.{name}"].numpy(), array)
    assert torch.load(again / f"{T5}.pth", weights_only=True)["norm.weight"].dtype == torch.bfloat16


def test_a_release_through_a_pipeline_and_back(release, tmp_path):
    there = written("diffusers", open_source(release), tmp_path / "there")
    back = written("safetensors", open_source(there), tmp_path / "back", max_bytes=1e9)
    same_files(release, back, [(INDEX, STEM), (f"{T5}.pth", f"{T5}.safetensors"), (f"{VAE}.pth", f"{VAE}.safetensors")])


def test_a_pipeline_and_back(pipeline, tmp_path):
    out = written("diffusers", open_source(pipeline), tmp_path / "out")
    one, many = "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors.index.json"
    text = "text_encoder/model.safetensors"
    same_files(pipeline, out, [(f"transformer/{STEM}", f"transformer/{STEM}"), (one, many), (text, text)])
    through = written(
        "diffusers", open_source(written("pt", open_source(pipeline), tmp_path / "pt")), tmp_path / "again"
    )
    same_files(pipeline, through, [(f"transformer/{STEM}", f"transformer/{STEM}"), (one, many), (text, text)])


def test_a_tiny_decoder_and_back(tmp_path):
    path = synthetic.write_taehv(tmp_path / "taew2_1.pth")
    out = written("pt", open_source(path), tmp_path / "pt")
    same_files(tmp_path, out, [("taew2_1.pth", "taew2_1.pth")])
    out = written("safetensors", open_source(path), tmp_path / "safetensors")
    same_files(tmp_path, out, [("taew2_1.pth", "taew2_1.safetensors")])
    with pytest.raises(UserError, match="tiny_vae has no diffusers layout"):
        written("diffusers", open_source(path), tmp_path / "diffusers")


@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module."])
def test_a_training_checkpoint_and_back(tmp_path, prefix):
    synthetic.write_config(tmp_path)
    keys = ("generator", "critic", "generator_ema")
    path = synthetic.write_causal_forcing_pt(tmp_path / "trained.pt", keys, prefix)
    out = written("pt", open_source(path), tmp_path / "out")
    same_files(tmp_path, out, [("trained.pt", "model.pt")])
    assert all(name.startswith("model.") for name in torch.load(out / "model.pt", weights_only=True)["critic"])
    with pytest.raises(UserError, match="choose one by"):
        written("diffusers", open_source(path), tmp_path / "diffusers")
    one = written("safetensors", open_source(path, key="critic"), tmp_path / "one")
    read = read_weights(one / STEM).entries[""]
    np.testing.assert_array_equal(read["head.head.bias"].read(), synthetic.dit_weights(11)["head.head.bias"])


@pytest.fixture
def plain_diffusers(monkeypatch):
    """Their transformer keeps some modules in float32, for which it wants `accelerate`; here all is float32."""
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        yield


def loaded(cls, folder, **options):
    """A model by its own library, strictly."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def outputs(folder):
    """What the three networks of a pipeline's folder make of fixed inputs, by diffusers and transformers."""
    random = lambda *shape: torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
    text_encoder = loaded(UMT5EncoderModel, folder / "text_encoder")
    tokens = AutoTokenizer.from_pretrained(folder / "tokenizer")("a red circle", return_tensors="pt")
    transformer = loaded(WanTransformer3DModel, folder / "transformer")
    vae = loaded(AutoencoderKLWan, folder / "vae")
    with torch.no_grad():
        text = text_encoder(**tokens).last_hidden_state
        flow = transformer(random(1, 16, 3, 4, 4), torch.tensor([500.0]), random(1, 5, 32), return_dict=False)[0]
        video = vae.decode(random(1, 16, 2, 2, 2), return_dict=False)[0]
    assert text.dtype == torch.bfloat16
    return {"text": text.float().numpy(), "flow": flow.numpy(), "video": video.numpy()}


@pytest.mark.filterwarnings("ignore")  # of the libraries, about their own deprecations
def test_their_libraries_load_what_we_write(pipeline, tmp_path, plain_diffusers):
    out = written("diffusers", open_source(pipeline), tmp_path / "out", shift=7.0)
    expected, found = outputs(pipeline), outputs(out)
    whole = WanPipeline.from_pretrained(out, torch_dtype=torch.float32)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert isinstance(whole.scheduler, UniPCMultistepScheduler)
    assert (whole.scheduler.config.flow_shift, whole.scheduler.config.prediction_type) == (7.0, "flow_prediction")
    assert whole.vae.config.z_dim == 16 and whole.tokenizer is not None


@pytest.mark.filterwarnings("ignore")
def test_a_release_means_the_same_to_diffusers_and_to_us(release, tmp_path, plain_diffusers):
    """The original layout's meaning: diffusers runs the converted folder, we run the release."""
    source = open_source(release, parts=["dit"])
    folder = written("diffusers", source, tmp_path / "out", max_bytes=1e9)
    theirs = loaded(WanTransformer3DModel, folder / "transformer")
    network = source.found[0].network
    model = from_named(
        abstract_wan(network.config), {name: jnp.asarray(x.read()) for name, x in network.arrays.items()}
    )
    rng = np.random.default_rng(1)
    latents, text = rng.standard_normal((1, 2, 4, 4, 16), np.float32), rng.standard_normal((1, 5, 32), np.float32)
    with torch.no_grad():
        channels_first = torch.from_numpy(latents.transpose(0, 4, 1, 2, 3))
        flow = theirs(channels_first, torch.tensor([500.0]), torch.from_numpy(text), return_dict=False)[0].numpy()
    ours = model(jnp.asarray(latents), jnp.full((1, 2), 0.5), embed_text(model, jnp.asarray(text)))
    error = np.abs(np.asarray(ours) - flow.transpose(0, 2, 3, 4, 1)).max() / np.abs(flow).max()
    print(f"release against diffusers: {error:.1e}")
    assert error < 1e-5
