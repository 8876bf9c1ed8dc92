"""A resumed run reports what its command changes, and refuses what its checkpoint or its meaning does not allow."""

import inspect
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cfjax.core.cli import keys_of
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.tree import match
from cfjax.experiment.resume import CHANGES, Kind, changes, checkpoint_of, kind_of, report_changes, rule_name
from cfjax.experiment.stage import STAGES, stage_of
from cfjax.models import wan
from cfjax.training.checkpoint import read_meta
from cfjax.training.streamed import write_streamed
from tests.commands import cfjax, tiny
from tests.test_configs import CASES, get_config, one_line, shipped

TRAINED = ("student", "critic")


def test_every_key_of_every_shipped_config_has_a_kind():
    """A new key must be classified: one that no rule knows is an error here, and so is a rule that nothing needs."""
    names: dict[str, None] = {}
    for path, arg in CASES:
        make = get_config(path)
        try:
            c = make(arg) if inspect.signature(make).parameters else make()
        except UserError:
            continue
        if c.get("stage") in STAGES:
            names |= dict.fromkeys(rule_name(key, stage_of(c).losses) for key in keys_of(c))
    kinds = match(CHANGES, names)
    assert set(kinds.values()) == set(Kind)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("stage", Kind.FIXED),
        ("roles.student.preset", Kind.FIXED),
        ("roles.critic.branch.layers", Kind.FIXED),
        ("roles.student.lora.rank", Kind.FIXED),
        ("roles.student.lora.alpha", Kind.MEANING),
        ("optim.critic.name", Kind.FIXED),
        ("roles.critic.init_ema", Kind.NO_EFFECT),
        ("roles.real_score.init_ema", Kind.MEANING),
        ("roles.real_score.preset", Kind.MEANING),
        ("roles.real_score.storage", Kind.FREE),
        ("objective.shift", Kind.MEANING),
        ("objective.codec_world", Kind.FREE),
        ("blocks.sink", Kind.MEANING),
        ("data.shapes.speed", Kind.MEANING),
        ("data.path", Kind.FREE),
        ("data.batch_size", Kind.FREE),
        ("ema.student.decay", Kind.MEANING),
        ("cadence.student", Kind.MEANING),
        ("seed", Kind.MEANING),
        ("optim.student.warmup", Kind.FREE),
        ("sampler.guidance", Kind.FREE),
        ("mesh.fsdp", Kind.FREE),
        ("accept_changes", Kind.UNREPORTED),
        ("my_note", None),
    ],
)
def test_kinds(key, kind):
    assert kind_of(key, TRAINED) is kind


def recorded(c: ConfigDict) -> dict:
    """A config as a checkpoint keeps it."""
    return json.loads(json.dumps(c.to_dict()))


def changed_kinds(c: ConfigDict, record: dict, given: tuple[str, ...] = ()) -> dict[str, Kind]:
    return {change.text: change.kind for change in changes(record, c, TRAINED, given)}


@pytest.mark.parametrize(("path", "arg"), [case for case in CASES if "," not in case[1]])
def test_what_json_made_of_a_config_is_no_change(path, arg):
    make = get_config(path)
    arg = "toy,branching" if arg == "branching" else arg  # which is refused without the toy
    c = make(arg) if inspect.signature(make).parameters else make()
    if c.get("stage") in STAGES:
        assert changes(recorded(c), c.to_dict(), stage_of(c).losses) == []


def test_changes_are_reported_with_both_values():
    record = recorded(shipped("dmd:toy")) | {"steps": 600.0}  # which is 600
    c = shipped("dmd:toy", optim__student__lr=1e-5, objective__steps=(1000, 500), data__batch_size=8)
    assert changed_kinds(c, record) == {
        "data.batch_size 32 -> 8": Kind.FREE,
        "objective.steps (1000, 750, 500, 250) -> (1000, 500)": Kind.MEANING,
        "optim.student.lr 0.0002 -> 1e-05": Kind.FREE,
    }


def test_a_rollout_in_the_checkpoint_keeps_its_arrays():
    """Their shapes are those of the batch, the window and what is remembered; of other runs these may change."""
    c = shipped("dmd:toy,streaming", data__batch_size=8, objective__max_frames=36, blocks__sink=0)
    assert changed_kinds(c, recorded(shipped("dmd:toy,streaming"))) == {
        "data.batch_size 32 -> 8": Kind.FIXED,
        "objective.max_frames 48 -> 36": Kind.MEANING,
        "blocks.sink 3 -> 0": Kind.FIXED,
    }
    (change,) = changes(recorded(shipped("dmd:toy,streaming")), shipped("dmd:toy,streaming", objective__new_frames=0),
                        TRAINED)  # fmt: skip
    assert change.kind is Kind.FIXED


def test_a_key_that_an_older_record_lacks_differs_where_the_command_line_sets_it():
    c = shipped("dmd:toy", objective__same_exit=False)
    record = recorded(c)
    del record["objective"]["same_exit"], record["accept_changes"], record["guard"]
    assert changed_kinds(c, record) == {}
    given = ("objective.same_exit", "accept_changes", "guard.seeds")
    assert changed_kinds(c, record, given) == {
        "guard.seeds (not there then) -> 3": Kind.FREE,
        "objective.same_exit (not there then) -> False": Kind.MEANING,
    }


def test_a_key_that_only_the_record_has_is_reported():
    """By its rule where there is one; what no rule knows belonged to an older version."""
    c = shipped("dmd:toy")
    record = recorded(c)
    record["objective"]["lost"], record["warmth"], record["old"] = 1.0, 2, {"a": 3}
    assert changed_kinds(c, record) == {
        "objective.lost 1.0 -> (not there now)": Kind.MEANING,
        "old (not there now)": Kind.FREE,
        "warmth 2 -> (not there now)": Kind.FREE,
    }


def test_a_key_of_ones_own_config_changes_the_meaning():
    c = shipped("dmd:toy")
    c.my_note = "second"
    assert changed_kinds(c, recorded(c) | {"my_note": "first"}) == {"my_note 'first' -> 'second'": Kind.MEANING}


def test_roles_averages_and_cadences_that_come_or_go_are_changes():
    full, c = shipped("dmd:toy"), shipped("dmd:toy")
    del c.roles.real_score, c.ema.student, c.cadence.student
    assert changed_kinds(c, recorded(full)) == {
        "cadence.student 5 -> 1": Kind.MEANING,
        "ema.student (not there now)": Kind.FIXED,
        "roles.real_score (not there now)": Kind.MEANING,
    }
    assert changed_kinds(full, recorded(c)) == {
        "cadence.student 1 -> 5": Kind.MEANING,
        "ema.student (not there then)": Kind.FIXED,
        "roles.real_score (not there then)": Kind.MEANING,
    }


def test_a_refusal_names_the_first_keys_their_number_and_both_fixes(capsys):
    meta = {"step": 7, "stage": "dmd"}
    four = {"objective__shift": 3.0, "objective__steps": (1000, 500), "blocks__sink": 3, "blocks__window": 6}
    found = changes(recorded(shipped("dmd:toy")), shipped("dmd:toy", **four), TRAINED)
    with pytest.raises(UserError) as caught:
        report_changes(found, meta, Path("runs/x"), accept=False)
    assert str(caught.value) == (
        "--workdir=runs/x: blocks.sink 0 -> 3, blocks.window 0 -> 6, objective.shift 5.0 -> 3.0 and 1 more (4 in all) "
        "since its checkpoint of step 7, which changes what the run learns; set them back, or go on so with "
        "--config.accept_changes=True"
    )
    assert capsys.readouterr().out == ""
    report_changes(found, meta, Path("runs/x"), accept=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "changed since step 7: objective.shift 5.0 -> 3.0 (accepted)" in lines


def test_what_a_checkpoint_does_not_hold_is_refused_also_when_accepted():
    found = changes(recorded(shipped("dmd:toy")), shipped("dmd:toy", optim__student__name="muon"), TRAINED)
    with pytest.raises(UserError, match=r"step 7 does not fit optim\.student\.name 'adamw' -> 'muon'; set it back, or"):
        report_changes(found, {"step": 7, "stage": "dmd"}, Path("runs/x"), accept=True)


def test_only_one_process_of_several_says_it(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    found = changes({"steps": 1}, ConfigDict({"steps": 2}), ())
    report_changes(found, {"step": 1, "stage": "dmd"}, Path("runs/x"), accept=False)
    assert len(found) == 1 and capsys.readouterr().out == ""


def test_converted_weights_are_no_run_to_go_on_with(tmp_path):
    write_streamed(tmp_path, {"params/student/bias": LazyArray.of(np.zeros(2))}, {"stage": "dmd", "source": {}})
    with pytest.raises(UserError, match="holds converted weights, no training run; name another --workdir, and start"):
        checkpoint_of(tmp_path, "dmd")


# ---- commands


@pytest.fixture(scope="module")
def tiny_network():
    """A toy preset that compiles in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(wan.PRESETS, "toy", wan.WanConfig(dim=32, ffn_dim=32, num_heads=4, num_layers=1, freq_dim=16))
        yield


@pytest.fixture(scope="module")
def run(tiny_network, tmp_path_factory) -> Path:
    """Two steps of a teacher, on clips beside it."""
    root = tmp_path_factory.mktemp("resume")
    assert cfjax("train", "bidirectional.py:toy", root / "run", **keys(root)) == 0
    return root / "run"


def keys(root: Path, **changed: object) -> dict[str, object]:
    return {**tiny(root), "sampler__steps": 2, "optim__student__name": "adamw", **changed}


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A run of one's own to go on with."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def state_of(run: Path) -> dict:
    """What the newest checkpoint says of the data's place."""
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    return json.loads((newest / "record" / "metadata").read_text())["data_state"]["data"]


def told_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("changed", "the data"))]


@pytest.mark.slow
def test_a_run_goes_on_with_other_settings_and_says_so_once(run, copy, capsys):
    """Another batch size at the right record; the clip's and the decay's being there or not; a start that is gone."""
    clip = {"optim__student__clip": 0.0, "optim__student__weight_decay": 0.01, "optim__student__accumulate": 2}
    changed = {"steps": 4, "data__batch_size": 8, **clip, "roles__student__init": "runs/nowhere"}
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **changed)) == 0
    assert told_lines(capsys) == [
        "changed since step 2: data.batch_size 4 -> 8",
        "changed since step 2: optim.student.accumulate 1 -> 2",
        "changed since step 2: optim.student.clip 1.0 -> 0.0",
        "changed since step 2: optim.student.weight_decay 0.0 -> 0.01",
        "changed since step 2: roles.student.init '' -> 'runs/nowhere' (without effect: the run goes on with its own "
        "weights)",
        "changed since step 2: steps 2 -> 4",
    ]
    assert state_of(copy)["records_read"] == 2 * 4 + 2 * 8
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **changed)) == 0
    assert told_lines(capsys) == [] and read_meta(copy)["config"]["data"]["batch_size"] == 8


@pytest.mark.slow
def test_another_meaning_needs_a_word(run, copy, capsys):
    changed = {"steps": 3, "seed": 1, "objective__shift": 3.0}
    before = sorted(path.name for path in copy.rglob("*"))
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **changed)) == 2
    error = one_line(capsys)
    assert f"--workdir={copy}: objective.shift 5.0 -> 3.0, seed 0 -> 1 since its checkpoint of step 2" in error
    assert "set them back, or go on so with --config.accept_changes=True" in error
    assert before == sorted(path.name for path in copy.rglob("*"))
    accepted = {**changed, "accept_changes": True}
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **accepted)) == 0
    assert told_lines(capsys) == [
        "changed since step 2: objective.shift 5.0 -> 3.0 (accepted)",
        "changed since step 2: seed 0 -> 1 (accepted)",
        "changed since step 2: steps 2 -> 3",
        "the data begins a new order at its first record: seed 0 -> 1",
    ]
    assert state_of(copy) == {"records_read": 4, "order": {"records": 64, "seed": 1, "shuffle": True}}
    for again in (changed, accepted):
        assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **again)) == 0
        assert told_lines(capsys) == []


@pytest.mark.slow
def test_a_dataset_that_is_another_one_needs_a_word(run, copy, tmp_path, capsys):
    """It may lie in another place; but what lies there must be what the run has read."""
    data = {"steps": 3, "data__path": tmp_path / "data"}
    shutil.copytree(run.parent / "data", tmp_path / "data")
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **data)) == 0
    assert [line.partition(": ")[2].split()[0] for line in told_lines(capsys)] == ["data.path", "steps"]
    shutil.rmtree(tmp_path / "data" / "clips")
    more = {**data, "steps": 4, "data__clips": 96}
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **more)) == 2
    assert "data.clips 64 -> 96 since its checkpoint of step 3" in one_line(capsys)
    assert not (tmp_path / "data" / "clips").exists()  # nothing was made for it
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **more, accept_changes=True)) == 0
    assert told_lines(capsys)[1:] == [
        "changed since step 3: steps 3 -> 4",
        f"changed since step 3: records of {tmp_path / 'data' / 'clips'} 64 -> 96 (accepted)",
        "the data begins a new order at its first record: records 64 -> 96",
    ]
    assert state_of(copy)["records_read"] == 4


@pytest.mark.slow
def test_what_cannot_be_changed_is_refused_and_its_fix_works(run, copy, tmp_path, capsys):
    changed = {"optim__student__name": "muon", "steps": 3, "accept_changes": True}
    assert cfjax("train", "bidirectional.py:toy", copy, **keys(run.parent, **changed)) == 2
    error = one_line(capsys)
    assert "checkpoint of step 2 does not fit optim.student.name 'adamw' -> 'muon'; set it back, or name" in error
    start = {f"roles__student__init{key}": value for key, value in (("", copy), ("_stages", "('bidirectional',)"))}
    for key, value in start.items():
        shown = f'"{value}"' if key.endswith("stages") else value
        assert f"--config.{key.replace('__', '.')}={shown}" in error
    made = {**keys(run.parent, **start), "optim__student__name": "muon", "steps": 1}
    assert cfjax("train", "bidirectional.py:toy", tmp_path / "new", **made) == 0
