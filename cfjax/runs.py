"""Opening what was trained: a run directory, or a teacher that ships with the package, as (weights, config, world)."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.errors import UserError
from cfjax.experiment import (
    META_FILE,
    blocks_of,
    config_from_meta,
    load_shipped,
    sampler_of,
    toy_world,
    wan_config,
)
from cfjax.models.wan import Wan, make_wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep, generate, network_calls
from cfjax.training.checkpoint import load_role, read_meta
from cfjax.world import World, asset, shipped_world


@dataclass(frozen=True)
class Run:
    """A trained generator and what it needs to generate. `blocks` is None for a bidirectional one."""

    name: str
    stage: str
    step: int
    model: Wan
    world: World
    sampler: FewStep | ManyStep
    blocks: Blocks | None
    latent_shape: tuple[int, int, int, int]
    config: ConfigDict

    def calls(self) -> int:
        """Network evaluations per video."""
        return network_calls(self.sampler, self.blocks, self.latent_shape[0])

    def sample(self, captions: list[str], seed: int) -> np.ndarray:
        """Videos of some captions, video_BPHWC float32 (not clipped), with the run's own sampler."""
        text = jnp.asarray(self.world.text.encode(captions))
        negative = jnp.asarray(self.world.text.encode([""])[0])
        noise = jax.random.normal(jax.random.key(seed), (len(captions), *self.latent_shape))
        sample = _sampler(self.sampler, self.blocks)
        return np.asarray(self.world.codec.decode(sample(self.model, noise, text, negative, jax.random.key(seed + 1))))


_SAMPLERS: dict[Any, Any] = {}


def _sampler(sampler: FewStep | ManyStep, blocks: Blocks | None) -> Any:
    """One compiled function per sampler and layout."""
    key = (sampler, blocks)
    if key not in _SAMPLERS:
        _SAMPLERS[key] = jax.jit(partial(generate, sampler=sampler, blocks=blocks))
    return _SAMPLERS[key]


def open_run(name: str, *, ema: bool = True) -> Run:
    """Opens a run directory or an exported model (a path, or a shipped name); averaged weights when the run keeps them.

    Raises:
      UserError: neither, or a run without a toy world (Wan weights need `cfjax convert`).
    """
    if record := asset(name, META_FILE):
        meta = json.loads(record.read_text())
        c = config_from_meta(meta)
        world = shipped_world(name)
        config = wan_config(c.roles.student, world.codec.latent_channels, world.text.width)
        model = load_shipped(name, jax.eval_shape(lambda k: Wan(config, k), jax.random.key(0)))
    else:
        if not Path(name).is_dir():
            raise UserError(f"run={name!r}: no such run directory, and no shipped teacher of that name")
        meta = read_meta(name)
        c = config_from_meta(meta)
        if not meta["world"]:
            raise UserError(f"run={name!r} was not trained in a toy world; only those can be generated from so far")
        world = toy_world(c)
        if meta["world"] != world.fingerprint():
            raise UserError(f"run={name!r} was trained in another world than {c.data.path}/world now holds")
        config = wan_config(c.roles.student, world.codec.latent_channels, world.text.width)
        template = make_wan(config, jax.random.key(0))
        model = load_role(name, "student", template, ema=ema and "student" in c.ema)
    causal = c.sampler.kind != "bidirectional"
    return Run(
        name=name,
        stage=meta["stage"],
        step=int(meta["step"]),
        model=model,
        world=world,
        sampler=sampler_of(c),
        blocks=blocks_of(c) if causal else None,
        latent_shape=tuple(meta["latent_shape"]),
        config=c,
    )
