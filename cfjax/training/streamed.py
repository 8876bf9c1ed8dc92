"""Checkpoints of lazy arrays, which are read while they are written: for networks larger than memory."""

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.training.checkpoint import FOLDER, record_of
from cfjax.training.sums import RECORD, STATE, RecordHandler, RecordSave

IN_FLIGHT = 32e6


class _PartsHandler(ocp.type_handlers.NumpyHandler):
    """Saves `LazyArray`s: parts are read in turn and at most `IN_FLIGHT` bytes of them (or one part) are being written.

    A stacked array has a chunk per layer. What goes wrong is kept in `error`: raised inside Orbax's threads, it would
    spill on the terminal.
    """

    error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()
        self._writes: list[Any] = []
        self._bytes = 0

    async def _open_and_write(self, value: LazyArray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        if value.stacked:
            tspec["metadata"]["chunks"] = [1, *value.shape[1:]]
        try:
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            async with self._turn:  # Orbax starts all arrays at once
                own = [
                    await self._write(store[i] if value.stacked else store, value, i) for i in range(len(value.parts))
                ]
            await asyncio.gather(*own)
        except Exception as error:
            self.error = self.error or error

    async def _write(self, store: ts.TensorStore, value: LazyArray, part: int) -> Any:
        """Starts writing one part."""
        if self.error:
            raise self.error
        size = value.nbytes // len(value.parts)
        if self._bytes + size > IN_FLIGHT:
            await asyncio.gather(*self._writes)
            self._writes, self._bytes = [], 0
        self._writes.append(store.write(value.parts[part]()))
        self._bytes += size
        return self._writes[-1]


def write_streamed(workdir: str | Path, arrays: Mapping[str, LazyArray], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint of step 0 in a new run directory, atomically.

    Host memory holds one part of one array (see `LazyArray`) beside what the readers keep. Nothing is compressed.

    Args:
      arrays: by "params/<role>/<leaf>" or "ema/<role>/<leaf>".

    Raises:
      UserError: there is a checkpoint already; or whatever reading an array raises.
    """
    directory = Path(workdir).absolute() / FOLDER
    if directory.exists():
        raise UserError(f"{directory} exists; name another folder")
    partial = directory.with_name(f".{FOLDER}.{os.getpid()}")
    partial.mkdir(parents=True)
    handler = _PartsHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handlers = {
        STATE: ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False),
        RECORD: RecordHandler(checksums=True),
    }
    options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False, save_root_metadata=False)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(dict(arrays)), record=RecordSave(record_of(arrays, {}, meta, 0))
    )
    try:
        manager = ocp.CheckpointManager(partial, options=options, item_handlers=handlers)
        try:
            manager.save(0, args=args)
        except Exception as error:  # what is missing then is only an after-effect
            handler.error = handler.error or error
        manager.close()
        if handler.error:
            raise handler.error
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
