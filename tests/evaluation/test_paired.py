"""Paired statistics: numbers of R's and statsmodels' examples, and intervals that cover what they say."""

import math

import numpy as np
import pytest
from scipy import stats

from cfjax.core.errors import UserError
from cfjax.evaluation.clip_identity import Identity
from cfjax.evaluation.clip_score import ClipScore
from cfjax.evaluation.clip_summary import Scored, summary
from cfjax.evaluation.paired import compare, holm, interval, needed_prompts, signed_rank
from cfjax.evaluation.pairing import most_different, pair_clips, values_of

# Wilcoxon's cross- and self-fertilised plants (Darwin 1876), as in SciPy's documentation of `wilcoxon`: p = 0.04126.
DARWIN = np.array([6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75], float)


def test_the_signed_rank_test_by_known_answers():
    p, correlation = signed_rank(DARWIN)
    assert p == pytest.approx(0.041259765625)
    assert correlation == pytest.approx((96 - 24) / 120)  # W- is 24
    assert signed_rank(np.array([0.0, 0.0])) == (1.0, 0.0)
    assert signed_rank(np.append(DARWIN, [0.0, 0.0])) == (p, correlation)
    assert all(map(math.isnan, signed_rank(np.array([]))))


@pytest.mark.parametrize(
    ("effect", "pairs"),
    # statsmodels 0.15: TTestPower().solve_power(effect_size=effect, power=0.8, alpha=0.05)
    [(0.2, 198.15086), (0.5, 33.36713), (0.8, 14.30278)],
)
def test_the_power_line_by_known_answers(effect, pairs):
    assert needed_prompts(1.0 / effect, 1.0) == pytest.approx(pairs, rel=2e-3)


def test_the_power_line_at_its_ends():
    assert needed_prompts(0.0, 0.1) == needed_prompts(1e-9, 0.1) == 2.0
    assert math.isnan(needed_prompts(math.nan, 0.1)) and math.isnan(needed_prompts(1.0, 0.0))
    sizes = [needed_prompts(deviation, 1.0) for deviation in np.geomspace(0.04, 100, 60)]
    assert all(map(math.isfinite, sizes)) and sizes == sorted(sizes)


def test_the_power_line_keeps_its_word():
    """So many pairs, drawn often, are told apart in 80 % of the draws."""
    pairs = math.ceil(needed_prompts(2.0, 1.0))
    draws = np.random.default_rng(0).normal(1.0, 2.0, (4000, pairs))
    assert (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_holm_by_known_answers():
    """R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")."""
    found = holm(dict(zip("abcde", (0.01, 0.02, 0.03, 0.04, 0.05), strict=True)))
    assert list(found.values()) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])


@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_intervals_cover_the_mean(law):
    """Of 300 samples of 40 each; BCa's is a little short on a skewed law of this size."""
    rng = np.random.default_rng(1)
    draws = rng.normal(1.0, 1.0, (300, 40)) if law == "normal" else rng.exponential(1.0, (300, 40))
    bounds = np.array([interval(sample, resamples=499) for sample in draws])
    covered = ((bounds[:, 0] <= 1.0) & (bounds[:, 1] >= 1.0)).mean()
    assert 0.89 <= covered <= 0.985
    assert interval(draws[0]) == interval(draws[0])


def test_intervals_without_a_spread():
    assert interval(np.full(5, 0.25)) == (0.25, 0.25)
    assert all(map(math.isnan, interval(np.array([1.0]))))


def test_a_comparison_of_known_numbers():
    a = np.arange(1.0, 16.0)
    rows = compare({"x": (a, a + DARWIN / 100), "same": (a, a), "gap": (a[:3], [math.nan, 2.0, 3.5])})
    row = rows["x"]
    assert row.prompts == 15 and row.mean_a == 8 and row.difference == pytest.approx(DARWIN.mean() / 100)
    assert row.relative == pytest.approx(DARWIN.mean() / 800) and row.low < row.difference < row.high
    assert row.cohen_d == pytest.approx(DARWIN.mean() / DARWIN.std(ddof=1))
    assert row.p_holm == pytest.approx(3 * row.p)
    assert rows["same"].p == 1.0 and rows["same"].cohen_d == 0.0 and rows["same"].needed == 2.0
    assert rows["gap"].prompts == 2 and rows["gap"].difference == 0.25


# ---- which clips belong together


def side(**clips: tuple[str, int, float]) -> Scored:
    scores = [ClipScore(f"{name}.mp4", values={"flow": value}) for name, (_, _, value) in clips.items()]
    return Scored("videos", "a table", scores, [Identity(prompt, seed) for prompt, seed, _ in clips.values()])


def test_clips_are_paired_by_prompt_and_seed_whatever_their_order():
    a = side(x=("A cat.", 0, 1.0), y=("a dog", 0, 2.0), z=("a fox", 0, 9.0), s=("a cat", 1, 3.0))
    b = side(p=("a dog", 0, 2.5), q=("a_cat", 1, 4.0), r=("a cat", 0, 1.5), t=("an owl", 0, 7.0))
    found = pair_clips(a, b)
    assert [(pair.seed, pair.a[0].file, pair.b[0].file) for pair in found.pairs] == [
        (0, "x.mp4", "r.mp4"), (1, "s.mp4", "q.mp4"), (0, "y.mp4", "p.mp4"),
    ]  # fmt: skip
    assert (found.alone_a, found.alone_b) == (["z.mp4"], ["t.mp4"]) and "prompt and seed" in found.how
    values, unit = values_of(found.pairs)
    assert unit == "prompt" and values == {"flow": ([2.0, 2.0], [2.75, 2.5])}  # the cat's two seeds are one prompt
    assert [pair.seed for pair, _ in most_different(found.pairs, 2)] == [1, 0]


def test_other_seeds_are_paired_by_prompt_and_twins_are_left_over():
    a = side(x=("a cat", 0, 1.0), y=("a cat", 1, 3.0), z=("a dog", 0, 1.0))
    found = pair_clips(a, side(p=("a cat", 7, 5.0), q=("a dog", 7, 6.0)))
    assert "prompt alone" in found.how and values_of(found.pairs)[0]["flow"] == ([2.0, 1.0], [5.0, 6.0])
    found = pair_clips(a, side(p=("a cat", 0, 5.0), q=("a cat", 0, 6.0), r=("a dog", 0, 1.0)))
    assert [pair.prompt for pair in found.pairs] == ["a dog"] and found.alone_b == ["p.mp4", "q.mp4"]


def test_seeds_of_one_prompt_are_the_units_where_there_is_no_other():
    a = side(**{f"c{n}": ("a cat", n, float(n)) for n in range(4)})
    assert values_of(pair_clips(a, a).pairs) == ({"flow": ([0.0, 1.0, 2.0, 3.0],) * 2}, "seed")


def test_folders_of_other_prompts_are_no_comparison():
    with pytest.raises(UserError, match=r"no prompt is in both folders; A has 'a cat'.*manifest\.csv"):
        pair_clips(side(x=("a cat", 0, 1.0)), side(x=("a dog", 0, 1.0)))


def test_a_summary_counts_each_prompt_once():
    found = summary(side(a=("a cat", 0, 1.0), b=("a cat", 1, 3.0), c=("a dog", 0, 5.0)))["flow"]
    assert (found["mean"], found["clips"], found["prompts"]) == (3.5, 3, 2)
