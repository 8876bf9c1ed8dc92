"""Wan2.1's video autoencoder in the layouts of the original release (Wan2.1_VAE.pth) and of diffusers.

Both are PyTorch: convolutions [out, in, time, height, width], 1x1 ones among them that are linear maps here, and norm
scales [C, 1, 1, 1], or [C, 1, 1] in the attention. The original numbers a half's blocks and resamplings through;
diffusers does so in the encoder and nests them by level in the decoder.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cfjax.conversion.rules import SAME, TRANSPOSED, Layout, Rule, export_module, import_module, kernel_bias
from cfjax.core.errors import UserError
from cfjax.core.schema import Rule as Allowed
from cfjax.core.schema import checked, number, several, shown, table
from cfjax.models.vae import VAEConfig, WanVAE, abstract_vae

PUBLISHED = VAEConfig()
CLASS_NAME = "AutoencoderKLWan"

KERNEL = Layout(load=lambda x, _: np.moveaxis(x, (0, 1), (-1, -2)), save=lambda x, _: np.moveaxis(x, (-1, -2), (0, 1)))


def _padded(axes: int, layout: Layout) -> Layout:
    """Like `layout`, with `axes` trailing axes of size one on their side."""

    def load(x: np.ndarray, config: Any) -> np.ndarray:
        if x.shape[x.ndim - axes :] != (1,) * axes:
            raise ValueError(f"{x.shape} does not end in {axes} axes of size one")
        return layout.load(x.reshape(x.shape[: x.ndim - axes]), config)

    def save(x: np.ndarray, config: Any) -> np.ndarray:
        y = layout.save(x, config)
        return y.reshape(*y.shape, *(1,) * axes)

    return Layout(load, save)


LINEAR_3D, LINEAR_2D = _padded(3, TRANSPOSED), _padded(2, TRANSPOSED)
SCALE_3D, SCALE_2D = _padded(3, SAME), _padded(2, SAME)


def _conv(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return kernel_bias(ours, theirs, KERNEL)


def _norm_conv(ours: str, norm: str, conv: str) -> tuple[Rule, ...]:
    return Rule(f"{ours}/norm/scale", f"{norm}.gamma", SCALE_3D), *_conv(f"{ours}/conv", conv)


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/norm/scale", f"{theirs}.norm.gamma", SCALE_2D),
        *kernel_bias(f"{ours}/qkv", f"{theirs}.to_qkv", LINEAR_2D),
        *kernel_bias(f"{ours}/out", f"{theirs}.proj", LINEAR_2D),
    )


def _original_residual(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Places in their `nn.Sequential`; the others are SiLUs and a dropout."""
    first = _norm_conv(f"{ours}/first", f"{theirs}.residual.0", f"{theirs}.residual.2")
    return first + _norm_conv(f"{ours}/second", f"{theirs}.residual.3", f"{theirs}.residual.6")


def _diffusers_residual(ours: str, theirs: str) -> tuple[Rule, ...]:
    first = _norm_conv(f"{ours}/first", f"{theirs}.norm1", f"{theirs}.conv1")
    return first + _norm_conv(f"{ours}/second", f"{theirs}.norm2", f"{theirs}.conv2")


def _resample(ours: str, theirs: str) -> tuple[Rule, ...]:
    return _conv(f"{ours}/conv", f"{theirs}.resample.1") + _conv(f"{ours}/time_conv", f"{theirs}.time_conv")


_HALF, _STAGE = "(encoder|decoder)", r"(encoder|decoder)/(down|up)/(\d+)"
_THEIR_STAGE = r"\1.\2samples.\3"

ORIGINAL = (
    *_conv(f"{_HALF}/conv_in", r"\1.conv1"),
    *_original_residual(_STAGE, _THEIR_STAGE),
    *kernel_bias(f"{_STAGE}/shortcut", f"{_THEIR_STAGE}.shortcut", LINEAR_3D),
    *_resample(_STAGE, _THEIR_STAGE),
    *_original_residual(f"{_HALF}/middle/([02])", r"\1.middle.\2"),
    *_attention(f"{_HALF}/middle/1", r"\1.middle.1"),
    *_norm_conv(f"{_HALF}/head", r"\1.head.0", r"\1.head.2"),
    *kernel_bias("moments", "conv1", LINEAR_3D),
    *kernel_bias("unmix", "conv2", LINEAR_3D),
)


def _diffusers_level(level: int) -> tuple[Rule, ...]:
    """One level of the decoder: residual blocks, then (but for the last) an upsampling, twice one of time too."""
    per_level = PUBLISHED.res_blocks + 2
    theirs, first = f"decoder.up_blocks.{level}", level * per_level
    rules: tuple[Rule, ...] = ()
    for i in range(per_level - 1):
        rules += _diffusers_residual(f"decoder/up/{first + i}", f"{theirs}.resnets.{i}")
    if level == 1:  # levels have 4, 4, 2 and 1 times the base width, and each upsampling halves it
        rules += kernel_bias(f"decoder/up/{first}/shortcut", f"{theirs}.resnets.0.conv_shortcut", LINEAR_3D)
    if level < 3:
        resample = _resample(f"decoder/up/{first + per_level - 1}", f"{theirs}.upsamplers.0")
        rules += resample if PUBLISHED.temporal_downsample[::-1][level] else resample[:2]
    return rules


DIFFUSERS = (
    *_conv(f"{_HALF}/conv_in", r"\1.conv_in"),
    *_diffusers_residual(r"encoder/down/(\d+)", r"encoder.down_blocks.\1"),
    *kernel_bias(r"encoder/down/(\d+)/shortcut", r"encoder.down_blocks.\1.conv_shortcut", LINEAR_3D),
    *_resample(r"encoder/down/(\d+)", r"encoder.down_blocks.\1"),
    *(rule for level in range(4) for rule in _diffusers_level(level)),
    *_diffusers_residual(f"{_HALF}/middle/0", r"\1.mid_block.resnets.0"),
    *_attention(f"{_HALF}/middle/1", r"\1.mid_block.attentions.0"),
    *_diffusers_residual(f"{_HALF}/middle/2", r"\1.mid_block.resnets.1"),
    *_norm_conv(f"{_HALF}/head", r"\1.norm_out", r"\1.conv_out"),
    *kernel_bias("moments", "quant_conv", LINEAR_3D),
    *kernel_bias("unmix", "post_quant_conv", LINEAR_3D),
)

LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}
# The arrays whose first axis is the base width and the number of latent channels.
_SIZES = {
    "original": ("encoder.conv1.weight", "conv2.weight"),
    "diffusers": ("encoder.conv_in.weight", "post_quant_conv.weight"),
}


def infer_config_vae(
    shapes: Mapping[str, tuple[int, ...]], layout: str, about: Mapping[str, Any] | None = None
) -> VAEConfig:
    """Sizes from the shapes of a file's arrays, and from diffusers' config.json what shapes do not show.

    Args:
      shapes: their names and shapes.
      layout: "original" or "diffusers".
      about: the parsed config.json, None where there is none (the original has none).

    Raises:
      UserError: an unknown layout, an array that gives a size is missing, or the file is of another architecture than
        Wan2.1's (Wan2.2's 16x autoencoder, for one).
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}: a VAE is in layout {' or '.join(LAYOUTS)}")
    for name in _SIZES[layout]:
        if name not in shapes or len(shapes[name]) != 5:
            raise UserError(f"{name}: no such 3-D convolution among the VAE's weights; give Wan2.1's ({layout} layout)")
    base_dim, z_dim = (shapes[name][0] for name in _SIZES[layout])
    if shapes[_SIZES[layout][0]][1] != 3:
        raise UserError(f"{_SIZES[layout][0]} takes {shapes[_SIZES[layout][0]][1]} channels, not 3; give Wan2.1's VAE")
    if about is None:
        return VAEConfig(base_dim=base_dim, z_dim=z_dim)
    if about.get("_class_name") != CLASS_NAME:
        raise UserError(f"VAE's config.json: _class_name is {about.get('_class_name')!r}, not {CLASS_NAME!r}")
    checked(table({}, latents_rules(z_dim)), about, "VAE's config.json")
    config = VAEConfig(
        base_dim=base_dim,
        z_dim=z_dim,
        latents_mean=tuple(about.get("latents_mean", PUBLISHED.latents_mean)),
        latents_std=tuple(about.get("latents_std", PUBLISHED.latents_std)),
    )
    for key, needed in _config_json(config).items():
        allowed = (None, base_dim) if key == "decoder_base_dim" else (needed,)
        # by their printed forms, as 1 == 1.0 == True
        if key != "dropout" and repr(about.get(key, needed)) not in map(repr, allowed):
            raise UserError(
                f"VAE's config.json: {key} is {shown(about[key])}; Wan2.1's, with these weights, has {needed}"
            )
    return config


def latents_rules(z_dim: int) -> dict[str, Allowed]:
    """What the mean and standard deviation of each latent channel may be."""
    return {
        "latents_mean": several(number(-1000, 1000), z_dim, z_dim),
        "latents_std": several(number(0, 1000, above=True), z_dim, z_dim),
    }


def config_json_vae(config: VAEConfig, layout: str) -> dict[str, Any] | None:
    """config.json of `AutoencoderKLWan`; None in the original layout, which has none."""
    return {"_class_name": CLASS_NAME, **_config_json(config)} if layout == "diffusers" else None


def _config_json(config: VAEConfig) -> dict[str, Any]:
    """diffusers' fields; those of later autoencoders (residual levels, patches) say that this one has none of it."""
    return {
        "attn_scales": [],
        "base_dim": config.base_dim,
        "decoder_base_dim": None,
        "dim_mult": list(config.multipliers),
        "dropout": 0.0,
        "in_channels": 3,
        "is_residual": False,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.res_blocks,
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_spatial": config.stride[1],
        "scale_factor_temporal": config.stride[0],
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def import_vae(weights: Mapping[str, Any], config: VAEConfig, table: tuple[Rule, ...] = ORIGINAL) -> WanVAE:
    """`rules.import_module` of a state dict in the layout `ORIGINAL` or `DIFFUSERS`."""
    return import_module(abstract_vae(config), table, weights, config)


def export_vae(vae: WanVAE, table: tuple[Rule, ...] = ORIGINAL) -> dict[str, np.ndarray]:
    """`rules.export_module`: the state dict that `import_vae` reads back."""
    return export_module(table, vae)
