"""`World`: what stages and verbs ask of the frozen encoders and decoder that all models of a family share.

Not a world model and not a world size: a codec (video autoencoder), a text encoder with its tokenizer and a negative
prompt. A model means nothing with other latents or other text rows than those it was trained on, so runs and datasets
remember the world's fingerprint.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from cfjax.models.codec import Codec
from cfjax.models.text import TextEncoder
from cfjax.models.text_cache import TextCache

RECORD = "world.json"


@dataclass(frozen=True)
class WorldParts:
    """Which parts of a Wan world are read, and how; the toy's is read whole.

    Attributes:
      decoder: "vae" or "tiny_vae".  decoder_precision: dtype of its products, "" as recorded.
      with_text: keep the text encoder in memory; without, it is read when a caption needs it.
      text_cache: folder of text rows that are computed already, "" for none.
    """

    decoder: str = "vae"
    decoder_precision: str = ""
    with_text: bool = True
    text_cache: str = ""


class World(Protocol):
    """Codec, text encoder, negative prompt; read from a folder with a `world.json`."""

    @property
    def codec(self) -> Codec:
        """Encodes clips and decodes latents; its encoder may be another one, see `open_encoder`."""

    @property
    def text_length(self) -> int:
        """S, the text rows of every caption."""

    @property
    def text_width(self) -> int:
        """E, the width of the text rows."""

    @property
    def text_name(self) -> str:
        """The text encoder's kind, as manifests of datasets give it."""

    @property
    def negative_prompt(self) -> str:
        """What classifier-free guidance leads away from."""

    @property
    def folder(self) -> str:
        """The folder it was read from, for messages."""

    def encode_prompts(self, captions: Sequence[str]) -> np.ndarray:
        """Text rows, float32 [n, S, E]."""

    def negative_text_SE(self) -> np.ndarray:
        """Text rows of the negative prompt."""

    def prompt_fault(self, prompt: str) -> str:
        """Why the text encoder cannot take a prompt, with what it can; "" if it can."""

    def load_text(self) -> TextEncoder:
        """The text encoder, read now unless it is in memory."""

    def open_text_cache(self, folder: str | Path) -> TextCache:
        """Text rows of this text encoder in `folder`; its weights are not read."""

    def cache_text(self, captions: Iterable[str], *, progress: bool) -> None:
        """Encodes captions (and the negative prompt) into the world's text cache and frees the encoder's memory.

        Nothing is done, and no caption asked for, where the encoder is small and stays in memory.
        """

    def open_encoder(self) -> Callable[[jax.Array], jax.Array]:
        """video_BPHWC in [-1, 1] to normalised latents_BFHWC; the weights are in memory as long as it is kept."""

    def decoder_record(self) -> dict[str, Any]:
        """What is recorded of the decoder beside generated videos: "name", "precision", "weights" (a hash)."""

    def fingerprint(self) -> str:
        """Equal for two worlds iff models can move between them: 16 hex digits."""
