"""Wan from a release's folder to a student's video, in miniature: the commands of docs/wan.md as they stand there."""

import json
import shlex
import sys
from itertools import takewhile

import av
import pytest

from cfjax.__main__ import main
from cfjax.experiment.runs import open_run
from tests import synthetic
from tests.commands import ROOT
from tests.documents import fenced, lines_of

SECTION = "## A rehearsal on a laptop\n"


def commands() -> list[list[str]]:
    """The section's commands, in order."""
    after = (ROOT / "docs" / "wan.md").read_text().partition(SECTION)[2]
    section = "".join(takewhile(lambda line: not line.startswith("## "), after.splitlines(keepends=True)))
    return [shlex.split(line) for block in fenced(section, "bash") for line in lines_of(block) if line]


@pytest.mark.parametrize("name", synthetic.NEEDED)
def test_what_writes_the_miniatures_is_named_where_it_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        SystemExit, match=f'tests/synthetic.py needs {name}: in the clone, pip install ".\\[compare\\]"'
    ):
        synthetic.main(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_every_stage_runs_on_the_miniature_release(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, *rest = commands()
    assert first == ["python", "tests/synthetic.py", "."] and all(words[0] == "cfjax" for words in rest)
    assert [words[1] for words in rest] == [
        "convert", "precompute", "train", "precompute", "train", "train", "generate", "plan",
    ]  # fmt: skip
    synthetic.main(".")
    capsys.readouterr()
    compiled = set()
    for words in rest:
        assert main(words[1:]) == 0, shlex.join(words)
        said = capsys.readouterr()
        assert "\r" not in said.err and "guard: off" not in said.out
        compiled |= {line for line in said.out.splitlines() if line.startswith("compiling ")}
    assert compiled >= {
        f"compiling {what}, once ..."
        for what in (
            "the encoder of clips, with a first batch",
            "the teacher's solver, with a first batch",
            "the student's update",
            "the critic's update",
            "the sampler of the previews",
            "the programs of the stream and its decoder",
        )
    }
    student = open_run("runs/dmd", with_model=False)
    assert (student.stage, student.step, student.model.config.dim) == ("dmd", 12, synthetic.DIT["dim"])
    (video,) = (tmp_path / "runs" / "rehearsal").glob("*.mp4")
    with av.open(str(video)) as opened:
        assert sum(1 for _ in opened.decode(video=0)) == 33
    plan = json.loads((tmp_path / "runs" / "plan" / "plan.json").read_text())["plans"][0]
    assert {cost["role"] for cost in plan["costs"]} == {"student", "critic"}
