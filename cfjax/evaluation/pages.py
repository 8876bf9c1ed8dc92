"""Contact sheets of any number of videos: a page per hundred, drawn as videos are made, one page in memory."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cfjax.evaluation.video import SHEET_PIXELS, ContactSheet, pick_frames, read_frames, shrink, spread, write_png

PER_PAGE = 100  # videos
FRAMES, WIDTH = 8, 208  # pictures per row, and their width in pixels at most
PAGE_NAME = re.compile(r"contact_sheet(_\d{3,})?\.png")


def sheet_pages(videos: int) -> dict[str, range]:
    """The pages of so many videos by file name, with the numbers of the videos on each: one page has no number."""
    parts = [range(start, min(start + PER_PAGE, videos)) for start in range(0, videos, PER_PAGE)]
    if len(parts) == 1:
        return {"contact_sheet.png": parts[0]}
    return {f"contact_sheet_{n:03d}.png": part for n, part in enumerate(parts, 1)}


class SheetPages:
    """Draws the pages of a set of videos, in whatever order the videos come; a page is written when it is full.

    Rows of videos that existed already are read back from their mp4 files.

    Args:
      folder, files: of the mp4 files, here or in a bucket.
      make: numbers of the videos that `add` will be called with, page by page.
      good: names of existing pages to keep.
      shape_PHW: of every video.
      scale: what the mp4 files are enlarged by; pages are by half of that, if they do not grow too large.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        *,
        make: Iterable[int],
        good: Iterable[str],
        shape_PHW: tuple[int, int, int],
        scale: int,
    ) -> None:
        self._folder, self._files, self._shape, self._scale = folder, files, shape_PHW, scale
        self._pages = sheet_pages(len(files))
        self._names = [name for name, numbers in self._pages.items() for _ in numbers]
        self._left = Counter(self._names[n] for n in make)
        self._open = {name for name in self._pages if name not in set(good)}
        self._name, self._sheet = "", ContactSheet(1, (1, 1, 1))
        self._drawn: set[int] = set()

    def add(self, number: int, video_PHWC: np.ndarray) -> None:
        """Draws a video that was just made, uint8."""
        name = self._names[number]
        if name != self._name:
            self._begin(name)
        self._draw(number, pick_frames(video_PHWC[None], FRAMES)[0])
        self._left[name] -= 1
        if not self._left[name]:
            self._finish()

    def close(self) -> None:
        """Writes the pages that are left: those of which nothing was made now.

        Raises:
          UserError: an mp4 file cannot be read back.
        """
        for name in sorted(self._open):
            self._begin(name)
            self._finish()

    def _begin(self, name: str) -> None:
        _, height, width = self._shape
        across = min(width, WIDTH)
        down = height if across == width else max(1, round(height * across / width))
        shown = len(spread(self._shape[0], FRAMES))
        self._name, self._drawn = name, set()
        self._sheet = ContactSheet(len(self._pages[name]), (shown, down, across), FRAMES)

    def _draw(self, number: int, frames: np.ndarray) -> None:
        self._sheet.draw(number - self._pages[self._name].start, shrink(frames, WIDTH))
        self._drawn.add(number)

    def _finish(self) -> None:
        frames, height, width = self._shape
        for number in self._pages[self._name]:
            if number not in self._drawn:
                file = self._folder / self._files[number]
                self._draw(number, read_frames(file, spread(frames, FRAMES), height, width, self._scale))
        picture = self._sheet.picture
        fits = math.isqrt(SHEET_PIXELS // (picture.shape[0] * picture.shape[1]))
        write_png(self._folder / self._name, picture, scale=max(1, min(self._scale // 2, fits)))
        self._open.discard(self._name)
        self._name, self._sheet = "", ContactSheet(1, (1, 1, 1))
