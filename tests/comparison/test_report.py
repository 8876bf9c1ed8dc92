"""The table of a comparison: what counts as agreement, what is named when it fails, what JSON keeps."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from cfjax.comparison.report import (
    MissingPart,
    compare_arrays,
    compare_named,
    exit_code,
    pick,
    relative_error,
    run_checks,
    table,
    to_json,
    verdict,
    worst,
)
from cfjax.core.errors import UserError

X = np.linspace(-2.0, 1.0, 12, dtype=np.float32).reshape(3, 4)


def row(ours, theirs=X, tolerance=1e-3, **kwargs):
    return compare_arrays("dit", "flow", ours, theirs, tolerance=tolerance, **kwargs)


def test_the_error_is_on_the_scale_of_the_array():
    off = X.copy()
    off[2, 3] += 0.5  # that entry is 1, the largest of the array 2
    got = row(off)
    assert (got.shape, got.max_abs, got.max_rel, got.ok) == ((3, 4), 0.5, 0.25, False)
    a, b = off.astype(np.float64).ravel(), X.astype(np.float64).ravel()
    assert got.cosine == pytest.approx(a @ b / math.sqrt((a @ a) * (b @ b)))
    assert row(off, tolerance=0.25).ok and not row(off, tolerance=0.2499).ok


def test_differences_are_not_lost_in_float32():
    ours, theirs = np.array([1.0 + 1e-12, 1.0]), np.ones(2)
    assert row(ours, theirs).max_abs == pytest.approx(1e-12, rel=1e-3)


def test_zeros_agree_with_zeros_only():
    zeros = np.zeros(3)
    assert relative_error(zeros, zeros) == 0.0 and row(zeros, zeros, tolerance=0.0).ok
    assert relative_error([1e-30, 0, 0], zeros) == math.inf and not row([1e-30, 0, 0], zeros).ok
    assert row(zeros, zeros).cosine == 1.0 and row(zeros, np.ones(3)).cosine == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "note"),
    [
        (np.where(X[1, 1] == X, np.nan, X), X, "ours has 1 NaN of 12"),
        (X, np.where(X < -1, np.inf, X), "theirs has 4 Inf of 12"),
        (np.full((3, 4), np.nan), np.full((3, 4), np.nan), "ours has 12 NaN of 12; theirs has 12 NaN of 12"),
        (X, X[:2], "shapes differ: ours (3, 4), theirs (2, 4)"),
        (X, X[None], "shapes differ: ours (3, 4), theirs (1, 3, 4)"),
        (X[:0], X[:0], "empty arrays"),
    ],
)
def test_what_cannot_be_compared_is_a_failure_that_says_why(ours, theirs, note):
    got = row(ours, theirs, note="bf16 timesteps (Q1)")
    assert not got.ok and math.isnan(got.max_rel) and math.isnan(got.max_abs)
    assert got.note == f"{note}; bf16 timesteps (Q1)"


def test_the_first_layer_past_the_tolerance_is_named_and_fails_the_row():
    layers = {"embedding": (X, X), "blocks.0": (X, X + 1e-4), "blocks.1": (X, X + 1.0), "blocks.2": (X, X + 2.0)}
    got = row(X, layers=layers)
    assert got.first_divergent_layer == "blocks.1" and not got.ok  # though the end agrees
    assert row(X, layers={"embedding": (X, X)}).first_divergent_layer == ""
    assert row(X, layers={"a": (X, X), "b": (X, np.full_like(X, np.nan))}).first_divergent_layer == "b"


def test_the_worst_of_many_arrays_on_no_less_than_a_thousandth_of_the_largest():
    theirs = {"large": 1000.0 * X, "small": X, "rounding": 1e-6 * X}
    ours = {"large": 1000.0 * X, "small": X * 1.01, "rounding": -1e-6 * X}
    got = compare_named("gradients", "all", ours, theirs, tolerance=1e-3)
    assert got.note == "worst of 3: small" and not got.ok
    assert got.max_rel == pytest.approx(0.01, rel=1e-3)
    assert compare_named("gradients", "all", {**ours, "small": X}, theirs, tolerance=1e-3).ok
    broken = compare_named("gradients", "all", {**ours, "rounding": np.nan * X}, theirs, tolerance=1e-3)
    assert not broken.ok and broken.note == "ours has 12 NaN of 12; worst of 3: rounding"
    with pytest.raises(ValueError, match="names differ"):
        compare_named("gradients", "all", {"large": X}, theirs, tolerance=1e-3)


def test_rows_have_a_table_a_worst_and_an_exit_code():
    rows = [row(X), row(X + 1e-4), row(X + 2.0, note="Q4"), row(X * np.nan)]
    lines = table(rows).splitlines()
    assert len(lines) == 5 and [line[:4].strip() for line in lines[1:]] == ["ok", "ok", "FAIL", "FAIL"]
    assert lines[3].endswith("Q4") and "3x4" in lines[1]
    assert len({line.index("flow") for line in lines[1:]}) == 1  # aligned
    assert worst(rows) is rows[3] and worst(rows[:3]) is rows[2] and worst(rows[:2]) is rows[1]
    assert [exit_code(rows), exit_code(rows[:2]), exit_code([])] == [1, 0, 1]


def test_what_the_other_side_lacks_is_reported_and_neither_passes_nor_fails():
    lacking = replace(row(X * np.nan, note="no such loss in this clone"), ok=True)
    rows = [lacking, row(X + 1e-4)]
    assert exit_code(rows) == 0 and worst(rows) is rows[1] and table(rows).splitlines()[1].startswith("-  ")
    assert verdict(rows) == "all 1 within their tolerance, nearest to it: dit, flow"
    assert verdict([*rows, row(X + 2.0)]) == "1 of 2 past their tolerance, worst: dit, flow"
    assert verdict([lacking]) == verdict([]) == "nothing was compared"


def test_json_keeps_everything_and_is_valid_where_numbers_are_not():
    text = to_json([row(X), row(X * np.nan)], {"seed": 3})
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["seed"] == 3 and read["ok"] is False
    good, bad = read["rows"]
    assert good == {
        "part": "dit", "what": "flow", "shape": [3, 4], "max_abs": 0.0, "max_rel": 0.0, "cosine": pytest.approx(1.0),
        "tolerance": 1e-3, "first_divergent_layer": "", "note": "", "ok": True,
    }  # fmt: skip
    assert bad["max_rel"] is None and bad["note"] == "ours has 12 NaN of 12"


def test_checks_are_picked_by_name_in_their_own_order():
    checks = {"dit": lambda x: [], "vae": lambda x: [], "text": lambda x: []}
    assert list(pick(checks, " text,dit ")) == ["dit", "text"] and list(pick(checks, "")) == list(checks)
    with pytest.raises(UserError, match=r"--only=dit,vea: no check 'vea'; use dit, vae, text"):
        pick(checks, "dit,vea")


def test_a_check_without_its_part_is_left_out_unless_it_was_asked_for():
    def no_vae(_):
        raise MissingPart("there is no VAE to compare")

    checks, said = {"vae": no_vae, "dit": lambda factor: [row(X * factor)]}, []
    rows, seconds = run_checks(checks, 2.0, said.append, strict=False)
    assert [r.ok for r in rows] == [False] and list(seconds) == ["dit"]
    assert said == ["  vae ...", "  vae is left out: there is no VAE to compare", "  dit ..."]
    with pytest.raises(UserError, match="--only=vae: there is no VAE"):
        run_checks(checks, 1.0, said.append, strict=True)
