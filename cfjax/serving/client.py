"""The protocol from Python: opens a stream, takes its blocks, changes it while it runs.

with Client("ws://127.0.0.1:8000") as client:
    client.open("a red circle moving left", format="png")
    for block in client.blocks(8):
        print(block.index, block.frames_PHWC.shape)
"""

import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from cfjax.core.errors import Temporary, UserError
from cfjax.core.paths import one_line
from cfjax.serving.pictures import decode_frame
from cfjax.serving.protocol import SUBPROTOCOL, TOKEN_SUBPROTOCOL, VERSION, unpack_frame

SECONDS = 60.0  # that a server may be silent


@dataclass(frozen=True)
class Received:
    """A block: its message and its frames, uint8."""

    message: dict[str, Any]
    frames_PHWC: np.ndarray

    @property
    def index(self) -> int:
        """Its number in the stream."""
        return self.message["index"]


class Client:
    """One socket. Raises Temporary where the server has no place or cannot be reached, UserError where it refuses."""

    def __init__(self, url: str, token: str = "", seconds: float = SECONDS) -> None:
        address = re.sub("^http", "ws", url.rstrip("/").removesuffix("/v1/stream")) + "/v1/stream"
        offered = [Subprotocol(SUBPROTOCOL), *([Subprotocol(TOKEN_SUBPROTOCOL + token)] if token else [])]
        self._around = ExitStack()
        try:
            opening = connect(address, subprotocols=offered, open_timeout=seconds, max_size=None, compression=None)
            self.socket = self._around.enter_context(opening)
        except InvalidStatus as error:
            status, said = error.response.status_code, (error.response.body or b"").decode(errors="replace")
            raise (Temporary if status == 503 else UserError)(f"{url}: {status}, {said}") from error
        except (OSError, InvalidHandshake) as error:
            raise Temporary(f"{url}: cannot be reached ({one_line(error)})") from error
        except ValueError as error:
            raise UserError(f"{url}: {one_line(error)}; an address is ws://HOST:PORT") from error
        self._seconds, self._events = seconds, deque[dict[str, Any]]()
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self._around.close()

    def send(self, kind: str, **keys: Any) -> None:
        """Any message."""
        self.socket.send(json.dumps({"type": kind, **keys}))

    def ack(self, block: int) -> None:
        """This block and all before it have arrived; nothing if the server has ended the stream meanwhile."""
        with suppress(ConnectionClosed):
            self.send("ack", block=block)

    def open(self, prompt: str, **keys: Any) -> dict[str, Any]:
        """Begins a stream: what `ready` says. Raises UserError for what the server refuses."""
        return self._begin("open", prompt=prompt, **keys)

    def reopen(self, session: str, after: int = -1) -> dict[str, Any]:
        """Back to a stream whose socket was lost."""
        return self._begin("reopen", session=session, after=after)

    def _begin(self, kind: str, **keys: Any) -> dict[str, Any]:
        self.send(kind, version=VERSION, **keys)
        self.ready = self.event("ready")
        return self.ready

    def receive(self) -> dict[str, Any] | Received:
        """The next message, or block.

        Raises:
          Temporary: the server says nothing, or the socket is gone.
        """
        try:
            message = json.loads(self.socket.recv(self._seconds))
            if message["type"] != "block":
                return message
            size = (self.ready["height"], self.ready["width"])
            frames = [unpack_frame(self.socket.recv(self._seconds, decode=False)) for _ in range(message["frames"])]
        except TimeoutError:
            raise Temporary(f"the server said nothing for {self._seconds:g} s") from None
        except ConnectionClosed as error:
            raise Temporary(f"the connection is closed ({one_line(error)})") from error
        return Received(message, np.stack([decode_frame(data, message["format"], *size) for *_, data in frames]))

    def event(self, *kinds: str) -> dict[str, Any]:
        """The next message of one of these types; blocks before it are acknowledged and dropped.

        Raises:
          UserError: an error message came first, or the end.
        """
        while True:
            got = self._events.popleft() if self._events else self.receive()
            if isinstance(got, Received):
                self.ack(got.index)
            elif got["type"] in kinds:
                return got
            else:
                _raise_if_over(got)

    def blocks(self, count: int) -> Iterator[Received]:
        """The next blocks, each acknowledged when the next one is asked for; other messages wait for `event`.

        Raises:
          UserError: an error message, or the end of the stream.
        """
        for _ in range(count):
            while not isinstance(got := self.receive(), Received):
                _raise_if_over(got)
                self._events.append(got)
            yield got
            self.ack(got.index)

    def close(self) -> None:
        """Ends the stream."""
        self.send("close")
        self.event("closed")


def _raise_if_over(message: dict[str, Any]) -> None:
    if message["type"] in ("error", "closed"):
        raise UserError(message.get("message") or f"the server ended the stream: {message['reason']}")
