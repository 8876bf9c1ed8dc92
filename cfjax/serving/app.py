"""The web application: the page and its files, what the server can do, counters, and the sockets of `/v1/stream`."""

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from absl import logging
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from cfjax.core.errors import UserError
from cfjax.serving.host import Host
from cfjax.serving.protocol import SCHEMA_FILE, SUBPROTOCOL, TOKEN_SUBPROTOCOL
from cfjax.serving.stream import Connection

PAGE = SCHEMA_FILE.parent
RETRY_SECONDS = 5
POLICY = "content-security-policy"
HEADERS = {
    POLICY: "default-src 'none'; script-src 'self'; worker-src 'self' blob:; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'SOCKETS; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    Attributes:
      token: needed for all but the page; "": none, and then only this machine's own names of it are served, as a page
        elsewhere could give a name of its own this machine's address.
      origins: of other hosts' pages that may use it, as "https://example.com".
    """

    token: str = ""
    origins: tuple[str, ...] = ()

    def knows(self, connection: HTTPConnection) -> bool:
        """Whether it has the token, or none is needed."""
        if not self.token:
            return True
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        candidates = [given.strip()] if scheme.lower() == "bearer" else []
        offered = connection.scope.get("subprotocols", ())
        candidates += [name.removeprefix(TOKEN_SUBPROTOCOL) for name in offered if name.startswith(TOKEN_SUBPROTOCOL)]
        return any([hmac.compare_digest(one.encode(), self.token.encode()) for one in candidates])

    def foreign(self, connection: HTTPConnection) -> str:
        """Why a request is not one of this server's page, or of a program; "" if it is."""
        host = connection.headers.get("host", "")
        if not self.token and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return f"Host {host!r} is not this machine: without a token use 127.0.0.1 or localhost"
        origin = connection.headers.get("origin")
        if origin is None or origin in self.origins:
            return ""
        there = urlsplit(origin)
        if there.scheme in ("http", "https") and there.netloc == host:
            return ""
        return f"Origin {origin!r} is another host's page: name it by --config.origins"


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(token: str, host: str) -> None:
    """Raises UserError for a token that is too easy or cannot be sent, or for an open server without one."""
    plain = token.isascii() and all(c.isalnum() or c in "-_.~" for c in token)
    if token and (len(token) < 16 or not plain):
        raise UserError(
            "--config.token: use 16 or more letters, digits, - and _; python -c 'import secrets; "
            "print(secrets.token_urlsafe())' makes one"
        )
    if not token and not is_loopback(host):
        raise UserError(f"--config.host={host}: others can reach this address; set --config.token too")


def headers(scope: Scope) -> dict[str, str]:
    """Of every answer. Not every browser takes 'self' for sockets too, so these are named."""
    host = HTTPConnection(scope).headers.get("host", "")
    sockets = f" ws://{host} wss://{host}" if re.fullmatch(r"[\w.:\[\]-]+", host) else ""
    return HEADERS | {POLICY: HEADERS[POLICY].replace("SOCKETS", sockets)}


class Guard:
    """Around the application: refuses foreign requests, and gives every answer its headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in headers(scope).items() if k.encode() not in own]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        if reason := self._access.foreign(HTTPConnection(scope)):
            return await PlainTextResponse(reason, 403)(scope, receive, send_with_headers)
        await self._app(scope, receive, send_with_headers)


def application(
    host: Host, access: Access, warmed: Callable[[], None] = lambda: None, log: Callable[[str], None] = logging.info
) -> Starlette:
    """The application of a server.

    Args:
      warmed, log: see `Host.start`.
    """
    pool = ThreadPoolExecutor(2, "pictures")

    @asynccontextmanager
    async def lifespan(app: Starlette):  # type: ignore[no-untyped-def]
        host.start(warmed, log)
        yield
        await host.stop()
        pool.shutdown(cancel_futures=True)

    def known(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            if access.knows(request):
                return answer(request)
            return PlainTextResponse("the token is missing or wrong", 401, {"www-authenticate": "Bearer"})

        return checked

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def healthz(request: Request) -> Response:
        state = "ready" if host.ready and not host.closing else "closing" if host.closing else "compiling"
        waiting = {} if state == "ready" else {"retry-after": str(RETRY_SECONDS)}
        return JSONResponse({"status": state}, 200 if state == "ready" else 503, waiting)

    def model(request: Request) -> Response:
        return JSONResponse(host.served.capabilities(host.limits))

    def metrics(request: Request) -> Response:
        return Response(host.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def stream(socket: WebSocket) -> None:
        if (denied := _denial(socket, host, access)) is not None:
            host.metrics.refused.labels(str(denied.status_code)).inc()
            return await socket.send_denial_response(denied)
        offered = socket.scope.get("subprotocols", ())
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        await Connection(socket, host, pool).run()

    routes: Sequence[Route | Mount | WebSocketRoute] = [
        Route("/", page),
        Route("/healthz", healthz),
        Route("/metrics", known(metrics)),
        Route("/api/model", known(model)),
        WebSocketRoute("/v1/stream", stream),
        Mount("/assets", StaticFiles(directory=PAGE)),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.add_middleware(Guard, access=access)
    return app


def _denial(socket: WebSocket, host: Host, access: Access) -> Response | None:
    """Why a socket is refused before its upgrade; None if it is not."""
    if reason := access.foreign(socket):
        return PlainTextResponse(reason, 403)
    if not access.knows(socket):
        return PlainTextResponse("the token is missing or wrong", 401)
    if host.closing or not host.ready:
        return PlainTextResponse("starting or ending", 503, {"retry-after": str(RETRY_SECONDS)})
    if host.full():
        return PlainTextResponse("all places are taken", 503, {"retry-after": str(RETRY_SECONDS)})
    return None
