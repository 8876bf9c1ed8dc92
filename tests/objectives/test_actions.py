"""Losses and self-rollouts of networks that are told which keys are held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.tree import named_leaves
from cfjax.models.fresh import with_actions as with_fresh
from cfjax.models.steered import steered
from cfjax.nn.visibility import Blocks
from cfjax.objectives.actions import with_actions
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion
from cfjax.rollout.self_forcing import SelfForcing, draw_rollout, replay_exit, rollout
from tests.models.test_actions import ATTENTION, EMBEDDING, KEYS, config, told
from tests.tiny import SHAPE, TEXT_LEN, normal, relative, text, text_kv, tiny

BLOCKS = Blocks(2)
BATCH = {
    "latents_BFHWC": normal(4),
    "text_BSE": text(),
    "negative_text_SE": normal(102, (TEXT_LEN, 8)),
    "actions_BFA": jnp.asarray(KEYS),
}


def test_a_loss_tells_every_network_the_batchs_keys():
    """Fresh parameters change no bit of it; trained ones do, and each of them has a gradient."""
    plain = ar_diffusion(DiffusionConfig(), BLOCKS)
    loss = with_actions(plain)
    value = lambda of, model: of({"student": model, "codec": None}, BATCH, jax.random.key(0))[0]
    before = jax.jit(lambda m: value(plain, m))(tiny())
    assert before == jax.jit(lambda m: value(loss, m))(with_fresh(tiny(), config(EMBEDDING), jax.random.key(1)))
    found, grads = jax.jit(jax.value_and_grad(lambda m: value(loss, m)))(told(EMBEDDING))
    assert abs(found - before) > 1e-3
    assert all(jnp.any(g) for name, g in named_leaves(grads).items() if "action" in name)


@pytest.mark.parametrize(
    ("actions", "save"),
    [
        pytest.param(EMBEDDING, False, id="embedding"),
        pytest.param(ATTENTION, True, id="attention, saved", marks=pytest.mark.slow),
        pytest.param(ATTENTION, False, id="attention", marks=pytest.mark.slow),
    ],
)
def test_a_self_rollout_is_steered(actions, save):
    """Its replay in one pass is what was rolled out; with other keys it is another video, from their frame on."""
    how = SelfForcing(sigmas=(0.9, 0.5), save_activations=save)
    draws = draw_rollout(jax.random.key(3), SHAPE, how, BLOCKS)

    @jax.jit
    def both(network, keys):
        model = steered(network, keys)
        rolled = rollout(model, text_kv(), draws, how, BLOCKS, save=save)
        return rolled.x0_BFHWC, replay_exit(model, text_kv(), rolled, how, BLOCKS)

    x0, again = both(told(actions), KEYS)
    error = relative(again, x0)
    print(f"{error:.1e}")
    assert error < 1e-5
    other = KEYS.copy()
    other[:, 4:] = 1 - other[:, 4:]
    changed, _ = both(told(actions), other)
    np.testing.assert_array_equal(changed[:, :4], x0[:, :4])
    assert relative(changed[:, 4:], x0[:, 4:]) > 1e-3
    grads = jax.jit(jax.grad(lambda m: jnp.sum(jnp.square(both(m, KEYS)[1]))))(told(actions))
    assert all(jnp.any(g) for name, g in named_leaves(grads).items() if "action" in name)
