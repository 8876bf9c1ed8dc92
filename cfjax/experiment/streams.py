"""What `cfjax bench` streams: a run's network and world, or random weights of a preset's sizes with random parts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.core.precision import Policy
from cfjax.core.tree import map_named
from cfjax.experiment.job import blocks_of, sampler_of
from cfjax.experiment.runs import Run, open_run
from cfjax.experiment.speed import NoDecoder, Stream
from cfjax.models import umt5, wan
from cfjax.models.codec import Codec, PatchCodec
from cfjax.models.experts import blank_picture, takes_picture
from cfjax.models.tiny_vae import make_tiny_vae, published_tiny_vae
from cfjax.models.umt5 import encode_by_layer
from cfjax.models.vae import make_vae, published_vae
from cfjax.models.wan import Wan
from cfjax.models.weight_storage import with_storage_dtypes
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, layout_of
from cfjax.rollout.sizes import Sizes, latent_sizes, pixel_frames
from cfjax.rollout.stream import Pipeline
from cfjax.worlds.world import World, WorldParts

DECODERS = ("vae", "tiny_vae", "toy", "none")
# Frames, height, width of latents where the config names none: the toy's; Wan's by their channels.
TOY_LATENTS, WAN_LATENTS = (9, 4, 4), {16: (21, 60, 104), 48: (31, 44, 80)}
TOY_SIDE = 8  # pixels of a patch


@dataclass(frozen=True)
class Opened:
    """A stream, and what a record says of it.

    Attributes:
      decoder: its name; "none" where latents are handed on.
      encode_prompt: the text encoder's work for a prompt; None if it is not asked for.
    """

    stream: Stream
    name: str
    decoder: str
    encode_prompt: Callable[[], np.ndarray] | None


@dataclass(frozen=True)
class _RandomWorld:
    """The parts of a world that a stream needs."""

    codec: Codec
    text_length: int
    text_width: int


def open_stream(c: ConfigDict) -> Opened:
    """The stream of a config like `configs/bench.py`.

    Raises:
      UserError: there is no such run, preset or decoder, or the sizes do not fit.
    """
    if c.decoder not in ("", *DECODERS):
        raise UserError(f"--config.decoder={c.decoder!r}: use {', '.join(DECODERS)}")
    run = _opened_run(c) if c.run else random_run(random_parts_of(c), c)
    sampler = sampler_of(c, run)
    blocks = layout_of(sampler, blocks_of(c, run.blocks))
    sizes = sizes_of(c, run, blocks)
    codec: Any = NoDecoder() if c.decoder == "none" else run.world.codec
    rows = np.random.default_rng(c.seed).standard_normal((c.batch, run.world.text_length, run.world.text_width))
    text = rows.astype(np.float32)
    pipeline = Pipeline(with_blank(run.model, sizes), codec, sampler, blocks)
    decoder = c.decoder or ("toy" if isinstance(codec, PatchCodec) else "vae")
    return Opened(Stream(pipeline, text, text[0], sizes), run.name, decoder, _prompt_encoder(c, run))


def sizes_of(c: ConfigDict, run: Run, blocks: Blocks | None) -> Sizes:
    """The sizes that a config asks for; 0 is the run's own.

    Raises:
      UserError: codec, patches or blocks do not divide them.
    """
    frames, height, width, _ = run.latent_shape
    stride = run.world.codec.stride
    return latent_sizes(
        c.frames or pixel_frames(frames, stride[0]),
        c.height or height * stride[1],
        c.width or width * stride[2],
        stride=stride,
        patch=run.model.config.patch,
        blocks=blocks,
    )


def with_blank(model: Any, sizes: Sizes) -> Any:
    """The network; one that takes a picture with one of zeros."""
    if not takes_picture(model.config):
        return model
    shape = (sizes.frames, sizes.height, sizes.width, model.config.out_dim)
    blank = partial(blank_picture, latent_shape=shape)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        return jax.eval_shape(blank, model)
    return blank(model)


def _opened_run(c: ConfigDict) -> Run:
    decoder = c.decoder if c.decoder in ("vae", "tiny_vae") else "vae"
    parts = WorldParts(decoder=decoder, decoder_precision=c.decoder_precision, with_text=c.text)
    return open_run(
        c.run,
        ema=c.ema,
        world=c.world,
        parts=parts,
        precision=c.precision,
        attention=c.attention,
        storage=c.storage,
    )


@dataclass(frozen=True)
class RandomParts:
    """A network of a preset's sizes and what is around it, where there is no run; "" is the preset's own.

    Attributes:
      decoder: "vae", "tiny_vae", "toy", or "".
      block_frames: latent frames of a block.
    """

    preset: str
    precision: str = ""
    storage: str = ""
    attention: str = ""
    decoder: str = ""
    decoder_precision: str = ""
    text_rows: int = 512
    block_frames: int = 3
    seed: int = 0

    @property
    def toy(self) -> bool:
        """Whether it is the toy's."""
        return self.preset == "toy"


def random_parts_of(c: ConfigDict) -> RandomParts:
    """The part of a config like `configs/bench.py` that says so."""
    named = {name: c[name] for name in RandomParts.__dataclass_fields__}
    return RandomParts(**{**named, "decoder": "" if c.decoder == "none" else c.decoder})


def random_run(parts: RandomParts, config: ConfigDict, *, shapes: bool = False) -> Run:
    """A run that never was: the preset's network, few-step sampler, blocks and decoder.

    Args:
      shapes: shapes in place of all weights, for `cfjax plan`.

    Raises:
      UserError: there is no such preset, storage or decoder.
    """
    network = wan.preset(parts.preset, remat="none")
    policy = replace(network.precision, compute=parts.precision) if parts.precision else network.precision
    network = replace(network, precision=policy, attention=parts.attention or network.attention)
    template = jax.eval_shape(lambda: Wan(network, jax.random.key(0)))
    template = with_storage_dtypes(template, parts.storage or policy.compute, policy.compute)
    if not parts.toy and parts.decoder == "toy":
        raise UserError(f"decoder=toy decodes the toy's latents, not those of {parts.preset!r}; use vae or tiny_vae")
    make = partial(
        random_codec,
        parts.decoder or ("toy" if parts.toy else "vae"),
        Policy(parts.decoder_precision or policy.compute),
        network.out_dim,
    )
    world = _RandomWorld(jax.eval_shape(make) if shapes else make(), parts.text_rows, network.text_dim)
    return Run(
        name=f"random {parts.preset}",
        stage="random",
        step=0,
        model=template if shapes else random_model(template, parts.seed),
        world=cast(World, world),
        sampler=FewStep(),
        blocks=Blocks(parts.block_frames),
        latent_shape=(*(TOY_LATENTS if parts.toy else WAN_LATENTS[network.out_dim]), network.out_dim),
        config=config,
    )


def random_model(template: Any, seed: int) -> Any:
    """Weights for shapes, in their dtypes: kernels of unit gain, small biases, scales of 1; int8 kernels too."""

    def leaf(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), len(name) + x.size % 65521)
        if x.dtype == jnp.int8:
            return jax.random.randint(key, x.shape, -127, 128, jnp.int8)
        if name.endswith("kernel/scale"):
            return jnp.full(x.shape, 1e-3, x.dtype)
        if name.endswith("scale"):
            return jnp.ones(x.shape, x.dtype)
        gain = x.shape[-2] ** -0.5 if name.endswith("kernel") else 0.02
        return (gain * jax.random.normal(key, x.shape, jnp.bfloat16)).astype(x.dtype)

    return map_named(leaf, template)


def random_codec(name: str, precision: Policy, channels: int = 16) -> Any:
    """A decoder of the published sizes: "vae" (or ""), "tiny_vae", "toy"."""
    key = jax.random.key(0)
    if name == "toy":
        size = TOY_SIDE**2 * 3
        return PatchCodec(jnp.zeros(size), jax.random.normal(key, (size, 16)) * size**-0.5, jnp.ones(16))
    if name == "tiny_vae":
        return make_tiny_vae(replace(published_tiny_vae(channels), precision=precision), key)
    return make_vae(replace(published_vae(channels), precision=precision), key)


def _prompt_encoder(c: ConfigDict, run: Run) -> Callable[[], np.ndarray] | None:
    if not c.text:
        return None
    if c.run:
        return lambda: run.world.encode_prompts([c.prompt])
    config = umt5.PRESETS["toy" if c.preset == "toy" else "umt5_xxl"]
    template = jax.eval_shape(lambda: umt5.UMT5(config, jax.random.key(0)))
    wide = jnp.float32 if c.preset == "toy" else jnp.bfloat16
    model = random_model(jax.tree.map(lambda x: x.update(dtype=wide), template), c.seed)
    ids = jnp.asarray(np.random.default_rng(c.seed).integers(2, config.vocab_size, (1, c.text_rows)), jnp.int32)
    policy = Policy(compute=jnp.dtype(wide).name)
    return lambda: np.asarray(encode_by_layer(model, ids, jnp.ones_like(ids), policy))
