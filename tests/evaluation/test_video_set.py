"""The record of a set of videos: what is kept, renamed, made again or refused, whenever a command was killed."""

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cfjax.core.checksums import SUMS
from cfjax.core.errors import Temporary, UserError
from cfjax.data.requests import Request
from cfjax.evaluation.video_set import (
    DONE,
    SETTINGS,
    RequestedVideo,
    SetPlan,
    VideoSet,
    check_free,
    check_same,
    latents_name,
    plan_set,
    read_set,
    requested_videos,
)

HASHES = {"a.png": "aaaa", "b.png": "bbbb", "c.png": "cccc"}
SET = {"sampler": {"steps": [1000, 500]}, "fps": 8.0, "blocks": None}
A, B, C, D = (Request(prompt, 0) for prompt in ("a cat", "a dog", "a cow", "a fish"))


class Killed(BaseException):
    """In place of SIGKILL."""


def content(request: Request) -> bytes:
    """What stands for a request's video: no two have the same size."""
    return (request.prompt + HASHES.get(request.image, "") + "x" * request.seed).encode() * 3


def go_on(
    folder: Path,
    requests: Sequence[Request],
    *,
    stop: int = 1000,
    latents: bool = False,
    resume: bool = True,
    **keys: Any,
) -> SetPlan:
    """Makes what is missing, as `cfjax generate` does, and stops after `stop` videos."""
    asked = requested_videos(requests, HASHES)
    found = read_set(folder, resume=resume)
    if resume and found.asked:
        check_same(found, SET, ("sampler", "blocks"))
    plan = plan_set(found, asked, latents=latents, overwrite=keys.get("overwrite", False))
    videos = VideoSet(folder, asked, SET)
    with videos.begin(found, plan):
        for done, number in enumerate(plan.make):
            if done == stop:
                raise Killed
            made, name = content(requests[number]), asked[number].file
            if latents:
                (folder / latents_name(name)).write_bytes(made * 2)
            (folder / name).write_bytes(made)
            videos.finish(number, len(made), 2 * len(made) if latents else None)
    videos.write(complete=True)
    return plan


def assert_whole(folder: Path, requests: Sequence[Request]) -> None:
    """Every file holds what its request asks for, and the record says so."""
    asked = requested_videos(requests, HASHES)
    for video, request in zip(asked, requests, strict=True):
        assert (folder / video.file).read_bytes() == content(request), video.file
    settings = json.loads((folder / SETTINGS).read_text())
    assert settings["complete"] and [RequestedVideo(**video) for video in settings["videos"]] == asked
    assert settings["sampler"] == SET["sampler"]
    again = plan_set(read_set(folder, resume=True), asked, latents=False, overwrite=False)
    assert not again.make and not again.moves and len(again.keep) == len(requests)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_set_that_was_stopped_goes_on(tmp_path):
    with pytest.raises(Killed):
        go_on(tmp_path, [A, B, C], stop=1)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    assert not settings["complete"] and len(settings["videos"]) == 3
    assert names(tmp_path) == ["000_a_cat_seed0.mp4", SETTINGS, DONE]
    before = (tmp_path / "000_a_cat_seed0.mp4").stat().st_mtime_ns
    # Killed between a video and its line: that one is made again.
    (tmp_path / "001_a_dog_seed0.mp4").write_bytes(b"whole or not")
    assert go_on(tmp_path, [A, B, C]).make == (1, 2)
    assert_whole(tmp_path, [A, B, C])
    assert (tmp_path / "000_a_cat_seed0.mp4").stat().st_mtime_ns == before
    assert go_on(tmp_path, [A, B, C]).make == ()


def test_the_last_line_may_break_off_and_no_other(tmp_path):
    go_on(tmp_path, [A, B, C])
    whole = (tmp_path / DONE).read_text()
    (tmp_path / DONE).write_text(whole[:-9])
    assert go_on(tmp_path, [A, B, C]).make == (2,)
    assert sorted((tmp_path / DONE).read_text().splitlines()) == sorted(whole.splitlines())
    (tmp_path / DONE).write_text("{}\n" + whole)
    with pytest.raises(UserError, match=r"videos\.jsonl, line 1: .* remove it, and its video is made again"):
        read_set(tmp_path, resume=True)


MENDED = [
    ([B, C], 0, ()),  # the first row is gone: the others move up
    ([D, A, B, C], 1, ()),  # one in front: they move down
    ([C, B, A], 0, ()),  # turned round
    ([A, D, C], 1, ("001_a_dog_seed0.mp4",)),  # another prompt
    ([A, B, C, A], 1, ()),  # the same request twice
    ([A, A, A], 2, ("001_a_dog_seed0.mp4", "002_a_cow_seed0.mp4")),
    ([B, D], 1, ("000_a_cat_seed0.mp4", "002_a_cow_seed0.mp4")),
]


@pytest.mark.parametrize(("rows", "made", "left"), MENDED)
@pytest.mark.parametrize("latents", [False, True])
def test_a_corrected_file_keeps_what_it_still_asks_for(rows, made, left, latents, tmp_path):
    """Under the new numbers; what no request asks for any more stays, is told, and is found again once asked for."""
    go_on(tmp_path, [A, B, C], latents=latents)
    plan = go_on(tmp_path, rows, latents=latents)
    assert len(plan.make) == made
    assert_whole(tmp_path, rows)
    stay = [name for name in ("000_a_cat_seed0.mp4", "001_a_dog_seed0.mp4", "002_a_cow_seed0.mp4") if name in left]
    assert [name for name in plan.unasked if name in stay] == stay
    for request, video in zip(rows, requested_videos(rows, HASHES), strict=True):
        assert not latents or (tmp_path / latents_name(video.file)).read_bytes() == 2 * content(request)
    assert len(list(tmp_path.glob("*.mp4"))) == len(rows) + len(plan.unasked)
    assert not go_on(tmp_path, [request for request in (A, B, C) if request in rows or left], latents=latents).make


PICTURES = [Request("a cat", 0, "a.png"), Request("a cat", 0, "b.png"), Request("a cat", 0, "c.png")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_videos_change_places(order, tmp_path):
    """Their names differ in their numbers alone: every name is one that another video has."""
    go_on(tmp_path, PICTURES)
    rows = [PICTURES[n] for n in order]
    assert not go_on(tmp_path, rows).make
    assert_whole(tmp_path, rows)
    assert names(tmp_path) == [f"00{n}_a_cat_seed0.mp4" for n in range(3)] + [SUMS, SETTINGS, DONE]


@contextmanager
def killed_after(changes: int) -> Iterator[None]:
    """The process dies at the change to the folder that follows so many."""
    left = itertools.count(changes, -1)

    def dying(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left) <= 0:
                raise Killed
            return method(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "write_text", "write_bytes", "unlink"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(VideoSet, "finish", dying(VideoSet.finish))
        yield


def test_killed_at_any_change_it_ends_alike(tmp_path):
    """While videos change places, one is dropped, and one is new."""
    go_on(tmp_path / "start", PICTURES)
    rows = [PICTURES[2], Request("a cat", 1, "a.png"), PICTURES[0]]
    for changes in itertools.count():
        folder = tmp_path / str(changes)
        shutil.copytree(tmp_path / "start", folder)
        try:
            with killed_after(changes):
                go_on(folder, rows)
        except Killed:
            go_on(folder, rows)
            assert_whole(folder, rows)
            assert not [name for name in names(folder) if name.startswith(".")]
        else:
            break
    assert changes > 8
    assert_whole(folder, rows)


def test_only_what_is_half_made_is_replaced_unasked(tmp_path):
    go_on(tmp_path, [A, B])
    changed = tmp_path / "001_a_dog_seed0.mp4"
    changed.write_bytes(b"cut by hand")
    (tmp_path / "002_a_cow_seed0.mp4").write_bytes(b"from elsewhere")
    with pytest.raises(
        UserError, match=r"001_a_dog_seed0\.mp4 and 1 more would be replaced: .*overwrite=True beside resume"
    ):
        go_on(tmp_path, [A, B, C])
    assert changed.read_bytes() == b"cut by hand"
    assert go_on(tmp_path, [A, B, C], overwrite=True).make == (1, 2)
    assert_whole(tmp_path, [A, B, C])


def test_another_picture_under_the_same_name(tmp_path, monkeypatch):
    go_on(tmp_path, PICTURES)
    monkeypatch.setitem(HASHES, "b.png", "dddd")
    with pytest.raises(UserError, match=r"001_a_cat_seed0\.mp4 would be replaced: .* another prompt or picture"):
        go_on(tmp_path, PICTURES)
    assert go_on(tmp_path, PICTURES, overwrite=True).make == (1,)
    assert_whole(tmp_path, PICTURES)


def test_latents_that_lack_are_made(tmp_path):
    go_on(tmp_path, [A, B], latents=False)
    assert go_on(tmp_path, [A, B], latents=True).make == (0, 1)
    (tmp_path / "001_a_dog_seed0.safetensors").unlink()
    assert go_on(tmp_path, [A, B], latents=True).make == (1,)
    assert go_on(tmp_path, [A, B], latents=False).make == ()


def test_settings_that_differ_are_named(tmp_path, monkeypatch):
    go_on(tmp_path, [A])
    monkeypatch.setitem(SET, "fps", 9.0)  # does not decide here
    assert not go_on(tmp_path, [A]).make
    monkeypatch.setitem(SET, "blocks", {"frames": 3})
    with pytest.raises(UserError, match=r"settings\.json: its videos were made with blocks\.frames=None, now it is 3"):
        go_on(tmp_path, [A])
    monkeypatch.setitem(SET, "sampler", {"steps": [1000]})
    with pytest.raises(UserError, match=r"sampler\.steps=\[1000, 500\], now it is \[1000\]; give the same again"):
        go_on(tmp_path, [A])
    assert json.loads((tmp_path / SETTINGS).read_text())["sampler"] == {"steps": [1000, 500]}


@pytest.mark.parametrize("text", ["", "{}", '{"videos": [{"file": "x", "prompt": "y", "seed": 0, "image": ""}]}', "[]"])
def test_settings_of_something_else_are_not_gone_on_with(text, tmp_path):
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(UserError, match=r"settings\.json: is not what this version of cfjax generate writes"):
        go_on(tmp_path, [A])
    go_on(tmp_path, [A], resume=False, overwrite=True)
    assert_whole(tmp_path, [A])


def test_videos_without_settings_are_in_the_way(tmp_path):
    """How they were made is not known, whatever their record says."""
    go_on(tmp_path, [A, B])
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(UserError, match=r"000_a_cat_seed0\.mp4 and 1 more would be replaced"):
        go_on(tmp_path, [A, B])


def test_a_set_made_from_the_start_needs_free_names(tmp_path):
    asked = requested_videos([A, B], HASHES)
    check_free(tmp_path / "new", asked, latents=True)
    for name in ("001_a_dog_seed0.safetensors", "contact_sheet_012.png", DONE):
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"001_a_dog_seed0\.safetensors and 2 more would be replaced; choose [^;]*True$"
    ):
        check_free(tmp_path, asked, latents=True)
    (tmp_path / SETTINGS).touch()
    with pytest.raises(
        UserError, match=r"and 2 more would be replaced; .*; --config\.resume=True goes on with what is"
    ):
        check_free(tmp_path, asked, latents=False)


def test_contact_sheets_that_show_something_else_go(tmp_path):
    many = [Request(f"cat {n}", 0) for n in range(250)]
    go_on(tmp_path, many)
    for n in (1, 2, 3):
        (tmp_path / f"contact_sheet_00{n}.png").write_text("drawn")
    (tmp_path / "contact_sheets.png").write_text("the user's")
    (tmp_path / ".contact_sheet_001.png.77.partial").write_text("half")
    (tmp_path / ".mine.77.partial").write_text("the user's")
    assert go_on(tmp_path, many).pages == {f"contact_sheet_00{n}.png" for n in (1, 2, 3)}
    assert go_on(tmp_path, [*many[:150], D, *many[151:]]).pages == {"contact_sheet_001.png", "contact_sheet_003.png"}
    assert not (tmp_path / "contact_sheet_002.png").exists()
    assert go_on(tmp_path, many[:249]).pages == {"contact_sheet_001.png"}
    assert not go_on(tmp_path, many[:99]).pages
    left = [name for name in names(tmp_path) if not name.endswith(".mp4")]
    assert left == [".mine.77.partial", SUMS, "contact_sheets.png", SETTINGS, DONE]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/videos: cannot be"):
        go_on(tmp_path / "file" / "videos", [A])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Temporary, match="No space left on device"):
        go_on(tmp_path / "full", [A])
