"""Text encoding: tokenizer, encoder and text length together, in memory and on disk."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cfjax.core.errors import UserError
from cfjax.core.limits import TEXT_ROWS
from cfjax.core.precision import F32, Policy
from cfjax.core.schema import checked, load_json, one_of, table, whole
from cfjax.core.tensor_files import save_tensors
from cfjax.core.tree import from_named, named_leaves
from cfjax.models.tokenizer import TOKENIZER_FILE, CaptionTokenizer, TextTokenizer, load_tokenizer
from cfjax.models.umt5 import PRESETS, UMT5, UMT5_RULE, UMT5Config, encode_by_layer, make_umt5

CONFIG_FILE, WEIGHTS_FILE = "text_encoder.json", "text_encoder.safetensors"
FORMAT = 1
ABOUT = table({"format": one_of(FORMAT), "length": whole(1, TEXT_ROWS), "config": UMT5_RULE})
SHORTEST = 64  # rows are computed in a power of two of at least this many: a caption of 80 tokens costs 128, not 512
# Leaves that a fingerprint reads: small, and different for two trainings.
FINGERPRINT_LEAVES = (
    "final_norm/scale",
    "layers/attention_norm/scale",
    "layers/ffn_norm/scale",
    "layers/position_bias",
)

_make_umt5 = jax.jit(make_umt5, static_argnums=0)


def weights_fingerprint(named: Mapping[str, Any]) -> str:
    """A hash of an encoder's small leaves (norms and position biases), by value: 64 hex digits.

    Args:
      named: leaves by name, at least `FINGERPRINT_LEAVES`; the dtype they are stored in does not count.
    """
    digest = hashlib.sha256()
    for name in FINGERPRINT_LEAVES:
        digest.update(np.ascontiguousarray(np.asarray(named[name]).astype(np.float32)).tobytes())
    return digest.hexdigest()


def text_fingerprint(weights: str, config: UMT5Config, tokenizer: TextTokenizer, policy: Policy = F32) -> str:
    """A hash of everything but the caption and the text length that text rows depend on: 16 hex digits.

    Args:
      weights: fingerprint of the weights; a converted encoder's record has it, so that they need not be read.
    """
    about = [weights, dataclasses.asdict(config), tokenizer.fingerprint(), policy.to_record()]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TextEncoder:
    """A frozen text encoder. `length` is S, the number of text rows of every caption.

    Weights keep their dtype; products are in `policy.compute`, everything else in `policy.norm`. `weights` is the
    recorded fingerprint of the weights, "" if there is none: it is then computed.
    """

    tokenizer: TextTokenizer
    model: UMT5
    length: int
    policy: Policy = F32
    weights: str = ""

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

        With random weights the rows still distinguish words and mix in some context, which is all that a small
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
          UserError: a caption has more than `length` tokens and the tokenizer does not truncate it.
        """
        ids_BS, mask_BS = self.tokenizer.encode(captions, self.length)
        out = np.zeros((len(captions), self.length, self.width), np.float32)
        for row, tokens in enumerate(mask_BS.sum(axis=1)):
            # One at a time: reading the weights is what an encoder of umT5's size waits for, and so no caption's rows
            # depend on its neighbours. Nor do they depend on the padding behind them, so short captions run short.
            rows = min(max(SHORTEST, 1 << (int(tokens) - 1).bit_length()), self.length)
            ids, mask = (jnp.asarray(a[row : row + 1, :rows]) for a in (ids_BS, mask_BS))
            out[row, :rows] = np.asarray(encode_by_layer(self.model, ids, mask, self.policy))[0]
        return out

    def fingerprint(self) -> str:
        """Equal for two encoders that give the same rows; reads no large weight."""
        weights = self.weights or weights_fingerprint(named_leaves(self.model))
        return text_fingerprint(weights, self.model.config, self.tokenizer, self.policy)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, text_encoder.json (sizes, length) and text_encoder.safetensors into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / TOKENIZER_FILE)
        save_tensors(folder / WEIGHTS_FILE, named_leaves(self.model))
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
            about = checked(ABOUT, load_json(folder / CONFIG_FILE), "what it says")
        except OSError as error:
            raise UserError(f"{folder / CONFIG_FILE}: cannot read the text encoder ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{folder / CONFIG_FILE}: not a text encoder description ({error})") from None
        config, length = UMT5Config(**about["config"]), about["length"]
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / WEIGHTS_FILE}: cannot read the text encoder's weights ({error})") from None
        template = jax.eval_shape(lambda: make_umt5(config, jax.random.key(0)))
        try:
            model = from_named(template, {name: jnp.asarray(value) for name, value in weights.items()})
        except UserError as error:
            raise UserError(f"{folder / WEIGHTS_FILE}: {error}") from None
        return cls(load_tokenizer(folder), model, length)
