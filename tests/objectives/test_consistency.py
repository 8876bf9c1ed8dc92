"""Causal consistency distillation: its numbers against the formula written out, its quirks, and the map it learns."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.models.wan import embed_text, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.objectives import consistency as module
from cfjax.objectives.consistency import ConsistencyConfig, consistency, draw
from cfjax.objectives.stage import Ema, Stage
from tests.objectives.learning import FRAMEWISE, STUDENT_MEAN, batch_of, causal, copied, learn
from tests.tiny import BATCH, CONFIG, SHAPE, TEXT_LEN, normal, text

KEY = jax.random.key(0)
BLOCKS = Blocks(3)
T48 = np.append(5.0 * (1 - np.arange(48) / 48) / (1 + 4.0 * (1 - np.arange(48) / 48)), 0.0)
T5 = 5.0 * (1 - np.arange(1000) / 1000) / (1 + 4.0 * (1 - np.arange(1000) / 1000))


def network(strength):
    """A model that is a function of everything it is given; no parameters, nothing to compile."""

    def call(x, conditioning_sigma_BF, clean, text_BSE):
        offset = jnp.sin(7.0 * conditioning_sigma_BF) + jnp.mean(text_BSE, axis=(1, 2))[:, None]
        return strength * x - 0.2 * clean + offset[:, :, None, None, None]

    return call


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr(module, "embed_text", lambda model, text_BSE: text_BSE)
    monkeypatch.setattr(module, "both_prompts", lambda a, b: jnp.concatenate([a, b]))
    monkeypatch.setattr(module, "teacher_forced", lambda model, x, s, clean, text, blocks: model(x, s, clean, text))
    return {"student": network(0.5), "student_ema": network(0.4), "teacher": network(0.3)}


def tiny_batch():
    return {"latents_BFHWC": normal(1), "text_BSE": text(), "negative_text_SE": normal(2, (TEXT_LEN, CONFIG.text_dim))}


def bf(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def reference_loss(models, batch, levels, eps, guidance, *, bf16, boundary=False):
    """The reference's section on consistency distillation, items 1 to 6, clip by clip in float64."""
    total = 0.0
    for i, n in enumerate(levels):
        clip = {k: np.asarray(v, np.float64)[i : i + 1] for k, v in batch.items() if k != "negative_text_SE"}
        negative = np.asarray(batch["negative_text_SE"], np.float64)[None]
        sigma, below = T48[n], T48[n + 1]
        conditioning_sigma, conditioning_sigma_below = (
            (bf(1000 * sigma) / 1000, bf(1000 * below) / 1000) if bf16 else (sigma, below)
        )
        gap = bf(bf(1000 * conditioning_sigma - 1000 * conditioning_sigma_below) / 1000) if bf16 else sigma - below
        convert = [T5[np.abs(T5 - t).argmin()] if bf16 else t for t in (conditioning_sigma, conditioning_sigma_below)]
        x0, noise = clip["latents_BFHWC"], np.asarray(eps, np.float64)[i : i + 1]
        x = (1 - sigma) * x0 + sigma * noise

        def flow(role, x, t, text_BSE, x0=x0):
            return np.asarray(models[role](x, jnp.full(SHAPE[1:2], t)[None], x0, text_BSE), np.float64)

        v_pos, v_neg = (
            flow("teacher", x, conditioning_sigma, clip["text_BSE"]),
            flow("teacher", x, conditioning_sigma, negative),
        )
        x_next = x - gap * (v_neg + guidance * (v_pos - v_neg))
        student = x - convert[0] * flow("student", x, conditioning_sigma, clip["text_BSE"])
        target = x_next - convert[1] * flow("student_ema", x_next, conditioning_sigma_below, clip["text_BSE"])
        if boundary and below == 0:
            target = x_next
        total += np.mean((student - target) ** 2) / len(levels)
    return total


@pytest.mark.parametrize("bf16", [False, True], ids=["exact", "bf16"])
@pytest.mark.parametrize("levels", [(0, 46), (20, 3)])
def test_loss_is_the_formula(stubbed, levels, bf16):
    batch, draws = tiny_batch(), {"level_B": jnp.array(levels), "eps_BFHWC": normal(3)}
    loss = consistency(ConsistencyConfig(bf16_timesteps=bf16), BLOCKS)(stubbed, batch, KEY, draws)[0]
    expected = reference_loss(stubbed, batch, levels, normal(3), 3.0, bf16=bf16)
    print(f"levels {levels}, bf16 {bf16}: {float(loss) / expected - 1:.1e}")
    assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_the_boundary_interval_ends_at_the_teachers_step(stubbed):
    batch, draws = tiny_batch(), {"level_B": jnp.array([47, 5]), "eps_BFHWC": normal(3)}
    loss = consistency(ConsistencyConfig(boundary=True), BLOCKS)(stubbed, batch, KEY, draws)[0]
    expected = reference_loss(stubbed, batch, (47, 5), normal(3), 3.0, bf16=False, boundary=True)
    assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_rounding_changes_the_step_as_measured_in_the_reference():
    """Quirk Q2: the step between levels 12 and 13 shrinks to 0.60 of the true one, between 4 and 5 it grows to 1.64."""
    levels = jnp.asarray(ConsistencyConfig().levels())
    ratio = np.asarray(module.gap_bf16(levels[:-1], levels[1:]) / (levels[:-1] - levels[1:]))
    assert ratio[12] == pytest.approx(0.60, abs=0.01) and ratio[4] == pytest.approx(1.64, abs=0.01)


def test_levels_are_drawn_without_the_last_interval_unless_asked():
    """Quirk Q23."""
    shape = (4000, 1, 1, 1, 1)
    level = np.asarray(draw(KEY, shape, ConsistencyConfig())["level_B"])
    assert level.min() == 0 and level.max() == 46
    assert np.asarray(draw(KEY, shape, ConsistencyConfig(boundary=True))["level_B"]).max() == 47
    with pytest.raises(UserError, match=r"objective\.solver_steps=1"):
        ConsistencyConfig(solver_steps=1)


def test_only_the_student_gets_a_gradient():
    """Teacher and average are constants, and the target is too."""
    config = ConsistencyConfig(solver_steps=4)
    models = {"student": causal(), "student_ema": causal(), "teacher": causal()}
    batch = batch_of(copied(KEY, BATCH, STUDENT_MEAN))
    grads = jax.jit(jax.grad(lambda m: consistency(config, FRAMEWISE)(m, batch, KEY)[0]))(models)
    size = {role: sum(float(jnp.sum(jnp.abs(g))) for g in jax.tree.leaves(grad)) for role, grad in grads.items()}
    assert size["student"] > 0 and size["student_ema"] == size["teacher"] == 0


@pytest.mark.slow
def test_learns_the_teachers_flow_map_given_the_clean_past():
    """From pure noise z to mean + STD z in frame 1, and to clean frame 1 in its copy: the PF-ODE's end points.

    The AR teacher's own prediction from noise is the mean, so the initial error of frame 1 is the data's variance.
    """
    config = ConsistencyConfig(solver_steps=12, guidance=1.0, boundary=True)
    stage = Stage("consistency", {"student": consistency(config, FRAMEWISE)}, ema={"student": Ema(0.8)})
    state = learn(
        stage,
        {"student": causal()},
        lambda key: batch_of(copied(key, 128, STUDENT_MEAN)),
        800,
        frozen={"teacher": causal()},
        lr=0.003,
    )
    clean, z = copied(jax.random.key(9), 2000, STUDENT_MEAN), jax.random.normal(jax.random.key(10), (2000, 2, 2, 2, 1))
    sigma_BF = jnp.ones((2000, 2))
    jump = jax.jit(lambda m, kv: z - teacher_forced(m, z, sigma_BF, clean, kv, FRAMEWISE))
    flow_map = jnp.stack([STUDENT_MEAN + 0.5 * z[:, 0], clean[:, 0]], axis=1)

    def error(model):
        kv = embed_text(model, batch_of(clean)["text_BSE"])
        return np.asarray(jnp.mean(jnp.square(jump(model, kv) - flow_map), axis=(0, 2, 3, 4))) / 0.25

    before, after = error(causal()), error(state.params["student"])
    print(f"squared error of the jump from noise, in data variances: before {before}, after {after}")
    assert before[0] > 0.8
    assert after[0] < 0.15 and after[1] < 0.02
