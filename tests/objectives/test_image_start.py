"""A clean first latent frame at level 0 without loss, as Wan2.2-TI2V-5B is trained: against diffusers' class, which
takes a timestep per token, and the loss by hand in PyTorch and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cfjax.comparison.twins import dit_twin, to_torch
from cfjax.conversion.wan import export_wan
from cfjax.core.errors import UserError
from cfjax.flow.schedule import bsmntw, sigma_table
from cfjax.models.wan import embed_text, teacher_forced
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, draw, flow_matching
from tests.tiny import CONFIG, FRAMES, SHAPE, normal, text, tiny

INDEX = jnp.array([[300] * FRAMES, [700] * FRAMES])
GIVEN = jnp.array([True, False])
BATCH = {"latents_BFHWC": normal(1), "text_BSE": text(), "negative_text_SE": text()[0]}
DRAWS = {"eps_BFHWC": normal(2), "index_BF": INDEX, "drop_B": jnp.zeros(2, bool), "given_B": GIVEN}
LEVELS = np.asarray(sigma_table(1000, 5.0), np.float32)
CONFIGURED = DiffusionConfig(weighting="bsmntw", image_start=0.5)


def noised(index: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, ...]:
    """x, the levels, the weights and the learned frames, by NumPy."""
    x0, eps, sigma = np.asarray(BATCH["latents_BFHWC"]), np.asarray(DRAWS["eps_BFHWC"]), LEVELS[index]
    x = (1 - sigma[..., None, None, None]) * x0 + sigma[..., None, None, None] * eps
    learned = np.ones(index.shape, bool)
    for row in np.flatnonzero(given):
        x[row, 0], learned[row, 0] = x0[row, 0], False
    return x.astype(np.float32), np.where(learned, sigma, 0).astype(np.float32), bsmntw(LEVELS)[index], learned


def test_bidirectional_loss_and_gradients_are_those_of_pytorch():
    x, sigma, weight, learned = noised(np.asarray(INDEX), np.asarray(GIVEN))
    twin = dit_twin(CONFIG, export_wan(tiny()))
    tokens = CONFIG.tokens_per_frame(*SHAPE[2:4])
    times = torch.tensor(np.repeat(1000 * sigma, tokens, axis=1))
    flow = twin(to_torch(x), times, torch.tensor(np.asarray(text())), return_dict=False)[0]
    target = to_torch(np.asarray(DRAWS["eps_BFHWC"] - BATCH["latents_BFHWC"]))
    error = (flow - target).square().mean(dim=(1, 3, 4))
    theirs = (torch.tensor(weight) * error)[torch.tensor(learned)].mean()
    theirs.backward()
    loss = lambda model: flow_matching(CONFIGURED)({"student": model}, BATCH, jax.random.key(0), DRAWS)[0]
    ours, gradient = jax.jit(jax.value_and_grad(loss))(tiny())
    assert abs(float(ours) - theirs.item()) < 1e-5 * theirs.item()
    mine = export_wan(gradient)
    far = {}
    for name, parameter in twin.named_parameters():
        other = parameter.grad.numpy()
        far[name] = float(np.linalg.norm(mine[name] - other) / np.linalg.norm(other))
    print(f"loss {abs(float(ours) / theirs.item() - 1):.1e}, largest gradient {max(far.values()):.1e}")
    assert max(far.values()) < 1e-4


@pytest.mark.parametrize("alone", [False, True])
def test_teacher_forced_loss_by_hand(alone):
    """The first frame is clean in the noisy half too, whether it is a block of its own or not."""
    blocks = Blocks(5 if alone else 2, independent_first_frame=alone)
    index = np.array([[300] + [500] * 5, [700] + [100] * 5]) if alone else np.asarray(INDEX)
    draws = {**DRAWS, "index_BF": jnp.asarray(index)}
    x, sigma, weight, learned = noised(index, np.asarray(GIVEN))

    @jax.jit
    def both(model):
        loss = ar_diffusion(CONFIGURED, blocks)({"student": model}, BATCH, jax.random.key(0), draws)[0]
        rows = embed_text(model, text())
        return loss, teacher_forced(model, jnp.asarray(x), jnp.asarray(sigma), BATCH["latents_BFHWC"], rows, blocks)

    ours, flow = both(tiny())
    target = np.asarray(DRAWS["eps_BFHWC"] - BATCH["latents_BFHWC"])
    error = np.square(np.asarray(flow) - target).mean(axis=(2, 3, 4))
    theirs = (weight * error)[learned].mean()
    assert abs(float(ours) - theirs) < 1e-5 * theirs


def test_no_loss_reaches_the_given_frame():
    """Another eps there changes nothing."""
    loss = jax.jit(lambda draws: flow_matching(CONFIGURED)({"student": tiny()}, BATCH, jax.random.key(0), draws)[0])
    other = {**DRAWS, "eps_BFHWC": DRAWS["eps_BFHWC"].at[0, 0].add(1.0)}
    assert float(loss(DRAWS)) == float(loss(other))


def test_every_clip_or_some_or_none_begin_with_a_given_frame():
    for chance, low, high in ((1.0, 1000, 1000), (0.3, 240, 360)):
        drawn = draw(jax.random.key(0), (1000, 2, 1, 1, 1), DiffusionConfig(image_start=chance))
        assert low <= int(drawn["given_B"].sum()) <= high
    assert "given_B" not in draw(jax.random.key(0), SHAPE, DiffusionConfig())
    with pytest.raises(UserError, match="image_start needs history"):
        DiffusionConfig(image_start=0.5, history="direct")
