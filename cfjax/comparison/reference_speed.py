"""The same work for cfjax and for the PyTorch reference, ready to be timed: a few-step video, a step of two stages.

Both sides have the same weights, inputs and random draws, one clip each. What is done once (building networks,
compiling) is done by a `Side`'s maker or in its first call; what is done at every call (the text's embedding, empty
caches, zeroed gradients) is inside `Side.run`. A training step here is the loss and the gradient of every parameter;
the optimiser's update is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from cfjax.comparison.case import Case, random_weights
from cfjax.comparison.probe import Arrays, Subject, from_torch, gradients, to_torch
from cfjax.comparison.reference import NoEncoder, Reference, fit, zero_caches
from cfjax.comparison.reference_forward import reference_sizes
from cfjax.comparison.reference_losses import (
    arguments,
    batch_of,
    build_model,
    diffusion_draws,
    texts_of,
    tokens_fit,
    value_of,
)
from cfjax.comparison.reference_matching import (
    DMD_BATCH,
    DMD_FRAMES,
    RolloutSetup,
    build_dmd,
    dmd_config,
    dmd_draws,
    recorded_draws,
)
from cfjax.comparison.reference_rollout import SamplingSetup, pipeline_args, recorded_renoise, renoise_of
from cfjax.core.errors import UserError
from cfjax.core.precision import Policy
from cfjax.models.wan import Wan, WanConfig, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion
from cfjax.objectives.dmd import generator_loss
from cfjax.rollout.generate import FewStep, generate_few_step
from cfjax.rollout.stream import Pipeline, prompt_kv, stream_latents

PROMPT = "clip"
STEP_LISTS = {4: (1000, 750, 500, 250), 2: (1000, 500), 1: (1000,)}  # few-step lists of the published models
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """What both sides do.

    Attributes:
      model: sizes of every network; its precision is replaced by each side's own.
      frames, height, width: of the latents.
      blocks: the causal layout.
      steps: 4, 2 or 1.
      text_rows: rows of the prompt.
      quirks: DMD as the reference has it (Q3, Q4, Q6), or both sides without.
      seed: of weights, inputs and draws.
    """

    model: WanConfig
    frames: int = 21
    height: int = 32
    width: int = 32
    blocks: Blocks = field(default_factory=Blocks)
    steps: int = 4
    text_rows: int = 64
    quirks: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps not in STEP_LISTS:
            raise UserError(f"steps={self.steps}: use one of {', '.join(map(str, STEP_LISTS))}")
        self.blocks.spans(self.frames)
        self.model.tokens_per_frame(self.height, self.width)

    def subject(self, compute: str = "float32") -> Subject:
        """Networks, inputs and draws by name; those of all dtypes have the same numbers."""
        config = replace(self.model, precision=Policy(compute=compute))
        dit = lambda: random_weights(Wan(config, jax.random.key(self.seed)), self.seed)
        return Subject(
            Case(
                dit=dit,
                vae=None,
                text_encoder=None,
                tokenizer="",
                blocks=self.blocks,
                frames=self.frames,
                height=self.height,
                width=self.width,
                text_length=self.text_rows,
                steps=self.steps,
                seed=self.seed,
            )
        )


@dataclass(frozen=True)
class Side:
    """One implementation, ready.

    Attributes:
      run: does the work, and returns once it is done.
      arrays: of what `run` returned, by name as `comparison.probe.Probe` has them.
    """

    run: Callable[[], Any]
    arrays: Callable[[Any], Arrays]


OurMaker = Callable[[Work, str], Side]
TheirMaker = Callable[[Reference, Work, str], Side]


@dataclass(frozen=True)
class Pair:
    """A case: how each side is made for a dtype ("float32", "bfloat16")."""

    ours: OurMaker
    theirs: TheirMaker


# A few-step video


def _setup(work: Work) -> SamplingSetup:
    return SamplingSetup(work.blocks, STEP_LISTS[work.steps])


def our_stream(work: Work, compute: str) -> Side:
    """A video block after block, as `rollout.stream` makes it; no decoder."""
    subject, setup = work.subject(compute), _setup(work)
    pipeline = Pipeline(subject.student, None, FewStep(setup.steps), work.blocks)  # type: ignore[arg-type]
    start = jnp.asarray(subject.latents("noise")[:1])
    fresh = jnp.moveaxis(jnp.asarray(renoise_of(subject, setup)[:1]), 2, 0)
    count = len(setup.steps) - 1
    cut = [(start[:, a:b], fresh[:count, :, a:b]) for a, b in work.blocks.spans(work.frames)]
    text, shape = jnp.asarray(subject.text()[:1]), start.shape[2:]

    def run() -> list[jax.Array]:
        text_kv = prompt_kv(pipeline.model, text, text[0], pipeline.sampler)
        noise = lambda block, *_: cut[block]
        parts = stream_latents(pipeline, text_kv, noise, num_frames=work.frames, latent_shape=shape)
        return jax.block_until_ready(list(parts))

    return Side(run, lambda parts: {"": np.concatenate(parts, axis=1)})


def our_video(work: Work, compute: str) -> Side:
    """The same video as one program, `rollout.generate.generate_few_step`."""
    subject, setup = work.subject(compute), _setup(work)

    def sample(model: Wan, noise: jax.Array, text: jax.Array, renoise: jax.Array) -> jax.Array:
        sampler, key = FewStep(setup.steps), jax.random.key(0)
        return generate_few_step(
            model, noise, embed_text(model, text), key, sampler, work.blocks, renoise_BFJHWC=renoise
        )

    draws = (subject.latents("noise"), subject.text(), renoise_of(subject, setup))
    return _jitted(sample, (subject.student, *(jnp.asarray(x[:1]) for x in draws)), lambda x: {"": np.asarray(x)})


def their_stream(reference: Reference, work: Work, dtype: str) -> Side:
    """The same by the reference's `CausalInferencePipeline`."""
    subject, setup, kind = work.subject(), _setup(work), DTYPES[dtype]
    sizes = reference_sizes(subject, work.frames, work.blocks)
    wrapper = reference.wrapper(subject.weights(), sizes, causal=True)
    wrapper.model.to(kind)
    rows = NoEncoder({PROMPT: torch.tensor(subject.text()[:1]).to(kind)})
    with reference.quiet():
        pipeline = reference.module("pipeline.causal_inference").CausalInferencePipeline(
            pipeline_args(setup), "cpu", generator=wrapper, text_encoder=rows, vae=NoEncoder()
        )
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = subject.config.num_layers, subject.tokens_per_frame
    noise = to_torch(subject.latents("noise")[:1]).to(kind)
    draws = [x.to(kind) for x in recorded_renoise(renoise_of(subject, setup)[:1], setup)]

    def run() -> torch.Tensor:
        pipeline.kv_cache1, pipeline.crossattn_cache = zero_caches(sizes, 1, kind)
        with torch.no_grad(), reference.draws(*draws):
            return pipeline.inference(noise, [PROMPT], return_latents=True)[1]

    return Side(run, lambda latents: {"": from_torch(latents.float())})


# Training steps


def _jitted(function: Callable[..., Any], given: tuple[Any, ...], arrays: Callable[[Any], Arrays]) -> Side:
    compiled = jax.jit(function)
    return Side(lambda: jax.block_until_ready(compiled(*given)), arrays)


def _our_step(value: Callable[..., jax.Array], given: tuple[Any, ...]) -> Side:
    return _jitted(jax.value_and_grad(value), given, lambda made: {"": np.asarray(made[0])} | gradients(made[1]))


def _their_step(network: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Side:
    def run() -> torch.Tensor:
        network.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()

    def arrays(value: torch.Tensor) -> Arrays:
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
        return {"": value.float().numpy()} | {f"grad/{name}": g.float().numpy() for name, g in grads.items()}

    return Side(run, arrays)


def our_teacher_forcing(work: Work, compute: str) -> Side:
    """Stage 1's loss and gradients."""
    subject = work.subject(compute)
    draws = {name: x[:1] for name, x in diffusion_draws(subject, work.frames).items()}
    loss = ar_diffusion(DiffusionConfig(), work.blocks)
    return _our_step(*value_of(loss, "student", {"student": subject.student}, batch_of(subject, work.frames, 1), draws))


def their_teacher_forcing(reference: Reference, work: Work, dtype: str) -> Side:
    """The same by the reference's `CausalDiffusion`; timesteps in float32."""
    subject, kind = work.subject(), DTYPES[dtype]
    tokens_fit(subject, 2 * work.frames)
    sizes = reference_sizes(subject, work.frames, work.blocks)
    args = arguments(sizes, teacher_forcing=True, noise_augmentation_max_timestep=0)
    model = build_model(reference, "model.diffusion", "CausalDiffusion", sizes, args)
    network = fit(model.generator, subject.weights(), sizes).model.to(kind)
    draws = diffusion_draws(subject, work.frames)
    clip, eps = (to_torch(x[:1]).to(kind) for x in (subject.latents("clip", work.frames), draws["eps_BFHWC"]))
    index, text = torch.tensor(draws["index_BF"][:1]), texts_of(subject, 1)
    text = {name: {key: x.to(kind) for key, x in rows.items()} for name, rows in text.items()}

    def loss() -> torch.Tensor:
        with reference.draws(eps, index):
            return model.generator_loss(list(clip.shape), clean_latent=clip, **text)[0]

    return _their_step(network, loss)


def _exits(work: Work) -> RolloutSetup:
    """Every block leaves at the last step but one, where there are two."""
    last = max(work.steps - 2, 0)
    return RolloutSetup(work.blocks, steps=STEP_LISTS[work.steps], first=last, rest=last, quirks=work.quirks)


def our_dmd(work: Work, compute: str) -> Side:
    """Stage 3's generator loss and gradients: self-rollout, one critic and two teacher passes."""
    subject, exits = work.subject(compute), _exits(work)
    config, blocks = dmd_config(exits)
    models = {name: subject.role(name) for name in ("student", "critic", "real_score")}
    batch = batch_of(subject, DMD_FRAMES, DMD_BATCH)
    return _our_step(*value_of(generator_loss(config, blocks), "student", models, batch, dmd_draws(subject, exits)))


def their_dmd(reference: Reference, work: Work, dtype: str) -> Side:
    """The same by the reference's `DMD`, with the activation checkpointing that its generator needs (quirk Q6)."""
    subject, exits, kind = work.subject(), _exits(work), DTYPES[dtype]
    model = build_dmd(reference, subject, exits, dtype=kind)
    as_kind = lambda x: x.to(kind) if x.is_floating_point() else x
    draws = [as_kind(x) for x in recorded_draws(dmd_draws(subject, exits), exits)]
    text = {name: {key: x.to(kind) for key, x in rows.items()} for name, rows in texts_of(subject, DMD_BATCH).items()}
    shape = [DMD_BATCH, DMD_FRAMES, subject.config.in_dim, work.height, work.width]

    def loss() -> torch.Tensor:
        with reference.draws(*draws):
            return model.generator_loss(shape, clean_latent=None, **text)[0]

    return _their_step(model.generator.model, loss)


PAIRS: dict[str, Pair] = {
    "stream": Pair(our_stream, their_stream),
    "video": Pair(our_video, their_stream),
    "teacher_forcing": Pair(our_teacher_forcing, their_teacher_forcing),
    "dmd": Pair(our_dmd, their_dmd),
}
