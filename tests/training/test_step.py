"""Laws of one update: it learns, accumulates, averages, guards, and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.objectives.stage import Ema, Stage
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import advance, init_state
from cfjax.training.step import make_update, role_key
from tests.training.toy import Counted, Linear, arrays, regression, setup, two_roles


def one_role(**kwargs) -> Stage:
    return Stage("toy", {"student": regression("student")}, **kwargs)


def test_learns_to_the_least_squares_floor():
    stage = one_role()
    tx = make_optimizer(OptimizerConfig(lr=0.05, schedule="cosine", b1=0.9, b2=0.99), steps=400)
    state = init_state(stage, {"student": Linear(jax.random.key(0))}, {"student": tx}, 0)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((64, 4)), rng.standard_normal((64, 4))
    y = x @ rng.standard_normal((4, 4)) + noise
    design = np.concatenate([x, np.ones((64, 1))], 1)
    floor = np.mean((design @ np.linalg.lstsq(design, y, rcond=None)[0] - y) ** 2)
    batch = {"x_BD": x.astype(np.float32), "y_BD": y.astype(np.float32), "scale_D": np.ones(4, np.float32)}
    update = make_update(stage, "student", tx)
    for _ in range(400):
        state, metrics = update(state, {}, batch)
        state = advance(state)
    assert float(metrics["loss"]) == pytest.approx(floor, rel=1e-3)
    assert int(state.step) == 400


def test_accumulation_is_the_full_batch():
    stage = one_role()
    batch = next(Counted(batch=12))
    results = []
    for parts in (1, 2, 3):
        state, txs = setup(stage)
        state, metrics = make_update(stage, "student", txs["student"], accumulate=parts)(state, {}, batch)
        results.append((float(metrics["loss"]), float(metrics["grad_norm"]), arrays(state)))
    for loss, norm, state in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-5)
        for name, value in state.items():
            np.testing.assert_allclose(value, results[0][2][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_every_microbatch_has_a_key_of_its_own():
    def loss(models, batch, key):
        draw = jax.random.uniform(key)
        return jnp.mean(models["student"](batch["x_BD"])) + draw, {"draw": draw}

    stage = Stage("toy", {"student": loss})
    draws = []
    for parts in (1, 2):
        state, txs = setup(stage)
        key = role_key(state, "student")
        expected = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(2)]
        draws.append(
            float(
                make_update(stage, "student", txs["student"], accumulate=parts)(state, {}, next(Counted()))[1]["draw"]
            )
        )
    assert draws[0] == float(jax.random.uniform(key))
    assert draws[1] == pytest.approx(float(sum(expected)) / 2)


def test_uneven_accumulation_is_refused():
    stage = one_role()
    state, txs = setup(stage)
    with pytest.raises(UserError, match="accumulate=3"):
        make_update(stage, "student", txs["student"], accumulate=3)(state, {}, next(Counted(batch=8)))


def test_keys_differ_by_step_and_role():
    state, _ = setup(two_roles())
    keys = [role_key(s, r) for s in (state, advance(state)) for r in ("student", "critic")]
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 4


def test_ema_copies_until_its_start_then_averages():
    stage = one_role(ema={"student": Ema(0.75, start=2)})
    state, txs = setup(stage)
    update, data, average = make_update(stage, "student", txs["student"]), Counted(), None
    for step in range(5):
        state, _ = update(state, {}, next(data))
        state = advance(state)
        weights = np.array(state.params["student"].kernel[...])
        average = weights if step < 2 else 0.75 * average + 0.25 * weights
        np.testing.assert_allclose(state.ema["student"].kernel[...], average, rtol=1e-6)
    assert state.ema["student"].kernel[...].dtype == jnp.float32


def test_losses_see_frozen_models_and_shadows_and_the_caller_keeps_its_own():
    def loss(models, batch, key):
        gap = models["student"](batch["x_BD"]) - models["teacher"](batch["x_BD"]) - models["student_ema"](batch["x_BD"])
        return jnp.mean(gap**2), {}

    teacher = Linear(jax.random.key(3))
    stage = Stage("toy", {"student": loss}, ema={"student": Ema()})
    tx = make_optimizer(OptimizerConfig(lr=0.1), steps=10)
    state = init_state(stage, {"student": teacher}, {"student": tx}, 0)
    update = make_update(stage, "student", tx)
    for _ in range(3):
        state, metrics = update(state, {"teacher": teacher}, next(Counted()))
    assert np.isfinite(metrics["loss"]) and np.isfinite(teacher.kernel[...]).all()


def test_a_non_finite_update_is_not_applied():
    stage = one_role(ema={"student": Ema()})
    state, txs = setup(stage)
    update, data = make_update(stage, "student", txs["student"]), Counted(bad=1)
    state, metrics = update(state, {}, next(data))
    assert bool(metrics["finite"])
    before = arrays(state)
    state, metrics = update(state, {}, next(data))
    assert not bool(metrics["finite"])
    for name, value in arrays(state).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_one_compile_per_role_and_nothing_is_copied():
    stage = two_roles()
    state, txs = setup(stage)
    updates, data = {role: make_update(stage, role, txs[role]) for role in stage.losses}, Counted()
    for step in range(11):
        for role in stage.roles_at(step):
            old = state
            state, _ = updates[role](state, {}, next(data))
            assert old.params[role].kernel[...].is_deleted()
        state = advance(state)
    assert [update._cache_size() for update in updates.values()] == [1, 1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_keep_their_dtype(dtype):
    stage = one_role(ema={"student": Ema()})
    tx = make_optimizer(OptimizerConfig(lr=0.1), steps=10)
    model = jax.tree.map(lambda x: x.astype(dtype), Linear(jax.random.key(0)))
    state = init_state(stage, {"student": model}, {"student": tx}, 0)
    state, _ = make_update(stage, "student", tx, accumulate=2)(state, {}, next(Counted()))
    assert {leaf.dtype for leaf in named_leaves(state.params).values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in named_leaves(state.ema).values()} == {jnp.dtype(jnp.float32)}


def test_roles_must_match_the_stage():
    stage = one_role()
    with pytest.raises(UserError, match="a model is given for"):
        init_state(stage, {}, {}, 0)
    with pytest.raises(UserError, match="ema names"):
        init_state(one_role(ema={"critic": Ema()}), {"student": Linear(jax.random.key(0))}, setup(stage)[1], 0)
    with pytest.raises(UserError, match="no role 'critic'"):
        make_update(stage, "critic", setup(stage)[1]["student"])
