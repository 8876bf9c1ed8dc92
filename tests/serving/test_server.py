"""A server over real sockets: each message, back-pressure, lost sockets, faults of one stream, the end."""

import base64
import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from websockets.exceptions import InvalidStatus

from cfjax.core.errors import Temporary, UserError
from cfjax.evaluation.video import to_uint8
from cfjax.rollout.batched import groups, step_together
from cfjax.rollout.session import Session
from cfjax.serving.client import Client, Received
from cfjax.serving.engine import Together, one_by_one
from cfjax.serving.items import Block
from cfjax.serving.pictures import encode_frame
from cfjax.serving.protocol import Open, schema, validator
from cfjax.serving.served import Limits
from tests.compiled import compiled
from tests.serving.attacks import raw
from tests.serving.running import PROMPTS, QUICK, Running, running, tiny_copies, tiny_served, until

FAST = {"fps": 0, "format": "raw"}
SERVER = Draft202012Validator({"$ref": "#/$defs/server", "$defs": schema()["$defs"]})


def alone(seed: int = 0, prompt: str = PROMPTS[0]) -> Session:
    """The session that a server opens."""
    return tiny_served().open(Open(1, prompt, seed=seed))


def frames_of(session: Session, blocks: int) -> np.ndarray:
    return np.concatenate([to_uint8(session.next().video_BPHWC)[0] for _ in range(blocks)])


def frames(blocks: list[Received]) -> np.ndarray:
    return np.concatenate([block.frames_PHWC for block in blocks])


def get(address: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a GET."""
    request = urllib.request.Request(address, headers={name.replace("_", "-"): v for name, v in headers.items()})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.fixture
def client(server: Running):
    with Client(server.url) as found:
        yield found


def settle(client: Client, count: int = 3) -> list[Received]:
    """The blocks that are made without an `ack`: then the stream waits."""
    blocks = []
    while len(blocks) < count:
        got = client.receive()
        assert isinstance(got, Received)
        blocks.append(got)
    return blocks


# ---- what is there


def test_what_a_server_says_of_itself(server):
    status, headers, body = get(f"{server.url}/")
    assert status == 200 and b"<html" in body and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and server.url.replace("http", "ws") in policy
    status, _, body = get(f"{server.url}/assets/protocol.json")
    assert status == 200 and json.loads(body) == schema()
    assert get(f"{server.url}/assets/../index.html")[0] == get(f"{server.url}/assets/%2e%2e/report.js")[0] == 404
    assert get(f"{server.url}/healthz")[0::2] == (200, b'{"status":"ready"}')
    status, _, body = get(f"{server.url}/api/model")
    model = json.loads(body)
    validator("model").validate(model)
    assert (model["width"], model["height"], model["frames_per_block"], model["fps"]) == (16, 16, 2, 8.0)
    assert "red" in model["prompts"]["vocabulary"]["colours"] and model["actions"] == [] and model["image"]
    assert [one["name"] for one in model["memory"]] == ["infinity_rope(window=4)"]


def test_metrics_count_what_was_sent(server, client):
    def number(name: str) -> float:
        lines = get(f"{server.url}/metrics")[2].decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    before = number("cfjax_blocks_total")
    client.open(PROMPTS[0], **FAST)
    for _ in client.blocks(4):
        pass
    assert number("cfjax_blocks_total") >= before + 4 and number("cfjax_sessions") >= 1
    client.close()


def test_nothing_is_compiled_once_a_server_is_ready(server, client):
    """Prompts in all modes, blends, snapshots, forks, seeks, a picture: all these programs are there."""
    with compiled() as programs:
        picture = base64.b64encode(encode_frame(np.full((20, 30, 3), 99, np.uint8), "jpeg")).decode()
        client.open(PROMPTS[1], image=picture, seed=5, **FAST)
        list(client.blocks(4))
        for mode in ("recache", "keep", "cut"):
            client.send("prompt", prompt=PROMPTS[0], mode=mode, blend_blocks=2)
            list(client.blocks(4))
            client.send("prompt", prompts=[{"text": text, "weight": 1} for text in PROMPTS], mode=mode, blend="slerp")
            list(client.blocks(2))
        client.send("snapshot")
        client.send("fork", id=client.event("snapshot")["id"], seed=7)
        last = list(client.blocks(4))[-1]
        client.send("seek", block=last.index)
        list(client.blocks(6))
        client.close()
        assert not programs
        jax.jit(lambda x: x * 1.2345678)(1.0)
        assert programs  # it would have been seen


def test_every_device_has_its_streams():
    """Each goes to the device with the fewest, stays there, and makes the same bits; nothing is compiled for it."""
    limits, devices = replace(QUICK, sessions=3), jax.devices()[:2]
    served, *copies = tiny_copies(devices, limits)
    with running(served, limits, copies=copies) as own, ExitStack() as around, compiled() as programs:
        clients = [around.enter_context(Client(own.url)) for _ in range(3)]
        for seed, client in enumerate(clients[:2]):
            client.open(PROMPTS[0], seed=seed, **FAST)
        videos = [frames([*client.blocks(4)]) for client in clients[:2]]
        lives = [own.host.session(client.ready["session"]) for client in clients[:2]]
        places = [{d for x in jax.tree.leaves(live.session.state.cache) for d in x.devices()} for live in lives]
        assert places == [{devices[0]}, {devices[1]}]
        clients[1].close()
        until(lambda: own.host.sessions() == 1)
        clients[2].open(PROMPTS[0], seed=1, **FAST)
        again = frames([*clients[2].blocks(4)])
        cache = own.host.session(clients[2].ready["session"]).session.state.cache
        assert all(x.devices() == {devices[1]} for x in jax.tree.leaves(cache))
    assert not programs
    np.testing.assert_array_equal(again, videos[1])
    for seed, video in enumerate(videos):
        np.testing.assert_array_equal(video, frames_of(alone(seed), 4))


def test_streams_that_go_together_are_those_alone():
    """Within a step of 255, as a batch rounds otherwise; and their programs are there too."""
    limits = replace(QUICK, sessions=2)
    found: dict[int, np.ndarray] = {}
    with running(tiny_served(limits), limits, together=Together(step_together, groups, (1, 2))) as own:

        def stream(seed: int) -> None:
            with Client(own.url) as client:
                client.open(PROMPTS[0], seed=seed, **FAST)
                first = settle(client)
                client.send("prompt", prompt=PROMPTS[1], blend_blocks=2)
                client.event("applied")
                client.ack(2)
                found[seed] = frames([*first, *client.blocks(20)])
                client.close()

        with compiled() as programs:
            threads = [threading.Thread(target=stream, args=(seed,)) for seed in (31, 32)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        together = own.host.metrics.registry.get_sample_value("cfjax_step_sessions_sum")
        steps = own.host.metrics.registry.get_sample_value("cfjax_step_sessions_count")
    print(f"{together} blocks in {steps} steps, {len(programs)} programs")
    assert not programs and together > steps
    for seed, video in found.items():
        session = alone(seed)
        wanted = frames_of(session, 3)
        session.set_prompt(PROMPTS[1], "recache", 2)
        wanted = np.concatenate([wanted, frames_of(session, 20)])
        assert np.abs(video.astype(int) - wanted).max() <= 1
    assert len(found) == 2


# ---- each message


def test_a_stream_is_the_session_alone(client):
    """Raw frames, with a prompt that changes at a known block, are the same bytes."""
    ready = client.open(PROMPTS[0], seed=11, **FAST)
    SERVER.validate(ready)
    blocks = settle(client)
    client.send("prompt", prompt=PROMPTS[1], mode="recache", blend_blocks=2)
    applied = client.event("applied")
    assert (applied["what"], applied["at_block"]) == ("prompt", 3)
    client.send("ack", block=2)
    blocks += client.blocks(5)
    for n, block in enumerate(blocks):
        SERVER.validate(block.message)
        assert (block.index, block.message["position"], block.message["prompt_applied"]) == (n, n, PROMPTS[n > 2])
        assert (block.message["lag_ms"] is None) == (n != 3)
        assert block.message["cache_bytes"] > 0 and min(block.message["ms"].values()) >= 0
    session = alone(11)
    wanted = frames_of(session, 3)
    session.set_prompt(PROMPTS[1], "recache", 2)
    np.testing.assert_array_equal(frames(blocks), np.concatenate([wanted, frames_of(session, 5)]))
    client.close()


def test_snapshots_forks_and_seeks(client):
    client.open(PROMPTS[0], seed=1, **FAST)
    first = settle(client)
    client.send("snapshot")
    kept = client.event("snapshot")
    SERVER.validate(kept)
    assert kept["at_block"] == 3
    client.send("ack", block=2)
    onwards = settle(client)
    client.send("restore", id=kept["id"])
    client.send("ack", block=5)
    assert client.event("applied") == {"type": "applied", "what": "restore", "at_block": 6}
    again = settle(client)
    assert [b.index for b in again] == [6, 7, 8] and [b.message["position"] for b in again] == [3, 4, 5]
    np.testing.assert_array_equal(frames(again), frames(onwards))
    client.send("fork", id=kept["id"], seed=2)
    client.send("ack", block=8)
    assert client.event("applied")["what"] == "fork"
    other = settle(client)
    assert np.any(frames(other) != frames(onwards))
    client.send("seek", block=7)
    client.send("ack", block=11)
    assert client.event("applied") == {"type": "applied", "what": "seek", "at_block": 12}
    np.testing.assert_array_equal(frames(settle(client)[:2]), frames(again[1:]))  # with its seed of then
    client.send("seek", block=4000)
    with pytest.raises(UserError, match="block 4000 is not held: the stream can go to"):
        client.event("applied")
    client.close()
    np.testing.assert_array_equal(frames([*first, *onwards]), frames_of(alone(1), 6))


def test_pause_weights_and_settings(client):
    client.open(PROMPTS[0], **FAST)
    settle(client)
    client.send("pause")
    assert client.event("applied") == {"type": "applied", "what": "pause", "at_block": 3}
    client.send("ack", block=2)
    weighted = [{"text": PROMPTS[0], "weight": 3.0}, {"text": PROMPTS[1], "weight": 1.0}]
    client.send("prompt", prompts=weighted, mode="keep", blend="slerp")
    client.send("set", format="png", fps=1000, memory="infinity_rope(window=4)")
    assert [client.event("applied")["what"] for _ in range(4)] == ["prompt", "memory", "fps", "format"]
    assert client.socket.ping().wait(10)  # and nothing else came: the stream pauses
    client.send("resume")
    assert client.event("applied") == {"type": "applied", "what": "resume", "at_block": 3}
    (block,) = client.blocks(1)
    SERVER.validate(block.message)
    assert (block.message["format"], block.message["prompt_applied"]) == ("png", weighted)
    client.close()


def test_a_video_begins_with_a_picture(client):
    colours = np.zeros((48, 48, 3), np.uint8)
    colours[:, :, 0] = 200
    picture = base64.b64encode(encode_frame(colours, "png")).decode()
    client.open(PROMPTS[0], image=picture, **FAST)
    blocks = list(client.blocks(3))
    assert [b.message["position"] for b in blocks] == [0, 1, 2]
    given = blocks[0].frames_PHWC.reshape(-1, 3).mean(axis=0)
    assert given[0] > given[1:].max() + 60
    client.close()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "words": ({"type": "prompt", "prompt": "a red dog moving left"}, "invalid_value", "this model never saw 'dog'"),
    "memory": ({"type": "set", "memory": "full"}, "invalid_value", "this server has infinity_rope"),
    "actions": ({"type": "action", "keys": ["w"]}, "unsupported", "cannot be steered"),
    "snapshot": ({"type": "restore", "id": "abcdefgh"}, "unknown_id", "no such snapshot"),
    "fork": ({"type": "fork", "id": "abcdefgh", "seed": 1}, "unknown_id", "no such snapshot"),
    "ack": ({"type": "ack", "block": 3}, "invalid_value", "block 3 was not sent yet"),
    "open": ({"type": "open", "version": 1, "prompt": "a"}, "already_open", "this session is open"),
    "reopen": ({"type": "reopen", "version": 1, "session": "abcdefgh"}, "unknown_id", "there is none of this name"),
    "schema": ({"type": "seek"}, "invalid_message", "'block' is a required property"),
}


def test_what_is_refused_leaves_the_stream_as_it_was(client):
    with pytest.raises(UserError, match="the first message is open or reopen"):
        client.send("pause")
        client.event("applied")
    with pytest.raises(UserError, match="this model never saw 'dog'"):
        client.open("a red dog moving left")
    for keys, told in (
        ({"memory": "full"}, "this server has"),
        ({"sampler": "x"}, "this server has"),
        ({"image": "A" * 40}, "image"),
    ):
        with pytest.raises(UserError, match=told):
            client.open(PROMPTS[0], **keys)
    client.open(PROMPTS[0], seed=4, **FAST)
    blocks = settle(client)
    for message, code, told in REFUSED.values():
        client.socket.send(json.dumps(message))
        error = client.receive()
        SERVER.validate(error)
        assert error["code"] == code and told in error["message"] and not error["retryable"], error
    client.send("ack", block=2)
    blocks += client.blocks(2)
    client.close()
    np.testing.assert_array_equal(frames(blocks), frames_of(alone(4), 5))


def test_snapshots_are_bounded_and_belong_to_their_session(server):
    limits = replace(QUICK, snapshots=2)
    with running(tiny_served(limits), limits) as own, Client(own.url) as one, Client(own.url) as other:
        one.open(PROMPTS[0], **FAST)
        other.open(PROMPTS[0], **FAST)
        settle(one), settle(other)
        for _ in range(3):
            one.send("snapshot")
        ids = [one.event("snapshot")["id"] for _ in range(2)]
        with pytest.raises(UserError, match="holds at most 2 snapshots"):
            one.event("snapshot")
        other.send("restore", id=ids[0])
        with pytest.raises(UserError, match="no such snapshot"):
            other.event("applied")


def test_keys_steer_from_their_block_on():
    """A model that can be steered: what is held is told before each block, and an `at` waits."""
    told: list[tuple[int, tuple[str, ...]]] = []
    steer = lambda session, keys: told.append((session.state.block, keys))
    served = replace(tiny_served(), actions=("ArrowLeft", "ArrowUp"), steer=steer)
    with running(served) as own, Client(own.url) as client:
        told.clear()
        client.open(PROMPTS[0], **FAST)
        settle(client)
        client.send("action", keys=["ArrowUp"], at=4)
        client.send("action", keys=["ArrowLeft"])
        assert [client.event("applied")["at_block"] for _ in range(2)] == [4, 3]
        client.send("ack", block=2)
        blocks = settle(client, 2)
        assert [b.message["keys"] for b in blocks] == [["ArrowLeft"], ["ArrowUp"]]
        assert all(b.message["lag_ms"] is not None for b in blocks)
        client.send("action", keys=["w"])
        with pytest.raises(UserError, match="'w' is none; this model has ArrowLeft, ArrowUp"):
            client.event("applied")
    assert [keys for _, keys in told[:5]] == [(), (), (), ("ArrowLeft",), ("ArrowUp",)]


# ---- time


def test_a_slow_reader_waits_at_three_blocks_and_others_go_on(server, client):
    client.open(PROMPTS[0], seed=6, **FAST)
    held = settle(client)
    with Client(server.url) as other:
        other.open(PROMPTS[0], seed=7, **FAST)
        assert [b.index for b in other.blocks(30)] == [*range(30)]
        other.close()
    live = server.host.session(client.ready["session"])
    assert (live.next_block, live.unacked, len(live.kept)) == (3, 3, 3)
    client.send("ack", block=0)
    held.append(settle(client, 1)[0])
    client.send("ack", block=3)
    held += client.blocks(6)
    assert [b.index for b in held] == [*range(10)]
    np.testing.assert_array_equal(frames(held), frames_of(alone(6), 10))
    client.close()


def test_what_was_not_sent_is_not_acknowledged(server, client, monkeypatch):
    """As a client would that reads nothing: no more is made than the queue holds."""
    sent, encode = threading.Event(), Block.encode
    monkeypatch.setattr(Block, "encode", lambda block: sent.wait(30) and encode(block))
    client.open(PROMPTS[0], **FAST)
    live = server.host.session(client.ready["session"])
    until(lambda: len(live.kept) == 3)
    for block in range(3):
        client.send("ack", block=block)
    assert client.socket.ping().wait(10)
    assert (live.next_block, live.unacked, len(live.kept)) == (3, 3, 3)
    sent.set()
    got = [client.receive() for _ in range(6)]
    assert [m.index for m in got if isinstance(m, Received)] == [0, 1, 2]
    assert [m["message"] for m in got if isinstance(m, dict)] == [f"ack: block {n} was not sent yet" for n in range(3)]
    client.close()


def test_the_rate_bounds_how_far_a_stream_runs(client):
    """A frame an hour: the first block comes at once, the second one not."""
    client.open(PROMPTS[0], fps=1 / 3600, format="raw")
    settle(client, 1)
    client.send("set", fps=5e-324)  # and at this one, no time can be waited for
    client.event("applied")
    assert client.socket.ping().wait(10)
    client.send("set", fps=0)
    applied = client.event("applied")
    assert applied["at_block"] == 2
    settle(client, 1)
    client.close()


def test_a_lost_socket_comes_back(server):
    """Torn without a word in the middle of a block, it goes on behind the last whole one: nothing is missing."""
    with Client(server.url) as first:
        first.open(PROMPTS[0], seed=8, **FAST)
        blocks = list(first.blocks(2))
        session = first.ready["session"]
        first.receive()
        first.socket.socket.shutdown(socket.SHUT_RDWR)
    until(lambda: server.host.is_lost(session))
    with Client(server.url) as second:
        ready = second.reopen(session, after=1)
        assert ready["resumed"] and ready["session"] == session and ready["next_block"] == 2 and ready["seed"] == 8
        blocks += second.blocks(4)
        with Client(server.url) as third:  # the socket is there: the session moves
            third.reopen(session, after=5)
            assert second.event("closed")["reason"] == "moved"
            blocks += third.blocks(3)
            third.close()
    assert [b.index for b in blocks] == [*range(9)]
    np.testing.assert_array_equal(frames(blocks), frames_of(alone(8), 9))
    with Client(server.url) as late, pytest.raises(UserError, match="there is none of this name"):
        late.reopen(session)


def test_a_full_server_says_when_to_come_again():
    limits = replace(QUICK, sessions=1)
    with running(tiny_served(limits), limits) as own:
        with Client(own.url) as only:
            only.open(PROMPTS[0], **FAST)
            with pytest.raises(Temporary, match="503, all places are taken"):
                Client(own.url)
            with pytest.raises(InvalidStatus) as refused, raw(own.url):
                pass
            response = refused.value.response
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
            session = only.ready["session"]
            only.socket.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: own.host.is_lost(session))
        with Client(own.url) as another, pytest.raises(UserError, match="all 1 places are taken"):
            another.open(PROMPTS[0])  # the lost one keeps its place
        until(lambda: not own.host.sockets())
        with Client(own.url) as back:
            back.reopen(session)
            back.close()
        until(lambda: not own.host.sockets())
        with Client(own.url) as next_one:
            next_one.open(PROMPTS[0])


def test_what_waits_for_too_long_ends():
    limits = replace(QUICK, idle_seconds=1.0, open_seconds=1.0, resume_seconds=1.0)
    with running(tiny_served(limits), limits) as own:
        with Client(own.url) as silent:
            got = [silent.receive() for _ in range(2)]
            assert [m.get("code", m.get("reason")) for m in got] == ["timeout", "refused"]
        with Client(own.url) as idle:
            idle.open(PROMPTS[0], **FAST)
            settle(idle)
            assert idle.receive()["code"] == "timeout" and idle.receive() == {"type": "closed", "reason": "idle"}
        with Client(own.url) as lost:
            lost.open(PROMPTS[0], **FAST)
            lost.socket.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: not own.host.sessions())


def test_a_memory_of_everything_ends():
    with running(tiny_served(memories=["full"])) as own, Client(own.url) as client:
        client.open(PROMPTS[0], memory="full", **FAST)
        count = 0
        with pytest.raises(UserError, match="the server ended the stream: end"):
            for _ in client.blocks(1000):
                count += 1
        assert count == tiny_served().open(Open(1, PROMPTS[0]))._max_frames // 2


# ---- faults


def test_a_fault_ends_one_stream_and_no_traceback_leaves():
    """The third block of seed 13 fails, alone or with others."""

    def step(sessions):
        if any(s.state.seed == 13 and s.state.block == 2 for s in sessions):
            raise RuntimeError("a secret path")
        return one_by_one(sessions)

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with (
            running(together=Together(step, lambda sessions: [[*sessions]], (1, 2))) as own,
            Client(own.url) as good,
            Client(own.url) as bad,
        ):
            good.open(PROMPTS[0], seed=12, **FAST)
            bad.open(PROMPTS[0], seed=13, **FAST)
            blocks = settle(good)
            seen = []  # the end goes before blocks that have not left
            while isinstance(error := bad.receive(), Received):
                seen.append(error.index)
            assert seen == [0, 1][: len(seen)]
            closed = bad.receive()
            assert (error["code"], closed["reason"]) == ("internal", "internal")
            assert "secret" not in str(error) and "Traceback" not in str(error)
            with pytest.raises(Temporary, match="1011"):
                bad.receive()
            good.send("ack", block=2)
            blocks += good.blocks(3)
            np.testing.assert_array_equal(frames(blocks), frames_of(alone(12), 6))
    finally:
        logging.getLogger("absl").setLevel(logging.NOTSET)


def test_every_client_is_told_of_the_end():
    with running() as own:
        clients = [Client(own.url) for _ in range(3)]
        for client in clients[:2]:
            client.open(PROMPTS[0], **FAST)
        settle(clients[0])
        own.server.should_exit = True
        ends = []

        def wait(client: Client) -> None:
            with client, pytest.raises(Temporary) as ended:
                while isinstance(got := client.receive(), Received):
                    client.ack(got.index)
                ends.append(got)
                client.receive()
            ends.append("1001" in str(ended.value))

        threads = [threading.Thread(target=wait, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert ends.count({"type": "closed", "reason": "shutdown"}) == 3 and ends.count(True) == 3


def test_limits_are_shown_but_for_what_concerns_no_client():
    shown = tiny_served().capabilities(Limits())["limits"]
    assert "open_seconds" not in shown and shown["queue"] == 3 and shown["resume_seconds"] == 30
