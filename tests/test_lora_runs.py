"""Training adapters from the command line: small checkpoints, exact resuming, and what other verbs make of them."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from cfjax.compare import _run_parts
from cfjax.conversion.kinds import Network
from cfjax.conversion.lora import open_loras, with_loras
from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from cfjax.core.tree import named_leaves
from cfjax.data.shapes import PALETTE, render
from cfjax.experiment import presets
from cfjax.experiment.adapters import attached, bases_of
from cfjax.experiment.build import build
from cfjax.experiment.data import Shapes
from cfjax.experiment.lora import open_network
from cfjax.experiment.networks import network_role
from cfjax.experiment.programs import stage_memory
from cfjax.experiment.runs import open_run
from cfjax.models.lora import LoraConfig, make_lora, merged
from cfjax.models.wan import Wan, WanConfig
from cfjax.objectives.diffusion import DiffusionConfig, flow_matching
from cfjax.objectives.stage import Stage
from cfjax.training.checkpoint import open_role, read_meta
from cfjax.training.memory import RoleMemory, needed_bytes
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import init_state
from cfjax.training.step import make_update
from cfjax.worlds.assets import ASSETS, MODEL_FILE
from cfjax.worlds.records import config_from_record
from cfjax.worlds.toy import evaluation_clips
from tests.commands import cfjax, tiny, tiny_data, train_stopped_and_whole
from tests.test_configs import shipped

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
    """By every reader of runs: `open_run`, `compare`, and a role that starts from it."""
    for ema in (True, False):
        expected, opened = by_hand(run, ema), named_leaves(open_run(str(run), ema=ema).model)
        assert opened.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_allclose(opened[name], x, rtol=1e-6, atol=1e-7, err_msg=name)
    asked = ConfigDict({"run": str(run), "role": "student", "ema": True, "world": ""})
    compared = named_leaves(_run_parts(asked)["dit"]())
    for name, x in by_hand(run, True).items():
        np.testing.assert_allclose(compared[name], x, rtol=1e-6, atol=1e-7, err_msg=name)
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
    elsewhere = mistake(capsys, "train", stage, run, **{**keys, "roles__student__init_role": "critic"})
    assert "roles.student.init_role 'student' -> 'critic'" in elsewhere
    nothing = mistake(capsys, "train", stage, new, **{**keys, "roles__student__init": ""})
    assert "name the weights below it by roles.student.init" in nothing
    targets = mistake(capsys, "train", stage, new, **{**keys, "roles__student__lora__targets": "x"})
    assert "roles.student.lora.targets='x'" in targets
    frozen = {**tiny(run.parent, "critic"), "roles__real_score__lora__rank": 2}
    assert "real_score is frozen" in mistake(capsys, "train", "dmd.py:toy", new, **frozen)
    plain = mistake(capsys, "convert", "convert.py", tmp_path / "x", source=tmp_path, to="peft")
    assert "no run that trained a LoRA" in plain


@pytest.mark.slow
def test_its_trajectories_train_adapters_beside_it(run, tmp_path):
    """Stage 2a: pairs of a teacher that is a LoRA itself, and a student whose adapters start from it, merged."""
    keys = {**tiny_data(tmp_path), "roles__teacher__init": run, "pairs": 8, "objective__solver_steps": 4}
    assert cfjax("precompute", "ode_pairs.py:toy", tmp_path / "none", **keys) == 0
    keys = {**tiny(tmp_path), **LORA, "optim__student__name": "adamw", "roles__student__init": run}
    assert cfjax("train", "ode_regression.py:toy", tmp_path / "ode", **keys) == 0
    own = {name: x.read() for name, x in open_role(tmp_path / "ode", "student").items()}
    assert len(own) == 20 and all(map(np.any, own.values()))
    assert read_meta(tmp_path / "ode")["lora"]["student"]["base"]["init"] == str(run)


def test_weights_below_that_have_changed_are_refused(run, monkeypatch):
    monkeypatch.setattr("cfjax.experiment.lora.base_hash", lambda init: "0" * 16)
    with pytest.raises(UserError, match="its LoRA was trained on other weights than 'toy_teacher' now holds"):
        open_run(str(run))

    def gone(init: str) -> str:
        raise UserError(f"{init!r}: no such run directory")

    monkeypatch.setattr("cfjax.experiment.lora.base_hash", gone)
    with pytest.raises(UserError, match="the network below its LoRA is gone"):
        open_run(str(run))


def test_the_plan_shows_what_a_14b_student_saves():
    """On one device, from shapes alone: gradients, moments and averages are the adapters'; rank 0 changes nothing."""
    shapes = Shapes((21, 60, 104, 16), (512, 4096))

    def rows(**keys: object) -> dict[str, RoleMemory]:
        c = shipped("ar_diffusion", roles__student__preset="wan_14b", **keys)
        return {row.role: row for row in stage_memory(build(c), shapes)}

    whole = rows()["student"]
    adapters = rows(roles__student__lora__rank=256, roles__student__storage="bfloat16")
    table = needed_bytes([whole]), needed_bytes(list(adapters.values()))
    print("GiB before activations, whole and with rank 256:", *(f"{size / 2**30:.1f}" for size in table))
    assert whole.parameters == adapters["student_base"].parameters == 14_288_491_584
    number = 40 * 256 * (8 * 2 * 5120 + 2 * (5120 + 13824))
    assert adapters["student"].parameters == number and adapters["student"].gradients == 4 * number
    assert 8 * number <= adapters["student"].optimizer < 8 * number + 100  # two moments, and a counter
    assert adapters["student_base"].optimizer == adapters["student_base"].gradients == 0
    assert table[0] > 16 * whole.parameters and table[1] < table[0] / 4.5


def test_a_critic_beside_its_teacher_holds_no_second_copy():
    """The same weights, stored and used in the same way, are one frozen role; others are two."""
    ranks = {"roles__student__lora__rank": 2, "roles__critic__lora__rank": 2}
    e = build(shipped("dmd:toy", **ranks))
    assert bases_of(e.roles) == {"student": "student_base", "critic": "real_score"}
    assert e.frozen == ["real_score", "student_base"]
    apart = build(shipped("dmd:toy", **ranks, roles__real_score__storage="int8"))
    assert bases_of(apart.roles)["critic"] == "critic_base"


KEYS = {"roles__{}__lora__rank": 2, "roles__{}__init": "toy_teacher", "roles__{}__init_stages": "('bidirectional',)"}
MESH = {"mesh__fsdp": 2, "mesh__tensor": 4, "data__batch_size": 8}
STAGES = {
    "consistency": (("student",), {"objective__solver_steps": 4, "sample_clips": 2} | MESH, "teacher"),
    "dmd": (("student", "critic"), {"cadence__student": 1}, "real_score"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_adapters(tmp_path, capsys, stage):
    """Two steps, and each role's adapters have moved: a critic's; on a mesh, with an average that is sampled."""
    roles, more, frozen = STAGES[stage]
    keys = {name.format(role): value for role in roles for name, value in KEYS.items()}
    keys |= {name.format(frozen): value for name, value in list(KEYS.items())[1:]}
    for role in (*roles, frozen):
        keys |= {f"roles__{role}__remat": "none", f"roles__{role}__init_ema": False}
    assert cfjax("train", f"{stage}.py:toy", tmp_path / "run", **(tiny(tmp_path) | keys | more)) == 0
    assert "guard: off" not in capsys.readouterr().out
    assert set(read_meta(tmp_path / "run")["lora"]) == set(roles)
    for role in roles:
        own = {name: x.read() for name, x in open_role(tmp_path / "run", role).items()}
        assert all(name.startswith("lora/blocks/") for name in own) and all(map(np.any, own.values()))
    assert open_run(str(tmp_path / "run")).adapted


@pytest.mark.slow
def test_the_toy_learns_a_new_colour():
    """Clips of red shapes drawn in white, which the teacher never saw; adapters of rank 4 are enough to learn it."""
    run = open_run("toy_teacher")
    clips = [clip for clip in evaluation_clips(run.world.shapes, 120) if "red" in clip["caption"]]
    white = [{**clip["factors"], "colour": np.array(["white"])} for clip in clips]
    video = np.stack([render(factors, run.world.shapes) for factors in white])
    captions = [clip["caption"] for clip in clips]
    data = np.asarray(run.world.codec.encode(jnp.asarray(video))), run.world.encode_prompts(captions)
    start = make_lora(run.model.config, LoraConfig(4, 4.0), jax.random.key(0))
    below, loss = {"student": "student_base"}, flow_matching(DiffusionConfig(weighting="uniform"))
    stage = Stage("lora", {"student": lambda models, batch, key: loss(attached(models, below), batch, key)})
    tx = make_optimizer(OptimizerConfig(lr=0.01, b2=0.99, warmup=5, schedule="wsd"), steps=50)
    state, update = init_state(stage, {"student": start}, {"student": tx}, 0), make_update(stage, "student", tx)
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.integers(0, len(clips), 8)
        batch = {"latents_BFHWC": data[0][rows], "text_BSE": data[1][rows]}
        batch["negative_text_SE"] = run.world.negative_text_SE()
        state, metrics = update(state, {"student_base": run.model}, batch)
    sampler = replace(run.sampler, steps=6)

    def colour(model: Wan, word: str) -> np.ndarray:
        """RGB of what differs most from the background, mean over clips of a shape in this colour."""
        some = [f"a {word} {shape} moving {way}" for shape in ("circle", "square") for way in ("left", "up")]
        made = replace(run, model=model, sampler=sampler).sample(some, seed=1)
        apart = np.abs(made - np.asarray(run.world.shapes.background)).sum(-1)
        return made[apart > 0.8 * apart.max()].mean(0)

    learned = merged(run.model, state.params["student"])
    before, after, blue = colour(run.model, "red"), colour(learned, "red"), colour(learned, "blue")
    distance = lambda one, name: float(np.linalg.norm(one - np.asarray(PALETTE[name])))
    print(
        f"loss {float(metrics['loss']):.3f}; red before {before.round(2)}, after {after.round(2)}; blue {blue.round(2)}"
    )
    assert distance(before, "red") < distance(before, "white")
    assert distance(after, "white") < 0.6 < 1.2 < distance(after, "red")
