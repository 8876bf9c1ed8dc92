"""Optimisers: names, schedules, decay tables, and which leaves Muon takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.training.optim import OptimizerConfig, current_names, is_muon_leaf, make_optimizer, make_schedule

PARAMS = {
    "blocks/q/kernel": (3, 8, 4),
    "blocks/q/bias": (3, 4),
    "blocks/norm/scale": (3, 8),
    "blocks/modulation": (3, 6, 8),
    "patch_embedding/kernel": (8, 8),
    "time_projection/kernel": (8, 16),
    "head/kernel": (8, 8),
}


def normal(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(PARAMS))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, PARAMS.items(), strict=True)}


def first_update(tx: optax.GradientTransformation) -> dict[str, jax.Array]:
    params = normal(0)
    return jax.jit(tx.update)(normal(1), tx.init(params), params)[0]


def test_schedules():
    wsd = make_schedule("wsd", 2.0, steps=100, warmup=10, decay_fraction=0.2)
    np.testing.assert_allclose([float(wsd(n)) for n in (0, 9, 50, 80, 90, 100)], [0.2, 2, 2, 2, 1, 0], rtol=1e-6)
    cosine = make_schedule("cosine", 1.0, steps=110, warmup=10)
    np.testing.assert_allclose([float(cosine(n)) for n in (10, 60, 110)], [1, 0.5, 0], atol=1e-6)
    assert float(make_schedule("constant", 3.0, steps=10)(0)) == 3.0


def test_adamw_is_optax_adamw():
    ours = first_update(make_optimizer(OptimizerConfig(lr=0.1, b1=0.0, weight_decay=0.01, clip=10.0), steps=10))
    chain = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(0.1, b1=0.0, weight_decay=0.01))
    for name, value in first_update(chain).items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_muon_takes_stacked_and_plain_kernels_only():
    taken = {name for name, leaf in normal(0).items() if is_muon_leaf(name, leaf)}
    assert taken == {"blocks/q/kernel", "time_projection/kernel"}
    muon = first_update(make_optimizer(OptimizerConfig(lr=0.1, name="muon", adam_lr=0.01), steps=10))
    adam = first_update(make_optimizer(OptimizerConfig(lr=0.01), steps=10))
    for name in PARAMS:
        assert np.allclose(muon[name], adam[name], rtol=1e-4) == (name not in taken), name
    for layer in muon["blocks/q/kernel"]:
        singular = jnp.linalg.svd(layer / 0.1, compute_uv=False)
        assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3


def test_muon_treats_each_layer_of_a_stack_by_itself():
    tx = make_optimizer(OptimizerConfig(lr=0.1, name="muon", clip=None), steps=10)
    stack, grads = normal(0)["blocks/q/kernel"], normal(1)["blocks/q/kernel"]

    def update(kernel, grad):
        params = {"kernel": kernel}
        return jax.jit(tx.update)({"kernel": grad}, tx.init(params), params)[0]["kernel"]

    one_by_one = jnp.stack([update(stack[i], grads[i]) for i in range(3)])
    np.testing.assert_allclose(update(stack, grads), one_by_one, rtol=1e-3, atol=1e-5)


def test_decay_covers_everything_unless_a_table_says_otherwise():
    plain = first_update(make_optimizer(OptimizerConfig(lr=1.0), steps=10))
    for rules, spared in (([(".*", 1.0)], ()), ([(".*/bias", 0.0), (".*", 1.0)], ("blocks/q/bias",))):
        decayed = first_update(make_optimizer(OptimizerConfig(lr=1.0, weight_decay=0.1, decay_rules=rules), steps=10))
        for name, value in normal(0).items():
            factor = 0.0 if name in spared else 0.1
            np.testing.assert_allclose(decayed[name], plain[name] - factor * value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_does_not_depend_on_what_is_turned_off(name):
    """A run whose clip or decay is turned on or off goes on; also from the states of cfjax 0.1.0, which did depend."""
    states = {}
    for clip in (0.0, 1.0):
        for decay in (0.0, 0.01):
            tx = make_optimizer(OptimizerConfig(lr=0.1, name=name, clip=clip, weight_decay=decay), steps=10)
            states[clip, decay] = jax.eval_shape(tx.init, normal(0))
    own = named_leaves({"opt": {"student": states[1.0, 0.01]}})
    for (clip, decay), state in states.items():
        assert named_leaves({"opt": {"student": state}}) == own
        parts = [part for part, kept in zip(state, (clip, True, decay, True), strict=True) if kept]
        older = named_leaves({"opt": {"student": tuple(parts)}, "params": {"student": normal(0)}})
        names = current_names(older)
        renamed = {names[key]: leaf for key, leaf in older.items()}
        assert {key: leaf for key, leaf in renamed.items() if key.startswith("opt")} == own
        assert len(renamed) == len(older) == len(own) + len(PARAMS)


def test_clip_bounds_the_global_norm():
    params = {"kernel": jnp.zeros((2, 2))}
    tx = make_optimizer(OptimizerConfig(lr=1.0, clip=0.5, b1=0.0), steps=10)
    _, state = jax.jit(tx.update)({"kernel": jnp.full((2, 2), 100.0)}, tx.init(params), params)
    squares = next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if ".nu" in str(path[1]))
    np.testing.assert_allclose(jnp.sum(squares) / (1 - 0.999), 0.25, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "steps", "message"),
    [
        ({"name": "sgdd"}, 10, "adamw, muon"),
        ({"schedule": "poly"}, 10, "constant, cosine, wsd"),
        ({}, 0, "use 1 or more"),
    ],
)
def test_unknown_names_are_refused(change, steps, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**{"lr": 0.1, **change}), steps=steps)
