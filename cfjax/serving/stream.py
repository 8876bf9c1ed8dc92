"""One socket of `/v1/stream`: reads messages, sends what comes out, ends it when it breaks the rules."""

import asyncio
import time
from collections import deque
from concurrent.futures import Executor

from absl import logging
from starlette.websockets import WebSocket, WebSocketDisconnect

from cfjax.serving.engine import FAULT
from cfjax.serving.host import Host
from cfjax.serving.items import Block, Ended, Item, Opened, text_of
from cfjax.serving.protocol import (
    NAMES,
    VERSION,
    Ack,
    Close,
    Message,
    Open,
    Refused,
    Reopen,
    message_text,
    parse_message,
)

PENDING = 64  # texts on their way to a client; with more, nothing is read from it
FAULTS = 200  # messages in a row beyond the limit; then the socket is closed
GRACE = 3.0  # seconds to take the last message


class Bucket:
    """So many messages a second, and as many at once."""

    def __init__(self, rate: float) -> None:
        self._rate = self._left = rate
        self._then = time.monotonic()

    def give(self) -> None:
        """One message more, such as the `ack` of a block."""
        self._left = min(self._left + 1, 2 * self._rate)

    def take(self) -> bool:
        """Whether one more is within the limit."""
        now = time.monotonic()
        self._left = max(self._left, min(self._rate, self._left + (now - self._then) * self._rate))
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Connection:
    """See the module."""

    def __init__(self, socket: WebSocket, host: Host, pool: Executor) -> None:
        self._socket, self._host, self._pool = socket, host, pool
        self._outbox: deque[Item] = deque()
        self._filled, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._bucket, self._faults = Bucket(host.limits.messages_per_second), 0
        self._ending = False
        self._code = 1006
        self._sender: asyncio.Task[None]

    def put(self, item: Item) -> None:
        """Sends it after all before it; the end goes before everything that has not left."""
        if self._ending:
            return
        if isinstance(item, Ended):
            self._ending = True
            if item.reason != "end":
                kept = [one for one in self._outbox if isinstance(one, Refused)]
                self._outbox.clear()
                self._outbox.extend(kept[-1:])
                asyncio.get_running_loop().call_later(GRACE, self._sender.cancel)
        if isinstance(item, Refused):
            self._host.metrics.errors.labels(item.code).inc()
        self._outbox.append(item)
        self._filled.set()
        if len(self._outbox) >= PENDING:
            self._room.clear()

    async def run(self) -> None:
        """Until one side ends it."""
        self._host.joined(self)
        receiver = asyncio.create_task(self._receive())
        self._sender = sender = asyncio.create_task(self._send())
        try:
            await asyncio.wait({receiver, sender}, return_when=asyncio.FIRST_COMPLETED)
            if receiver.done() and not receiver.cancelled() and (fault := receiver.exception()) is not None:
                logging.error("serving: a message failed", exc_info=fault)
                self.put(Refused("internal", FAULT))
                self._end(Ended("internal", 1011))
            if self._ending:  # the last words; `put` has set them a limit
                await asyncio.wait({sender})
        finally:
            for task in (receiver, sender):
                task.cancel()
            _, lost = await asyncio.gather(receiver, sender, return_exceptions=True)
            self._host.left(self, for_good=self._code == 1000)
        # A socket that is gone or closed already is no fault.
        if isinstance(lost, Exception) and not isinstance(lost, WebSocketDisconnect | RuntimeError):
            raise lost

    # ---- out

    async def _send(self) -> None:
        while True:
            await self._filled.wait()
            item = self._outbox.popleft()
            if not self._outbox:
                self._filled.clear()
            if len(self._outbox) < PENDING:
                self._room.set()
            if isinstance(item, Ended):
                await self._socket.send_text(message_text("closed", reason=item.reason))
                return await self._socket.close(item.code)
            if isinstance(item, Block):
                await self._send_block(item)
            elif isinstance(item, Opened):
                await self._send_ready(item)
            else:
                await self._socket.send_text(text_of(item))

    async def _send_block(self, block: Block) -> None:
        pictures = await asyncio.get_running_loop().run_in_executor(self._pool, block.encode)
        text = block.text()
        lag = None if block.changed is None else time.perf_counter() - block.changed
        self._bucket.give()
        await self._socket.send_text(text)
        for picture in pictures:
            await self._socket.send_bytes(picture)
        if (live := self._host.live_of(self)) is not None:
            live.sent = max(live.sent, block.index)
        self._host.metrics.sent(block, sum(map(len, pictures)), lag)

    async def _send_ready(self, opened: Opened) -> None:
        live, host = self._host.live_of(self), self._host
        if live is None or live.open_session is None:
            return  # it has ended meanwhile
        served, limits = host.served, host.limits
        next_block = live.kept[0].index if live.kept else live.next_block
        await self._socket.send_text(
            message_text(
                "ready",
                version=VERSION,
                session=live.id,
                width=served.width,
                height=served.height,
                frames_per_block=served.frames_per_block,
                sampler=served.samplers[0],
                next_block=next_block,
                queue=limits.queue,
                resume_seconds=limits.resume_seconds,
                resumed=opened.resumed,
                **live.settings(),
            )
        )

    # ---- in

    async def _receive(self) -> None:
        limits = self._host.limits
        while not self._ending:
            await self._room.wait()
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                self._code = received.get("code", 1006)
                return
            text = received.get("text")
            if text is None:
                return self._refuse("clients send text messages alone, no binary ones", 1003)
            live = self._host.live_of(self)
            if len(text.encode()) > (limits.open_bytes if live is None else limits.message_bytes):
                return self._refuse(f"a message has at most {limits.message_bytes} bytes", 1009)
            self._host.heard(self)
            if not self._within_rate():
                continue
            try:
                message = parse_message(text, limits.message_bytes)
                self._host.metrics.messages.labels(NAMES[type(message)]).inc()
                self._take(message)
            except Refused as refused:
                self.put(refused)

    def _within_rate(self) -> bool:
        if self._bucket.take():
            self._faults = 0
            return True
        self._faults += 1
        limit = self._host.limits.messages_per_second
        if self._faults == 1:
            line = f"more than {limit:g} messages a second: what is beyond is not carried out"
            self.put(Refused("too_many_messages", line, retryable=True))
        if self._faults > FAULTS:
            self._end(Ended("refused", 1008))
        return False

    def _refuse(self, line: str, code: int) -> None:
        self.put(Refused("invalid_message", line))
        self._end(Ended("refused", code))

    def _end(self, item: Ended) -> None:
        """Ends the session, if there is one, and the socket."""
        if (live := self._host.live_of(self)) is not None:
            self._host.end(live, item)
        self.put(item)

    def _take(self, message: Message) -> None:
        host, live = self._host, self._host.live_of(self)
        if isinstance(message, Close):
            return self._end(Ended("client"))
        if isinstance(message, Open):
            return host.open(self, message)
        if isinstance(message, Reopen):
            return host.reopen(self, message)
        if live is None:
            raise Refused("not_open", "the first message is open or reopen")
        if isinstance(message, Ack):
            return live.ack(message.block)
        live.post(message)
