"""Probes of the reference's distribution matching: self-rollouts (DMD, critic, SiD), and CausVid's noised clips."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cfjax.comparison.probe import Arrays, NotInReference, Probe, Subject, to_torch
from cfjax.comparison.reference import Reference, fit, zero_caches
from cfjax.comparison.reference_codec import FadingCodec, FadingVAE
from cfjax.comparison.reference_forward import STEPS, reference_sizes
from cfjax.comparison.reference_losses import (
    arguments,
    batch_of,
    build_model,
    our_loss,
    probe_of,
    texts_of,
    their_loss,
    tokens_fit,
)
from cfjax.flow.schedule import score_sigma, sigma_table, warp_steps
from cfjax.nn.visibility import Blocks
from cfjax.objectives.dmd import DMDConfig, critic_loss, generator_loss
from cfjax.objectives.sid import generator_loss as sid_loss
from cfjax.rollout.long_video import LongVideo
from cfjax.rollout.self_forcing import SelfForcing

CONTEXT_NOISE = float(sigma_table(1000, 5.0)[-1])  # what add_noise at t = 0 adds (quirk Q4)
# The reference rolls out 21 frames, whatever it is given (quirk Q37), of one clip at a time: its cache refresh
# multiplies [B, F] by [B F].
DMD_FRAMES, DMD_BATCH = 21, 1


@dataclass(frozen=True)
class RolloutSetup:
    """One self-rollout: layout, step lists, the exit step of the first block and of the others, score draws k.

    Without `quirks` the reference is patched without Q3, Q4 and Q6, and ours are off. `frames` are rolled out, of
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


def dmd_draws(subject: Subject, exits: RolloutSetup) -> dict[str, np.ndarray]:
    """Random numbers of one loss with self-rollout, as ours take them (`objectives.dmd.draw`)."""
    count = len(exits.blocks.spans(exits.max_frames))
    steps = max(len(exits.steps), len(exits.first_steps))
    latents = lambda name, frames=exits.max_frames: subject.latents(name, frames)[:DMD_BATCH]
    score_u = np.full((DMD_BATCH,), exits.score_k / 1000.0, np.float32)
    return {
        "noise_BFHWC": latents("noise"),
        "renoise_BFJHWC": np.stack([latents(f"renoise {j}") for j in range(max(steps - 1, 1))], axis=2),
        "context_BFHWC": latents("context"),
        "exit_G": np.array([exits.first] + [exits.rest] * (count - 1), np.int32),
        "score_sigma_B": np.asarray(score_sigma(score_u, 5.0, 0.02, 0.98)),
        "score_eps_BFHWC": latents("score eps", DMD_FRAMES),
        "count": np.array(len(exits.blocks.spans(exits.frames)), np.int32),
    }


def recorded_draws(draws: dict[str, np.ndarray], exits: RolloutSetup) -> Iterator[torch.Tensor]:
    """The same draws in the order and the shapes in which the reference asks for them."""
    spans = exits.blocks.spans(exits.frames)
    yield torch.tensor([len(spans)])
    yield to_torch(draws["noise_BFHWC"][:, : exits.frames])
    if exits.first_steps:
        yield torch.tensor([exits.first])
        yield torch.full((len(spans) - 1,), exits.rest)
    else:
        yield torch.full((len(spans),), exits.rest)
    for (start, stop), last in zip(spans, draws["exit_G"], strict=False):
        for j in range(last):
            yield to_torch(draws["renoise_BFJHWC"][:, start:stop, j]).flatten(0, 1)
        yield to_torch(draws["context_BFHWC"][:, start:stop]).flatten(0, 1)
    yield torch.full((DMD_BATCH, 1), exits.score_k)
    yield to_torch(draws["score_eps_BFHWC"])


def dmd_config(exits: RolloutSetup) -> tuple[DMDConfig, Blocks]:
    """What our losses need to do the same."""
    levels = lambda steps: tuple(map(float, warp_steps(steps, 5.0))) if steps else ()
    rolled = SelfForcing(levels(exits.steps), levels(exits.first_steps))
    config = DMDConfig(rolled)
    if exits.quirks:
        rolled = replace(rolled, context_noise=CONTEXT_NOISE, kv_gradient="straight_through")
        config = DMDConfig(rolled, score_table_shift=8.0)
    blocks = exits.blocks
    if exits.max_frames > DMD_FRAMES:  # where the reference's attention looks back 21 frames
        config = replace(config, long=LongVideo(DMD_FRAMES, exits.max_frames))
        blocks = replace(blocks, window=DMD_FRAMES)
    return config, blocks


def _ours_dmd(subject: Subject, exits: RolloutSetup, which: str) -> Arrays:
    config, blocks = dmd_config(exits)
    make: Any = {"dmd": generator_loss, "sid": sid_loss, "critic": critic_loss}[which]
    role = "critic" if which == "critic" else "student"
    models: dict[str, Any] = {name: subject.role(name) for name in ("student", "critic", "real_score")}
    models["codec"] = FadingCodec(subject.config.in_dim)
    batch, draws = batch_of(subject, DMD_FRAMES, DMD_BATCH), dmd_draws(subject, exits)
    return our_loss(make(config, blocks), role, models, batch, draws)


def build_dmd(
    reference: Reference, subject: Subject, exits: RolloutSetup, which: str = "dmd", dtype: torch.dtype = torch.float32
) -> Any:
    """The reference's DMD (or SiD) with the subject's networks in `dtype`; every loss starts from empty caches."""
    sizes = reference_sizes(subject, DMD_FRAMES, exits.blocks)
    args = arguments(
        sizes, denoising_step_list=list(exits.steps), denoising_step_list_first_chunk=list(exits.first_steps) or None,
        same_step_across_blocks=True, last_step_only=False, num_training_frames=exits.max_frames, context_noise=0,
        ts_schedule=False, denoising_loss_type="flow",
    )  # fmt: skip
    module, name = ("model.sid", "SiD") if which == "sid" else ("model.dmd", "DMD")
    model = build_model(reference, module, name, sizes, args)
    model.vae, model.dtype = FadingVAE(), dtype
    model.num_training_frames, model.min_score_timestep = exits.max_frames, 0  # SiD leaves them out (quirk Q24)
    if exits.first_steps and not hasattr(model, "denoising_step_list_first_chunk"):
        raise NotInReference(f"not in this clone ({reference.name}): a step list of its own for the first block")
    for network, name in ((model.generator, "student"), (model.fake_score, "critic"), (model.real_score, "real_score")):
        fit(network, subject.weights(name), sizes).model.to(dtype)
    # Without recomputation the reference's cache writes make its backward pass fail (quirk Q6).
    model.generator.model.gradient_checkpointing = True
    model._initialize_inference_pipeline()
    pipeline = model.inference_pipeline
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = subject.config.num_layers, sizes.tokens_per_frame
    own: list[dict[str, torch.Tensor]] = []

    def empty(**_: Any) -> None:
        own[:], pipeline.crossattn_cache = zero_caches(replace(sizes, frames=exits.max_frames), DMD_BATCH, dtype)
        pipeline.kv_cache1 = own

    pipeline._initialize_kv_cache, pipeline._initialize_crossattn_cache = empty, lambda **_: None
    if not exits.quirks:
        _without_quirks(model, own)
    return model


def _theirs_dmd(reference: Reference, subject: Subject, exits: RolloutSetup, which: str) -> Arrays:
    model = build_dmd(reference, subject, exits, which)
    compute: Callable[..., Any] = model.critic_loss if which == "critic" else model.generator_loss
    shape = [DMD_BATCH, DMD_FRAMES, subject.config.in_dim, subject.case.height, subject.case.width]
    with reference.draws(*recorded_draws(dmd_draws(subject, exits), exits)):
        loss, _ = compute(shape, clean_latent=None, **texts_of(subject, DMD_BATCH))
        return their_loss(loss, (model.fake_score if which == "critic" else model.generator).model)


def _without_quirks(model: Any, caches: list[dict[str, torch.Tensor]]) -> None:
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


def _causvid_draws(subject: Subject, blocks: Blocks) -> dict[str, np.ndarray]:
    """The blocks' levels run through the list."""
    spans = enumerate(blocks.spans(DMD_FRAMES))
    levels = np.concatenate([np.full(stop - start, number % len(STEPS)) for number, (start, stop) in spans])
    score = dmd_draws(subject, RolloutSetup(blocks))
    return {
        "noise_BFHWC": score["noise_BFHWC"],
        "level_BF": np.broadcast_to(levels[None], (DMD_BATCH, DMD_FRAMES)).astype(np.int32),
        "score_sigma_B": score["score_sigma_B"],
        "score_eps_BFHWC": score["score_eps_BFHWC"],
    }


def _ours_causvid(subject: Subject, blocks: Blocks, forcing: str, which: str) -> Arrays:
    rolled = SelfForcing(tuple(map(float, warp_steps(STEPS, 5.0))))
    config = DMDConfig(rolled, student_input="noised_data", forcing=forcing, score_table_shift=8.0)
    make: Any = critic_loss if which == "critic" else generator_loss
    role = "critic" if which == "critic" else "student"
    models = {name: subject.role(name) for name in ("student", "critic", "real_score")}
    batch, draws = batch_of(subject, DMD_FRAMES, DMD_BATCH), _causvid_draws(subject, blocks)
    return our_loss(make(config, blocks), role, models, batch, draws)


def _theirs_causvid(reference: Reference, subject: Subject, blocks: Blocks, forcing: str, which: str) -> Arrays:
    tokens_fit(subject, DMD_FRAMES * (2 if forcing == "teacher" else 1))
    sizes = reference_sizes(subject, DMD_FRAMES, blocks)
    args = arguments(
        sizes, denoising_step_list=list(STEPS), teacher_forcing=forcing == "teacher", denoising_loss_type="flow",
        num_training_frames=DMD_FRAMES,
    )  # fmt: skip
    model = build_model(reference, "model.causvid", "CausVid", sizes, args)
    model.denoising_loss_func = reference.module("utils.loss").get_denoising_loss("flow")()  # left out (quirk Q24)
    for network, name in ((model.generator, "student"), (model.fake_score, "critic"), (model.real_score, "real_score")):
        fit(network, subject.weights(name), sizes)
    draws = _causvid_draws(subject, blocks)
    noise, levels = to_torch(draws["noise_BFHWC"]), torch.tensor(draws["level_BF"]).long()
    score = torch.full((DMD_BATCH, 1), RolloutSetup(blocks).score_k), to_torch(draws["score_eps_BFHWC"])
    compute: Callable[..., Any] = model.critic_loss if which == "critic" else model.generator_loss
    clip = to_torch(subject.latents("clip", DMD_FRAMES)[:DMD_BATCH])
    with reference.draws(*[noise] * len(STEPS), levels, *score):
        loss, _ = compute(list(clip.shape), clean_latent=clip, **texts_of(subject, DMD_BATCH))
        return their_loss(loss, (model.fake_score if which == "critic" else model.generator).model)


def causvid_probes(subject: Subject) -> list[Probe]:
    """Distribution matching on noised clips, a level per block: generator and critic; generator given clean pasts."""
    blocks = subject.blocks(DMD_FRAMES)[0]
    cases = (("diffusion", "dmd", "generator"), ("diffusion", "critic", "critic"), ("teacher", "dmd", "generator"))
    return [
        probe_of(
            "dmd", f"CausVid {name}, {forcing} forcing, blocks of {blocks.frames}",
            _ours_causvid, _theirs_causvid, blocks, forcing, which,
        )
        for forcing, which, name in cases
    ]  # fmt: skip


def dmd_probes(subject: Subject) -> list[Probe]:
    """Distribution matching: generator and critic, at inner levels and at the bounds, with a first-block list; SiD."""
    probes = []
    chunks = RolloutSetup(subject.blocks(DMD_FRAMES)[0])
    frames = RolloutSetup(Blocks(frames=1), steps=(1000, 500), first_steps=STEPS, first=3, rest=1)
    upper = RolloutSetup(chunks.blocks, first=0, rest=0, score_k=970)
    lower = RolloutSetup(chunks.blocks, first=0, rest=0, score_k=2)
    without = replace(chunks, quirks=False)
    size = chunks.blocks.frames
    long = replace(chunks, frames=DMD_FRAMES + size, max_frames=DMD_FRAMES + 2 * size)
    for which, name in (("dmd", "DMD generator"), ("critic", "critic")):
        for exits, what in (
            (chunks, f"blocks of {chunks.blocks.frames}, exit at step 3 of 4"),
            (upper, f"blocks of {chunks.blocks.frames}, exit at step 1, score level 0.98"),
            (lower, f"blocks of {chunks.blocks.frames}, exit at step 1, score level 0.02"),
            (frames, "blocks of 1, 2 steps, first block 4"),
            (without, f"blocks of {chunks.blocks.frames}, without the quirks"),
            (long, f"blocks of {size}, the end of {long.frames} frames"),
        ):
            probes.append(probe_of("dmd", f"{name}, {what}", _ours_dmd, _theirs_dmd, exits, which))
    what = f"SiD generator, blocks of {chunks.blocks.frames}, exit at step 3 of 4"
    return [*probes, probe_of("dmd", what, _ours_dmd, _theirs_dmd, chunks, "sid"), *causvid_probes(subject)]
