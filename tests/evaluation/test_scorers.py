"""Scorers behind their contract: another package's, and the official ones with miniatures of their packages."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from cfjax.__main__ import main
from cfjax.core.errors import UserError
from cfjax.evaluation.clip_folders import PAGE, RESULT
from cfjax.evaluation.clip_summary import VIDEOS, load_scored
from cfjax.evaluation.reward_scorers import frames_a_second
from cfjax.evaluation.scorers import ScorerSettings, checked_values, known_scorers, make_scorer, parse_options
from cfjax.evaluation.vbench_scorer import FILES, OPTIONS
from cfjax.evaluation.vbench_total import DIMENSIONS
from cfjax.evaluation.video import write_mp4
from tests.commands import ROOT
from tests.evaluation.scorer_packages import (
    BRIGHT,
    BRIGHT_POINTS,
    HPSV3,
    LPIPS,
    TORCH,
    write_package,
    write_vbench,
)
from tests.golden.record_vbench import moving


def evaluate(workdir: Path, *scores: str, **keys: object) -> int:
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in keys.items()]
    given += [f"--config.score={','.join(scores)}"] * bool(scores)
    common = [f"--config={ROOT}/configs/evaluate.py", "--config.workers=1", "--config.metrics=flickering"]
    return main(["evaluate", *common, f"--workdir={workdir}", *given])


def system(folder: Path, names: dict[str, int], length: int = 3) -> Path:
    """Small clips by name; the number is the first frame's."""
    folder.mkdir(parents=True)
    whole = moving(32 + length, 32, 48)
    for name, start in names.items():
        write_mp4(folder / f"{name}.mp4", whole[start : start + length], 8)
    return folder


CLIPS = {"a cat-0": 0, "a cat-1": 4, "a very small dog-0": 9}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return system(tmp_path_factory.mktemp("scored") / "videos", CLIPS)


@pytest.fixture
def bright(tmp_path, monkeypatch) -> Path:
    """An installed package with a scorer, and its weights."""
    write_package(tmp_path / "site", "bright_package", "7.0", {"bright_package.py": BRIGHT}, BRIGHT_POINTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "bright_package", raising=False)
    (tmp_path / "bright.bin").write_bytes(b"weights")
    return tmp_path / "bright.bin"


def found(workdir: Path) -> dict[str, dict[str, float]]:
    return {score.file: dict(score.values) for score in load_scored(workdir).scores}


def test_a_package_adds_a_scorer_and_its_keys(videos, bright, tmp_path, capsys):
    keys = {"videos": videos, "scorers__bright__weights": bright, "scorers__bright__options": "scale=2"}
    assert {"bright", "broken", "lpips", "vbench"} <= known_scorers().keys() and "no name" not in known_scorers()
    assert evaluate(tmp_path / "w", "bright", **keys) == 0
    output = capsys.readouterr().out
    assert "bright.words" in output and "temporal_flickering" in output
    values = found(tmp_path / "w")
    assert {name: clip["bright.words"] for name, clip in values.items()} == {
        "a cat-0.mp4": 2, "a cat-1.mp4": 2, "a very small dog-0.mp4": 4,
    }  # fmt: skip
    record = json.loads((tmp_path / "w" / VIDEOS).read_text())
    assert record["scorers"]["bright"] == {
        "version": "7", "weights": {"bright.bin": hashlib.sha256(b"weights").hexdigest()}, "options": {"scale": "2"},
        "folder": {}, "clips": 3, "against": 0,
    }  # fmt: skip
    assert record["summary"]["bright"]["prompts"] == 2 and record["summary"]["bright"]["clips"] == 3


def test_the_page_s_scorer_works(videos, tmp_path, monkeypatch, capsys):
    """The example of docs/evaluate.md, installed as a package."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluate.md").read_text(), re.DOTALL)
    points = "[cfjax.scorers]\nbrightness = page_package:make\n"
    write_package(tmp_path / "site", "page_package", "1.0", {"page_package.py": code}, points)
    monkeypatch.syspath_prepend(tmp_path / "site")
    asked = {"videos": videos, "scorers__brightness__options": "scale=2"}
    assert evaluate(tmp_path / "w", "brightness", **asked) == 0
    frames = _frames(videos / "a cat-0.mp4")
    assert found(tmp_path / "w")["a cat-0.mp4"]["brightness"] == pytest.approx(2 * frames.mean(), rel=1e-12)
    capsys.readouterr()


def test_a_scorer_goes_on_where_it_was_stopped(videos, bright, tmp_path, capsys):
    """Another clip, other weights, another option or prompt, and a cut record are scored again; nothing else is."""
    log, work, folder = tmp_path / "scored.txt", tmp_path / "w", tmp_path / "videos"
    shutil.copytree(videos, folder)

    def scored(**more: object) -> list[str]:
        log.write_text("")
        assert evaluate(work, "bright", videos=folder, scorers__bright__weights=bright, **more) == 0
        return log.read_text().split("\n")[:-1]

    names = [f"{name}.mp4" for name in CLIPS]
    assert scored() == names and scored() == []
    record = work / "scorers" / "bright" / "clips" / "a cat-1.mp4.json"
    record.write_bytes(record.read_bytes()[:-9])
    assert scored() == ["a cat-1.mp4"]
    write_mp4(folder / "a cat-0.mp4", moving(3, 32, 48)[::-1], 8)
    assert scored() == ["a cat-0.mp4"]
    assert scored(scorers__bright__options="scale=3") == names
    bright.write_bytes(b"other weights")
    assert scored(scorers__bright__options="scale=3") == names
    (tmp_path / "list.txt").write_text("A cat!\na very small dog\n")
    assert scored(scorers__bright__options="scale=3", prompts=tmp_path / "list.txt") == names[:2]
    capsys.readouterr()


def test_scores_are_compared_like_any_metric(videos, bright, tmp_path, capsys):
    other = system(tmp_path / "other", {"a cat-0": 2, "a cat-1": 3, "a very small dog-0": 1})
    keys = {"scorers__bright__weights": bright}
    assert evaluate(tmp_path / "w", "bright", compare=f"{videos},{other}", **keys) == 0
    rows = json.loads((tmp_path / "w" / RESULT).read_text())
    assert rows["metrics"]["bright"]["prompts"] == 2 and rows["metrics"]["bright.words"]["difference"] == 0
    assert rows["scorers"] == {"bright": "7"} and "bright.words" in (tmp_path / "w" / PAGE).read_text()
    assert evaluate(tmp_path / "b", "bright", videos=other, scorers__bright__options="scale=2", **keys) == 0
    capsys.readouterr()
    assert evaluate(tmp_path / "c", compare=f"{tmp_path / 'w' / 'a'},{tmp_path / 'b'}") == 0
    assert "not compared: bright, whose options differ: A {}, B {'scale': '2'}" in capsys.readouterr().out
    assert "bright" not in json.loads((tmp_path / "c" / RESULT).read_text())["metrics"]
    assert evaluate(tmp_path / "c", "bright", compare=f"{tmp_path / 'b'},{tmp_path / 'b'}", **keys) == 2
    assert "was measured before; give score where its clips are measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scores", "keys", "line"),
    [
        (("sharp",), {}, "sharp is none of"),
        (("bright", "bright"), {}, "bright is named twice"),
        (("bright",), {}, "--config.scorers.bright.weights is missing: bright.bin of its page"),
        (("bright",), {"scorers__bright__weights": "nowhere"}, "no such file or folder; bright.bin of its page"),
        (("bright",), {"scorers__bright__options": "size=2"}, "'size' is none of scale"),
        (("bright",), {"scorers__bright__options": "2"}, "'2' is no NAME=VALUE"),
        (("broken",), {}, "broken (bright_package:missing of bright_package) cannot be made: AttributeError"),
        (("empty",), {}, "none of ClipScorer, SetScorer and FolderScorer"),
        ((), {"scorers__fvd__weights": "i3d.pt"}, "scorers.fvd.weights is set, and score does not name fvd"),
        (("fvd",), {"scorers__fvd__weights": "README.md"}, "no TorchScript"),
        (("fvd",), {"scorers__fvd__options": "frames=x"}, "frames=x is no number of frames"),
        (("fvd",), {"scorers__fvd__device": "tpu"}, "--config.scorers.fvd.device=tpu: use cpu or cuda"),
        (("lpips",), {"scorers__lpips__options": "net=big"}, "net=big is none of alex, vgg, squeeze"),
        (("lpips",), {}, "pip install lpips==0.1.4 torchvision"),
        (("vbench",), {}, "weights is missing: VBench's cache folder"),
        (("vbench",), {"scorers__vbench__options": "dimensions=beauty"}, "beauty is none of mode=standard's"),
        (("vbench",), {"scorers__vbench__options": "mode=custom|dimensions=color"}, "color is none of mode=custom's"),
        (("vbench",), {"scorers__vbench__weights": "tests"}, "has no "),
        (("vbench",), {"scorers__vbench__options": "dimensions=temporal_flickering"}, "pip install vbench==0.1.5"),
        (("visionreward",), {}, "VisionReward_video_qa_select.txt"),
        (("hpsv3",), {}, "hf download MizzenAI/HPSv3"),
        (("hpsv3",), {"scorers__hpsv3__weights": "README.md"}, "pip install hpsv3==1.0.0, and name its interpreter"),
        (("hpsv3",), {"scorers__hpsv3__weights": "README.md", "scorers__hpsv3__python": "no/python"}, "cannot be run"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told_before_anything_is_measured(
    scores, keys, line, videos, bright, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "lpips", None)
    if scores == ("fvd",) and "device" in line:
        keys = {**keys, "scorers__fvd__weights": "README.md"}
    assert evaluate(tmp_path / "w", *scores, videos=videos, **keys) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "w" / "clips").exists()


def test_scorers_need_clips_and_references(videos, bright, tmp_path, capsys):
    assert evaluate(tmp_path / "w", "bright") == 2
    assert "scorers score clips: give --config.videos or compare" in capsys.readouterr().err


def test_a_scorer_that_fails_is_one_line_and_keeps_what_it_had(videos, bright, tmp_path, capsys, monkeypatch):
    text = BRIGHT.replace("        means =", "        assert 'dog' not in clip.name, 'no\\ndogs'\n        means =")
    (tmp_path / "site" / "bright_package.py").write_text(text)
    assert evaluate(tmp_path / "w", "bright", videos=videos, scorers__bright__weights=bright) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cfjax evaluate: ")]
    assert "scorer bright, a very small dog-0.mp4: AssertionError: no dogs" in error
    assert len(list((tmp_path / "w" / "scorers" / "bright" / "clips").iterdir())) == 2


def test_numbers_are_checked():
    assert checked_values("s", "c", {"": 1, "edge": np.float32(2), "gone": float("nan")}) == {"s": 1.0, "s.edge": 2.0}
    for wrong in ([1], {"Edge": 1}, {"edge": "much"}, {1: 1}):
        with pytest.raises(UserError, match="scorer s, c: "):
            checked_values("s", "c", wrong)
    assert parse_options("a=1| b = x=y ", "k") == {"a": "1", "b": "x=y"}
    with pytest.raises(UserError, match="given twice"):
        parse_options("a=1|a=2", "k")


# ---- LPIPS


def test_lpips_of_a_miniature_network(videos, tmp_path, capsys, monkeypatch):
    """torchvision's names become the package's; a reference of another size or none has no number."""
    torch = pytest.importorskip("torch")
    write_package(tmp_path / "site", "lpips", "0.1.4", {"lpips/__init__.py": LPIPS})
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    state = {
        "features.0.weight": torch.full((2, 3, 1, 1), 0.5), "features.0.bias": torch.zeros(2),
        "features.3.weight": torch.zeros(2, 2, 1, 1), "features.3.bias": torch.tensor([0.0, 0.25]),
        "classifier.6.weight": torch.zeros(1),
    }  # fmt: skip
    torch.save(state, tmp_path / "alex.pth")
    real = system(tmp_path / "real", {"a cat-0": 1, "a cat-1": 4})
    write_mp4(real / "a very small dog-0.mp4", moving(3, 48, 48), 8)
    keys = {"videos": videos, "against": real, "scorers__lpips__weights": tmp_path / "alex.pth"}
    assert evaluate(tmp_path / "w", "lpips", **keys) == 0
    assert "lpips: a very small dog-0.mp4: the reference has 48 x 48, not 48 x 32 pixels" in capsys.readouterr().out
    values = found(tmp_path / "w")
    scores = {score.file: score for score in load_scored(tmp_path / "w").scores}
    clips = [_frames(folder / "a cat-0.mp4").astype(np.float64) for folder in (videos, real)]
    expected = 0.75 * np.abs(clips[0] - clips[1]).mean() / 127.5
    print(f"LPIPS' inputs: {abs(values['a cat-0.mp4']['lpips'] - expected):.1e}")
    assert values["a cat-0.mp4"]["lpips"] == pytest.approx(expected, rel=1e-6)
    assert values["a cat-1.mp4"]["lpips"] == 0 and "lpips" not in scores["a very small dog-0.mp4"].values
    del state["features.3.bias"]
    torch.save(state, tmp_path / "alex.pth")
    assert evaluate(tmp_path / "w", "lpips", **keys) == 2
    assert "has no 3.bias of its network" in capsys.readouterr().err


def _frames(file: Path) -> np.ndarray:
    from cfjax.evaluation.clip_source import SourceClip, reading

    with reading(SourceClip(file.name, file)) as opened:
        return np.stack([np.array(frame) for frame in opened.frames])


# ---- VBench


@pytest.fixture
def vbench(tmp_path, monkeypatch) -> Path:
    """VBench's miniature for workers, and a cache folder whose files are all there."""
    write_vbench(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    cache = tmp_path / "cache"
    for name in {name for names in FILES.values() for name in names}:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(name)
    (cache / "called.txt").write_text("")
    return cache


def test_vbench_runs_its_own_code_dimension_by_dimension(videos, vbench, tmp_path, capsys):
    keys = {"videos": videos, "scorers__vbench__weights": vbench}
    some = "mode=custom|dimensions=imaging_quality,overall_consistency,subject_consistency"
    assert evaluate(tmp_path / "w", "vbench", **keys, scorers__vbench__options=some) == 0
    values = found(tmp_path / "w")["a very small dog-0.mp4"]
    names = ("subject_consistency", "imaging_quality", "overall_consistency")
    assert [values[f"vbench.{name}"] for name in names] == [0.4] * 3
    record = json.loads((tmp_path / "w" / VIDEOS).read_text())["scorers"]["vbench"]
    assert record["folder"] == {f"vbench.{name}": pytest.approx(0.8 / 3) for name in names}
    assert (
        record["version"].startswith("vbench 0.1.5") and "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth" in record["weights"]
    )
    called = (vbench / "called.txt").read_text()
    assert called == "".join(f"{name} custom_input []\n" for name in names)
    assert evaluate(tmp_path / "w", "vbench", **keys, scorers__vbench__options=some) == 0
    assert (vbench / "called.txt").read_text() == called
    results = tmp_path / "w" / "scorers" / "vbench"
    assert main(["evaluate", f"--config.vbench={results}", f"--workdir={tmp_path / 't'}"]) == 0
    assert "imaging_quality" in capsys.readouterr().out


def test_vbenchs_standard_mode_finds_clips_by_its_list(videos, vbench, tmp_path, capsys):
    """A dimension that ends the process costs itself alone: those before it are kept."""
    keys = {"videos": videos, "scorers__vbench__weights": vbench}
    assert evaluate(tmp_path / "w", "vbench", **keys, scorers__vbench__options="dimensions=color") == 0
    output = capsys.readouterr().out
    assert "vbench: color 26.67" in output and "3 videos, fewer than 5 of each prompt" in output
    assert found(tmp_path / "w")["a cat-1.mp4"]["vbench.color"] == 0.2
    both = {"scorers__vbench__options": "dimensions=motion_smoothness,color"}
    assert evaluate(tmp_path / "w", "vbench", **keys, **both) == 2
    assert "ended with code 3" in capsys.readouterr().err
    assert evaluate(tmp_path / "w", "vbench", **keys, scorers__vbench__options="dimensions=color") == 0
    assert (vbench / "called.txt").read_text().count("color") == 1
    (vbench / "raft_model/models/raft-things.pth").unlink()
    assert evaluate(tmp_path / "w", "vbench", **keys) == 2
    assert "has no raft_model/models/raft-things.pth, which VBench reads" in capsys.readouterr().err
    (tmp_path / "site" / "vbench-0.1.5.dist-info" / "METADATA").write_text("Name: vbench\nVersion: 0.1.3\n")
    assert evaluate(tmp_path / "w", "vbench", **keys, scorers__vbench__options="dimensions=color") == 2
    assert "vbench 0.1.3 is installed, and vbench 0.1.5 is meant" in capsys.readouterr().err
    accepted = {"scorers__vbench__options": "dimensions=color|version=0.1.3"}
    assert evaluate(tmp_path / "w", "vbench", **keys, **accepted) == 0


def test_vbench_long_gives_each_long_video_its_mean(videos, vbench, tmp_path, capsys):
    keys = {"videos": videos, "scorers__vbench_long__weights": vbench}
    some = {"scorers__vbench_long__options": "mode=custom|dimensions=dynamic_degree"}
    assert evaluate(tmp_path / "w", "vbench_long", **keys, **some) == 0
    values = found(tmp_path / "w")
    got = [values[f"{name}.mp4"]["vbench_long.dynamic_degree"] for name in CLIPS]
    assert got == pytest.approx([0.05, 0.15, 0.25])
    assert "dynamic_degree 15.00" in capsys.readouterr().out


def test_vbenchs_dimensions_are_those_of_its_total():
    assert FILES.keys() == DIMENSIONS.keys() and OPTIONS["mode"] == "standard"


# ---- HPSv3


def test_hpsv3_is_the_mean_over_frames(videos, tmp_path, capsys, monkeypatch):
    files = {
        "hpsv3/__init__.py": HPSV3,
        "torch.py": TORCH,
        "hpsv3/config/HPSv3_7B.yaml": "a: 1\nmodel_name_or_path: x/y\n",
    }
    write_package(tmp_path / "site", "hpsv3", "1.0.0", files)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "HPSv3.safetensors").write_text("weights")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    keys = {"videos": videos, "scorers__hpsv3__weights": tmp_path / "HPSv3.safetensors"}
    options = {"scorers__hpsv3__options": f"frames=2|base={tmp_path / 'base'}"}
    assert evaluate(tmp_path / "w", "hpsv3", **keys, **options) == 0
    values = found(tmp_path / "w")
    assert [values[f"{name}.mp4"]["hpsv3"] for name in CLIPS] == [2.5, 2.5, 4.5]
    config = (tmp_path / "w" / "scorers" / "hpsv3" / "HPSv3_7B.yaml").read_text()
    assert config == f'a: 1\nmodel_name_or_path: "{tmp_path / "base"}"\n'
    assert not list((tmp_path / "w" / "scorers" / "hpsv3").glob("*.png"))
    assert len(json.loads((tmp_path / "w" / VIDEOS).read_text())["scorers"]["hpsv3"]["weights"]) == 2
    capsys.readouterr()


# ---- VisionReward


def test_frames_nearest_to_each_second():
    """Those of `load_video(..., strategy="chat")`, on time stamps n / fps."""
    for count, fps in ((81, 16.0), (3, 8.0), (1, 24.0), (600, 24.0), (2000, 30.0), (49, 7.5)):
        stamps = [n / fps for n in range(count)]
        seconds = range(round(max(stamps)) + 1)
        nearest = [stamps.index(min(stamps, key=lambda x, s=second: abs(x - s))) for second in seconds]
        assert frames_a_second(count, fps) == nearest[:24]


def test_settings_name_their_keys(tmp_path):
    with pytest.raises(UserError, match=r"--config.scorers.hpsv3.options: frames=0 is no number of frames"):
        make_scorer(ScorerSettings("hpsv3", options={"frames": "0"}, folder=tmp_path))
