"""launch/sweep.py: from a config's sweep to commands, names, jobs and a table; and a real sweep of four tiny runs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cfjax.core.errors import UserError
from tests.commands import ROOT

sys.path.insert(0, str(ROOT / "launch"))
import sweep

DMD = f"{ROOT}/configs/dmd.py:toy"
HYPER = sweep.hyper


def config(folder: Path, body: str) -> str:
    """A config file of the toy's bidirectional stage with a sweep of its own."""
    file = folder / "swept.py"
    file.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('base', {str(ROOT / 'configs/bidirectional.py')!r})\n"
        "base = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(base)\n"
        "get_config = base.get_config\n" + body
    )
    return f"{file}:toy"


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "launch/sweep.py", *argv], cwd=ROOT, capture_output=True, text=True)


def test_combinators():
    two, three = HYPER.sweep("config.a", [1, 2]), HYPER.sweep("config.b", "xyz")
    assert [list(p.values()) for p in HYPER.product([two, three])] == [[a, b] for a in (1, 2) for b in "xyz"]
    assert HYPER.zipit([two, HYPER.sweep("c", [3, 4]), HYPER.fixed("d", 5)]) == [
        {"config.a": 1, "c": 3, "d": 5},
        {"config.a": 2, "c": 4, "d": 5},
    ]
    assert HYPER.chainit([two, three]) == two + three
    assert HYPER.product([]) == [{}]
    with pytest.raises(UserError, match="2, 3 points"):
        HYPER.zipit([two, three])
    with pytest.raises(UserError, match=r"config\.a is swept twice"):
        HYPER.product([two, two])


def test_the_shipped_sweep_and_its_names():
    """Four points of the toy and of the full recipe, whose base rate is the config's own."""
    runs = sweep.runs_of(DMD, Path("runs/s"), ["--config.steps=3"])
    assert [run.name for run in runs] == [
        "student.lr=0.0002,cadence.student=2",
        "student.lr=0.0002,cadence.student=5",
        "student.lr=0.0004,cadence.student=2",
        "student.lr=0.0004,cadence.student=5",
    ]
    assert [run.config.optim.student.lr for run in runs] == [2e-4, 2e-4, 4e-4, 4e-4]
    assert [run.config.cadence.student for run in runs] == [2, 5, 2, 5]
    assert {run.config.steps for run in runs} == {3}
    assert runs[2].workdir == Path("runs/s/student.lr=0.0004,cadence.student=2")
    full = sweep.points_of(f"{ROOT}/configs/dmd.py")
    assert [point["optim.student.lr"] for point in full] == [2e-6, 2e-6, 4e-6, 4e-6]


def test_the_shipped_sweep_is_found_from_any_folder(tmp_path, monkeypatch):
    here = [run.name for run in sweep.runs_of(DMD, tmp_path, [])]
    monkeypatch.chdir(tmp_path)
    assert [run.name for run in sweep.runs_of("configs/dmd.py:toy", tmp_path, [])] == here
    with pytest.raises(UserError, match=r"no file configs/dnd\.py; did you mean configs/dmd\.py"):
        sweep.points_of("configs/dnd.py")


def test_a_swept_tuple_reaches_the_config(tmp_path):
    body = "def sweep():\n    return [{'data.shapes.colours': ('red', 'blue')}, {'data.shapes.colours': ('red',)}]\n"
    runs = sweep.runs_of(config(tmp_path, body), tmp_path, [])
    assert [run.config.data.shapes.colours for run in runs] == [("red", "blue"), ("red",)]


def test_names_are_safe_and_distinct():
    keys = ["roles.student.init", "roles.critic.init", "steps"]
    assert sweep.name_of({"steps": 3}, keys) == "steps=3"
    assert sweep.name_of({}, keys) == "default"
    odd = [sweep.name_of({"roles.student.init": path}, keys) for path in ("runs/a", "runs:a", "x" * 300, "x" * 301)]
    assert len(set(odd)) == 4 and all(len(name) <= sweep.LONGEST_NAME and "/" not in name for name in odd)
    assert odd[0].startswith("student.init=runs_a-")
    same_end = ["a.x.lr", "b.x.lr"]
    assert sweep.name_of({"a.x.lr": 1, "b.x.lr": 2}, same_end) == "a.x.lr=1,b.x.lr=2"


def test_sweep_yields_dicts(tmp_path):
    spec = config(tmp_path, "def sweep(arg):\n    yield {'steps': 2}\n    yield {'seed': 1, 'config.stage': arg}\n")
    assert sweep.points_of(spec) == [{"steps": 2}, {"seed": 1, "stage": "toy"}]


@pytest.mark.parametrize(
    "body, overrides, message",
    [
        ("", [], "has no sweep: write get_hyper"),
        ("def sweep(): return []", [], "no points"),
        ("def sweep(): return [{'optim.student.rate': 1}]", [], r"--config\.optim\.student\.rate: .*no such key"),
        ("def sweep(): return [{'steps': 'many'}]", [], "--config.steps=many: needs a value of type int"),
        ("def sweep(): return [{'steps': 2}, {'config.steps': 2}]", [], "holds steps=2 twice"),
        ("def sweep(): return [3]", [], "a point is a dict"),
        ("def sweep(): return [{'steps': 2}]", ["--config.steps=4"], "sweeps over this key"),
        ("def sweep(): return [{'data.name': 'a\\nb'}]", [], r"'--config.data.name=a\\nb' holds a line break"),
        ("def sweep(): return [{'steps': 2}]", ["--config.data.name=a\tb"], "holds a line break or another control"),
        ("def sweep(): return [{'steps': 0}]", [], "--config.steps=0: use 1 or more"),
    ],
)
def test_mistakes_are_reported_by_key(tmp_path, body, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        sweep.runs_of(config(tmp_path, body), tmp_path, overrides)
    assert "\n" not in str(error.value)


def test_the_command_line_lists_and_refuses():
    listed = run("list", f"--config={DMD}", "--workdir=runs/s", "--config.steps=3", "--verb=evaluate")
    commands = [shlex.split(line) for line in listed.stdout.splitlines()]
    folder = "runs/s/student.lr=0.0002,cadence.student=2"
    assert commands[0] == ["cfjax", "evaluate", f"--config.run={folder}", f"--workdir={folder}/evaluation"]
    assert len(commands) == 4 and listed.returncode == 0
    refused = run("list", f"--config={ROOT}/configs/generate.py", "--workdir=runs/s")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "has no sweep" in refused.stderr


def test_slurm_gets_one_array(tmp_path, capfd):
    runs = sweep.runs_of(DMD, tmp_path / "a b", [])
    assert sweep.to_slurm(runs, tmp_path, 2, ["--gpus=1", "--time=1:00:00"], dry_run=True) == 0
    script = capfd.readouterr().out
    assert "#SBATCH --array=0-3%2\n" in script and "#SBATCH --time=1:00:00\n" in script
    (file,) = tmp_path.glob("commands-*.txt")
    assert [shlex.split(line) for line in file.read_text().splitlines()] == [run.command for run in runs]
    before = file.read_text()
    assert sweep.to_slurm(runs[:2], tmp_path, 2, [], dry_run=True) == 0
    assert file.read_text() == before  # which jobs of the first array have yet to read
    evaluations = sweep.runs_of(DMD, tmp_path, [], "evaluate")
    assert sweep.to_slurm(evaluations, tmp_path, 0, ["--gpus=8"], dry_run=True) == 2
    assert "cfjax evaluate is one process's work" in capfd.readouterr().err


def test_a_bucket_s_address_stays_whole(tmp_path, capfd, monkeypatch):
    """Jobs elsewhere take it; runs of this machine, and an address without its second slash, are refused."""
    monkeypatch.setattr(sweep, "LOGS", tmp_path)
    asked, folder = (
        [f"--config={DMD}", "--workdir=gs://b/s", "--dry-run"],
        "gs://b/s/student.lr=0.0002,cadence.student=2",
    )
    assert sweep.main(["slurm", *asked, "--", "--gpus=1"]) == 0
    (file,) = tmp_path.glob("commands-*.txt")
    assert (
        f"--workdir={folder}" in shlex.split(file.read_text().splitlines()[0]) and str(file) in capfd.readouterr().out
    )
    assert sweep.main(["jobset", *asked, "--", "--image=i", "--tpu=v5p:2x2x1"]) == 0
    assert f"--workdir={folder}\n" in capfd.readouterr().out
    with pytest.raises(UserError, match="--workdir=gs://b/s: runs of this machine keep their output on it"):
        sweep.main(["run", *asked])
    with pytest.raises(UserError, match="gs:/b/s: name a folder, or a bucket's folder as gs://BUCKET/FOLDER"):
        sweep.runs_of(DMD, Path("gs://b/s"), [])


def test_kubernetes_gets_a_jobset_for_each_run(capfd):
    argv = ["jobset", f"--config={DMD}", "--workdir=/bucket/s", "--dry-run", "--name=dmd"]
    assert sweep.main([*argv, "--", "--image=i", "--tpu=v5p:2x2x2", "--bucket=b"]) == 0
    made = list(yaml.safe_load_all(capfd.readouterr().out))
    assert [one["metadata"]["name"] for one in made] == ["dmd-0", "dmd-1", "dmd-2", "dmd-3"]
    assert made[3]["metadata"]["annotations"]["cfjax/overrides"] == "optim.student.lr=0.0004, cadence.student=5"
    pod = made[3]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    wanted = sweep.runs_of(DMD, Path("/bucket/s"), [])[3].command
    assert pod["containers"][0]["command"] == ["bash", "launch/worker.sh", *wanted]


def test_table(tmp_path):
    """Last values of the curves and the evaluation; runs that told nothing come last."""
    runs = sweep.runs_of(DMD, tmp_path, ["--config.steps=3"])
    for run_, loss in zip(runs[:3], (0.5, 0.2, 0.3), strict=True):
        run_.workdir.mkdir()
        lines = [{"step": 0, "student/loss": 9.0}, {"step": 1, "critic/loss": 1.0}, {"step": 2, "student/loss": loss}]
        (run_.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (runs[1].workdir / "evaluation").mkdir()
    (runs[1].workdir / "evaluation" / "evaluation.json").write_text(json.dumps({"summary": {"all_correct": 0.75}}))
    rows = sweep.table_of(runs, [], "student/loss")
    assert [row["student/loss"] for row in rows] == [0.2, 0.3, 0.5, None]
    assert [row["steps"] for row in rows] == ["3 of 3", "3 of 3", "3 of 3", "0 of 3"]
    assert rows[0]["all_correct"] == 0.75 and rows[0]["cadence.student"] == 5 and rows[0]["critic/loss"] == 1.0
    assert sweep.table_of(runs, ["student/loss"], "-student/loss")[0]["student/loss"] == 0.5
    sweep.write_table(tmp_path, rows)
    assert json.loads((tmp_path / "table.json").read_text()) == rows
    assert (tmp_path / "table.md").read_text().splitlines()[2].endswith("| 3 of 3 | 0.75 | 1 | 0.2 |")
    with pytest.raises(UserError, match="'student/lose'; there are all_correct, critic/loss, student/loss"):
        sweep.table_of(runs, ["student/lose"], "")


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, capfd):
    """Two at a time; each run's output is in its own folder."""
    spec = config(tmp_path, "def sweep(): return [{'data.source': 'nowhere'}, {'data.source': 'elsewhere'}]")
    assert sweep.main(["run", f"--config={spec}", f"--workdir={tmp_path}/s", "--jobs=2"]) == 1
    message = capfd.readouterr().err.splitlines()
    assert len(message) == 2 and all("train.log" in line for line in message)
    assert "use 'shapes'" in (tmp_path / "s" / "data.source=nowhere" / "train.log").read_text()


@pytest.mark.slow
def test_four_runs_of_the_toy(tmp_path, capfd):
    """Trained two at a time, tabulated, and found done when started again."""
    spec = config(
        tmp_path,
        "def get_hyper(h):\n"
        "    return h.product([h.sweep('config.optim.student.lr', [0.01, 0.02]), h.sweep('seed', [0, 1])])\n",
    )
    few = {"steps": 2, "log_every": 1, "sample_clips": 0, "guard.enabled": False, "progress": False}
    few |= {"data.path": tmp_path / "data", "data.clips": 64, "data.batch_size": 4, "data.shapes.frames": 6}
    few |= {"roles.student.remat": "none", "optim.student.name": "adamw", "data.assets": ""}
    argv = [f"--config={spec}", f"--workdir={tmp_path}/s", *(f"--config.{key}={value}" for key, value in few.items())]
    assert sweep.main(["run", "--jobs=2", *argv]) == 0, logs(tmp_path)
    assert sweep.main(["table", "--sort=student/loss", *argv]) == 0
    rows = json.loads((tmp_path / "s" / "table.json").read_text())
    assert [row["steps"] for row in rows] == ["2 of 2"] * 4
    assert len({row["student/loss"] for row in rows}) == 4
    assert sweep.main(["run", "--jobs=2", *argv]) == 0
    assert all("is done already" in path.read_text() for path in (tmp_path / "s").glob("*/train.log"))


def logs(root: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in root.glob("s/*/train.log"))
