"""The commands of the documentation, as they are written there, on miniature releases; only sizes are made small."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from cfjax.__main__ import main
from cfjax.evaluation.video import write_mp4
from tests import synthetic
from tests.commands import ROOT

# What these verbs are also told, so that a machine without an accelerator takes seconds.
SMALL = {
    "generate": ["--config.height=32", "--config.width=48", "--config.frames=9"],
    "precompute": ["--config.height=32", "--config.width=48", "--config.frames=9"],
}


def commands(page: str) -> list[list[str]]:
    """The `cfjax ...` lines of a page's bash blocks, in order; a backslash joins lines."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("cfjax ")]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a user would stand, not in the checkout: miniature releases and prompts, clips with captions."""
    root = tmp_path
    synthetic.main(str(root))
    rng = np.random.default_rng(0)
    for name in ("clips/first", "clips/second", "new_clips/third"):
        still, file = rng.integers(0, 255, (1, 32, 48, 3), np.uint8), root / f"{name}.mp4"
        file.parent.mkdir(exist_ok=True)
        write_mp4(file, np.repeat(still, 12, axis=0), fps=16)
        file.with_suffix(".txt").write_text(f"the {file.stem} clip")
    shutil.copytree(root / "clips", root / "videos")
    (root / "OpenVid-1M.csv").write_text("video,caption,fps\nfirst.mp4,a still,16\nsecond.mp4,another,16\n")
    return root


# Verbs whose commands other tests run, made smaller than a page can say: those of the same names, and tests/studies.
ELSEWHERE = {"quickstart", "plan", "study"}
PAGES = {
    "README.md": {"convert", "generate", "check", "compare"},
    "docs/wan.md docs/data.md docs/compare.md": {"convert", "generate", "precompute", "compare"},
}


@pytest.mark.slow
@pytest.mark.parametrize("pages", PAGES)
def test_every_command_runs(folder, monkeypatch, pages):
    """A clone of the reference is the user's own: what needs one is left to them."""
    monkeypatch.chdir(folder)
    listed = [c for page in pages.split() for c in commands(page) if "--against=reference" not in c]
    listed = [c for c in listed if c[0] not in ELSEWHERE]
    assert {command[0] for command in listed} == PAGES[pages] and len(listed) >= 4
    for command in listed:
        small = [] if any(word.startswith("--check") for word in command) else SMALL.get(command[0], [])
        assert main([*command, *small]) == 0, shlex.join(["cfjax", *command])
    assert list((folder / "runs" / "videos").glob("*.mp4")) and (folder / "runs" / "videos" / "settings.json").exists()
    assert (folder / "exported" / "causal_forcing" / "model.pt").exists() == ("docs/wan.md" in pages)
