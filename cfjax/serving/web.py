"""uvicorn around the application: a socket that is bound first, signals that end streams in order."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from cfjax.core.errors import UserError
from cfjax.core.paths import one_line
from cfjax.serving.host import Host

CONNECTIONS = 256  # of any kind
LINGER = 5.0  # seconds that a closed socket may take to be read to its end


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: a free one.

    Raises:
      UserError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--config.host={host}: {one_line(error)}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(CONNECTIONS)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise UserError(
            f"--config.host={host} --config.port={port}: {error.strerror}; another port, or 0 for a free one"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The page's address."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class Upgraded(WebSocketsSansIOProtocol):
    """A WebSocket whose last bytes are not kept for ever for a client that does not read them."""

    async def run_asgi(self) -> None:
        """As uvicorn has it, and then a bound on closing."""
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(LINGER, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn's server: a signal ends streams by `closed`, and then the process by 0.

    Args:
      begun: is called once it answers, and signals end it in order.
    """

    def __init__(self, app: Starlette, host: Host, begun: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                ws=Upgraded,
                ws_max_size=host.limits.open_bytes,
                ws_per_message_deflate=False,  # pictures are compressed already
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=1,
            )
        )
        self._streams, self._begun = host, begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn has it, and then the caller's word."""
        await super().startup(sockets)
        self._begun()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Clients are told first."""
        await self._streams.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, and are not raised again: one that was asked to end has not failed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)


def run(server: Server, bound: socket.socket) -> None:
    """Serves until a signal."""
    asyncio.run(server.serve(sockets=[bound]))
