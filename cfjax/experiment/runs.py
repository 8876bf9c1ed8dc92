"""Opening trained or converted models: (weights, config, world) of a run directory or an exported model."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray, as_lazy
from cfjax.core.paths import is_folder, path_of
from cfjax.core.precision import Policy
from cfjax.core.quantize import is_quantized
from cfjax.core.settings import FRAMES
from cfjax.core.tree import named_leaves
from cfjax.data.steered import keys_asked
from cfjax.experiment.checks import (
    SEEDS,
    Ask,
    Asked,
    actions_of,
    captions_of,
    check_loaded,
    check_prompt,
    check_text,
    encoder_of,
    given_of,
    latents_of,
    layout_with,
    name_of,
    seeds_of,
    sizes_of,
    video_of,
    whole,
    with_first_alone,
)
from cfjax.experiment.data import toy_source
from cfjax.experiment.lora import open_network, records_of
from cfjax.experiment.networks import load_shipped
from cfjax.experiment.pictures import check_picture, conditioned, encoded_start, picture_of
from cfjax.experiment.record import config_from_meta, read_run
from cfjax.experiment.stage import sampler_of, sampling_blocks
from cfjax.memory.slots import Memory
from cfjax.models.experts import takes_picture
from cfjax.models.steered import steered
from cfjax.models.wan import Wan, WanConfig
from cfjax.models.weight_storage import fill, with_storage_dtypes
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep, generate, network_calls
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Prompt, Text
from cfjax.rollout.stream import Pipeline, decode_step, prompt_kv, seeded_noise, stream
from cfjax.training.checkpoint import load_role
from cfjax.worlds.assets import META_FILE, asset
from cfjax.worlds.open import candidate_world_paths, find_world, open_world
from cfjax.worlds.records import config_from_record, placed_template
from cfjax.worlds.toy import ToyWorld, as_toy, shipped_world
from cfjax.worlds.wan import read_record
from cfjax.worlds.world import World, WorldParts

# (weights by name, the network's config) -> weights
Change = Callable[[Mapping[str, LazyArray], WanConfig], Mapping[str, LazyArray]]
_generate = jax.jit(generate, static_argnames=("sampler", "blocks"))


@dataclass(frozen=True)
class Run:
    """A trained generator and what it needs to generate.

    Attributes:
      model: the network; shapes in place of weights until `load_weights`, when it was opened so.
      blocks: None for a bidirectional one.
      averaged: whether the weights are the checkpoint's averaged ones.
      image_start: whether a bidirectional one is trained to go on from a clean first latent frame (Wan2.2-TI2V-5B).
      adapted: whether its checkpoint holds adapters, which are merged into the network below as it is opened.
    """

    name: str
    stage: str
    step: int
    model: Wan
    world: World
    sampler: FewStep | ManyStep
    blocks: Blocks | None
    latent_shape: tuple[int, int, int, int]
    config: ConfigDict
    averaged: bool = False
    adapted: bool = False
    image_start: bool = False

    @property
    def toy(self) -> ToyWorld:
        """The toy world.

        Raises:
          UserError: the run has another.
        """
        return as_toy(self.world, f"run={self.name!r}")

    def calls(self) -> int:
        """Network evaluations per video."""
        return network_calls(self.sampler, self.blocks, self.latent_shape[0])

    def sample(self, captions: list[str], seed: int) -> np.ndarray:
        """Videos of some captions, video_BPHWC float32 (not clipped), with the run's own sampler.

        A run that can be steered is steered as the captions say.
        """
        self._check_text_alone()
        text = jnp.asarray(self.world.encode_prompts(captions))
        negative = jnp.asarray(self.world.negative_text_SE())
        noise = jax.random.normal(jax.random.key(seed), (len(captions), *self.latent_shape))
        key = jax.random.key(seed + 1)
        sample = partial(_generate, sampler=self.sampler, blocks=self.blocks)
        model = steered(self.model, keys_asked(captions, self.latent_shape[0]))
        return np.asarray(self.world.codec.decode(sample(model, noise, text, negative, key)))

    def generate(self, captions: Sequence[str], **asked: Unpack[Asked]) -> np.ndarray:
        """Whole videos of some captions, as `cfjax generate` makes them of the same seed; arguments as `stream`.

        Returns:
          video_BPHWC, float32 (not clipped; `cfjax.to_uint8` makes pixels of it).

        Raises:
          UserError: see `stream`; a bidirectional run generates, without memory, and without given frames unless it
            is one that begins with a picture (Wan2.2-TI2V-5B, image to video).
        """
        return np.concatenate(list(self._made(captions, Ask(**asked))), axis=1)

    def stream(self, captions: Sequence[str], **asked: Unpack[Asked]) -> Iterator[np.ndarray]:
        """Videos of some captions, block after block: the pixels that `cfjax generate` makes of the same seed.

        Args:
          captions: one for each video; all other arguments by name.
          seed: of every caption's noise, or one for each, 0 to 2**32 - 1.
          frames, height, width: of the videos, in pixels; 0 is what the run was trained on.
          memory: what is remembered, a policy or its name (docs/memory.md); None: the run's own.
          negative_prompt: of a many-step sampler; "": the world's.
          given_BFHWC: latents to go on from, such as an encoded picture; their frames come first, and count.
          independent_first_frame: whether the first latent frame, such as a picture, is a block of its own.
          actions: of a run that can be steered, 1 for each key that is held in each latent frame, [F, A], or [B, F, A]
            of several captions (docs/actions.md); None: none is.
          image: a picture to begin with, [H, W, 3] or one for each caption, of the videos' size: uint8 from 0 to 255 or
            float from -1 to 1. Image-to-video networks need one; for others it is encoded and given.

        Returns:
          video_BPHWC of each block, float32 (not clipped), as soon as it is decoded.

        Raises:
          UserError: at once, for a caption that the text encoder cannot take, a seed out of range, sizes that do not
            divide, no such memory; or a bidirectional run, which makes all frames at once.
        """
        if self.blocks is None:
            raise UserError(f"run={self.name!r} is bidirectional: it makes all frames at once; use generate")
        return self._made(captions, Ask(**asked))

    def _made(self, captions: Sequence[str], ask: Ask) -> Iterator[np.ndarray]:
        """`stream`, of bidirectional runs too; everything is checked before the first block is asked for."""
        check_loaded(self.name, self.model)
        world, stride, config = self.world, self.world.codec.stride, self.model.config
        blocks = layout_with(self.blocks, self.sampler, ask, config, stride[0])
        texts = captions_of(captions, world.prompt_fault)
        check_picture(self.name, config, ask.image, ask.given_BFHWC)
        picture, size = None, [own * step for own, step in zip(self.latent_shape[1:3], stride[1:], strict=True)]
        if ask.image is not None:
            picture = picture_of(ask.image, world, ask.height or size[0], ask.width or size[1], len(texts))
            ask = ask if takes_picture(config) else replace(ask, given_BFHWC=encoded_start(picture, world))
        seeds = seeds_of(ask.seed, len(texts))
        sizes = sizes_of(ask, self.latent_shape, stride=stride, patch=config.patch, blocks=blocks)
        shape = (sizes.height, sizes.width, self.latent_shape[-1])
        given = given_of(ask.given_BFHWC, shape, len(texts), blocks, image_start=self.image_start)
        negative = jnp.asarray(self._negative(ask.negative_prompt))
        text = jnp.asarray(world.encode_prompts(texts))
        model = self.model
        if takes_picture(config) and picture is not None:
            each = np.broadcast_to(picture, (len(texts), *picture.shape[1:]))
            model = cast(Wan, conditioned(model, world, each, sizes.frames))
        keys = actions_of(ask.actions, config, len(texts), sizes.frames)
        made = stream(
            Pipeline(steered(model, keys), world.codec, self.sampler, blocks),
            prompt_kv(model, text, negative, self.sampler),
            seeded_noise(seeds),
            num_frames=sizes.generated,
            latent_shape=shape,
            batch=len(texts),
            given_BFHWC=None if given is None else jnp.asarray(given),
        )
        return (video_BPHWC for video_BPHWC, _ in made)

    def _negative(self, prompt: str) -> np.ndarray:
        """Text rows of a negative prompt; "": the world's."""
        check_text("negative_prompt", prompt, self.world.prompt_fault)
        return self.world.encode_prompts([prompt])[0] if prompt else self.world.negative_text_SE()

    def _check_text_alone(self) -> None:
        if takes_picture(self.model.config):
            raise UserError(f"run={self.name!r} is image to video: it needs a picture; use generate with image=")

    def session(
        self,
        prompt: Prompt,
        *,
        seed: int = 0,
        memory: Memory | str | None = None,
        max_frames: int = 0,
        given_BFHWC: np.ndarray | None = None,
        hold: int = 0,
        negative_prompt: str = "",
        independent_first_frame: bool = False,
        image: np.ndarray | None = None,
    ) -> Session:
        """A live stream whose prompt and memory can change between any two blocks, see `rollout.session`.

        Args:
          prompt: a text, or several with weights, [(text, weight), ...].
          memory: a policy, its name (docs/memory.md) or None, which is the run's own.
          max_frames: of a memory of everything, in latent frames; 0 is what the run was trained on.
          given_BFHWC: latents to go on from, such as an encoded picture.
          hold: how many of the latest block boundaries `seek` can go back to.
          negative_prompt: of a many-step sampler; "": the world's.
          image: a picture to begin with, [H, W, 3], see `stream`; that of an image-to-video network is beside the first
            `max_frames` latent frames, and the last of them beside all later ones.

        Raises:
          UserError: a prompt that the text encoder cannot take, no such policy or seed, or a bidirectional run.
        """
        check_loaded(self.name, self.model)
        check_picture(self.name, self.model.config, image, given_BFHWC)
        world, (frames, height, width, channels) = self.world, self.latent_shape
        if self.blocks is None:
            raise UserError(f"run={self.name!r} is bidirectional: it makes all frames at once, it has no session")
        check_prompt(prompt, world.prompt_fault)
        if not isinstance(memory, Memory | str | None):
            raise UserError(f"memory={memory!r}: give a policy or its name (docs/memory.md)")
        negative = self._negative(negative_prompt) if isinstance(self.sampler, ManyStep) else None
        blocks = with_first_alone(self.blocks, independent_first_frame)
        longest = whole("max_frames", max_frames, 0, FRAMES) or frames
        model, picture = self.model, None
        if image is not None:
            picture = picture_of(image, world, height * world.codec.stride[1], width * world.codec.stride[2], 1)
        if picture is not None and takes_picture(model.config):
            model = cast(Wan, conditioned(model, world, picture, longest))
        elif picture is not None:
            given_BFHWC = encoded_start(picture, world)
        given = given_of(given_BFHWC, (height, width, channels), 1, blocks)
        return Session(
            Pipeline(model, world.codec, self.sampler, blocks),
            Text(encoder_of(world.encode_prompts, world.prompt_fault), negative),
            prompt,
            latent_shape=(height, width, channels),
            seed=whole("seed", seed, 0, SEEDS - 1),
            memory=memory,
            max_frames=longest,
            given_BFHWC=None if given is None else jnp.asarray(given),
            hold=whole("hold", hold, 0, FRAMES),
        )

    def encode(self, video: np.ndarray) -> np.ndarray:
        """latents_BFHWC, float32, of pixels: [P, H, W, 3], or [B, P, H, W, 3] of several clips.

        Args:
          video: uint8 from 0 to 255, or float from -1 to 1; a picture is a video of one frame.

        Raises:
          UserError: another shape or range, or sizes that the codec does not take.
        """
        pixels = video_of(video, self.world.codec)
        return np.asarray(self.world.open_encoder()(jnp.asarray(pixels)), np.float32)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """video_BPHWC, float32 (not clipped), of latents [F, H, W, C], or [B, F, H, W, C] of several clips.

        Raises:
          UserError: another shape.
        """
        array, codec = latents_of(latents, self.world.codec), self.world.codec
        video_BPHWC, _ = decode_step(codec, jnp.asarray(array), codec.init_state(len(array)))
        return np.asarray(video_BPHWC)


def open_run(
    name: str | os.PathLike[str],
    *,
    ema: bool = True,
    world: str = "",
    parts: WorldParts = WorldParts(),
    with_model: bool = True,
    stage: str = "",
    block_frames: int = 0,
    precision: str = "",
    attention: str = "",
    storage: str = "",
) -> Run:
    """Opens a run directory (trained, or written by `cfjax convert`) or an exported model (a path, or a shipped name).

    Args:
      ema: averaged weights, when the run keeps them.
      world: a Wan world's folder; "": beside the run, or the recorded path.  parts: which parts are read.
      with_model: False leaves the network's weights on disk, for `load_weights`: text and network then need not fit
        into memory together.
      stage, block_frames: required of the run; "" and 0 accept any.
      precision, attention: of the network, in place of the run's own.
      storage: what its weights rest in, see `models.weight_storage`: "int8" is half of bfloat16's memory; "": the
        dtype that they are multiplied in.

    Raises:
      UserError: nothing there, another stage or block size, an unknown storage, no world, or one that it was not
        trained in.
    """
    name = name_of(name)
    exported = asset(name, META_FILE)
    if exported is None and not is_folder(path_of(name)):
        raise UserError(f"run={name!r}: no such run directory, and no shipped teacher of that name")
    meta = read_run(name)
    c = config_from_meta(meta)
    blocks = sampling_blocks(c)
    _check_asked(name, meta, blocks, stage, block_frames)
    opened_world = _opened_world(name, meta, c, world, parts)
    if not exported and meta["world"] and meta["world"] != opened_world.fingerprint():
        raise UserError(f"run={name!r} was trained in another world than {opened_world.folder} now holds")
    network = _network(name, meta, precision, attention)
    _check_world(name, network, opened_world)
    run = Run(
        name=name,
        stage=meta["stage"],
        step=int(meta["step"]),
        model=_template(network, storage),
        world=opened_world,
        sampler=sampler_of(c),
        blocks=blocks,
        latent_shape=tuple(meta["latent_shape"]),
        config=c,
        averaged=not exported and ema and "student" in c.ema,
        image_start=bool(meta.get("image_start", False)),
        adapted=not exported and "student" in records_of(meta, name),
    )
    return load_weights(run) if with_model else run


def load_weights(run: Run, change: Change | None = None) -> Run:
    """The run with the weights that its checkpoint has for the shapes of its network.

    Args:
      change: of the checkpoint's weights (by name, as they are stored, not yet read) before they get the dtype that
        they are used in.

    Raises:
      UserError: they do not fit, or cannot be read.
    """
    quantised = any(map(is_quantized, jax.tree.leaves(run.model, is_leaf=is_quantized)))
    if change or run.adapted or quantised:
        arrays: Mapping[str, LazyArray]
        if asset(run.name, META_FILE):
            arrays = as_lazy(named_leaves(load_shipped(run.name, run.model)))
        else:
            arrays = open_network(run.name, "student", ema=run.averaged)
        model = fill(run.model, change(arrays, run.model.config) if change else arrays)
    elif asset(run.name, META_FILE):
        model = jax.tree.map(lambda x, like: x.astype(like.dtype), load_shipped(run.name, run.model), run.model)
    else:
        model = load_role(run.name, "student", run.model, ema=run.averaged)
    return replace(run, model=model)


def _opened_world(name: str, meta: Mapping[str, Any], c: ConfigDict, given: str, parts: WorldParts) -> World:
    """The world of a run, opened: an exported model's own, the toy's that its config describes, or Wan's."""
    if asset(name, META_FILE):
        return shipped_world(name)
    if c.data.source:
        return toy_source(c).world(keep=False)
    return open_world(_find_world(path_of(name), meta, given), parts)


def _check_asked(name: str, meta: Mapping[str, Any], blocks: Blocks | None, stage: str, block_frames: int) -> None:
    """Raises UserError unless the run is of the requested kind."""
    if stage and meta["stage"] != stage:
        raise UserError(f"run={name!r} holds stage {meta['stage']!r}, not stage={stage!r}; name another run")
    if block_frames and (blocks is None or blocks.frames != block_frames):
        found = f"generates blocks of {blocks.frames}" if blocks else "is bidirectional"
        raise UserError(f"run={name!r} {found}, not block_frames={block_frames}; name another run")


def _check_world(name: str, network: WanConfig, world: World) -> None:
    """Raises UserError unless network, codec and text encoder are made for the same latents and text rows."""
    latents, rows = world.codec.latent_channels, world.text_width
    takes = network.out_dim if takes_picture(network) else network.in_dim
    if (takes, network.out_dim) != (latents, latents):
        raise UserError(
            f"run={name!r} takes latents of {network.in_dim} channels and makes {network.out_dim}, the codec of"
            f" {world.folder} has {latents}; name the world that it was trained in by --config.world"
        )
    if network.text_dim != rows:
        raise UserError(
            f"run={name!r} is made for text rows of {network.text_dim} channels, the text encoder of {world.folder}"
            f" has {rows}; name the world that it was trained in by --config.world"
        )


def _network(name: str, meta: Mapping[str, Any], precision: str, attention: str) -> WanConfig:
    """The sizes that the checkpoint records, for inference."""
    if "student" not in meta["models"]:
        raise UserError(f"run={name!r}: its record has no student")
    config = config_from_record(WanConfig, meta["models"]["student"], name)
    policy = Policy(precision, config.precision.norm) if precision else config.precision
    return replace(config, remat="none", precision=policy, attention=attention or config.attention)


def _template(config: WanConfig, storage: str) -> Wan:
    """The network's shapes, each in the dtype that its weights rest in; "": that they are used in."""
    template = placed_template(lambda: Wan(config, jax.random.key(0)))
    return with_storage_dtypes(template, storage or config.precision.compute, config.precision.compute)


def _find_world(run: Path, meta: Mapping[str, Any], given: str) -> Path:
    """The folder of a run's Wan world: the given one, or its own."""
    if given:
        read_record(given)
        return path_of(given)
    recorded = str(meta.get("world_path", ""))
    found = find_world(run, recorded)
    if found and not meta["world"] and not found.resolve().is_relative_to(run.resolve()):
        raise UserError(f"run={str(run)!r} does not say what world {found} should be; if it is, --config.world={found}")
    if found:
        return found
    looked = ", ".join(map(str, candidate_world_paths(run, recorded)))
    raise UserError(f"run={str(run)!r} has no Wan world ({looked}); name one with --config.world=FOLDER")
