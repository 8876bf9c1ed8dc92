"""`cfjax profile_heads`: where every attention head looks, as tables for memory policies."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import reporting_storage_errors, write_atomically
from cfjax.data.requests import Request, read_latents, read_requests
from cfjax.experiment.runs import Run, open_run
from cfjax.memory.profile import LABELS, head_labels, heads_record, labels_text
from cfjax.models.experts import takes_picture
from cfjax.models.wan import embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep, generate
from cfjax.rollout.head_masses import last_block_mass
from cfjax.rollout.sizes import latent_sizes, pixel_frames

DESCRIPTION = """Measures, for every layer and head of a run's network, how its attention is spread over key frames when
the last block of a video is denoised. Writes what memory policies read: heads.json for forcing_kv(profile=FILE), and
labels.csv for pyramid(profile=FILE)."""
HEADS_FILE, LABELS_FILE = "heads.json", "labels.csv"

_generate = jax.jit(generate, static_argnames=("sampler", "blocks"))
_embed = jax.jit(embed_text)


def main(argv: Sequence[str]) -> int:
    """Parses the command line, measures, writes."""
    c, workdir, _ = parse("profile_heads", argv, description=DESCRIPTION, default_config="configs/profile_heads.py")
    with holding(workdir), reporting_storage_errors(workdir, "give the same command again"):
        profile_heads(c, workdir)
    return 0


def profile_heads(c: ConfigDict, workdir: Path) -> None:
    """Measures the heads of the run of `c` and writes the table.

    Raises:
      UserError: the run is bidirectional, the videos are too short, or a prompt or file cannot be used.
    """
    run = open_run(c.run, ema=c.ema, world=c.world, precision=c.precision)
    if run.blocks is None:
        raise UserError(f"--config.run={c.run}: it is bidirectional; name a run that generates block by block")
    if takes_picture(run.model.config):
        raise UserError(f"--config.run={c.run}: image to video, whose videos need pictures; name a text-to-video run")
    requests = read_requests(c.prompt, c.prompts, seed=c.seed, videos=1 if c.latents else c.videos)
    if wrong := next(filter(None, (run.world.prompt_fault(r.prompt) for r in requests)), ""):
        raise UserError(f"prompt {wrong}")
    levels, masses = levels_of(run.sampler, c.levels), list[np.ndarray]()
    for clean, noise, text in videos(c, run, run.blocks, requests):
        text_kv = _embed(run.model, text)
        masses += [
            np.asarray(last_block_mass(run.model, clean, noise, jnp.float32(level), text_kv, blocks=run.blocks)).mean(1)
            for level in levels
        ]
    mass_LNFF = np.mean(masses, axis=0)
    labelled = head_labels(mass_LNFF, c.sink, c.recent, c.periodicity, c.between)
    about = {
        **{name: c[name] for name in ("sink", "recent", "threshold", "periodicity", "between")},
        "step": run.step,
        "block_frames": run.blocks.frames,
        "levels": [round(float(level), 6) for level in levels],
        "prompts": sorted({r.prompt for r in requests}),
        "videos": len(requests),
        "latents": c.latents,
        "labels": {name: np.round(getattr(labelled, name), 4).tolist() for name in labelled._fields},
    }
    record = heads_record(run.name, run.model.config, mass_LNFF.mean(2), about)
    write_atomically(workdir / HEADS_FILE, json.dumps(record, indent=1) + "\n")
    write_atomically(workdir / LABELS_FILE, labels_text(labelled.label))
    report(record, labelled.label, workdir)


def levels_of(sampler: FewStep | ManyStep, most: int) -> np.ndarray:
    """At most so many of a sampler's noise levels above 0, evenly spaced."""
    sigmas = sampler.sigmas() if isinstance(sampler, FewStep) else sampler.grid()[0]
    above = np.asarray(sigmas)[np.asarray(sigmas) > 0]
    return above[np.unique(np.linspace(0, len(above) - 1, min(most, len(above))).round().astype(int))]


def videos(
    c: ConfigDict, run: Run, blocks: Blocks, requests: Sequence[Request]
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """Batches of latents_BFHWC, noise for their last block, and the prompts' text rows."""
    stride, (own, height, width, channels) = run.world.codec.stride, run.latent_shape
    given = None if not c.latents else read_latents(c.latents)
    asked = pixel_frames(len(given), stride[0]) if given is not None else c.frames or pixel_frames(own, stride[0])
    sizes = latent_sizes(
        asked, height * stride[1], width * stride[2], stride=stride, patch=run.model.config.patch, blocks=blocks
    )
    if sizes.frames <= c.sink + c.recent:
        least = pixel_frames(c.sink + c.recent + 1, stride[0])
        raise UserError(
            f"--config.frames={asked}: {sizes.frames} latent frames are no more than sink={c.sink} and "
            f"recent={c.recent}, and say nothing of the rest; use {least} or more pixel frames"
        )
    shape = (sizes.frames, height, width, channels)
    if given is not None and given.shape[-1] != channels:
        raise UserError(f"--config.latents={c.latents}: latents of {given.shape[-1]} channels; needs {channels}")
    negative = jnp.asarray(run.world.negative_text_SE())
    sample = partial(_generate, sampler=run.sampler, blocks=blocks)
    for first in range(0, len(requests), c.batch):
        part = requests[first : first + c.batch]
        text = jnp.asarray(run.world.encode_prompts([r.prompt for r in part]))
        key, key_noise, key_last = jax.random.split(jax.random.fold_in(jax.random.key(c.seed), first), 3)
        if given is None:
            clean = sample(run.model, jax.random.normal(key_noise, (len(part), *shape)), text, negative, key)
        else:
            clean = jnp.broadcast_to(jnp.asarray(given), (len(part), *given.shape))
        start, stop = blocks.spans(clean.shape[1])[-1]
        yield clean, jax.random.normal(key_last, (len(part), stop - start, *clean.shape[2:])), text


def report(record: dict[str, Any], label_LN: np.ndarray, workdir: Path) -> None:
    """How many heads are static, layer by layer; how many have each label; what uses that."""
    static_LN = np.array(record["static"])
    layers, heads = static_LN.shape
    say(f"{static_LN.sum()} of {layers * heads} heads are static; in each layer, of {heads}:")
    say("  " + " ".join(str(count) for count in static_LN.sum(axis=1)))
    say(", ".join(f"{(label_LN == label).sum()} {kind}" for kind, label in LABELS.items()) + " heads")
    say(f'written to {workdir / HEADS_FILE}; --config.memory="forcing_kv(profile={workdir / HEADS_FILE})" uses it')
    say(f'written to {workdir / LABELS_FILE}; --config.memory="pyramid(profile={workdir / LABELS_FILE})" uses it')
