"""Records what VBench, FastVideo and pytorch-msssim give on small generated clips, into tests/golden/vbench.npz.

    git clone https://github.com/Vchitect/VBench
    git clone https://github.com/hao-ai-lab/FastVideo
    pip install pytorch-msssim==1.0.0
    python tests/golden/record_vbench.py --vbench=VBench --fastvideo=FastVideo

VBench's own `temporal_flickering.cal_score` reads a lossless series of pictures and an H.264 file, which is kept beside
the numbers. Of its `DynamicDegree` everything but RAFT runs: which frames are sampled, the threshold, the mean of the
fastest pixels, and the rule. What these files import and do not use for that (decord, RAFT, its registry) is empty.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cfjax.evaluation.video import write_mp4, write_png

FILE = Path(__file__).with_name("vbench.npz")
COMMITS = {"VBench": "45e79ec", "FastVideo": "2f3d407", "pytorch-msssim": "1.0.0"}
RATES = (8.0, 12.0, 16.0, 20.0, 24.0, 30.0)
SIZES = ((480, 832, 81), (256, 256, 16), (720, 1280, 49), (32, 32, 3), (32, 32, 1))  # height, width, sampled frames


def texture(x: np.ndarray, y: np.ndarray, seed: int = 0) -> np.ndarray:
    """A smooth random picture at any places, float [..., 3] around 110."""
    rng = np.random.default_rng(seed)
    rates, phases, sizes = rng.uniform(0.05, 0.4, (6, 2)), rng.uniform(0, 6.28, (6, 3)), rng.uniform(5, 20, 6)
    out = np.full((*x.shape, 3), 110.0)
    for (across, down), phase, size in zip(rates, phases, sizes, strict=True):
        out += size * np.sin(across * x[..., None] + down * y[..., None] + phase)
    return out


def moving(frames: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """A `texture` that moves left and up by (2, 1) px a frame and grows brighter, uint8 [P, H, W, 3]."""
    y, x = np.mgrid[:height, :width].astype(float)
    clip = np.stack([texture(x + 2 * n, y + n) + 0.5 * n for n in range(frames)])
    return np.clip(clip, 0, 255).astype(np.uint8)


def noisy(video_PHWC: np.ndarray, size: float = 12.0, seed: int = 1) -> np.ndarray:
    """The same with noise of so many grey levels, uint8."""
    noise = np.random.default_rng(seed).normal(0, size, video_PHWC.shape)
    return np.clip(video_PHWC + noise, 0, 255).astype(np.uint8)


def flows(seed: int = 2) -> np.ndarray:
    """Optical flows of five pairs, float32 [5, 32, 48, 2], px."""
    return np.random.default_rng(seed).normal(0, 1, (5, 32, 48, 2)).astype(np.float32) * np.float32(2.0)


def _module(name: str, **values: Any) -> None:
    module = ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module


def _vbench(clone: Path) -> tuple[Any, Any]:
    """VBench's two modules, without what needs its weights."""
    _module("vbench", __path__=[str(clone / "vbench")])
    _module("vbench.utils", load_dimension_info=None)
    for name in ("third_party", "third_party.RAFT", "third_party.RAFT.core", "third_party.RAFT.core.utils_core"):
        _module(f"vbench.{name}", __path__=[])
    _module("vbench.third_party.RAFT.core.raft", RAFT=None)
    _module("vbench.third_party.RAFT.core.utils_core.utils", InputPadder=None)
    _module("easydict", EasyDict=dict)
    return tuple(importlib.import_module(f"vbench.{name}") for name in ("temporal_flickering", "dynamic_degree"))


def _fastvideo(clone: Path) -> dict[str, Any]:
    """FastVideo's PSNR and temporal flickering."""
    root = clone / "fastvideo"
    for name in ("", ".eval", ".eval.metrics", ".eval.metrics.common", ".eval.metrics.vbench"):
        _module(f"fastvideo{name}", __path__=[str(root.joinpath(*name.split(".")[1:]))])
    _module("fastvideo.eval.types", MetricResult=SimpleNamespace)
    _module("fastvideo.eval.registry", register=lambda name: lambda cls: cls)
    made = {}
    for name, place, cls in (
        ("psnr", "common.psnr", "PSNRMetric"),
        ("flickering", "vbench.temporal_flickering", "TemporalFlickeringMetric"),
    ):
        made[name] = getattr(importlib.import_module(f"fastvideo.eval.metrics.{place}.metric"), cls)()
    return made


def _recorded(flickering: Any, dynamic: Any, others: dict[str, Any]) -> dict[str, np.ndarray]:
    import torch
    from pytorch_msssim import ms_ssim, ssim

    clip, out = moving(), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, frame in enumerate(clip):
            write_png(Path(folder) / f"{number:03d}.png", frame)
        out["flickering_pictures"] = flickering.cal_score(f"{folder}/%03d.png")
        mp4 = Path(folder) / "clip.mp4"
        write_mp4(mp4, clip, 16)
        out["mp4"] = np.frombuffer(mp4.read_bytes(), np.uint8)
        out["flickering_mp4"] = flickering.cal_score(str(mp4))
        out["frames_mp4"] = np.stack(flickering.get_frames(str(mp4)))[..., ::-1]
    rule = dynamic.DynamicDegree.__new__(dynamic.DynamicDegree)
    out["intervals"] = np.array([max(1, round(rate / 8)) for rate in RATES])  # a line of its get_frames
    rows = []
    for height, width, count in SIZES:
        rule.set_params(torch.zeros(1, 3, height, width), count)
        rows.append((rule.params["thres"], rule.params["count_num"]))
    out["parameters"] = np.array(rows)
    fields = torch.from_numpy(flows()).permute(0, 3, 1, 2)
    fastest = [rule.get_score(torch.zeros(1, 3, 32, 48), field[None]) for field in fields]
    out["fastest"] = np.array(fastest)
    rule.params = {"thres": float(np.median(fastest)), "count_num": 2}
    out["moves"] = np.array([rule.check_move(fastest), rule.check_move(fastest[:1])])
    torch_clip, torch_noisy = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 for x in (clip, noisy(clip)))
    out["psnr"] = others["psnr"].to("cpu").compute({"video": torch_clip, "reference": torch_noisy}).score
    out["flickering_fastvideo"] = others["flickering"].compute({"video": torch_clip}).score
    large = moving(1, 192, 256)[0, ..., 0], noisy(moving(1, 192, 256))[0, ..., 0]
    pair = [torch.from_numpy(x.astype(np.float64))[None, None] for x in large]
    out["ssim"], out["ms_ssim"] = (f(*pair, data_range=255).item() for f in (ssim, ms_ssim))
    return {name: np.asarray(value) for name, value in out.items()}


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vbench", type=Path, required=True)
    parser.add_argument("--fastvideo", type=Path, required=True)
    given = parser.parse_args()
    recorded = _recorded(*_vbench(given.vbench), _fastvideo(given.fastvideo))
    np.savez_compressed(FILE, **recorded)
    for name, value in recorded.items():
        sys.stdout.write(f"{name}: {value if value.size < 20 else value.shape}\n")


if __name__ == "__main__":
    main()
