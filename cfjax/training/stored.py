"""The arrays of a checkpoint in storage: opened one by one, compared with those in memory."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from absl import logging

from cfjax.core.errors import Temporary, UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.machine import machine_failure
from cfjax.core.paths import in_bucket, kvstore, one_line
from cfjax.training.sums import STATE

PAUSES = (0.0, 1.0, 5.0, 15.0)  # seconds: a network's file system may show another machine's files a little later


def open_array(folder: Path, name: str) -> Any:
    """A saved array of a checkpoint as tensorstore opens it, not yet read."""
    arrays = {"driver": "ocdbt", "base": kvstore(folder / STATE), "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": arrays}, open=True).result()


def stored_array(folder: Path, name: str) -> LazyArray:
    """A saved array of a checkpoint, read layer by layer where it was written so."""
    store = open_array(folder, name)
    shape, chunk = tuple(store.shape), store.chunk_layout.read_chunk.shape
    stacked = len(shape) > 1 and chunk is not None and chunk[0] == 1 < shape[0]
    parts = [store[i] for i in range(shape[0])] if stacked else [store]
    return LazyArray(shape, store.dtype.numpy_dtype, tuple(_reader(part) for part in parts), stacked)


def _reader(part: Any) -> Callable[[], np.ndarray]:
    return lambda: part.read().result()


def read_back(folder: Path, arrays: Mapping[str, Any]) -> UserError | None:
    """Reads this process's part of a checkpoint that was just saved and compares every bit with what is in memory.

    Memory holds one shard of one array beside those of the state.

    Returns:
      the error to raise when something differs from what was saved: `Temporary` when the machine or the network is in
        the way.
    """
    started = time.monotonic()
    try:
        _until_visible(folder, next(iter(arrays)))
        differs = next((name for name, leaf in arrays.items() if not _equal(folder, name, leaf)), "")
    except Exception as error:  # whatever a storage that loses writes provokes
        passing = in_bucket(folder) or isinstance(machine_failure(folder, error), Temporary)
        what = f"the first checkpoint cannot be read back ({one_line(error)})"
        return (Temporary if passing else UserError)(f"{folder}: {what}; {_FIX}")
    if differs:
        return UserError(f"{folder}: {differs} of the first checkpoint is not read back as it was saved; {_FIX}")
    logging.info("%s: read back in %.1f s", folder, time.monotonic() - started)
    return None


_FIX = "the storage loses what is written, or the path has signs such as [ ] * ? in it: name another --workdir"


def _until_visible(folder: Path, name: str) -> None:
    for pause in PAUSES:
        time.sleep(pause)
        try:
            open_array(folder, name)
            return
        except Exception:
            if pause == PAUSES[-1]:
                raise


def _equal(folder: Path, name: str, leaf: Any) -> bool:
    """Whether the stored array is this one, in shape, dtype and every bit of the shards that this process wrote."""
    store = open_array(folder, name)
    if tuple(store.shape) != tuple(leaf.shape) or store.dtype.numpy_dtype != leaf.dtype:
        return False
    shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else []
    parts = [(shard.index, shard.data) for shard in shards if shard.replica_id == 0] if shards else [((), leaf)]
    return all(np.array_equal(_bits(store[index].read().result()), _bits(data)) for index, data in parts)


def _bits(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
