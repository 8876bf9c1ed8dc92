"""Contact sheets by pages: every video is on one, whenever it was made, and one page is in memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.evaluation.pages import PAGE_NAME, PER_PAGE, SheetPages, sheet_pages
from cfjax.evaluation.video import contact_sheet, write_mp4

SHAPE = (5, 16, 24)


def clip(number: int) -> np.ndarray:
    """A grey level per video."""
    return np.full((*SHAPE, 3), 40 + 10 * (number % 20), np.uint8)


def pages(folder: Path, count: int, make: list[int], good: tuple[str, ...] = (), scale: int = 2) -> SheetPages:
    files = [f"{n}.mp4" for n in range(count)]
    return SheetPages(folder, files, make=make, good=good, shape_PHW=SHAPE, scale=scale)


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def test_one_page_up_to_a_hundred_videos_and_numbered_ones_beyond():
    assert sheet_pages(PER_PAGE) == {"contact_sheet.png": range(100)}
    many = sheet_pages(4730)
    assert len(many) == 48 and list(many)[-1] == "contact_sheet_048.png" and many["contact_sheet_048.png"][-1] == 4729
    assert [n for numbers in many.values() for n in numbers] == list(range(4730))
    assert all(PAGE_NAME.fullmatch(name) for name in (*many, "contact_sheet.png"))


def test_a_page_is_the_contact_sheet_of_its_videos(tmp_path):
    drawn = pages(tmp_path, 3, [0, 1, 2])
    for n in range(3):
        drawn.add(n, clip(n))
    # The last one completes the page: it is there before the end.
    expected = contact_sheet(np.stack([clip(n) for n in range(3)]), 8)
    np.testing.assert_array_equal(read(tmp_path / "contact_sheet.png"), expected)


def test_videos_that_were_there_are_read_back(tmp_path):
    """A page with a new video among old ones, one of old ones alone, and one that stays."""
    for n in range(205):
        if n != 100:
            write_mp4(tmp_path / f"{n}.mp4", clip(n) if n < 110 or n >= 200 else clip(0), fps=8, scale=2)
    (tmp_path / "contact_sheet_001.png").write_text("it stays")
    drawn = pages(tmp_path, 205, [100], good=("contact_sheet_001.png",))
    drawn.add(100, clip(100))
    assert (tmp_path / "contact_sheet_002.png").exists() and not (tmp_path / "contact_sheet_003.png").exists()
    drawn.close()
    assert (tmp_path / "contact_sheet_001.png").read_text() == "it stays"
    second, third = read(tmp_path / "contact_sheet_002.png"), read(tmp_path / "contact_sheet_003.png")
    assert second.shape == (100 * 18 - 2, 5 * 26 - 2, 3) and third.shape == (5 * 18 - 2, 5 * 26 - 2, 3)
    np.testing.assert_array_equal(second[:16, :24], clip(100)[0])
    for row in range(5):
        level = clip(200 + row)[0, 0, 0, 0]
        np.testing.assert_allclose(third[18 * row : 18 * row + 16, :24].astype(int), level, atol=3)
    np.testing.assert_allclose(second[18 * 3 : 18 * 3 + 16, :24].astype(int), clip(103)[0], atol=3)
    (tmp_path / "contact_sheet_003.png").unlink()
    write_mp4(tmp_path / "204.mp4", clip(0)[:2], fps=8, scale=2)
    with pytest.raises(UserError, match=r"204\.mp4: is shorter than it was"):
        pages(tmp_path, 205, [], good=("contact_sheet_001.png", "contact_sheet_002.png")).close()


def test_pages_are_enlarged_as_far_as_a_sheet_may_grow(tmp_path, monkeypatch):
    for limit, scale in ((10**9, 3), (4 * 16 * (5 * 26 - 2), 2), (1, 1)):
        monkeypatch.setattr("cfjax.evaluation.pages.SHEET_PIXELS", limit)
        pages(tmp_path, 1, [0], scale=6).add(0, clip(0))
        assert read(tmp_path / "contact_sheet.png").shape[:2] == (16 * scale, (5 * 26 - 2) * scale)


def test_memory_is_that_of_one_page(tmp_path, monkeypatch):
    """Of 100 rows of pictures, not of all: what is held after five pages is what was held after one."""
    monkeypatch.setattr("cfjax.evaluation.pages.write_png", lambda *args, **kwargs: None)
    drawn = pages(tmp_path, 500, list(range(500)))
    tracemalloc.start()
    held = []
    for n in range(500):
        drawn.add(n, clip(n))
        if n % 100 == 50:
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[0] > 100 * 16 * 24 * 5 * 3 and max(held) < held[0] + 20_000
