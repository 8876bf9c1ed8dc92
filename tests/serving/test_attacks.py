"""Hostile and unlucky clients: each gets an error or a close code, other streams stay as they are, memory returns."""

import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from websockets.exceptions import InvalidStatus

from cfjax.core.errors import UserError
from cfjax.serving.app import Access, check_token, is_loopback
from cfjax.serving.client import Client
from tests.serving.attacks import attack, flood, fuzz, raw, vanish_often, witness
from tests.serving.fuzz import messages
from tests.serving.running import PROMPTS, QUICK, Running, running, tiny_served, until
from tests.serving.test_server import alone, frames_of, get

TOKEN = "a-token-for-tests-0123456789"


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """Lost sockets' sessions end at once, so that their places are free."""
    limits = replace(QUICK, resume_seconds=0.1, sessions=6)
    with running(tiny_served(limits), limits) as found:
        yield found


def device_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_abrupt_disconnects_leave_nothing_behind(hasty):
    vanish_often(hasty.url, PROMPTS[0], 8)  # what is made once is made
    until(lambda: not hasty.host.sessions() and not hasty.host.sockets())
    tracemalloc.start()
    before, traced = device_bytes(), tracemalloc.get_traced_memory()[0]
    with witness(hasty.url, PROMPTS[0], 21) as ended:
        seen = vanish_often(hasty.url, PROMPTS[1], 200)
        frames = ended()
    until(lambda: not hasty.host.sessions() and not hasty.host.sockets())
    until(lambda: device_bytes() <= before)
    grown = tracemalloc.get_traced_memory()[0] - traced - frames.nbytes
    tracemalloc.stop()
    print(f"{seen}, {len(frames)} frames beside them, host memory {grown:+,} bytes")
    assert seen["vanished"] == 200 and grown < 2_000_000
    np.testing.assert_array_equal(frames, frames_of(alone(21), len(frames) // 2))


def test_a_flood_is_refused_and_then_cut(hasty):
    with witness(hasty.url, PROMPTS[0], 22) as ended:
        errors, code = flood(hasty.url, 3000)
        frames = ended()
    assert code == 1008 and errors["too_many_messages"] >= 1
    assert sum(errors.values()) < 300  # and not an answer to each
    np.testing.assert_array_equal(frames, frames_of(alone(22), len(frames) // 2))


@pytest.mark.parametrize(
    ("name", "errors", "code"),
    [
        ("binary", ["invalid_message"], 1003),
        ("oversize", [], 1009),  # or a reset: bytes are on their way that nobody reads any more
        ("deep", ["invalid_message"], 1000),
        ("deep objects", ["invalid_message"], 1000),
        ("wide", ["invalid_message"], 1000),
        ("foreign", [], 403),
        ("no origin", [], 403),
    ],
)
def test_what_is_no_message_is_refused(hasty, name, errors, code):
    found = attack(hasty.url, name)
    assert found == (errors, code) or (name, found) == ("oversize", ([], 1006))


def test_fuzzed_messages_are_answered(hasty):
    """As many as CI has time for; benchmarks/serving.py sends 5,000."""
    texts: list[str] = []

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(messages())
    def collect(text):
        texts.append(text)

    collect()
    with witness(hasty.url, PROMPTS[0], 23) as ended:
        seen = fuzz(hasty.url, texts)
        frames = ended()
    print(f"{len(texts)} messages: {dict(seen)}")
    assert seen["answered"] + sum(n for kind, n in seen.items() if kind.startswith("closed with")) == len(texts)
    assert seen["error invalid_message"] > 50 and not seen["error internal"] and not seen["closed with 1011"]
    np.testing.assert_array_equal(frames, frames_of(alone(23), len(frames) // 2))


# ---- who may


def test_a_token_is_needed_where_there_is_one():
    access = Access(TOKEN, ("https://example.com",))
    with running(access=access) as own:
        assert get(f"{own.url}/")[0] == get(f"{own.url}/healthz")[0] == get(f"{own.url}/assets/protocol.json")[0] == 200
        for path in ("/api/model", "/metrics"):
            assert get(own.url + path)[0] == 401
            assert get(own.url + path, Authorization="Bearer wrong")[0] == 401
            assert get(own.url + path, Authorization=f"Bearer {TOKEN}")[0] == 200
        for token in ("", "wrong", TOKEN[:-1]):
            with pytest.raises(UserError, match="401, the token is missing or wrong"):
                Client(own.url, token)
        with pytest.raises(UserError, match="401"):
            Client(f"{own.url}/v1/stream?token={TOKEN}")  # addresses end up in logs
        with Client(own.url, TOKEN) as client:
            assert client.socket.subprotocol == "cfjax.v1"
            client.open(PROMPTS[0])
        headers = {"Authorization": f"Bearer {TOKEN}", "Origin": "https://example.com"}
        with raw(own.url, additional_headers=headers) as one:
            one.send('{"type": "close"}')
        with pytest.raises(InvalidStatus, match="403"):
            raw(own.url, additional_headers={**headers, "Origin": "https://example.org"})


def test_another_hosts_page_and_another_name_are_refused(server):
    """The second: a page that gave a name of its own this machine's address."""
    own = {"Origin": server.url}
    with raw(server.url, additional_headers=own) as one:
        one.send('{"type": "close"}')
    port = server.url.rpartition(":")[2]
    for origin, name in (("http://evil.example", ""), (f"http://evil.example:{port}", f"evil.example:{port}")):
        for path in ("/", "/api/model", "/healthz"):
            status, headers, _ = get(server.url + path, Origin=origin, **({"Host": name} if name else {}))
            assert status == 403 and "content-security-policy" in headers
    assert get(f"{server.url}/api/model", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    ("token", "host", "told"),
    [
        ("", "0.0.0.0", "others can reach this address; set --config.token"),
        ("", "192.168.1.2", "set --config.token"),
        ("short", "127.0.0.1", "use 16 or more letters"),
        ("sixteen letters and spaces", "0.0.0.0", "use 16 or more letters"),
        (TOKEN, "0.0.0.0", None),
        ("", "127.0.0.1", None),
        ("", "::1", None),
    ],
)
def test_an_open_address_needs_a_token(token, host, told):
    if told is None:
        return check_token(token, host)
    with pytest.raises(UserError, match=told):
        check_token(token, host)


def test_names_of_this_machine():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost", "a.localhost")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "example.com", "localhost.example.com", "10.0.0.1", "::")))
