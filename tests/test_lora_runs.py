"""Training adapters from the command line: small checkpoints, exact resuming, and what other verbs make of them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cfjax.conversion.kinds import Network
from cfjax.conversion.lora import open_loras, with_loras
from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from cfjax.core.tree import named_leaves
from cfjax.experiment import presets
from cfjax.experiment.data import Shapes
from cfjax.experiment.lora import open_network
from cfjax.experiment.networks import network_role
from cfjax.experiment.runs import open_run
from cfjax.models.wan import WanConfig
from cfjax.training.checkpoint import open_role, read_meta
from cfjax.worlds.assets import ASSETS, MODEL_FILE
from cfjax.worlds.records import config_from_record
from tests.commands import cfjax, tiny, train_stopped_and_whole

LORA = {"roles__student__lora__rank": 2, "roles__student__lora__alpha": 4.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four steps of stage 1, and again from the second: the same bits, averages too."""
    root = tmp_path_factory.mktemp("lora")
    return train_stopped_and_whole("ar_diffusion.py:toy", root, **(tiny(root) | LORA | {"steps": 4, "save_every": 2}))


def keys_of(run: Path) -> dict[str, object]:
    return {**tiny(run.parent), **LORA, "steps": 4, "save_every": 2}


def by_hand(run: Path, ema: bool) -> dict[str, np.ndarray]:
    """The teacher's weights plus alpha / rank A B."""
    below = {name: x.astype(np.float32) for name, x in load_file(ASSETS / "toy_teacher" / MODEL_FILE).items()}
    own = {name: x.read() for name, x in open_role(run, "student", ema=ema).items()}
    for name in list(below):
        layer = name.removesuffix("/kernel")
        if f"lora/{layer}/up" in own:
            below[name] = below[name] + 2.0 * own[f"lora/{layer}/down"] @ own[f"lora/{layer}/up"]
    return below


def test_a_checkpoint_holds_the_adapters_alone(run):
    step, names = run / "checkpoints" / "4", open_role(run, "student").keys()
    assert len(names) == 20 and all(name.startswith("lora/blocks/") for name in names)
    size = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    whole = 4 * sum(x.size for x in load_file(ASSETS / "toy_teacher" / MODEL_FILE).values())
    print(f"checkpoint {size} bytes, the network's weights in float32 {whole}")
    assert size < whole / 3
    record = read_meta(run)["lora"]["student"]
    assert (record["rank"], record["alpha"], record["base"]["init"]) == (2, 4.0, "toy_teacher")
    assert any(np.any(x.read()) for name, x in open_role(run, "student").items() if name.endswith("/up"))


def test_it_is_opened_as_one_network(run):
    """By every reader of runs: `open_run`, a role that starts from it, and in `convert`."""
    for ema in (True, False):
        expected, opened = by_hand(run, ema), named_leaves(open_run(str(run), ema=ema).model)
        assert opened.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(opened[name], x, rtol=1e-6, atol=1e-7, err_msg=name)
    role = network_role("student", presets.role("toy", init=str(run), init_ema=True, stages=("ar_diffusion",)))
    start = named_leaves(role.initial(Shapes((6, 4, 4, 16), (8, 64)), 0))
    for name, x in by_hand(run, True).items():
        np.testing.assert_allclose(start[name], x, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("form", ["peft", "lora"])
def test_it_goes_out_as_others_read_it(run, tmp_path, form):
    """The file, merged into the network below as any LoRA is, gives the run's own network."""
    assert cfjax("convert", "convert.py", tmp_path / "out", source=run, to=form, progress=False) == 0
    config = config_from_record(WanConfig, read_meta(run)["models"]["student"])
    below = as_lazy({name: x.astype(np.float32) for name, x in load_file(ASSETS / "toy_teacher" / MODEL_FILE).items()})
    file = tmp_path / "out" if form == "peft" else tmp_path / "out" / "lora.safetensors"
    merged = with_loras(Network("dit", config, below, "", "toy_teacher"), open_loras(str(file)))
    expected, changed = open_network(run, "student", ema=True), 0
    for name, x in expected.items():
        np.testing.assert_allclose(merged.arrays[name].read(), x.read(), rtol=1e-6, atol=1e-7, err_msg=name)
        changed += not np.array_equal(x.read(), below[name].read())
    assert changed == 10


def test_it_is_converted_as_one_network(run, tmp_path):
    assert (
        cfjax(
            "convert",
            "convert.py",
            tmp_path / "out",
            source=run,
            to="safetensors",
            parts="dit",
            progress=False,
            key="generator_ema",
        )
        == 0
    )
    weights = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    expected = by_hand(run, True)["blocks/ffn/up/kernel"][1]
    np.testing.assert_allclose(weights["blocks.1.ffn.0.weight"].T, expected, rtol=1e-6, atol=1e-7)


def mistake(capsys, verb: str, config: str, workdir: Path, **keys: object) -> str:
    capsys.readouterr()
    assert cfjax(verb, config, workdir, **keys) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_mistakes_are_one_line(run, tmp_path, capsys):
    stage, new, keys = "ar_diffusion.py:toy", tmp_path / "new", keys_of(run)
    other = mistake(capsys, "train", stage, run, **{**keys, "roles__student__lora__rank": 3})
    assert "roles.student.lora.rank 2 -> 3" in other
    elsewhere = mistake(capsys, "train", stage, run, **{**keys, "roles__student__init": tmp_path})
    assert "roles.student.init 'toy_teacher' ->" in elsewhere
    nothing = mistake(capsys, "train", stage, new, **{**keys, "roles__student__init": ""})
    assert "name the weights below it by roles.student.init" in nothing
    targets = mistake(capsys, "train", stage, new, **{**keys, "roles__student__lora__targets": "x"})
    assert "roles.student.lora.targets='x'" in targets
    frozen = {**tiny(run.parent, "critic"), "roles__real_score__lora__rank": 2}
    assert "real_score is frozen" in mistake(capsys, "train", "dmd.py:toy", new, **frozen)
    plain = mistake(capsys, "convert", "convert.py", tmp_path / "x", source=tmp_path, to="peft")
    assert "no run that trained a LoRA" in plain


def test_weights_below_that_have_changed_are_refused(run, monkeypatch):
    monkeypatch.setattr("cfjax.experiment.lora.base_hash", lambda init: "0" * 16)
    with pytest.raises(UserError, match="its LoRA was trained on other weights than 'toy_teacher' now holds"):
        open_run(str(run))

    def gone(init: str) -> str:
        raise UserError(f"{init!r}: no such run directory")

    monkeypatch.setattr("cfjax.experiment.lora.base_hash", gone)
    with pytest.raises(UserError, match="the network below its LoRA is gone"):
        open_run(str(run))
