"""TAEHV in the layout of its releases (taew2_1.pth, taew2_2.pth).

Names are indices in two `nn.Sequential`s, kernels [out, in, h, w].

When it loads a file, the original reduces a `TGrow` kernel that makes more frames than its decoder should to the last
frame's rows (`patch_tgrow_layers`). So does `import_tiny_vae`, by the config; `infer_config_tiny_vae` asks for
fewer frames than the file has only where encoder and decoder would disagree on the frames per latent, from the first
stage on, which is the original's own default. Nothing is removed from the published taew2_1, so its export is exact.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cfjax.conversion.rules import Layout, Rule, export_module, import_module, kernel_bias
from cfjax.core.errors import UserError
from cfjax.models.tiny_vae import BLOCKS, TinyVAE, TinyVAEConfig, abstract_tiny_vae

KERNEL = Layout(load=lambda x, _: x.transpose(2, 3, 1, 0), save=lambda x, _: x.transpose(3, 2, 0, 1))
STAGES = 3
PATCHES = {3: 1, 12: 2}  # sides of a patch of pixels, by the channels that the encoder takes: taew2_1, taew2_2
# Places in the original's encoder and decoder: the first stage's first module, modules per stage.
ENCODER, DECODER = (2, BLOCKS + 2), (3, BLOCKS + 3)


def _grow(stage: int) -> Layout:
    """The last rows of a kernel [frames * C, C, 1, 1], as many as the config grows."""

    def load(x: np.ndarray, config: TinyVAEConfig) -> np.ndarray:
        return KERNEL.load(x[-config.time_grow[stage] * config.decoder_widths[stage] :], config)

    return Layout(load, KERNEL.save)


def _conv(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return kernel_bias(ours, theirs, KERNEL)


def _blocks(ours: str, theirs: str, first: int) -> list[Rule]:
    """A stage's memory blocks; the other modules of their `conv` are ReLUs."""
    convs = (("conv_in", 0), ("conv_mid", 2), ("conv_out", 4))
    names = [(f"{ours}/{j}/{conv}", f"{theirs}.{first + j}.conv.{k}") for j in range(BLOCKS) for conv, k in convs]
    return [rule for name in names for rule in _conv(*name)]


def _stage(i: int) -> list[Rule]:
    """Stage i of encoder and decoder."""
    encoder, decoder = (first + i * modules for first, modules in (ENCODER, DECODER))
    grow = decoder + BLOCKS + 1  # their upsampling between blocks and TGrow has no weights
    return [
        Rule(f"encoder/stages/{i}/shrink/pool/kernel", f"encoder.{encoder}.conv.weight", KERNEL),
        Rule(f"encoder/stages/{i}/shrink/down/kernel", f"encoder.{encoder + 1}.weight", KERNEL),
        *_blocks(f"encoder/stages/{i}/blocks/layers", "encoder", encoder + 2),
        *_blocks(f"decoder/stages/{i}/blocks/layers", "decoder", decoder),
        Rule(f"decoder/stages/{i}/grow/grow/kernel", f"decoder.{grow}.conv.weight", _grow(i)),
        Rule(f"decoder/stages/{i}/grow/up/kernel", f"decoder.{grow + 1}.weight", KERNEL),
    ]


TAEHV = (
    *_conv("encoder/conv_in", "encoder.0"),
    *(rule for i in range(STAGES) for rule in _stage(i)),
    *_conv("encoder/conv_out", f"encoder.{ENCODER[0] + STAGES * ENCODER[1]}"),
    *_conv("decoder/conv_in", "decoder.1"),
    *_conv("decoder/conv_out", f"decoder.{DECODER[0] + STAGES * DECODER[1] + 1}"),
)
LAYOUTS = {"taehv": TAEHV}


def infer_config_tiny_vae(
    shapes: Mapping[str, tuple[int, ...]], layout: str, about: Mapping[str, Any] | None = None
) -> TinyVAEConfig:
    """Sizes from the shapes of a file's arrays; there is no config.json (`about` is None).

    Raises:
      UserError: an unknown layout, an array that gives a size is missing or misshapen, or the file is of a TAEHV with
        another architecture ("super" blocks).
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}: a tiny VAE is in layout {', '.join(LAYOUTS)}")

    def kernel(key: str) -> tuple[int, int]:
        """(out, in) of a convolution."""
        if key not in shapes or len(shapes[key]) != 4:
            raise UserError(
                f"{key}: no convolution of this name; give taew2_1.pth or taew2_2.pth, TAEHV's weights for Wan"
            )
        return shapes[key][0], shapes[key][1]

    width, channels = kernel("encoder.0.weight")
    if channels not in PATCHES:
        raise UserError(f"encoder.0.weight takes {channels} channels, not 3 or 12; give taew2_1.pth or taew2_2.pth")
    latent_channels = kernel("decoder.1.weight")[1]
    pools = [kernel(f"encoder.{ENCODER[0] + i * ENCODER[1]}.conv.weight") for i in range(STAGES)]
    grows = [kernel(f"decoder.{DECODER[0] + i * DECODER[1] + BLOCKS + 1}.conv.weight") for i in range(STAGES)]
    pool = [merged // one for one, merged in pools]
    grow = [made // one for made, one in grows]
    for i in range(STAGES):
        if math.prod(grow) > math.prod(pool):
            grow[i] = 1
    last = kernel(f"decoder.{DECODER[0] + STAGES * DECODER[1] + 1}.weight")[1]
    return TinyVAEConfig(
        latent_channels=latent_channels,
        encoder_width=width,
        decoder_widths=(grows[0][1], grows[1][1], grows[2][1], last),
        time_pool=(pool[0], pool[1], pool[2]),
        time_grow=(grow[0], grow[1], grow[2]),
        patch=PATCHES[channels],
    )


def config_json_tiny_vae(config: TinyVAEConfig, layout: str) -> dict[str, Any] | None:
    """None: the layout has no config.json."""
    return None


def import_tiny_vae(weights: Mapping[str, Any], config: TinyVAEConfig, table: tuple[Rule, ...] = TAEHV) -> TinyVAE:
    """`rules.import_module` of a state dict in TAEHV's layout."""
    return import_module(abstract_tiny_vae(config), table, weights, config)


def export_tiny_vae(model: TinyVAE, table: tuple[Rule, ...] = TAEHV) -> dict[str, np.ndarray]:
    """`rules.export_module`: the state dict that `import_tiny_vae` reads back."""
    return export_module(table, model)
