"""`cfjax generate` over many requests: killed and corrected commands resume exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import cfjax.generate as verb
from cfjax.core.errors import UserError
from tests.bucket import Bucket, serving
from tests.commands import ROOT, cfjax

PROMPTS = ("a red circle moving left", "a blue square moving up", "a green triangle moving right")
VIDEOS = 12
KEYS: dict[str, object] = {
    "run": "toy_teacher",
    "prompt": "|".join(PROMPTS),
    "videos": 4,
    "sampler__solver_steps": 2,
    "batch": 5,
    "scale": 2,
    "save_latents": True,
    "progress": False,
}


def generate(workdir: Path | str, **keys: object) -> int:
    return cfjax("generate", "generate.py", workdir, **{**KEYS, **keys})


def made(folder: Path) -> dict[str, bytes]:
    """Videos and latents by name; the order of names in the head of a file of latents does not count."""
    latents = {file.name: file.read_bytes()[-(12 * 4 * 4 * 16 * 4) :] for file in folder.glob("*.safetensors")}
    return latents | {file.name: file.read_bytes() for file in folder.glob("*.mp4")}


def names(folder: Path) -> list[str]:
    """What a folder holds besides videos and latents."""
    return sorted(file.name for file in folder.iterdir() if file.suffix not in (".mp4", ".safetensors"))


COMPLETE = ["checksums.json", "contact_sheet.png", "settings.json", "videos.jsonl"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A set that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("sets") / "whole"
    assert generate(workdir) == 0
    assert names(workdir) == COMPLETE and len(made(workdir)) == 2 * VIDEOS
    return workdir


class Stop(BaseException):
    """In place of a signal, where a process of its own would be slow."""


def stopping(patch: pytest.MonkeyPatch, videos: int) -> list[str]:
    """Ends the command at the file that comes after so many; the files it wrote."""
    written: list[str] = []
    write = verb.write_mp4

    def stop(path: Path, *args: object, **kwargs: object) -> int:
        if len(written) == videos:
            raise Stop
        written.append(path.name)
        return write(path, *args, **kwargs)

    patch.setattr(verb, "write_mp4", stop)
    return written


@pytest.mark.parametrize("videos", [0, 7])
def test_an_interrupted_set_ends_in_the_same_bits(whole, videos, monkeypatch, tmp_path, capsys):
    """After none, or amid a batch. Settings and the list of all videos come first, finished videos are not touched."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopping(patch, videos)
        generate(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    complete = json.loads((whole / "settings.json").read_text())
    assert (settings["complete"], complete["complete"]) == (False, True) and settings["videos"] == complete["videos"]
    assert (
        "timings" not in settings and complete.items() >= {k: v for k, v in settings.items() if k != "complete"}.items()
    )
    assert names(tmp_path) == COMPLETE[2:]
    assert len((tmp_path / "videos.jsonl").read_text().splitlines()) == videos
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.mp4")}
    written = stopping(monkeypatch, VIDEOS)
    assert generate(tmp_path, resume=True) == 0
    assert len(written) == VIDEOS - videos and not set(written) & before.keys()
    assert before.items() <= {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.mp4")}.items()
    assert made(tmp_path) == made(whole) and names(tmp_path) == COMPLETE
    message = capsys.readouterr().out
    assert (f"{tmp_path} has 7 of 12 videos; going on with 5" in message) == (videos == 7)
    record = json.loads((tmp_path / "settings.json").read_text())
    assert record["complete"] and record["timings"]["videos"] == VIDEOS - videos
    with Image.open(tmp_path / "contact_sheet.png") as sheet, Image.open(whole / "contact_sheet.png") as other:
        assert sheet.size == other.size


def test_a_complete_set_is_left_alone(whole, monkeypatch, capsys):
    """Nothing is made, nothing is written, no weights are read; without its contact sheet, that alone is drawn."""
    monkeypatch.delattr(verb, "load_weights")
    monkeypatch.delattr(verb, "fill")
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    assert generate(whole, resume=True) == 0
    assert f"{whole} is complete, 12 videos; nothing to make" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before
    sheet = whole / "contact_sheet.png"
    picture, timings = sheet.read_bytes(), json.loads((whole / "settings.json").read_text())["timings"]
    sheet.unlink()
    assert generate(whole, resume=True) == 0
    assert sheet.exists() and json.loads((whole / "settings.json").read_text())["timings"] == timings
    sheet.write_bytes(picture)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampler__solver_steps": 3}, "sampler.steps=2, now it is 3"),
        ({"sampler__guidance": 5.0}, "sampler.guidance=3.0, now it is 5.0"),
        ({"negative_prompt": "a red circle moving up"}, "negative_prompt='', now it is 'a red circle moving up'"),
        ({"precision": "bfloat16"}, "network.precision.compute='float32', now it is 'bfloat16'"),
        ({"frames": 11}, "frames=12, now it is 11"),
        ({"height": 48}, "height=32, now it is 48"),
        ({"scale": 1}, "scale=2, now it is 1"),
        ({"fps": 16.0}, "fps=8.0, now it is 16.0"),
    ],
)
def test_other_settings_are_not_mixed_in(whole, keys, message, capsys):
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    assert generate(whole, resume=True, videos=5, **keys) == 2
    error = capsys.readouterr().err
    assert (
        f"settings.json: its videos were made with {message}; give the same again" in error and error.count("\n") == 1
    )
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before


def test_another_run_is_reported_by_its_weights(whole, tmp_path, capsys):
    """By what they are: a copy elsewhere is the same run, other weights under the same name are not."""
    toy = ROOT / "cfjax" / "assets" / "toy_teacher"
    shutil.copytree(toy, tmp_path / "copy")
    assert generate(whole, resume=True, run=tmp_path / "copy") == 0
    assert "nothing to make" in capsys.readouterr().out
    weights = tmp_path / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert generate(whole, resume=True, run=tmp_path / "copy") == 2
    assert "its videos were made with run.weights=" in capsys.readouterr().err


def test_more_and_fewer_requests(whole, tmp_path, capsys, monkeypatch):
    """A row more makes its videos only; videos of a row less are told, and stay."""
    workdir = tmp_path / "set"
    shutil.copytree(whole, workdir)
    kept = made(workdir)
    written = stopping(monkeypatch, VIDEOS)
    assert generate(workdir, resume=True, prompt="|".join((*PROMPTS, "a cyan circle moving up"))) == 0
    assert len(written) == 4 and kept.items() <= made(workdir).items()
    assert generate(workdir, resume=True, prompt="|".join(PROMPTS[1:])) == 0
    message = capsys.readouterr().out
    assert f"{workdir}: 8 videos no longer requested; kept: 000_a_red_circle" in message
    assert f"{workdir} is complete, 8 videos; contact sheets and settings" in message and len(written) == 4
    assert (workdir / "000_a_blue_square_moving_up_seed0.mp4").read_bytes() == kept[
        "004_a_blue_square_moving_up_seed0.mp4"
    ]
    assert len(json.loads((workdir / "settings.json").read_text())["videos"]) == 8


def test_words_that_the_toy_never_saw_are_reported_together(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(verb, "load_weights")
    rows = ["a red circle moving left", "a red dog moving left", "a red circle moving left", "a red cat", "red " * 8]
    (tmp_path / "prompts.txt").write_text("\n".join((*rows, "a red dog moving left")))
    assert generate(tmp_path / "out", prompts=tmp_path / "prompts.txt") == 2
    error = capsys.readouterr().err
    assert (
        "prompts.txt, 16 of 24 requests: line 2 and 1 more: prompt 'a red dog moving left': this model never saw"
        in error
    )
    assert "; line 4: prompt 'a red cat': this model never saw 'cat'; write" in error and error.count("\n") == 1
    assert "; line 5: prompt 'red red" in error and "has 9 tokens" in error
    assert generate(tmp_path / "out", negative_prompt="blurry") == 2
    assert "negative_prompt 'blurry': this model never saw 'blurry'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_workdir_that_cannot_be_is_reported_before_the_run_is_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(verb, "open_run")
    (tmp_path / "file").touch()
    assert generate(tmp_path / "file" / "videos") == 2
    assert f"{tmp_path}/file is a file, or leads nowhere; name a folder" in capsys.readouterr().err


def test_a_failure_before_the_first_video_leaves_nothing(tmp_path, monkeypatch):
    """The text rows that were computed, the settings and the folder that was made are gone again."""

    def fail(run: object, merge: object) -> None:
        assert (tmp_path / "new" / verb.TEXT_ROWS).is_dir()
        raise UserError("weights: they cannot be read")

    monkeypatch.setattr(verb, "load_weights", fail)
    assert generate(tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_may_be_tried_again(tmp_path, monkeypatch, capsys):
    write = verb.write_mp4

    def full(path: Path, *args: object, **kwargs: object) -> int:
        if path.name.startswith("003"):
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(verb, "write_mp4", full)
    assert generate(tmp_path) == os.EX_TEMPFAIL
    error = capsys.readouterr().err
    assert "seed3.mp4: cannot be written (OSError: [Errno 28] No space left on device); what is finished stays" in error
    assert len((tmp_path / "videos.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_killed_process_goes_on(whole, tmp_path):
    """SIGKILL, three times at arbitrary moments, the last time with the pages still to be drawn or not even begun."""
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in {**KEYS, "resume": True}.items()]
    command = [sys.executable, "-m", "cfjax", "generate", f"--config={ROOT}/configs/generate.py"]
    for videos in (1, 6, 12):
        process = subprocess.Popen([*command, f"--workdir={tmp_path}", *flags], stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("*.mp4"))) < videos:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = len(list(tmp_path.glob("*.mp4")))
        assert process.returncode in (-signal.SIGKILL, 0) and there >= videos
        assert process.returncode == -signal.SIGKILL or videos == 12
    assert subprocess.run([*command, f"--workdir={tmp_path}", *flags], stdout=subprocess.DEVNULL).returncode == 0
    assert made(tmp_path) == made(whole) and names(tmp_path) == COMPLETE
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("make", "batches"),
    [((), []), ((0,), [range(5)]), ((4, 5, 6), [range(5), range(5, 10)]), ((11,), [range(10, 12)])],
)
def test_batches_are_cut_alike_whatever_is_left(make, batches):
    """A video's neighbours in a batch, and its place, are those that it had: so are its bits, on any device."""
    assert verb.batches_of(12, 5, set(make)) == batches


# ---- in a bucket


@pytest.fixture
def bucket(monkeypatch) -> Iterator[Bucket]:
    with serving() as (bucket, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield bucket


def test_a_set_in_a_bucket_goes_on(whole, bucket, monkeypatch, capsys):
    """Its files are those of a folder; text rows stay on this machine, the record is sent with every batch."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stopping(patch, 7)
        generate("gs://bucket/videos")
    recorded = bucket.objects["videos/videos.jsonl"].data.decode().splitlines()
    assert len(recorded) == 7 and not json.loads(bucket.objects["videos/settings.json"].data)["complete"]
    written = stopping(monkeypatch, VIDEOS)
    assert generate("gs://bucket/videos", resume=True, prompt="|".join(PROMPTS[::-1])) == 0
    assert len(written) == 5
    objects = {name.removeprefix("videos/"): blob.data for name, blob in bucket.objects.items()}
    assert sorted(name for name in objects if not name.endswith((".mp4", ".safetensors"))) == COMPLETE
    turned = [*range(8, 12), *range(4, 8), *range(4)]  # the prompts in the other order
    before = made(whole)
    for n, old in ((n, old) for n, old in enumerate(turned) if old < 7):
        slug = sorted(name for name in before if name.endswith(".mp4"))[old][3:]
        assert objects[f"{n:03d}{slug}"] == before[f"{old:03d}{slug}"]
    assert generate("gs://bucket/videos", resume=True, prompt="|".join(PROMPTS[::-1])) == 0
    assert "gs://bucket/videos is complete, 12 videos; nothing to make" in capsys.readouterr().out
    assert generate("gs://bucket/videos") == 2
    assert "--config.resume=True goes on with what is there" in capsys.readouterr().err
