"""Probes of the reference's schedules and of one pass through its networks, layer by layer."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cfjax.comparison.layers import layer_outputs
from cfjax.comparison.probe import BATCH, Arrays, NotInReference, Probe, Subject, from_torch, jit_once, to_torch
from cfjax.comparison.reference import NoEncoder, Reference, Sizes
from cfjax.flow.path import add_noise
from cfjax.flow.schedule import bsmntw, lookup, sigma_table, unipc_grid, warp_steps
from cfjax.models.wan import Wan, embed_text, teacher_forced
from cfjax.nn.visibility import FULL, Blocks, Visibility

TABLES = {"T5": (1000, 5.0), "T8": (1000, 8.0), "T48": (48, 5.0)}
STEPS = (1000, 750, 500, 250)


def _ours_tables(subject: Subject) -> Arrays:
    sigmas, timesteps = unipc_grid(50, 5.0)
    asked = subject.case.uniform("asked levels", 64)
    x0, eps = subject.latents("x0"), subject.latents("eps")
    level_BF = asked[: BATCH * x0.shape[1]].reshape(BATCH, -1)
    table = sigma_table(1000, 5.0)
    return {
        **{name: sigma_table(n, shift) for name, (n, shift) in TABLES.items()},
        "bsmntw weights": bsmntw(table),
        "warped steps": warp_steps(STEPS, 5.0),
        "UniPC sigmas": sigmas,
        "UniPC timesteps": timesteps,
        "nearest level": np.asarray(lookup(table, asked)),
        "noise added": np.asarray(add_noise(jnp.asarray(x0), jnp.asarray(eps), lookup(table, level_BF))),
    }


def _theirs_tables(reference: Reference, subject: Subject) -> Arrays:
    scheduler = reference.module("utils.scheduler").FlowMatchScheduler
    made = {}
    for name, (steps, shift) in TABLES.items():
        made[name] = scheduler(shift=shift, sigma_min=0.0, extra_one_step=True)
        made[name].set_timesteps(steps, training=True)
    out = {name: table.timesteps.numpy() / 1000.0 for name, table in made.items()}
    asked = torch.tensor(subject.case.uniform("asked levels", 64)) * 1000.0
    ones = torch.ones(64, 1, 1, 1)
    x0, eps = (to_torch(subject.latents(name)) for name in ("x0", "eps"))
    noised = made["T5"].add_noise(x0.flatten(0, 1), eps.flatten(0, 1), asked[: x0[:, :, 0, 0, 0].numel()])
    grid = reference.module("wan.utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(
        num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
    )
    grid.set_timesteps(50, device="cpu", shift=5.0)
    return out | {
        "bsmntw weights": made["T5"].linear_timesteps_weights.numpy(),
        "warped steps": _warped(reference, subject).numpy() / 1000.0,
        "UniPC sigmas": grid.sigmas.numpy(),
        "UniPC timesteps": grid.timesteps.numpy(),
        "nearest level": made["T5"].add_noise(0 * ones, ones, asked).flatten().numpy(),
        "noise added": from_torch(noised.unflatten(0, x0.shape[:2])),
    }


def _warped(reference: Reference, subject: Subject) -> torch.Tensor:
    """The step list as the few-step pipeline's constructor warps it."""
    table = reference.module("utils.scheduler").FlowMatchScheduler(shift=5.0, sigma_min=0.0, extra_one_step=True)
    table.set_timesteps(1000, training=True)
    generator = SimpleNamespace(get_scheduler=lambda: table, model=SimpleNamespace(local_attn_size=-1))
    args = SimpleNamespace(denoising_step_list=list(STEPS), warp_denoising_step=True, independent_first_frame=False)
    pipeline = reference.module("pipeline.causal_inference").CausalInferencePipeline
    with reference.quiet():
        made = pipeline(args, "cpu", generator=generator, text_encoder=NoEncoder(), vae=NoEncoder())
    return made.denoising_step_list


def level_index(subject: Subject, blocks: Blocks | None, frames: int, name: str = "level") -> np.ndarray:
    """Indices into T5, [B, F]: one per block, or per clip without blocks."""
    index = subject.index(name, 0, 1000, BATCH, frames)
    for start, stop in blocks.spans(frames) if blocks else [(0, frames)]:
        index[:, start:stop] = index[:, start : start + 1]
    return index


def _ours_pass(
    model: Wan,
    x: jax.Array,
    sigma_BF: jax.Array,
    text_BSE: jax.Array,
    clean: jax.Array | None,
    clean_sigma_BF: jax.Array | None,
    *,
    visibility: Visibility,
) -> jax.Array:
    text = embed_text(model, text_BSE)
    if clean is None or clean_sigma_BF is None:
        return model(x, sigma_BF, text, visibility)
    return teacher_forced(model, x, sigma_BF, clean, text, visibility.blocks, clean_sigma_BF=clean_sigma_BF)


def _ours_flow(subject: Subject, visibility: Visibility, frames: int, aug: bool) -> Arrays:
    table = sigma_table(1000, 5.0)
    blocks = None if visibility.kind == "full" else visibility.blocks
    sigma_BF = jnp.asarray(table[level_index(subject, blocks, frames)])
    x, text = jnp.asarray(subject.latents("noisy", frames)), jnp.asarray(subject.text())
    clean = clean_sigma = None
    if visibility.kind == "teacher_forced":
        clean = jnp.asarray(subject.latents("clean", frames))
        drawn = jnp.asarray(table[level_index(subject, blocks, frames, "clean level")])
        clean_sigma = drawn if aug else jnp.zeros_like(drawn)
    run = jit_once(partial(_ours_pass, visibility=visibility))
    flow = run(subject.student, x, sigma_BF, text, clean, clean_sigma)
    out = {"": np.asarray(flow)}
    if not aug:
        layers = layer_outputs(subject.student, x, sigma_BF, text, visibility, clean)
        out |= {f"layer/{name}": value for name, value in layers.items() if name.startswith("blocks")}
    return out


def reference_sizes(subject: Subject, frames: int, blocks: Blocks) -> Sizes:
    """The subject's sizes for a clip of so many frames."""
    return Sizes(
        subject.config, subject.tokens_per_frame, frames, subject.case.text_length,
        block_frames=blocks.frames, window=blocks.window, sink=blocks.sink,
    )  # fmt: skip


def _theirs_flow(reference: Reference, subject: Subject, visibility: Visibility, frames: int, aug: bool) -> Arrays:
    blocks, forced = visibility.blocks, visibility.kind == "teacher_forced"
    causal = visibility.kind != "full"
    if causal and frames * subject.tokens_per_frame * (2 if forced else 1) % 128 == 0:
        raise NotInReference(
            "the reference cannot take a multiple of 128 tokens (quirk Q15); change frames, height or width"
        )
    sizes = reference_sizes(subject, frames, blocks)
    wrapper = reference.wrapper(subject.weights(), sizes, causal=causal)
    if causal:
        wrapper.model.independent_first_frame = blocks.independent_first_frame
    t = lambda name: torch.tensor(
        1000.0 * sigma_table(1000, 5.0)[level_index(subject, blocks if causal else None, frames, name)]
    )
    run: Callable[..., Any] = wrapper
    if forced:
        clean = to_torch(subject.latents("clean", frames))
        run = partial(wrapper, clean_x=clean, aug_t=t("clean level") if aug else None)
    layers: Arrays = {}
    if not aug:
        _keep_layers(wrapper.model, layers, frames * (2 if forced else 1))
    with torch.no_grad(), reference.quiet():
        text = {"prompt_embeds": torch.tensor(subject.text())}
        flow, _ = run(to_torch(subject.latents("noisy", frames)), text, t("level"))
    return {"": from_torch(flow)} | layers


def _keep_layers(model: Any, layers: Arrays, frames: int) -> None:
    """Fills `layers` with the output [B, F, T, D] of every block when the model runs."""
    for i, block in enumerate(model.blocks):

        def keep(_: Any, __: Any, value: torch.Tensor, name: str = f"layer/blocks.{i}") -> None:
            layers[name] = value.detach().unflatten(1, (frames, -1)).numpy()

        block.register_forward_hook(keep)


def _passes(frames: int, layouts: list[Blocks]) -> Iterator[tuple[str, Visibility, int, bool]]:
    """(name, who sees whom, frames, noisy past) of every pass."""
    yield "bidirectional", FULL, frames, False
    for blocks in layouts:
        yield f"diffusion forcing, blocks of {blocks.frames}", Visibility("block_causal", blocks), frames, False
    for blocks in layouts:
        yield f"teacher forcing, blocks of {blocks.frames}", Visibility("teacher_forced", blocks), frames, False
    most = layouts[0]
    yield "teacher forcing, noised past", Visibility("teacher_forced", most), frames, True
    window = Blocks(frames=most.frames, window=most.frames + 1)
    yield f"diffusion forcing, window of {window.window}", Visibility("block_causal", window), frames, False
    first = Blocks(frames=most.frames, independent_first_frame=True)
    yield "diffusion forcing, first frame alone", Visibility("block_causal", first), frames + 1, False


def schedule_probes(subject: Subject) -> list[Probe]:
    """Tables, weights, step lists and grids."""
    return [Probe("schedules", "", _ours_tables, _theirs_tables, tolerance=1e-6)]


def forward_probes(subject: Subject) -> list[Probe]:
    """Every way through the network that is not cached."""
    frames = subject.case.frames
    side: Callable[..., Any] = lambda function, *args: lambda *given: function(*given, *args)
    return [
        Probe("forward", name, side(_ours_flow, *args), side(_theirs_flow, *args))
        for name, *args in _passes(frames, subject.blocks(frames))
    ]
