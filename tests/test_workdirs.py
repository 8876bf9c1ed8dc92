"""What every verb does to the places around it: nothing, whatever its workdir is called; and nothing to a wrong one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfjax.__main__ import main
from cfjax.core.paths import read_if_whole, write_atomically
from tests.commands import ROOT, cfjax, tiny
from tests.synthetic import write_wan_folder

# Runs commands one after another in one process, as a user's shell would, and tells what each changed.
WATCHER = """
import json, sys
from pathlib import Path
from cfjax.__main__ import main

root, commands = Path(sys.argv[1]), json.loads(sys.argv[2])

def files():
    stats = {file.relative_to(root).as_posix(): file.lstat() for file in root.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items() if not (root / name).is_dir()}

told = {}
for name, argv in commands.items():
    before = files()
    code, after = main(argv), files()
    told[name] = [code, sorted(key for key in {*before, *after} if before.get(key) != after.get(key))]
Path(sys.argv[3]).write_text(json.dumps(told))
"""
# Caches outside of workdirs: of matplotlib's fonts.
CACHES = ("home/.cache/matplotlib/", "home/.config/matplotlib/")


@pytest.mark.parametrize("name", ["a[b", "a*b", "a?b", "a\\b"])
@pytest.mark.parametrize("verb", ["train", "convert", "quickstart", "study ablation", "study uncertain"])
def test_names_below_which_no_checkpoint_can_be_written(tmp_path, capsys, verb, name):
    """Orbax would write it, and not find its pieces; of a folder above the workdir, too."""
    config = {
        "train": "dmd.py:toy",
        "study ablation": "study.py:ablation",
        "study uncertain": "study.py:uncertain",
    }.get(verb, f"{verb}.py")
    argv = [*verb.split(), f"--config={ROOT}/configs/{config}", f"--workdir={tmp_path / name / 'run'}"]
    if verb == "convert":
        argv.append("--config.source=anything")
    assert main(argv) == 2
    assert f"checkpoints cannot be written below a name with {name[1]}; name another folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_names_do(tmp_path):
    """What FFmpeg, tensorstore and shells have a meaning for: a bracket, a percent sign, a colon, a dash in front."""
    release = write_wan_folder(tmp_path / "release", shards=1)
    workdir = tmp_path / "-a]b %20:{x}$HOME' ~"
    assert cfjax("convert", "convert.py", workdir, source=release, progress=False) == 0
    back = cfjax(
        "convert", "convert.py", tmp_path / "back", source=workdir, to="safetensors", parts="dit", progress=False
    )
    assert back == 0
    data, world = workdir.with_name(workdir.name + "data"), workdir / "world"
    (tmp_path / "prompts.txt").write_text("A cat\nA dog")
    keys = {"source": tmp_path / "prompts.txt", "world": world, "output": data, "progress": False}
    assert cfjax("precompute", "precompute.py", tmp_path / "unused", **keys) == 0
    assert main(["precompute", f"--check={data}"]) == 0


def test_a_file_that_a_power_failure_emptied_or_cut_is_none(tmp_path):
    file = tmp_path / "record.json"
    assert read_if_whole(file) is None
    write_atomically(file, '{"a": 1}')
    assert read_if_whole(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]
    for content in (b"", b'{"a"', b"\0\0\0\0"):
        file.write_bytes(content)
        assert read_if_whole(file) is None


def commands(root: Path) -> dict[str, list[str]]:
    """A command of each verb, by the folder that it may write to."""
    release, quiet = root / "in" / "release", {"progress": False}
    toy = {**tiny(root / "out"), "data__path": root / "out" / "train" / "data", "sampler__steps": 2}
    world = root / "in" / "world"
    asked = {
        "train": ("train", "bidirectional.py:toy", toy),
        "evaluate": ("evaluate", "evaluate.py", {"run": root / "out/train", "clips": 15, "batch": 15}),
        "export": ("export", "export.py", {"run": root / "out/train", "clips": 60}),
        "generate": (
            "generate",
            "generate.py",
            {"run": root / "out/train", "prompt": "a red circle moving left", **quiet},
        ),
        "convert": ("convert", "convert.py", {"source": release, "parts": "dit", **quiet}),
        "pipeline": ("convert", "convert.py", {"source": root / "out/convert", "to": "diffusers", **quiet}),
        "plan": ("plan", "bidirectional.py:toy", {"optim__student__name": "adamw", "roles__student__remat": "none"}),
        "precompute": (
            "precompute",
            "precompute.py",
            {"source": root / "in/prompts.txt", "world": world, "output": root / "out/precompute", **quiet},
        ),
    }
    out = {}
    for name, (verb, config, keys) in asked.items():
        out[name] = [verb, f"--config={ROOT}/configs/{config}", f"--workdir={root / 'out' / name}"]
        out[name] += [f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()]
    out["plan"] += ["--topology=cpu:8", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    return out


@pytest.mark.slow
def test_a_verb_writes_below_its_workdir_alone(tmp_path):
    """About 40 s. The current folder, home, temporary files, inputs and the other verbs' folders stay as they are."""
    from cfjax.data.shapes import ShapesConfig
    from cfjax.worlds.toy import make_world

    for name in ("in", "here", "home", "tmp"):
        (tmp_path / name).mkdir()
    write_wan_folder(tmp_path / "in" / "release", shards=1)
    make_world(ShapesConfig(), channels=16, text_length=8).save(tmp_path / "in" / "world")
    (tmp_path / "in" / "prompts.txt").write_text("a red circle moving left")
    asked, recorded = commands(tmp_path), tmp_path.with_name(tmp_path.name + ".json")
    places = {"HOME": "home", "TMPDIR": "tmp"}
    env = os.environ | {name: str(tmp_path / place) for name, place in places.items()} | {"PYTHONPATH": str(ROOT)}
    env = {name: value for name, value in env.items() if not name.startswith("XDG_")}
    argv = [sys.executable, "-c", WATCHER, str(tmp_path), json.dumps(asked), str(recorded)]
    subprocess.run(argv, env=env, cwd=tmp_path / "here", check=True, stdout=subprocess.DEVNULL)
    for name, (code, changed) in json.loads(recorded.read_text()).items():
        inside = [file for file in changed if file.startswith(f"out/{name}/")]
        others = [file for file in changed if file not in inside and not file.startswith(CACHES)]
        assert (name, code, others) == (name, 0, []) and inside
