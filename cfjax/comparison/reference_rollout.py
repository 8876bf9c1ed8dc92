"""Probes of the reference's samplers: few-step and many-step against KV caches, windows, sinks, frames given first."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cfjax.comparison.probe import BATCH, Arrays, NotInReference, Probe, Subject, from_torch, to_torch
from cfjax.comparison.reference import NoEncoder, Reference, Sizes, dense_attention, zero_caches
from cfjax.comparison.reference_forward import reference_sizes
from cfjax.models.cache import init_cache, visible_frames, write
from cfjax.models.wan import FrameKV, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep, generate_few_step, generate_many_step

PROMPTS = [f"clip {i}" for i in range(BATCH)]
NEGATIVE = "nothing"


@dataclass(frozen=True)
class SamplingSetup:
    """One way of sampling: the layout, the few-step lists, and how many frames are given first."""

    blocks: Blocks
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int, ...] = ()
    given: int = 0


def _rows(subject: Subject) -> dict[str, torch.Tensor]:
    text = {prompt: torch.tensor(subject.text()[i : i + 1]) for i, prompt in enumerate(PROMPTS)}
    return text | {NEGATIVE: torch.tensor(subject.negative_text[None])}


def _sizes(subject: Subject, roll: SamplingSetup) -> Sizes:
    return reference_sizes(subject, subject.case.frames + roll.given, roll.blocks)


def pipeline_args(roll: SamplingSetup) -> SimpleNamespace:
    """The reference's config, as far as its samplers read it."""
    return SimpleNamespace(
        denoising_step_list=list(roll.steps), denoising_step_list_first_chunk=list(roll.first_steps) or None,
        warp_denoising_step=True, context_noise=0, independent_first_frame=False,
        num_frame_per_block=roll.blocks.frames, num_train_timestep=1000, timestep_shift=5.0,
        guidance_scale=3.0, negative_prompt=NEGATIVE,
    )  # fmt: skip


def renoise_of(subject: Subject, roll: SamplingSetup) -> np.ndarray:
    """Fresh noise between the steps, [B, F, J, H, W, C]."""
    count = max(len(roll.steps), len(roll.first_steps)) - 1
    return np.stack([subject.latents(f"renoise {j}") for j in range(max(count, 1))], axis=2)


def recorded_renoise(renoise: np.ndarray, roll: SamplingSetup) -> Iterator[torch.Tensor]:
    """The same noise in the order and the shapes in which the pipeline asks for it."""
    for number, (start, stop) in enumerate(roll.blocks.spans(renoise.shape[1])):
        steps = roll.first_steps if number == 0 and roll.first_steps else roll.steps
        for j in range(len(steps) - 1):
            yield to_torch(renoise[:, start:stop, j]).flatten(0, 1)


def _given(subject: Subject, roll: SamplingSetup) -> np.ndarray | None:
    return subject.latents("given", roll.given) if roll.given else None


def _theirs_few(reference: Reference, subject: Subject, roll: SamplingSetup) -> Arrays:
    pipelines = reference.module("pipeline.causal_inference")
    sizes = _sizes(subject, roll)
    wrapper = reference.wrapper(subject.weights(), sizes, causal=True)
    rows = NoEncoder(_rows(subject))
    with reference.quiet():
        pipeline = pipelines.CausalInferencePipeline(
            pipeline_args(roll), "cpu", generator=wrapper, text_encoder=rows, vae=NoEncoder()
        )
    if roll.first_steps and not hasattr(pipeline, "denoising_step_list_first_chunk"):
        raise NotInReference(f"not in this clone ({reference.name}): a step list of its own for the first block")
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = subject.config.num_layers, subject.tokens_per_frame
    given, noise, renoise = _given(subject, roll), subject.latents("noise"), renoise_of(subject, roll)
    latents = []
    # The reference converts the flow of several given frames with one level per clip: it takes them one clip at a time.
    size = 1 if roll.given else BATCH
    for i in range(0, BATCH, size):
        clips = slice(i, i + size)
        pipeline.kv_cache1, pipeline.crossattn_cache = zero_caches(sizes, size)
        with torch.no_grad(), reference.draws(*recorded_renoise(renoise[clips], roll)):
            _, made = pipeline.inference(
                to_torch(noise[clips]), PROMPTS[clips], return_latents=True,
                initial_latent=None if given is None else to_torch(given[clips]),
            )  # fmt: skip
        latents.append(from_torch(made))
    return {"": np.concatenate(latents)}


def _ours_few(subject: Subject, roll: SamplingSetup) -> Arrays:
    sampler = FewStep(steps=roll.steps, first_steps=roll.first_steps)
    given = _given(subject, roll)

    def sample(model: Any, noise: jax.Array, text: jax.Array, renoise: jax.Array, given: Any) -> jax.Array:
        text_kv, key = embed_text(model, text), jax.random.key(0)
        return generate_few_step(
            model, noise, text_kv, key, sampler, roll.blocks, renoise_BFJHWC=renoise, given_BFHWC=given
        )

    draws = (subject.latents("noise"), subject.text(), renoise_of(subject, roll))
    return {"": np.asarray(jax.jit(sample)(subject.student, *draws, given))}


def _theirs_many(reference: Reference, subject: Subject, roll: SamplingSetup) -> Arrays:
    pipelines = reference.module("pipeline.causal_diffusion_inference")
    sizes = _sizes(subject, roll)
    wrapper = reference.wrapper(subject.weights(), sizes, causal=True)
    with reference.quiet():
        pipeline = pipelines.CausalDiffusionInferencePipeline(
            pipeline_args(roll), "cpu",
            generator=wrapper, text_encoder=NoEncoder(_rows(subject)), vae=NoEncoder(),
        )  # fmt: skip
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = subject.config.num_layers, subject.tokens_per_frame
    pipeline.sampling_steps = subject.case.steps
    pipeline.kv_cache_pos, pipeline.crossattn_cache_pos = zero_caches(sizes, BATCH)
    pipeline.kv_cache_neg, pipeline.crossattn_cache_neg = zero_caches(sizes, BATCH)
    with torch.no_grad(), reference.draws():
        _, latents = pipeline.inference(to_torch(subject.latents("noise")), PROMPTS, return_latents=True)
    return {"": from_torch(latents)}


def _ours_many(subject: Subject, roll: SamplingSetup) -> Arrays:
    sampler = ManyStep(steps=subject.case.steps)

    def sample(model: Any, noise: jax.Array, text: jax.Array, negative: jax.Array) -> jax.Array:
        unwanted = embed_text(model, jnp.broadcast_to(negative[None], text.shape))
        return generate_many_step(model, noise, embed_text(model, text), unwanted, sampler, roll.blocks)

    args = (subject.latents("noise"), subject.text(), subject.negative_text)
    return {"": np.asarray(jax.jit(sample)(subject.student, *args))}


def _theirs_seen(reference: Reference, subject: Subject, roll: SamplingSetup) -> Arrays:
    """Frames that the last call of every block attends to, recognised by their keys in the first layer."""
    seen: list[np.ndarray] = []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen.append(k.unflatten(1, (-1, subject.tokens_per_frame)).numpy().copy())
        return dense_attention(q, k, v, **rest)

    with mock.patch.object(reference.module("wan.modules.causal_model"), "attention", watched):
        _theirs_few(reference, subject, roll)
    calls = seen[:: subject.config.num_layers]
    spans = roll.blocks.spans(subject.case.frames)
    every = len(roll.steps) + 1
    assert len(calls) == every * len(spans)
    matrix = np.zeros((len(spans), subject.case.frames), np.int32)
    frames: list[np.ndarray] = []
    for number, keys in enumerate(calls[every - 1 :: every]):
        frames += [keys[:, i] for i in range(keys.shape[1] - roll.blocks.frames, keys.shape[1])]
        for i in range(keys.shape[1]):
            matrix[number, [np.array_equal(keys[:, i], frame) for frame in frames].index(True)] += 1
    return {"": matrix}


def _ours_seen(subject: Subject, roll: SamplingSetup) -> Arrays:
    case, config = subject.case, subject.config
    cache = init_cache(config, 1, case.frames, 1, roll.blocks)
    spans = roll.blocks.spans(case.frames)
    matrix = np.zeros((len(spans), case.frames), np.int32)
    for number, (start, stop) in enumerate(spans):
        held = np.asarray(cache.frame_F)[
            np.asarray(visible_frames(cache, jnp.int32(start), jnp.int32(stop), roll.blocks))
        ]
        matrix[number, [*held, *range(start, stop)]] += 1
        nothing = jnp.zeros((config.num_layers, 1, stop - start, 1, config.num_heads, config.head_dim))
        cache = write(cache, FrameKV(nothing, nothing), jnp.int32(start), stop - start, roll.blocks)
    return {"": matrix}


def _windows(frames: int) -> list[Blocks]:
    """Windows that evict within so many frames, with and without a sink."""
    layouts = [
        Blocks(1, window=3),
        Blocks(1, window=3, sink=1),
        Blocks(2, window=4, sink=1),
        Blocks(3, window=5, sink=2),
    ]
    return [blocks for blocks in layouts if frames % blocks.frames == 0 and blocks.window < frames]


def _few(what: str, roll: SamplingSetup) -> Probe:
    return Probe("rollout", what, lambda s: _ours_few(s, roll), lambda r, s: _theirs_few(r, s, roll))


def rollout_probes(subject: Subject) -> list[Probe]:
    """Cached few-step and many-step sampling."""
    probes = []
    for blocks in subject.blocks(subject.case.frames):
        size = f"blocks of {blocks.frames}"
        probes.append(_few(f"few-step, {size}", SamplingSetup(blocks)))
        few = SamplingSetup(blocks, steps=(1000, 500), first_steps=(1000, 750, 500, 250))
        probes.append(_few(f"2 steps, first block 4, {size}", few))
        probes.append(
            _few(f"few-step, {blocks.frames} frames given, {size}", SamplingSetup(blocks, given=blocks.frames))
        )
    for blocks in subject.blocks(subject.case.frames):
        roll = SamplingSetup(blocks)
        what = f"many-step (UniPC {subject.case.steps}, guidance 3), blocks of {blocks.frames}"
        ours, theirs = lambda s, r=roll: _ours_many(s, r), lambda f, s, r=roll: _theirs_many(f, s, r)
        probes.append(Probe("rollout", what, ours, theirs))
    return probes


def window_probes(subject: Subject) -> list[Probe]:
    """Local attention: which frames every block sees, and what comes out."""
    probes = []
    for blocks in _windows(subject.case.frames):
        roll = SamplingSetup(blocks, steps=(1000, 500))
        what = f"blocks of {blocks.frames}, window {blocks.window}, sink {blocks.sink}"
        seen, seen_theirs = lambda s, r=roll: _ours_seen(s, r), lambda f, s, r=roll: _theirs_seen(f, s, r)
        probes.append(Probe("window", f"frames seen, {what}", seen, seen_theirs, tolerance=0.0))
        few, few_theirs = lambda s, r=roll: _ours_few(s, r), lambda f, s, r=roll: _theirs_few(f, s, r)
        probes.append(Probe("window", f"few-step, {what}", few, few_theirs))
    return probes
