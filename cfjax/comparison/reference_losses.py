"""Probes of the reference's losses and parameter gradients: its own model classes, with their random draws given.

The classes run in float32 (their `mixed_precision` off). Where they cast to bfloat16 by name, only the rounding of the
timesteps is kept (quirks Q1 and Q2); bfloat16 elsewhere (quirk Q30) is not what a float32 comparison is about.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cfjax.comparison.probe import BATCH, Arrays, NotInReference, Probe, Subject, gradients, jit_once, to_torch
from cfjax.comparison.reference import Reference, Sizes, fit
from cfjax.comparison.reference_forward import STEPS, reference_sizes
from cfjax.nn.visibility import Blocks
from cfjax.objectives.consistency import ConsistencyConfig, consistency
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion
from cfjax.objectives.ode_regression import PairsConfig, Regression, ode_regression
from cfjax.objectives.stage import Loss

AUGMENT_FROM = 400


def value_of(
    loss: Loss, role: str, models: dict[str, Any], batch: dict, draws: dict
) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """A loss as a function of one role's network and what else it needs, and these arguments, on the device."""
    others = {name: model for name, model in models.items() if name != role}

    def value(model: Any, others: Any, batch: Any, draws: Any) -> jax.Array:
        return loss({**others, role: model}, batch, jax.random.key(0), draws=draws)[0]  # type: ignore[call-arg]

    return value, (models[role], *jax.tree.map(jnp.asarray, (others, batch, draws)))


def our_loss(loss: Loss, role: str, models: dict[str, Any], batch: dict, draws: dict) -> Arrays:
    """Value of a loss and its gradient with respect to one role."""
    value, given = value_of(loss, role, models, batch, draws)
    result, gradient = jit_once(jax.value_and_grad(value))(*given)
    return {"": np.asarray(result)} | gradients(gradient)


def their_loss(loss: torch.Tensor, network: torch.nn.Module) -> Arrays:
    """The same of a PyTorch loss and network."""
    loss.backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    zero = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    return {"": loss.detach().numpy()} | {
        f"grad/{name}": (zero[name] if grad is None else grad).numpy() for name, grad in grads.items()
    }


def batch_of(subject: Subject, frames: int, clips: int = BATCH) -> dict[str, np.ndarray]:
    """A batch of so many clips, as our losses take it."""
    return {
        "latents_BFHWC": subject.latents("clip", frames)[:clips],
        "text_BSE": subject.text()[:clips],
        "negative_text_SE": subject.negative_text,
    }


def texts_of(subject: Subject, clips: int = BATCH) -> dict[str, dict[str, torch.Tensor]]:
    """The same batch's prompts, as the reference's losses take them."""
    positive = subject.text()[:clips]
    negative = np.broadcast_to(subject.negative_text[None], positive.shape)
    return {
        "conditional_dict": {"prompt_embeds": torch.tensor(positive)},
        "unconditional_dict": {"prompt_embeds": torch.tensor(negative.copy())},
    }


def arguments(sizes: Sizes, **more: Any) -> SimpleNamespace:
    """The reference's config of a stage, as far as its model classes read it."""
    common = {
        "model_kwargs": {"timestep_shift": 5.0}, "mixed_precision": False, "gradient_checkpointing": False,
        "num_frame_per_block": sizes.block_frames, "independent_first_frame": False, "num_train_timestep": 1000,
        "timestep_shift": 5.0, "guidance_scale": 3.0, "warp_denoising_step": True, "i2v": False, "is_causal": True,
    }  # fmt: skip
    return SimpleNamespace(**common, **more)


def build_model(reference: Reference, module: str, name: str, sizes: Sizes, args: SimpleNamespace) -> Any:
    """One of the reference's model classes, without text encoder and VAE."""
    reference.pretend_pretrained(sizes)
    reference.without_encoders(module, "model.base", "pipeline.causal_diffusion_inference")
    cls = getattr(reference.module(module), name)
    start = cls._initialize_models
    if "device" not in inspect.signature(start).parameters:  # Self-Forcing: its base class passes one all the same

        def started(self: Any, args: Any, device: Any) -> None:
            start(self, args)
            self.scheduler = self.generator.get_scheduler()

        cls._initialize_models = started
    with reference.quiet():
        return cls(args, torch.device("cpu"))


def tokens_fit(subject: Subject, tokens: int) -> None:
    """Raises NotInReference where the reference's flex attention could not take as many frames of tokens."""
    if tokens * subject.tokens_per_frame % 128 == 0:
        raise NotInReference(
            "the reference cannot take a multiple of 128 tokens (quirk Q15); change frames, height or width"
        )


# AR diffusion


def diffusion_draws(subject: Subject, frames: int) -> dict[str, np.ndarray]:
    """Random numbers of an AR diffusion loss, as ours take them."""
    return {
        "eps_BFHWC": subject.latents("eps", frames),
        "index_BF": subject.index("index", 0, 1000, BATCH, frames),
        "augment_BF": subject.index("augment", AUGMENT_FROM, 1000, BATCH, frames),
        "drop_B": np.zeros((BATCH,), bool),
    }


def _ours_diffusion(subject: Subject, config: DiffusionConfig, blocks: Blocks) -> Arrays:
    frames = subject.case.frames
    loss = ar_diffusion(config, blocks)
    batch, draws = batch_of(subject, frames), diffusion_draws(subject, frames)
    return our_loss(loss, "student", {"student": subject.student}, batch, draws)


def _theirs_diffusion(reference: Reference, subject: Subject, config: DiffusionConfig, blocks: Blocks) -> Arrays:
    frames, forced = subject.case.frames, config.forcing == "teacher"
    tokens_fit(subject, frames * (2 if forced else 1))
    sizes = reference_sizes(subject, frames, blocks)
    args = arguments(sizes, teacher_forcing=forced, noise_augmentation_max_timestep=config.noise_augmentation)
    model = build_model(reference, "model.diffusion", "CausalDiffusion", sizes, args)
    fit(model.generator, subject.weights(), sizes)
    if config.bf16_timesteps:
        model.dtype = torch.bfloat16  # read for the timesteps only
    draws = diffusion_draws(subject, frames)
    eps, clip = to_torch(draws["eps_BFHWC"]), to_torch(subject.latents("clip", frames))
    indices = [torch.tensor(draws["index_BF"])]
    indices += [torch.tensor(draws["augment_BF"])] if config.noise_augmentation else []
    with reference.draws(eps, *indices):
        loss, _ = model.generator_loss(list(clip.shape), clean_latent=clip, **texts_of(subject))
    return their_loss(loss, model.generator.model)


# ODE regression


def _trajectory(subject: Subject) -> np.ndarray:
    """Stand-ins for the states at the student's levels and the end, [B, J + 1, F, H, W, C]."""
    return np.stack([subject.latents(f"state {j}") for j in range(len(STEPS) + 1)], axis=1)


def _levels(subject: Subject, per: str) -> np.ndarray:
    shape = (BATCH, 1) if per == "clip" else (BATCH, subject.case.frames)
    return subject.index("ode level", 0, len(STEPS), *shape)


def _ours_ode(subject: Subject, how: Regression, blocks: Blocks) -> Arrays:
    frames = subject.case.frames
    level_BF = np.broadcast_to(_levels(subject, how.levels_per), (BATCH, frames)).copy()
    if how.levels_per == "block":
        for start, stop in blocks.spans(frames):
            level_BF[:, start:stop] = level_BF[:, start : start + 1]
    batch = batch_of(subject, frames) | {"trajectory_BJFHWC": _trajectory(subject)}
    loss = ode_regression(PairsConfig(steps=STEPS), blocks, how=how)
    return our_loss(loss, "student", {"student": subject.student}, batch, {"level_BF": level_BF})


def _theirs_ode(reference: Reference, subject: Subject, how: Regression, blocks: Blocks) -> Arrays:
    frames, forced = subject.case.frames, how.past == "clip"
    if forced != (reference.name == "Causal-Forcing"):
        past = "noisy blocks at a level each" if reference.name == "Self-Forcing" else "clean blocks at one level"
        raise NotInReference(f"not in this clone ({reference.name}): its ODE regression has {past}")
    tokens_fit(subject, frames * (2 if forced else 1))
    sizes = reference_sizes(subject, frames, blocks)
    args = arguments(sizes, denoising_step_list=list(STEPS))
    model = build_model(reference, "model.ode_regression", "ODERegression", sizes, args)
    fit(model.generator, subject.weights(), sizes)
    states = to_torch(_trajectory(subject))
    if forced:
        states = torch.cat([states, to_torch(subject.latents("clip", frames))[:, None]], dim=1)
    with reference.draws(torch.tensor(_levels(subject, how.levels_per))):
        loss, _ = model.generator_loss(states, texts_of(subject)["conditional_dict"])
    return their_loss(loss, model.generator.model)


# Consistency distillation

CD_LEVEL = 12  # 0.0040 in place of 0.00665 as the rounded step (quirk Q2)
CD_ROLES = {"student": "student", "student_ema": "ema", "teacher": "teacher"}


def _ours_consistency(subject: Subject, blocks: Blocks, quirks: bool) -> Arrays:
    frames = subject.case.frames
    draws = {"level_B": np.full((BATCH,), CD_LEVEL), "eps_BFHWC": subject.latents("eps", frames)}
    loss = consistency(ConsistencyConfig(bf16_timesteps=quirks), blocks)
    models = {ours: subject.role(name) for ours, name in CD_ROLES.items()}
    return our_loss(loss, "student", models, batch_of(subject, frames), draws)


def _theirs_consistency(reference: Reference, subject: Subject, blocks: Blocks, quirks: bool) -> Arrays:
    if not reference.has("model/naive_consistency.py"):
        raise NotInReference(f"not in this clone ({reference.name}): consistency distillation")
    frames = subject.case.frames
    tokens_fit(subject, 2 * frames)
    sizes = reference_sizes(subject, frames, blocks)
    reference.float32_with_bf16_times("model.naive_consistency", keep=quirks)
    args = arguments(sizes, discrete_cd_N=48)
    model = build_model(reference, "model.naive_consistency", "NaiveConsistency", sizes, args)
    for network, role in ((model.generator, "student"), (model.generator_ema, "ema"), (model.teacher, "teacher")):
        fit(network, subject.weights(role), sizes)
    if not quirks:  # convert at the level itself, not at the nearest entry of the table of 1000
        ends = model.scheduler
        for network in (model.generator, model.generator_ema):
            network.scheduler.timesteps, network.scheduler.sigmas = ends.timesteps, ends.sigmas
    average = SimpleNamespace(copy_to=lambda _: None)  # the averaged weights are in place already
    clip = to_torch(subject.latents("clip", frames))
    with reference.draws(CD_LEVEL, to_torch(subject.latents("eps", frames))):
        loss, _ = model.generator_loss(clean_latent=clip, ema_model=average, **texts_of(subject))
    return their_loss(loss, model.generator.model)


# Probes


def probe_of(part: str, what: str, ours: Callable, theirs: Callable, *args: Any, note: str = "") -> Probe:
    """A probe whose two sides take the same arguments after the subject."""
    return Probe(part, what, lambda s: ours(s, *args), lambda r, s: theirs(r, s, *args), note=note)


def diffusion_probes(subject: Subject) -> list[Probe]:
    """AR diffusion: teacher and diffusion forcing, with the rounded timesteps and without, noise augmentation."""
    probes = []
    for blocks in subject.blocks(subject.case.frames):
        for forcing in ("teacher", "diffusion"):
            config = DiffusionConfig(forcing=forcing, bf16_timesteps=True)
            what = f"AR diffusion, {forcing} forcing, blocks of {blocks.frames}"
            probes.append(probe_of("ar_diffusion", what, _ours_diffusion, _theirs_diffusion, config, blocks))
    most = subject.blocks(subject.case.frames)[0]
    exact = DiffusionConfig(), "AR diffusion, exact timesteps"
    noised = DiffusionConfig(bf16_timesteps=True, noise_augmentation=AUGMENT_FROM), "AR diffusion, noised past"
    for config, what in (exact, noised):
        probes.append(probe_of("ar_diffusion", what, _ours_diffusion, _theirs_diffusion, config, most))
    return probes


def ode_probes(subject: Subject) -> list[Probe]:
    """ODE regression, as either repository has it."""
    hows = {"clean past": Regression(), "noisy past, a level per block": Regression("block", "noisy")}
    return [
        probe_of(
            "ode_regression", f"ODE regression, {name}, blocks of {blocks.frames}", _ours_ode, _theirs_ode, how, blocks
        )
        for name, how in hows.items()
        for blocks in subject.blocks(subject.case.frames)
    ]


def consistency_probes(subject: Subject) -> list[Probe]:
    """Consistency distillation, with the rounded timesteps, and exact."""
    layouts = subject.blocks(subject.case.frames)
    cases = [(f"consistency, blocks of {blocks.frames}", blocks, True) for blocks in layouts]
    cases.append(("consistency, exact timesteps", layouts[0], False))
    return [probe_of("consistency", what, _ours_consistency, _theirs_consistency, *how) for what, *how in cases]
