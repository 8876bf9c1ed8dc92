"""The subject of a comparison: weights that are made or read on demand, and named random test inputs."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np

from cfjax.comparison.report import MissingPart
from cfjax.core.errors import UserError
from cfjax.core.precision import F32
from cfjax.core.tree import map_named
from cfjax.models import umt5, vae, wan
from cfjax.models.clip import CLIPConfig, CLIPVision, make_clip
from cfjax.models.experts import MASK
from cfjax.models.umt5 import UMT5
from cfjax.models.vae import WanVAE
from cfjax.models.wan import Wan
from cfjax.nn.visibility import Blocks

Module = TypeVar("Module")
WIDTHS = ("toy", "full", "ti2v_toy", "ti2v", "i2v_toy", "i2v")


@dataclass(frozen=True)
class Case:
    """Weights and sizes of one comparison. Parts are functions, so that one at a time is loaded, compared and freed.

    Attributes:
      dit, vae, text_encoder, image_encoder: return the module, float32; None when there is none to compare.
      tokenizer: folder of the tokenizer's files, "" for none.
      blocks: the causal layout.
      frames, height, width: of the latents that networks are tried on.
      text_length: text rows.
      steps: of the many-step sampler.
      seed: of the inputs.
      tolerance: overrides every check's own bound when set.
    """

    dit: Callable[[], Wan] | None
    vae: Callable[[], WanVAE] | None
    text_encoder: Callable[[], UMT5] | None
    tokenizer: str
    blocks: Blocks
    frames: int
    height: int
    width: int
    text_length: int
    steps: int
    seed: int
    tolerance: float | None = None
    image_encoder: Callable[[], CLIPVision] | None = None

    def normal(self, name: str, *shape: int) -> np.ndarray:
        """N(0, 1) float32, a function of the seed and the name alone."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)

    def uniform(self, name: str, *shape: int) -> np.ndarray:
        """U[0, 1) float32, a function of the seed and the name alone."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())]).random(shape, np.float32)

    def bound(self, usual: float) -> float:
        """The tolerance of a check whose default is `usual`."""
        return usual if self.tolerance is None else self.tolerance


def have(part: str, make: Callable[[], Any] | None) -> Any:
    """The part itself.

    Raises:
      MissingPart: the case has none.
    """
    if make is None:
        raise MissingPart(f"there is no {part} to compare")
    return make()


def random_weights(module: Module, seed: int) -> Module:
    """Every parameter random: biases and scales are moved off 0 and 1, and no kernel is left at zero (Wan's head)."""

    def leaf(name: str, x: jax.Array) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        noise, value = rng.standard_normal(x.shape, np.float32), np.asarray(x, np.float32)
        if name.endswith(("bias", "scale")):
            return value + np.float32(0.1) * noise
        return value if value.any() else noise * np.float32(x.shape[-2] ** -0.5)

    return jax.tree.map(jax.numpy.asarray, map_named(leaf, module))


def random_parts(width: str, seed: int) -> dict[str, Any]:
    """`Case`'s parts with random weights, and the latents' "channels".

    Args:
      width: "toy" sizes, or the "full" ones of the 1.3B release; "ti2v_toy" and "ti2v" are Wan2.2-TI2V-5B's,
        "i2v_toy" and "i2v" those of Wan2.1-I2V-14B and its CLIP.

    Raises:
      UserError: another width.
    """
    if width not in WIDTHS:
        raise UserError(f"width={width!r}: use {' or '.join(WIDTHS)}")
    toy, new, pictures = width.endswith("toy"), width.startswith("ti2v"), width.startswith("i2v")
    key = jax.random.key(seed)
    text = umt5.PRESETS["toy" if toy else "umt5_xxl"]
    full = "wan_2_2_5b" if new else "wan_i2v_14b" if pictures else "wan_1_3b"
    dit = replace(wan.PRESETS["toy" if toy else full], text_dim=text.dim, remat="none", precision=F32)
    codec = vae.PRESETS["wan_2_2" if new else "wan"]
    if toy:
        codec = replace(codec, base_dim=8, decoder_base_dim=12 if new else 0)
        dit = replace(dit, in_dim=codec.z_dim, out_dim=codec.z_dim)
    eyes = CLIPConfig(dim=64, ffn_dim=96, heads=4, layers=3, image_size=28) if toy else CLIPConfig()
    if pictures:
        dit = replace(dit, in_dim=2 * dit.out_dim + MASK, image_dim=eyes.dim)
    clip = lambda: random_weights(jax.jit(make_clip, static_argnums=0)(eyes, key), seed)
    return {
        "channels": dit.out_dim,
        **({"image_encoder": clip} if pictures else {}),
        "dit": lambda: random_weights(wan.make_wan(dit, key), seed),
        "vae": lambda: random_weights(vae.make_vae(codec, key), seed),
        "text_encoder": lambda: random_weights(jax.jit(umt5.make_umt5, static_argnums=0)(text, key), seed),
    }
