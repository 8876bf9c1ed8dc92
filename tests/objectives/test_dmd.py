"""Distribution matching: its gradient against the formula, its compiles and cadence, and where it moves a student."""

import re
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.tree import named_leaves
from cfjax.flow.schedule import sigma_table
from cfjax.models.wan import KV, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.objectives import diffusion
from cfjax.objectives import dmd as module
from cfjax.objectives.dmd import DMDConfig, critic_loss, distribution_gradient, draw, generator_loss
from cfjax.objectives.stage import Ema, Stage
from cfjax.rollout.generate import FewStep, generate_few_step
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import TrainState, advance, init_state
from cfjax.training.step import make_update, role_key
from tests.objectives import learning
from tests.objectives.learning import FRAMEWISE, REAL_MEAN, STD, STUDENT_MEAN, batch_of, bidirectional, causal
from tests.tiny import BATCH, CONFIG, SHAPE, TEXT_LEN, normal, relative, text

BLOCKS = Blocks(3)
SIGMAS = (1.0, 0.9375, 0.8333333, 0.625)
DMD = DMDConfig(SelfForcing(SIGMAS))
KEY = jax.random.key(0)
TABLE5, TABLE8 = sigma_table(1000, 5.0), sigma_table(1000, 8.0)


def tiny_batch() -> dict[str, jax.Array]:
    negative = normal(2, (TEXT_LEN, CONFIG.text_dim))
    return {"latents_BFHWC": jnp.zeros(SHAPE), "text_BSE": text(), "negative_text_SE": negative}


@cache
def fixed_draws() -> dict[str, jax.Array]:
    draws = draw(jax.random.key(3), SHAPE, DMD, BLOCKS)
    return {**draws, "score_sigma_B": jnp.array([TABLE5[500], 0.02])}


class Score:
    """A score network in closed form: v = slope x + sigma + mean text."""

    def __init__(self, slope: float):
        self.slope = slope

    def __call__(self, x, sigma_BF, text_kv):
        shift = sigma_BF + jnp.mean(text_kv.k_LBSNK, axis=(0, 2, 3, 4))[:, None]
        return self.slope * x + shift[:, :, None, None, None]


@pytest.fixture
def scores(monkeypatch) -> dict[str, Score]:
    monkeypatch.setattr(module, "embed_text", lambda model, text: KV(text[None, :, :, None], text[None, :, :, None]))
    return {"critic": Score(0.7), "real_score": Score(-0.4)}


def reference_gradient(x0, draws, batch, config: DMDConfig, slopes=(0.7, -0.4)) -> np.ndarray:
    """The reference's `DMD._compute_kl_grad` (`model/dmd.py`), clip by clip."""
    out = []
    for i, clip in enumerate(np.asarray(x0, np.float64)):
        sigma = float(draws["score_sigma_B"][i])
        noised = used = sigma
        if config.score_table_shift == 8.0:
            noised, used = (float(table[np.abs(table - sigma).argmin()]) for table in (TABLE5, TABLE8))
        x = (1 - noised) * clip + noised * np.asarray(draws["score_eps_BFHWC"][i])
        positive, negative = float(jnp.mean(batch["text_BSE"][i])), float(jnp.mean(batch["negative_text_SE"]))

        def clean(slope, prompt, x=x, sigma=sigma, used=used):
            return x - used * (slope * x + sigma + prompt)

        fake, real = clean(slopes[0], positive), clean(slopes[1], positive)
        fake = fake + config.fake_guidance * (fake - clean(slopes[0], negative))
        real = real + config.real_guidance * (real - clean(slopes[1], negative))
        out.append((fake - real) / np.mean(np.abs(clip - real)))
    return np.stack(out)


@pytest.mark.parametrize("fake_guidance", [0.0, 0.5])
@pytest.mark.parametrize("real_guidance", [0.0, 3.0])
@pytest.mark.parametrize("shift", [None, 8.0])
def test_distribution_gradient_is_the_formula(scores, real_guidance, fake_guidance, shift):
    """ "dmd" guidance, cond + w (cond - uncond) (quirk Q7); one normaliser per clip; quirk Q3 on request."""
    config = replace(DMD, real_guidance=real_guidance, fake_guidance=fake_guidance, score_table_shift=shift)
    x0 = normal(4) * jnp.array([1.0, 5.0])[:, None, None, None, None]
    gradient, metrics = distribution_gradient(x0, scores, tiny_batch(), fixed_draws(), config)
    expected = reference_gradient(x0, fixed_draws(), tiny_batch(), config)
    np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-5)
    assert float(metrics["dmd_gradient_norm"]) == pytest.approx(np.abs(expected).mean(), rel=1e-3)


def test_a_clip_does_not_change_its_neighbours_gradient(scores):
    loud = normal(4).at[1].multiply(100.0)
    first, _ = distribution_gradient(normal(4), scores, tiny_batch(), fixed_draws(), DMD)
    second, _ = distribution_gradient(loud, scores, tiny_batch(), fixed_draws(), DMD)
    np.testing.assert_array_equal(first[0], second[0])
    assert relative(second[1], first[1]) > 1e-3


def test_where_both_scores_and_the_clip_agree_nothing_moves(scores):
    """0 / 0 is no NaN."""
    scores = {"critic": Score(0.0), "real_score": Score(0.0)}
    batch = {**tiny_batch(), "text_BSE": -jnp.ones((BATCH, 1, 8)), "negative_text_SE": -jnp.ones((1, 8))}
    draws = {**fixed_draws(), "score_sigma_B": jnp.ones(BATCH), "score_eps_BFHWC": normal(4)}
    gradient, _ = distribution_gradient(normal(4), scores, batch, draws, DMD)
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


def test_shift_8_table_changes_scores_by_the_q3_ratio(scores):
    """x0 = x - S8(sigma) v, not x - sigma v: the correction of x grows by S8 / sigma (0.02351 / 0.02 at t = 20)."""
    sigma_BF = jnp.broadcast_to(jnp.array([0.5, 0.02])[:, None], SHAPE[:2])
    kv = module.embed_text(None, text())
    x = normal(4)
    exact, faithful = (
        module.score_x0(scores["critic"], x, sigma_BF, kv, replace(DMD, score_table_shift=shift))
        for shift in (None, 8.0)
    )
    ratio = np.asarray((x - faithful) / (x - exact))
    assert np.allclose(ratio[1], 0.02351 / 0.02, rtol=1e-3)
    assert np.allclose(ratio[0], TABLE8[np.abs(TABLE8 - 0.5).argmin()] / 0.5, rtol=1e-3)
    s8 = np.array([TABLE8[np.abs(TABLE8 - s).argmin()] for s in TABLE5[TABLE5 >= 0.0196]])
    ratios = s8 / TABLE5[TABLE5 >= 0.0196]
    assert ratios.min() > 0.91 and ratios.max() < 1.20


def test_score_levels_are_the_references():
    """Reference (`model/dmd.py`): shift 5 of k / 1000, clamped; 9.2 % land on 0.98 and 0.5 % on 0.02."""
    sigma = np.asarray(draw(KEY, (20000, 3, 1, 1, 1), DMD, BLOCKS)["score_sigma_B"])
    assert sigma.min() == pytest.approx(0.02) and sigma.max() == pytest.approx(0.98)
    assert np.mean(sigma >= 0.98) == pytest.approx(0.092, abs=0.008)
    assert np.mean(sigma <= 0.02) == pytest.approx(0.005, abs=0.002)


def test_generator_gradient_is_g_over_numel(scores, monkeypatch):
    """By every number of the video; that the replay hands it on to the weights is test_self_forcing's."""
    video = normal(4)
    monkeypatch.setattr(module, "student_rollout", lambda student, *_, gradient: (video + student, video))
    loss = generator_loss(DMD, BLOCKS)
    value = lambda student: loss({**scores, "student": student}, tiny_batch(), KEY, fixed_draws())[0]
    got, gradient = jax.value_and_grad(value)(jnp.zeros(SHAPE))
    expected = reference_gradient(video, fixed_draws(), tiny_batch(), DMD)
    np.testing.assert_allclose(gradient, expected / expected.size, rtol=2e-4, atol=1e-7)
    assert float(got) == pytest.approx(0.5 * np.mean(expected**2), rel=1e-4)


@pytest.mark.parametrize("shift", [None, 8.0])
def test_critic_loss_is_flow_matching_on_the_students_video(scores, monkeypatch, shift):
    """And with the shift-8 table the critic's flow is scaled by S8 / sigma before it is compared (quirk Q3)."""
    video, index = normal(4), np.array([500, 900])
    monkeypatch.setattr(module, "student_rollout", lambda *_, gradient: (video, video))
    draws = {**fixed_draws(), "score_sigma_B": jnp.asarray(TABLE5[index])}
    models, config = {**scores, "student": None}, replace(DMD, score_table_shift=shift)
    loss, _ = critic_loss(config, BLOCKS)(models, tiny_batch(), KEY, draws)

    class Scaled(Score):
        def __call__(self, x, sigma_BF, text_kv, _):
            scale = (
                1.0 if shift is None else TABLE8[np.abs(TABLE8[None] - TABLE5[index, None]).argmin(1)] / TABLE5[index]
            )
            v = super().__call__(x, sigma_BF, text_kv)
            return v * jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (BATCH,))[:, None, None, None, None]

    monkeypatch.setattr(diffusion, "embed_text", module.embed_text)
    given = {
        "eps_BFHWC": draws["score_eps_BFHWC"],
        "index_BF": jnp.broadcast_to(jnp.asarray(index)[:, None], SHAPE[:2]),
        "drop_B": jnp.zeros(BATCH, bool),
    }
    matching = diffusion.flow_matching(diffusion.DiffusionConfig(weighting="uniform"), role="critic")
    expected, _ = matching({"critic": Scaled(0.7)}, {**tiny_batch(), "latents_BFHWC": video}, KEY, given)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


ITERATIONS, CADENCE, EMA = 300, 5, Ema(0.9, start=5)


@dataclass
class Trained:
    """One DMD run: the student starts from an AR model of other clips, the critic from the teacher."""

    stage: Stage
    updates: dict
    state: TrainState
    counts: dict[str, int]
    exits: set[int]
    early: list[dict[str, np.ndarray]]  # named weights and averages after each of the first seven iterations


@pytest.fixture(scope="module")
def trained() -> Trained:
    config = DMDConfig(SelfForcing(SIGMAS), real_guidance=0.0)
    losses = {"student": generator_loss(config, FRAMEWISE), "critic": critic_loss(config, FRAMEWISE)}
    stage = Stage("dmd", losses, cadence={"student": CADENCE}, ema={"student": EMA})
    updates_of = {"student": ITERATIONS // CADENCE, "critic": ITERATIONS}
    txs = {
        role: make_optimizer(OptimizerConfig(lr=5e-3, schedule="wsd", decay_fraction=0.5, b1=0.0, b2=0.99), steps=steps)
        for role, steps in updates_of.items()
    }
    state = init_state(stage, {"student": causal(), "critic": bidirectional()}, txs, 0)
    updates = {role: make_update(stage, role, txs[role]) for role in losses}
    frozen, batch = {"real_score": bidirectional()}, batch_of(jnp.zeros((64, 2, 2, 2, 1)))
    exit_step = jax.jit(lambda key: draw(key, (1, 2, 1, 1, 1), config, FRAMEWISE)["exit_G"][0])
    counts, exits, early = dict.fromkeys(losses, 0), set(), []
    for iteration in range(ITERATIONS):
        for role in stage.roles_at(iteration):
            if iteration < 10:
                exits.add(int(exit_step(role_key(state, role))))
            state, _ = updates[role](state, frozen, batch)
            counts[role] += 1
        state = advance(state)
        if iteration < 7:
            early.append({name: np.array(leaf) for name, leaf in named_leaves((state.params, state.ema)).items()})
    return Trained(stage, updates, state, counts, exits, early)


def test_one_compile_per_role_whatever_the_exit_step(trained):
    assert len(trained.exits) > 2
    assert [update._cache_size() for update in trained.updates.values()] == [1, 1]


def test_a_trace_shows_the_papers_terms(trained):
    frozen, batch = {"real_score": bidirectional()}, batch_of(jnp.zeros((64, 2, 2, 2, 1)))
    for role, words in {
        "student": ("self_rollout", "denoise_block", "commit_block", "replay_exit_steps", "fake_score", "real_score"),
        "critic": ("self_rollout", "critic_loss", "attention", "embed_text", "optimizer"),
    }.items():
        text = trained.updates[role].lower(trained.state, frozen, batch).as_text(debug_info=True)
        assert [word for word in words if not re.search(rf"\b{word}[/)]", text)] == []


def test_cadence(trained):
    """Reference (`trainer/distillation.py`): the student at iterations 0, 5, ..., before the critic, at every one."""
    assert trained.counts == {"student": ITERATIONS // CADENCE, "critic": ITERATIONS}
    assert [trained.stage.roles_at(n) for n in (0, 1, 5)] == [["student", "critic"], ["critic"], ["student", "critic"]]
    changed = {
        role: [_differ(a, b, f"0/{role}/") for a, b in pairwise(trained.early)] for role in ("student", "critic")
    }
    assert changed == {"student": [False] * 4 + [True, False], "critic": [True] * 6}


def _differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray], prefix: str) -> bool:
    return any(not np.array_equal(a[name], b[name]) for name in a if name.startswith(prefix))


def test_average_is_a_copy_until_its_start(trained):
    names = [name.removeprefix("0/") for name in trained.early[0] if name.startswith("0/student/")]
    for name in names:
        first, later = trained.early[0], trained.early[5]
        np.testing.assert_array_equal(first[f"1/{name}"], first[f"0/{name}"])
        expected = 0.9 * first[f"1/{name}"] + 0.1 * later[f"0/{name}"]
        np.testing.assert_allclose(later[f"1/{name}"], expected, rtol=1e-5, atol=1e-7)


def test_student_moves_to_the_real_scores_distribution(trained):
    """From copied frames around -1 to the teacher's independent frames around 1."""
    noise = jax.random.normal(jax.random.key(5), (2000, 2, 2, 2, 1))
    kv = embed_text(causal(), jnp.zeros((2000, 1, learning.CONFIG.text_dim)))
    sample = jax.jit(partial(generate_few_step, sampler=FewStep(), blocks=FRAMEWISE))
    seen = {}
    for name, model in (("before", causal()), ("after", trained.state.params["student"])):
        video = np.asarray(sample(model, noise, kv, jax.random.key(6)))
        frames = video.reshape(2000, 2, 4)
        correlation = np.corrcoef(frames[:, 0].ravel(), frames[:, 1].ravel())[0, 1]
        seen[name] = np.array([video.mean(), video.std(), correlation])
        print(f"{name}: mean {seen[name][0]:.3f}, std {seen[name][1]:.3f}, correlation of frames {correlation:.3f}")
    assert seen["before"][0] < STUDENT_MEAN + 0.1 and seen["before"][2] > 0.9
    assert abs(seen["after"][0] - REAL_MEAN) < 0.2
    assert abs(seen["after"][1] - STD) < 0.12
    assert seen["after"][2] < 0.25
