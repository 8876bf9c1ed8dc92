"""The command line: what is right is read, what is wrong is one line and exit code 2."""

import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import cfjax
from cfjax import __main__ as entry
from cfjax.core import distributed
from cfjax.core.cli import Flag, parse
from cfjax.core.errors import Temporary, UserError

ROOT = Path(__file__).parents[2]
CONFIG = '''"""A toy experiment."""
from ml_collections import ConfigDict


def get_config(arg=""):
    """Expected: a loss near 0.1."""
    if arg not in ("", "big"):
        raise ValueError(f"unknown switch {arg!r}")
    return ConfigDict(
        {
            "steps": 10,
            "optim": {"lr": 1e-3, "nesterov": True},
            "dims": (1, 2),
            "big": arg == "big",
            "colours": ("red",),
            "seeds": (),
            "layers": [1],
        }
    )
'''
FLAGS = (Flag("port", "where to listen", int, 8000), Flag("mode", "how", choices=("fast", "slow"), default="fast"))
FLAGS += (Flag("folder", "where data are", default=""),)


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "toy.py").write_text(CONFIG)
    (tmp_path / "torn.py").write_text("def get_config(:")
    return f"--config={tmp_path}/toy.py"


def read(*argv: str):
    return parse("train", list(argv), description="Trains.", extra_flags=FLAGS)


def test_config_overrides_workdir_and_flags_are_read_in_any_order(config):
    overrides = ("--config.optim.lr=2", "--config.dims=(3,4)", "--noconfig.optim.nesterov", "--config.colours=a,b")
    values, workdir, extras = read(*overrides, f"{config}:big", "--workdir=runs/a", "--port=1", "--mode=slow")
    expected = {"steps": 10, "optim": {"lr": 2.0, "nesterov": False}, "dims": (3, 4), "big": True}
    expected |= {"colours": ("a", "b"), "seeds": (), "layers": [1]}
    assert values.to_dict() == expected and values.is_locked
    assert workdir == Path("runs/a") and extras == {"port": 1, "mode": "slow", "folder": ""}
    assert read(config, "--workdir", "b")[0].optim.lr == 1e-3


def test_a_tilde_is_the_home_folder(config, monkeypatch):
    """Behind an equals sign shells leave it as it is. In the middle of a word, or in prose, it is a tilde."""
    monkeypatch.setenv("HOME", "/home/ada")
    values, workdir, extras = read(config, "--workdir=~/runs", "--config.colours=~/a,b~/c,~", "--folder=~/data")
    assert values.colours == ("/home/ada/a", "b~/c", "/home/ada") and values.is_locked
    assert workdir == Path("/home/ada/runs") and extras["folder"] == "/home/ada/data"
    argv = ["--workdir=x", "--config.run=~/wan", "--config.prompt=~/ is home", "--config.image=~ada/x.png"]
    values, _, _ = parse("generate", argv, description="", default_config="configs/generate.py")
    assert (values.run, values.prompt, values.image) == ("/home/ada/wan", "~/ is home", "~ada/x.png")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "--config is missing"),
        (("{config}",), "--workdir is missing"),
        (("{config}x",), "no file .*toy.pyx; did you mean .*toy.py"),
        (("--config=nowhere/toy.py",), "no file nowhere/toy.py"),
        (("{config}:huge",), "unknown switch 'huge'"),
        (("--config={dir}/torn.py",), "torn.py, line 1: SyntaxError"),
        (("{config}", "--config.optim.lrr=1"), "has no such key; did you mean optim.lr"),
        (("{config}", "--config.optim=1"), "is a group"),
        (("{config}", "--config.steps=soon"), "--config.steps=soon: needs a value of type int, as the default 10"),
        (("{config}", "--config.steps=1.5"), "needs a value of type int"),
        (("{config}", "--config.dims=a"), "needs a value of type tuple"),
        (
            ("{config}", "--config.colours=red green"),
            "colours=red green: .*; write --config.colours=red,green",
        ),
        (("{config}", "--config.colours=a", "--config.colours=b"), "--config.colours is given twice; write one"),
        (("{config}", "--config.dims[0]=3"), r"a tuple is set as a whole, as --config.dims=1,2"),
        (("{config}", "--noconfig.dims"), r"a tuple is set as a whole, as --config.dims=1,2"),
        (("{config}", "--config.seeds=one,two"), r"one is not of type int; write --config.seeds=1,2, or \(\) for none"),
        (("{config}", "--config.layers=3"), "a value of type list can be set in the config's file only"),
        (("{config}", "--config.steps"), "behind an equals sign"),
        (("{config}", "--prot=1"), "unknown flag --prot; did you mean --port"),
        (("{config}", "--port=x"), "--port=x"),
        (("{config}", "--mode=medium"), "fast|slow"),
        (("{config}", "extra"), "unexpected argument 'extra'"),
    ],
)
def test_what_is_wrong_is_reported_in_one_line(config, tmp_path, argv, message):
    argv = [arg.replace("{config}", config).replace("{dir}", str(tmp_path)) for arg in argv]
    if message != "--workdir is missing":
        argv.append("--workdir=x")
    with pytest.raises(UserError, match=message) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)


def test_the_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read("--config=configs/dmd.py:toy", "--workdir=x")[0].stage == "dmd"
    assert parse("generate", ["--workdir=x"], description="", default_config="configs/generate.py")[0].fps
    shipped = f"{ROOT / 'configs' / 'dmd.py'}:toy"
    with pytest.raises(UserError, match=f"{shipped} has no such key"):  # which file it was
        read("--config=configs/dmd.py:toy", "--workdir=x", "--config.stp=1")
    with pytest.raises(UserError, match=r"no file configs/dnd.py; did you mean configs/dmd.py"):
        read("--config=configs/dnd.py", "--workdir=x")
    with pytest.raises(UserError, match=r"no file dmd\.py"):  # shipped are those of configs/
        read("--config=dmd.py", "--workdir=x")


def test_the_current_folders_config_comes_before_the_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dmd.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    assert read("--config=configs/dmd.py:big", "--workdir=x")[0].big
    with pytest.raises(UserError, match=r"--config.stp: configs/dmd.py has no such key"):
        read("--config=configs/dmd.py", "--workdir=x", "--config.stp=1")
    assert read("--config=configs/consistency.py:toy", "--workdir=x")[0].stage == "consistency"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel that the project builds, unpacked."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("cfjax", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=root, check=True, capture_output=True)
    with zipfile.ZipFile(next((root / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(root / "site")
    return root / "site"


@pytest.mark.slow
def test_an_installed_package_carries_its_configs(installed, tmp_path):
    """All of the package's files and every config, and nothing of the rest, such as `configs` of everybody's name."""
    inside = {file.relative_to(installed).as_posix() for file in installed.rglob("*") if file.is_file()}
    code = [file for file in (ROOT / "cfjax").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    shipped = {f"cfjax/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").glob("*.py")}
    assert {name for name in inside if ".dist-info/" not in name} == shipped | {
        file.relative_to(ROOT).as_posix() for file in code
    }
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for asked, output in (
        (["train", "--config=configs/dmd.py:toy", "--help"], "cfjax/configs/dmd.py:toy:"),
        (["generate", "--config=configs/generate.py", "--help"], "cfjax/configs/generate.py:"),
        (["convert", "--config=configs/convert.py:dmd", "--help"], "--config.experiment.stage='dmd'"),
    ):
        command = [sys.executable, "-m", "cfjax", *asked]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert output in done.stdout and str(ROOT) not in done.stdout
    names = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "cfjax = cfjax.__main__:main" in names.read_text()


def test_a_bucket_is_no_folder_where_a_verb_needs_one(config):
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/run: .* mount the bucket"):
        read(config, "--workdir=gs://bucket/run")


def test_help_shows_purpose_flags_and_keys(config, capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help", config)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for part in (
        "usage: cfjax train",
        "Trains.",
        "--port: where to listen (default: 8000)",
        "A toy experiment.",
        "Expected: a loss near 0.1.",
        "--config.optim.lr=0.001",
    ):
        assert part in out


def test_the_entry_lists_runs_and_reports(monkeypatch, capsys):
    assert entry.main([]) == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in entry.VERBS)
    assert entry.main(["trian"]) == 2 and "unknown verb 'trian'" in capsys.readouterr().err
    assert entry.main(["--version"]) == 0 and capsys.readouterr().out == f"cfjax {cfjax.__version__}\n"

    def fail(argv):
        raise UserError(f"--steps={argv[0]}: too many,\nuse fewer")

    for verb, behaviour in (("train", fail), ("generate", lambda argv: None)):
        module = types.ModuleType(f"cfjax.{verb}")
        module.main = behaviour
        monkeypatch.setitem(sys.modules, f"cfjax.{verb}", module)
    assert entry.main(["train", "9"]) == 2
    assert capsys.readouterr().err == "cfjax train: --steps=9: too many, use fewer\n"
    assert entry.main(["generate"]) == 0


def test_what_may_pass_by_itself_has_an_exit_code_of_its_own(monkeypatch, capsys):
    """A scheduler starts such a command again, and leaves alone one with a mistake in it."""
    module = types.ModuleType("cfjax.generate")
    module.main = lambda argv: (_ for _ in ()).throw(Temporary("runs/a: the disk is full"))
    monkeypatch.setitem(sys.modules, "cfjax.generate", module)
    assert entry.main(["generate"]) == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "cfjax generate: runs/a: the disk is full\n"


@pytest.mark.parametrize(
    "environment, code",
    [
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, os.EX_TEMPFAIL),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, 2),
    ],
)
def test_a_process_that_cannot_join_may_try_again(monkeypatch, capsys, environment, code):
    def wait_for(address, timeout_seconds):
        raise TimeoutError("nothing listens there")

    monkeypatch.setattr(distributed, "_wait_for", wait_for)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert entry.main(["train"]) == code and capsys.readouterr().err.startswith("cfjax train: ")


def test_the_module_runs_without_importing_jax():
    code = "import sys, cfjax.__main__ as m; m.main(['--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
