"""The training loop: batches in, updates by cadence, curves and checkpoints out; it ends well and goes on exactly."""

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from tqdm import tqdm

from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.objectives.stage import Batch, Models, Stage
from cfjax.training.checkpoint import CheckpointStore
from cfjax.training.metrics import EventWriter
from cfjax.training.state import TrainState, advance
from cfjax.training.step import Metrics, make_update


class DataIterator(Protocol):
    """An endless iterator of numpy batches whose place can be saved and restored to the exact record (grain's)."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


SampleFn = Callable[[TrainState, int, EventWriter], None]


class NonFiniteLoss(UserError):
    """A loss or gradient was NaN or infinite; the update was not applied and the last good checkpoint is kept."""


class StopSignal:
    """While active, SIGTERM and SIGINT are noted instead of killing; a second one kills. Main thread only.

    In a multi-host run JAX's preemption service listens instead, so that all processes stop at the same step.
    """

    def __init__(self) -> None:
        self._raised: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def name(self, step: int) -> str | None:
        """The signal that asks the run to stop after this step, if one came."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return "SIGTERM"
        return self._raised

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._raised = signal.Signals(number).name
        signal.signal(number, self._old[number])


class _Meter:
    """Fetches metrics one update late, so that steps overlap; checks them; averages them between two log lines."""

    def __init__(self, checkpoint_note: Callable[[], str]) -> None:
        self._pending: list[tuple[int, str, Metrics, Any]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._note = checkpoint_note
        self.latest: dict[str, float] = {}

    def push(self, step: int, role: str, metrics: Metrics, ids: Any) -> None:
        self._pending.append((step, role, metrics, ids))

    def drain(self, before: int | None = None) -> None:
        """Fetches what iterations below `before` (default: all) have told.

        Raises:
          NonFiniteLoss: an update of theirs was not finite.
        """
        while self._pending and (before is None or self._pending[0][0] < before):
            step, role, metrics, ids = self._pending.pop(0)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not values.pop("finite"):
                shown = "unknown" if ids is None else np.asarray(ids).tolist()
                raise NonFiniteLoss(
                    f"step {step}, role {role!r}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
                    f"batch records {shown}; the update was not applied; {self._note()}"
                )
            self.latest[role] = values["loss"]
            for name, value in values.items():
                tag = f"{role}/{name}"
                self._sums[tag] = self._sums.get(tag, 0.0) + value
                self._counts[tag] = self._counts.get(tag, 0) + 1

    def get_state(self) -> dict[str, list[float]]:
        """The open averages, for the checkpoint: a resumed run's curves are then the uninterrupted one's."""
        return {tag: [self._sums[tag], self._counts[tag]] for tag in self._sums}

    def set_state(self, state: Mapping[str, list[float]]) -> None:
        self._sums = {tag: total for tag, (total, _) in state.items()}
        self._counts = {tag: int(count) for tag, (_, count) in state.items()}

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        out = {tag: self._sums[tag] / self._counts[tag] for tag in self._sums}
        self._sums, self._counts = {}, {}
        return out


def _put(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jax.numpy.asarray(leaf) for name, leaf in batch.items()}


def _next(data: DataIterator, step: int) -> Mapping[str, np.ndarray]:
    try:
        return next(data)
    except StopIteration:
        raise UserError(f"the data ended at step {step}; let the iterator repeat (num_epochs=None)") from None


def fit(
    stage: Stage,
    state: TrainState,
    frozen: Models,
    data: DataIterator | Callable[[], DataIterator],
    txs: Mapping[str, optax.GradientTransformation],
    *,
    steps: int,
    workdir: str | Path,
    log_every: int = 50,
    save_every: int = 1000,
    keep: int = 2,
    accumulate: int | Mapping[str, int] = 1,
    writer: EventWriter | None = None,
    meta: Mapping[str, Any] | None = None,
    sample_fn: SampleFn | None = None,
    sample_every: int = 0,
    sample_first: bool = False,
    put_batch: Callable[[Mapping[str, np.ndarray]], Batch] = _put,
    progress: bool = True,
) -> TrainState:
    """Trains `stage` until iteration `steps`, going on from the newest good checkpoint in `workdir` if there is one.

    Iteration n: for each role in `stage.roles_at(n)` a batch is fetched and the role updated. Checkpoints hold the
    iterator's place, so a resumed run is the uninterrupted one, bit for bit. SIGTERM or SIGINT: the iteration is
    finished, saved, and the process exits with 0. Curves ("role/name", point n = mean over iterations since the last
    point) go to the writer every `log_every` iterations.

    Args:
      state: a fresh state (`init_state`), which is consumed; also the template of a restored one, shardings included.
      frozen: further models that the losses see; never saved.
      data: iterator of numpy batches, or a function that makes it.
      txs: role -> optimiser, as given to `init_state`.
      steps: total iterations of the run.
      keep: number of checkpoints kept.  save_every: iterations between them (the last one is always saved).
      accumulate: microbatches per update, one number or by role.
      writer: where curves go (default: one of its own in `workdir`).
      meta: JSON record for later verbs (model configs, codec, blocks ...); "stage" and "step" are added.
      sample_fn: called with (state, step, writer) every `sample_every` iterations and after the last one, and with
        `sample_first` before the first one too.
      put_batch: places a batch on devices (default: the default device).
      progress: a bar on standard error.

    Raises:
      NonFiniteLoss: a loss or gradient is not finite.
      UserError: `workdir` holds another stage or other shapes; the data ended.
    """
    lead = jax.process_index() == 0
    store = CheckpointStore(workdir, keep=keep)
    own_writer = writer is None
    writer = EventWriter(workdir, enabled=lead) if writer is None else writer
    try:
        meter = _Meter(lambda: f"last checkpoint: step {max(store.steps(), default='none')}")
        start, iterator = 0, data() if callable(data) else data
        restored = store.restore_latest(state, stage=stage.name)
        if restored is not None:
            state, data_state, _ = restored
            start = int(state.step)
            if start >= steps:
                say(f"{workdir}: step {start} of {steps} is done already")
                return state
            iterator.set_state(data_state["data"])
            meter.set_state(data_state["curves"])
            say(f"{workdir}: going on from step {start}")
        writer.restart(start)
        by_role = accumulate if isinstance(accumulate, Mapping) else dict.fromkeys(stage.losses, accumulate)
        updates = {r: make_update(stage, r, txs[r], accumulate=by_role.get(r, 1)) for r in stage.losses}
        bar = tqdm(total=steps, initial=start, unit="step", disable=not (progress and lead), dynamic_ncols=True)
        with StopSignal() as stop, bar:
            if sample_fn is not None and sample_first and start == 0:
                sample_fn(state, 0, writer)
            for step in range(start, steps):
                for role in stage.roles_at(step):
                    batch = _next(iterator, step)
                    state, metrics = updates[role](state, frozen, put_batch(batch))
                    meter.push(step, role, metrics, batch.get("index_B"))
                state, done = advance(state), step + 1
                last = done == steps
                log = step % log_every == 0 or last
                stopped = stop.name(step)
                save = last or done % save_every == 0 or stopped is not None
                meter.drain(None if log or save else step)
                bar.set_postfix({role: f"{loss:.4g}" for role, loss in meter.latest.items()}, refresh=False)
                bar.update()
                if log:
                    writer.scalars(step, meter.means())
                if save:
                    place = {"data": iterator.get_state(), "curves": meter.get_state()}
                    store.save(done, state, place, {**(meta or {}), "stage": stage.name})
                if stopped is not None and not last:
                    store.wait()
                    bar.close()
                    say(f"{stopped}: saved step {done} of {steps} in {workdir}; the same command goes on from here")
                    raise SystemExit(0)
                if sample_fn is not None and (last or (sample_every and done % sample_every == 0)):
                    sample_fn(state, done, writer)
            store.wait()
        return state
    finally:
        store.close()
        if own_writer:
            writer.close()
