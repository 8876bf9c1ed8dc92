"""Any number for any key of any config: an error line, or the config becomes a stage, its sampler and optimisers."""

import random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from cfjax.core.cli import keys_of
from cfjax.core.errors import UserError
from cfjax.core.settings import RULES, check_settings, rule_of
from cfjax.experiment.stage import blocks_of, optimizers_of, sampler_of, stage_of
from cfjax.objectives.ode_regression import PairsConfig
from tests.core.test_settings import numbers_of, read_by
from tests.properties.profile import cases

WHOLE = st.one_of(st.integers(), st.sampled_from([-1, 0, 1, 2, 3, 1000, 1001, 2**31 - 1, 2**31, 2**32, 2**63, 10**30]))
REAL = st.floats(allow_nan=True, allow_infinity=True)


def number(data: st.DataObject, like: Any) -> Any:
    """Another number, or as many of them, as the command line would let through."""
    if isinstance(like, tuple):
        return tuple(data.draw(st.lists(WHOLE if isinstance(like[0], int) else REAL, max_size=4)))
    return data.draw(WHOLE if isinstance(like, int) else REAL)


def build(c: ConfigDict) -> None:
    """What is made of a config before anything is read."""
    blocks_of(c)
    if c.stage == "ode_pairs":
        values = c.objective.to_dict()
        del values["method"]
        PairsConfig(**values).grid()
        return
    sampler = sampler_of(c)
    sampler.first_sigmas() if hasattr(sampler, "first_sigmas") else sampler.grid()
    optimizers_of(c, stage_of(c))


@pytest.mark.parametrize("verb", RULES)
def test_any_number_is_reported_or_taken(verb):
    configs = read_by(verb)

    @cases(60)
    @given(data=st.data(), pick=st.randoms(use_true_random=False))
    def holds(data: st.DataObject, pick: random.Random) -> None:
        c = pick.choice(configs).copy_and_resolve_references()
        key = pick.choice(sorted(numbers_of(c)))
        value = number(data, keys_of(c)[key])
        c.update_from_flattened_dict({key: value})
        try:
            check_settings(verb, keys_of(c))
            if "stage" in c and "roles" in c:
                build(c)
        except UserError as error:
            assert "\n" not in str(error) and str(error)
            return
        allowed, values = rule_of(verb, key), value if isinstance(value, tuple) else (value,)
        assert allowed and all(map(allowed.holds, values)), f"{key}={value!r} was taken"

    holds()


@cases(200)
@given(verb=st.sampled_from(sorted(RULES)), name=st.text(), value=st.one_of(WHOLE, REAL, st.text(), st.none()))
@example(verb="train", name="optim.student.lr", value=float("nan"))
def test_any_setting_of_any_name_is_reported_or_taken(verb, name, value):
    try:
        check_settings(verb, {name: value, "budget": "none", "clips": 60, "batch": 60})
    except UserError as error:
        assert isinstance(value, int | float) and str(error)
