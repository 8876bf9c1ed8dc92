"""`cfjax serve` and `cfjax play` as a user has them: a process of its own, a run on the disk, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import av
import pytest

from cfjax.__main__ import main
from cfjax.core.errors import Temporary
from cfjax.serving.client import Client, Received
from tests.commands import ROOT
from tests.documents import fenced
from tests.quick import QUICK
from tests.serving.test_server import get

DOCS = (ROOT / "docs" / "serving.md").read_text()
SETTINGS = ["--config=configs/serve.py", "--config.run=runs/dmd", "--config.port=0", "--config.sessions=3"]
ONE_POLICY = ["--config.memories=infinity_rope", "--config.seek_blocks=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of miniature networks, as an older commit wrote them."""
    root = tmp_path_factory.mktemp("serve")
    with tarfile.open(ROOT / "tests" / "golden" / "old_outputs.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its address) of a server that compiles; it is killed if it has not ended."""
    command = [sys.executable, "-m", "cfjax", "serve", *SETTINGS, *ONE_POLICY, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"dmd, 32 x 32: compiling; (http://127\.0\.0\.1:\d+)/healthz says when ready\n", line)
            assert found, line
            yield process, found[1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with serving(folder) as (process, address):
        status, headers, body = get(f"{address}/healthz")  # it answers at once, and is not ready yet
        assert status == 503 and json.loads(body) == {"status": "compiling"} and "retry-after" in headers
        with pytest.raises(Temporary, match="503, starting"):
            Client(address)
        assert process.stdout is not None
        told = process.stdout.readline()
        assert re.fullmatch(r"compiled for infinity_rope in \d+ s: memory policy 1 of 1\n", told), told
        assert process.stdout.readline() == f"ready: {address}/\n"
        assert get(f"{address}/healthz")[0] == 200
        yield process, address


def test_a_stream_is_played_into_a_file(server, folder, capsys):
    words = [f"--config={ROOT}/configs/play.py", f"--config.url={server[1]}", f"--workdir={folder}/played"]
    both = "--config.prompt=a red circle moving left | a blue square moving up"
    assert main(["play", *words, both, "--config.blocks=2", "--config.scale=2"]) == 0
    said = capsys.readouterr().out
    prompts = re.findall(r"block \d+: 3 frames, a (\w+)", said)
    red, blue = prompts.count("red"), prompts.count("blue")
    assert prompts == ["red"] * red + ["blue"] * blue and 2 <= red <= 5 and blue == 2
    with av.open(str(folder / "played" / "video.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert (len(frames), frames[0].shape, video.streams.video[0].average_rate) == (3 * len(prompts), (64, 64, 3), 8)
    assert main(["play", *words, both]) == 2
    assert "video.mp4 is there" in capsys.readouterr().err
    assert main(["play", *words, "--config.overwrite=True", "--config.prompt=a red dog"]) == 2
    assert "this model never saw 'dog'" in capsys.readouterr().err


def test_the_session_in_python_runs_as_it_stands(server, folder):
    """At most twenty lines; only the address is another."""
    (code,) = fenced(DOCS, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    example, changed = re.subn(r'"ws://[^"]*"', repr(server[1].replace("http", "ws")), code)
    assert changed == 1
    with chdir(folder):
        exec(compile(example, "docs/serving.md", "exec"), {})
        assert (folder / "live.mp4").stat().st_size > 1000


def test_the_session_in_javascript_is_short_and_speaks_the_protocol():
    (code,) = fenced(DOCS, "js")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    from cfjax.serving.protocol import MESSAGES

    assert set(re.findall(r'type: "(\w+)"', code)) <= MESSAGES.keys() and "getUint32(4)" in code


def test_a_signal_ends_every_stream_in_order(folder):
    """`closed`, then the end of the process by 0, which took no more than the five seconds that the server has."""
    with serving(folder) as (process, address):
        assert process.stdout is not None and any(line.startswith("ready") for line in process.stdout)
        ends: list[object] = []

        def watch(client: Client) -> None:
            with client:
                while isinstance(got := client.receive(), Received):
                    client.ack(got.index)
                ends.append(got)

        clients = [Client(address) for _ in range(2)]
        for client in clients:
            client.open("a red circle moving left", format="jpeg")
        threads = [threading.Thread(target=watch, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert ends == [{"type": "closed", "reason": "shutdown"}] * 2
        assert process.wait(30) == 0


def test_a_server_that_is_still_compiling_ends_too(folder):
    with serving(folder) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config.host=0.0.0.0"], "others can reach this address; set --config.token"),
        (["--config.run=runs/teacher"], "it makes all frames at once; serve a causal one"),
        (["--config.memories=deep_thought"], "memory='deep_thought': use full, window"),
        (["--config.memories=()"], "give at least one of each"),
        (
            ["--config.prompts='a red dog moving left',"],
            "--config.prompts: 'a red dog moving left': this model never saw",
        ),
        (["--config.host=256.256.256.256"], "--config.host=256.256.256.256"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(folder, capsys, words, told):
    with chdir(folder):
        assert main(["serve", f"--config={ROOT}/configs/serve.py", *SETTINGS[1:], *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cfjax serve: ") and told in said and said.count("\n") == 1


def test_a_port_that_is_taken_is_told(server, folder, capsys):
    port = server[1].rpartition(":")[2]
    with chdir(folder):
        assert main(["serve", f"--config={ROOT}/configs/serve.py", *SETTINGS[1:], f"--config.port={port}"]) == 2
    assert f"--config.port={port}: Address already in use; another port, or 0" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told(tmp_path, capsys):
    words = [f"--config={ROOT}/configs/play.py", "--config.url=ws://127.0.0.1:1", f"--workdir={tmp_path}/played"]
    assert main(["play", *words]) == 75
    assert "ws://127.0.0.1:1: cannot be reached" in capsys.readouterr().err and not (tmp_path / "played").exists()
