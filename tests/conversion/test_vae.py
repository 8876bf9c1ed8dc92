"""The Wan VAE's tables: the published files' names and shapes, exact both ways, and nothing passes unnoticed."""

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from cfjax.conversion.kinds import recognised
from cfjax.conversion.rules import load_named, save_named
from cfjax.conversion.vae import (
    DIFFUSERS,
    LAYOUTS,
    LAYOUTS_2_2,
    ORIGINAL,
    config_json_vae,
    export_vae,
    import_vae,
    infer_config_vae,
)
from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.models.vae import LATENTS_MEAN_48, LATENTS_STD_48, PRESETS, VAEConfig, abstract_vae
from tests.synthetic import vae_2_2_shapes, vae_shapes

CONFIG = VAEConfig(base_dim=2)


def theirs(layout: str, base_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the other side has them."""
    if layout == "original":
        return vae_shapes(base_dim, 16)
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in AutoencoderKLWan(base_dim=base_dim).state_dict().items()}


def drawn(layout: str, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in theirs(layout, CONFIG.base_dim).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_published_file_fits(layout):
    """194 arrays, 126,892,531 numbers; a view of one zero stands for each."""
    shapes = theirs(layout, 96)
    assert len(shapes) == 194
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 126_892_531
    config = infer_config_vae(shapes, layout)
    assert config == PRESETS["wan"]
    template = named_leaves(abstract_vae(config))
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    loaded = load_named(LAYOUTS[layout], zeros, template, config)
    assert {name: x.shape for name, x in loaded.items()} == {name: x.shape for name, x in template.items()}
    ours = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in template.items()}
    assert {name: x.shape for name, x in save_named(LAYOUTS[layout], ours, config).items()} == shapes


@pytest.mark.parametrize("layout, dtype", [(name, np.float32) for name in LAYOUTS] + [("original", ml_dtypes.bfloat16)])
def test_there_and_back_is_exact(layout, dtype):
    weights = drawn(layout, dtype)
    again = export_vae(import_vae(weights, CONFIG, LAYOUTS[layout]), LAYOUTS[layout])
    assert again.keys() == weights.keys()
    for name, array in weights.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)


def test_from_the_original_to_diffusers():
    """diffusers takes what we write of an original file, and its own converter makes the same arrays of that file."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights = drawn("original")
    written = export_vae(import_vae(weights, CONFIG, ORIGINAL), DIFFUSERS)
    model = AutoencoderKLWan.from_config(config_json_vae(CONFIG, "diffusers"))
    model.load_state_dict({name: torch.from_numpy(x) for name, x in written.items()}, strict=True)
    converted = convert_wan_vae_to_diffusers({name: torch.from_numpy(x) for name, x in weights.items()})
    assert converted.keys() == written.keys()
    for name, array in converted.items():
        np.testing.assert_array_equal(written[name], array.numpy())


def test_the_config_goes_round():
    config = VAEConfig(base_dim=2, latents_mean=(0.5,) * 16, latents_std=(2.0,) * 16)
    about = config_json_vae(config, "diffusers")
    assert infer_config_vae(theirs("diffusers", 2), "diffusers", about) == config
    registered = AutoencoderKLWan.from_config(about).config
    assert {key: registered[key] for key in about if key != "_class_name"} == {
        key: value for key, value in about.items() if key != "_class_name"
    }
    assert config_json_vae(config, "original") is None


def test_another_architecture_is_reported():
    shapes = theirs("diffusers", 2)
    about = config_json_vae(CONFIG, "diffusers")
    with pytest.raises(UserError, match=r"is_residual is True; .* has False"):
        infer_config_vae(shapes, "diffusers", {**about, "is_residual": True})
    with pytest.raises(UserError, match=r"base_dim is 96; .* has 2"):
        infer_config_vae(shapes, "diffusers", {**about, "base_dim": 96})
    with pytest.raises(UserError, match="_class_name is 'AutoencoderKL'"):
        infer_config_vae(shapes, "diffusers", {**about, "_class_name": "AutoencoderKL"})
    with pytest.raises(UserError, match="takes 12 channels, not 3"):
        infer_config_vae({**shapes, "encoder.conv_in.weight": (160, 12, 3, 3, 3)}, "diffusers")
    with pytest.raises(UserError, match=r"encoder.conv1.weight: no such 3-D convolution"):
        infer_config_vae(shapes, "original")
    with pytest.raises(UserError, match="layout 'taehv': a VAE is in layout original or diffusers"):
        infer_config_vae(shapes, "taehv")


def test_nothing_passes_unnoticed():
    weights = drawn("original")
    with pytest.raises(UserError, match=r"missing \['conv2.bias'\]"):
        import_vae({k: v for k, v in weights.items() if k != "conv2.bias"}, CONFIG)
    with pytest.raises(UserError, match=r"left over \['decoder.upsamples.15.shortcut.bias'\]"):
        import_vae({**weights, "decoder.upsamples.15.shortcut.bias": weights["conv2.bias"]}, CONFIG)
    for name, shape in (
        ("decoder.head.0.gamma", (2,)),
        ("encoder.middle.1.to_qkv.weight", (24, 8)),
        ("decoder.upsamples.3.resample.1.weight", (4, 8, 1, 3, 3)),
    ):
        with pytest.raises(UserError, match=rf"{name} has shape \({shape[0]},"):
            import_vae({**weights, name: np.zeros(shape, np.float32)}, CONFIG)


def theirs_2_2(layout: str, base_dim: int, decoder_base_dim: int) -> dict[str, tuple[int, ...]]:
    if layout == "original":
        return vae_2_2_shapes(base_dim, decoder_base_dim, 48)
    config = VAEConfig(
        base_dim, decoder_base_dim, 48, residual=True, patch=2, latents_mean=LATENTS_MEAN_48, latents_std=LATENTS_STD_48
    )
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(config_json_vae(config, "diffusers"))
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS_2_2)
def test_the_published_file_of_wan_2_2_fits(layout):
    """Its sizes from the shapes alone; all of its names and shapes, both ways, and no other table's."""
    shapes = theirs_2_2(layout, 160, 256)
    config = infer_config_vae(shapes, layout)
    assert config == PRESETS["wan_2_2"]
    assert recognised(shapes) == ("vae", layout)
    template = named_leaves(abstract_vae(config))
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    loaded = load_named(LAYOUTS_2_2[layout], zeros, template, config)
    assert {name: x.shape for name, x in loaded.items()} == {name: x.shape for name, x in template.items()}
    ours = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in template.items()}
    assert {name: x.shape for name, x in save_named(LAYOUTS_2_2[layout], ours, config).items()} == shapes


def test_wan_2_2_from_the_original_to_diffusers_and_back():
    """Exact; `test_vae_2_2.py` loads what is written for diffusers into its class."""
    rng = np.random.default_rng(0)
    shapes = theirs_2_2("original", 2, 4)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    config = infer_config_vae(shapes, "original")
    model = import_vae(weights, config, LAYOUTS_2_2["original"])
    written = export_vae(model, LAYOUTS_2_2["diffusers"])
    assert infer_config_vae({k: x.shape for k, x in written.items()}, "diffusers", config_json_vae(config, "diffusers"))
    again = export_vae(import_vae(written, config, LAYOUTS_2_2["diffusers"]), LAYOUTS_2_2["original"])
    assert again.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(again[name], array)
