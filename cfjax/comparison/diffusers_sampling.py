"""Checks of the samplers: UniPC alone, and whole sampling through diffusers' pipeline."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from cfjax.comparison.case import Case, have
from cfjax.comparison.report import MissingPart, Row, compare_arrays
from cfjax.comparison.twins import dit_twin, from_torch, to_torch
from cfjax.conversion.wan import export_wan
from cfjax.flow.schedule import UNIPC_SIGMA_MAX
from cfjax.flow.solvers import unipc
from cfjax.models.wan import Wan, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep, generate_bidirectional, generate_few_step

Pipeline: Any = WanPipeline  # it takes None for the parts it does without, whatever its signature says
SAMPLE = 1e-3  # allowed of a whole sampler, whose network calls feed on one another


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
    """The sampler's grid bit for bit, and a whole solve of a nonlinear ODE in place of the network."""
    sampler = ManyStep(steps=case.steps)
    sigmas, model_sigmas = sampler.grid()
    scheduler = wan_scheduler(sampler.shift)
    scheduler.set_timesteps(case.steps)
    assert model_sigmas is not None
    rows = [
        compare_arrays("unipc", "sigmas", sigmas, scheduler.sigmas.numpy(), tolerance=0.0),
        compare_arrays("unipc", "timesteps", model_sigmas * 1000, scheduler.timesteps.numpy(), tolerance=1e-12),
    ]
    width = 16
    w_in, w_out = case.normal("w_in", width, 32) / 4, case.normal("w_out", 32, width) / 4
    bias, noise = case.normal("bias", 1, 32) / 4, case.normal("noise", 8, width)

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return 2.0 * jnp.tanh(x @ w_in + 4.0 * sigma * bias) @ w_out + jnp.sin(3.0 * x)

    def velocity_torch(x: torch.Tensor, sigma: float) -> torch.Tensor:
        inner = torch.tanh(x @ torch.tensor(w_in) + 4.0 * sigma * torch.tensor(bias))
        return 2.0 * inner @ torch.tensor(w_out) + torch.sin(3.0 * x)

    ours = jax.jit(lambda x: unipc(velocity, x, sigmas, model_sigmas=model_sigmas))(noise)
    sample = torch.tensor(noise)
    for t in scheduler.timesteps:
        sample = scheduler.step(velocity_torch(sample, t.item() / 1000), t, sample, return_dict=False)[0]
    what = f"{case.steps} steps of a nonlinear ODE"
    rows.append(compare_arrays("unipc", what, ours, sample.numpy(), tolerance=case.bound(1e-5)))
    return rows


def few_step_scheduler(levels: np.ndarray) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler scheduler in its stochastic mode, which predicts x0 and re-noises it; on these levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    own = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int, device: Any = None) -> None:
        own(device=device, sigmas=levels.tolist())

    scheduler.set_timesteps = set_timesteps
    return scheduler


@contextlib.contextmanager
def injected(draws: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, PyTorch's normal draws are these in order; versions of diffusers draw by different functions."""
    left = iter(draws)
    draw = lambda *_, **__: next(left)
    with mock.patch.object(torch, "randn", draw), mock.patch.object(torch, "randn_like", draw):
        yield
    if next(left, None) is not None:
        raise RuntimeError("diffusers drew less noise than it was given")


def check_sampling(case: Case) -> list[Row]:
    """Noise and text rows to latents, all frames at once (diffusers has no causal sampler): many-step, few-step."""
    model = have("dit", case.dit)
    config = model.config
    if config.in_dim != config.out_dim:
        raise MissingPart("an image-to-video network: its sampler needs a picture")
    noise = case.normal("noise", 1, case.frames, case.height, case.width, config.in_dim)
    text, negative = (case.normal(name, 1, case.text_length, config.text_dim) for name in ("text", "negative"))
    many, few = ManyStep(steps=case.steps), FewStep()
    levels = few.sigmas()
    fresh = case.normal("fresh noise", 1, case.frames, len(levels), *noise.shape[2:])

    @jax.jit
    def both(model: Wan, noise: jax.Array, text: jax.Array, negative: jax.Array, fresh: jax.Array) -> Any:
        rows, negative_rows = embed_text(model, text), embed_text(model, negative)
        few_step = partial(generate_few_step, sampler=few, blocks=Blocks(case.frames), renoise_BFJHWC=fresh)
        return (
            generate_bidirectional(model, noise, rows, negative_rows, many),
            few_step(model, noise, rows, key=jax.random.key(0)),
        )

    ours_many, ours_few = map(np.asarray, both(model, noise, text, negative, fresh))
    twin = dit_twin(config, export_wan(model))
    del model

    def pipeline(scheduler: Any, steps: int, guidance: float) -> np.ndarray:
        pipe = Pipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=twin)
        pipe.set_progress_bar_config(disable=True)
        video = pipe(
            height=8 * case.height,
            width=8 * case.width,
            num_frames=1 + 4 * (case.frames - 1),
            latents=to_torch(noise),
            prompt_embeds=torch.tensor(text),
            negative_prompt_embeds=torch.tensor(negative),
            output_type="latent",
            return_dict=False,
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
        return from_torch(video[0])

    theirs_many = pipeline(wan_scheduler(many.shift), many.steps, many.guidance)
    with injected([to_torch(fresh[:, :, i]) for i in range(len(levels))]):
        theirs_few = pipeline(few_step_scheduler(levels), len(levels), 1.0)
    compare = partial(compare_arrays, "sampling", tolerance=case.bound(SAMPLE))
    return [
        compare(f"latents, UniPC {many.steps} steps, guidance {many.guidance:g}", ours_many, theirs_many),
        compare(f"latents, {len(levels)} steps re-noised", ours_few, theirs_few),
    ]
