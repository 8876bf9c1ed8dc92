"""Measures the host memory that converting needs: python tests/conversion/peak_memory.py FOLDER, prints JSON.

Counted is RssAnon, sampled every few milliseconds: memory that the process owns. Pages of mapped files (the shards
themselves) are the kernel's cache, which it takes back when it needs the room; VmHWM counts them too.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cfjax.__main__ import main
from tests import synthetic
from tests.conversion.repacked import FLOAT8, is_matrix, save_gguf, save_raw

SIZES = {"dim": 512, "ffn_dim": 2048, "num_heads": 4, "num_layers": 20, "text_dim": 256}
SHARDS = 8


def owned() -> int:
    """Bytes of anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak(run: Callable[[], None]) -> int:
    """The most bytes owned while `run` runs, beyond those before."""
    before, most, done = owned(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, owned())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return most - before


def convert(source: Path, workdir: Path, **keys: object) -> None:
    overrides = [f"--config.{name}={value}" for name, value in {"source": source, "progress": False, **keys}.items()]
    config = Path(__file__).parents[2] / "configs" / "convert.py"
    assert main(["convert", f"--config={config}", f"--workdir={workdir}", *overrides]) == 0


def write_quantised(root: Path, shapes: synthetic.Shapes) -> None:
    """The network's matrices in eight bits, as wan_fp8_scaled.safetensors and wan_q8.gguf; any numbers."""
    rng = np.random.default_rng(0)
    stored, tensors = {}, {}
    for name, shape in shapes.items():
        plain = np.zeros(shape, np.float32)
        if not is_matrix(name, plain):
            stored[name], tensors[name] = plain, ("F32", shape, plain.tobytes())
            continue
        stored[name] = rng.integers(0, 100, shape, dtype=np.uint8).view(FLOAT8)
        stored[f"{name.removesuffix('.weight')}.scale_weight"] = np.ones(1, np.float32)
        blocks = rng.integers(0, 100, (shape[0] * shape[1] // 32, 34), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        tensors[name] = ("Q8_0", shape, blocks.tobytes())
    save_raw(root / "wan_fp8_scaled.safetensors", stored)
    save_gguf(root / "wan_q8.gguf", tensors)


def measure(root: Path) -> dict[str, int]:
    """Peaks of every direction, and the sizes that bound them."""
    release = root / "release"
    release.mkdir(parents=True)
    synthetic.write_config(release, **{key: value for key, value in SIZES.items() if key != "text_dim"})
    weights = synthetic.dit_weights(**SIZES)
    synthetic.save_safetensors(release, "diffusion_pytorch_model", weights, SHARDS)
    out = {
        "total": sum(x.nbytes for x in weights.values()),
        "shard": max(file.stat().st_size for file in release.glob("*.safetensors")),
        "stacked": SIZES["num_layers"] * SIZES["dim"] * SIZES["ffn_dim"] * 4,
    }
    write_quantised(root, {name: x.shape for name, x in weights.items()})
    del weights
    warm = root / "warm"
    warm.mkdir()
    synthetic.write_config(warm)
    synthetic.save_safetensors(warm, "diffusion_pytorch_model", synthetic.dit_weights())
    convert(warm, root / "warm_run")  # imports and thread pools are not the conversion's
    convert(root / "warm_run", root / "warm_pt", to="pt")
    out["orbax"] = peak(lambda: convert(release, root / "run"))
    out["safetensors"] = peak(
        lambda: convert(root / "run", root / "out", to="safetensors", max_shard_gb=out["shard"] / 1e9)
    )
    out["pt"] = peak(lambda: convert(root / "run", root / "pt", to="pt"))
    out["fp8"] = peak(lambda: convert(root / "wan_fp8_scaled.safetensors", root / "fp8"))
    out["gguf"] = peak(lambda: convert(root / "wan_q8.gguf", root / "gguf"))
    return out


if __name__ == "__main__":
    result = measure(Path(sys.argv[1]))
    sys.stdout.write(json.dumps(result) + "\n")
