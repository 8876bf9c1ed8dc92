"""The thread that the device belongs to: it takes sessions at their block boundaries and makes their next blocks."""

import base64
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from absl import logging

from cfjax.core.errors import UserError
from cfjax.core.progress import duration
from cfjax.memory.slots import Everything
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Made
from cfjax.serving.items import Ended
from cfjax.serving.live import Live
from cfjax.serving.metrics import Metrics
from cfjax.serving.pictures import encode_frame
from cfjax.serving.protocol import Open, Refused
from cfjax.serving.served import Served

Step = Callable[[Sequence[Session]], list[Made]]  # the next block of each
Groups = Callable[[Sequence[Session]], list[list[Session]]]  # which go together now, the first of them first
FAULT = "a fault of the server; its log has more"


def one_by_one(sessions: Sequence[Session]) -> list[Made]:
    """The next block of each session."""
    return [session.next() for session in sessions]


def each_alone(sessions: Sequence[Session]) -> list[list[Session]]:
    """Every session by itself."""
    return [[session] for session in sessions]


@dataclass(frozen=True)
class Together:
    """How sessions go through the device.

    Attributes:
      sizes: numbers of sessions for which programs are compiled.
    """

    step: Step = one_by_one
    groups: Groups = each_alone
    sizes: tuple[int, ...] = (1,)


class Engine:
    """See the module.

    Args:
      together: which sessions go through the device together, and what makes their blocks; None: one after another.
    """

    def __init__(self, metrics: Metrics, together: "Together | None" = None) -> None:
        self._metrics, self._together = metrics, together or Together()
        self._lock = threading.Lock()
        self._lives: list[Live] = []
        self._leaving: list[Live] = []
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # ---- from any thread

    def start(self, before: Callable[[], None] = lambda: None) -> None:
        """Begins; `before`: is called first, on the device's thread."""
        self._thread = threading.Thread(target=self._run, args=(before,), name="device", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ends behind the block that is being made, which is waited for so many seconds."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def alive(self) -> bool:
        """Whether the device's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def wake(self) -> None:
        """There is something to do."""
        self._wake.set()

    def add(self, live: Live) -> None:
        """Another stream."""
        with self._lock:
            self._lives.append(live)
        self.wake()

    def remove(self, live: Live) -> None:
        """A stream that ends; its memory is let go of before the next block."""
        live.ended = True
        with self._lock:
            if live in self._lives:
                self._lives.remove(live)
                self._leaving.append(live)
        self.wake()

    # ---- the device's thread

    def _run(self, before: Callable[[], None]) -> None:
        before()
        while not self._stopping:
            self._wake.clear()
            try:
                pause = self._once()
            except Exception:  # of no single stream; the others go on
                logging.exception("serving: a fault between blocks")
                pause = 0.1
            if pause != 0:
                self._wake.wait(pause)
        with self._lock:
            lives = [*self._lives, *self._leaving]
            self._lives, self._leaving = [], []
        for live in lives:
            live.close()

    def _once(self) -> float | None:
        """One round; how long nothing is to be done unless woken, None: for good."""
        with self._lock:
            lives, leaving, self._leaving = tuple(self._lives), self._leaving, []
        for live in leaving:
            live.close()
        for live in lives:
            self._guarded(live, live.carry_out)
        now = time.perf_counter()
        ready = sorted((live for live in lives if live.ready(now)), key=lambda live: live.last_step)
        if ready:
            # One group alone: whoever comes meanwhile, or has waited longer, is in the next one.
            first = {id(session) for session in self._together.groups([live.session for live in ready])[0]}
            self._make([live for live in ready if id(live.session) in first])
            return 0
        due = [at for live in lives if (at := live.due()) is not None]
        return min(max(min(due) - now, 1e-4), 60.0) if due else None  # a tiny rate's is beyond what can be waited for

    def _make(self, lives: list[Live]) -> None:
        """The next blocks. What fails together is tried alone, so that one stream's fault is its own."""
        lives = [live for live in lives if self._guarded(live, live.begin)]
        if not lives:
            return
        begun = time.perf_counter()
        try:
            made = self._together.step([live.session for live in lives])
        except Exception as error:
            if len(lives) > 1:
                for live in lives:
                    self._make([live])
            else:
                self._not_made(lives[0], error)
            return
        self._metrics.stepped(len(lives), time.perf_counter() - begun)
        for live, block in zip(lives, made, strict=True):
            self._guarded(live, partial(live.finish, block, begun))

    def _not_made(self, live: Live, error: Exception) -> None:
        if isinstance(error, UserError) and isinstance(live.session.state.memory, Everything):
            live.deliver(live, Ended("end"))  # its memory is full
            self.remove(live)
        else:
            self._failed(live, error)

    def _guarded(self, live: Live, work: Callable[[], None]) -> bool:
        """Whether it was done; a fault ends this stream alone."""
        try:
            work()
        except Exception as error:
            self._failed(live, error)
            return False
        return True

    def _failed(self, live: Live, error: Exception) -> None:
        logging.error("serving: a stream failed", exc_info=error)
        live.deliver(live, Refused("internal", FAULT))
        live.deliver(live, Ended("internal", 1011))
        self.remove(live)


def _until_full(step: Step, sessions: Sequence[Session]) -> list[Made]:
    """Their next blocks; none where a memory of everything has no room for another one."""
    try:
        return step(sessions)
    except UserError:
        if isinstance(sessions[0].state.memory, Everything):
            return []
        raise


def warm(served: Served, together: Together, log: Callable[[str], None]) -> None:
    """Runs everything once that clients can ask for, so that nothing is compiled while they wait.

    Args:
      log: is told what is done.
    """
    step = partial(_until_full, together.step)
    prompts = [*served.examples, *served.examples][:2]
    picture = base64.b64encode(encode_frame(np.zeros((served.height, served.width, 3), np.uint8), "png")).decode()
    for number, policy in enumerate(served.policies, 1):
        begun, asked = time.monotonic(), Open(1, prompts[0], memory=policy.name)
        for size in together.sizes:
            sessions = [served.open(asked) for _ in range(size)]
            for _ in range(2):
                step(sessions)
        session = sessions[0]
        for mode in policy.modes:
            session = served.open(asked)
            step([session])
            step([session])
            session.set_prompt(prompts[1], mode, blend_blocks=2)
            step([session])
            step([session])
            session.set_prompt([(prompts[0], 1.0), (prompts[1], 1.0)], mode, blend="slerp")
            step([session])
            session.restore(session.snapshot())
        if served.takes_image:
            step([served.open(replace(asked, image=picture))])
        for other in served.policies:
            if "recache" in other.modes and "recache" in policy.modes:
                changed = session.fork(1)
                changed.set_memory(other.name)
                step([changed])
        took, all_of_them = duration(time.monotonic() - begun), len(served.policies)
        log(f"compiled for {policy.name} in {took}: memory policy {number} of {all_of_them}")
