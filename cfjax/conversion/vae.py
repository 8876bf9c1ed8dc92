"""Wan's video autoencoders in the layouts of the releases (Wan2.1_VAE.pth, Wan2.2_VAE.pth) and of diffusers.

Both are PyTorch: convolutions [out, in, time, height, width], 1x1 ones among them that are linear maps here, and norm
scales [C, 1, 1, 1], or [C, 1, 1] in the attention. The original numbers a half's blocks and resamplings through;
diffusers does so in the encoder and nests them by level in the decoder. Of Wan2.2's codec both nest all by level.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from cfjax.conversion.rules import SAME, TRANSPOSED, Layout, Rule, export_module, import_module, kernel_bias
from cfjax.core.errors import UserError
from cfjax.core.schema import Rule as Allowed
from cfjax.core.schema import checked, number, several, shown, table
from cfjax.models.vae import PRESETS, VAEConfig, WanVAE, abstract_vae

PUBLISHED, PUBLISHED_2_2 = PRESETS["wan"], PRESETS["wan_2_2"]
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


def _original(stage: str, theirs: str) -> tuple[Rule, ...]:
    """All of it, given what a block or a resampling is called."""
    return (
        *_conv(f"{_HALF}/conv_in", r"\1.conv1"),
        *_original_residual(stage, theirs),
        *kernel_bias(f"{stage}/shortcut", f"{theirs}.shortcut", LINEAR_3D),
        *_resample(stage, theirs),
        *_original_residual(f"{_HALF}/middle/([02])", r"\1.middle.\2"),
        *_attention(f"{_HALF}/middle/1", r"\1.middle.1"),
        *_norm_conv(f"{_HALF}/head", r"\1.head.0", r"\1.head.2"),
        *kernel_bias("moments", "conv1", LINEAR_3D),
        *kernel_bias("unmix", "conv2", LINEAR_3D),
    )


ORIGINAL = _original(_STAGE, _THEIR_STAGE)
ORIGINAL_2_2 = _original(rf"{_STAGE}/stages/(\d+)", rf"{_THEIR_STAGE}.\2samples.\4")


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


_DIFFUSERS_ENDS = (
    *_conv(f"{_HALF}/conv_in", r"\1.conv_in"),
    *_diffusers_residual(f"{_HALF}/middle/0", r"\1.mid_block.resnets.0"),
    *_attention(f"{_HALF}/middle/1", r"\1.mid_block.attentions.0"),
    *_diffusers_residual(f"{_HALF}/middle/2", r"\1.mid_block.resnets.1"),
    *_norm_conv(f"{_HALF}/head", r"\1.norm_out", r"\1.conv_out"),
    *kernel_bias("moments", "quant_conv", LINEAR_3D),
    *kernel_bias("unmix", "post_quant_conv", LINEAR_3D),
)

DIFFUSERS = (
    *_diffusers_residual(r"encoder/down/(\d+)", r"encoder.down_blocks.\1"),
    *kernel_bias(r"encoder/down/(\d+)/shortcut", r"encoder.down_blocks.\1.conv_shortcut", LINEAR_3D),
    *_resample(r"encoder/down/(\d+)", r"encoder.down_blocks.\1"),
    *(rule for level in range(4) for rule in _diffusers_level(level)),
    *_DIFFUSERS_ENDS,
)
_BLOCK, _THEIR_BLOCK = rf"{_STAGE}/stages/(\d+)", r"\1.\2_blocks.\3.resnets.\4"
DIFFUSERS_2_2 = (
    *_resample(r"encoder/down/(\d+)/stages/2", r"encoder.down_blocks.\1.downsampler"),
    *_resample(r"decoder/up/(\d+)/stages/3", r"decoder.up_blocks.\1.upsampler"),
    *_diffusers_residual(_BLOCK, _THEIR_BLOCK),
    *kernel_bias(f"{_BLOCK}/shortcut", f"{_THEIR_BLOCK}.conv_shortcut", LINEAR_3D),
    *_DIFFUSERS_ENDS,
)

LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}
LAYOUTS_2_2 = {"original": ORIGINAL_2_2, "diffusers": DIFFUSERS_2_2}
# The arrays whose first axis is the base width and the number of latent channels; and the decoder's last one.
_SIZES = {
    "original": ("encoder.conv1.weight", "conv2.weight", "decoder.head.2.weight"),
    "diffusers": ("encoder.conv_in.weight", "post_quant_conv.weight", "decoder.conv_out.weight"),
}
# What Wan2.2's names begin with, and Wan2.1's do not.
_NESTED = {"original": "encoder.downsamples.0.downsamples.", "diffusers": "encoder.down_blocks.0.resnets."}


def layouts_vae(config: VAEConfig) -> Mapping[str, tuple[Rule, ...]]:
    """The tables of this codec by layout."""
    return LAYOUTS_2_2 if config.residual else LAYOUTS


def infer_config_vae(
    shapes: Mapping[str, tuple[int, ...]], layout: str, about: Mapping[str, Any] | None = None
) -> VAEConfig:
    """Sizes from the shapes of a file's arrays, and from diffusers' config.json what shapes do not show.

    Args:
      shapes: their names and shapes.
      layout: "original" or "diffusers".
      about: the parsed config.json, None where there is none (the originals have none).

    Raises:
      UserError: an unknown layout, an array that gives a size is missing, or the file is of another architecture than
        Wan2.1's and Wan2.2's.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}: a VAE is in layout {' or '.join(LAYOUTS)}")
    for name in _SIZES[layout]:
        if name not in shapes or len(shapes[name]) != 5:
            raise UserError(f"{name}: no such 3-D convolution among the VAE's weights; give Wan's ({layout} layout)")
    first, latent, last = (shapes[name] for name in _SIZES[layout])
    residual = any(name.startswith(_NESTED[layout]) for name in shapes)
    version, patch = ("2.2", PUBLISHED_2_2.patch) if residual else ("2.1", 1)
    if first[1] != 3 * patch**2:
        raise UserError(f"{_SIZES[layout][0]} takes {first[1]} channels, not {3 * patch**2}; give Wan{version}'s VAE")
    published = PUBLISHED_2_2 if residual else PUBLISHED
    config = partial(
        VAEConfig,
        base_dim=first[0],
        decoder_base_dim=last[1] if last[1] != first[0] else 0,
        z_dim=latent[0],
        residual=residual,
        patch=patch,
    )
    if about is None:
        return config(latents_mean=published.latents_mean, latents_std=published.latents_std)
    if about.get("_class_name") != CLASS_NAME:
        raise UserError(f"VAE's config.json: _class_name is {about.get('_class_name')!r}, not {CLASS_NAME!r}")
    checked(table({}, latents_rules(latent[0])), about, "VAE's config.json")
    means, stds = (about.get(name, getattr(published, name)) for name in ("latents_mean", "latents_std"))
    whole = config(latents_mean=tuple(means), latents_std=tuple(stds))
    for key, needed in _config_json(whole).items():
        allowed = (needed, first[0]) if key == "decoder_base_dim" and needed is None else (needed,)
        # by their printed forms, as 1 == 1.0 == True
        if key != "dropout" and repr(about.get(key, needed)) not in map(repr, allowed):
            raise UserError(
                f"VAE's config.json: {key} is {shown(about[key])}; Wan{version}'s, with these weights, has {needed}"
            )
    return whole


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
    """diffusers' fields."""
    return {
        "attn_scales": [],
        "base_dim": config.base_dim,
        "decoder_base_dim": config.decoder_base_dim or None,
        "dim_mult": list(config.multipliers),
        "dropout": 0.0,
        "in_channels": 3 * config.patch**2,
        "is_residual": config.residual,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.res_blocks,
        "out_channels": 3 * config.patch**2,
        "patch_size": config.patch if config.patch > 1 else None,
        "scale_factor_spatial": config.stride[1],
        "scale_factor_temporal": config.stride[0],
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def import_vae(weights: Mapping[str, Any], config: VAEConfig, table: tuple[Rule, ...] = ORIGINAL) -> WanVAE:
    """`rules.import_module` of a state dict in one of `layouts_vae`."""
    return import_module(abstract_vae(config), table, weights, config)


def export_vae(vae: WanVAE, table: tuple[Rule, ...] = ORIGINAL) -> dict[str, np.ndarray]:
    """`rules.export_module`: the state dict that `import_vae` reads back."""
    return export_module(table, vae)
