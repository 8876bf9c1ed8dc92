"""`cfjax check`: every kind of place, whole and with bytes flipped in one file."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.__main__ import main
from cfjax.core.checksums import SUMS, write_sums
from cfjax.core.tensor_files import save_tensors
from cfjax.data.parts import SetWriter
from cfjax.data.records import Layout
from cfjax.evaluation.video_set import RequestedVideo, VideoSet, plan_set, read_set
from tests.training.test_checkpoint import fill
from tests.training.test_sums import flip

CLIP = (2, 3, 4, 4)


def records(place: Path) -> str:
    layout = Layout(CLIP, text_rows=3, text_width=4)
    writer = SetWriter(place, items=6, part_items=4, layout=layout, job={"kind": "test"}, description={})
    rng = np.random.default_rng(0)
    for index in writer.todo():
        with writer.part(index) as part:
            for item in part.items:
                latents = rng.standard_normal(CLIP).astype(np.float32)
                part.add(f"clip {item}", item, "a clip", np.ones((2, 4), np.float32) * (item + 1), latents=latents)
    writer.write_negative(np.ones((1, 4), np.float32))
    assert writer.finish()
    return "part-00001.array_record"


def run(place: Path) -> str:
    fill(place, steps=2)
    largest = max((place / "checkpoints/1").rglob("d/*"), key=lambda file: file.stat().st_size)
    return largest.relative_to(place).as_posix()


def export(place: Path) -> str:
    place.mkdir()
    save_tensors(place / "model.safetensors", {"kernel": jnp.arange(64.0)})
    (place / "model.json").write_text('{"stage": "toy"}')
    write_sums(place)
    return "model.safetensors"


def videos(place: Path) -> str:
    asked = [RequestedVideo(f"{n:03d}_clip.mp4", "a clip", n, "", "") for n in range(2)]
    found = read_set(place, resume=False)
    made = VideoSet(place, asked, {})
    with made.begin(found, plan_set(found, asked, latents=False, overwrite=False)):
        for number, video in enumerate(asked):
            (place / video.file).write_bytes(b"pictures that move" * 10)
            made.finish(number, 180, None)
        assert main(["check", str(place)]) == 0  # sizes are compared before there are sums
    made.write(complete=True)
    return "001_clip.mp4"


@pytest.mark.parametrize("make", [run, records, export, videos], ids=lambda make: make.__name__)
def test_a_place_is_whole_until_a_file_of_it_differs(tmp_path, capsys, make):
    place = tmp_path / "place"
    name = make(place)
    capsys.readouterr()
    assert main(["check", str(place)]) == 0
    assert capsys.readouterr().out.endswith("all that has checksums is as it was written\n")
    flip(place / name)
    assert main(["check", str(place)]) == 2
    message = capsys.readouterr().out.splitlines()
    assert message[0] == f"{place}/{name}: its bytes are not those that were written"
    assert message[-1].startswith(f"{place}: ") and message[-1].endswith((" fault", " faults"))


def test_all_places_are_looked_at_and_what_has_no_sums_is_said(tmp_path, capsys):
    run(tmp_path / "old")
    (tmp_path / "old/checkpoints/1" / SUMS).unlink()
    export(tmp_path / "bad")
    shutil.copytree(tmp_path / "bad", tmp_path / "good")
    (tmp_path / "bad/model.json").unlink()
    assert main(["check", *(str(tmp_path / name) for name in ("bad", "old", "good"))]) == 2
    message = capsys.readouterr().out.splitlines()
    assert message[0] == f"{tmp_path}/bad/model.json: missing" and message[-1].startswith(f"{tmp_path}/good: ")
    assert f"note: {tmp_path}/old/checkpoints/1 has no checksums (an older version's, or checksums=False)" in message


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "name the folder to check"),
        (["--all"], "--all: there are no such flags"),
        (["nowhere"], "nowhere: no run, export, set of records or videos there"),
    ],
)
def test_what_cannot_be_checked_is_reported_in_one_line(tmp_path, monkeypatch, capsys, argv, line):
    monkeypatch.chdir(tmp_path)
    assert main(["check", *argv]) == 2
    message = capsys.readouterr().err
    assert line in message and message.count("\n") == 1
    assert main(["check", "--help"]) == 0 and "usage: cfjax check PLACE" in capsys.readouterr().out
