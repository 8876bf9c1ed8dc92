"""Writes causal_forcing.npz and self_forcing.npz: what the PyTorch reference computes on a miniature, in float32.

    python tests/golden/record_reference.py --reference_dir=CLONE

CLONE is a clone of thu-ml/Causal-Forcing or of guandeh17/Self-Forcing, whose own code is run as it is, on CPU, by
`cfjax.comparison.reference`. Weights, inputs and draws are functions of the seed; only results are kept. Of parameter
gradients each parameter's norm is kept, and two projections of it.
"""

import argparse
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import torch

from cfjax.comparison.case import Case
from cfjax.comparison.probe import Arrays, Probe, Subject
from cfjax.comparison.reference import open_reference
from cfjax.comparison.reference_checks import PROBES
from cfjax.conversion.wan import abstract_wan
from cfjax.core.tree import map_named
from cfjax.models.vae import VAEConfig, WanVAE, abstract_vae
from cfjax.models.wan import Wan, WanConfig
from cfjax.nn.visibility import Blocks

FOLDER = Path(__file__).parent
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, freq_dim=16)
VAE = VAEConfig(base_dim=8)
PROJECTIONS = 2
# Clone -> the probes that are recorded: part -> names, or all of a part.
RECORDED: dict[str, dict[str, tuple[str, ...]]] = {
    "causal_forcing": {
        "schedules": (),
        "forward": (
            "bidirectional",
            "diffusion forcing, blocks of 3",
            "teacher forcing, blocks of 3",
            "diffusion forcing, window of 4",
            "diffusion forcing, first frame alone",
        ),
        "rollout": (
            "2 steps, first block 4, blocks of 1",
            "few-step, 3 frames given, blocks of 3",
            "many-step (UniPC 50, guidance 3), blocks of 3",
        ),
        "window": (
            "frames seen, blocks of 1, window 3, sink 0",
            "frames seen, blocks of 2, window 4, sink 1",
            "frames seen, blocks of 3, window 5, sink 2",
            "few-step, blocks of 2, window 4, sink 1",
        ),
        "vae": (),
        "ar_diffusion": (
            "AR diffusion, teacher forcing, blocks of 3",
            "AR diffusion, diffusion forcing, blocks of 3",
            "AR diffusion, exact timesteps",
            "AR diffusion, noised past",
        ),
        "ode_regression": ("ODE regression, clean past, blocks of 3",),
        "consistency": ("consistency, blocks of 3", "consistency, exact timesteps"),
        "dmd": (
            "DMD generator, blocks of 7, exit at step 3 of 4",
            "DMD generator, blocks of 7, exit at step 1, score level 0.98",
            "critic, blocks of 7, exit at step 1, score level 0.02",
            "DMD generator, blocks of 1, 2 steps, first block 4",
            "DMD generator, blocks of 7, without the quirks",
            "critic, blocks of 7, without the quirks",
            "SiD generator, blocks of 7, exit at step 3 of 4",
            "DMD generator, blocks of 7, the end of 28 frames",
            "critic, blocks of 7, the end of 28 frames",
            "CausVid generator, diffusion forcing, blocks of 7",
            "CausVid critic, diffusion forcing, blocks of 7",
            "CausVid generator, teacher forcing, blocks of 7",
        ),
    },
    "self_forcing": {"ode_regression": ("ODE regression, noisy past, a level per block, blocks of 3",)},
}


def _array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A random parameter, by its name: kernels keep the scale of what they multiply, scales are near 1."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("kernel"):
        return noise / np.sqrt(np.prod(shape[1:-1] if name.startswith("blocks") else shape[:-1], dtype=np.float32))
    return 1.0 + 0.2 * noise if name.endswith("scale") else 0.2 * noise


def wan() -> Wan:
    """The miniature network."""
    return map_named(lambda name, x: _array(name, x.shape), abstract_wan(CONFIG))


def vae() -> WanVAE:
    """A miniature autoencoder."""
    return map_named(lambda name, x: _array(name, x.shape), abstract_vae(VAE))


def subject(part: str) -> Subject:
    """The miniature case of a part."""
    small = part == "vae"
    blocks = Blocks(frames=7) if part == "dmd" else Blocks(frames=3)
    return Subject(
        Case(
            dit=wan, vae=vae, text_encoder=None, tokenizer="", blocks=blocks, frames=2 if small else 6,
            height=2 if small else 4, width=3 if small else 6, text_length=5, steps=50, seed=0,
        )
    )  # fmt: skip


def probes(recording: str) -> list[tuple[Probe, Subject]]:
    """The recorded probes of one clone, in order.

    Raises:
      KeyError: a name that no probe has.
    """
    out = []
    for part, names in RECORDED[recording].items():
        made = subject(part)
        known = {probe.what: probe for probe in PROBES[part](made)}
        out += [(known[name], made) for name in names or known]
    return out


def key(probe: Probe) -> str:
    """The first half of a recorded array's name."""
    return f"{probe.part}|{probe.what}"


def summary(results: Arrays) -> Arrays:
    """Results as they are kept: gradients summarised, layers left out."""
    kept = {name: x for name, x in results.items() if not name.startswith(("grad/", "layer/"))}
    gradients = [results[name].astype(np.float64).ravel() for name in sorted(results) if name.startswith("grad/")]
    rng = np.random.default_rng(0)
    rows = []
    for gradient in gradients:
        directions = rng.standard_normal((PROJECTIONS, gradient.size))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        rows.append([np.linalg.norm(gradient), *(directions @ gradient)])
    return kept | ({"gradients": np.array(rows)} if rows else {})


def main() -> None:
    """Records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_dir", required=True)
    directory = parser.parse_args().reference_dir
    torch.set_num_threads(1)
    jax.config.update("jax_platforms", "cpu")
    with open_reference(directory) as reference:
        recording = reference.name.lower().replace("-", "_")
        arrays: dict[str, Any] = {
            f"{key(probe)}|{name}": x.astype(np.float32) if x.dtype == np.float64 and name != "gradients" else x
            for probe, made in probes(recording)
            for name, x in summary(probe.run_theirs(reference, made)).items()
        }
    out = FOLDER / f"{recording}.npz"
    np.savez_compressed(out, **arrays)
    sys.stdout.write(f"{out}: {len(arrays)} arrays, {out.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
