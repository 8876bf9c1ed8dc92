"""What hostile and unlucky clients do to a server, in any number: tests do a little of it, benchmarks/serving.py much.

Each returns what it saw, so that a caller can count.
"""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from cfjax.core.errors import Temporary
from cfjax.serving.client import Client

FAST = {"fps": 0, "format": "raw"}


def raw(url: str, **more: object) -> ClientConnection:
    """A socket without a protocol."""
    address = url.replace("http", "ws", 1) + "/v1/stream"
    return connect(address, compression=None, proxy=None, max_size=None, **more)  # type: ignore[arg-type]


def read_to_end(socket_: ClientConnection, seconds: float = 30.0) -> tuple[list[dict], int]:
    """(text messages, close code) of a socket that the server closes."""
    messages = []
    try:
        while True:
            got = socket_.recv(seconds)
            if isinstance(got, str):
                messages.append(json.loads(got))
    except ConnectionClosed as closed:
        return messages, closed.rcvd.code if closed.rcvd else 1006


def vanish(url: str, prompt: str, when: int) -> None:
    """Opens a stream and tears the socket: before `open`, behind it, in the first block, or behind a few blocks."""
    with Client(url) as client:
        if when % 4:
            client.send("open", version=1, prompt=prompt, **FAST)
        if when % 4 == 2:
            client.socket.recv(30)
        if when % 4 == 3:
            client.ready = client.event("ready")
            list(client.blocks(2))
        # No close frame and, for half of them, a reset in place of an end
        if when % 2:
            client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.socket.socket.shutdown(socket.SHUT_RDWR)


def vanish_often(url: str, prompt: str, count: int) -> Counter[str]:
    """So many clients that vanish; those that find no place try again."""
    seen = Counter[str]()
    for number in range(count):
        while True:
            try:
                vanish(url, prompt, number)
                seen["vanished"] += 1
                break
            except Temporary:  # full, until the lost ones' time is over
                seen["full"] += 1
                time.sleep(0.02)
    return seen


def flood(url: str, count: int) -> tuple[Counter[str], int]:
    """(error codes, close code) of a client that sends without end."""
    with raw(url) as one:
        try:
            for _ in range(count):
                one.send('{"type": "pause"}')
        except ConnectionClosed:
            pass
        messages, code = read_to_end(one)
    return Counter(m["code"] for m in messages if m["type"] == "error"), code


def fuzz(url: str, texts: Sequence[str]) -> Counter[str]:
    """Sends each text; counts answers by kind. Every text has an answer, or closes the socket."""
    seen, left = Counter[str](), list(texts)
    while left:
        with raw(url) as one:
            try:
                while left:
                    _answers(one, left.pop(0), seen)
            except ConnectionClosed as closed:
                seen[f"closed with {closed.rcvd.code if closed.rcvd else 1006}"] += 1
            else:
                one.send('{"type": "close"}')
                read_to_end(one)
    return seen


def _answers(one: ClientConnection, text: str, seen: Counter[str]) -> None:
    """Counts everything that comes up to the error of a message that is sent behind the text."""
    one.send(text)
    one.send('{"type": "no such type"}')
    while True:
        got = one.recv(30)
        if isinstance(got, bytes):
            continue
        assert "Traceback" not in got
        message = json.loads(got)
        if message["type"] == "block":
            one.send(json.dumps({"type": "ack", "block": message["index"]}))
        elif message["type"] == "error" and "no such type" in message["message"]:
            break
        elif message.get("code") == "too_many_messages":
            time.sleep(0.05)  # the second one may be among those that were not looked at
            one.send('{"type": "no such type"}')
        else:
            seen[f"{message['type']} {message.get('code', '')}".strip()] += 1
    seen["answered"] += 1


# name: (the socket's further arguments, what is sent) of what is refused at once
SINGLE: dict[str, tuple[dict[str, object], str | bytes]] = {
    "binary": ({}, b"\0\1\2"),
    "oversize": ({}, '{"type": "open", "version": 1, "prompt": "' + "x" * 6_000_000 + '"}'),
    "deep": ({}, "[" * 1_000_000),
    "deep objects": ({}, '{"type":' * 9_000 + "1" + "}" * 9_000),
    "wide": ({}, '{"type": "action", "keys": [' + ",".join(["{}"] * 500_000) + "]}"),
    "foreign": ({"additional_headers": {"Origin": "https://example.com"}}, ""),
    "no origin": ({"additional_headers": {"Origin": "null"}}, ""),
}


def attack(url: str, name: str) -> tuple[list[str], int]:
    """(error codes, close code or HTTP status) of one of `SINGLE`."""
    more, sent = SINGLE[name]
    try:
        with raw(url, **more) as one:
            one.send(sent)
            with suppress(ConnectionClosed):  # it may be over already
                one.send('{"type": "close"}')
            messages, code = read_to_end(one)
            return [m["code"] for m in messages if m["type"] == "error"], code
    except ConnectionClosed as closed:  # while it still sent
        return [], closed.rcvd.code if closed.rcvd else 1006
    except InvalidStatus as refused:
        return [], refused.response.status_code


@contextmanager
def witness(url: str, prompt: str, seed: int) -> Iterator[Callable[[], np.ndarray]]:
    """A client that streams all the while; the value gives its frames once it is over."""
    frames: list[np.ndarray] = []
    faults: list[BaseException] = []
    over = threading.Event()

    def stream() -> None:
        try:
            with Client(url) as client:
                client.open(prompt, seed=seed, **FAST)
                while not over.is_set():
                    frames.extend(block.frames_PHWC for block in client.blocks(1))
                client.close()
        except BaseException as fault:  # told by the value
            faults.append(fault)

    thread = threading.Thread(target=stream, name="witness")
    thread.start()

    def ended() -> np.ndarray:
        over.set()
        thread.join(60)
        if faults:
            raise faults[0]
        return np.concatenate(frames)

    try:
        yield ended
    finally:
        over.set()
        thread.join(60)
