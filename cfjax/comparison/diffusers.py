"""The same weights through diffusers' and transformers' Wan classes: independent code, in float32 on the CPU.

Weights go over by the conversion tables, strictly; inputs, noise and timesteps are the same arrays. Each check makes or
reads one part, computes ours, hands the weights over, and computes theirs: at no time are there more than a few copies
of one part in memory.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from einops import rearrange

from cfjax.comparison.case import Case, have
from cfjax.comparison.layers import layer_outputs
from cfjax.comparison.report import Check, Row, compare_arrays, compare_named
from cfjax.conversion.wan import export_wan
from cfjax.flow.schedule import UNIPC_SIGMA_MAX
from cfjax.flow.solvers import unipc
from cfjax.models.wan import Wan, WanConfig, embed_text
from cfjax.rollout.generate import ManyStep

SIGMAS = (1.0, 0.8333333, 0.5, 0.0625)  # where the network is tried
FLOW, GRADIENT, SAMPLE = 1e-4, 1e-3, 1e-3  # what is allowed of a forward pass, a gradient, a whole sampler
Twin = TypeVar("Twin", bound=torch.nn.Module)


def filled(twin: Twin, named: dict[str, np.ndarray]) -> Twin:
    """`twin` with the named weights, all of them and no others; empties `named` on the way."""
    state = {name: torch.tensor(named.pop(name)) for name in list(named)}
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.eval()


def dit_twin(config: WanConfig, named: dict[str, np.ndarray]) -> WanTransformer3DModel:
    """diffusers' network with weights in its own names (`export_wan`)."""
    twin = WanTransformer3DModel(
        patch_size=(1, *config.patch),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
    )
    return filled(twin, named)


def to_torch(latents_BFHWC: Any) -> torch.Tensor:
    """[B, C, F, H, W], as PyTorch's networks take it."""
    return torch.tensor(rearrange(np.asarray(latents_BFHWC), "b f h w c -> b c f h w"))


def from_torch(video: torch.Tensor) -> np.ndarray:
    """Channels last again."""
    return rearrange(video.detach().numpy(), "b c f h w -> b f h w c")


def call_twin(twin: torch.nn.Module, latents: Any, timestep: Any, text_BSE: Any) -> torch.Tensor:
    """Their flow, [B, C, F, H, W]; `timestep` [B], or [B, tokens]."""
    rows = torch.tensor(np.asarray(text_BSE))
    return twin(to_torch(latents), torch.tensor(np.asarray(timestep, np.float32)), rows, return_dict=False)[0]


@contextlib.contextmanager
def recorded(twin: Any) -> Iterator[dict[str, np.ndarray]]:
    """Fills a dict with every layer's output of the calls made inside, by our names."""
    kept: dict[str, np.ndarray] = {}
    hooks = []

    def listen(name: str, module: torch.nn.Module) -> None:
        hook = lambda _, __, out: kept.__setitem__(name, out.detach().numpy())  # noqa: E731
        hooks.append(module.register_forward_hook(hook))

    listen("patch_embedding", twin.patch_embedding)
    listen("time_embedding", twin.condition_embedder.time_embedder)
    listen("time_projection", twin.condition_embedder.time_proj)
    listen("text_embedding", twin.condition_embedder.text_embedder)
    for index, block in enumerate(twin.blocks):
        listen(f"blocks.{index}", block)
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def paired(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, Any]]:
    """Layer outputs side by side, in our shapes; for one timestep per sample, which they do not repeat over frames."""
    pairs = {}
    for name, mine in ours.items():
        other = theirs[name]
        if name == "patch_embedding":
            other = rearrange(other, "b d f h w -> b f (h w) d")
        elif name in ("time_embedding", "time_projection"):
            mine = mine[:, 0]
        pairs[name] = (mine, other.reshape(mine.shape) if other.size == mine.size else other)
    return pairs


@jax.jit
def flow_of(model: Wan, latents_BFHWC: jax.Array, sigma_BF: jax.Array, text_BSE: jax.Array) -> jax.Array:
    """The bidirectional network's flow."""
    return model(latents_BFHWC, sigma_BF, embed_text(model, text_BSE))


def _inputs(case: Case, config: WanConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    latents = case.normal("latents", batch, case.frames, case.height, case.width, config.in_dim)
    return latents, case.normal("text", batch, case.text_length, config.text_dim)


def check_dit(case: Case) -> list[Row]:
    """The flow at several noise levels with every layer's output, and with a noise level per frame."""
    model = have("dit", case.dit)
    config = model.config
    latents, text = _inputs(case, config, 1)
    per_frame = case.uniform("sigma", 1, case.frames)
    ours, layers = [], []
    for sigma in SIGMAS:
        sigma_BF = np.full((1, case.frames), sigma, np.float32)
        ours.append(np.asarray(flow_of(model, latents, sigma_BF, text)))
        layers.append(layer_outputs(model, latents, sigma_BF, text))
    ours_per_frame = np.asarray(flow_of(model, latents, per_frame, text))

    twin, rows = dit_twin(config, export_wan(model)), []
    del model
    with torch.no_grad():
        for sigma, mine, outputs in zip(SIGMAS, ours, layers, strict=True):
            with recorded(twin) as kept:
                theirs = from_torch(call_twin(twin, latents, [np.float32(1000) * np.float32(sigma)], text))
            pairs = {**paired(outputs, kept), "head": (mine, theirs)}
            what = f"flow at t={1000 * sigma:g}"
            rows.append(compare_arrays("dit", what, mine, theirs, tolerance=case.bound(FLOW), layers=pairs))
        tokens = config.tokens_per_frame(case.height, case.width)
        times = np.repeat(np.float32(1000) * per_frame, tokens, axis=1)
        theirs = from_torch(call_twin(twin, latents, times, text))
    note = "theirs: one timestep per token"
    what = "flow, a timestep per frame"
    rows.append(compare_arrays("dit", what, ours_per_frame, theirs, tolerance=case.bound(FLOW), note=note))
    return rows


def check_gradients(case: Case) -> list[Row]:
    """The gradient of a random linear function of the flow, for all parameters and for the inputs."""
    model = have("dit", case.dit)
    config = model.config
    latents, text = _inputs(case, config, 2)
    weight, sigma_B = case.normal("weight", *latents.shape), np.array([0.9375, 0.25], np.float32)

    @jax.jit
    def gradients(model: Wan, latents: jax.Array, text: jax.Array) -> Any:
        def value(model: Wan, latents: jax.Array, text: jax.Array) -> jax.Array:
            sigma_BF = jnp.broadcast_to(sigma_B[:, None], latents.shape[:2])
            return jnp.sum(model(latents, sigma_BF, embed_text(model, text)) * weight)

        return jax.grad(value, argnums=(0, 1, 2))(model, latents, text)

    ours, ours_latents, ours_text = gradients(model, latents, text)
    twin, ours = dit_twin(config, export_wan(model)), export_wan(ours)
    del model
    video, rows = to_torch(latents).requires_grad_(), torch.tensor(text).requires_grad_()
    flow = twin(video, torch.tensor(np.float32(1000) * sigma_B), rows, return_dict=False)[0]
    (flow * to_torch(weight)).sum().backward()
    theirs = {name: p.grad.numpy() for name, p in twin.named_parameters() if p.grad is not None}
    assert video.grad is not None and rows.grad is not None
    compare = partial(compare_arrays, "gradients", tolerance=case.bound(GRADIENT))
    return [
        compare_named("gradients", "of all parameters", ours, theirs, tolerance=case.bound(GRADIENT)),
        compare("of the latents", ours_latents, from_torch(video.grad)),
        compare("of the text rows", ours_text, rows.grad.numpy()),
    ]


def wan_scheduler(shift: float) -> UniPCMultistepScheduler:
    """diffusers' UniPC on the release's grid: from 0.99979985 (shift 5), where diffusers' own starts at 1 - 1e-6."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    own = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int, device: Any = None) -> None:
        own(device=device, sigmas=np.linspace(UNIPC_SIGMA_MAX, 0.0, num_inference_steps + 1)[:-1])

    scheduler.set_timesteps = set_timesteps
    return scheduler


def check_unipc(case: Case) -> list[Row]:
    """The sampler's grid bit for bit, and a whole solve of a nonlinear ODE that stands in for the network."""
    sampler = ManyStep(steps=case.steps)
    sigmas, told = sampler.grid()
    scheduler = wan_scheduler(sampler.shift)
    scheduler.set_timesteps(case.steps)
    assert told is not None
    rows = [
        compare_arrays("unipc", "sigmas", sigmas, scheduler.sigmas.numpy(), tolerance=0.0),
        compare_arrays("unipc", "timesteps", told * 1000, scheduler.timesteps.numpy(), tolerance=1e-12),
    ]
    width = 16
    w_in, w_out = case.normal("w_in", width, 32) / 4, case.normal("w_out", 32, width) / 4
    bias, noise = case.normal("bias", 1, 32) / 4, case.normal("noise", 8, width)

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return 2.0 * jnp.tanh(x @ w_in + 4.0 * sigma * bias) @ w_out + jnp.sin(3.0 * x)

    def velocity_torch(x: torch.Tensor, sigma: float) -> torch.Tensor:
        inner = torch.tanh(x @ torch.tensor(w_in) + 4.0 * sigma * torch.tensor(bias))
        return 2.0 * inner @ torch.tensor(w_out) + torch.sin(3.0 * x)

    ours = jax.jit(lambda x: unipc(velocity, x, sigmas, model_sigmas=told))(noise)
    sample = torch.tensor(noise)
    for t in scheduler.timesteps:
        sample = scheduler.step(velocity_torch(sample, t.item() / 1000), t, sample, return_dict=False)[0]
    what = f"{case.steps} steps of a nonlinear ODE"
    rows.append(compare_arrays("unipc", what, ours, sample.numpy(), tolerance=case.bound(1e-5)))
    return rows


CHECKS: dict[str, Check[Case]] = {
    "dit": check_dit,
    "gradients": check_gradients,
    "unipc": check_unipc,
}
