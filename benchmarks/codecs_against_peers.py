"""Encoders and decoders beside the public PyTorch ones: the same weights and inputs, in turn, on this machine's CPU.

    python benchmarks/codecs_against_peers.py

| case | ours | theirs |
|---|---|---|
| decode | `WanVAE.decode` of a whole clip | diffusers' `AutoencoderKLWan` |
| chunks, frames | a later step of a stream: 3 latent frames, or 1 | its decoder and cache, frame by frame |
| encode | `WanVAE.encode` | diffusers' |
| tiny | `TinyVAE.decode` | TAEHV's decoder, all frames at once, written here in PyTorch |
| text | `encode_text` | transformers' `UMT5EncoderModel` |

Float32, random weights. Sides alternate; the ratio is the median over rounds of their time divided by ours. The error
is the greatest, of what reaches 1 in pictures. Memory is each side's own process (`--memory`): the most that a second
call holds above what the process held before it. The record goes to benchmarks/results/ only if other programs kept off
the processors meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from measure import highest_mib, keep, others, parser, ratio, resting_mib
from transformers import UMT5Config as TheirUMT5Config
from transformers import UMT5EncoderModel

from cfjax.comparison.turns import take_turns
from cfjax.conversion import umt5 as umt5_layouts
from cfjax.conversion.tiny_vae import export_tiny_vae
from cfjax.conversion.vae import DIFFUSERS, config_json_vae, export_vae
from cfjax.core.console import say
from cfjax.models.tiny_vae import BLOCKS, TinyVAE, TinyVAEConfig, make_tiny_vae
from cfjax.models.umt5 import UMT5Config, encode_text, make_umt5
from cfjax.models.vae import VAEConfig, WanVAE, make_vae

CASES = ("decode", "chunks", "frames", "encode", "tiny", "text")
Call = Callable[[], Any]
Sides = dict[str, Call]


def torch_video(x: jax.Array) -> torch.Tensor:
    """[B, F, H, W, C] as PyTorch's [B, C, F, H, W]."""
    return torch.from_numpy(np.array(x)).permute(0, 4, 1, 2, 3).contiguous()


def wan_sides(case: str, options: argparse.Namespace) -> Sides:
    """The Wan VAE, whole or a later step of a stream; results as channels-last arrays."""
    config = VAEConfig(base_dim=options.base_dim)
    vae = make_vae(config, jax.random.key(0))
    theirs = AutoencoderKLWan.from_config(config_json_vae(config, "diffusers")).eval().requires_grad_(False)
    theirs.load_state_dict({name: torch.tensor(np.array(x)) for name, x in export_vae(vae, DIFFUSERS).items()})
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    size = (options.height // 8, options.width // 8)
    frames = {"chunks": 3, "frames": 1}.get(case, options.frames)
    last = lambda x: np.moveaxis(x.numpy(), 1, -1)
    if case == "encode":
        shape = (1, 1 + 4 * (frames - 1), options.height, options.width, 3)
        video = jax.random.uniform(jax.random.key(1), shape, minval=-1)
        pixels, encode = torch_video(video), jax.jit(WanVAE.encode)
        return {
            "ours": lambda: encode(vae, video),
            "theirs": lambda: last((theirs.encode(pixels).latent_dist.mode() - mean) / std),
        }
    whole = frames if case == "decode" else 2 * frames  # of a stream the second half is decoded, after the first
    latents = jax.random.normal(jax.random.key(1), (1, whole, *size, config.z_dim))
    z = torch_video(latents) * std + mean
    if case == "decode":
        decode = jax.jit(WanVAE.decode)
        return {"ours": lambda: decode(vae, latents), "theirs": lambda: last(theirs.decode(z).sample)}
    step, (before, after) = jax.jit(WanVAE.decode_step), (latents[:, :frames], latents[:, frames:])

    @cache
    def state() -> Any:
        return jax.block_until_ready(step(vae, before, vae.init_state(1))[1])

    def decode_frames(x: torch.Tensor, *, first: bool) -> torch.Tensor:
        """The loop of diffusers' `_decode`, which there begins with an empty cache."""
        if first:
            theirs.clear_cache()
        x, out = theirs.post_quant_conv(x), []
        for i in range(x.shape[2]):
            theirs._conv_idx = [0]
            lone = {"first_chunk": True} if first and i == 0 else {}
            one = x[:, :, i : i + 1]
            out.append(theirs.decoder(one, feat_cache=theirs._feat_map, feat_idx=theirs._conv_idx, **lone))
        return torch.clamp(torch.cat(out, 2), -1, 1)

    with torch.inference_mode():
        decode_frames(z[:, :, :frames], first=True)
    kept = list(theirs._feat_map)

    def later() -> np.ndarray:
        theirs._feat_map = list(kept)
        return last(decode_frames(z[:, :, frames:], first=False))

    return {"ours": lambda: step(vae, after, state())[0], "theirs": later}


def tiny_sides(options: argparse.Namespace) -> Sides:
    """TAEHV's decoder as published: upsampling, 1x1 growth in time and 3x3 on large frames, all frames at once."""
    config = TinyVAEConfig()
    codec = make_tiny_vae(config, jax.random.key(0))
    latents = jax.random.normal(
        jax.random.key(1), (1, options.frames, options.height // 8, options.width // 8, config.latent_channels)
    )
    weights = {name: torch.tensor(np.array(x)) for name, x in export_tiny_vae(codec).items()}
    z, decode = torch_video(latents)[0].transpose(0, 1).contiguous(), jax.jit(TinyVAE.decode)
    relu, functional = torch.relu, torch.nn.functional

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        return functional.conv2d(x, kernel, weights.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    def theirs() -> np.ndarray:
        x = relu(conv(torch.tanh(z / 3) * 3, "decoder.1"))
        for stage in range(3):
            first = 3 + stage * (BLOCKS + 3)
            for block in range(first, first + BLOCKS):
                past = functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
                y = relu(conv(torch.cat([x, past], 1), f"decoder.{block}.conv.0"))
                y = conv(relu(conv(y, f"decoder.{block}.conv.2")), f"decoder.{block}.conv.4")
                x = relu(y + x)
            x = conv(functional.interpolate(x, scale_factor=2), f"decoder.{first + BLOCKS + 1}.conv")
            channels = weights[f"decoder.{first + BLOCKS + 2}.weight"].shape[1]
            x = conv(x.reshape(-1, channels, *x.shape[2:]), f"decoder.{first + BLOCKS + 2}")
        x = conv(relu(x), f"decoder.{3 * (BLOCKS + 3) + 4}").clamp(0, 1)[config.time - 1 :]
        return np.moveaxis(x.numpy(), 1, -1)[None] * 2 - 1

    return {"ours": lambda: decode(codec, latents), "theirs": theirs}


def text_sides(options: argparse.Namespace) -> Sides:
    """An encoder of umT5's form, one caption of `rows` tokens, a fifth of them padding."""
    config = UMT5Config(512, options.text_dim, options.text_dim // 64, 64, 5 * options.text_dim // 2, 4)
    model = make_umt5(config, jax.random.key(0))
    theirs_config = umt5_layouts.config_json_umt5(config, "diffusers") or {}
    theirs = UMT5EncoderModel(TheirUMT5Config.from_dict(theirs_config)).eval().requires_grad_(False)
    weights = umt5_layouts.export_umt5(model, umt5_layouts.LAYOUTS["diffusers"])
    theirs.load_state_dict({name: torch.tensor(np.array(x)) for name, x in weights.items()}, strict=False)
    ids = np.random.default_rng(0).integers(2, 512, (1, options.rows), np.int32)
    mask = (np.arange(options.rows) < options.rows * 4 // 5).astype(np.int32)[None]
    encode, given = jax.jit(encode_text), (jax.numpy.asarray(ids), jax.numpy.asarray(mask))
    their_ids, their_mask = torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)

    def their_rows() -> np.ndarray:
        rows = theirs(their_ids, attention_mask=their_mask).last_hidden_state
        return (rows * their_mask[..., None]).numpy()

    return {"ours": lambda: encode(model, *given), "theirs": their_rows}


def make_sides(case: str, options: argparse.Namespace) -> Sides:
    """Both sides of a case, each a call that returns its finished result."""
    made = {"tiny": tiny_sides, "text": text_sides}
    sides = made[case](options) if case in made else wan_sides(case, options)
    ours, theirs = sides["ours"], sides["theirs"]

    def run_theirs() -> Any:
        with torch.inference_mode():
            return theirs()

    return {"ours": lambda: jax.block_until_ready(ours()), "theirs": run_theirs}


def peak_mib(call: Call) -> float:
    """What a second call holds at the most, above what the process held before it."""
    call()
    before = resting_mib()
    return highest_mib(call) - before


def memory_of(case: str, side: str) -> float:
    """`peak_mib` by this script in a process of its own."""
    command = [sys.executable, *sys.argv, f"--cases={case}", f"--memory_of={side}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    sides = make_sides(case, options)
    results = {name: np.asarray(call()) for name, call in sides.items()}
    error = float(np.abs(results["ours"] - results["theirs"]).max())
    row: dict[str, Any] = {"case": case, "error": error}
    with others(row):
        seconds = take_turns(sides, options.rounds)
    row |= {"seconds": seconds, "median_s": {name: statistics.median(x) for name, x in seconds.items()}}
    row["ratio"] = ratio(seconds["theirs"], seconds["ours"])
    if options.memory:
        row["peak_mib"] = {name: memory_of(case, name) for name in sides}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| case | theirs, s | ours, s | theirs / ours (min, max) | error | theirs, MiB | ours, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = [f"{row['peak_mib'][side]:.0f}" if "peak_mib" in row else "" for side in ("theirs", "ours")]
        times = [f"{row['median_s'][side]:.3f}" for side in ("theirs", "ours")]
        span = "{median:.2f} ({min:.2f}, {max:.2f})".format(**row["ratio"])
        error = f"{row['error']:.0e}"
        lines.append(f"| {' | '.join([row['case'], *times, span, error, *peak])} |")
    return "\n".join(lines)


def command_line() -> argparse.ArgumentParser:
    """All flags."""
    command = parser(__doc__, "codecs_against_peers.json")
    command.add_argument("--cases", default=",".join(CASES), help="those that run, of these")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--frames", type=int, default=3, help="latent frames of a whole clip")
    command.add_argument("--height", type=int, default=96, help="pixels, a multiple of 8")
    command.add_argument("--width", type=int, default=96, help="pixels, a multiple of 8")
    command.add_argument("--base_dim", type=int, default=96, help="of the Wan VAE")
    command.add_argument("--text_dim", type=int, default=1024, help="of the text encoder, a multiple of 64")
    command.add_argument("--rows", type=int, default=512, help="tokens of the caption")
    command.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="in further processes")
    command.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    return command


def main() -> None:
    """Runs the cases, prints the table, writes the JSON."""
    options = command_line().parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    torch.set_num_threads(os.cpu_count() or 1)
    if options.memory_of:
        say(json.dumps(peak_mib(make_sides(options.cases, options)[options.memory_of])))
        return
    rows = [measure(case, options) for case in options.cases.split(",")]
    work = {name: getattr(options, name) for name in ("frames", "height", "width", "base_dim", "text_dim", "rows")}
    flags = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")).split()
    isa = [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if x in flags]
    say(table(rows))
    keep(command_line(), options.out, rows, dtype="float32", work=work, isa=isa, torch=torch.__version__)


if __name__ == "__main__":
    main()
