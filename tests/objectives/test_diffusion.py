"""Flow matching and AR diffusion: their numbers against the formulas written out, and what they learn."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.schedule import sigma_table
from cfjax.models.wan import embed_text, teacher_forced
from cfjax.nn.visibility import FULL, Blocks, Visibility
from cfjax.objectives import diffusion
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, draw, flow_matching
from tests.objectives.learning import (
    FRAMEWISE,
    REAL_MEAN,
    STUDENT_MEAN,
    batch_of,
    bidirectional,
    causal,
    copied,
    examination,
    fresh,
    gaussian_floor,
)
from tests.tiny import CONFIG, FRAMES, SHAPE, TEXT_LEN, normal, text, tiny

KEY = jax.random.key(0)


def reference_timesteps() -> np.ndarray:
    """The reference's T5 (`utils/scheduler.py`, `FlowMatchScheduler`): float32, descending from 1000."""
    u = np.linspace(1.0, 0.0, 1001, dtype=np.float64)[:-1].astype(np.float32)
    return (1000.0 * (5.0 * u / (1.0 + 4.0 * u))).astype(np.float32)


def reference_loss(x0, draws, flow, weighting: str, bf16: bool, spans: list[tuple[int, int]]) -> float:
    """Reference section 4, items 2 to 6, frame by frame; `flow` gets (x_t, sigma) of all frames."""
    timesteps = reference_timesteps()
    bell = np.exp(-2.0 * ((timesteps.astype(np.float64) - 500.0) / 1000.0) ** 2)
    bell = (bell - bell.min()) * 1000.0 / np.sum(bell - bell.min())
    squares = (timesteps / 1000.0).astype(np.float64) ** 2
    weights = {"bsmntw": bell, "uniform": np.ones(1000), "x0": squares / squares.mean()}[weighting]
    eps, index = np.asarray(draws["eps_BFHWC"]), np.array(draws["index_BF"])
    for start, stop in spans:
        index[:, start:stop] = index[:, start : start + 1]
    conditioning_sigma = timesteps[index]
    if bf16:
        conditioning_sigma = conditioning_sigma.astype(ml_dtypes.bfloat16).astype(np.float32)
        index = np.abs(timesteps[None, None] - conditioning_sigma[:, :, None]).argmin(-1)
    sigma = (timesteps[index] / 1000.0)[:, :, None, None, None]
    v = np.asarray(flow((1 - sigma) * x0 + sigma * eps, conditioning_sigma / 1000.0))
    per_frame = np.mean((v - (eps - x0)) ** 2, axis=(2, 3, 4))
    return float(np.mean(weights[index] * per_frame))


class Stub:
    """A network with a simple answer, so that a loss can be compared without compiling one."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(diffusion, "embed_text", lambda model, text: text)
        monkeypatch.setattr(
            diffusion, "teacher_forced", lambda model, x, s, clean, text, _, **others: model(x, s, text, clean)
        )

    def __call__(self, x, sigma_BF, text_BSE, past=None):
        past = 0.0 if past is None or past is FULL else past
        mean_text = jnp.mean(text_BSE, axis=(1, 2))[:, None, None, None, None]
        return 0.5 * x + jnp.sin(9.0 * sigma_BF)[:, :, None, None, None] + mean_text - 0.3 * past


def tiny_batch() -> dict[str, jax.Array]:
    return {"latents_BFHWC": normal(1), "text_BSE": text(), "negative_text_SE": normal(2, (TEXT_LEN, CONFIG.text_dim))}


LAYOUTS = {
    "chunkwise": Blocks(3),
    "framewise": Blocks(1),
    "first_frame": Blocks(5, independent_first_frame=True),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["exact", "bf16"])
@pytest.mark.parametrize("weighting", ["bsmntw", "uniform", "x0"])
@pytest.mark.parametrize("layout", ["bidirectional", *LAYOUTS])
def test_loss_is_the_formula(monkeypatch, layout, weighting, bf16):
    stub, batch = Stub(monkeypatch), tiny_batch()
    config = DiffusionConfig(weighting=weighting, bf16_timesteps=bf16)
    draws = {**draw(jax.random.key(5), SHAPE, config), "drop_B": jnp.array([True, False])}
    seen = jnp.stack([batch["negative_text_SE"], batch["text_BSE"][1]])
    blocks = LAYOUTS.get(layout)
    loss = flow_matching(config) if blocks is None else ar_diffusion(config, blocks)
    spans = [(0, FRAMES)] if blocks is None else blocks.spans(FRAMES)
    past = None if blocks is None else batch["latents_BFHWC"]

    def flow(x, sigma):
        return stub(jnp.asarray(x), jnp.asarray(sigma), seen, past)

    expected = reference_loss(np.asarray(batch["latents_BFHWC"]), draws, flow, weighting, bf16, spans)
    assert float(loss({"student": stub}, batch, KEY, draws)[0]) == pytest.approx(expected, rel=2e-5)


def test_network_gets_the_noised_clip_the_clean_past_and_its_text():
    batch, draws, blocks = tiny_batch(), draw(jax.random.key(5), SHAPE, DiffusionConfig()), Blocks(2)
    x0 = np.asarray(batch["latents_BFHWC"])

    def flow(x, sigma):
        run = jax.jit(lambda m, x, s, c, t: teacher_forced(m, x, s, c, embed_text(m, t), blocks))
        return run(tiny(), jnp.asarray(x), jnp.asarray(sigma), batch["latents_BFHWC"], batch["text_BSE"])

    expected = reference_loss(x0, draws, flow, "bsmntw", False, blocks.spans(FRAMES))
    loss = jax.jit(lambda m, b, d: ar_diffusion(DiffusionConfig(), blocks)({"student": m}, b, KEY, d))
    assert float(loss(tiny(), batch, draws)[0]) == pytest.approx(expected, rel=1e-4)


def test_diffusion_forcing_shows_the_noisy_past(monkeypatch):
    """The network gets one noised clip, block-causal; no clean half exists."""
    seen = {}

    def network(x, conditioning_sigma_BF, text, visibility):
        seen.update(x=x, conditioning_sigma=conditioning_sigma_BF, visibility=visibility)
        return 0.3 * x

    monkeypatch.setattr(diffusion, "embed_text", lambda model, text: text)
    monkeypatch.setattr(diffusion, "teacher_forced", None)
    batch, config, blocks = tiny_batch(), DiffusionConfig(forcing="diffusion"), Blocks(3)
    draws = draw(jax.random.key(5), SHAPE, config)
    loss = ar_diffusion(config, blocks)({"student": network}, batch, KEY, draws)[0]
    expected = reference_loss(
        np.asarray(batch["latents_BFHWC"]), draws, lambda x, sigma: 0.3 * x, "bsmntw", False, blocks.spans(FRAMES)
    )
    assert seen["visibility"] == Visibility("block_causal", blocks)
    assert float(loss) == pytest.approx(expected, rel=2e-5)


def test_noise_augmentation_noises_the_clean_half_with_the_same_noise(monkeypatch):
    """Levels U{a..999} per block, the noisy half's eps (reference: `CausalDiffusion.generator_loss`)."""
    seen = {}

    def network(model, x, conditioning_sigma_BF, past, text, blocks, *, clean_sigma_BF):
        seen.update(past=past, conditioning_sigma=clean_sigma_BF)
        return x

    monkeypatch.setattr(diffusion, "embed_text", lambda model, text: text)
    monkeypatch.setattr(diffusion, "teacher_forced", network)
    batch, config = tiny_batch(), DiffusionConfig(noise_augmentation=600)
    draws = draw(jax.random.key(5), SHAPE, config)
    assert int(draws["augment_BF"].min()) >= 600
    ar_diffusion(config, Blocks(3))({"student": None}, batch, KEY, draws)
    sigma = (reference_timesteps() / 1000.0)[np.repeat(np.asarray(draws["augment_BF"])[:, ::3], 3, axis=1)]
    wide = sigma[:, :, None, None, None]
    past = (1 - wide) * np.asarray(batch["latents_BFHWC"]) + wide * np.asarray(draws["eps_BFHWC"])
    np.testing.assert_allclose(seen["conditioning_sigma"], sigma, rtol=1e-6)
    np.testing.assert_allclose(seen["past"], past, atol=1e-6)
    with pytest.raises(UserError, match="only forcing=teacher has"):
        DiffusionConfig(noise_augmentation=600, forcing="diffusion")


def test_bf16_timesteps_collapse_the_table_and_keep_its_noise_near(monkeypatch):
    """Quirk Q1: 294 distinct levels; sigma moves by at most 0.00247; 1 % of the draws fall on weight 0."""
    seen = {}

    def network(x, conditioning_sigma_BF, text, visibility):
        seen.update(sigma=np.asarray(x)[:, 0, 0, 0, 0], conditioning_sigma=np.asarray(conditioning_sigma_BF)[:, 0])
        return x

    monkeypatch.setattr(diffusion, "embed_text", lambda model, text: text)
    shape = (1000, 1, 1, 1, 1)
    draws = {"eps_BFHWC": jnp.ones(shape), "index_BF": jnp.arange(1000)[:, None], "drop_B": jnp.zeros(1000, bool)}
    loss = flow_matching(DiffusionConfig(bf16_timesteps=True))
    loss({"student": network}, batch_of(jnp.zeros(shape)), KEY, draws)
    exact = reference_timesteps() / 1000.0
    assert len(np.unique(seen["conditioning_sigma"])) == 294
    assert np.abs(seen["sigma"] - exact).max() == pytest.approx(0.00247, abs=1e-5)
    assert 8 <= np.sum(seen["sigma"] == 1.0) <= 12


def test_draws_have_their_distributions():
    draws = draw(KEY, (4000, 2, 1, 1, 1), DiffusionConfig(text_dropout=0.1))
    index = np.asarray(draws["index_BF"])
    assert index.min() == 0 and index.max() == 999 and abs(index.mean() - 499.5) < 10
    assert np.mean(draws["drop_B"]) == pytest.approx(0.1, abs=0.02)
    assert np.std(draws["eps_BFHWC"]) == pytest.approx(1.0, abs=0.03)
    assert not np.any(draw(KEY, (4000, 2, 1, 1, 1), DiffusionConfig())["drop_B"])


def test_weights_average_to_one():
    """So that the learning rate means the same whatever the weighting (bsmntw sums to 1000)."""
    for weighting in ("bsmntw", "uniform", "x0"):
        weights = diffusion._weights(DiffusionConfig(weighting=weighting), sigma_table(1000, 5.0))
        assert np.mean(weights) == pytest.approx(1.0, rel=1e-5)


WRONG = [
    {"history": "own"},
    {"weighting": "cosine"},
    {"text_dropout": 1.0},
    {"forcing": "self"},
    {"noise_augmentation": 1000},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=f"objective.{next(iter(wrong))}="):
        DiffusionConfig(**wrong)


@pytest.mark.slow
def test_flow_matching_reaches_the_gaussian_floor():
    """On independent N(mean, s^2) numbers no predictor is better than s^2 / ((1 - sigma)^2 s^2 + sigma^2)."""
    x, sigma_BF, x0, target = examination(fresh, REAL_MEAN)
    kv = embed_text(bidirectional(), batch_of(x0)["text_BSE"])
    v = jax.jit(lambda m, x, s, kv: m(x, s, kv))(bidirectional(), x, sigma_BF, kv)
    ratio = float(jnp.mean(jnp.square(v - target))) / gaussian_floor()
    print(f"flow matching: {ratio:.4f} of the floor {gaussian_floor():.4f}")
    assert 0.97 < ratio < 1.03


def test_teacher_forcing_conditions_on_the_clean_past():
    """Where frame 2 repeats frame 1, its noise is known from clean frame 1, and frame 1 stays at the Gaussian floor."""
    x, sigma_BF, x0, target = examination(copied, STUDENT_MEAN)
    kv = embed_text(causal(), batch_of(x0)["text_BSE"])
    flow = jax.jit(lambda m, x, s, c, kv: teacher_forced(m, x, s, c, kv, FRAMEWISE))
    error = np.mean((np.asarray(flow(causal(), x, sigma_BF, x0, kv)) - np.asarray(target)) ** 2, axis=(0, 2, 3, 4))
    first, second = error / gaussian_floor()
    print(f"AR diffusion: frame 1 at {first:.4f} of the floor, its copy at {second:.4f}")
    assert 0.97 < first < 1.06 and second < 0.08
