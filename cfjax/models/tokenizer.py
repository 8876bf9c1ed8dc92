"""Captions to token ids: a word-level tokenizer built from the captions of a dataset, on the `tokenizers` library.

The file is an ordinary `tokenizer.json` with umT5's conventions (pad 0, EOS 1, EOS appended to every caption), so any
`tokenizer.json` that keeps those two ids, such as umT5's own, can be loaded in its place.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from cfjax.core.errors import UserError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


def clean(caption: str) -> str:
    """The reference's text cleaning without its mojibake repair: HTML unescaped twice, whitespace collapsed."""
    return " ".join(html.unescape(html.unescape(caption)).split())


class CaptionTokenizer:
    """Lowercased words and punctuation marks as tokens; words not seen when it was built become `<unk>`."""

    def __init__(self, tokenizer: Tokenizer):
        """Wraps a `tokenizers.Tokenizer`; use `build` or `load`.

        Raises:
          UserError: ids 0 and 1 are not padding and EOS.
        """
        if (tokenizer.id_to_token(PAD_ID), tokenizer.id_to_token(EOS_ID)) != (PAD, EOS):
            raise UserError(f"tokenizer: ids 0 and 1 must be {PAD} and {EOS}, as in umT5's tokenizer.json")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def build(cls, captions: Iterable[str]) -> "CaptionTokenizer":
        """A tokenizer whose words are those of `captions`, with ids in alphabetical order from 3."""
        normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        words = {
            word
            for caption in captions
            for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean(caption)))
        }
        vocab = {token: i for i, token in enumerate([PAD, EOS, UNK, *sorted(words)])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = splitter
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "CaptionTokenizer":
        """Reads a tokenizer.json.

        Raises:
          UserError: the file is missing or is not a tokenizer.
        """
        try:
            tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
        except Exception as error:  # the library raises bare Exception on malformed files
            raise UserError(f"{path}: not a tokenizer.json ({error})") from None
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json to `path`."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size()

    def unknown_words(self, caption: str) -> list[str]:
        """The words of `caption` that `encode` would replace by `<unk>`, in order."""
        unk_id = self._tokenizer.token_to_id(UNK)
        text = clean(caption)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == unk_id]

    def encode(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """`(ids_BS, mask_BS)`: int32 ids with EOS appended and padded with 0 to S = `length`; mask true at real tokens.

        An empty caption is a single EOS.

        Raises:
          UserError: a caption does not fit into `length` tokens.
        """
        ids_BS = np.full((len(captions), length), PAD_ID, np.int32)
        mask_BS = np.zeros((len(captions), length), bool)
        encodings = self._tokenizer.encode_batch([clean(c) for c in captions], add_special_tokens=False)
        for row, (caption, encoding) in enumerate(zip(captions, encodings, strict=True)):
            ids = [*encoding.ids, EOS_ID]
            if len(ids) > length:
                raise UserError(
                    f"caption {caption!r} has {len(ids)} tokens, EOS included, but the text length is {length}: "
                    "shorten it or raise the length"
                )
            ids_BS[row, : len(ids)] = ids
            mask_BS[row, : len(ids)] = True
        return ids_BS, mask_BS
