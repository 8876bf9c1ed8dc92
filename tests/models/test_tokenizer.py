"""The caption tokenizer: umT5's conventions, stable ids, clear errors."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from cfjax.core.errors import UserError
from cfjax.models.tokenizer import CaptionTokenizer

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
