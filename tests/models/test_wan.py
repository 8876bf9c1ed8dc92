"""The network against diffusers' WanTransformer3DModel with the same random weights: values and every gradient."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from einops import rearrange

from cfjax.conversion.wan import abstract_wan, export_wan
from cfjax.core.errors import UserError
from cfjax.core.precision import BF16, Policy
from cfjax.core.tree import named_leaves
from cfjax.models.wan import Wan, WanConfig, embed_text, preset
from cfjax.nn import layers
from tests.tiny import CONFIG, SHAPE, normal, randomised, text, tiny

# (heads, head_dim, layers, [B, F, H, W] of the latents, text rows); RoPE splits head_dim 16 and 20 unevenly
CASES = {
    "odd_frames": (2, 12, 2, (2, 3, 4, 6), 1),
    "tall": (3, 20, 1, (1, 5, 6, 2), 7),
    "one_frame": (1, 16, 3, (3, 1, 4, 4), 4),
    "one_row": (2, 8, 2, (2, 7, 2, 10), 2),
}
SLOW = ("tall", "one_row")  # 14 seconds each, and like the others


def diffusers_twin(model) -> WanTransformer3DModel:
    """diffusers' network with the same weights."""
    c = model.config
    twin = WanTransformer3DModel(
        patch_size=(1, *c.patch),
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        in_channels=c.in_dim,
        out_channels=c.out_dim,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        eps=c.eps,
    )
    twin.load_state_dict({name: torch.tensor(array) for name, array in export_wan(model).items()}, strict=True)
    return twin


def call_twin(twin, latents_BFHWC, timestep, text_BSE) -> torch.Tensor:
    """diffusers' flow, channels last."""
    video = torch.tensor(rearrange(np.asarray(latents_BFHWC), "b f h w c -> b c f h w"))
    flow = twin(video, torch.tensor(np.asarray(timestep)), torch.tensor(np.asarray(text_BSE))).sample
    return flow.permute(0, 2, 3, 4, 1)


@jax.jit
def flow_of(model, latents, sigma_BF, text_BSE):
    return model(latents, sigma_BF, embed_text(model, text_BSE))


def error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_values_and_gradients_equal_diffusers(case):
    heads, head_dim, layers, shape, rows = CASES[case]
    config = replace(CONFIG, dim=heads * head_dim, num_heads=heads, num_layers=layers, remat="full")
    model = randomised(config, seed=3)
    latents, text_BSE = normal(1, (*shape, 4)), normal(2, (shape[0], rows, config.text_dim))
    weight, sigma_B = normal(4, (*shape, 4)), jnp.linspace(0.937, 0.05, shape[0])

    twin = diffusers_twin(model)
    expected = call_twin(twin, latents, 1000.0 * sigma_B, text_BSE)
    (expected * torch.tensor(np.asarray(weight))).sum().backward()
    expected_grads = {name: p.grad.numpy() for name, p in twin.named_parameters()}

    @jax.jit
    def value_and_grad(model):
        def value(model):
            flow = model(latents, jnp.broadcast_to(sigma_B[:, None], shape[:2]), embed_text(model, text_BSE))
            return jnp.sum(flow * weight), flow

        return jax.grad(value, has_aux=True)(model)

    grads, flow = value_and_grad(model)
    grads = export_wan(grads)
    assert flow.dtype == jnp.float32 and flow.shape == latents.shape
    assert grads.keys() == expected_grads.keys()
    largest = max(np.linalg.norm(g) for g in expected_grads.values())
    if rows == 1:  # a softmax over one text row is constant: what leads to it has no gradient but rounding
        for name in [name for name in grads if re.search(r"attn2\.(to|norm)_[qk]|norm2", name)]:
            assert max(np.linalg.norm(grads.pop(name)), np.linalg.norm(expected_grads.pop(name))) < 1e-6 * largest
    worst = sorted((error(grads[name], g), name) for name, g in expected_grads.items())
    print(f"{case}: flow {error(flow, expected.detach()):.1e}, worst gradients {worst[-3:]}")
    assert error(flow, expected.detach()) < 1e-5
    assert worst[-1][0] < 1e-4, worst[-5:]


def test_a_timestep_per_frame_equals_diffusers_per_token():
    """diffusers takes a timestep per token (Wan2.2); ours per frame is that, repeated over the frame's tokens."""
    sigma_BF = jax.random.uniform(jax.random.key(5), SHAPE[:2])
    tokens = CONFIG.tokens_per_frame(*SHAPE[2:4])
    with torch.no_grad():
        expected = call_twin(diffusers_twin(tiny()), normal(1), jnp.repeat(1000.0 * sigma_BF, tokens, axis=1), text())
    got = error(flow_of(tiny(), normal(1), sigma_BF, text()), expected)
    print(f"per-frame timesteps: {got:.1e}")
    assert got < 1e-5


@pytest.mark.parametrize("name, count", [("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)])
def test_parameter_counts(name, count):
    leaves = named_leaves(abstract_wan(preset(name)))
    assert sum(leaf.size for leaf in leaves.values()) == count


def test_every_parameter_has_a_key_of_its_own(monkeypatch):
    """Zero-initialised ones too. Outside the stacked blocks, whose keys are traced."""
    shapes_of, linear, normal_init = {}, layers.Linear.__init__, layers.normal

    def record(key, shape):
        if not isinstance(key, jax.core.Tracer):
            shapes_of.setdefault(jax.random.key_data(key).tobytes(), set()).add(shape)

    def recorded_linear(self, in_dim, out_dim, key, **options):
        record(key, (in_dim, out_dim))
        linear(self, in_dim, out_dim, key, **options)

    def recorded_normal(stddev):
        def init(key, shape):
            record(key, shape)
            return normal_init(stddev)(key, shape)

        return init

    monkeypatch.setattr(layers.Linear, "__init__", recorded_linear)
    monkeypatch.setattr(layers, "normal", recorded_normal)
    Wan(CONFIG, jax.random.key(0))
    assert [len(shapes) for shapes in shapes_of.values()] == [
        1
    ] * 8  # 4 of the embeddings, patches, projection, head's 2


@pytest.mark.parametrize("policy, tolerance", [(BF16, 0.03), (Policy("bfloat16", "bfloat16"), 0.06)])
def test_bfloat16_stays_close_and_returns_float32(policy, tolerance):
    model = randomised(replace(CONFIG, precision=policy))
    sigma_BF = jnp.full(SHAPE[:2], 0.6)
    flow = flow_of(model, normal(1), sigma_BF, text())
    got = error(flow, flow_of(tiny(), normal(1), sigma_BF, text()))
    print(f"{policy}: {got:.1e}")
    assert flow.dtype == jnp.float32
    assert 1e-5 < got < tolerance


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match=r"model\.dim=10"):
        WanConfig(dim=10, ffn_dim=8, num_heads=4, num_layers=1)
    with pytest.raises(UserError, match="not divisible"):
        CONFIG.tokens_per_frame(5, 4)
    with pytest.raises(UserError, match=r"model\.preset"):
        preset("wan_2b")
    with pytest.raises(UserError, match=r"model\.depth"):
        preset("toy", depth=3)
