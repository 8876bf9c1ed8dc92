"""How fast `cfjax evaluate --config.videos=FOLDER` measures clips of 81 frames of 480 x 832, beside VBench's own code.

    python benchmarks/evaluate_videos.py --vbench=VBench          a clone of github.com/Vchitect/VBench
    python benchmarks/evaluate_videos.py                          cfjax alone

Needs the extra `eval`; VBench's rows its clone alone. `all` is everything that is measured without a reference,
`flickering` temporal flickering alone, the dimension of VBench that needs no weights: both read the same H.264 files,
in turn, each in a process of its own, with all cores. The clips are made here: a texture that the camera passes over,
with a moving disc. Values are compared, clip by clip.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from measure import others, parser, ratio, write

from cfjax.core.console import say
from cfjax.evaluation.video import write_mp4

FRAMES, HEIGHT, WIDTH, FPS = 81, 480, 832, 16
OURS = """
import json, sys, tempfile, time
from pathlib import Path
from cfjax.evaluation.clip_score import Settings, score_clips
from cfjax.evaluation.clip_source import find_source_clips
from cfjax.evaluation.opencv import opencv
opencv()
def mib(field):
    return next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith(field))
clips = find_source_clips(sys.argv[1], "videos")
with tempfile.TemporaryDirectory() as work:
    open("/proc/self/clear_refs", "w").write("5")  # the highest so far is what is held now
    before = mib("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    scores = score_clips(clips, {}, Settings(tuple(sys.argv[2].split(","))), Path(work))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
grown = mib("VmHWM") - before
values = [score.values["temporal_flickering"] for score in scores]
print(json.dumps({"s": seconds, "cpu_s": cpu, "grown_mib": grown, "values": values}))
"""
THEIRS = """
import json, sys, time
from pathlib import Path
from types import ModuleType
for name in ("vbench", "vbench.utils"):
    sys.modules[name] = ModuleType(name)
sys.modules["vbench"].__path__ = [sys.argv[2] + "/vbench"]
sys.modules["vbench.utils"].load_dimension_info = None
from vbench.temporal_flickering import cal_score
files = sorted(Path(sys.argv[1]).glob("*.mp4"))
start, cpu = time.perf_counter(), time.process_time()
values = [cal_score(str(file)) for file in files]
print(json.dumps({"s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "values": values}))
"""


def make_clip(file: Path, seed: int) -> None:
    """Writes one clip."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(size=(HEIGHT, WIDTH, 3)).astype(np.float32), (0, 0), 3)
    texture = cv2.resize(noise / noise.std() * 45 + 120, (2 * WIDTH, 2 * HEIGHT))
    step = rng.uniform(-2, 2, 2)
    frames = []
    for n in range(FRAMES):
        move = np.array([[1, 0, -WIDTH / 2 + step[0] * n], [0, 1, -HEIGHT / 2 + step[1] * n]])
        frame = np.clip(cv2.warpAffine(texture, move, (WIDTH, HEIGHT)), 0, 255).astype(np.uint8)
        centre = (int(WIDTH / 2 + 250 * np.sin(n / 12 + seed)), HEIGHT // 2)
        frames.append(cv2.circle(frame, centre, 60, (230, 60, 40), -1))
    write_mp4(file, np.stack(frames), FPS)


def run(code: str, *arguments: str) -> dict[str, Any]:
    """What a fresh process prints last."""
    with others(found := {}):
        ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{arguments}: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1]) | found


def main() -> None:
    """Measures, and writes the record."""
    command = parser(__doc__ or "", "evaluate_videos.json")
    command.add_argument("--vbench", default="")
    command.add_argument("--clips", type=int, default=12)
    command.add_argument("--rounds", type=int, default=3)
    given = command.parse_args()
    cases = {"all": (OURS, "flickering,frames,motion"), "flickering": (OURS, "flickering")}
    if given.vbench:
        cases["vbench"] = (THEIRS, str(Path(given.vbench).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.clips):
            make_clip(Path(folder) / f"{seed:03d}.mp4", seed)
        rounds = []
        for n in range(given.rounds):
            order = list(cases) if n % 2 else list(reversed(cases))
            rounds.append({name: run(cases[name][0], folder, cases[name][1]) for name in order})
    rows = []
    for name in cases:
        every = [made[name] for made in rounds]
        fps = [given.clips * FRAMES / made["s"] for made in every]
        cpu = [given.clips * FRAMES / made["cpu_s"] for made in every]
        row: dict[str, Any] = {"case": name, "frames_per_s": fps, "frames_per_cpu_s": cpu}
        row |= {key: [made[key] for made in every] for key in ("load_average", "others_share")}
        row["times_real_time"] = max(fps) / FPS
        if "grown_mib" in every[0]:
            row["grown_mib"] = max(made["grown_mib"] for made in every)
        rows.append(row)
        say(f"{name}: {max(fps):.0f} frames/s at best, {max(cpu):.0f} a CPU second; others {row['others_share']}")
    about: dict[str, Any] = {"clips": given.clips, "frames": FRAMES, "size": [WIDTH, HEIGHT], "fps": FPS}
    if given.vbench:
        seconds = {name: [made[name]["s"] for made in rounds] for name in cases}
        cpu_seconds = {name: [made[name]["cpu_s"] for made in rounds] for name in cases}
        about["faster_than_vbench"] = ratio(seconds["vbench"], seconds["flickering"])
        about["cpu_less_than_vbench"] = ratio(cpu_seconds["vbench"], cpu_seconds["flickering"])
        gaps = np.subtract(rounds[0]["vbench"]["values"], rounds[0]["flickering"]["values"])
        about["largest_difference"] = float(np.abs(gaps).max())
        say(f"temporal flickering: {about['faster_than_vbench']} times, {about['largest_difference']:.1e} apart")
    write(given.out, rows, cores=os.cpu_count(), opencv=cv2.__version__, **about)


if __name__ == "__main__":
    main()
