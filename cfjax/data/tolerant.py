"""Tolerating a few broken records while training: each is reported once, counted, and replaced by another."""

import logging
import threading
from collections.abc import Callable

import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.latents import Batch, ClipDataset, WrappedDataset
from cfjax.data.readers import BrokenRecord

Log = Callable[[str], None]

FLOATS = {"trajectory_JFHWC", "picture_FHWC", "text_SE", "actions_FA"}  # of a record, besides its latents


class TolerantDataset(WrappedDataset):
    """A `ClipDataset` whose broken records are replaced by the next good one, up to a fraction of the set.

    A record is broken if it is damaged (its file is then named) or holds numbers that are not finite. Failing to read
    it because of the machine (open files, memory, disk) ends the run and does not count. The replacement is the same in
    every epoch and after a resume, so runs stay reproducible; `index` is the replacement's own. Thread-safe.

    Args:
      fraction: of the records that may be broken before that is an error; counted from this process's start.
      log: called with one line per broken record (default: a warning in the log).

    Attributes:
      corrupt: the broken records found so far, record -> what is wrong with it.
    """

    def __init__(self, dataset: ClipDataset, fraction: float, log: Log = logging.warning) -> None:
        if not 0.0 <= fraction < 1.0:
            raise UserError(f"data.max_corrupt={fraction}: a fraction of the records, 0 or more and less than 1")
        super().__init__(dataset)
        self._log = log
        # prompts alone have latents of NaN, of which only the shape is used
        self._finite = FLOATS | ({"latents_FHWC"} if dataset.has_latents else set())
        self._allowed = int(fraction * len(dataset))
        self._lock = threading.Lock()
        self.corrupt: dict[int, str] = {}

    def __getitem__(self, index: int) -> Batch:
        for candidate in (int(index) + n for n in range(len(self))):
            candidate %= len(self)
            if candidate in self.corrupt:
                continue
            try:
                record = self._dataset[candidate]
                for name in self._finite & record.keys():
                    if not np.isfinite(record[name]).all():
                        raise BrokenRecord(f"{self.path}, record {candidate}: {name} holds numbers that are not finite")
                return record
            except BrokenRecord as error:
                self._note(candidate, str(error))
        raise UserError(f"{self.path}: no record can be read; precompute it again")

    def _note(self, index: int, wrong: str) -> None:
        with self._lock:
            if index in self.corrupt:
                return
            self.corrupt[index] = wrong
            count = len(self.corrupt)
        if count > self._allowed:
            raise UserError(
                f"{wrong}; with it {count} of {len(self)} records are broken, more than data.max_corrupt allows: "
                f"repair the set, or raise data.max_corrupt"
            )
        self._log(f"{wrong}; left out ({count} of at most {self._allowed})")
