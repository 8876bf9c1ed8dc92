"""Clips as bytes and files: the reference's rounding, what a decoder gets back, tiling, and mistakes in one line."""

import base64
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.data.requests import read_video_end
from cfjax.evaluation.video import (
    SHEET_PIXELS,
    check_mp4,
    contact_sheet,
    data_uri,
    grid_video,
    read_frames,
    replacing,
    to_uint8,
    write_gif,
    write_mp4,
    write_png,
)


def bouncing(count: int = 1, frames: int = 9, size: int = 16) -> np.ndarray:
    """White squares on dark grey, clip n starting n px further on; uint8 [N, P, H, W, 3]."""
    videos = np.full((count, frames, size, size, 3), 40, np.uint8)
    span = size - 4
    for n in range(count):
        for p in range(frames):
            x = span - abs((2 * p + n) % (2 * span) - span)
            videos[n, p, 6:10, x : x + 4] = 250
    return videos


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("folder", ["a:b", "pipe:1", "-a", "a%03d"])
def test_a_folder_may_be_called_anything(tmp_path, monkeypatch, folder):
    """FFmpeg has other uses for such names, in paths from here."""
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    write_mp4(Path(folder) / "clip.mp4", bouncing()[0], 8)
    assert read_frames(Path(folder) / "clip.mp4", [0, 8], 16, 16, 1).shape == (2, 16, 16, 3)
    assert read_video_end(f"{folder}/clip.mp4", 5, 16, 16, 8, "cover").shape == (5, 16, 16, 3)


def test_to_uint8_clamps_and_truncates_as_the_reference_does():
    values = np.array([-2.0, -1.0, 0.0, 0.5, 0.9999, 1.0, 3.0], np.float32)
    video = np.tile(values[:, None, None, None], (1, 2, 2, 3))
    expected = np.array([0, 0, 127, 191, 254, 255, 255], np.uint8)
    np.testing.assert_array_equal(to_uint8(video)[:, 0, 0, 0], expected)
    assert to_uint8(video[None]).shape == (1, 7, 2, 2, 3)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((1, 2, 2, 3), np.uint8), "expected float"),
        (np.zeros((2, 2, 3), np.float32), "expected .P, H, W, 3."),
        (np.zeros((1, 2, 2, 4), np.float32), "expected .P, H, W, 3."),
        (np.full((1, 2, 2, 3), np.nan, np.float32), "NaN"),
    ],
)
def test_to_uint8_names_what_is_wrong(video: np.ndarray, message: str):
    with pytest.raises(UserError, match=message):
        to_uint8(video)


@pytest.mark.parametrize(("size", "scale", "decoded"), [(16, 3, 48), (15, 1, 16), (15, 3, 46)])
def test_mp4_decodes_to_the_same_clip(tmp_path: Path, size: int, scale: int, decoded: int):
    clip = bouncing(size=size)[0]
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, clip, fps=8, scale=scale)
    frames = decode(path)
    assert frames.shape == (9, decoded, decoded, 3)
    large = clip.repeat(scale, 1).repeat(scale, 2)
    error = np.abs(frames[:, : size * scale, : size * scale].astype(int) - large)
    assert error.mean() < 3
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_a_clip_is_the_same_file_every_time(tmp_path: Path, seed: int):
    """Moving noise of a size at which it would be several files with x264's code for AVX-512."""
    rng = np.random.default_rng(seed)
    large = rng.integers(0, 255, (24, 24, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    clip = np.stack([large[p : p + 64, p : p + 64] for p in range(13)])
    clip = np.clip(clip + rng.integers(-40, 41, clip.shape), 0, 255).astype(np.uint8)
    files = set()
    for n in range(12):
        junk = [np.full(rng.integers(1, 2_000_000), n, np.uint8) for _ in range(4)]  # other bytes lie about
        del junk
        assert write_mp4(tmp_path / "clip.mp4", clip, fps=16) == (tmp_path / "clip.mp4").stat().st_size
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("scale", [1, 3])
def test_frames_are_read_back(tmp_path: Path, scale: int):
    clip = bouncing(size=15)[0]
    write_mp4(tmp_path / "clip.mp4", clip, fps=8, scale=scale)
    frames = read_frames(tmp_path / "clip.mp4", np.array([0, 3, 8]), 15, 15, scale)
    assert frames.shape == (3, 15, 15, 3) and np.abs(frames.astype(int) - clip[[0, 3, 8]]).mean() < 3
    with pytest.raises(UserError, match="shorter than it was"):
        read_frames(tmp_path / "clip.mp4", np.array([0, 9]), 15, 15, scale)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"clip\.mp4: cannot be read"):
        read_frames(tmp_path / "clip.mp4", np.array([0]), 15, 15, scale)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((8, 8, 0, 1), "fps=0 must lie in"),
        ((8, 8, 8, 0), "scale=0"),
        ((8, 9000, 8, 2), "18000 x 16 pixels, 16384 a side"),
    ],
)
def test_what_no_mp4_can_be_is_reported_without_a_clip(asked, message: str):
    check_mp4(16, 15, 8, 2)
    with pytest.raises(UserError, match=message):
        check_mp4(*asked)


def test_gif_decodes_to_the_same_clip(tmp_path: Path):
    clip = bouncing()[0]
    write_gif(tmp_path / "clip.gif", clip, fps=10, scale=2)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"], image.info["loop"]) == (9, (32, 32), 100, 0)
        for n in range(9):
            image.seek(n)
            np.testing.assert_allclose(np.asarray(image.convert("RGB"))[::2, ::2], clip[n], atol=2)


def test_png_and_data_uri(tmp_path: Path):
    frame = bouncing()[0, 0]
    write_png(tmp_path / "frame.png", frame, scale=2)
    with Image.open(tmp_path / "frame.png") as image:
        np.testing.assert_array_equal(np.asarray(image)[1::2, ::2], frame)
    data = (tmp_path / "frame.png").read_bytes()
    head, body = data_uri(data, "image/png").split(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == data


def test_contact_sheet_shows_first_and_last_frame_of_every_clip():
    videos = bouncing(count=2)
    sheet = contact_sheet(videos, columns=3, gap=1, background=7)
    assert sheet.shape == (2 * 17 - 1, 3 * 17 - 1, 3)
    np.testing.assert_array_equal(sheet[:16, :16], videos[0, 0])
    np.testing.assert_array_equal(sheet[17:, 34:], videos[1, -1])
    assert (sheet[16] == 7).all() and (sheet[:, 16] == 7).all()
    assert contact_sheet(videos, columns=50, gap=0).shape == (32, 9 * 16, 3)


def test_a_contact_sheet_stays_small_and_shows_every_clip(monkeypatch):
    """Frames shrink evenly until the sheet fits; the clips of twenty grey levels are still told apart by their rows."""
    clips = (np.arange(20, dtype=np.uint8) * 10)[:, None, None, None, None].repeat(3, -1)
    clips = np.broadcast_to(clips, (20, 2, 16, 32, 3))
    whole = contact_sheet(clips, columns=2)
    assert whole.shape == (20 * 18 - 2, 2 * 34 - 2, 3)
    for limit in (whole[..., 0].size, 5000, 1000, 360):
        monkeypatch.setattr("cfjax.evaluation.video.SHEET_PIXELS", limit)
        sheet = contact_sheet(clips, columns=2)
        assert sheet[..., 0].size <= limit
        height = (len(sheet) + 2) // 20 - 2
        np.testing.assert_array_equal(sheet[:: height + 2, 0, 0], np.arange(20) * 10)
    monkeypatch.setattr("cfjax.evaluation.video.SHEET_PIXELS", 200)
    with pytest.raises(UserError, match="20 clips do not fit into 200 pixels; draw several sheets"):
        contact_sheet(clips, columns=2)


@pytest.mark.slow
def test_a_contact_sheet_of_thousands_opens_and_costs_its_pixels(tmp_path: Path):
    """Without a copy of the clips; Pillow, which warns of pictures of 89 million pixels, opens it."""
    clips = np.broadcast_to(bouncing(frames=8, size=64), (4730, 8, 64, 64, 3))
    tracemalloc.start()
    sheet = contact_sheet(clips)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.9 * SHEET_PIXELS < sheet[..., 0].size <= SHEET_PIXELS and peak < 3 * SHEET_PIXELS + 2_000_000
    Image.fromarray(sheet).save(tmp_path / "sheet.png", compress_level=0)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == sheet.shape[1::-1]


def test_grid_video_tiles_clips_and_leaves_background():
    videos = bouncing(count=3)
    grid = grid_video(videos, columns=2, gap=2, background=255)
    assert grid.shape == (9, 34, 34, 3)
    np.testing.assert_array_equal(grid[:, :16, 18:], videos[1])
    np.testing.assert_array_equal(grid[:, 18:, :16], videos[2])
    assert (grid[:, 18:, 18:] == 255).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: write_mp4(path, bouncing()[0].astype(np.float32), 8), r"x: expected uint8 \[P, H, W, 3\]"),
        (lambda path: write_mp4(path, bouncing(), 8), r"expected uint8 \[P, H, W, 3\]"),
        (lambda path: write_mp4(path, bouncing()[0, :0], 8), "nothing empty"),
        (lambda path: write_mp4(path, bouncing()[0], 0), "fps=0"),
        (lambda path: write_gif(path, bouncing()[0], -1), "fps=-1"),
        (lambda path: write_mp4(path, bouncing()[0], 8, scale=0), "scale=0"),
        (lambda path: write_png(path, bouncing()[0]), r"expected uint8 \[H, W, 3\]"),
        (lambda path: grid_video(bouncing(), columns=0), "columns >= 1"),
        (lambda path: contact_sheet(bouncing(), columns=0), "contact sheet: use columns >= 1"),
        (lambda path: contact_sheet(bouncing()[0]), r"contact sheet: expected uint8 \[N, P, H, W, 3\]"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(tmp_path: Path, call, message: str):
    with pytest.raises(UserError, match=message):
        call(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
