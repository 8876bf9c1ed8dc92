"""benchmarks/codecs_against_peers.py: both sides compute the same, and the record says what was done."""

import argparse
import json
import runpy
import sys

import numpy as np
import pytest
import torch

from cfjax.core.compile_cache import no_compile_cache
from tests.commands import ROOT

TINY = ["--frames=2", "--height=16", "--width=16", "--base_dim=4", "--text_dim=64", "--rows=8"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with no_compile_cache():  # the script turns it off for good
        yield runpy.run_path(str(ROOT / "benchmarks" / "codecs_against_peers.py"))


def test_a_miniature_leaves_errors_ratios_and_the_work(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    memory = {"ours": 1.0, "theirs": 2.0}
    monkeypatch.setitem(script["measure"].__globals__, "memory_of", lambda case, side: memory[side])
    flags = ["--cases=text", "--rounds=2", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["codecs_against_peers.py", *TINY, *flags])
    script["main"]()
    made = json.loads(out.read_text())
    assert made["work"] == {"frames": 2, "height": 16, "width": 16, "base_dim": 4, "text_dim": 64, "rows": 8}
    (row,) = made["rows"]
    assert 0.0 < row["error"] < 1e-5 and row["peak_mib"] == memory and row["others_share"] >= 0.0
    assert {side: len(times) for side, times in row["seconds"].items()} == {"ours": 2, "theirs": 2}
    assert row["ratio"].keys() == {"median", "min", "max"}
    assert "\n| text | " in capsys.readouterr().out


def test_their_stream_is_their_whole_decode(script):
    """It goes by what diffusers keeps to itself. The latents of both cases are the same."""
    options = script["command_line"]().parse_args(TINY)
    whole, later = (script["make_sides"](case, options)["theirs"] for case in ("decode", "frames"))
    for _ in range(2):  # what is measured is called again and again
        np.testing.assert_allclose(later(), whole()[:, 1:], atol=1e-6)


def test_a_noisy_record_is_not_kept(script, tmp_path, capsys):
    """Where results are kept, that is; a file that was named is written."""
    keep, command = script["keep"], argparse.ArgumentParser()
    command.add_argument("--out", default=tmp_path / "kept.json")
    for share, file, written in ((0.5, "kept.json", False), (0.5, "named.json", True), (0.0, "kept.json", True)):
        rows = [{"case": "text", "others_share": share}]
        assert keep(command, tmp_path / file, rows) == written == (tmp_path / file).exists()
    assert "other programs ran beside text: nothing is written" in capsys.readouterr().out


def test_memory_is_what_a_call_adds(script):
    held = []
    assert 14 < script["peak_mib"](lambda: held.append(np.ones(2**24, np.uint8))) < 40, "16 MiB a call, kept"
