"""Strings in, text rows out: tokenizer, encoder and text length kept together, in memory and on disk."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cfjax.core.errors import UserError
from cfjax.core.tree import from_named, named_leaves
from cfjax.models.tokenizer import CaptionTokenizer
from cfjax.models.umt5 import PRESETS, UMT5, UMT5Config, encode_text, make_umt5

TOKENIZER_FILE, CONFIG_FILE, WEIGHTS_FILE = "tokenizer.json", "text_encoder.json", "text_encoder.safetensors"
FORMAT = 1
CHUNK = 32  # captions per compiled call; the last chunk is filled up, so that one shape is compiled

_encode_text = jax.jit(encode_text)
_make_umt5 = jax.jit(make_umt5, static_argnums=0)


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder. `length` is S, the number of text rows of every caption."""

    tokenizer: CaptionTokenizer
    model: UMT5
    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"text length {self.length}: needs at least one row, for EOS")
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens but the text encoder embeds only "
                f"{self.model.config.vocab_size}: they do not belong together"
            )

    @classmethod
    def build(
        cls, captions: Iterable[str], length: int, *, config: UMT5Config | None = None, seed: int = 0
    ) -> "TextEncoder":
        """A word-level tokenizer of `captions` and a random encoder over its vocabulary (default: the toy preset).

        With random weights the rows still tell words apart and mix in some context, which is all that a small
        conditional model needs. `config.vocab_size` is replaced by the tokenizer's.
        """
        tokenizer = CaptionTokenizer.build(captions)
        config = dataclasses.replace(config or PRESETS["toy"], vocab_size=tokenizer.vocab_size)
        return cls(tokenizer, _make_umt5(config, jax.random.key(seed)), length)

    @property
    def width(self) -> int:
        """E, the width of the text rows."""
        return self.model.config.dim

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Text rows, float32 [n, S, E], zero beyond each caption's tokens.

        Raises:
          UserError: a caption has more than `length` tokens.
        """
        ids_BS, mask_BS = self.tokenizer.encode(captions, self.length)
        out = np.zeros((len(captions), self.length, self.width), np.float32)
        for start in range(0, len(captions), CHUNK):
            stop = min(start + CHUNK, len(captions))
            fill = ((0, CHUNK - (stop - start)), (0, 0))
            ids, mask = np.pad(ids_BS[start:stop], fill), np.pad(mask_BS[start:stop], fill)
            rows = _encode_text(self.model, jnp.asarray(ids), jnp.asarray(mask))
            out[start:stop] = np.asarray(rows)[: stop - start]
        return out

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, text_encoder.json (sizes, length) and text_encoder.safetensors into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / TOKENIZER_FILE)
        save_file({k: np.asarray(v) for k, v in named_leaves(self.model).items()}, folder / WEIGHTS_FILE)
        about = {"format": FORMAT, "length": self.length, "config": dataclasses.asdict(self.model.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TextEncoder":
        """Reads what `save` wrote.

        Raises:
          UserError: a file is missing, malformed, or does not fit the others.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise UserError(f"{folder / CONFIG_FILE}: format {about['format']}, this version reads {FORMAT}")
            config, length = UMT5Config(**about["config"]), int(about["length"])
        except OSError as error:
            raise UserError(f"{folder / CONFIG_FILE}: cannot read the text encoder ({error.strerror})") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{folder / CONFIG_FILE}: not a text encoder description ({error!r})") from None
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / WEIGHTS_FILE}: cannot read the text encoder's weights ({error})") from None
        template = jax.eval_shape(lambda: make_umt5(config, jax.random.key(0)))
        model = from_named(template, {name: jnp.asarray(value) for name, value in weights.items()})
        return cls(CaptionTokenizer.load(folder / TOKENIZER_FILE), model, length)
