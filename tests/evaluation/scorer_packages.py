"""Miniatures of packages that scorers run: their public interface, with numbers that a test can work out."""

import json
from pathlib import Path


def write_package(folder: Path, name: str, version: str, files: dict[str, str], points: str = "") -> None:
    """Modules and the metadata of an installed package."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if points:
        (about / "entry_points.txt").write_text(points)
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


# A scorer of another package: how bright a clip is, and how long its prompt; it writes down what it scored.
BRIGHT = """
from pathlib import Path

class Bright:
    name, version, needs = "bright", "7", frozenset({"prompt"})
    def __init__(self, settings):
        self.options = settings.chosen({"scale": "1"})
        self.path = settings.weight_path("bright.bin of its page")
    def weights(self):
        return [self.path]
    def close(self):
        pass
    def score(self, clip):
        with self.path.with_name("scored.txt").open("a") as file:
            file.write(clip.name + "\\n")
        means = [float(frame.mean()) for frame in clip.frames()]
        return {"": float(self.options["scale"]) * sum(means) / len(means), "words": len(clip.prompt.split())}

def make(settings):
    return Bright(settings)

def nothing(settings):
    return 3
"""
BRIGHT_POINTS = (
    "[cfjax.scorers]\nbright = bright_package:make\nbroken = bright_package:missing\nno name = bright_package:make\n"
    "empty = bright_package:nothing\n"
)

# What a worker needs of torch, so that a test need not import it.
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)

class no_grad:
    def __enter__(self): return self
    def __exit__(self, *error): return False

def device(name):
    return name
"""

# VBench: mean length of the prompts in words over 10; of single videos, imaging quality is in per cent.
VBENCH = """
import json, os, re
from pathlib import Path

CACHE = os.environ.get("VBENCH_CACHE_DIR")
ANY = {"subject_consistency", "temporal_flickering", "imaging_quality", "overall_consistency"}

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.info, self.output = device, full_info_dir, output_path

    def listed(self, videos_path, prompt_list, dimension_list, mode):
        names = sorted(os.listdir(videos_path))
        if mode == "custom_input":
            assert set(dimension_list) <= ANY
            return [(os.path.join(videos_path, name), prompt_list[name]) for name in names]
        prompts = [row["prompt_en"] for row in json.loads(Path(self.info).read_text())
                   if set(row["dimension"]) & set(dimension_list)]
        wanted = [(f"{prompt}-{n}.mp4", prompt) for prompt in prompts for n in range(5)]
        return [(os.path.join(videos_path, name), prompt) for name, prompt in wanted if name in names]

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        print("a line of the package")
        assert local and os.path.isfile(os.path.join(CACHE, "called.txt"))
        with open(os.path.join(CACHE, "called.txt"), "a") as file:
            file.write(f"{dimension_list[0]} {mode} {sorted(kwargs)}\\n")
        if dimension_list[0] == "motion_smoothness":
            os._exit(3)
        rows = [{"video_path": path, "video_results": len(prompt.split()) / 10}
                for path, prompt in self.listed(videos_path, prompt_list, dimension_list, mode)]
        score = sum(row["video_results"] for row in rows) / len(rows)
        if dimension_list[0] == "imaging_quality":
            rows = [{**row, "video_results": 100 * row["video_results"]} for row in rows]
        Path(self.output, name + "_eval_results.json").write_text(json.dumps({dimension_list[0]: [score, rows]}))
"""
VBENCH_LONG = """
import json, os
from pathlib import Path
from vbench import VBench

class VBenchLong(VBench):
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "long_custom_input" and not prompt_list and os.path.isfile(kwargs["slow_fast_eval_config"])
        assert kwargs["dev_flag"] is False and kwargs["num_of_samples_per_prompt"] == 5
        pieces, whole = [], []
        for number, video in enumerate(sorted(os.listdir(videos_path))):
            stem = video[:-4]
            for piece in range(2):
                path = os.path.join(videos_path, "split_clip", stem, f"{stem}_{piece:03d}.mp4")
                pieces.append({"video_path": path, "video_results": (number + piece) / 10})
            whole.append({"video_path": os.path.join(path, stem) + ".mp4", "video_results": number / 10 + 0.05})
        score = sum(row["video_results"] for row in whole) / len(whole)
        result = {dimension_list[0]: [score, pieces, whole]}
        Path(self.output, name + "_eval_results.json").write_text(json.dumps(result))
"""

# HPSv3: words of the prompt, and the second picture has 1 more than the first.
HPSV3 = """
class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda"):
        assert device == "cpu" and open(checkpoint_path).read() == "weights"
        self.base = open(config_path).read() if config_path else ""

    def reward(self, prompts, image_paths):
        from PIL import Image
        sizes = [Image.open(path).size for path in image_paths]
        assert len(set(sizes)) == 1 and len(prompts) == len(image_paths)
        return [[len(prompt.split()) + number, 9.0] for number, prompt in enumerate(prompts)]
"""


def write_vbench(folder: Path) -> None:
    """VBench 0.1.5 and VBench-Long; what its worker needs of torch."""
    package = {"vbench/__init__.py": VBENCH, "vbench2_beta_long/__init__.py": VBENCH_LONG, "torch.py": TORCH}
    package["vbench2_beta_long/configs/slow_fast_params.yaml"] = ""
    write_package(folder, "vbench", "0.1.5", package)
    info = [{"prompt_en": "a cat", "dimension": ["color"]}, {"prompt_en": "a very small dog", "dimension": ["color"]}]
    (folder / "vbench" / "VBench_full_info.json").write_text(json.dumps(info))


# LPIPS: mean |a - b| times the first weight of its network, which has the names of torchvision's.
LPIPS = """
import torch

class Slices(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slice1 = torch.nn.Sequential()
        self.slice1.add_module("0", torch.nn.Conv2d(3, 2, 1))
        self.slice2 = torch.nn.Sequential()
        self.slice2.add_module("3", torch.nn.Conv2d(2, 2, 1))

class LPIPS(torch.nn.Module):
    def __init__(self, net="alex", pnet_rand=False, verbose=True):
        assert pnet_rand and not verbose
        super().__init__()
        self.net = Slices()

    def forward(self, a, b):
        factor = self.net.slice1[0].weight.flatten()[0] + self.net.slice2[0].bias[1]
        return factor * (a - b).abs().mean((1, 2, 3), keepdim=True)
"""
