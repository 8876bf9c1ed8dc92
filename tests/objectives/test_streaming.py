"""Distribution matching on a rollout that goes on: one chunk is the usual step; later ones count their new frames."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.nn.visibility import Blocks
from cfjax.objectives import dmd, streaming
from cfjax.objectives.dmd import DMDConfig
from cfjax.objectives.stage import Stage
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.rollout.streaming import NEVER, Streaming, add_chunk, empty_rollout
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import init_state
from cfjax.training.step import make_update
from tests.objectives.test_long import Score
from tests.rollout.test_long_video import Fading
from tests.tiny import BATCH, CONFIG, SHAPE, TEXT_LEN, normal, relative, text, tiny

BLOCKS = Blocks(2, window=4)
DMD = DMDConfig(SelfForcing((1.0, 0.625)), real_guidance=0.0)
ONE_CHUNK = replace(DMD, streaming=Streaming(6, 6, 2, switch_prompts=False))
LONG = replace(DMD, streaming=Streaming(6, 10, 2, switch_prompts=False))
MODELS = {"critic": Score(0.7), "real_score": Score(-0.4), "codec": Fading()}


@pytest.fixture(autouse=True)
def scores_without_text(monkeypatch):
    """The scores are closed forms; only the student embeds its text."""
    for module in (dmd, streaming):
        own = module.embed_text
        monkeypatch.setattr(
            module, "embed_text", lambda model, rows, own=own: own(model, rows) if hasattr(model, "config") else None
        )


def batch() -> dict[str, jax.Array]:
    negative = normal(2, (TEXT_LEN, CONFIG.text_dim))
    return {"latents_BFHWC": jnp.zeros(SHAPE), "text_BSE": text(), "negative_text_SE": negative}


def before(config: DMDConfig):
    return empty_rollout(CONFIG, SHAPE, text().shape, config.streaming, BLOCKS)


@cache
def drawn(seed: int) -> dict[str, jax.Array]:
    return jax.jit(lambda key: streaming.draw_update(key, SHAPE, LONG, BLOCKS))(jax.random.key(seed))


@cache
def updates():
    """(value and gradient of the student's loss, (metrics, rollout)), by the losses of one compiled program."""

    @partial(jax.jit, static_argnames="config")
    def run(student, rollout, draws, *, config):
        def value(student):
            models = {**MODELS, "student": student}
            loss, metrics, after = streaming.generator_loss(config, BLOCKS)(
                models, batch(), jax.random.key(0), rollout, draws
            )
            return loss, (metrics, after)

        return jax.value_and_grad(value, has_aux=True)(student)

    return run


def test_one_chunk_is_the_usual_step():
    """A rollout that is a whole video and does not go on: value and gradient of the student's loss."""
    draws = drawn(3)
    (got, (metrics, after)), gradient = updates()(tiny(), before(ONE_CHUNK), draws, config=ONE_CHUNK)

    @jax.jit
    @jax.value_and_grad
    def usual(student):
        return dmd.generator_loss(DMD, BLOCKS)({**MODELS, "student": student}, batch(), jax.random.key(0), draws)[0]

    expected, usual_gradient = usual(tiny())
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(usual_gradient))
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(usual_gradient), strict=True)
    worst = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / scale
    print(f"one chunk: loss {abs(float(got / expected) - 1):.1e}, gradient {worst:.1e}")
    assert float(got) == pytest.approx(float(expected), rel=1e-5) and worst < 1e-5
    assert float(metrics["rollout_frames"]) == int(after.length) == 6


def test_later_chunks_count_their_new_frames():
    """By NumPy, from the window that the scores see; critic and student alike."""
    state, models = before(LONG), {**MODELS, "student": tiny()}
    (_, (_, state)), _ = updates()(tiny(), state, drawn(3), config=LONG)
    draws = {**drawn(4), "new_share": jnp.float32(0.0)}
    add = partial(add_chunk, config=LONG.self_forcing, streaming=LONG.streaming, blocks=BLOCKS, codec=Fading())
    video = jax.jit(lambda state: add(tiny(), state, text(), draws, gradient=False).x0_BFHWC)(state)
    (got, (_, after)), _ = updates()(tiny(), state, draws, config=LONG)
    critic = jax.jit(lambda state: streaming.critic_loss(LONG, BLOCKS)(models, batch(), None, state, draws))
    fitted, _, other = critic(state)

    expected, flows = 0.0, 0.0
    for i, clip in enumerate(np.asarray(video, np.float64)):
        s, eps = float(draws["score_sigma_B"][i]), np.asarray(draws["score_eps_BFHWC"][i], np.float64)
        x = (1 - s) * clip + s * eps
        fake, real = x - s * (0.7 * x + s), x - s * (-0.4 * x + s)
        gradient = (fake - real) / np.mean(np.abs(clip - real))
        expected += 0.5 * np.mean(gradient[4:] ** 2) / BATCH
        flows += np.mean((0.7 * x + s - (eps - clip))[4:] ** 2) / BATCH
    print(f"second chunk: student {float(got) / expected - 1:.1e}, critic {float(fitted) / flows - 1:.1e}")
    assert float(got) == pytest.approx(expected, rel=1e-4) and float(fitted) == pytest.approx(flows, rel=1e-4)
    assert int(after.length) == 8  # whichever role's update it was
    assert relative(other.latents_BFHWC, after.latents_BFHWC) < 1e-6


def test_an_update_carries_the_rollout_on():
    """And leaves it where it was if the loss is not finite; microbatches are refused."""

    def loss(models, batch, key, rollout):
        value = jnp.sum(models["student"]["w"]) * batch["x_B"][0]
        return value, {"seen": rollout["length"].astype(jnp.float32)}, {"length": rollout["length"] + 1}

    stage, tx = Stage("toy", {"student": loss}, goes_on=True), make_optimizer(OptimizerConfig(lr=0.1), steps=4)
    state = init_state(stage, {"student": {"w": jnp.ones(2)}}, {"student": tx}, 0, rollout={"length": jnp.int32(0)})
    update = make_update(stage, "student", tx)
    for x, length in ((1.0, 1), (2.0, 2), (np.nan, 2), (1.0, 3)):
        state, metrics = update(state, {}, {"x_B": jnp.full(2, x)})
        assert int(state.rollout["length"]) == length and "rollout" not in metrics
        assert bool(metrics["finite"]) == np.isfinite(x)
    with pytest.raises(UserError, match=r"optim.student.accumulate=2: a rollout that goes on is one batch"):
        make_update(stage, "student", tx, accumulate=2)


def test_what_is_missing_is_named():
    models = {name: model for name, model in MODELS.items() if name != "codec"}
    with pytest.raises(UserError, match="needs a frozen role 'codec'"):
        streaming.critic_loss(LONG, BLOCKS)({**models, "student": tiny()}, batch(), None, before(LONG), drawn(3))
    with pytest.raises(UserError, match=r"objective.new_frames=0 is no streaming"):
        streaming.generator_loss(DMD, BLOCKS)
    assert int(drawn(3)["switch"]) == NEVER
