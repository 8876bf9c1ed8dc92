"""Tokenizers: umT5's conventions, ids equal to transformers' on the same folder, stable ids for words, clear errors."""

import html
import re

import ftfy
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cfjax.core.errors import UserError
from cfjax.models.tokenizer import CaptionTokenizer, PieceTokenizer, clean, load_tokenizer
from tests.tiny_tokenizer import EXTRA_IDS, spiece_model, vocab_size, write_tokenizer

CAPTIONS = ["A red circle moves left.", "a blue square moves up"]


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer.build(CAPTIONS)


def test_ids_are_padded_and_end_with_eos(tokenizer):
    ids_BS, mask_BS = tokenizer.encode(["a red square", ""], 6)
    # . a blue circle left moves red square up = 3..11
    np.testing.assert_array_equal(ids_BS, [[4, 9, 10, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask_BS, [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    assert ids_BS.dtype == np.int32 and mask_BS.dtype == bool
    assert tokenizer.vocab_size == 12


def test_case_whitespace_and_html_do_not_matter(tokenizer):
    plain, _ = tokenizer.encode(["a red circle moves left."], 8)
    messy, _ = tokenizer.encode(["  A  RED\ncircle&amp;nbsp;moves left . "], 8)
    np.testing.assert_array_equal(plain, messy)


def test_ids_do_not_depend_on_the_order_of_captions(tokenizer):
    other = CaptionTokenizer.build(reversed(CAPTIONS * 2))
    np.testing.assert_array_equal(other.encode(CAPTIONS, 8)[0], tokenizer.encode(CAPTIONS, 8)[0])


def test_unseen_words_become_unk_and_can_be_listed(tokenizer):
    ids_BS, _ = tokenizer.encode(["a purple circle"], 4)
    np.testing.assert_array_equal(ids_BS, [[4, 2, 6, 1]])
    assert tokenizer.unknown_words("a Purple circle, left") == ["Purple", ","]


def test_no_captions_is_an_empty_batch(tokenizer):
    ids_BS, mask_BS = tokenizer.encode([], 4)
    assert ids_BS.shape == mask_BS.shape == (0, 4)


def test_a_caption_that_does_not_fit_is_named(tokenizer):
    tokenizer.encode(["a red circle"], 4)
    with pytest.raises(UserError, match=r"'a red circle' has 4 tokens.*length is 3"):
        tokenizer.encode(["red", "a red circle"], 3)


def test_round_trip_through_a_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(again.encode(CAPTIONS, 8)[0], tokenizer.encode(CAPTIONS, 8)[0])
    assert again.unknown_words("a whale") == ["whale"]


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot read"):
        CaptionTokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer"):
        CaptionTokenizer.load(tmp_path / "broken.json")
    Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).save(str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="ids 0 and 1 must be"):
        CaptionTokenizer.load(tmp_path / "other.json")


LENGTH = 48
SPECIAL = ("</s> <unk> <s>a<pad>b </s>", "x <extra_id_0> y", "<0x41> \u2581x \u2581\u2581")
NASTY = (
    "A red circle moves to the right.",
    "",
    " \t\n ",
    "  two\u00a0 spaces\u3000and\r\nlines\u2028here ",
    "sch\u00c3\u00b6n \u00e2\u20ac\u0153quoted\u00e2\u20ac\x9d, it\u00e2\u20ac\u2122s mojibake",
    "&amp;lt;b&amp;gt;50&amp;#37;&lt;/b&gt; &amp;amp;amp; &nbsp;x &quot;y&quot;",
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001\uff0c\u7ec6\u8282\u6a21\u7cca\u4e0d\u6e05",
    "\u4e00\u53ea\u732b \u5728 \u8349\u5730\u4e0a",
    "a cat \U0001f408\U0001f680\U0001f680 \U0001f9ea flies",
    "\U00010437\U00010437 \ufb01ne e\u0301 \u2460 \u00b4 \u00a8x \uff21\uff22",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a \ud55c\uad6d\uc5b4",
    "<0x41> x",
    "control\x00\x07\x1b[31m chars \ufffd \ufeff",
    "UPPER lower MiXeD 0123 --- !!!",
    *SPECIAL,
    "very long " * 400,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "google" / "umt5-xxl")


@pytest.fixture(scope="module")
def folder_without_json(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece")
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        (path / name).write_bytes((folder / name).read_bytes())
    return path


def reference_clean(text):
    """The steps of the reference's `HuggingfaceTokenizer._clean` (`wan/modules/tokenizers.py`)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def reference(tokenizer, captions):
    """The reference's call of transformers (`wan/modules/tokenizers.py`, `HuggingfaceTokenizer.__call__`)."""
    cleaned = [reference_clean(text) for text in captions]
    out = tokenizer(cleaned, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    return out.input_ids, out.attention_mask


@pytest.mark.parametrize("text", NASTY)
def test_cleaning(text):
    assert clean(text) == reference_clean(text)


def test_cleaning_by_hand():
    assert clean(NASTY[4]) == 'sch\u00f6n "quoted", it\'s mojibake'
    assert clean(NASTY[5]) == '<b>50%</b> & x "y"'
    assert clean(NASTY[6])[:7] == "\u8272\u8c03\u8273\u4e3d,\u8fc7\u66dd"  # full-width commas become plain ones


def test_pieces_equal_transformers(folder):
    ours = load_tokenizer(folder)
    assert isinstance(ours, PieceTokenizer) and ours.vocab_size == vocab_size()
    ids_BS, mask_BS = ours.encode(NASTY, LENGTH)
    expected_ids, expected_mask = reference(PreTrainedTokenizerFast.from_pretrained(folder), NASTY)
    np.testing.assert_array_equal(ids_BS, expected_ids)
    np.testing.assert_array_equal(mask_BS, expected_mask)
    assert ids_BS.dtype == np.int32 and mask_BS.dtype == bool
    assert ids_BS[1].tolist() == [1] + [0] * (LENGTH - 1)
    assert mask_BS[-1].all() and ids_BS[-1, -1] == 1 and (ids_BS[-1, :-1] > 3).all()
    assert (ids_BS == 3).any(), "no unknown piece was tried"


def test_sentencepiece_file_alone_gives_the_same_ids(folder, folder_without_json):
    ours = load_tokenizer(folder_without_json)
    assert ours.vocab_size == vocab_size()
    for given, expected in zip(ours.encode(NASTY, LENGTH), load_tokenizer(folder).encode(NASTY, LENGTH), strict=True):
        np.testing.assert_array_equal(given, expected)
    # transformers 5 builds a T5Tokenizer from the same file, with <unk> at T5's id 2 whatever the file says and without
    # the space before a special token.
    ids_BS, mask_BS = ours.encode(NASTY, LENGTH)
    known = [i for i, row in enumerate(ids_BS) if 3 not in row and NASTY[i] not in SPECIAL]
    assert len(known) > 8
    expected_ids, expected_mask = reference(AutoTokenizer.from_pretrained(folder_without_json), NASTY)
    np.testing.assert_array_equal(ids_BS[known], expected_ids[known])
    np.testing.assert_array_equal(mask_BS[known], expected_mask[known])


def test_special_tokens_in_a_caption(folder, folder_without_json):
    """The ids by their names: the space before a special token stays a piece, the one behind it is that word's own."""
    names = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for one in (load_tokenizer(folder), load_tokenizer(folder_without_json)):
        for text, expected in (
            ("the </s>", "\u2581the \u2581 </s> </s>"),
            ("the</s>the", "\u2581the </s> \u2581the </s>"),
            ("the  <pad>  the", "\u2581the \u2581 <pad> \u2581the </s>"),
            ("<extra_id_0> the <extra_id_3>", "<extra_id_0> \u2581the \u2581 <extra_id_3> </s>"),
            ("\u2581the \u2581 the", "\u2581the \u2581 \u2581 \u2581the </s>"),
            ("the\u00a0the\u3000\tthe ", "\u2581the \u2581the \u2581the </s>"),
        ):
            ids_BS, mask_BS = one.encode([text], LENGTH)
            assert [names.id_to_token(i) for i in ids_BS[0, mask_BS[0]]] == expected.split(" "), text


def test_any_mixture_gives_the_same_ids(folder, folder_without_json):
    """From both files, and from transformers' fast tokenizer on the first."""
    rng = np.random.default_rng(0)
    parts = (
        "the", " ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\u0085", "\ufeff", "\x00", "\x07",
        "\u2581", "</s>", "<pad>", "<s>", "<unk>", "<extra_id_0>", "<extra_id_3>", "<extra_id_9>", "[eod]", "[web]",
        "<0x41>", "</S>", "&lt;/s&gt;", "caf\u00e9", "e\u0301", "\u732b", "\uff21", "\ufb01", "\U0001f680", ".", "'",
    )  # fmt: skip
    texts = ["".join(rng.choice(parts, size=rng.integers(1, 9))) for _ in range(2000)]
    expected, _ = reference(PreTrainedTokenizerFast.from_pretrained(folder), texts)
    for place in (folder, folder_without_json):
        np.testing.assert_array_equal(load_tokenizer(place).encode(texts, LENGTH)[0], expected)


def test_sentinels_default_to_umt5s_number(folder, tmp_path):
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    alone = load_tokenizer(tmp_path)
    assert alone.vocab_size == vocab_size() - EXTRA_IDS + 300
    ids_BS, _ = alone.encode(["<extra_id_299> <extra_id_0>"], 4)
    assert ids_BS[0, 0] == vocab_size() - EXTRA_IDS and ids_BS[0, 2] == alone.vocab_size - 1
    config = tmp_path / "tokenizer_config.json"
    for text, message in (
        ("{", "not a tokenizer's description"),
        ("[]", ".*must be an object"),
        ('{"extra_ids": -1}', "extra_ids is -1; it must be a whole number from 0"),
        ('{"extra_ids": "4"}', "extra_ids is '4'; it must be a whole number"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: {message}"):
            load_tokenizer(tmp_path)
    config.write_text("{}")
    assert load_tokenizer(tmp_path).vocab_size == alone.vocab_size


def test_a_model_that_normalises_does(tmp_path):
    """umT5's does not; T5's own does."""
    (tmp_path / "spiece.model").write_bytes(spiece_model("nmt_nfkc"))
    tokenizer = load_tokenizer(tmp_path)
    ids_BS, _ = tokenizer.encode(["\u2460 caf\u00e9", "1 cafe\u0301"], 16)
    np.testing.assert_array_equal(ids_BS[0], ids_BS[1])


def test_what_the_pieces_do_not_know(folder):
    assert load_tokenizer(folder).unknown_words("a cat \U0001f408\U0001f680 flies \u00b4") == [
        "\U0001f408\U0001f680",
        "\u00b4",
    ]


def test_fingerprints_and_saving(folder, folder_without_json, tokenizer, tmp_path):
    for one in (load_tokenizer(folder), load_tokenizer(folder_without_json), tokenizer):
        one.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path)
        assert type(again) is type(one) and again.vocab_size == one.vocab_size
        np.testing.assert_array_equal(again.encode(CAPTIONS, 64)[0], one.encode(CAPTIONS, 64)[0])
    assert load_tokenizer(folder).fingerprint() == load_tokenizer(folder).fingerprint()
    assert tokenizer.fingerprint() == load_tokenizer(tmp_path).fingerprint()
    assert tokenizer.fingerprint() != CaptionTokenizer.build(["other words"]).fingerprint()


def test_folders_that_hold_no_umt5_tokenizer(folder, tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor spiece\.model"):
        load_tokenizer(tmp_path)
    model = tmp_path / "spiece.model"
    for content in (b"", b"not a model", (folder / "spiece.model").read_bytes()[:1000]):
        model.write_bytes(content)
        with pytest.raises(UserError, match=r"spiece\.model: not a (SentencePiece|Unigram) model"):
            load_tokenizer(tmp_path)
    for other, message in (
        (models.BPE({"<pad>": 0, "</s>": 1}, []), "a BPE tokenizer"),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), r"tokenizer\.json: tokenizer: ids 0 and 1 must be"),
    ):
        Tokenizer(other).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
