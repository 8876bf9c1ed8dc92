"""Checkpoints with Orbax: asynchronous, atomic, the newest few kept; broken ones are skipped.

A checkpoint holds the train state as a flat dict of named arrays ("params/student/blocks/..."), the data iterator's
state, and a meta record (stage, step, and whatever the verb adds: model configs, codec, blocks).

`open_role` reads an array only when it is asked for, and `training.streamed` writes a checkpoint of such arrays: for
networks that are larger than memory.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from jax.experimental import multihost_utils

from cfjax.core.errors import Temporary, UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.limits import AXIS, JSON_BYTES, RANK
from cfjax.core.paths import (
    absolute,
    file_sizes,
    is_folder,
    kvstore,
    make_folder,
    move_folder,
    one_line,
    path_of,
    unusable,
)
from cfjax.core.schema import anything, each_of, several, table, whole
from cfjax.core.tree import named_leaves
from cfjax.training.leaves import check_leaves, flatten, host_copy, unflatten
from cfjax.training.optim import current_names
from cfjax.training.plain import from_json, to_json
from cfjax.training.stored import read_back, stored_array
from cfjax.training.sums import RECORD, STATE, RecordHandler, RecordRestore, RecordSave, verify

FOLDER = "checkpoints"
PARTS = ("params", "ema")
BROKEN = "checkpoints_broken"
ASIDE = "checkpoints_aside"  # of a loss that left all bounds
RECORD_RULE = table({"meta": table({}), "data_state": anything, "leaves": each_of(several(whole(0, AXIS), 0, RANK))})
RACES = 5  # with a run that removes old checkpoints, lost by who opens its folder

T = TypeVar("T")
Found = tuple[dict[str, jax.Array], dict[str, Any]]  # arrays by name, record


def _manager(
    directory: Path, *, keep: int | None = None, writes: bool = True, checksums: bool = True
) -> ocp.CheckpointManager:
    """Orbax's manager: processes write together, and each reads by itself, so that none waits for one that cannot."""
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,
        cleanup_tmp_directories=writes,
        enable_background_delete=writes,  # an old one that cannot be removed is no reason to die
        enable_async_checkpointing=writes,
        save_root_metadata=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions() if writes else alone,
    )
    handlers = {STATE: ocp.PyTreeCheckpointHandler(), RECORD: RecordHandler(checksums=checksums)}
    try:
        for _ in range(RACES):
            # Listed, but absent when read: an old one that a concurrent run removed.
            with suppress(FileNotFoundError, NotADirectoryError):
                return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    except Exception as error:  # whatever a disk or a bucket that may not be read or written provokes
        raise unusable(error)(f"{directory} cannot be opened ({one_line(error)})") from error


def _all_gather(value: int) -> list[int]:
    """The values of all processes; a collective call."""
    return multihost_utils.process_allgather(np.asarray(value, np.int32)).ravel().tolist()


def _read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    folder = path_of(manager.directory) / str(step)
    size = sum(file_sizes(folder / RECORD).values())
    if size > JSON_BYTES:
        raise ValueError(f"its record has {size:,} bytes")
    verify(folder, items=(RECORD,))
    record = manager.restore(step, args=ocp.args.Composite(record=RecordRestore()))["record"]
    if wrong := RECORD_RULE("", record):
        raise ValueError(wrong)
    return {key: from_json(record[key]) for key in ("meta", "data_state", "leaves")}


def _probe(folder: Path) -> None:
    """Reads the last byte of every stored array; raises when a file is cut short or gone.

    Orbax reads all arrays at once, and after a first failure prints the errors of the others on the terminal.
    """
    store = ts.KvStore.open({"driver": "ocdbt", "base": kvstore(folder / STATE)}).result()
    keys = store.list().result()
    if not keys:
        raise FileNotFoundError(f"no arrays in {folder}/{STATE}")
    for key in keys:
        store.read(key, byte_range=slice(-1, None)).result()


def _read_arrays(manager: ocp.CheckpointManager, step: int, wanted: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The named arrays of a checkpoint, each with its template's dtype and sharding; others are not read."""
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
    how = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)
    _probe(path_of(manager.directory) / str(step))
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def _unless_broken(folder: Path, read: Callable[[], T]) -> T | None:
    """The result of `read`, which may raise UserError; None, with a warning, if the checkpoint is broken."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file provokes
        logging.warning("checkpoint %s is broken and is passed over (%s)", folder, one_line(error))
        return None


def _read(
    manager: ocp.CheckpointManager,
    wanted: Mapping[str, jax.Array],
    check: Callable[[Path, Mapping[str, Any]], None],
    together: bool,
    step: int,
) -> Found | None:
    """The wanted arrays of a checkpoint and its record, which `check` may refuse; None, with a warning, if broken."""
    folder = path_of(manager.directory) / str(step)

    def read() -> Found:
        record = _read_record(manager, step)
        saved = list(record["leaves"])
        if not wanted.keys() <= record["leaves"].keys():  # an older version's names?
            names = current_names(saved)
            record["leaves"] = {names[name]: shape for name, shape in record["leaves"].items()}
        check(folder, record)
        verify(folder, together=together)
        stored = dict(zip(record["leaves"], saved, strict=True))
        arrays = _read_arrays(manager, step, {stored[name]: leaf for name, leaf in wanted.items()})
        return jax.block_until_ready({name: arrays[stored[name]] for name in wanted}), record

    return _unless_broken(folder, read)


def _newest(steps: Iterable[int], read: Callable[[int], T | None], *, together: bool) -> tuple[T | None, list[int]]:
    """The result of `read` at the newest step that is not broken, and the newer, broken steps.

    Args:
      together: all processes call this, and what is broken for one of them is broken for all.
    """
    untried = set(steps)
    broken: list[int] = []
    ask = _all_gather if together else lambda value: [value]
    while (step := max(ask(max(untried, default=-1)))) >= 0:  # a process may not see all of them
        found = read(step)
        if all(ask(found is not None)):
            return found, broken
        if found is not None:
            logging.warning("checkpoint of step %d is passed over, as another process cannot read it", step)
        found = None  # no room for its arrays beside the next one's
        untried.discard(step)
        broken.append(step)
    return None, broken


def record_of(state: Mapping[str, Any], data_state: Any, meta: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The record of a checkpoint, as JSON: meta, the data iterator's state, and every leaf's shape."""
    return {
        "meta": to_json({**meta, "step": step}),
        "data_state": to_json(data_state),
        "leaves": {name: list(leaf.shape) for name, leaf in state.items()},
    }


class CheckpointStore:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`.

    Args:
      workdir: the run's folder, created when absent; here or in a bucket (`core.paths`).
      keep: how many of the newest checkpoints stay.
      checksums: whether each is written with the checksums of its files (`training.sums`).
      folder: another one in `workdir`.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, *, checksums: bool = True, folder: str = FOLDER) -> None:
        self._workdir = absolute(workdir)
        self._directory = self._workdir / folder
        make_folder(self._directory)
        self._manager = _manager(self._directory, keep=keep, checksums=checksums)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data_state: Any, meta: Mapping[str, Any]) -> None:
        """Starts an asynchronous, atomic save; returns once `state` may be donated. A saved step stays as it is.

        The first one of a workdir is waited for and read back, to detect at once a storage that loses writes.

        Raises:
          Temporary: this save, or the one before it, could not be written (a full disk); older ones stay as they are.
          UserError: what was saved first is not what can be read.
        """
        saved = self._manager.all_steps()
        if step in saved:
            return
        arrays = {name: host_copy(leaf) for name, leaf in flatten(state).items()}
        record = RecordSave(record_of(arrays, data_state, meta, step))
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), record=record)
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # whatever a full or unreachable disk provokes
            raise self._not_saved(error) from error
        if not saved:
            self.wait()
            self._read_back(step, arrays)

    def _read_back(self, step: int, arrays: Mapping[str, Any]) -> None:
        """A collective call that raises unless every process can read the first checkpoint back."""
        problem = read_back(self._directory / str(step), arrays)
        if any(_all_gather(problem is not None)):
            with suppress(Exception):  # whatever the storage does not do now either
                self._set_aside([step])
            raise problem or UserError(f"{self._directory}: another process cannot read the first checkpoint back")

    def restore_latest(self, template: Any, *, stage: str | None = None) -> tuple[Any, Any, dict[str, Any]] | None:
        """(state, data_state, meta) of the newest checkpoint that can be read, or None when there is none.

        Broken ones are skipped with a warning each and moved to `workdir/checkpoints_broken`. All processes call this
        and use the same one: what one of them cannot read is broken for all. Arrays get the
        template's dtype and sharding.

        Raises:
          UserError: all are broken; the stage is not `stage`; the leaves or shapes are not the template's.
        """
        wanted = flatten(template)

        def check(folder: Path, record: Mapping[str, Any]) -> None:
            _check_stage(self._workdir, record["meta"], (stage,) if stage else ())
            check_leaves(folder, wanted, record["leaves"], whole=True)

        with closing(_manager(self._directory, writes=False)) as reader:
            found, broken = _newest(self.steps(), partial(_read, reader, wanted, check, True), together=True)
        if found is not None:
            self._set_aside(broken)
            arrays, record = found
            return unflatten(template, arrays), record["data_state"], record["meta"]
        if broken:
            raise UserError(
                f"{self._directory}: all checkpoints are broken ({broken}); remove the folder to start again"
            )
        return None

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves broken checkpoints away; a collective call."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self._workdir / BROKEN / str(step)
                while is_folder(target):
                    target = target.with_name(target.name + "_")
                move_folder(self._directory / str(step), target)
        if jax.process_count() > 1:
            ocp.multihost.sync_global_processes("cfjax_set_aside")
        self._manager.reload()

    def remove_all(self) -> None:
        """Removes every checkpoint; all processes call this."""
        for step in self.steps():
            self._manager.delete(step)

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          Temporary: it could not be written; older ones stay as they are.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def _not_saved(self, error: Exception) -> Temporary:
        kept = max(self.steps(), default=None)
        good = "none is there yet" if kept is None else f"that of step {kept} is good"
        return Temporary(
            f"{self._directory}: a checkpoint could not be written ({one_line(error)}); {good}; see to "
            "the space and the permissions there and run the same command again"
        )

    def close(self) -> None:
        """Finishes the last save and stops the threads; failed saves were raised by `save` or `wait`."""
        try:
            self._manager.close()
        except Exception as error:
            logging.warning("closing %s: %s", self._directory, one_line(error))


def _check_stage(run_dir: Path, meta: Mapping[str, Any], stages: Sequence[str]) -> None:
    found = meta.get("stage")
    if stages and found not in stages:
        raise UserError(
            f"{run_dir} holds stage {found!r}, expected {' or '.join(map(repr, stages))}; name another folder"
        )


def _open(run_dir: Path) -> ocp.CheckpointManager:
    if not is_folder(run_dir / FOLDER):
        raise UserError(f"{run_dir}: no run here ({FOLDER}/ is missing); name the --workdir of a training run")
    return _manager(run_dir / FOLDER, writes=False)


def _good_records(run_dir: Path) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """(step, record) of the readable checkpoints of a run, newest first."""
    with closing(_open(run_dir)) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                record = _read_record(manager, step)
            except Exception as error:
                logging.warning("checkpoint %s is passed over (%s)", run_dir / FOLDER / str(step), one_line(error))
                continue
            yield step, record


def read_meta(run_dir: str | Path, *, stages: Sequence[str] = ()) -> dict[str, Any]:
    """The meta record of a run's newest readable checkpoint; from which a verb builds the template for `load_role`.

    Raises:
      UserError: no run, nothing readable, or a stage not among `stages`.
    """
    run_dir = absolute(run_dir)
    with closing(_good_records(run_dir)) as records:
        for _, record in records:
            _check_stage(run_dir, record["meta"], stages)
            return record["meta"]
    raise UserError(f"{run_dir}: no readable checkpoint")


def load_role(run_dir: str | Path, role: str, template: Any, *, ema: bool = False, stages: Sequence[str] = ()) -> Any:
    """One role's weights (or their float32 EMA, `ema`) from a run's newest readable checkpoint, as `template`.

    Nothing else of the checkpoint is read. Arrays get the template's dtype and sharding; where that spans processes,
    all of them call this and use the same checkpoint.

    Args:
      run_dir: the `--workdir` of the other run.  stages: accepted stage names (empty: any).

    Raises:
      UserError: no run, nothing readable, another stage, no such role, or other leaves or shapes.
    """
    run_dir, prefix = absolute(run_dir), f"{'ema' if ema else 'params'}/{role}/"
    wanted = {prefix + name: leaf for name, leaf in named_leaves(template).items()}

    def check(folder: Path, record: Mapping[str, Any]) -> None:
        _check_stage(run_dir, record["meta"], stages)
        saved = {name: shape for name, shape in record["leaves"].items() if name.startswith(prefix)}
        if not saved:
            has = sorted({"/".join(n.split("/")[:2]) for n in record["leaves"] if n.startswith(("params/", "ema/"))})
            raise UserError(f"{folder} holds no {prefix[:-1]!r}; it holds {', '.join(has)}")
        check_leaves(folder, wanted, saved, whole=True)

    together = not all(leaf.sharding.is_fully_addressable for leaf in wanted.values())
    with closing(_open(run_dir)) as manager:
        found, _ = _newest(manager.all_steps(), partial(_read, manager, wanted, check, together), together=together)
    if found is None:
        raise UserError(f"{run_dir}: no readable checkpoint")
    return unflatten(template, {name.removeprefix(prefix): array for name, array in found[0].items()})


def stored_roles(run_dir: str | Path) -> list[tuple[str, bool]]:
    """(role, whether it is the float32 EMA) of all weights in the newest readable checkpoint of a run.

    Raises:
      UserError: no run, or nothing readable.
    """
    run_dir = absolute(run_dir)
    with closing(_good_records(run_dir)) as records:
        for _, record in records:
            found = {tuple(name.split("/")[:2]) for name in record["leaves"] if name.startswith(PARTS)}
            return sorted(((role, part == PARTS[1]) for part, role in found), key=lambda x: x[::-1])
    raise UserError(f"{run_dir}: no readable checkpoint")


def open_role(
    run_dir: str | Path, role: str, *, ema: bool = False, stages: Sequence[str] = (), together: bool = False
) -> dict[str, LazyArray]:
    """One role's arrays of a run's newest readable checkpoint by name, in the dtype they were saved in; not yet read.

    Args:
      stages: accepted stage names (empty: any).
      together: all processes call this, and use the same checkpoint.

    Raises:
      UserError: no run, nothing readable, another stage, or no such role.
    """
    run_dir, prefix = absolute(run_dir), f"{PARTS[ema]}/{role}/"

    def read(folder: Path) -> dict[str, LazyArray]:
        record = _read_record(manager, int(folder.name))
        _check_stage(run_dir, record["meta"], stages)
        names = [name for name in record["leaves"] if name.startswith(prefix)]
        if not names:
            raise UserError(f"{folder} holds no {prefix[:-1]!r}")
        verify(folder, together=together)
        _probe(folder)
        return {name.removeprefix(prefix): stored_array(folder, name) for name in names}

    def attempt(step: int) -> dict[str, LazyArray] | None:
        folder = run_dir / FOLDER / str(step)
        return _unless_broken(folder, lambda: read(folder))

    with closing(_open(run_dir)) as manager:
        found, _ = _newest(manager.all_steps(), attempt, together=together)
    if found is None:
        raise UserError(f"{run_dir}: no readable checkpoint")
    return found


def checkpoint_hash(run_dir: Path, step: int) -> str:
    """Tells a checkpoint from others without reading it: 16 hex digits of its files' names, drawn when it is written.

    A copy elsewhere has the same.
    """
    state = run_dir / FOLDER / str(step) / "state"
    files = sorted({**file_sizes(state), **file_sizes(state / "d")}.items())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]
