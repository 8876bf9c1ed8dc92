"""The training loop: batches in, updates by cadence, curves and checkpoints out; stops cleanly and resumes exactly."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.machine import storage_failure
from cfjax.core.progress import Progress, compiling
from cfjax.objectives.stage import Batch, Models, Stage
from cfjax.training.checkpoint import ASIDE, CheckpointStore
from cfjax.training.growth import LossWatch
from cfjax.training.metrics import EventWriter
from cfjax.training.observe import StepClock, Tracer, Work
from cfjax.training.placement import placement_of
from cfjax.training.state import TrainState, advance
from cfjax.training.step import Metrics, Update, make_update
from cfjax.training.watchdog import Watchdog, exit_on_failure


class DataIterator(Protocol):
    """An endless iterator of numpy batches whose state can be saved and restored to the exact record (grain's)."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


SampleFn = Callable[[TrainState, int, EventWriter], None]


class NonFiniteLoss(UserError):
    """A loss or gradient was NaN or infinite; the update was not applied and the last good checkpoint is kept."""


class GrownLoss(UserError):
    """The run ended while a loss was far beyond its running median; the last checkpoints are kept aside."""


ECHO_SECONDS = 5.0


class StopSignal:
    """While active, SIGTERM and SIGINT are noted instead of killing; a second one kills. Main thread only.

    A SIGTERM within `ECHO_SECONDS` of the first is the same one: a scheduler may signal both a process and
    its launcher. In a multi-host run JAX's preemption service listens instead, so that all processes stop at the same
    step; it treats repeated signals as one.
    """

    def __init__(self) -> None:
        self._raised: str | None = None
        self._came: dict[int, float] = {}
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
        now = time.monotonic()
        if number not in self._came:
            self._raised, self._came[number] = signal.Signals(number).name, now
        elif number == signal.SIGINT or now - self._came[number] > ECHO_SECONDS:
            signal.signal(number, self._old[number])
            signal.raise_signal(number)


class _Meter:
    """Fetches metrics one update late, so that steps overlap; checks them; averages them between two log lines."""

    def __init__(self, checkpoint_note: Callable[[], str], watch: LossWatch) -> None:
        self._watch = watch
        self._pending: list[tuple[int, str, Metrics, Any]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._note = checkpoint_note
        self.latest: dict[str, float] = {}

    def push(self, step: int, role: str, metrics: Metrics, ids: Any) -> None:
        self._pending.append((step, role, metrics, ids))

    def drain(self, before: int | None = None) -> None:
        """Fetches the metrics of iterations below `before` (default: all).

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
            self._watch.add(step, role, values["loss"])
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


@dataclass(frozen=True)
class Schedule:
    """How long a run is, and how often it logs, saves and samples.

    Attributes:
      steps: total iterations of the run.
      log_every, save_every: iterations between points of the curves, and between checkpoints (the last one is always
        saved).
      sample_every: iterations between preview samples; 0 is after the last one only.  sample_first: also before the
        first one.
      accumulate: role -> microbatches per update; 1 for a role that is not there.
      keep: number of checkpoints kept.  checksums: written with each.
      loss_growth: a loss beyond so many times its running median keeps checkpoints aside (`training.growth`); 0 is off.
      stall_seconds: the process ends when no iteration or restore ends for so long (`training.watchdog`); 0 is never.
      progress: a bar on standard error.
    """

    steps: int
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 0
    sample_first: bool = False
    accumulate: Mapping[str, int] = field(default_factory=dict)
    keep: int = 2
    checksums: bool = True
    loss_growth: float = 1000.0
    stall_seconds: float = 0.0
    progress: bool = True

    def samples_after(self, done: int) -> bool:
        """Whether preview samples are due after so many iterations."""
        return done == self.steps or (self.sample_every > 0 and done % self.sample_every == 0)


@dataclass(frozen=True)
class RunOutput:
    """Where the results of a run go, and what is recorded with them.

    Attributes:
      workdir: the run directory: checkpoints, curves, traces.
      writer: of the curves; None is one of its own in `workdir`.
      meta: JSON record for later verbs (model configs, codec, blocks ...); "stage" and "step" are added.
      work: figures for the performance curves, and what to trace (`training.observe`).
    """

    workdir: Path
    writer: EventWriter | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    work: Work = field(default_factory=Work)


class _RunIO:
    """Everything of a run but its updates: batches, progress bar, curves, checkpoints."""

    def __init__(
        self, output: RunOutput, store: CheckpointStore, writer: EventWriter, data: DataIterator, schedule: Schedule
    ) -> None:
        self.workdir, self.store, self.writer, self.schedule = output.workdir, store, writer, schedule
        self._data, self._meta = data, output.meta
        self.clock, self._tracer = StepClock(output.work), Tracer(output.workdir, output.work.trace)
        self._watch, self._aside = LossWatch(schedule.loss_growth), False
        self._meter = _Meter(lambda: f"last checkpoint: step {max(store.steps(), default='none')}", self._watch)

    def resume(self, state: TrainState, *, going_on: bool) -> tuple[TrainState, int]:
        """The state of the newest good checkpoint, or this one, and its step; data and curves resume there too."""
        restored = self.store.restore_latest(state, stage=self._meta["stage"])
        if restored is None and going_on:
            raise UserError(
                f"{self.workdir}: its checkpoints are gone; run the same command again to start from step 0"
            )
        if restored is None:
            return state, 0
        state, place, _ = restored
        start = int(state.step)
        if start >= self.schedule.steps:
            say(f"{self.workdir}: step {start} of {self.schedule.steps} is done already")
            return state, start
        self._data.set_state(place["data"])
        self._meter.set_state(place["curves"])
        self._watch.set_state(place.get("losses", {}))  # older versions did not keep them
        say(f"{self.workdir}: going on from step {start}")
        return state, start

    @property
    def shown(self) -> bool:
        """Whether this process shows how far the run is."""
        return self.schedule.progress and jax.process_index() == 0

    def bar(self, start: int) -> Progress:
        """The progress bar; where there is no terminal, a line per point of the curves."""
        return Progress(self.schedule.steps, "step", self._meta["stage"], done=start, shown=self.shown, by_hand=True)

    @contextmanager
    def compiling(self, role: str, bar: Progress) -> Iterator[None]:
        """Around the first update of a role; its time is in no rate."""
        bar.unrated()
        with self.clock.outside(), compiling(f"the {role}'s update", shown=self.shown):
            yield

    def batch(self, step: int) -> Mapping[str, np.ndarray]:
        """The next batch."""
        self._tracer.before(step)
        with self.clock.waiting():
            return _next(self._data, step)

    def updated(self, step: int, role: str, metrics: Metrics, batch: Mapping[str, np.ndarray]) -> None:
        """A role was updated at iteration `step`."""
        self._meter.push(step, role, metrics, batch.get("index_B"))
        self.clock.updated(role)

    def iteration(self, state: TrainState, step: int, bar: Progress, *, stopped: bool) -> None:
        """Logs and saves what is due after iteration `step`, which led to `state`."""
        done, last = step + 1, step + 1 == self.schedule.steps
        log = step % self.schedule.log_every == 0 or last
        save = last or done % self.schedule.save_every == 0 or stopped
        self._meter.drain(None if log or save else step)
        self.clock.step()
        traced = self._tracer.after(step, state)
        bar.note({role: f"{loss:.4g}" for role, loss in self._meter.latest.items()})
        bar.update()
        if log:
            bar.line()
            self.writer.scalars(step, self._meter.means())
        self.writer.performance(step, traced | (self.clock.values() if log else {}))
        if save:
            loop_state = {"data": self._data.get_state(), "curves": self._meter.get_state()}
            with self.clock.outside():
                self.writer.flush()  # a run that resumes from this checkpoint finds the curves up to it
                self._save(done, state, {**loop_state, "losses": self._watch.get_state()})

    def _save(self, done: int, state: TrainState, place: Mapping[str, Any]) -> None:
        """Saves step `done`; in a folder that no run resumes from, if a loss exceeds its bound."""
        if not self._watch.grown():
            self._aside = False
            return self.store.save(done, state, place, self._meta)
        if not self._aside and jax.process_index() == 0:
            say(f"{self.workdir}: {self.growth_message()}")
        self._aside = True
        self.store.wait()
        aside = CheckpointStore(self.workdir, 1, folder=ASIDE, checksums=self.schedule.checksums)
        try:
            aside.remove_all()
            aside.save(done, state, place, self._meta)
        finally:
            aside.close()

    def growth_message(self) -> str:
        """The message about a loss that grew beyond its bound; "" if none did."""
        if not (grown := self._watch.grown()):
            return ""
        good = max(self.store.steps(), default=None)
        start = "none is good yet" if good is None else f"the same command goes on from that of step {good}"
        return (
            f"{grown}: checkpoints are kept aside in {ASIDE}; {start}, with a lower --config.optim.ROLE.lr if the loss "
            "grows again; --config.loss_growth=0 always saves"
        )

    def exit_on_signal(self, signal_name: str, done: int, bar: Progress) -> NoReturn:
        """Ends the process as a signal asked, once the checkpoint is on disk."""
        self.store.wait()
        bar.close()
        where = f"{self.workdir}/{ASIDE}" if self._aside else f"{self.workdir}; the same command goes on from here"
        say(f"{signal_name}: saved step {done} of {self.schedule.steps} in {where}")
        raise SystemExit(0)


@contextmanager
def _naming_last_checkpoint(store: CheckpointStore) -> Iterator[None]:
    """Context manager: storage errors inside name the step from which the run resumes."""
    try:
        yield
    except Exception as error:
        failure = storage_failure(error)
        if failure is None:
            raise
        raise type(failure)(f"{failure}; last checkpoint: step {max(store.steps(), default='none')}") from error


def _updates(
    stage: Stage,
    txs: Mapping[str, optax.GradientTransformation],
    accumulate: Mapping[str, int],
    placement: TrainState | None,
) -> dict[str, Update]:
    """The jitted update of every role."""
    return {
        role: make_update(stage, role, txs[role], accumulate=accumulate.get(role, 1), placement=placement)
        for role in stage.losses
    }


def _iterate(
    stage: Stage,
    updates: Mapping[str, Update],
    state: TrainState,
    frozen: Models,
    start: int,
    io: _RunIO,
    put_batch: Callable[[Mapping[str, np.ndarray]], Batch],
    sample_fn: SampleFn | None,
    watchdog: Watchdog,
) -> TrainState:
    """The iterations from `start` on."""
    schedule, compiled = io.schedule, set[str]()
    with StopSignal() as stop, io.bar(start) as bar:
        if sample_fn is not None and schedule.sample_first and start == 0:
            sample_fn(state, 0, io.writer)
        for step in range(start, schedule.steps):
            for role in stage.roles_at(step):
                batch = io.batch(step)
                with nullcontext() if role in compiled else io.compiling(role, bar):
                    state, metrics = updates[role](state, frozen, put_batch(batch))
                compiled.add(role)
                io.updated(step, role, metrics, batch)
            state, done = advance(state), step + 1
            stopped = stop.name(step)
            io.iteration(state, step, bar, stopped=stopped is not None)
            watchdog.beat(step)
            if stopped is not None and done < schedule.steps:
                io.exit_on_signal(stopped, done, bar)
            if sample_fn is not None and schedule.samples_after(done):
                with watchdog.paused(), io.clock.outside():
                    sample_fn(state, done, io.writer)
        with watchdog.paused():
            io.store.wait()
    if message := io.growth_message():
        raise GrownLoss(f"{io.workdir}: {message}")
    return state


def fit(
    stage: Stage,
    txs: Mapping[str, optax.GradientTransformation],
    state: TrainState,
    frozen: Models,
    data: DataIterator | Callable[[], DataIterator],
    schedule: Schedule,
    output: RunOutput,
    *,
    put_batch: Callable[[Mapping[str, np.ndarray]], Batch] = _put,
    sample_fn: SampleFn | None = None,
    going_on: bool = False,
) -> TrainState:
    """Trains `stage` to the end of `schedule`, from the newest good checkpoint in the run directory if there is one.

    Iteration n: for each role in `stage.roles_at(n)` a batch is fetched and the role updated. Checkpoints hold the
    iterator's state, so a resumed run equals the uninterrupted one, bit for bit. SIGTERM or SIGINT: the iteration is
    finished, saved, and the process exits with 0. Curves ("role/name", point n = mean over iterations since the last
    point) go to the writer every `log_every` iterations.

    Args:
      txs: role -> optimiser, as given to `init_state`.
      state: a fresh state (`init_state`), which is consumed; also the template of a restored one, shardings included,
        so that a run may resume on another mesh or number of processes.
      frozen: further models that the losses see; never saved.
      data: iterator of numpy batches, or a function that makes it.
      put_batch: places a batch on devices (default: the default device).
      sample_fn: called with (state, step, writer) when preview samples are due.
      going_on: the run directory holds a checkpoint, and `state` is only its template.

    Raises:
      NonFiniteLoss: a loss or gradient is not finite.  GrownLoss: the run ended with a loss beyond its bound.
      Temporary: a checkpoint could not be written.
      UserError: the run directory holds another stage or other shapes; the data ended.
    """
    with exit_on_failure():
        store = CheckpointStore(output.workdir, schedule.keep, checksums=schedule.checksums)
    own_writer = None if output.writer else EventWriter(output.workdir, enabled=jax.process_index() == 0)
    writer = output.writer or own_writer
    assert writer is not None
    try:
        named = replace(output, meta={**output.meta, "stage": stage.name})
        io = _RunIO(named, store, writer, data() if callable(data) else data, schedule)
        updates = _updates(stage, txs, schedule.accumulate, placement_of(state))
        with exit_on_failure(), _naming_last_checkpoint(store), Watchdog(schedule.stall_seconds) as watchdog:
            with watchdog.restoring():
                state, start = io.resume(state, going_on=going_on)
            if start >= schedule.steps:
                return state
            writer.restart(start)
            return _iterate(stage, updates, state, frozen, start, io, put_batch, sample_fn, watchdog)
    finally:
        store.close()
        if own_writer:
            own_writer.close()
