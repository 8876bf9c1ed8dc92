"""The GAN: its losses by their formulas, the slope penalty against an exact gradient, what the branch sees."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.models.discriminator import BranchConfig, tapped_layers, with_branch
from cfjax.models.wan import embed_text
from cfjax.objectives.gan import GanConfig, critic_value, generator_value, slope
from tests.tiny import SHAPE, normal, relative, text, text_kv, tiny

FAKE, REAL = np.array([[0.3], [-1.2]]), np.array([[2.0], [-0.5]])


def softplus(x):
    return np.mean(np.log1p(np.exp(x)))


def test_losses_are_the_formulas():
    plain = GanConfig(generator_weight=0.5, critic_weight=0.25)
    paired = replace(plain, relativistic=True)
    fake, real = jnp.asarray(FAKE), jnp.asarray(REAL)
    assert float(generator_value(fake, real, plain)) == pytest.approx(0.5 * softplus(-FAKE), rel=1e-6)
    assert float(critic_value(fake, real, plain)) == pytest.approx(0.25 * (softplus(-REAL) + softplus(FAKE)), rel=1e-6)
    assert float(generator_value(fake, real, paired)) == pytest.approx(0.5 * softplus(REAL - FAKE), rel=1e-6)
    assert float(critic_value(fake, real, paired)) == pytest.approx(0.25 * softplus(FAKE - REAL), rel=1e-6)


def test_the_slope_is_the_squared_gradient():
    """D(x) = sum sin(w x): the mean over many directions against |grad D|^2 in closed form."""
    w, x = np.linspace(0.5, 1.5, 6), np.linspace(-1.0, 1.0, 6)
    judge = lambda clips: jnp.sum(jnp.sin(jnp.asarray(w)[None] * clips), axis=1, keepdims=True)  # noqa: E731
    clips = jnp.broadcast_to(jnp.asarray(x)[None], (40000, 6))
    eps = jax.random.normal(jax.random.key(0), clips.shape)
    measured = float(slope(judge(clips), judge(clips + 0.01 * eps), 0.01))
    exact = float(np.sum(np.square(w * np.cos(w * x))))
    print(f"slope {measured:.4f}, exact {exact:.4f}")
    assert measured == pytest.approx(exact, rel=0.03)


def test_the_branch_keeps_the_network_and_sees_its_features():
    judge = with_branch(tiny(), BranchConfig(time_embedding=True), jax.random.key(0))
    leaves = named_leaves(judge)
    assert all((leaves[name] == x).all() for name, x in named_leaves(tiny()).items())
    sigma_BF = jnp.full(SHAPE[:2], 0.5)

    def total(model, x):
        return jnp.sum(model.classify(x, sigma_BF, embed_text(model, text())))

    value = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    logits, (by_weights, by_clip) = value(judge, normal(1))
    assert np.isfinite(float(logits)) and float(jnp.abs(by_clip).min(axis=(2, 3, 4)).min()) > 0
    dead = {name for name, g in named_leaves(by_weights).items() if not np.any(np.asarray(g))}
    assert dead <= {"head/kernel", "head/bias", "head_modulation"}
    flow = lambda model: model(normal(1), sigma_BF, text_kv())  # noqa: E731
    assert relative(jax.jit(flow)(judge), jax.jit(flow)(tiny())) < 1e-6


def test_layers_are_as_deep_as_the_references():
    layers = {n: tapped_layers(BranchConfig(), n) for n in (1, 2, 4, 30, 40)}
    assert layers == {1: (0,), 2: (0, 1), 4: (1, 2, 3), 30: (13, 21, 29), 40: (18, 28, 39)}


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="layers are 0 to 3"):
        tapped_layers(BranchConfig(layers=(1, 4)), 4)
    with pytest.raises(UserError, match="ascending"):
        BranchConfig(layers=(2, 1))
    with pytest.raises(UserError, match="r1_sigma=0"):
        GanConfig(r1_sigma=0)
    with pytest.raises(UserError, match="r2_weight=-1"):
        GanConfig(r2_weight=-1)
