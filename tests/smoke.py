"""An installed cfjax at the lowest versions that setup.cfg allows, from a folder not its checkout, without PyTorch.

    bash launch/lowest.sh

The file is no part of the test suite (its name does not begin with test_). What it needs of the checkout is the writers
of small files in tests/; cfjax itself is the installed one.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import cfjax
from cfjax.__main__ import main

TESTS = Path(__file__).parent
TORCH = ("torch", "diffusers", "transformers")  # what the extras bring
QUIET = {"progress": False}
FEW = {**QUIET, "steps": 2, "log_every": 1, "sample_clips": 0, "guard.enabled": False, "roles.student.remat": "none"}
TOY = {"data.assets": "", "data.clips": 64, "data.batch_size": 4, "data.shapes.frames": 6}
SIZES = {**QUIET, "frames": 9, "height": 16, "width": 32, "latent_shape": "3,4,4,16", "text_dtype": "float32"}
CAPTION = "a red circle moving left"


def helper(name: str) -> ModuleType:
    """A file of tests/ that writes inputs."""
    spec = importlib.util.spec_from_file_location(f"helper_{Path(name).stem}", TESTS / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(verb: str, config: str, workdir: Path | None = None, **keys: object) -> None:
    """One command that must succeed; `a__b=1` is --config.a.b=1."""
    place = [f"--workdir={workdir}"] if workdir else []
    values = [f"--config.{name.replace('__', '.')}={value}" for name, value in keys.items()]
    assert main([verb, f"--config=configs/{config}", *place, *values]) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def world(root: Path) -> Path:
    """A toy world: a fitted patch codec and a text encoder of words."""
    from cfjax.data.shapes import ShapesConfig
    from cfjax.worlds.toy import make_world

    make_world(ShapesConfig(), channels=16, text_length=8).save(root / "world")
    return root / "world"


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """Two steps of the toy's first stage, then two more."""
    few = {name.replace(".", "__"): value for name, value in (FEW | TOY).items()} | {"data__path": root / "data"}
    start = {"roles__student__init": "toy_teacher", "sampler__steps": 2}
    run("train", "ar_diffusion.py:toy", root / "ar", **few, **start)
    run("train", "ar_diffusion.py:toy", root / "ar", **{**few, "steps": 4}, **start)
    return root / "ar"


def test_it_is_the_installed_package_and_its_script_runs(tmp_path):
    assert TESTS.parent not in Path(cfjax.__file__).parents or ".venv" in cfjax.__file__
    assert not any(importlib.util.find_spec(name) for name in TORCH)
    script = Path(sys.executable).with_name("cfjax")
    asked = [script, "train", "--config=configs/dmd.py:toy", "--help"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(Path(cfjax.__file__).parent / "configs" / "dmd.py") in done.stdout


def test_every_lower_bound_is_what_is_installed():
    """All but those few that another package's newest release lifts. Newer Pythons need newer ones of more."""
    loose, count = {}, 0
    for line in importlib.metadata.requires("cfjax") or []:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            bounds = [spec.version for spec in wanted.specifier if spec.operator == ">="]
            assert len(bounds) == 1, f"{line}: needs a lower bound"
            count += 1
            here = importlib.metadata.version(wanted.name)
            if Version(here) != Version(bounds[0]):
                loose[wanted.name] = f"{bounds[0]} in setup.cfg, {here} installed"
    print(f"lifted by others: {loose or 'none'}")
    assert count > 20 and (len(loose) <= 3 or sys.version_info >= (3, 12)), loose


def test_every_module_is_imported():
    missing = {}
    for module in pkgutil.walk_packages(cfjax.__path__, "cfjax."):
        if module.name.startswith("cfjax.configs") or module.name == "cfjax.__main__":
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name
    assert set(missing.values()) <= set(TORCH)
    assert all(name.startswith("cfjax.comparison.") for name in missing), missing


def test_a_run_trains_goes_on_and_is_drawn(trained: Path):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "student/loss" in row] == [0, 1, 2, 3]
    assert all(np.isfinite(row["student/loss"]) for row in rows if "student/loss" in row)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(EventAccumulator(str(trained / "events")).Reload().Scalars("1_training/student/loss")) == 4


def test_a_run_generates_and_is_exported(trained: Path, root: Path):
    run("generate", "generate.py", root / "videos", run=trained, prompt=CAPTION, seeds="3,4", **QUIET)
    assert len(list((root / "videos").glob("*.mp4"))) == 2
    run("export", "export.py", root / "exported", run=trained, clips=60)
    assert (root / "exported" / "curves.svg").stat().st_size > 1000


def test_a_run_is_served_and_played(trained: Path, root: Path):
    """By a process of its own, which a signal ends."""
    asked = [f"--config.run={trained}", "--config.port=0", "--config.sessions=1", "--config.memories=infinity_rope"]
    script = Path(sys.executable).with_name("cfjax")
    with subprocess.Popen([script, "serve", *asked], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = next(line.split()[1] for line in server.stdout if line.startswith("ready: "))
        run("play", "play.py", root / "played", url=address.replace("http", "ws"), prompt=CAPTION, blocks=2)
        server.terminate()
        assert server.wait(60) == 0
    assert (root / "played" / "video.mp4").stat().st_size > 1000


def test_clips_prompts_and_lmdbs_become_sets(world: Path, root: Path):
    videos, lmdbs = helper("data/videos.py"), helper("data/lmdbs.py")
    for name in ("a.mp4", "b.webm", "c.gif"):
        file = videos.write_video(root / "clips" / name, 12)
        file.with_suffix(".txt").write_text(f"{CAPTION}\n")
    prompts = root / "prompts.txt"
    prompts.write_text(f"{CAPTION}\n")
    lmdb = lmdbs.write_lmdb(root / "lmdb", lmdbs.rows_of(2, 6), [CAPTION, "a blue square moving up"])
    for source, count in ((root / "clips", 3), (prompts, 1), (lmdb, 2)):
        output = root / f"{source.stem}_set"
        run("precompute", "precompute.py", source=source, world=world, output=output, **SIZES)
        assert json.loads((output / "report.json").read_text())["records"] == count
        assert (
            main(["precompute", "--config=configs/precompute.py", f"--check={output}", "--config.progress=False"]) == 0
        )


def test_weights_are_converted_there_and_back(world: Path, root: Path):
    from safetensors.numpy import load_file

    synthetic = helper("synthetic.py")
    release = root / "release"
    release.mkdir()
    synthetic.write_config(release)
    weights = synthetic.dit_weights()
    synthetic.save_safetensors(release, "diffusion_pytorch_model", weights, 2)
    run("convert", "convert.py", root / "converted", source=release, parts="dit", latents="3,4,4", **QUIET)
    run("convert", "convert.py", root / "back", source=root / "converted", parts="dit", to="safetensors", **QUIET)
    back = load_file(root / "back" / "diffusion_pytorch_model.safetensors")
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_bfloat16_safetensors(tmp_path):
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    from cfjax.core.tensor_files import save_tensors

    save_tensors(tmp_path / "x.safetensors", {"x": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3).T})
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_sentencepiece_model_is_read(tmp_path):
    import sentencepiece

    from cfjax.models.tokenizer import load_tokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CAPTION, "a blue square moves up"] * 3), model_prefix=str(tmp_path / "spiece"),
        model_type="unigram", vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        minloglevel=2,
    )  # fmt: skip
    ids_BS, mask_BS = load_tokenizer(tmp_path).encode([f"{CAPTION} </s>"], 64)
    assert ids_BS[0, mask_BS[0]].tolist()[-2:] == [1, 1] and 3 not in ids_BS


def test_tables_in_parquet(world: Path, tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"caption": CAPTION, "frames": 81}] * 5), tmp_path / "x.parquet")
    run("precompute", "precompute.py", source=tmp_path / "x.parquet", world=world, output=tmp_path / "set", **SIZES)
    assert json.loads((tmp_path / "set" / "report.json").read_text())["records"] == 5


def test_the_studys_statistics():
    from cfjax.studies.statistics import energy_distance, summary, welch

    rng = np.random.default_rng(0)
    a_BF, b_BF = rng.standard_normal((2, 100, 3))
    assert abs(energy_distance(a_BF, b_BF)) < 0.3 < energy_distance(a_BF, b_BF + 2)
    assert welch([1.0, 2.0, 3.0], [11.0, 12.0, 13.0]) < 1e-2 and summary([1.0, 2.0, 3.0])["mean"] == 2.0
