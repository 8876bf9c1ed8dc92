"""What is compared: weights that are made or read when a check asks for them, and named random test inputs."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.models.wan import Wan
from cfjax.nn.visibility import Blocks


@dataclass(frozen=True)
class Case:
    """Weights and sizes of one comparison. Every part is a function, so that it is read, compared and freed in turn.

    Attributes:
      dit, vae, text_encoder: return the module, float32; None when there is none to compare.
      tokenizer: folder of the tokenizer's files, "" for none.
      blocks: the causal layout.
      frames, height, width: of the latents that networks are tried on.
      text_length: text rows.
      seed: of the inputs.
      tolerance: overrides every check's own bound when set.
    """

    dit: Callable[[], Wan] | None
    vae: Callable[[], Any] | None
    text_encoder: Callable[[], Any] | None
    tokenizer: str
    blocks: Blocks
    frames: int
    height: int
    width: int
    text_length: int
    seed: int
    tolerance: float | None = None

    def normal(self, name: str, *shape: int) -> np.ndarray:
        """N(0, 1) float32, a function of the seed and the name alone."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)

    def uniform(self, name: str, *shape: int) -> np.ndarray:
        """U[0, 1) float32, a function of the seed and the name alone."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())]).random(shape, np.float32)

    def bound(self, usual: float) -> float:
        """The tolerance of a check whose own is `usual`."""
        return usual if self.tolerance is None else self.tolerance


def have(part: str, make: Callable[[], Any] | None) -> Any:
    """The part itself.

    Raises:
      UserError: the case has none.
    """
    if make is None:
        raise UserError(f"--only={part}: there is no {part} to compare; give --config.world, or leave {part} out")
    return make()
