"""A bucket of Google Cloud Storage on this machine: as much of the JSON API as gcsfs, tensorstore and Orbax ask for.

Objects live in memory. Uploads (simple, multipart, resumable), byte ranges, generation preconditions, pages of lists,
copies and batches of deletes follow https://cloud.google.com/storage/docs/json_api.
"""

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
PAGE = 5  # smaller than what the tests keep, so that lists come in several pages
TIME = "2026-01-01T00:00:00.000Z"
_PATH = re.compile(
    r"(?:/(upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?(?:/(\w+)(?:/b/[^/]+)?/o/([^/]+))?)?"
)
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Blob:
    """One object: its bytes, and the number that every write changes."""

    data: bytes
    generation: int


class Bucket:
    """What the server keeps; tests look at it and spoil it.

    Attributes:
      objects: by name.
      requests: (method, object name or "") of all requests.
      written: called with the name of every object that is there now, before the writer is told so.
      forbidden: methods that are answered with 403 (a batch counts as the DELETEs in it).
    """

    def __init__(self) -> None:
        self.objects: dict[str, Blob] = {}
        self.requests: list[tuple[str, str]] = []
        self.forbidden: set[str] = set()
        self.written: Callable[[str], None] = lambda name: None
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.lock = threading.RLock()
        self.numbers = itertools.count(1_700_000_000_000_001)

    def names(self, prefix: str = "") -> list[str]:
        """Names of objects, sorted."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name: str, data: bytes) -> Blob:
        """Writes an object."""
        with self.lock:
            self.objects[name] = Blob(bytes(data), next(self.numbers))
            self.written(name)
            return self.objects[name]


def _resource(name: str, blob: Blob) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "bucket": BUCKET,
        "name": name,
        "size": str(len(blob.data)),
        "generation": str(blob.generation),
        "metageneration": "1",
        "md5Hash": base64.b64encode(hashlib.md5(blob.data).digest()).decode(),
        "etag": str(blob.generation),
        "timeCreated": TIME,
        "updated": TIME,
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two of them wait 40 ms for each other
    disable_nagle_algorithm = True
    bucket: Bucket

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"code": status, "message": message}})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _serve(self) -> None:
        body, url = self._body(), urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        found = _PATH.fullmatch(url.path)
        with self.bucket.lock:
            name = unquote(found[3] or query.get("name", "")) if found else ""
            self.bucket.requests.append((self.command, name))
            batch = url.path.startswith("/batch/")
            if ("DELETE" if batch else self.command) in self.bucket.forbidden:
                return self._fail(403, f"you may not {self.command}")
            if batch:
                return self._batch(body)
            if found is None or unquote(found[2]) != BUCKET:
                return self._fail(404, f"no such bucket or method: {self.command} {url.path}")
            if found[1] == "upload":
                return self._upload(name, query, body)
            if found[4]:
                return self._copy(name, found[4], unquote(found[5]))
            if "/o" not in url.path.removeprefix(f"/storage/v1/b/{found[2]}"):
                return self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "location": "US"})
            return self._object(name, query) if found[3] else self._list(query)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _refused(self, name: str, query: dict[str, str]) -> bool:
        """Whether a precondition fails; then it is answered."""
        there = self.bucket.objects.get(name)
        generation = there.generation if there else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            self._fail(412, "conditionNotMet")
        elif "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            self._answer(304)
        else:
            return False
        return True

    def _object(self, name: str, query: dict[str, str]) -> None:
        there = self.bucket.objects.get(name)
        if there is None:
            return self._fail(404, f"No such object: {name}")
        if self._refused(name, query):
            return None
        if self.command == "DELETE":
            del self.bucket.objects[name]
            return self._answer(204)
        if query.get("alt") != "media":
            return self._answer(200, _resource(name, there))
        size, first, last, status = len(there.data), 0, len(there.data) - 1, 200
        extra = {"x_goog_generation": str(there.generation), "Content_Type": "application/octet-stream"}
        if wanted := _RANGE.fullmatch(self.headers.get("Range", "")):
            first = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
            last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
            if first >= size:
                return self._fail(416, "range not satisfiable")
            status, extra["Content_Range"] = 206, f"bytes {first}-{last}/{size}"
        return self._answer(status, there.data[first : last + 1], **extra)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start = max(query.get("startOffset", ""), query.get("pageToken", ""))
        entries: dict[str, Blob | None] = {}
        for name in self.bucket.names(prefix):
            end = name.find(delimiter, len(prefix)) if delimiter else -1
            shown = name[: end + len(delimiter)] if end >= 0 else name
            if shown >= start and name < query.get("endOffset", "\U0010ffff"):
                entries[shown] = self.bucket.objects[name] if end < 0 else None
        names, limit = list(entries), min(int(query.get("maxResults", PAGE)), PAGE)
        answer: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [_resource(name, blob) for name in names[:limit] if (blob := entries[name])],
            "prefixes": [name for name in names[:limit] if entries[name] is None],
        }
        if names[limit:]:
            answer["nextPageToken"] = names[limit]
        self._answer(200, answer)

    def _upload(self, name: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType", "")
        if "upload_id" in query:
            return self._resume(query["upload_id"], body)
        if kind == "resumable":
            name, number = name or json.loads(body)["name"], str(next(self.bucket.numbers))
            self.bucket.uploads[number] = (name, query, bytearray())
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?upload_id={number}"
            return self._answer(200, Location=place)
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            parts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + boundary)[1:3]]
            meta, body = json.loads(parts[0]), re.sub(rb"\r?\n\Z", b"", parts[1])
            name = name or meta["name"]
        if not self._refused(name, query):
            self._answer(200, _resource(name, self.bucket.put(name, body)))

    def _resume(self, number: str, body: bytes) -> None:
        name, query, data = self.bucket.uploads[number]
        data += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(data) - 1}")
        if not self._refused(name, query):
            self._answer(200, _resource(name, self.bucket.put(name, data)))

    def _copy(self, name: str, how: str, target: str) -> None:
        if name not in self.bucket.objects:
            return self._fail(404, f"No such object: {name}")
        made = _resource(target, self.bucket.put(target, self.bucket.objects[name].data))
        if how == "moveTo":
            del self.bucket.objects[name]
        self._answer(200, {"done": True, "resource": made} if how == "rewriteTo" else made)

    def _batch(self, body: bytes) -> None:
        lines = []
        for name in map(unquote, re.findall(r"DELETE \S*/o/([^\s?]+)", body.decode())):
            status = "204 No Content" if self.bucket.objects.pop(name, None) else "404 Not Found"
            lines.append(f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        data = "".join([*lines, "--part--\r\n"]).encode()
        self._answer(200, data, Content_Type="multipart/mixed; boundary=part")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on requests that they no longer need."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """A bucket, gs://bucket, and the environment in which Google's clients find it."""
    bucket = Bucket()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield (
            bucket,
            {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask a gRPC service which kind of bucket it is
            },
        )
    finally:
        server.shutdown()
        server.server_close()
