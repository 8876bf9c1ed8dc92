"""Commands that are killed while their folder grows, and given again: they end as undisturbed ones, and leave no more.

Training has such tests in tests/training/test_loop.py and test_processes.py; tests/core/test_staging.py kills at each
of the moves by which weights and exports take their places.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cfjax import export
from cfjax.__main__ import main
from cfjax.core.lock import LOCK
from cfjax.data.requests import read_latents
from cfjax.training.checkpoint import open_role, stored_roles
from tests.commands import ROOT, cfjax, tiny
from tests.synthetic import write_causal_forcing_pt, write_taehv, write_wan_folder

# The command; an export's videos are not made, only what becomes of files is looked at.
PROGRAM = """
import sys
from cfjax import __main__, export
export.evaluate_run = lambda run, **_: {"summary": {"all_correct": 1.0}, "network_calls": 1, "frames_per_second": 1.0}
sys.exit(__main__.main(sys.argv[1:]))
"""
pytestmark = pytest.mark.slow
Command = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A converted release with its world, a few-step student, six prompts."""
    root, quiet = tmp_path_factory.mktemp("killed"), {"progress": False, "latents": "(6,4,4)"}
    release, taehv = write_wan_folder(root / "release", shards=1), write_taehv(root / "taew2_1.pth")
    assert cfjax("convert", "convert.py", root / "wan", source=release, **quiet) == 0
    assert cfjax("convert", "convert.py", root / "wan", source=taehv, **quiet) == 0
    student, world = write_causal_forcing_pt(root / "dmd.pt"), root / "wan" / "world"
    assert cfjax("convert", "convert.py:dmd", root / "dmd", source=student, world=world, **quiet) == 0
    (root / "prompts.txt").write_text("\n".join(f"A cat, number {n}" for n in range(6)))
    return root


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    assert cfjax("train", "bidirectional.py:toy", root / "run", **tiny(root)) == 0
    return root / "run"


def argv(verb: str, config: str, workdir: Path, **keys: object) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in keys.items()]
    return [verb, f"--config={ROOT}/configs/{config}", f"--workdir={workdir}", *overrides]


def sizes(folder: Path) -> dict[Path, int]:
    found = {}
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names if name != LOCK):
            try:
                found[path] = path.lstat().st_size
            except FileNotFoundError:  # it was renamed since
                found[path] = -1
    return found


def kill_after(changes: int, command: list[str], folder: Path) -> None:
    """SIGKILL when the folder's files have changed so many times."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *command], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        before = sizes(folder)
        while changes and process.poll() is None:
            now = sizes(folder)
            changes -= now != before
            before = now
            time.sleep(0.0005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def check_killed(command: Command, whole: Path, folder: Path, changes: tuple[int, ...]) -> None:
    """Killed at each of these moments and given again, then undisturbed: the same files, none left over."""
    for moment in changes:
        kill_after(moment, command(folder), folder)
    assert main(command(folder)) == 0
    names = [{path.relative_to(place) for path in sizes(place) if path.parent.name != "d"} for place in (whole, folder)]
    assert names[0] == names[1]
    assert not list(folder.rglob(".*"))


def test_generate(root, tmp_path):
    keys = {"run": root / "dmd", "decoder": "tiny_vae", "precision": "float32", "prompts": root / "prompts.txt"}
    keys |= {"height": 32, "width": 32, "frames": 9, "resume": True, "progress": False, "save_latents": True}

    def command(workdir: Path) -> list[str]:
        return argv("generate", "generate.py:wan", workdir, **keys)

    assert main(command(tmp_path / "whole")) == 0
    check_killed(command, tmp_path / "whole", tmp_path / "killed", (12, 8))
    for file in (tmp_path / "whole").iterdir():
        other = tmp_path / "killed" / file.name
        if file.suffix == ".mp4":  # the contact sheet's rows of videos that were kept come from these
            assert file.read_bytes() == other.read_bytes()
        elif file.suffix == ".safetensors":  # the entries of its header have no order
            assert read_latents(file).tobytes() == read_latents(other).tobytes()
    assert json.loads((tmp_path / "killed" / "settings.json").read_text())["complete"]


def test_convert(root, tmp_path):
    def command(workdir: Path) -> list[str]:
        return argv("convert", "convert.py", workdir, source=root / "release", latents="(6,4,4)", progress=False)

    assert main(command(tmp_path / "whole")) == 0
    check_killed(command, tmp_path / "whole", tmp_path / "killed", (3, 20))
    for folder in ("", "world/vae", "world/text_encoder"):
        runs = [tmp_path / name / folder for name in ("whole", "killed")]
        for role, ema in stored_roles(runs[0]):
            one, other = (open_role(run, role, ema=ema) for run in runs)
            assert all(leaf.read().tobytes() == other[name].read().tobytes() for name, leaf in one.items())


def test_precompute(root, tmp_path):
    def command(output: Path) -> list[str]:
        keys = {"source": root / "prompts.txt", "world": root / "wan" / "world", "output": output, "part_items": 1}
        return argv("precompute", "precompute.py", tmp_path / "unused", latent_shape="6,4,4,16", progress=False, **keys)

    assert main(command(tmp_path / "whole")) == 0
    check_killed(command, tmp_path / "whole", tmp_path / "killed", (4, 9))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_export(toy, tmp_path, monkeypatch):
    """A first one, and one in place of an older."""
    summary = {"summary": {"all_correct": 1.0}, "network_calls": 1, "frames_per_second": 1.0}
    monkeypatch.setattr(export, "evaluate_run", lambda run, **_: summary)

    def command(workdir: Path) -> list[str]:
        return argv("export", "export.py", workdir, run=toy)

    assert main(command(tmp_path / "whole")) == 0
    for moments in ((2,), (6,)):
        check_killed(command, tmp_path / "whole", tmp_path / "killed", moments)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()
