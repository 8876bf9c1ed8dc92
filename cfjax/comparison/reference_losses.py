"""Probes of the reference's losses and parameter gradients: its own model classes, with their random draws given.

The classes run in float32 (their `mixed_precision` off). Where they cast to bfloat16 by name, only the rounding of the
timesteps is kept (quirks Q1 and Q2); bfloat16 elsewhere (quirk Q30) is not what a float32 comparison is about.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cfjax.comparison.probe import BATCH, Arrays, NotThere, Probe, Subject, gradients, jit_once, to_torch
from cfjax.comparison.reference import Reference, Sizes, fit, zero_caches
from cfjax.comparison.reference_codec import FadingCodec, FadingVAE
from cfjax.comparison.reference_forward import STEPS, reference_sizes
from cfjax.flow.schedule import score_sigma, sigma_table, warp_steps
from cfjax.nn.visibility import Blocks
from cfjax.objectives.consistency import ConsistencyConfig, consistency
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion
from cfjax.objectives.dmd import DMDConfig, critic_loss, generator_loss
from cfjax.objectives.ode_regression import PairsConfig, Regression, ode_regression
from cfjax.objectives.sid import generator_loss as sid_loss
from cfjax.objectives.stage import Loss
from cfjax.rollout.long_video import LongVideo
from cfjax.rollout.self_forcing import SelfForcing

CONTEXT_NOISE = float(sigma_table(1000, 5.0)[-1])  # what add_noise at t = 0 adds (quirk Q4)
# The reference rolls out 21 frames, whatever it is given (quirk Q37), of one clip at a time: its cache refresh
# multiplies [B, F] by [B F].
DMD_FRAMES, DMD_BATCH = 21, 1
AUGMENT_FROM = 400


@dataclass(frozen=True)
class Exits:
    """One self-rollout: layout, step lists, the exit step of the first block and of the others, score draws k.

    Without `quirks` the reference's Q3, Q4 and Q6 are mended in it, and ours are off. `frames` are rolled out, of
    `max_frames` at most.
    """

    blocks: Blocks
    steps: tuple[int, ...] = STEPS
    first_steps: tuple[int, ...] = ()
    first: int = 2
    rest: int = 2
    score_k: int = 700
    quirks: bool = True
    frames: int = DMD_FRAMES
    max_frames: int = DMD_FRAMES


def _ours(loss: Loss, role: str, models: dict[str, Any], batch: dict, draws: dict) -> Arrays:
    """Value of a loss and its gradient with respect to one role."""
    others = {name: model for name, model in models.items() if name != role}

    def value(model: Any, others: Any, batch: Any, draws: Any) -> jax.Array:
        return loss({**others, role: model}, batch, jax.random.key(0), draws=draws)[0]  # type: ignore[call-arg]

    given = jax.tree.map(jnp.asarray, (others, batch, draws))
    result, gradient = jit_once(jax.value_and_grad(value))(models[role], *given)
    return {"": np.asarray(result)} | gradients(gradient)


def _theirs(loss: torch.Tensor, network: torch.nn.Module) -> Arrays:
    loss.backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    zero = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    return {"": loss.detach().numpy()} | {
        f"grad/{name}": (zero[name] if grad is None else grad).numpy() for name, grad in grads.items()
    }


def _batch(subject: Subject, frames: int, clips: int = BATCH) -> dict[str, np.ndarray]:
    return {
        "latents_BFHWC": subject.latents("clip", frames)[:clips],
        "text_BSE": subject.text()[:clips],
        "negative_text_SE": subject.negative_text,
    }


def _texts(subject: Subject, clips: int = BATCH) -> dict[str, dict[str, torch.Tensor]]:
    positive = subject.text()[:clips]
    negative = np.broadcast_to(subject.negative_text[None], positive.shape)
    return {
        "conditional_dict": {"prompt_embeds": torch.tensor(positive)},
        "unconditional_dict": {"prompt_embeds": torch.tensor(negative.copy())},
    }


def _args(sizes: Sizes, **more: Any) -> SimpleNamespace:
    """The reference's config of a stage, as far as its model classes read it."""
    common = {
        "model_kwargs": {"timestep_shift": 5.0}, "mixed_precision": False, "gradient_checkpointing": False,
        "num_frame_per_block": sizes.block_frames, "independent_first_frame": False, "num_train_timestep": 1000,
        "timestep_shift": 5.0, "guidance_scale": 3.0, "warp_denoising_step": True, "i2v": False, "is_causal": True,
    }  # fmt: skip
    return SimpleNamespace(**common, **more)


def _model(reference: Reference, module: str, name: str, sizes: Sizes, args: SimpleNamespace) -> Any:
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


def _tokens_fit(subject: Subject, tokens: int) -> None:
    if tokens * subject.tokens_per_frame % 128 == 0:
        raise NotThere("the reference cannot take a multiple of 128 tokens (quirk Q15); change frames, height or width")


# AR diffusion


def _diffusion_draws(subject: Subject, frames: int) -> dict[str, np.ndarray]:
    return {
        "eps_BFHWC": subject.latents("eps", frames),
        "index_BF": subject.index("index", 0, 1000, BATCH, frames),
        "augment_BF": subject.index("augment", AUGMENT_FROM, 1000, BATCH, frames),
        "drop_B": np.zeros((BATCH,), bool),
    }


def _ours_diffusion(subject: Subject, config: DiffusionConfig, blocks: Blocks) -> Arrays:
    frames = subject.case.frames
    loss = ar_diffusion(config, blocks)
    batch, draws = _batch(subject, frames), _diffusion_draws(subject, frames)
    return _ours(loss, "student", {"student": subject.student}, batch, draws)


def _theirs_diffusion(reference: Reference, subject: Subject, config: DiffusionConfig, blocks: Blocks) -> Arrays:
    frames, forced = subject.case.frames, config.forcing == "teacher"
    _tokens_fit(subject, frames * (2 if forced else 1))
    sizes = reference_sizes(subject, frames, blocks)
    args = _args(sizes, teacher_forcing=forced, noise_augmentation_max_timestep=config.noise_augmentation)
    model = _model(reference, "model.diffusion", "CausalDiffusion", sizes, args)
    fit(model.generator, subject.weights(), sizes)
    if config.bf16_timesteps:
        model.dtype = torch.bfloat16  # read for the timesteps only
    draws = _diffusion_draws(subject, frames)
    eps, clip = to_torch(draws["eps_BFHWC"]), to_torch(subject.latents("clip", frames))
    indices = [torch.tensor(draws["index_BF"])]
    indices += [torch.tensor(draws["augment_BF"])] if config.noise_augmentation else []
    with reference.draws(eps, *indices):
        loss, _ = model.generator_loss(list(clip.shape), clean_latent=clip, **_texts(subject))
    return _theirs(loss, model.generator.model)


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
    batch = _batch(subject, frames) | {"trajectory_BJFHWC": _trajectory(subject)}
    loss = ode_regression(PairsConfig(steps=STEPS), blocks, how=how)
    return _ours(loss, "student", {"student": subject.student}, batch, {"level_BF": level_BF})


def _theirs_ode(reference: Reference, subject: Subject, how: Regression, blocks: Blocks) -> Arrays:
    frames, forced = subject.case.frames, how.past == "clip"
    if forced != (reference.name == "Causal-Forcing"):
        past = "noisy blocks at a level each" if reference.name == "Self-Forcing" else "clean blocks at one level"
        raise NotThere(f"not in this clone ({reference.name}): its ODE regression has {past}")
    _tokens_fit(subject, frames * (2 if forced else 1))
    sizes = reference_sizes(subject, frames, blocks)
    args = _args(sizes, denoising_step_list=list(STEPS))
    model = _model(reference, "model.ode_regression", "ODERegression", sizes, args)
    fit(model.generator, subject.weights(), sizes)
    states = to_torch(_trajectory(subject))
    if forced:
        states = torch.cat([states, to_torch(subject.latents("clip", frames))[:, None]], dim=1)
    with reference.draws(torch.tensor(_levels(subject, how.levels_per))):
        loss, _ = model.generator_loss(states, _texts(subject)["conditional_dict"])
    return _theirs(loss, model.generator.model)


# Consistency distillation

CD_LEVEL = 12  # 0.0040 in place of 0.00665 as the rounded step (quirk Q2)
CD_ROLES = {"student": "student", "student_ema": "ema", "teacher": "teacher"}


def _ours_consistency(subject: Subject, blocks: Blocks, quirks: bool) -> Arrays:
    frames = subject.case.frames
    draws = {"level_B": np.full((BATCH,), CD_LEVEL), "eps_BFHWC": subject.latents("eps", frames)}
    loss = consistency(ConsistencyConfig(bf16_timesteps=quirks), blocks)
    models = {ours: subject.role(name) for ours, name in CD_ROLES.items()}
    return _ours(loss, "student", models, _batch(subject, frames), draws)


def _theirs_consistency(reference: Reference, subject: Subject, blocks: Blocks, quirks: bool) -> Arrays:
    if not reference.has("model/naive_consistency.py"):
        raise NotThere(f"not in this clone ({reference.name}): consistency distillation")
    frames = subject.case.frames
    _tokens_fit(subject, 2 * frames)
    sizes = reference_sizes(subject, frames, blocks)
    reference.float32_with_bf16_times("model.naive_consistency", keep=quirks)
    model = _model(reference, "model.naive_consistency", "NaiveConsistency", sizes, _args(sizes, discrete_cd_N=48))
    for network, role in ((model.generator, "student"), (model.generator_ema, "ema"), (model.teacher, "teacher")):
        fit(network, subject.weights(role), sizes)
    if not quirks:  # convert at the level itself, not at the nearest entry of the table of 1000
        ends = model.scheduler
        for network in (model.generator, model.generator_ema):
            network.scheduler.timesteps, network.scheduler.sigmas = ends.timesteps, ends.sigmas
    average = SimpleNamespace(copy_to=lambda _: None)  # the averaged weights are in place already
    clip = to_torch(subject.latents("clip", frames))
    with reference.draws(CD_LEVEL, to_torch(subject.latents("eps", frames))):
        loss, _ = model.generator_loss(clean_latent=clip, ema_model=average, **_texts(subject))
    return _theirs(loss, model.generator.model)


# Distribution matching


def _dmd_draws(subject: Subject, exits: Exits) -> dict[str, np.ndarray]:
    count = len(exits.blocks.spans(exits.max_frames))
    steps = max(len(exits.steps), len(exits.first_steps))
    latents = lambda name, frames=exits.max_frames: subject.latents(name, frames)[:DMD_BATCH]  # noqa: E731
    score_u = np.full((DMD_BATCH,), exits.score_k / 1000.0, np.float32)
    return {
        "noise_BFHWC": latents("noise"),
        "renoise_BFJHWC": np.stack([latents(f"renoise {j}") for j in range(max(steps - 1, 1))], axis=2),
        "context_BFHWC": latents("context"),
        "exit_N": np.array([exits.first] + [exits.rest] * (count - 1), np.int32),
        "score_sigma_B": np.asarray(score_sigma(score_u, 5.0, 0.02, 0.98)),
        "score_eps_BFHWC": latents("score eps", DMD_FRAMES),
        "count": np.array(len(exits.blocks.spans(exits.frames)), np.int32),
    }


def _recorded(draws: dict[str, np.ndarray], exits: Exits) -> Iterator[torch.Tensor]:
    """The same draws in the order and the shapes in which the reference asks for them."""
    spans = exits.blocks.spans(exits.frames)
    yield torch.tensor([len(spans)])
    yield to_torch(draws["noise_BFHWC"][:, : exits.frames])
    if exits.first_steps:
        yield torch.tensor([exits.first])
        yield torch.full((len(spans) - 1,), exits.rest)
    else:
        yield torch.full((len(spans),), exits.rest)
    for (start, stop), last in zip(spans, draws["exit_N"], strict=False):
        for j in range(last):
            yield to_torch(draws["renoise_BFJHWC"][:, start:stop, j]).flatten(0, 1)
        yield to_torch(draws["context_BFHWC"][:, start:stop]).flatten(0, 1)
    yield torch.full((DMD_BATCH, 1), exits.score_k)
    yield to_torch(draws["score_eps_BFHWC"])


def _ours_dmd(subject: Subject, exits: Exits, which: str) -> Arrays:
    levels = lambda steps: tuple(map(float, warp_steps(steps, 5.0))) if steps else ()  # noqa: E731
    rolled = SelfForcing(levels(exits.steps), levels(exits.first_steps))
    config = DMDConfig(rolled)
    if exits.quirks:
        rolled = replace(rolled, context_noise=CONTEXT_NOISE, kv_gradient="straight_through")
        config = DMDConfig(rolled, score_table_shift=8.0)
    blocks = exits.blocks
    if exits.max_frames > DMD_FRAMES:  # where the reference's attention looks back 21 frames
        config = replace(config, long=LongVideo(DMD_FRAMES, exits.max_frames))
        blocks = replace(blocks, window=DMD_FRAMES)
    make: Any = {"dmd": generator_loss, "sid": sid_loss, "critic": critic_loss}[which]
    role = "critic" if which == "critic" else "student"
    models: dict[str, Any] = {name: subject.role(name) for name in ("student", "critic", "real_score")}
    models["codec"] = FadingCodec(subject.config.in_dim)
    batch, draws = _batch(subject, DMD_FRAMES, DMD_BATCH), _dmd_draws(subject, exits)
    return _ours(make(config, blocks), role, models, batch, draws)


def _theirs_dmd(reference: Reference, subject: Subject, exits: Exits, which: str) -> Arrays:
    sizes = reference_sizes(subject, DMD_FRAMES, exits.blocks)
    args = _args(
        sizes, denoising_step_list=list(exits.steps), denoising_step_list_first_chunk=list(exits.first_steps) or None,
        same_step_across_blocks=True, last_step_only=False, num_training_frames=exits.max_frames, context_noise=0,
        ts_schedule=False, denoising_loss_type="flow",
    )  # fmt: skip
    module, name = ("model.sid", "SiD") if which == "sid" else ("model.dmd", "DMD")
    model = _model(reference, module, name, sizes, args)
    model.vae = FadingVAE()
    model.num_training_frames, model.min_score_timestep = exits.max_frames, 0  # SiD leaves them out (quirk Q24)
    if exits.first_steps and not hasattr(model, "denoising_step_list_first_chunk"):
        raise NotThere(f"not in this clone ({reference.name}): a step list of its own for the first block")
    for network, name in ((model.generator, "student"), (model.fake_score, "critic"), (model.real_score, "real_score")):
        fit(network, subject.weights(name), sizes)
    # Without recomputation the reference's cache writes make its backward pass fail (quirk Q6).
    model.generator.model.gradient_checkpointing = True
    model._initialize_inference_pipeline()
    pipeline = model.inference_pipeline
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = subject.config.num_layers, sizes.tokens_per_frame
    own, text = zero_caches(replace(sizes, frames=exits.max_frames), DMD_BATCH)
    pipeline._initialize_kv_cache = lambda **_: setattr(pipeline, "kv_cache1", own)
    pipeline._initialize_crossattn_cache = lambda **_: setattr(pipeline, "crossattn_cache", text)
    if not exits.quirks:
        _mend(model, own)
    compute: Callable[..., Any] = model.critic_loss if which == "critic" else model.generator_loss
    shape = [DMD_BATCH, DMD_FRAMES, subject.config.in_dim, subject.case.height, subject.case.width]
    with reference.draws(*_recorded(_dmd_draws(subject, exits), exits)):
        loss, _ = compute(shape, clean_latent=None, **_texts(subject, DMD_BATCH))
        return _theirs(loss, (model.fake_score if which == "critic" else model.generator).model)


def _mend(model: Any, caches: list[dict[str, torch.Tensor]]) -> None:
    """The reference's DMD without Q3 (shift-8 tables), Q4 (noise on what is cached), Q6 (gradient through caches)."""
    for network in (model.fake_score, model.real_score):
        network.scheduler = model.generator.scheduler
    add_noise, forward = model.scheduler.add_noise, model.generator.forward

    def noise_above_zero(x: torch.Tensor, eps: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x if not timestep.any() else add_noise(x, eps, timestep)

    def forward_with_plain_caches(*args: Any, **keys: Any) -> Any:
        out = forward(*args, **keys)
        if not torch.is_grad_enabled():
            for layer in caches:
                layer.update({name: layer[name].detach() for name in ("k", "v")})
        return out

    model.scheduler.add_noise, model.generator.forward = noise_above_zero, forward_with_plain_caches


def _probe(part: str, what: str, ours: Callable, theirs: Callable, *args: Any, note: str = "") -> Probe:
    return Probe(part, what, lambda s: ours(s, *args), lambda r, s: theirs(r, s, *args), note=note)


def diffusion_probes(subject: Subject) -> list[Probe]:
    """AR diffusion: teacher and diffusion forcing, with the rounded timesteps and without, noise augmentation."""
    probes = []
    for blocks in subject.blocks(subject.case.frames):
        for forcing in ("teacher", "diffusion"):
            config = DiffusionConfig(forcing=forcing, bf16_timesteps=True)
            what = f"AR diffusion, {forcing} forcing, blocks of {blocks.frames}"
            probes.append(_probe("ar_diffusion", what, _ours_diffusion, _theirs_diffusion, config, blocks))
    most = subject.blocks(subject.case.frames)[0]
    exact = DiffusionConfig(), "AR diffusion, exact timesteps"
    noised = DiffusionConfig(bf16_timesteps=True, noise_augmentation=AUGMENT_FROM), "AR diffusion, noised past"
    for config, what in (exact, noised):
        probes.append(_probe("ar_diffusion", what, _ours_diffusion, _theirs_diffusion, config, most))
    return probes


def ode_probes(subject: Subject) -> list[Probe]:
    """ODE regression, as either repository has it."""
    hows = {"clean past": Regression(), "noisy past, a level per block": Regression("block", "noisy")}
    return [
        _probe(
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
    return [_probe("consistency", what, _ours_consistency, _theirs_consistency, *how) for what, *how in cases]


def dmd_probes(subject: Subject) -> list[Probe]:
    """Distribution matching: generator and critic, at inner levels and at the bounds, with a first-block list; SiD."""
    probes = []
    chunks = Exits(subject.blocks(DMD_FRAMES)[0])
    frames = Exits(Blocks(frames=1), steps=(1000, 500), first_steps=STEPS, first=3, rest=1)
    upper = Exits(chunks.blocks, first=0, rest=0, score_k=970)
    lower = Exits(chunks.blocks, first=0, rest=0, score_k=2)
    mended = replace(chunks, quirks=False)
    size = chunks.blocks.frames
    long = replace(chunks, frames=DMD_FRAMES + size, max_frames=DMD_FRAMES + 2 * size)
    for which, name in (("dmd", "DMD generator"), ("critic", "critic")):
        for exits, what in (
            (chunks, f"blocks of {chunks.blocks.frames}, exit at step 3 of 4"),
            (upper, f"blocks of {chunks.blocks.frames}, exit at step 1, score level 0.98"),
            (lower, f"blocks of {chunks.blocks.frames}, exit at step 1, score level 0.02"),
            (frames, "blocks of 1, 2 steps, first block 4"),
            (mended, f"blocks of {chunks.blocks.frames}, without the quirks"),
            (long, f"blocks of {size}, the end of {long.frames} frames"),
        ):
            probes.append(_probe("dmd", f"{name}, {what}", _ours_dmd, _theirs_dmd, exits, which))
    what = f"SiD generator, blocks of {chunks.blocks.frames}, exit at step 3 of 4"
    return [*probes, _probe("dmd", what, _ours_dmd, _theirs_dmd, chunks, "sid")]
