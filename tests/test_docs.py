"""The documentation: links lead somewhere, commands are read as they stand, and those on Wan folders are run."""

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import urlparse

import av
import numpy as np
import pytest
from PIL import Image

from cfjax.__main__ import VERBS, main
from cfjax.core import cli
from cfjax.core.cli import keys_of
from cfjax.core.errors import UserError
from cfjax.core.topology import parse_topology
from cfjax.evaluation.video import write_mp4
from tests import synthetic
from tests.commands import ROOT, cfjax, tiny
from tests.documents import (
    PAGES,
    SCRIPTS,
    Command,
    anchors,
    commands_of_page,
    commands_of_script,
    fenced,
    folder_of,
    links,
    paths,
    spans,
)
from tests.test_configs import CASES, get_config

WORDS = 1500  # of the README, as wc counts: five minutes
TRAIN = ["cfjax", "train", "--config=configs/dmd.py", "--workdir=/shared/runs/dmd"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


# ---- links


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Files and headings are there; addresses outside of the repository are only well formed."""
    for link in links(text_of(page)):
        address = urlparse(link)
        if address.scheme:
            assert address.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), link
            continue
        file = folder_of(page) / address.path if address.path else ROOT / page
        assert file.exists() and file.resolve().is_relative_to(ROOT), f"{page}: {link}: no such file"
        if address.fragment:
            assert address.fragment in anchors(file.read_text()), f"{page}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    """By its path in the repository, or in the package, as core/tree.py."""
    rooms = frozenset(folder.name for top in (ROOT, ROOT / "cfjax") for folder in top.iterdir() if folder.is_dir())
    ours = rooms - {"data", "assets", "checkpoints", "runs"}
    for path in paths(text_of(page), ours):
        assert (ROOT / path).exists() or (ROOT / "cfjax" / path).exists(), f"{page}: `{path}`: no such file"


def test_every_test_that_a_page_names_is_there():
    """As `test_wan.py::test_a_law`, or `::test_another` of the file that was named last."""
    there: dict[str, str] = defaultdict(str)
    for found in (ROOT / "tests").rglob("test_*.py"):
        there[found.name] += found.read_text()
    for page in PAGES:
        file = ""
        for named, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", text_of(page)):
            file = named or file
            assert f"def {test}(" in there[file], f"{page}: {file}::{test}: no such test"


def test_every_page_can_be_found_from_the_readme():
    """By links, however many."""
    seen, left = set(), ["README.md"]
    while left:
        page = left.pop()
        seen.add(page)
        for link in links(text_of(page)):
            file = (folder_of(page) / link.partition("#")[0]).resolve()
            name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
            if name.endswith(".md") and name not in seen:
                left.append(name)
    assert seen == set(PAGES)


# ---- commands


class WasRead(BaseException):
    """A command line was read to its end; what it asks for is not to happen."""


def read_cfjax(command: Command, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """What follows `cfjax`, read by the verb itself as far as its first deed."""
    if not words or words[0].isupper():  # cfjax VERB --help
        return
    verb, *rest = words
    assert verb in VERBS, f"{command}: no such verb"
    if verb == "check":
        assert not [word for word in rest if word.startswith("-")] and (rest or not command.whole), str(command)
        return
    if not command.whole:
        if not rest:
            return
        rest = [re.sub(r"(?<=\.py):[A-Z]+$", "", word) for word in rest]  # :RECIPE stands for any
        if "--help" not in rest and not any(word.startswith("--workdir") for word in rest):
            rest = [*rest, "--workdir=runs/example"]
    check_settings = cli.check_settings

    def stop(*args):
        check_settings(*args)
        raise WasRead

    patch.setattr(cli, "check_settings", stop)  # the last thing that every verb's command line goes through
    try:
        importlib.import_module(f"cfjax.{verb}").main(rest)
    except WasRead:
        pass
    except UserError as error:
        pytest.fail(f"{command}: {error}")
    for word in rest:
        if word.startswith("--topology="):
            parse_topology(word.partition("=")[2])


def run_bash(command: Command, script: str, *words: str) -> None:
    ran = subprocess.run(["bash", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}: {ran.stderr}"


def run_python(command: Command, script: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A script as its own program, in this process."""
    patch.chdir(ROOT)
    patch.syspath_prepend(str((ROOT / script).parent))
    patch.setattr(sys, "argv", [script, *words])
    there = set(sys.modules)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except WasRead:
        pass
    except SystemExit as end:
        assert end.code in (None, 0), f"{command}: exit code {end.code}"
    finally:
        for name in {"measure", "jobset"} & (set(sys.modules) - there):  # files beside the scripts
            del sys.modules[name]


def read_launcher(command: Command, script: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A launcher's dry run, and what it would start."""
    split = words.index("--") if "--" in words else len(words)
    started, name = words[split + 1 :], Path(script).name
    if started[:1] == ["cfjax"]:
        read_cfjax(command, started[1:], patch)
        patch.undo()
    if name == "quickstart.sh":
        read_cfjax(command, ["quickstart", *words], patch)
    elif name == "setup.sh":
        assert f"  {words[0]})" in text_of(script), str(command)
    elif name in ("slurm.sh", "tpu_pod.sh") and (started or "--" not in words):
        run_bash(command, script, "--dry-run", *words)
    elif name == "sweep.py":
        run_python(command, script, ["list", *words[1:split]], patch)
        patch.undo()
        other = {"slurm": "launch/slurm.sh", "jobset": "launch/gke/jobset.py"}.get(words[0])
        if other:
            read_launcher(command, other, [*started, "--", *TRAIN], patch)
    elif name == "jobset.py" and len(started) > 2:
        run_python(command, script, ["--dry-run", *words], patch)


def read_benchmark(command: Command, script: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser):
        parse_args(parser)
        raise WasRead

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    run_python(command, script, words, patch)


def extras() -> set[str]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options.extras_require"])


def read(command: Command, patch: pytest.MonkeyPatch) -> None:
    """Reads a command as the program would that it is for; programs of other people are only known by name."""
    words = list(command.words)
    if words[0] in ("bash", "python") and len(words) > 1:
        words = words[1:]
    program, *rest = words
    if program == "cfjax":
        read_cfjax(command, rest, patch)
    elif "/" in program and (ROOT / program).is_file():
        if program.startswith("launch/"):
            read_launcher(command, program, rest, patch)
        elif program.startswith("benchmarks/"):
            read_benchmark(command, program, rest, patch)
    elif program == "pip":
        named = re.findall(r" -e \.\[(\w+)\]$", " ".join(rest))
        assert named and set(named) <= extras(), f"{command}: no such extra"
    elif program == "docker" and "-f" in rest:
        assert (ROOT / rest[rest.index("-f") + 1]).is_file(), f"{command}: no such file"
    else:
        assert program in ("docker", "tensorboard"), f"{command}: what is that?"


@pytest.mark.parametrize("file", [*PAGES, *SCRIPTS])
def test_every_command_is_read_as_it_stands(file):
    """Verbs, files of configs, their switches and keys, values in their ranges, flags; launchers by their dry runs."""
    of = commands_of_page if file in PAGES else commands_of_script
    for command in dict.fromkeys(of(file)):
        with pytest.MonkeyPatch.context() as patch:
            read(command, patch)


@pytest.mark.parametrize("file", [*PAGES, *(script for script in SCRIPTS if script.startswith("configs/"))])
def test_every_key_that_is_named_is_some_configs(file):
    """`--config.a.b` in a sentence, of whichever config it speaks."""
    known: set[str] = set()
    for path, arg in CASES:
        try:
            known |= keys_of(get_config(path)(arg) if arg else get_config(path)()).keys()
        except UserError:  # switches that exclude each other
            continue
    named = {key for span in spans(text_of(file)) for key in re.findall(r"--config\.([a-z_0-9.]*[a-z_0-9])", span)}
    assert named <= known


# ---- the README


def test_the_readme_takes_five_minutes():
    assert len(text_of("README.md").split()) <= WORDS


@pytest.fixture(scope="module")
def causal_run(tmp_path_factory) -> Path:
    """A causal run of the toy: two updates of stage 1, which compiles in a third of the time of stage 3."""
    root = tmp_path_factory.mktemp("example")
    init = {"roles__student__init": "toy_teacher", "optim__student__name": "adamw"}
    assert cfjax("train", "ar_diffusion.py:toy", root / "ar", **tiny(root), **init, sampler__steps=2) == 0
    return root / "ar"


def test_the_python_example_writes_its_video(causal_run, tmp_path, monkeypatch):
    """As it stands in the README, but for the run's folder: at most ten lines, and every frame is there."""
    (code,) = fenced(text_of("README.md"), "python")
    assert len(code.splitlines()) <= 10
    example, changed = re.subn(r'open_run\("[^"]*"\)', f"open_run({str(causal_run)!r})", code)
    assert changed == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    with av.open("circle.mp4") as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        rate = video.streams.video[0].average_rate
    assert (len(frames), frames[0].shape, rate) == (6, (128, 128, 3), 8)


def test_the_page_on_python_runs(causal_run, tmp_path, monkeypatch, capsys):
    """docs/python.md, cell after cell, but for the run's folder: of a run with a many-step sampler."""
    cells = fenced(text_of("docs/python.md"), "python")
    code, changed = re.subn(r'open_run\("[^"]*"\)', f"open_run({str(causal_run)!r})", "\n".join(cells))
    assert changed == 1 and len(cells) > 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    np.testing.assert_array_equal(names["third"].video_BPHWC, names["again"].video_BPHWC)
    assert abs(names["third"].video_BPHWC - names["another"].video_BPHWC).max() > 0.01
    assert names["longer_BPHWC"].shape == names["video_BPHWC"].shape
    assert np.isfinite(float(names["metrics"]["loss"])) and Path("circle.mp4").stat().st_size
    assert "never saw 'dog'" in capsys.readouterr().out


# ---- the commands on Wan folders, run

# What these verbs are also told, so that a machine without an accelerator takes seconds.
SMALL = {
    "generate": ["--config.height=32", "--config.width=64", "--config.frames=9"],
    "precompute": ["--config.height=32", "--config.width=48", "--config.frames=9"],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a user would stand, not in the checkout: miniature releases and prompts, clips with captions."""
    root = tmp_path
    synthetic.main(str(root))
    shutil.rmtree(root / "clips")
    rng = np.random.default_rng(0)
    for name in ("clips/first", "clips/second", "new_clips/third"):
        still, file = rng.integers(0, 255, (1, 32, 48, 3), np.uint8), root / f"{name}.mp4"
        file.parent.mkdir(exist_ok=True)
        write_mp4(file, np.repeat(still, 12, axis=0), fps=16)
        file.with_suffix(".txt").write_text(f"the {file.stem} clip")
    Image.fromarray(rng.integers(0, 255, (32, 64, 3), np.uint8)).save(root / "photo.png")
    shutil.copytree(root / "clips", root / "videos")
    (root / "OpenVid-1M.csv").write_text("video,caption,fps\nfirst.mp4,a still,16\nsecond.mp4,another,16\n")
    return root


# Verbs whose commands other tests run, made smaller than a page can say: those of the same names, and in tests/studies
# and tests/serving.
ELSEWHERE = {"quickstart", "plan", "serve", "study"}
RUN = {
    "README.md": {"convert", "generate", "check", "compare"},
    "docs/wan.md docs/data.md docs/compare.md": {"convert", "generate", "precompute", "compare"},
}


@pytest.mark.slow
@pytest.mark.parametrize("pages", RUN)
def test_every_command_runs(folder, monkeypatch, pages):
    """A clone of the reference is the user's own: what needs one is left to them."""
    monkeypatch.chdir(folder)
    whole = [
        list(c.words[1:]) for page in pages.split() for c in commands_of_page(page) if c.whole and c.words[0] == "cfjax"
    ]
    whole = [words for words in whole if not any(word.endswith(":mini") for word in words)]  # tests/test_rehearsal.py
    listed = [words for words in whole if "--against=reference" not in words and words[0] not in ELSEWHERE]
    assert {words[0] for words in listed} == RUN[pages] and len(listed) >= 4
    for words in listed:
        small = [] if any(word.startswith("--check") for word in words) else SMALL.get(words[0], [])
        assert main([*words, *small]) == 0, shlex.join(["cfjax", *words])
    assert list((folder / "runs" / "videos").glob("*.mp4")) and (folder / "runs" / "videos" / "settings.json").exists()
    assert (folder / "exported" / "causal_forcing" / "model.pt").exists() == ("docs/wan.md" in pages)
