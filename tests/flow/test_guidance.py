"""The two conventions of classifier-free guidance."""

import jax
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.guidance import guide

POS, NEG = jax.random.normal(jax.random.key(0), (2, 3)), jax.random.normal(jax.random.key(1), (2, 3))


def test_neutral_scales_give_the_conditional_prediction():
    np.testing.assert_allclose(guide(POS, NEG, 1.0, "sampling"), POS, atol=1e-6)
    np.testing.assert_array_equal(guide(POS, NEG, 0.0, "dmd"), POS)
    np.testing.assert_array_equal(guide(POS, NEG, 0.0, "sampling"), NEG)


def test_dmd_scale_3_is_sampling_scale_4():
    np.testing.assert_allclose(guide(POS, NEG, 3.0, "dmd"), guide(POS, NEG, 4.0, "sampling"), atol=1e-5)


def test_unknown_convention():
    with pytest.raises(UserError, match=r"'cfg'.*sampling, dmd"):
        guide(POS, NEG, 3.0, "cfg")
