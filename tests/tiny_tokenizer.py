"""A miniature of the folder `google/umt5-xxl` in a Wan release: the same four files and conventions, few pieces.

Ids as in umT5: <pad> 0, </s> 1, <s> 2, <unk> 3, names of parts ([eod] ...), 256 byte pieces, text pieces, then
<extra_id_*> in reverse, which only tokenizer.json knows. As in the release, nothing is normalised but runs of spaces,
and spiece.model falls back to bytes while tokenizer.json (what transformers' fast tokenizer, and so the PyTorch
reference, reads) has <unk> for a character it does not know.
"""

import functools
import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import T5Converter

EXTRA_IDS = 4
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
# Covers ASCII letters, digits and punctuation, some accents and some Chinese.
SENTENCES = (
    "A red circle moves to the right over fresh snow, then it stops.",
    "a cat walks on the grass while the sun is setting behind the mountains",
    'The quick brown fox jumps over the lazy dog; "why not?" said the dog\'s friend (aged 4).',
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG: 0123456789 & more! #1 -- <b>50%</b>",
    "a stylish woman walks down a street filled with warm glowing neon and animated city signs",
    "Un café très léger à Besançon, où l'été s'achève; Straßenfest in Köln, mañana",
    "一只猫在草地上跑。一个女人走在城市的街道上，静态，细节模糊不清，字幕，最差质量，低质量",  # noqa: RUF001
)


def extra_tokens() -> list[str]:
    """The sentinels, ascending; their ids descend."""
    return [f"<extra_id_{i}>" for i in range(EXTRA_IDS)]


@functools.cache
def spiece_model(normalization: str = "identity") -> bytes:
    """The trained Unigram model; deterministic."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=out, model_type="unigram", vocab_size=390 - EXTRA_IDS,
        hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        user_defined_symbols=["[eod]", "[web]"], remove_extra_whitespaces=False,
        normalization_rule_name=normalization, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


@functools.cache
def vocab_size() -> int:
    """Number of ids, sentinels included; what the encoder must at least embed."""
    return sentencepiece.SentencePieceProcessor(model_proto=spiece_model()).get_piece_size() + EXTRA_IDS


def write_tokenizer(folder: str | Path) -> Path:
    """Writes spiece.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece_model())
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model())
    slow = SimpleNamespace(
        vocab_file=str(folder / "spiece.model"), _extra_ids=EXTRA_IDS, convert_tokens_to_ids=processor.piece_to_id
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*byte fallback", category=UserWarning)
        tokenizer = T5Converter(slow).converted()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra_tokens(), **SPECIAL)
    record = json.loads(fast.backend_tokenizer.to_str())
    # As the release, which an older library wrote, has them.
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    record["normalizer"] = {"type": "Sequence", "normalizers": [spaces]}
    record["added_tokens"] = [token for token in record["added_tokens"] if token["special"]]
    record["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    (folder / "tokenizer.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    added = [*SPECIAL.values(), *extra_tokens()]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    ids = sorted((fast.convert_tokens_to_ids(token), token) for token in added)
    config = {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in ids},
        "additional_special_tokens": extra_tokens(), "clean_up_tokenization_spaces": True, "extra_ids": EXTRA_IDS,
        "model_max_length": 1000000000000000019884624838656, "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer", **SPECIAL,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    special = {**SPECIAL, "additional_special_tokens": extra_tokens()}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    return folder
