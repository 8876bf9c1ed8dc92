"""`cfjax evaluate` on folders of clips of any kind, and on two of them: from the command line to the files."""

import json
import os
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cfjax.__main__ import main
from cfjax.evaluation import clip_score, opencv
from cfjax.evaluation.clip_folders import PAGE, RESULT
from cfjax.evaluation.clip_score import record_name
from cfjax.evaluation.clip_summary import VIDEOS, load_scored
from cfjax.evaluation.video import write_gif, write_mp4, write_png
from tests.commands import ROOT
from tests.golden.record_vbench import moving, noisy


def evaluate(workdir: Path, **keys: object) -> int:
    given = [f"--config.{name}={value}" for name, value in keys.items()]
    return main(
        ["evaluate", f"--config={ROOT}/configs/evaluate.py", f"--workdir={workdir}", "--config.workers=2", *given]
    )


def write_webm(path: Path, clip: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=16)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_folder(folder: Path, clip: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip):
        write_png(folder / f"{number:03d}.png", frame)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A clip of every kind, one that is no video, and what lies beside videos."""
    folder = tmp_path_factory.mktemp("any") / "videos"
    folder.mkdir()
    clip = moving()
    write_mp4(folder / "a cat-0.mp4", clip, 16)
    write_mp4(folder / "a cat-1.mp4", clip[::-1], 16)
    write_webm(folder / "a dog-0.webm", clip)
    write_gif(folder / "an owl-0.gif", clip, 12.5)
    (folder / "broken-0.mp4").write_bytes(b"no video")
    write_png(folder / "contact_sheet.png", clip[0])
    write_folder(folder / "frames" / "a fox-0", clip)
    return folder


def test_every_kind_of_clip_is_measured(videos, tmp_path, capsys):
    assert evaluate(tmp_path, videos=videos, block=4, fps=16) == 0
    output = capsys.readouterr().out
    assert "5 clips; prompts by VBench's names PROMPT-SEED" in output and "not measured: broken-0.mp4: unread" in output
    found = json.loads((tmp_path / VIDEOS).read_text())
    clips = {clip["file"]: clip for clip in found["clips"]}
    assert list(clips) == [
        "a cat-0.mp4", "a cat-1.mp4", "a dog-0.webm", "an owl-0.gif", "broken-0.mp4", "frames/a fox-0",
    ]  # fmt: skip
    assert clips["broken-0.mp4"]["fault"].startswith("unreadable") and not clips["broken-0.mp4"]["values"]
    exact = clips["frames/a fox-0"]
    assert (exact["prompt"], exact["seed"], exact["frames"], exact["width"]) == ("a fox", 0, 12, 64)
    assert exact["values"]["flow"] == pytest.approx(5**0.5, rel=0.15) and exact["values"]["seam"] > 0
    for name, clip in clips.items():
        if not clip["fault"]:
            assert clip["frames"] == 12 and clip["values"].keys() == exact["values"].keys(), name
            assert clip["values"]["temporal_flickering"] == pytest.approx(
                exact["values"]["temporal_flickering"], abs=0.02
            )
    assert found["summary"]["flow"]["clips"] == 5 and found["summary"]["flow"]["prompts"] == 4
    assert found["diversity"]["diversity_prompts"] == 1 and found["diversity"]["seed_distance"] > 0
    assert load_scored(tmp_path).scores[0].values == clips["a cat-0.mp4"]["values"]


def test_it_goes_on_where_it_was_stopped(videos, tmp_path, capsys, monkeypatch):
    """Clips with a record are not measured again; another byte, another setting or a cut record is."""
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    made: list[str] = []
    measure = clip_score.measure_clip
    monkeypatch.setattr(clip_score, "measure_clip", lambda clip, *more: made.append(clip.name) or measure(clip, *more))
    work = tmp_path / "work"
    keys = {"videos": folder, "fps": 16, "metrics": "flickering"}
    assert evaluate(work, **keys) == 0 and len(made) == 6
    first = (work / VIDEOS).read_bytes()
    made.clear()
    assert evaluate(work, **keys) == 0 and not made and (work / VIDEOS).read_bytes() == first
    record = work / "clips" / "a cat-0.mp4.json"
    record.write_bytes(record.read_bytes()[:-20])
    (work / "clips" / "a cat-1.mp4.json").unlink()
    write_mp4(folder / "a dog-0.mp4", moving()[:8], 16)
    assert evaluate(work, **keys) == 0 and sorted(made) == ["a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4"]
    made.clear()
    assert evaluate(work, **keys | {"fps": 8}) == 0 and len(made) == 7
    assert not [file for file in (work / "clips").rglob("*") if "partial" in file.name]
    capsys.readouterr()


def test_a_reference_folder_is_compared_name_by_name(tmp_path, capsys):
    clip = moving(6, 192, 256)
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    write_folder(tmp_path / "ours" / "a", noisy(clip))
    write_folder(tmp_path / "theirs" / "a", clip)
    write_folder(tmp_path / "ours" / "b", clip)
    write_folder(tmp_path / "theirs" / "b", clip[:4])
    write_folder(tmp_path / "ours" / "c", clip)
    write_folder(tmp_path / "theirs" / "c", clip[:, :96])
    write_folder(tmp_path / "ours" / "d", clip)
    write_folder(tmp_path / "ours" / "f", clip)
    write_folder(tmp_path / "theirs" / "f", clip)
    (tmp_path / "theirs" / "f" / "003.png").write_bytes(b"no picture")
    write_folder(tmp_path / "theirs" / "e", clip)
    keys = {"videos": tmp_path / "ours", "against": tmp_path / "theirs", "fps": 8, "metrics": "flickering"}
    assert evaluate(tmp_path / "work", **keys) == 0
    output = capsys.readouterr().out
    values = {score.file: score.values for score in load_scored(tmp_path / "work").scores}
    assert 20 < values["a"]["psnr"] < 30 and values["a"]["ssim"] < 0.95 and values["a"]["ms_ssim"] < 1
    assert values["b"]["psnr"] == 100 and values["b"]["ssim"] == pytest.approx(1, abs=1e-6)
    assert not [name for name in "cdf" if "psnr" in values[name] or "temporal_flickering" not in values[name]]
    for line in (
        "b: the reference is shorter; 4 frames were compared",
        "c: not compared: the reference has 256 x 96, not 256 x 192 pixels",
        "f: not compared: the reference is unreadable",
        "1 videos without a reference: d",
        "1 references without a video: e",
    ):
        assert line in output
    assert evaluate(tmp_path / "w", **keys | {"against": tmp_path / "work"}) == 2
    assert "no videos in it" in capsys.readouterr().err


def test_recorded_actions_are_read_beside_the_clip(tmp_path, capsys):
    write_mp4(tmp_path / "v" / "a.mp4", moving(17), 8)
    (tmp_path / "v" / "a.actions.json").write_text(json.dumps({"pan": [-1] * 17, "tilt": [-2] * 17}))
    assert evaluate(tmp_path / "w", videos=tmp_path / "v", metrics="motion") == 0
    assert load_scored(tmp_path / "w").scores[0].values["action_sign"] == 1.0
    (tmp_path / "v" / "a.actions.json").write_text(json.dumps({"left": [1]}))
    assert evaluate(tmp_path / "w", videos=tmp_path / "v", metrics="motion") == 2
    assert "a.actions.json: left is unknown" in capsys.readouterr().err


def system(folder: Path, step: int, names: str) -> Path:
    """Clips of four prompts and two seeds; `step` frames are left out between two."""
    folder.mkdir()
    whole = moving(40)
    for number, prompt in enumerate(("a cat", "a dog", "a fox", "an owl")):
        for seed in (0, 1):
            clip = whole[number + seed :: step][:12]
            write_mp4(folder / names.format(n=2 * number + seed, prompt=prompt, seed=seed), clip, 16)
    return folder


def test_two_systems_are_compared_on_one_page(tmp_path, capsys):
    a = system(tmp_path / "A", 1, "{prompt}-{seed}.mp4")
    b = system(tmp_path / "B", 2, "{n:03d}_{prompt}_seed{seed}.mp4")
    write_mp4(a / "only here-0.mp4", moving(), 16)
    measured = tmp_path / "measured"
    assert evaluate(measured, videos=a) == 0 and evaluate(tmp_path / "w", compare=f"{measured},{b}") == 0
    output = capsys.readouterr().out
    assert "8 pairs, by prompt and seed (A: VBench's names PROMPT-SEED; B: names 000_PROMPT_seed0)" in output
    assert "1 of A without a partner: only here-0.mp4" in output
    found = json.loads((tmp_path / "w" / RESULT).read_text())
    flow = found["metrics"]["flow"]
    assert found["unit"] == "prompt" and flow["prompts"] == 4 and found["alone_a"] == ["only here-0.mp4"]
    assert flow["relative"] > 0.5 and flow["rank_biserial"] == 1.0 and flow["p"] == 0.125
    page = (tmp_path / "w" / PAGE).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page) and page.count('class="clip"') == 12
    assert page.count("data:image/webp") == 12 and "Where they differ most" in page and "only here-0.mp4" in page
    shutil.rmtree(a)
    assert evaluate(tmp_path / "w", compare=f"{measured},{b}") == 0
    assert "no longer where they were measured" in (tmp_path / "w" / PAGE).read_text()
    capsys.readouterr()


def test_a_manifest_says_prompts_and_seeds(tmp_path):
    for name in ("x", "y"):
        write_mp4(tmp_path / "v" / f"{name}.mp4", moving(), 16)
    (tmp_path / "v" / "manifest.csv").write_text("file,prompt,seed\nx.mp4,a cat,3\ny.mp4,a dog,\n")
    assert evaluate(tmp_path / "w", videos=tmp_path / "v", metrics="flickering") == 0
    found = load_scored(tmp_path / "w")
    assert [(one.prompt, one.seed) for one in found.identity] == [("a cat", 3), ("a dog", -1)]
    assert found.found_by == "manifest.csv"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"videos": "nowhere"}, "--config.videos=nowhere: no such folder"),
        ({"videos": "nowhere", "compare": "a,b"}, "videos and compare exclude each other"),
        ({"against": "a"}, "is compared with the clips of --config.videos; give both"),
        ({"compare": "a,"}, "name two folders, as --config.compare=A,B"),
        ({"videos": ".", "metrics": "flow"}, "flow is none of flickering, frames, motion"),
        ({"videos": ".", "first_block": 9}, "give the others' length too"),
        ({"videos": "gs://bucket/videos"}, "videos are read from this machine"),
    ],
)
def test_mistakes_are_one_line(keys, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(tmp_path / "w", **keys) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_without_opencv_a_line_says_so(tmp_path, capsys, monkeypatch):
    write_mp4(tmp_path / "v" / "a.mp4", moving(2), 16)
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert evaluate(tmp_path / "w", videos=tmp_path / "v") == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err
    assert opencv.opencv.__doc__


def test_long_names_have_records_of_their_own():
    names = ["a" * 240 + end + ".mp4" for end in "bc"]
    found = {record_name(f"folder/{name}") for name in names}
    assert len(found) == 2 and all(len(os.fsencode(Path(name).name)) < 230 for name in found)
    assert record_name("a.mp4") == "a.mp4.json"


def test_a_picture_alone_is_no_clip(tmp_path, capsys):
    (tmp_path / "v").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "v" / "a.png")
    assert evaluate(tmp_path / "w", videos=tmp_path / "v") == 2
    assert "no videos in it, and no folders of pictures" in capsys.readouterr().err
