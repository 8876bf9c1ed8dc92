"""Sources of clips and prompts, and the loop that encodes them and writes the records, part by part."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION
from cfjax.core.progress import Progress
from cfjax.data.captions import Columns, caption_of, check_characters, field_of
from cfjax.data.clips import ClipFile, escaped
from cfjax.data.lmdb_rows import LmdbRows
from cfjax.data.parts import Part, SetWriter
from cfjax.data.pictures import ClipFormat, Unusable
from cfjax.data.readers import BrokenRecord
from cfjax.data.tables import read_table
from cfjax.data.video import UNTIL_THE_END, read_clip

EncodeText = Callable[[Sequence[str]], np.ndarray]
EncodeVideo = Callable[[np.ndarray], np.ndarray]
GREY = 127.5  # of pixels from 0 to 255; 0 of those from -1 to 1


class Source(Protocol):
    """Items in a fixed order, the same in every process."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Its name in reports."""
        ...

    def caption(self, index: int) -> str:
        """Its caption. Raises Unusable without one."""
        ...

    def load(self, index: int) -> dict[str, np.ndarray]:
        """{"video": uint8 [P, H, W, 3]}, or what a record holds: latents and trajectory, or nothing.

        Raises:
          Unusable: the item has to be skipped.
        """
        ...


class ClipSource:
    """The clips of a folder (`list_clips`), in one format."""

    def __init__(self, folder: str | Path, clips: Sequence[ClipFile], wanted: ClipFormat) -> None:
        self.folder, self.clips, self.wanted = Path(folder), clips, wanted

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        """Its path in the folder, and which part of the file it is."""
        return self.clips[index].label()

    def caption(self, index: int) -> str:
        """Its caption. Raises Unusable for a clip that the listing found fault with."""
        if self.clips[index].fault:
            raise Unusable(self.clips[index].fault)
        return self.clips[index].caption

    def load(self, index: int) -> dict[str, np.ndarray]:
        """Its frames."""
        clip = self.clips[index]
        start, stop = (clip.start, clip.stop) if clip.stop else (0.0, UNTIL_THE_END)
        return {"video": read_clip(self.folder / clip.name, self.wanted, start, stop)}


class LmdbSource:
    """The rows of an LMDB; `copy` also takes their latents, without it a record holds only the text rows."""

    def __init__(self, rows: LmdbRows, *, copy: bool) -> None:
        self.rows, self.copy = rows, copy

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The name of its LMDB and its row number."""
        path, row = self.rows.locate(index)
        return f"{path.name}/{row}"

    def caption(self, index: int) -> str:
        """Its prompt."""
        try:
            return self.rows.caption(index)
        except BrokenRecord as error:
            raise Unusable(f"no caption: {error}") from None

    def load(self, index: int) -> dict[str, np.ndarray]:
        """Its latents and trajectory, which are checked even when they are not copied."""
        try:
            arrays = self.rows.arrays(index)
        except BrokenRecord as error:
            raise Unusable(f"unreadable: {error}") from None
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise Unusable("not finite: latents")
        return arrays if self.copy else {}


class PromptSource:
    """Prompts alone, of a table of any kind (`data.tables`).

    Args:
      prompts: in order.  positions: of each in its file; "line N" if none are given.
      faults: index -> why a prompt cannot be used.
    """

    def __init__(
        self, prompts: Sequence[str], positions: Sequence[str] = (), faults: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self.prompts, self._positions, self._faults = prompts, positions, faults

    @classmethod
    def read(cls, file: str | Path, columns: Columns = Columns(), encoding: str = "") -> "PromptSource":
        """The prompts of a file; of a .txt its `rstrip`ped lines (reference: `utils/dataset.py`, `TextDataset`).

        Args:
          columns: how a table is read.  encoding: of a text file that is not UTF-8.

        Raises:
          UserError: it cannot be read, or is empty.
        """
        path, column = Path(file), ""
        prompts: list[str] = []
        positions: list[str] = []
        faults: dict[int, str] = {}
        for row in read_table(path, encoding):
            column = column or columns.of(path, row, clips=False)["caption"]
            positions.append(row.place)
            try:
                value = field_of(path, row, column)
                if path.suffix.lower() == ".txt":
                    check_characters(value)
                    value = value.rstrip()
                    if len(value) > CAPTION:
                        raise Unusable(f"no caption: {len(value)} characters, more than {CAPTION}")
                else:
                    value = caption_of(value, columns.choice)
                prompts.append(value)
            except Unusable as error:
                faults[len(prompts)] = escaped(str(error))
                prompts.append("")
        if not prompts:
            raise UserError(f"{file}: no prompts in it")
        return cls(prompts, positions, faults)

    def __len__(self) -> int:
        return len(self.prompts)

    def name(self, index: int) -> str:
        """Its position in the file."""
        return self._positions[index] if self._positions else f"line {index + 1}"

    def caption(self, index: int) -> str:
        """The prompt. Raises Unusable for one that cannot be read."""
        if index in self._faults:
            raise Unusable(self._faults[index])
        return self.prompts[index]

    def load(self, index: int) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class _Loaded:
    item: int
    caption: str
    arrays: dict[str, np.ndarray]
    fault: str = ""


def _load(source: Source, item: int) -> _Loaded:
    try:
        return _Loaded(item, source.caption(item), source.load(item))
    except Unusable as error:
        return _Loaded(item, "", {}, str(error))


def _ahead(pool: ThreadPoolExecutor, source: Source, items: Iterable[int], depth: int) -> Iterator[_Loaded]:
    """Loaded items in order, `depth` of them under way at any time."""
    rest = iter(items)
    waiting: deque[Future[_Loaded]] = deque(pool.submit(_load, source, item) for item in islice(rest, depth))
    while waiting:
        loaded = waiting.popleft().result()
        waiting.extend(pool.submit(_load, source, item) for item in islice(rest, 1))
        yield loaded


def ingest(
    writer: SetWriter,
    source: Source,
    *,
    encode_text: EncodeText,
    encode_video: EncodeVideo | None = None,
    shard: int = 0,
    shards: int = 1,
    batch_size: int = 1,
    workers: int = 2,
    progress: bool = True,
    report: Mapping[str, Any] = MappingProxyType({}),
) -> bool:
    """Writes the parts of this process that are missing; returns whether the whole set is complete.

    Args:
      report: further entries of the set's report, JSON-able.
      encode_text: captions to text rows [n, S, E], zero beyond each caption's own.
      encode_video: uint8 [B, P, H, W, 3] to latents_BFHWC; always called with `batch_size` clips. Where the set keeps
        pictures, also with each clip's first frame and grey ones after it.
      workers: threads that read ahead.

    Raises:
      UserError: no item of the source can be used.
    """
    todo = writer.todo(shard, shards)
    total = sum(len(writer.items_of(index)) for index in todo)
    bar = Progress(total, "item", writer.path.name, shown=progress)
    with ThreadPoolExecutor(max(workers, 1)) as pool, bar:
        for index in todo:
            with writer.part(index) as part:
                _fill(part, source, pool, encode_text, encode_video, batch_size, max(workers, 1), bar)
    return writer.finish(report)


def stilled(video_BPHWC: np.ndarray) -> np.ndarray:
    """Clips, 0 to 255, with grey in place of all frames but the first: what an image-to-video network knows of one."""
    out = np.full(video_BPHWC.shape, GREY, np.float32)
    out[:, :1] = video_BPHWC[:, :1]
    return out


def _fill(
    part: Part,
    source: Source,
    pool: ThreadPoolExecutor,
    encode_text: EncodeText,
    encode_video: EncodeVideo | None,
    batch_size: int,
    depth: int,
    bar: Any,
) -> None:
    batch: list[_Loaded] = []

    def flush() -> None:
        if not batch:
            return
        arrays = [dict(loaded.arrays) for loaded in batch]
        if encode_video is not None:
            videos = [entry.pop("video") for entry in arrays]
            full = np.stack([*videos, *[videos[-1]] * (batch_size - len(videos))])  # one shape, one compiled program
            for entry, latents in zip(arrays, encode_video(full), strict=False):
                entry["latents"] = latents
            if part.layout.pictures:
                for entry, latents in zip(arrays, encode_video(stilled(full)), strict=False):
                    entry["picture"] = latents
        text = encode_text([loaded.caption for loaded in batch])
        for loaded, entry, rows in zip(batch, arrays, text, strict=True):
            part.add(source.name(loaded.item), loaded.item, loaded.caption, rows, **entry)
        bar.update(len(batch))
        batch.clear()

    for loaded in _ahead(pool, source, part.items, depth):
        if loaded.fault:
            part.skip(source.name(loaded.item), loaded.item, loaded.fault)
            bar.update()
        else:
            batch.append(loaded)
        if len(batch) == batch_size:
            flush()
    flush()
