"""A damaged file of any kind gives an error line, or is read as what it could have meant; nothing else happens.

More cases: `python benchmarks/robustness.py`, which also tries single ones again (`--kind`, `--seed`).
"""

import json
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest

from tests.properties.child import GOOD, STATM, Child, Outcome
from tests.properties.kinds import KINDS, OUTCOMES, alike, same
from tests.properties.mutations import VALUES, mutated, retyped, safetensors


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    out = Child()
    yield out
    out.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_reported_or_right(child, kind):
    """The first seeds of the benchmark's: the same files whatever else changes."""
    for seed in range(3 if KINDS[kind].slow else 12):
        outcome = child.outcome(kind, seed)
        assert outcome.name in GOOD, f"--kind={kind!r} --seed={seed}: {outcome.name}: {outcome.detail}"


# ---- the instruments themselves


def test_the_outcomes_of_a_reader_are_distinguished(child, monkeypatch):
    """A reader of each fault, in the process that judges them; then it works again."""
    monkeypatch.setattr(child, "seconds", 0.5)
    known = [name for name in OUTCOMES if name != "over memory" or STATM.exists()]
    assert [child.outcome(f"reader: {name}", 0).name for name in known] == known
    assert child.outcome("reader: right", 1) == Outcome("right")


def test_a_seed_is_a_mutation():
    data = json.dumps({"a": [1, 2.5, {"b": "c"}], "d": None}).encode()
    for how in (retyped, KINDS["part"].damage):
        made = {seed: mutated(data, seed, how) for seed in range(200)}
        assert made == {seed: mutated(data, seed, how) for seed in range(200)}
        assert len(set(made.values())) > 60 and sum(value != data for value in made.values()) > 180
    assert all(retyped(b"1", Random(seed)).decode() in VALUES for seed in range(20))
    header = b'{"a":{"dtype":"F32"}}'
    whole = len(header).to_bytes(8, "little") + header + b"1234"
    assert any(mutated(whole, seed, safetensors)[-4:] == b"1234" for seed in range(20))


def test_values_are_compared_by_kind_and_size():
    array = np.ones(3, np.float32)
    assert same({"a": [array, 1]}, {"a": [array.copy(), 1]}) and not same(1, True) and not same(1, 1.0)
    assert not same(array, array.astype(np.float64)) and not same(array, -array)
    assert alike({"a": 2, "b": "x", "c": 1}, {"a": 1, "b": "y"}) and alike(0, 5) and alike(-2, -1)
    wrong = [({"a": 1}, {"b": 1}), (True, 1), (-1, 1), (float("nan"), 1.0), (1e12, 1.0), ("\ud800", "a"), ([1], [1, 2])]
    assert not any(alike(one, whole) for one, whole in wrong)
    assert not alike(np.array([np.nan]), np.array([1.0])) and not alike([None], ["a"])
