"""Every shipped config builds, and the toy's whole chain runs from the command line: train, pairs, videos, figures."""

import importlib.util
import inspect
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cfjax.__main__ import main
from cfjax.core.cli import EMPTY, keys_of
from cfjax.core.errors import UserError
from cfjax.core.tuples import parse_tuple
from cfjax.data.sets import open_dataset
from cfjax.experiment.build import build
from cfjax.experiment.data import Shapes, toy_shapes
from cfjax.experiment.networks import networks_in, roles_of
from cfjax.experiment.notes import differing_levels, idle_devices, idle_windows
from cfjax.experiment.presets import STEERED
from cfjax.experiment.reference import REFERENCE, apply_reference
from cfjax.experiment.runs import open_run
from cfjax.experiment.stage import blocks_of, dmd_config, optimizers_of, sampler_of, stage_of
from cfjax.objectives.ode_regression import PairsConfig
from cfjax.training.checkpoint import read_meta
from tests.commands import ROOT, cfjax, tiny, tiny_data
from tests.compiled import compiled

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def get_config(path: Path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def documented(path: Path) -> list[str]:
    """The switches that a config's `get_config` documents, and some of them together."""
    make = get_config(path)
    if not inspect.signature(make).parameters:
        return [""]
    words = re.findall(r"`(\w+)`", inspect.getdoc(make))
    assert words, f"{path.name}: the docstring of get_config names its switches"
    return ["", *words, *(",".join(pair) for pair in itertools.permutations(words, 2))]


CASES = [(path, arg) for path in CONFIGS for arg in documented(path)]


@pytest.mark.parametrize(("path", "arg"), CASES, ids=[f"{path.stem}:{arg}" for path, arg in CASES])
def test_every_documented_config_builds(path, arg):
    make = get_config(path)
    try:
        c = make(arg) if inspect.signature(make).parameters else make()
    except UserError as error:
        assert "exclude each other" in str(error)
        return
    if "stage" not in c:
        return
    toy, mini, framewise = (word in arg.split(",") for word in ("toy", "mini", "framewise"))
    toy |= not STEERED.keys().isdisjoint(arg.split(","))  # which are of the toy alone
    whole = (12 if toy else 9 if mini else 21) if c.stage == "dmd" and "bidirectional" in arg.split(",") else 0
    assert blocks_of(c).frames == (whole or (1 if framewise else 3))
    for role in networks_in(roles_of(c)).values():
        size = role.network(Shapes((21, 60, 104, 16), (512, 64 if toy else 4096)))
        assert size.num_layers == (4 if toy else 2 if mini else 40 if role.preset == "wan_14b" else 30)
    if c.stage == "ode_pairs":
        values = c.objective.to_dict()
        assert values.pop("method") == ("bidirectional" if "bidirectional" in arg.split(",") else "full")
        assert PairsConfig(**values).kept() == (0, 12, 24, 36)
        return
    stage = stage_of(c)
    assert stage.name == path.stem and set(optimizers_of(c, stage)) == set(stage.losses) <= set(c.roles)
    assert sampler_of(c) and not differing_levels(build(c))
    if toy:
        assert toy_shapes(c).frames % blocks_of(c).frames == 0


def tuples_of(path: Path, arg: str) -> dict[str, tuple]:
    """The tuples of a config by their keys; none of words that exclude each other."""
    make = get_config(path)
    try:
        c = make(arg) if inspect.signature(make).parameters else make()
    except UserError:
        return {}
    return {key: value for key, value in keys_of(c).items() if isinstance(value, tuple)}


def test_every_tuple_can_be_given_on_the_command_line():
    """As Python prints it, and bare; the kind of every empty one is known, and that of the same key where it is not."""
    for path, arg in CASES:
        for key, value in tuples_of(path, arg).items():
            name = key.rpartition(".")[2]
            if not value:
                assert name in EMPTY, f"{path.stem}:{arg}: {key} is empty; tell core.cli.EMPTY what it holds"
            elif isinstance(value[0], (str, int, float)):
                assert type(value[0]) is EMPTY.get(name, type(value[0]))
                assert (
                    parse_tuple(key, str(value), value) == parse_tuple(key, ",".join(map(str, value)), value) == value
                )


def test_few_step_variants_change_the_objective_and_the_sampler():
    make = get_config(ROOT / "configs" / "dmd.py")
    four = (1000, 750, 500, 250)
    for arg, steps, first in [("", four, ()), ("2step", (1000, 500), four), ("framewise,1step", (1000,), four)]:
        c = make(arg)
        assert (c.objective.steps, c.objective.first_steps) == (steps, first)
        assert (c.sampler.steps, c.sampler.first_steps) == (steps, first)
    for alone in ("bidirectional", "causvid"):  # its one block is the first; its blocks do not follow each other
        c = make(f"{alone},2step")
        assert c.objective.steps == c.sampler.steps == (1000, 500)
        assert c.objective.first_steps == c.sampler.first_steps == ()
    starts = itertools.combinations(("from_ar", "from_cd", "causvid", "bidirectional"), 2)
    for words in ("2step,1step", "bidirectional,framewise", "streaming,long", "streaming,sid", *map(",".join, starts)):
        with pytest.raises(UserError, match="exclude each other"):
            make(words)


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("", ("ode", False, ("ode_regression",))),
        ("from_ar", ("ar", False, ("ar_diffusion",))),
        ("from_cd", ("cd", True, ("consistency",))),
        ("causvid", ("sf_ode", False, ("ode_regression",))),
        ("streaming", ("dmd", True, ("dmd",))),
    ],
)
def test_what_stage_three_starts_from(words, start):
    """Consistency distillation's student is its average, at both scales, and `from_cd` alone takes it; the toy's runs
    all keep an average.
    """
    init, averaged, stages = start
    for scale, folder, average in (("", "runs", averaged), ("toy", "runs/toy", True)):
        student = get_config(ROOT / "configs" / "dmd.py")(",".join((scale, words))).roles.student
        assert (student.init, student.init_ema, student.init_stages) == (f"{folder}/{init}", average, stages)


def test_blocks_may_draw_exit_steps_of_their_own():
    c = get_config(ROOT / "configs" / "dmd.py")("")
    assert dmd_config(c).self_forcing.same_exit  # as in the reference
    c.objective.same_exit = False
    assert not dmd_config(c).self_forcing.same_exit


def test_a_student_that_would_sample_at_other_levels_is_reported():
    c = get_config(ROOT / "configs" / "dmd.py")("")
    c.objective.steps = (1000, 500)
    assert "trains at {'steps': (1000, 500)" in differing_levels(build(c))
    assert "has {'steps': (1000, 750, 500, 250)" in differing_levels(build(c))


def test_accelerators_without_work_are_reported():
    """One place of a mesh, as a config has it; and none are told on CPUs, whose devices are simulated ones."""
    c = get_config(ROOT / "configs" / "dmd.py")("toy")
    alone = build(c).make_mesh()
    gpus, cpus = ([SimpleNamespace(platform=platform)] * 8 for platform in ("gpu", "cpu"))
    assert "8 devices are here; --config.mesh.fsdp=8" in idle_devices(alone, gpus)
    assert idle_devices(alone, gpus[:1]) == idle_devices(alone, cpus) == ""
    c.mesh.fsdp = 8
    assert idle_devices(build(c).make_mesh(), gpus) == ""


def test_two_scores_are_needed_to_compare_them():
    c = get_config(ROOT / "configs" / "dmd.py")("toy,gan")
    c.objective.matching = "dmd"
    with pytest.raises(UserError, match=r"roles\.real_score is missing"):
        stage_of(c)


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if inspect.signature(get_config(p)).parameters], ids=lambda p: p.stem
)
def test_a_misspelt_switch_is_a_mistake(path):
    with pytest.raises(UserError, match="unknown switch 'toi'; use "):
        get_config(path)("toi")


def shipped(config: str, **keys: object):
    """`NAME.py:arg` of configs/ with keys set, `a__b=1` for a.b."""
    name, _, arg = config.partition(":")
    c = get_config(ROOT / "configs" / f"{name}.py")(arg)
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return c


def test_the_reference_switch_sets_quirks_and_numbers(capsys):
    """`--config.reference=True`, in the toy as at Wan's size; without it each quirk is off."""
    for name in ("bidirectional", "ar_diffusion", "consistency"):
        off, on = shipped(name), apply_reference(shipped(name, reference=True))
        assert (off.objective.bf16_timesteps, on.objective.bf16_timesteps) == (False, True)  # Q1, Q2
    off, on = (dmd_config(apply_reference(shipped("dmd", reference=value))) for value in (False, True))
    quirks = [(o.score_table_shift, o.self_forcing.context_noise, o.self_forcing.kv_gradient) for o in (off, on)]
    assert quirks[0] == (None, 0.0, "detached")
    assert quirks[1] == (8.0, pytest.approx(0.00498008, abs=1e-8), "straight_through")  # Q3, Q4, Q6
    shifted = apply_reference(shipped("dmd", reference=True, objective__shift=8.0))
    assert shifted.objective.context_noise == pytest.approx(0.00794439, abs=1e-8)  # the last level of its own table
    capsys.readouterr()
    for name, stage in REFERENCE.items():
        toy, full = (apply_reference(shipped(name + arg, reference=True)) for arg in (":toy", ""))
        known = keys_of(full)
        assert {key: keys_of(toy)[key] for key in stage if key in known} == {k: known[k] for k in stage if k in known}
    message = capsys.readouterr().out.splitlines()
    assert len(message) == 2 * len(REFERENCE) and all(line.startswith("reference: ") for line in message)
    assert "reference: objective.guidance 3.0 -> 6" in message  # Q8, the toy's pairs
    assert "reference: ema.student.start 0 -> 2000000000" in message
    assert (
        shipped("dmd:toy").ema.student.to_dict()
        != apply_reference(shipped("dmd:toy", reference=True)).ema.student.to_dict()
    )


def test_the_reference_switch_leaves_what_a_stage_does_not_read():
    gan, causvid = (
        apply_reference(shipped(f"dmd:toy,{word}", reference=True)).objective for word in ("gan", "causvid")
    )
    assert (gan.real_guidance, gan.kv_gradient) == (1.0, "straight_through")
    assert (causvid.real_guidance, causvid.kv_gradient) == (3.0, "detached")


@pytest.mark.parametrize(
    ("verb", "config", "key", "value"),
    [
        ("train", "dmd.py:toy", "objective__kv_gradient", "detached"),
        ("train", "dmd.py", "ema__student__start", 0),
        ("plan", "consistency.py:toy", "objective__boundary", True),
        ("precompute", "ode_pairs.py:toy", "objective__guidance", 3.0),
    ],
)
def test_the_reference_switch_does_not_overrule_the_command_line(tmp_path, capsys, verb, config, key, value):
    flags = ["--topology=cpu:1"] if verb == "plan" else []
    given = [f"--config.{key.replace('__', '.')}={value}", "--config.reference=True"]
    assert main([verb, f"--config={ROOT}/configs/{config}", f"--workdir={tmp_path}", *given, *flags]) == 2
    assert f"{given[0]}: --config.reference=True sets it to " in one_line(capsys)


def test_a_number_written_short_is_the_references(capsys):
    c = apply_reference(shipped("dmd", reference=True, objective__context_noise=0.00498), {"objective.context_noise"})
    assert c.objective.context_noise == pytest.approx(0.00498008, abs=1e-8)


@pytest.mark.parametrize(
    ("config", "key", "value", "message"),
    [
        ("dmd", "cadence__student", 0, "use 1"),
        ("dmd", "cadence__student", -5, "use 1"),
        ("dmd", "ema__student__decay", 1.0, "less than 1"),
        ("dmd", "ema__student__decay", -0.1, "less than 1"),
        ("dmd", "ema__student__start", -1, "0 or later"),
        ("dmd", "objective__score_min", 0.0, "sigmas above 0"),
        ("dmd", "objective__score_shift", 0.0, "more than 0"),
        ("dmd", "objective__score_table_shift", -8.0, "more than 0"),
        ("dmd", "objective__steps", (1000, 757, 522, 0), "leave that 0 out"),
        ("dmd", "objective__first_steps", (1000, 0), "leave that 0 out"),
        ("ode_regression", "objective__steps", (1000, 757, 522, 0), "leave the trailing 0 out"),
        ("ode_regression", "objective__steps", (500, 1000), "the noisiest first"),
        ("dmd", "sampler__steps", (1000, 757, 522, 0), "leave the trailing 0 out"),
        ("dmd:toy", "optim__student__lr", -1e-3, "more than 0"),
        ("ar_diffusion:toy", "optim__student__adam_lr", -1e-3, "more than 0"),
        ("dmd", "optim__critic__name", "sgd", "use one of adamw"),
        ("dmd", "blocks__sink", -1, "or more"),
        ("dmd", "blocks__window", -21, "or more"),
    ],
)
def test_a_value_that_cannot_be_is_reported_by_its_key(config, key, value, message):
    c = shipped(config, **{key: value})
    with pytest.raises(UserError, match=rf"^{key.replace('__', '[.]')}\b.*{message}"):
        optimizers_of(c, stage_of(c))
        sampler_of(c)


def test_a_window_longer_than_its_videos_is_reported():
    assert (
        idle_windows(build(shipped("dmd:long")), 21) == idle_windows(build(shipped("dmd", blocks__window=21)), 21) == []
    )
    (line,) = idle_windows(build(shipped("ar_diffusion", blocks__window=24)), 21)
    assert "blocks.window=24 hides nothing: training videos have 21 latent frames" in line
    assert idle_windows(build(shipped("dmd:long", blocks__window=24)), 21) == []  # of rollouts of 27
    (line,) = idle_windows(build(shipped("dmd:long", objective__window_frames=24)), 21)
    assert "objective.window_frames=24 shows the scores more than the dataset's clips of 21" in line


# ---- the chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """Teacher, AR teacher, pairs, ODE, consistency and DMD students under one folder."""
    root = tmp_path_factory.mktemp("chain")

    def train(config: str, run: str, **keys: object) -> None:
        with compiled("update") as found:
            assert cfjax("train", config, root / run, **keys) == 0
        (root / run / "compiled").write_text(str(len(found)))

    few = {**tiny(root), "optim__student__name": "adamw"}
    train("bidirectional.py:toy", "teacher", **tiny(root), sampler__steps=2)
    init = {"roles__student__init": root / "teacher", "roles__student__init_ema": True}
    train("ar_diffusion.py:toy", "ar", **few, **init, sampler__steps=2)
    assert cfjax("precompute", "ode_pairs.py:toy", root / "none", **pairs_keys(root)) == 0
    init = {"roles__student__init": root / "ar"}
    train("ode_regression.py:toy", "ode", **{**few, "sample_clips": 2}, **init)
    teacher = {"roles__teacher__init": root / "ar", "roles__teacher__remat": "none", "objective__solver_steps": 4}
    train("consistency.py:toy", "cd", **few, **init, **teacher)
    train("dmd.py:toy", "dmd", **dmd_keys(root))
    return root


def dmd_keys(root: Path) -> dict[str, object]:
    inits = {"student": "ode", "critic": "teacher", "real_score": "teacher"}
    roles = {f"roles__{role}__init": root / run for role, run in inits.items()}
    roles |= {f"roles__{role}__remat": "none" for role in inits}
    guard = {"guard__enabled": True, "guard__prompts": 2, "guard__seeds": 2}
    return {**tiny(root), **guard, **roles}


def curves(run: Path) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            out.setdefault(name, []).append(value)
    return out


@pytest.mark.parametrize(
    ("run", "stage", "roles"),
    [
        ("teacher", "bidirectional", {"student": 2}),
        ("ar", "ar_diffusion", {"student": 2}),
        ("ode", "ode_regression", {"student": 2}),
        ("cd", "consistency", {"student": 2}),
        ("dmd", "dmd", {"student": 1, "critic": 2}),
    ],
)
def test_every_stage_trains_two_steps(chain, run, stage, roles):
    meta, seen = read_meta(chain / run), curves(chain / run)
    # Once each, though weights that come from a file lie on a device and fresh optimisers on none in particular.
    assert int((chain / run / "compiled").read_text()) == len(roles)
    assert (meta["stage"], meta["step"], meta["latent_shape"]) == (stage, 2, [6, 4, 4, 16])
    for role, updates in roles.items():
        assert len(seen[f"{role}/loss"]) == updates and np.isfinite(seen[f"{role}/loss"]).all()
    assert ("samples/all_correct" in seen) == (run == "ode") and ("guard/motion" in seen) == (run == "dmd")


def test_the_guard_watches_distribution_matching(chain):
    """Curves in metrics.jsonl and TensorBoard, against real clips of the same prompts, which are kept beside them."""
    seen = {name: values for name, values in curves(chain / "dmd").items() if name.startswith("guard/")}
    wanted = ("motion", "frozen", "luma", "luma_drift", "saturation", "saturation_drift", "sharpness", "diversity")
    assert {f"guard/{name}" for name in (*wanted, "seam", "warnings", "seconds")} <= seen.keys()
    assert all(len(values) == 1 and np.isfinite(values).all() for values in seen.values())
    events = EventAccumulator(str(chain / "dmd" / "events")).Reload()
    assert events.Scalars("3_guard/motion")[0].step == 2 and "2_samples/videos" in events.Tags()["images"]
    kept = json.loads((chain / "dmd" / "guard.json").read_text())
    assert kept["baseline"]["origin"] == "real clips" and len(kept["prompts"]) == 4
    assert 2.0 < kept["baseline"]["values"]["motion"] < 6.0


@pytest.mark.slow
def test_a_mesh_trains_the_same_run(chain, tmp_path):
    """Eight devices, each axis that is in use at two, from the command line: the curves of one device."""
    init = {"roles__student__init": chain / "teacher", "roles__student__init_ema": True}
    mesh = {"mesh__fsdp": 2, "mesh__context": 2, "mesh__tensor": 2}
    keys = {**tiny(chain), "optim__student__name": "adamw", **init, **mesh}
    assert cfjax("train", "ar_diffusion.py:toy", tmp_path, **keys) == 0
    for name in ("student/loss", "student/grad_norm"):
        np.testing.assert_allclose(curves(tmp_path)[name], curves(chain / "ar")[name], rtol=1e-4)


def test_pairs_hold_noise_first_and_the_students_levels(chain):
    pairs = open_dataset(chain / "data" / "pairs")
    assert len(pairs) == 8 and pairs.trajectory_points == 5
    noise = np.stack([pairs[i]["trajectory_JFHWC"][0] for i in range(8)])
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1.0, abs=0.05)
    np.testing.assert_array_equal(pairs[3]["latents_FHWC"], open_dataset(chain / "data" / "clips")[3]["latents_FHWC"])


def test_generate_writes_videos(chain, tmp_path):
    assert cfjax("generate", "generate.py", tmp_path, run=chain / "dmd", videos=2) == 0
    assert len(list(tmp_path.glob("*_a_red_circle_moving_left_seed?.mp4"))) == 2
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["network_calls"] == 9 and len(settings["timings"]["seconds_per_block"]) == 2


def test_evaluate_writes_figures(chain, tmp_path):
    assert cfjax("evaluate", "evaluate.py", tmp_path, run=chain / "dmd", clips=4, batch=4) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["stage"] == "dmd" and record["step"] == 2 and len(record["captions"]) == 4
    assert 0.0 <= record["summary"]["all_correct"] <= 1.0


def test_a_run_needs_its_world_not_its_clips(chain):
    """Opening a run for generation leaves its dataset alone: it may be gone, or be on another machine."""
    clips, away = chain / "data" / "clips", chain / "away"
    clips.rename(away)
    try:
        assert open_run(str(chain / "dmd")).latent_shape == (6, 4, 4, 16)
        assert not clips.exists()
    finally:
        away.rename(clips)


def test_a_finished_run_returns_at_once(chain, capsys):
    before = (chain / "dmd" / "metrics.jsonl").read_bytes()
    assert cfjax("train", "dmd.py:toy", chain / "dmd", **dmd_keys(chain)) == 0
    assert "step 2 of 2 is done already" in capsys.readouterr().out
    assert (chain / "dmd" / "metrics.jsonl").read_bytes() == before


def pairs_keys(root: Path) -> dict[str, object]:
    return {**tiny_data(root), "roles__teacher__init": root / "ar", "pairs": 8, "objective__solver_steps": 4}


def test_existing_pairs_are_left_alone(chain, capsys):
    """However the job would be cut; but pairs of other settings are none of this command's."""
    manifest = chain / "data" / "pairs" / "manifest.json"
    before = manifest.read_bytes()
    for cut in ({}, {"part_items": 2, "shard": 1, "shards": 2, "data__batch_size": 2}):
        assert cfjax("precompute", "ode_pairs.py:toy", chain / "none", **{**pairs_keys(chain), **cut}) == 0
        assert "exists already" in capsys.readouterr().out
    for words, keys, message in [
        ("toy,framewise", {}, "blocks.frames=3, not 1"),
        ("toy,bidirectional", {"output": "pairs"}, "objective.method='full', not 'bidirectional'"),
        ("toy", {"roles__teacher__init": chain / "ode"}, f"roles.teacher.init='{chain / 'ar'}', not "),
        ("toy", {"pairs": 9}, "pairs=8, not 9"),
    ]:
        assert cfjax("precompute", f"ode_pairs.py:{words}", chain / "none", **{**pairs_keys(chain), **keys}) == 2
        error = one_line(capsys)
        assert f"pairs was made with {message}" in error and "another --config.output, or remove it" in error
    for seed in (0, 1):  # a teacher of another stage: the first refusal leaves no job that would refuse the second
        keys = {**pairs_keys(chain), "roles__teacher__init": chain / "dmd", "output": "refused", "seed": seed}
        assert cfjax("precompute", "ode_pairs.py:toy", chain / "none", **keys) == 2
        assert "holds stage 'dmd', expected 'ar_diffusion'" in one_line(capsys)
        assert not (chain / "data" / "refused").exists()
    assert cfjax("precompute", "ode_pairs.py:toy", chain / "none", **pairs_keys(chain), output="clips") == 2
    assert "clips holds a dataset that configs/ode_pairs.py did not make" in one_line(capsys)
    assert manifest.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "keys", "message"),
    [
        ("toy", {"objective__steps": "(1000,800,500,250)"}, "objective.steps=(1000, 750, 500, 250), not (1000, 800, "),
        ("toy", {"objective__shift": 3.0}, "objective.shift=5.0, not 3.0"),
        ("toy,framewise", {}, "blocks.frames=3, not 1"),
        ("toy", {"blocks__window": 6}, "blocks.window=0, not 6"),
        ("toy,bidirectional_pairs", {"data__name": "pairs"}, "objective.method='full', but objective.past='endpoint' "),
    ],
)
def test_pairs_of_other_settings_are_refused(chain, tmp_path, capsys, words, keys, message):
    keys = {**tiny(chain), "roles__student__init": "", **keys}
    assert cfjax("train", f"ode_regression.py:{words}", tmp_path, **keys) == 2
    assert f"pairs was made with {message}" in one_line(capsys)


# ---- mistakes: exit code 2 and one line


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_another_stages_checkpoint_is_refused(chain, tmp_path, capsys):
    keys = {**dmd_keys(chain), "roles__student__init": chain / "teacher"}
    assert cfjax("train", "dmd.py:toy", tmp_path, **keys) == 2
    assert "holds stage 'bidirectional', expected 'ode_regression'" in one_line(capsys)


def test_another_stages_workdir_is_refused(chain, capsys):
    keys = {**tiny(chain), "roles__student__init": chain / "teacher", "roles__student__init_ema": True}
    assert cfjax("train", "ar_diffusion.py:toy", chain / "teacher", **keys) == 2
    assert "holds stage 'bidirectional', expected 'ar_diffusion'" in one_line(capsys)


def test_a_run_of_other_blocks_is_refused(chain, tmp_path, capsys):
    """Chunk-wise weights under a frame-wise config; a bidirectional run has no blocks to differ in."""
    assert cfjax("train", "dmd.py:toy,framewise", tmp_path, **dmd_keys(chain)) == 2
    assert f"roles.student.init='{chain / 'ode'}' was trained with blocks.frames=3" in one_line(capsys)
    assert not list(tmp_path.iterdir())
    pairs = {"roles__teacher__init": chain / "ar", "pairs": 8, "output": "framewise_pairs"}
    assert cfjax("precompute", "ode_pairs.py:toy,framewise", tmp_path, **tiny_data(chain), **pairs) == 2
    assert f"roles.teacher.init='{chain / 'ar'}' was trained with blocks.frames=3" in one_line(capsys)
    assert not (chain / "data" / "framewise_pairs").exists()


def test_a_run_does_not_go_on_with_other_blocks(chain, capsys):
    keys = {**tiny(chain), "roles__student__init": chain / "teacher", "roles__student__init_ema": True}
    assert cfjax("train", "ar_diffusion.py:toy,framewise", chain / "ar", **keys) == 2
    assert f"--workdir={chain / 'ar'}: the run in it was trained with blocks.frames=3" in one_line(capsys)


def test_an_unknown_key_is_named(tmp_path, capsys):
    assert cfjax("train", "dmd.py:toy", tmp_path, objective__real_guidence=1.0) == 2
    assert "has no such key; did you mean objective.real_guidance" in one_line(capsys)


def test_an_unknown_preset_is_named(chain, tmp_path, capsys):
    assert cfjax("train", "bidirectional.py:toy", tmp_path, **tiny(chain), roles__student__preset="wan_2b") == 2
    known = "wan_1_3b, wan_14b, wan_i2v_14b, wan_2_2_i2v_14b, wan_2_2_5b, wan_mini, toy, toy_small"
    assert f"model.preset='wan_2b': use one of {known}" in one_line(capsys)


def test_a_missing_run_is_named(chain, tmp_path, capsys):
    assert cfjax("train", "ar_diffusion.py:toy", tmp_path, **tiny(chain), roles__student__init="runs/nowhere") == 2
    assert "roles.student.init='runs/nowhere': no such run" in one_line(capsys)


@pytest.mark.parametrize(("verb", "config"), [("train", "ar_diffusion.py:toy"), ("precompute", "ode_pairs.py:toy")])
def test_nothing_is_rendered_for_a_run_that_cannot_begin(verb, config, tmp_path, capsys):
    role = "student" if verb == "train" else "teacher"
    keys = {**tiny(tmp_path / "own"), f"roles__{role}__init": "runs/nowhere"}
    keys = keys if verb == "train" else {k: v for k, v in keys.items() if k.startswith(("data", "roles__teacher"))}
    assert cfjax(verb, config, tmp_path / "run", **keys) == 2
    assert f"roles.{role}.init='runs/nowhere': no such run; train it first" in one_line(capsys)
    assert not (tmp_path / "own").exists() and not (tmp_path / "run").exists()


def test_an_unknown_word_is_named(chain, tmp_path, capsys):
    keys = {"run": chain / "dmd", "prompt": "a purple circle moving left"}
    assert cfjax("generate", "generate.py", tmp_path, **keys) == 2
    assert "this model never saw 'purple'; write 'a COLOUR SHAPE moving DIRECTION'" in one_line(capsys)


def test_blocks_must_divide_the_clip(chain, tmp_path, capsys):
    keys = {**tiny(chain), "roles__student__init": chain / "teacher", "blocks__frames": 4}
    assert cfjax("train", "ar_diffusion.py:toy", tmp_path, **keys) == 2
    assert "6 latent frames do not divide into blocks" in one_line(capsys)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shapes__colours", "red,purple", "data.shapes.colours=('red', 'purple'): choose distinct names from red,"),
        ("shapes__colours", "red", "is a world with data.shapes.colours=('red', 'green', "),
        (
            "channels",
            8,
            "data.assets='toy_teacher' is a world with data.channels=16, not 8; train a teacher of your own",
        ),
    ],
)
def test_a_world_that_the_shipped_one_is_not_leaves_nothing_behind(tmp_path, capsys, key, value, message):
    keys = {"data__path": tmp_path / "data", "data__clips": 16, f"data__{key}": value}
    assert cfjax("train", "ar_diffusion.py:toy", tmp_path / "ar", **keys) == 2
    assert message in one_line(capsys)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_world_whose_captions_are_all_of_one_kind_is_refused(tmp_path, capsys):
    keys = {"data__path": tmp_path / "data", "data__shapes__colours": "red", "data__shapes__shapes": "ring"}
    assert cfjax("train", "bidirectional.py:toy", tmp_path / "run", **keys, data__shapes__directions="left") == 2
    assert "data.shapes: all 1 caption of this world would be" in (said := one_line(capsys))
    assert "name more of data.shapes.colours (red," in said and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data__channels", 8, "/world was made with data.channels=16, not 8; choose another --config.data.path"),
        ("data__shapes__frames", 9, "/world was made with data.shapes.frames=6, not 9; choose another"),
        ("data__clips", 32, "holds 64 clips, not data.clips=32"),
    ],
)
def test_existing_data_must_be_what_the_config_describes(chain, tmp_path, capsys, key, value, message):
    assert cfjax("train", "bidirectional.py:toy", tmp_path, **{**tiny(chain), key: value}) == 2
    assert message in one_line(capsys)


# ---- an exported model


@pytest.fixture(scope="module")
def exported(chain) -> Path:
    folder = chain / "exported"
    assert cfjax("export", "export.py", folder, run=chain / "teacher", clips=60) == 0
    return folder


def test_an_exported_model_initialises_a_stage(chain, exported, tmp_path):
    """By its path, in a data folder of its own that takes the model's world."""
    keys = {
        **tiny(tmp_path),
        "data__assets": exported,
        "optim__student__name": "adamw",
        "roles__student__init": exported,
    }
    assert cfjax("train", "ar_diffusion.py:toy", tmp_path / "ar", **keys) == 0
    assert read_meta(tmp_path / "ar")["world"] == read_meta(chain / "ar")["world"]


def test_an_exported_models_stage_is_checked(chain, exported, tmp_path, capsys):
    keys = {**dmd_keys(chain), "roles__student__init": exported}
    assert cfjax("train", "dmd.py:toy", tmp_path, **keys) == 2
    assert "holds stage 'bidirectional', expected 'ode_regression'" in one_line(capsys)


def test_an_exported_model_generates_what_its_run_generates(chain, exported):
    run, copy = open_run(str(chain / "teacher")), open_run(str(exported))
    assert (copy.stage, copy.step, copy.sampler, copy.blocks) == (run.stage, run.step, run.sampler, run.blocks)
    captions = ["a red circle moving left"] * 2
    np.testing.assert_allclose(copy.sample(captions, 0), run.sample(captions, 0), atol=0.05)
