"""Reading latent datasets: one interface, the toy's memory-mapped arrays, a grain pipeline that resumes exactly.

`ClipDataset` is the interface of every set (`cfjax.data.sets.open_dataset` picks its reader).
`LatentDataset` checks a folder against its manifest before anything is trained on it. `make_iterator` shuffles the
records, batches them and distributes each batch's rows over processes; its state is a small JSON-able dict for the
checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from absl import logging

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION, JSON_BYTES, RECORDS, VOCABULARY
from cfjax.core.machine import machine_failure
from cfjax.core.schema import checked, load_json, one_of, several, table, text, whole
from cfjax.data.archives import open_array, read_archive
from cfjax.data.precompute import MANIFEST_VERSION

Batch = dict[str, np.ndarray]

_FIX = "precompute it again"
_READ_AHEAD = 4  # batches
ARRAY_RULE = table({"shape": several(whole(1), 1, 8), "dtype": one_of("float16", "float32", "int32")})
MANIFEST_RULE = table(
    {
        "version": one_of(MANIFEST_VERSION),
        "records": whole(1, RECORDS),
        "arrays": table(
            dict.fromkeys(("latents", "caption_id", "text", "negative_text"), ARRAY_RULE),
            {"trajectory": ARRAY_RULE, "actions": ARRAY_RULE},
        ),
    },
    {"text_encoder": table({}, {"world": text(64)}), "source": table({}), "codec": table({}), "world_path": text(4096)},
)


class ClipDataset(Protocol):
    """Random access to clips and their captions' text rows, wherever they are kept.

    `dataset[i]` is {"latents_FHWC", "text_SE": float32, "index": int32}, for ODE sets also "trajectory_JFHWC", and of
    steered clips "actions_FA", the keys that are held in every latent frame.

    Attributes:
      path: its folder.
      manifest: its parsed manifest.json.
      negative_text_SE: float32 rows of the negative prompt.
    """

    path: Path
    manifest: dict[str, Any]
    negative_text_SE: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of a record."""
        ...

    @property
    def has_latents(self) -> bool:
        """Whether there are clips; without, `latents_FHWC` is NaN and only its shape means anything."""
        ...

    @property
    def trajectory_points(self) -> int:
        """J, the stored states per record; 0 when this is no ODE set."""
        ...

    @property
    def text_shape(self) -> tuple[int, int]:
        """(S, E) of a caption's rows."""
        ...

    def caption(self, index: int) -> str:
        """The caption of record `index`."""
        ...


class WrappedDataset:
    """A `ClipDataset` that delegates to another one."""

    def __init__(self, dataset: ClipDataset) -> None:
        self._dataset = dataset
        self.path, self.manifest, self.negative_text_SE = dataset.path, dataset.manifest, dataset.negative_text_SE

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Batch:
        return self._dataset[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._dataset!r})"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of a record."""
        return self._dataset.latent_shape

    @property
    def has_latents(self) -> bool:
        """Whether there are clips, not only prompts."""
        return self._dataset.has_latents

    @property
    def trajectory_points(self) -> int:
        """J, the stored states per record; 0 when this is no ODE set."""
        return self._dataset.trajectory_points

    @property
    def text_shape(self) -> tuple[int, int]:
        """(S, E) of a caption's rows."""
        return self._dataset.text_shape

    def caption(self, index: int) -> str:
        """The caption of record `index`."""
        return self._dataset.caption(index)


def read_json(file: Path, most: int = JSON_BYTES) -> Any:
    """A JSON file of a dataset, of at most so many bytes. Raises UserError when it is missing or broken."""
    try:
        return load_json(file, most)
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; is {file.parent} a latent dataset? {_FIX}") from error
    except (OSError, ValueError) as error:
        raise machine_failure(file, error) or UserError(f"{file}: cannot read it ({error}); {_FIX}") from error


class LatentDataset:
    """Random access to a latent dataset; arrays stay on disk until a record is read.

    `dataset[i]`: see `ClipDataset`.

    Attributes:
      manifest: the parsed manifest.json.
      captions: the distinct captions; `caption_ids[i]` is that of record i; `text_table` [captions, S, E] encodes them.
      negative_text_SE: float32 encoding of the empty caption.

    Raises:
      UserError: the manifest is missing, broken or of another version, or an array does not match it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / "manifest.json")
        if not isinstance(self.manifest, dict) or self.manifest.get("version") != MANIFEST_VERSION:
            raise UserError(f"{self.path}/manifest.json: not a version {MANIFEST_VERSION} latent dataset; {_FIX}")
        checked(MANIFEST_RULE, self.manifest, self.path / "manifest.json")
        arrays = self.manifest["arrays"]
        self._latents = self._open("latents")
        self.caption_ids = self._open("caption_id")
        self.text_table = self._open("text")
        self.negative_text_SE = np.array(self._open("negative_text"))
        self._trajectory = self._open("trajectory") if "trajectory" in arrays else None
        self._actions = self._open("actions") if "actions" in arrays else None
        captions = self.path / "captions.json"
        self.captions: list[str] = checked(several(text(CAPTION), 1, VOCABULARY), read_json(captions), captions)
        self._check()

    def _open(self, name: str) -> np.ndarray:
        file, spec = self.path / f"{name}.npy", self.manifest["arrays"][name]
        try:
            array = open_array(file)
        except FileNotFoundError as error:
            raise UserError(f"{file}: missing though the manifest lists it; {_FIX}") from error
        except (OSError, ValueError) as error:
            raise machine_failure(file, error) or UserError(f"{file}: cannot read it ({error}); {_FIX}") from error
        if list(array.shape) != spec.get("shape") or str(array.dtype) != spec.get("dtype"):
            raise UserError(f"{file}: holds {array.dtype} {list(array.shape)}, the manifest says {spec}; {_FIX}")
        return array

    def _check(self) -> None:
        records, captions = len(self._latents), len(self.captions)
        whole_numbers = self.caption_ids.ndim == 1 and self.caption_ids.dtype.kind in "iu"
        if self._latents.ndim != 5 or self.text_table.ndim != 3 or not whole_numbers:
            raise UserError(
                f"{self.path}: latents must be [N,F,H,W,C], text [captions,S,E], caption_id whole numbers [N]; {_FIX}"
            )
        if self._trajectory is not None and self._trajectory[:, 0].shape != self._latents.shape:
            raise UserError(f"{self.path}: trajectory must be [N,J,F,H,W,C] of the latents' shape; {_FIX}")
        if records != self.manifest.get("records") or len(self.caption_ids) != records:
            raise UserError(f"{self.path}: records, latents and caption_id disagree in number; {_FIX}")
        if self._actions is not None and (
            self._actions.ndim != 3 or self._actions.shape[:2] != self._latents.shape[:2]
        ):
            raise UserError(f"{self.path}: actions must be [N,F,A] of the latents' records and frames; {_FIX}")
        if captions != len(self.text_table) or self.negative_text_SE.shape != self.text_table.shape[1:]:
            raise UserError(f"{self.path}: captions, text and negative_text do not fit together; {_FIX}")
        if self.caption_ids.min() < 0 or self.caption_ids.max() >= captions:
            raise UserError(f"{self.path}/caption_id.npy: an id is outside the {captions} captions; {_FIX}")

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> Batch:
        index = int(index)
        record = {
            "latents_FHWC": np.asarray(self._latents[index], np.float32),
            "text_SE": np.asarray(self.text_table[self.caption_ids[index]]),
            "index": np.asarray(index, np.int32),
        }
        if self._trajectory is not None:
            record["trajectory_JFHWC"] = np.asarray(self._trajectory[index], np.float32)
        if self._actions is not None:
            record["actions_FA"] = np.asarray(self._actions[index], np.float32)
        return record

    def __repr__(self) -> str:
        return f"LatentDataset({self.path}, {len(self)} records)"

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of a record."""
        frames, height, width, channels = self._latents.shape[1:]
        return frames, height, width, channels

    @property
    def trajectory_points(self) -> int:
        """J, the stored states per record; 0 when this is no ODE set."""
        return 0 if self._trajectory is None else self._trajectory.shape[1]

    @property
    def has_latents(self) -> bool:
        """Always: this kind of set is made from clips."""
        return True

    @property
    def text_shape(self) -> tuple[int, int]:
        """(S, E) of a caption's rows."""
        rows, width = self.text_table.shape[1:]
        return rows, width

    def caption(self, index: int) -> str:
        """The caption of record `index`."""
        return self.captions[self.caption_ids[index]]

    def factors(self) -> dict[str, np.ndarray]:
        """Per-record arrays [N, ...] that the source recorded; empty when there are none."""
        file = self.path / "factors.npz"
        if not file.exists():
            return {}
        try:
            return read_archive(file)
        except Exception as error:
            raise UserError(f"{file}: cannot read it ({error}); {_FIX}") from error


_BATCH_NAMES = {
    "latents_FHWC": "latents_BFHWC",
    "text_SE": "text_BSE",
    "reversed_text_SE": "reversed_text_BSE",
    "index": "index_B",
    "trajectory_JFHWC": "trajectory_BJFHWC",
    "actions_FA": "actions_BFA",
    "picture_FHWC": "picture_BFHWC",
}


class LatentIterator:
    """An endless (or num_epochs long) stream of batches that can be saved and resumed at the exact record.

    Its state is the number of records read, so that batches of another size continue with the very next record.

    Args:
      start: opens the stream at the record of this number.
      batch_size: of the global batch.
      order: the settings that decide in which order records come.
      accept_changes: whether a state of another order restarts at the first record, instead of an error.
      log: called with a line about that.
    """

    def __init__(
        self,
        start: Callable[[int], Iterator[Batch]],
        batch_size: int,
        order: Mapping[str, Any],
        *,
        accept_changes: bool,
        log: Callable[[str], None],
    ) -> None:
        self._start, self._batch_size, self._order = start, batch_size, dict(order)
        self._accept_changes, self._log = accept_changes, log
        self._go_to(0)

    def _go_to(self, read: int) -> None:
        self._read, self._batches = read, self._start(read)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._read += self._batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able: how many records were read, and the order without which that number means nothing."""
        return {"records_read": self._read, "order": dict(self._order)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the record that was last read when `state` was taken; states of cfjax 0.1.0 do too.

        Raises:
          UserError: the state was taken in another order (seed, number of records, shuffled or not).
        """
        if "position" in state:  # cfjax 0.1.0 counted batches
            saved = state["settings"]
            read = state["position"]["next_index"] * saved["batch_size"]
        else:
            saved, read = state["order"], state["records_read"]
        changes = [f"{name} {saved.get(name)} -> {now}" for name, now in self._order.items() if saved.get(name) != now]
        if changes and not self._accept_changes:
            raise UserError(
                f"the data comes in another order than this run has read it: {', '.join(changes)}; set it back, or "
                "begin the new order at its first record with --config.accept_changes=True"
            )
        if changes:
            self._log(f"the data begins a new order at its first record: {', '.join(changes)}")
        self._go_to(0 if changes else read)


def make_iterator(
    dataset: ClipDataset,
    batch_size: int,
    seed: int,
    *,
    shuffle: bool = True,
    rows: Sequence[int] | None = None,
    num_epochs: int | None = None,
    drop_remainder: bool = True,
    num_threads: int = 1,
    accept_changes: bool = False,
    log: Callable[[str], None] = logging.warning,
) -> LatentIterator:
    """Batches of stacked records: latents_BFHWC, text_BSE, index_B (, trajectory_BJFHWC) and negative_text_SE.

    All records, newly shuffled every epoch; batches may span epochs. All processes iterate over the
    same global batches, and each reads only its own `rows`: the state is then one number, and a run resumes exactly on
    any other number of processes. Threads read ahead in this process (`num_threads=0`: no read-ahead).

    Args:
      batch_size: of the global batch.
      rows: which of its rows this process reads, ascending (`core.sharding.batch_rows`); None is all.
      accept_changes, log: for a state that was saved in another order, see `LatentIterator`.

    Raises:
      UserError: the dataset holds fewer records than a batch, or a row is not of the batch.
    """
    if not 0 < batch_size <= len(dataset):
        raise UserError(
            f"data.batch_size={batch_size}: {dataset.path} holds {counted(len(dataset), 'record')}; lower it"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"data.seed={seed}: use 0 to 2**32 - 1")
    own = np.arange(batch_size) if rows is None else np.asarray(rows, int)
    if not len(own) or own.min() < 0 or own.max() >= batch_size:
        raise UserError(f"data: rows {own.tolist()} are not of a batch of {batch_size}")
    negative = dataset.negative_text_SE

    def read(index_B: np.ndarray) -> Batch:
        records = [dataset[int(index)] for index in index_B[own[own < len(index_B)]]]
        stacked = {_BATCH_NAMES[name]: np.stack([record[name] for record in records]) for name in records[0]}
        return {**stacked, "negative_text_SE": negative}

    records = grain.MapDataset.range(len(dataset)).seed(seed)
    if shuffle:
        records = records.shuffle()
    records = records.repeat(num_epochs)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=_READ_AHEAD if num_threads else 0)

    def start(place: int) -> Iterator[Batch]:
        batches = records[place:].batch(batch_size, drop_remainder=drop_remainder).map(read)
        return iter(batches.to_iter_dataset(options))

    order = {"records": len(dataset), "seed": seed, "shuffle": shuffle}
    return LatentIterator(start, batch_size, order, accept_changes=accept_changes, log=log)
