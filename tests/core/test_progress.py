"""How far a job is: a bar on a terminal, which lines of output go above; in a log, a few lines and no bar."""

import io
import sys

import pytest

from cfjax.core.console import counted, say
from cfjax.core.progress import FIRST_SECONDS, LINE_SECONDS, Progress, compiling, duration, followed
from tests.commands import ROOT
from tests.training.toy import run


class Time:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_numbers_of_one_are_singular():
    assert [counted(n, "video") for n in (0, 1, 2, 1024)] == ["0 videos", "1 video", "2 videos", "1,024 videos"]
    assert [counted(2, noun) for noun in ("batch", "box", "pass", "network call")] == [
        "2 batches", "2 boxes", "2 passes", "2 network calls",
    ]  # fmt: skip


def test_durations_are_short():
    assert [duration(s) for s in (0.2, 99, 100, 5900, 12_000)] == ["0 s", "99 s", "2 min", "98 min", "3 h 20 min"]


def test_a_log_gets_a_line_now_and_then(capsys):
    time = Time()
    with Progress(1024, "pair", "ODE pairs", now=time) as progress:
        for seconds in (1.0, FIRST_SECONDS, 1.0, LINE_SECONDS):
            time.now += seconds
            progress.update(256)
    assert capsys.readouterr().err.splitlines() == [
        "ODE pairs: 512 of 1,024 pairs, 46.5 pairs/s, 11 s left",
        "ODE pairs: 1,024 of 1,024 pairs, 16.5 pairs/s",
    ]


def test_a_short_job_is_one_line_and_a_stopped_one_says_where(capsys):
    time = Time()
    for done, expected in ((3, "check: 3 pictures in 2 s\n"), (2, "check: 2 of 3 in 2 s\n"), (0, "")):
        with Progress(3, "picture", "check", now=time) as progress:
            time.now += 2.0
            progress.update(done)
        assert capsys.readouterr().err == expected
    assert list(followed("ab", 2, "letter", shown=False)) == ["a", "b"] and not capsys.readouterr().err


def test_bytes_and_slow_things_have_units_of_their_own(capsys):
    time = Time()
    with Progress(3_000_000_000, "B", "convert", now=time) as progress:
        time.now += 20.0
        progress.update(1_500_000_000)
    with Progress(10, "clip", now=time) as progress:
        time.now += 20.0
        progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["convert: 1.50GB of 3.00GB, 75.0MB/s, 20 s left", "1 of 10 clips, 20 s per clip, 3 min left"]


def test_training_writes_a_line_for_each_point_of_the_curves(tmp_path, capsys):
    run(tmp_path, 20, progress=True)
    out, err = capsys.readouterr()
    assert "\r" not in err and [line.partition(",")[0] for line in err.splitlines()] == [
        "toy: 1 of 20 steps", "toy: 8 of 20 steps", "toy: 15 of 20 steps", "toy: 20 of 20 steps",
    ]  # fmt: skip
    first, second, third, last = err.splitlines()
    assert all(", critic " in line for line in (first, second, third, last)) and ", student " in second
    assert "/s" not in first and "steps/s" in third and third.endswith(" left")  # the first has compiled
    assert "steps/s" in last and not last.endswith(" left")
    said = out.splitlines()
    assert "compiling the student's update, once ..." in said and "compiling the critic's update, once ..." in said
    assert sum(line.startswith("... compiled in ") for line in said) == 2


def test_on_a_terminal_there_is_a_bar_and_output_goes_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress(2, "step", "toy") as progress:
        progress.note({"student": "0.5"})
        say("guard: a line")
        progress.update(2)
    shown = terminal.getvalue()
    before = shown.partition("guard: a line\n")[0]
    assert before.endswith("\r") and "100%" in shown and "2/2" in shown and "student=0.5" in shown


def test_nothing_else_draws_bars():
    """A log would be full of them."""
    users = {path.name for path in (ROOT / "cfjax").rglob("*.py") if "tqdm" in path.read_text()}
    assert users == {"console.py", "progress.py"}


def test_compiling_is_said_with_its_seconds(capsys):
    with compiling("the sampler"):
        assert capsys.readouterr().out == "compiling the sampler, once ...\n"
    assert capsys.readouterr().out == "... compiled in 0 s\n"
    with pytest.raises(KeyError), compiling("the sampler", shown=False):
        raise KeyError
    assert not capsys.readouterr().out
