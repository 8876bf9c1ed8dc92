"""Captions to token ids: umT5's pieces for real weights, plain words for the toy, both on the `tokenizers` library.

Both clean a caption as the reference does (`wan/modules/tokenizers.py`, `HuggingfaceTokenizer._clean`), and both keep
umT5's conventions: pad 0, EOS 1, EOS appended to every caption. A tokenizer is its `tokenizer.json`; umT5's may be
given as `spiece.model` instead.
"""

import hashlib
import html
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ftfy
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.limits import SENTINELS as MOST_SENTINELS
from cfjax.core.limits import TOKENIZER_BYTES
from cfjax.core.paths import path_of
from cfjax.core.schema import checked, load_bytes, load_json, table, whole

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
PAD_ID, EOS_ID = 0, 1
TOKENIZER_FILE, SENTENCEPIECE_FILE, TOKENIZER_CONFIG = "tokenizer.json", "spiece.model", "tokenizer_config.json"
SENTINELS = 300  # of umT5: <extra_id_299> ... <extra_id_0>, behind the pieces of spiece.model
DESCRIPTION = table({}, {"extra_ids": whole(0, MOST_SENTINELS)})
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


def clean(caption: str) -> str:
    """The reference's text cleaning: `ftfy`, HTML unescaped twice, whitespace collapsed and stripped."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


class TextTokenizer(Protocol):
    """What a text encoder needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    def encode(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """`(ids_BS, mask_BS)`: int32 ids with EOS appended and padded with 0 to S = `length`; mask true at real tokens.

        An empty caption is a single EOS.
        """

    def unknown_words(self, caption: str) -> list[str]:
        """The parts of `caption` that `encode` would replace by `<unk>`, in order."""

    def fingerprint(self) -> str:
        """Equal for two tokenizers that are read from the same file; differs where ids do."""

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json to `path`."""


class _Wrapped:
    """A `tokenizers.Tokenizer` with umT5's pad and EOS; what both kinds of tokenizer share."""

    def __init__(self, tokenizer: Tokenizer):
        """Wraps `tokenizer`.

        Raises:
          UserError: ids 0 and 1 are not padding and EOS.
        """
        if (tokenizer.id_to_token(PAD_ID), tokenizer.id_to_token(EOS_ID)) != (PAD, EOS):
            raise UserError(f"tokenizer: ids 0 and 1 must be {PAD} and {EOS}, as in umT5's tokenizer.json")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json to `path`."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def fingerprint(self) -> str:
        """A hash of the tokenizer's content: 64 hex digits."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size()

    def unknown_words(self, caption: str) -> list[str]:
        """The parts of `caption` that `encode` would replace by `<unk>`, in order."""
        unk_id = self._tokenizer.token_to_id(UNK)
        text = clean(caption)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == unk_id]

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of the cleaned captions, EOS appended."""
        encodings = self._tokenizer.encode_batch([clean(c) for c in captions], add_special_tokens=False)
        return [[*encoding.ids, EOS_ID] for encoding in encodings]


def _padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """`(ids_BS, mask_BS)` of rows that fit."""
    ids_BS = np.full((len(rows), length), PAD_ID, np.int32)
    mask_BS = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        ids_BS[row, : len(ids)] = ids
        mask_BS[row, : len(ids)] = True
    return ids_BS, mask_BS


class PieceTokenizer(_Wrapped):
    """umT5's own tokenizer; same ids as transformers' fast tokenizer on the same folder."""

    def encode(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """See `TextTokenizer`. A long caption is truncated, with EOS last (as transformers does)."""
        return _padded(
            [ids if len(ids) <= length else [*ids[: length - 1], EOS_ID] for ids in self._ids(captions)], length
        )


class CaptionTokenizer(_Wrapped):
    """Lowercased words and punctuation marks as tokens; words not seen when it was built become `<unk>`."""

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
        return cls(_read_json(Path(path)))

    def encode(self, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """See `TextTokenizer`.

        Raises:
          UserError: a caption does not fit into `length` tokens.
        """
        rows = self._ids(captions)
        for caption, ids in zip(captions, rows, strict=True):
            if len(ids) > length:
                raise UserError(
                    f"caption {caption!r} has {counted(len(ids), 'token')}, EOS included, but the text length "
                    f"is {length}: shorten it or raise the length"
                )
        return _padded(rows, length)


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer in `folder`: its tokenizer.json, or its spiece.model where that is absent.

    Words (a `WordLevel` model, as the toy's) or pieces (`Unigram`, as umT5's) is what the file says.

    Raises:
      UserError: neither file is there, or it is broken, of another kind, or has other ids for padding and EOS.
    """
    folder = path_of(folder)
    file = folder / TOKENIZER_FILE
    if not file.exists():
        file = folder / SENTENCEPIECE_FILE
        if not file.exists():
            raise UserError(f"{folder}: no tokenizer here, neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}")
    tokenizer = _read_json(file) if file.name == TOKENIZER_FILE else _read_sentencepiece(file)
    try:
        if isinstance(tokenizer.model, models.WordLevel):
            return CaptionTokenizer(tokenizer)
        if isinstance(tokenizer.model, models.Unigram):
            return PieceTokenizer(tokenizer)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    raise UserError(f"{file}: a {type(tokenizer.model).__name__} tokenizer, which is not umT5's (Unigram)")


def _read_json(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(load_bytes(file, TOKENIZER_BYTES).decode())
    except OSError as error:
        raise UserError(f"{file}: cannot read the tokenizer ({error.strerror})") from None
    except BaseException as error:  # the library raises bare Exception on malformed files, or its own "panic"
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise UserError(f"{file}: not a tokenizer.json ({' '.join(str(error).split())})") from None


def _read_sentencepiece(file: Path) -> Tokenizer:
    """spiece.model as the tokenizer.json beside it in umT5's release, with the same ids.

    So there is no byte fallback, whatever the file says; runs of spaces are one space, which is a piece of its own at
    the end of a text and before a special token; those (and T5's sentinels, which the file lacks) are read in a caption
    too. transformers 4 reads it so; its version 5 drops that space when it rebuilds the tokenizer as a T5Tokenizer.

    Raises:
      UserError: the file, or the number of sentinels beside it, cannot be read.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        proto.ParseFromString(load_bytes(file, TOKENIZER_BYTES))
    except OSError as error:
        raise UserError(f"{file}: cannot read the tokenizer ({error.strerror})") from None
    except (DecodeError, ValueError) as error:
        raise UserError(f"{file}: not a SentencePiece model ({error})") from None
    if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise UserError(f"{file}: not a Unigram model, so not umT5's")
    count = _sentinel_count(file.with_name(TOKENIZER_CONFIG))
    try:
        return _unigram(proto, [f"<extra_id_{i}>" for i in reversed(range(count))])
    except Exception as error:  # of a damaged piece: no UTF-8, no such id, a map that is none
        raise UserError(f"{file}: not a SentencePiece model ({' '.join(str(error).split())})") from None


def _unigram(proto: Any, sentinels: Sequence[str]) -> Tokenizer:
    """A SentencePiece model's pieces and rules, and the sentinels behind them."""
    pieces = [*((piece.piece, piece.score) for piece in proto.pieces), *((name, 0.0) for name in sentinels)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.UNKNOWN, piece.CONTROL)]
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in (*special, *sentinels)])
    steps: list[Any] = [normalizers.Replace(Regex(" {2,}"), " ")]
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    return tokenizer


def _sentinel_count(file: Path) -> int:
    """Number of sentinels in tokenizer_config.json; umT5's if that file is absent or does not say."""
    if not file.exists():
        return SENTINELS
    try:
        about = load_json(file)
    except OSError as error:
        raise UserError(f"{file}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file}: not a tokenizer's description ({error})") from None
    return int(checked(DESCRIPTION, about, file).get("extra_ids", SENTINELS))
