"""The two conventions of classifier-free guidance, and both prompts in one network call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.guidance import CONVENTIONS, doubled, guide, guided, joined

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


def network(x, prompt_B):
    """A prediction that depends on the prompt and, row by row, on nothing else."""
    latents, sigma = x
    return latents * sigma[:, None] + jnp.sin(prompt_B)[:, None]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_guided_is_two_predictions_from_one_call(convention):
    positive, negative, sigma = jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4]), jnp.array([0.5, 0.6])
    sizes = []

    def call(x):
        sizes.append(x[0].shape[0])
        return network(x, joined(positive, negative))

    expected = guide(network((POS, sigma), positive), network((POS, sigma), negative), 3.0, convention)
    np.testing.assert_array_equal(guided(call, (POS, sigma), 3.0, convention), expected)
    assert sizes == [4]


def test_guided_passes_gradients_to_its_input():
    call = lambda x: jnp.square(x) * jnp.array([1.0, 1.0, 2.0, 2.0])[:, None]
    grad = jax.grad(lambda x: jnp.sum(guided(call, x, 3.0)))(POS)
    np.testing.assert_allclose(grad, 2 * POS * (2.0 + 3.0 * (1.0 - 2.0)), rtol=1e-6)


def test_batches_are_joined_positive_first_along_their_axis():
    pair = {"a": jnp.zeros((1, 2, 3)), "b": jnp.ones((2, 1))}, {"a": jnp.ones((1, 2, 3)), "b": jnp.zeros((2, 1))}
    out = joined(*pair, axis=1)
    assert {name: x.shape for name, x in out.items()} == {"a": (1, 4, 3), "b": (2, 2)}
    np.testing.assert_array_equal(out["b"], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(doubled(POS), jnp.concatenate([POS, POS]))
