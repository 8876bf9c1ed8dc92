"""The sessions of a server and who may have one: places, lost sockets that come back, limits in time.

Every device has an engine, with a copy of the model. A session stays on the device that had the fewest as it came.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from absl import logging

from cfjax.serving.engine import Engine, Together, warm
from cfjax.serving.items import Block, Ended, Item, Opened
from cfjax.serving.live import Live
from cfjax.serving.metrics import Metrics
from cfjax.serving.protocol import Open, Refused, Reopen
from cfjax.serving.served import Limits, Served

GOODBYE = Ended("shutdown", 1001)


class Socket(Protocol):
    """A client's connection, as `stream.Connection` is one."""

    def put(self, item: Item) -> None:
        """Sends it after all before it."""


class Host:
    """All streams of one server. Its methods are the loop's, but for `deliver`.

    Args:
      served: the model.  copies: of it, on further devices (`served.on_devices`).

    Attributes:
      ready: whether all programs are compiled.  failure: why they could not be.
    """

    def __init__(
        self,
        served: Served,
        limits: Limits = Limits(),
        together: Together = Together(),
        copies: Sequence[Served] = (),
    ) -> None:
        self.served, self.limits, self.metrics = served, limits, Metrics()
        self._models = (served, *copies)
        self._engines = [Engine(self.metrics, together) for _ in self._models]
        self._places: dict[str, int] = {}  # session's id -> its engine's
        self._together = together
        self._lives: dict[str, Live] = {}
        self._sockets: dict[Socket, str] = {}  # session's id; "" before there is one
        self._of: dict[str, Socket] = {}
        self._lost: dict[str, float] = {}  # session's id -> when
        self._heard: dict[Socket, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tidying: asyncio.Task[None] | None = None
        self.ready, self.closing = False, False
        self.failure: Exception | None = None
        self.metrics.watch("sessions", "sessions there are", lambda: len(self._lives))
        self.metrics.watch("sessions_lost", "of these, without a socket", lambda: len(self._lost))
        self.metrics.watch("sockets", "sockets there are", lambda: len(self._sockets))
        self.metrics.watch("ready", "whether all programs are compiled", lambda: float(self.ready))

    # ---- its own life

    def start(self, warmed: Callable[[], None] = lambda: None, log: Callable[[str], None] = logging.info) -> None:
        """Begins on the running loop: compiles, then takes sessions.

        Args:
          warmed: is called on the loop when everything is compiled, or has failed (`failure`).
          log: is told how far that is, from the devices' threads.
        """
        self._loop = asyncio.get_running_loop()
        self._tidying = self._loop.create_task(self._tidy())
        left, lock = len(self._engines), threading.Lock()

        def compile_all(model: Served) -> None:
            nonlocal left
            try:
                warm(model, self._together, log)
            except Exception as error:
                self.failure = error
            with lock:
                left -= 1
                last = not left
            if last or self.failure is not None:
                self.ready = self.failure is None
                self._call(warmed)

        for engine, model in zip(self._engines, self._models, strict=True):
            engine.start(partial(compile_all, model))

    def working(self) -> bool:
        """Whether the thread of a device is at work."""
        return any(engine.alive() for engine in self._engines)

    async def stop(self, seconds: float = 2.0) -> None:
        """Tells every client, and ends; at most so many seconds for slow clients, and half of it for the device."""
        self.closing = True
        for live in [*self._lives.values()]:
            self.end(live, GOODBYE)
        for socket in [*self._sockets]:
            socket.put(GOODBYE)
        until = time.monotonic() + seconds
        while self._sockets and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self._tidying is not None:
            self._tidying.cancel()
        if self._loop is not None:
            ends = [self._loop.run_in_executor(None, engine.stop, seconds / 2) for engine in self._engines]
            await asyncio.gather(*ends)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """On the loop, from any thread; nothing when that has ended."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logging.info("serving: the loop has ended")

    async def _tidy(self) -> None:
        """Ends what has waited for too long."""
        limits = self.limits
        while True:
            await asyncio.sleep(min(1.0, limits.resume_seconds / 4, limits.idle_seconds / 4, limits.open_seconds / 4))
            try:
                self._tidy_once(time.monotonic())
            except Exception:
                logging.exception("serving: a fault while tidying")

    def _tidy_once(self, now: float) -> None:
        limits = self.limits
        for name in [n for n, since in self._lost.items() if now - since > limits.resume_seconds]:
            self.end(self._lives[name], Ended("idle"))
        for socket, heard in [*self._heard.items()]:
            name = self._sockets[socket]
            if name and now - heard > limits.idle_seconds:
                socket.put(Refused("timeout", f"nothing was heard for {limits.idle_seconds:g} s"))
                self.end(self._lives[name], Ended("idle"))
            elif not name and now - heard > limits.open_seconds:
                socket.put(Refused("timeout", f"no open within {limits.open_seconds:g} s"))
                socket.put(Ended("refused", 1008))

    # ---- sockets

    def full(self) -> bool:
        """Whether another socket finds no place; lost ones keep theirs, and one more may come for each."""
        waiting = sum(not name for name in self._sockets.values())
        return len(self._lives) + waiting >= self.limits.sessions + len(self._lost)

    def sessions(self) -> int:
        """How many there are, lost ones too."""
        return len(self._lives)

    def sockets(self) -> int:
        """How many there are."""
        return len(self._sockets)

    def session(self, name: str) -> Live | None:
        """A session by its id."""
        return self._lives.get(name)

    def is_lost(self, name: str) -> bool:
        """Whether a session waits for another socket."""
        return name in self._lost

    def joined(self, socket: Socket) -> None:
        """A socket is there."""
        self._sockets[socket], self._heard[socket] = "", time.monotonic()

    def heard(self, socket: Socket) -> None:
        """A message came."""
        self._heard[socket] = time.monotonic()

    def left(self, socket: Socket, *, for_good: bool) -> None:
        """A socket is gone; its session waits for another one, or ends."""
        name = self._sockets.pop(socket)
        del self._heard[socket]
        if self._of.get(name) is not socket:
            return
        del self._of[name]
        live = self._lives[name]
        if for_good or live.open_session is None:
            return self.end(live, Ended("client"))
        self.metrics.lost.inc()
        live.attached, self._lost[name] = False, time.monotonic()

    def live_of(self, socket: Socket) -> Live | None:
        """The session of a socket."""
        return self._lives.get(self._sockets[socket])

    # ---- sessions

    def open(self, socket: Socket, message: Open) -> None:
        """A new session; `Opened` follows.

        Raises:
          Refused: there is no place.
        """
        live = self.live_of(socket)  # one whose first `open` was refused may try again
        if live is None:
            if self.closing or not self.ready:
                raise Refused("shutdown", "this server is starting or ending: try again later", retryable=True)
            if len(self._lives) >= self.limits.sessions:
                socket.put(Refused("full", f"all {self.limits.sessions} places are taken", retryable=True))
                return socket.put(Ended("refused", 1013))
            taken = [*self._places.values()]
            place = min(range(len(self._engines)), key=taken.count)
            engine = self._engines[place]
            live = Live(self._models[place], self.limits, self.deliver, engine.wake)
            self._lives[live.id], self._places[live.id] = live, place
            self._attach(socket, live)
            engine.add(live)
        live.post(message)

    def reopen(self, socket: Socket, message: Reopen) -> None:
        """Back to a session, from another socket.

        Raises:
          Refused: there is none of that name.
        """
        live = self._lives.get(message.session)
        if live is None or live.open_session is None:
            raise Refused("unknown_id", "session: there is none of this name, or it waited for too long; open another")
        if self._sockets[socket]:
            raise Refused("already_open", "this socket has a session: use another one")
        if (old := self._of.get(live.id)) is not None:
            self._sockets[old] = ""
            old.put(Ended("moved"))
        self._lost.pop(live.id, None)
        self._attach(socket, live)
        if message.after >= 0:
            live.ack(min(message.after, live.sent))
        socket.put(Opened(resumed=True))
        for block in live.kept:
            socket.put(block)
        live.attached = True
        live.wake()

    def _attach(self, socket: Socket, live: Live) -> None:
        self._sockets[socket], self._of[live.id] = live.id, socket

    def end(self, live: Live, item: Ended) -> None:
        """Ends a session; its client is told, if there is one."""
        if self._lives.pop(live.id, None) is None:
            return
        self.metrics.ended.labels(item.reason).inc()
        self._lost.pop(live.id, None)
        live.kept.clear()
        self._engines[self._places.pop(live.id)].remove(live)
        if (socket := self._of.pop(live.id, None)) is not None:
            self._sockets[socket] = ""
            socket.put(item)

    def deliver(self, live: Live, item: Item) -> None:
        """What comes out of a stream, from the device's thread."""
        self._call(self._deliver, live, item)

    def _deliver(self, live: Live, item: Item) -> None:
        if live.id not in self._lives:
            return
        if isinstance(item, Ended):
            return self.end(live, item)
        if isinstance(item, Opened):
            self.metrics.opened.inc()
        if isinstance(item, Block):
            live.kept.append(item)
        if (socket := self._of.get(live.id)) is not None:
            socket.put(item)
