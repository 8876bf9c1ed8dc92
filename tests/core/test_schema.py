"""Untrusted JSON: invalid values are reported, and every rule enforces its type and bounds."""

import pytest

from cfjax.core import schema
from cfjax.core.errors import UserError
from cfjax.core.limits import JSON_DEPTH
from cfjax.core.schema import checked, load_json, number, one_of, parse_json, row, several, table, text, whole

RULE = table(
    {"dim": whole(1, 100), "eps": schema.EPS},
    {
        "names": several(text(5), 1, 2),
        "patch": row(whole(1, 9), whole(1, 9)),
        "on": schema.flag,
        "kind": one_of(1, None),
    },
    closed=True,
)
GOOD = {"dim": 8, "eps": 1e-6, "names": ["a"], "patch": [2, 2], "on": True, "kind": None}


def test_what_fits_passes_unchanged():
    assert checked(RULE, GOOD, "x.json") is GOOD


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": True}, "dim is True; it must be a whole number from 1 to 100"),
        ({"dim": 8.0}, "dim is 8.0; it must be"),
        ({"dim": "8"}, "dim is '8'; it must be"),
        ({"dim": 10**400}, "dim is 1000"),
        ({"dim": 0}, "dim is 0; it must be"),
        ({"eps": 0}, "eps is 0; it must be a number above 0 and at most 0.1"),
        ({"eps": float("nan")}, "eps is nan; it must be"),
        ({"eps": 10**400}, "eps is 1000"),
        ({"names": []}, "names is []; it must be a list of 1 to 2 entries"),
        ({"names": ["a", 3]}, r"names[1] is 3; it must be a text"),
        ({"names": {"0": "a"}}, "names is {'0': 'a'}; it must be a list"),
        ({"patch": [2]}, "patch is [2]; it must be a list of 2 entries"),
        ({"patch": [2, -1]}, "patch[1] is -1; it must be"),
        ({"on": 1}, "on is 1; it must be true or false"),
        ({"kind": True}, "kind is True; it must be 1 or None"),
        ({"dims": 8}, "dims is unknown; known are dim, eps"),
    ],
)
def test_what_does_not_fit_is_reported_with_its_key_and_what_is_allowed(change, words):
    with pytest.raises(UserError) as caught:
        checked(RULE, {**GOOD, **change}, "x.json")
    assert str(caught.value).startswith(f"x.json: {words}") and "\n" not in str(caught.value)


def test_a_missing_key_is_reported_with_its_place():
    with pytest.raises(UserError, match=r"x\.json: world\.fps is missing"):
        checked(table({"world": table({"fps": number(0, 9)})}), {"world": {}}, "x.json")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("NaN", "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "'1e999' is too large a number"),
        ("1" * 400, "a number of 400 digits"),
        ('{"a": 1, "a": 2}', "'a' stands in one object twice"),
        (r'"\ud800"', "half of a surrogate pair"),
        (r'{"\udc80": 1}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * (JSON_DEPTH + 2) + "]" * (JSON_DEPTH + 2), f"nested more than {JSON_DEPTH}"),
        (b'"\xff"', "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_what_json_must_not_hold(document, words):
    with pytest.raises(ValueError, match=words):
        parse_json(document)


def test_numbers_that_others_write_pass():
    assert parse_json('{"model_max_length": 1000000000000000019884624838656, "x": 1e300}')["x"] == 1e300


def test_no_more_of_a_file_is_read_than_it_may_have(tmp_path):
    (tmp_path / "x.json").write_text('"' + "a" * 100 + '"')
    assert load_json(tmp_path / "x.json") == "a" * 100
    with pytest.raises(ValueError, match="more than the 50 bytes"):
        load_json(tmp_path / "x.json", 50)
