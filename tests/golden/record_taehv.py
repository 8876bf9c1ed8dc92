"""Records what the original TAEHV makes of random weights, into tests/golden/taehv.npz and taehv_2_2.npz.

    git clone https://github.com/madebyollin/taehv
    python tests/golden/record_taehv.py --reference_dir=taehv

Recorded at commit 1f14a56; the second is Wan2.2's (patches of 2 x 2 pixels, 48 channels). Weights and inputs are drawn
by NumPy from names, here and in the test alike: only outputs are stored. Sizes are the published ones, frames are tiny.
Of pixels, every third row and column is kept (3 and 8 share no factor, so all 64 places within a latent pixel are
seen).
"""

import argparse
import hashlib
import importlib.util
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LATENTS_BFHWC = (2, 3, 4, 6, 16)
VIDEO_BPHWC = (2, 9, 32, 48, 3)
PIXELS = (..., slice(None, None, 3), slice(None, None, 3), slice(None))  # rows and columns kept
FIRST_GROW = "decoder.7.conv.weight"


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32; depends on nothing but the name and the shape."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict in which signals keep their size and most decoded pixels lie within [0, 1]."""
    out = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) == 1 else 1.2 / np.sqrt(np.prod(shape[1:]))
        out[name] = (scale * draw(name, shape)).astype(np.float32)
    last = max((name for name in out if name.startswith("decoder.")), key=lambda name: int(name.split(".")[1]))
    stem = last.rpartition(".")[0]
    out[f"{stem}.weight"] *= np.float32(0.03)
    out[f"{stem}.bias"] += np.float32(0.5)
    return out


def wide_first_grow(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with a first TGrow that makes two frames, which the original cuts back to one."""
    out, inputs = weights[FIRST_GROW].shape[:2]
    return {**weights, FIRST_GROW: draw("wide", (2 * out, inputs, 1, 1)) / np.float32(np.sqrt(inputs))}


def inputs() -> dict[str, np.ndarray]:
    """Latents ~ 1.5 N(0, 1) (so that the clamp at 3 is felt) and a video in [-1, 1]."""
    return {"latents": 1.5 * draw("latents", LATENTS_BFHWC), "video": np.tanh(draw("video", VIDEO_BPHWC))}


def inputs_2_2() -> dict[str, np.ndarray]:
    """The same for Wan2.2's."""
    return {"latents": 1.5 * draw("latents", (1, 2, 2, 3, 48)), "video": np.tanh(draw("video", (1, 5, 32, 48, 3)))}


def record_2_2(original: Any, file: Path) -> None:
    """Runs Wan2.2's on the CPU in float32 and writes its archive."""
    import torch

    model = original.TAEHV(checkpoint_path=None, patch_size=2, latent_channels=48).eval()
    weights = random_weights({name: tuple(x.shape) for name, x in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    given = {name: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 2))) for name, x in inputs_2_2().items()}
    with torch.no_grad():
        decoded = model.decode_video(given["latents"], parallel=True, show_progress_bar=False)
        encoded = model.encode_video((given["video"] + 1) / 2, parallel=True, show_progress_bar=False)
    decoded, encoded = (np.moveaxis(x.numpy(), 2, -1) for x in (decoded, encoded))
    np.savez_compressed(file, decoded=decoded[PIXELS], encoded=encoded)
    print(f"{file}: {file.stat().st_size} bytes, clipped {np.mean((decoded == 0) | (decoded == 1)):.3f}")


def main() -> None:
    """Runs the original on the CPU in float32 and writes the archive."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference_dir", type=Path, required=True, help="folder of the original's taehv.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("taehv.npz"))
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("taehv", options.reference_dir / "taehv.py")
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    torch.set_num_threads(1)
    record_2_2(original, options.out.with_stem(f"{options.out.stem}_2_2"))
    to_torch = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 2)))  # NTCHW
    to_numpy = lambda x: np.moveaxis(x.numpy(), 2, -1)

    def network(weights: Mapping[str, np.ndarray]) -> Any:
        model = original.TAEHV(checkpoint_path=None).eval()
        model.load_state_dict(model.patch_tgrow_layers({k: torch.from_numpy(v) for k, v in weights.items()}))
        return model

    shapes = {name: tuple(x.shape) for name, x in original.TAEHV(checkpoint_path=None).state_dict().items()}
    weights, given = random_weights(shapes), inputs()
    latents, video = to_torch(given["latents"]), to_torch((given["video"] + 1) / 2)
    with torch.no_grad():
        model = network(weights)
        decoded = to_numpy(model.decode_video(latents, parallel=True, show_progress_bar=False))
        frame_by_frame = to_numpy(model.decode_video(latents, parallel=False, show_progress_bar=False))
        encoded = to_numpy(model.encode_video(video, parallel=True, show_progress_bar=False))
        cut = to_numpy(network(wide_first_grow(weights)).decode_video(latents[:1, :1], show_progress_bar=False))
    assert np.abs(decoded - frame_by_frame).max() < 1e-5
    clipped = float(np.mean((decoded == 0) | (decoded == 1)))
    assert clipped < 0.1 and decoded.std() > 0.1, (clipped, decoded.std())
    np.savez_compressed(
        options.out,
        decoded=decoded[PIXELS],
        encoded=encoded,
        cut=cut[PIXELS],
        names=np.array(sorted(shapes)),
        shapes=np.array([str(shapes[name]) for name in sorted(shapes)]),
        source=np.array(hashlib.sha256((options.reference_dir / "taehv.py").read_bytes()).hexdigest()),
    )
    spread = {name: (x.shape, round(float(x.std()), 3)) for name, x in (("decoded", decoded), ("encoded", encoded))}
    print(f"{options.out}: {options.out.stat().st_size} bytes, {spread}, clipped {clipped:.3f}")


if __name__ == "__main__":
    main()
