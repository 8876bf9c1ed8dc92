"""The launchers: what their dry runs show, and what their scripts do where a stand-in takes the cluster's place."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from cfjax.__main__ import SHARED, VERBS
from cfjax.core.errors import UserError
from cfjax.core.topology import CHIPS, H100
from tests.commands import ROOT

sys.path.insert(0, str(ROOT / "launch"))
from gke import jobset

TRAIN = ["cfjax", "train", "--config=configs/dmd.py", "--workdir=/shared/runs/a b"]
# A run that is told to stop saves and exits with 0, as cfjax does.
STOPS = ["bash", "-c", "trap 'echo saved; exit 0' TERM; echo up; sleep 60 >/dev/null & wait"]


def bash(script: str, *argv: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    search = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    whole = {**os.environ, "PATH": search, **environment}
    return subprocess.run(["bash", script, *argv], cwd=ROOT, capture_output=True, text=True, env=whole)


def stand_in(folder: Path, **scripts: str) -> Path:
    """Programs of these names that a search path finds first."""
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))


def worker(*command: str, signalled: bool, **environment: str) -> subprocess.CompletedProcess:
    whole, line = {**os.environ, **environment}, ["bash", "launch/worker.sh", *command]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=whole)
    if signalled:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out)


def test_a_stopped_run_differs_from_a_finished_one():
    stopped = worker(*STOPS, signalled=True)
    assert stopped.returncode == 75 and "saved" in stopped.stdout
    assert (
        worker("bash", "-c", "echo up; exec sleep 60 >/dev/null", signalled=True).returncode == 75
    )  # not listening yet
    assert worker("true", signalled=False).returncode == 0
    assert worker("bash", "-c", "exit 2", signalled=False).returncode == 2
    assert (
        worker("bash", "-c", "trap 'exit 3' TERM; echo up; sleep 60 >/dev/null & wait", signalled=True).returncode == 3
    )


def test_a_slurm_step_passes_the_signal_on():
    """SLURM tells the children of its step's daemon only, unless cgroup.conf says otherwise."""
    stopped = worker(*STOPS, signalled=True, SLURM_STEP_ID="0")
    assert stopped.returncode == 75 and "saved" in stopped.stdout


def test_an_aborted_process_hides_no_other_ones_reason():
    """srun reports the highest code: 134 of a process whose peer has gone would hide the peer's 75."""
    dies = ("bash", "-c", "kill -ABRT $$")
    assert worker(*dies, signalled=False).returncode == 134
    assert worker(*dies, signalled=False, SLURM_PROCID="3").returncode == 1
    assert worker("bash", "-c", "exit 75", signalled=False, SLURM_PROCID="0").returncode == 75


def test_what_a_process_is_given(tmp_path, monkeypatch):
    """The planner's limit of an H100 is within what JAX may take of it; what the user has set stands."""

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    script = (
        shutil.copytree(ROOT / "launch", tmp_path / "launch") / "worker.sh"
    )  # no environment there has a real cfjax
    path = stand_in(tmp_path, cfjax="env")

    def given(*argv: str, **environment: str) -> dict[str, str]:
        lines = bash(str(script), "cfjax", *argv, path=path, **environment).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    (shown,) = re.findall(r"device_memory_size: (\d+)", H100)
    ours = given("train", "--workdir=/shared/a b")
    assert float(ours["XLA_CLIENT_MEM_FRACTION"]) * int(shown) >= CHIPS["h100"].memory
    assert ours["JAX_COMPILATION_CACHE_DIR"] == "/shared/a b/.cache/jax"
    for argv in (["train", "--workdir=gs://bucket/a"], ["export", "--workdir=/a"]):  # no folder; one that must be empty
        assert "JAX_COMPILATION_CACHE_DIR" not in given(*argv)
    theirs = given("train", "--workdir=/a", XLA_CLIENT_MEM_FRACTION="0.5", JAX_COMPILATION_CACHE_DIR="/c")
    assert theirs["XLA_CLIENT_MEM_FRACTION"] == "0.5" and theirs["JAX_COMPILATION_CACHE_DIR"] == "/c"
    assert "XLA_CLIENT_MEM_FRACTION" not in given("train", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")  # JAX refuses both


def test_maintenance_stops_a_run():
    """A metadata server that says NONE twice, then that the machine goes."""
    asked = []

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"NONE" if len(asked) < 3 else b"TERMINATE_ON_HOST_MAINTENANCE")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"CFJAX_MAINTENANCE_URL": f"http://127.0.0.1:{server.server_port}/event"}
        stopped = worker(*STOPS, signalled=False, CFJAX_MAINTENANCE_SECONDS="0.1", **where)
        server.shutdown()
    assert stopped.returncode == 75 and "saved" in stopped.stdout and asked == [("/event", "Google")] * 3
    absent = {"CFJAX_MAINTENANCE_URL": "http://127.0.0.1:9/event", "CFJAX_MAINTENANCE_SECONDS": "0.05"}
    assert worker("sleep", "0.3", signalled=False, **absent).returncode == 0  # no such server: no maintenance


@pytest.mark.parametrize("verb", VERBS)
def test_only_verbs_that_join_are_started_more_than_once(tmp_path, verb):
    (tmp_path / "commands.txt").write_text(f"cfjax train --x\ncfjax {verb} --config=a.py\n")
    for asked in (["--", "cfjax", verb, "--x"], [f"--array={tmp_path}/commands.txt"]):
        ran = bash("launch/slurm.sh", "--dry-run", "--gpus=2", *asked)
        assert ran.returncode == (0 if verb in SHARED else 2), ran.stderr
        assert verb in SHARED or (f"cfjax {verb} is one process's work" in ran.stderr and ran.stderr.count("\n") == 1)
        assert bash("launch/slurm.sh", "--dry-run", "--gpus=1", *asked).returncode == 0
    try:
        jobset.manifest("a", ["cfjax", verb], jobset.Machines(image="i", gpu="nvidia-h100-80gb", nodes=2))
        assert verb in SHARED
    except UserError as error:
        assert verb not in SHARED and f"cfjax {verb} is one process's work" in str(error)
    jobset.manifest("a", ["cfjax", verb], jobset.Machines(image="i", tpu="v5p:2x2x1"))


def test_slurm_dry_run():
    shown = bash("launch/slurm.sh", "--dry-run", "--nodes=4", "--grace=120", "--sbatch=--partition=h100", "--", *TRAIN)
    assert shown.returncode == 0, shown.stderr
    message = options(shown.stdout)
    assert (message["nodes"], message["ntasks-per-node"], message["gres"]) == ("4", "8", "gpu:8")
    assert message["signal"] == "TERM@120" and message["partition"] == "h100" and message["requeue"] == ""
    assert f"set -- {TRAIN[0]} {TRAIN[1]} {TRAIN[2]} --workdir=/shared/runs/a\\ b\n" in shown.stdout
    assert subprocess.run(["bash", "-n"], input=shown.stdout, text=True).returncode == 0
    on_cpus = options(bash("launch/slurm.sh", "--dry-run", "--gpus=0", "--", *TRAIN).stdout)
    assert "gres" not in on_cpus and on_cpus["ntasks-per-node"] == "1"
    assert 'export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"\n' in shown.stdout


@pytest.mark.parametrize(
    "code, state, requeued", [(75, "RUNNING", True), (75, "CANCELLED", False), (0, "RUNNING", False)]
)
def test_slurm_starts_a_stopped_run_again(tmp_path, code, state, requeued):
    """The batch script itself, between stand-ins of srun, squeue and scontrol."""
    script = tmp_path / "job.sh"
    script.write_text(bash("launch/slurm.sh", "--dry-run", "--", "some", "command").stdout)
    path = stand_in(
        tmp_path,
        srun=f'echo "srun $*"; exit {code}',
        squeue=f"echo {state}",
        scontrol=f'echo "$*" >{tmp_path}/asked',
        sleep="exit 0",
    )
    ran = bash(str(script), path=path, SLURM_JOB_ID="17")
    assert ran.returncode == code and ran.stdout.endswith("bash launch/worker.sh some command\n")
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_slurm_array_task_runs_its_line(tmp_path):
    (tmp_path / "commands.txt").write_text(f"first one\n{shlex.join(TRAIN)}\n")
    script = tmp_path / "job.sh"
    script.write_text(bash("launch/slurm.sh", "--dry-run", f"--array={tmp_path}/commands.txt", "--parallel=1").stdout)
    assert options(script.read_text())["array"] == "0-1%1"
    path = stand_in(
        tmp_path, srun='printf "%s\\n" "$@"; exit 75', squeue="echo RUNNING", scontrol='echo "$*"', sleep=":"
    )
    ran = bash(str(script), path=path, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="1", SLURM_JOB_ID="10")
    assert ran.stdout.splitlines()[-len(TRAIN) - 1 :] == [*TRAIN, "requeue 9_1"]


@pytest.mark.parametrize(
    "script, argv, message",
    [
        ("slurm.sh", ["--nodes=4"], "no command behind --"),
        ("slurm.sh", ["--nodes=four", "--", "x"], "--nodes=four: must be a whole number"),
        ("slurm.sh", ["--nodes=0", "--", "x"], "--nodes=0: must be a whole number, 1 to"),
        ("slurm.sh", ["--nodes=-4", "--", "x"], "--nodes=-4: must be a whole number, 1 to"),
        ("slurm.sh", ["--gpus=-1", "--", "x"], "--gpus=-1: must be a whole number, 0 to"),
        ("slurm.sh", ["--cpus=00", "--", "x"], "--cpus=00: must be a whole number, 1 to"),
        ("slurm.sh", ["--grace=99999999999999999999", "--", "x"], "must be a whole number"),
        ("slurm.sh", ["--name=a b", "--", "x"], "--name=a b: no spaces"),
        ("slurm.sh", ["--log=a#b", "--", "x"], "--log=a#b: no spaces"),
        ("slurm.sh", ["--time=", "--", "x"], "--time is empty"),
        ("slurm.sh", ["--sbatch=--a\n#SBATCH --b", "--", "x"], "holds a line break or another control character"),
        ("slurm.sh", ["--", "cfjax", "train", "--config.data.path=a\nb"], "holds a line break"),
        ("slurm.sh", ["--node=4", "--", "x"], "unknown option --node=4"),
        ("slurm.sh", ["--array=absent.txt"], "no such file"),
        ("slurm.sh", ["--", "x"], "no sbatch here"),
        ("tpu_pod.sh", ["--tpu=a", "--zone=z", "--", "x"], "say what to do"),
        ("tpu_pod.sh", ["run", "--tpu=a", "--", "x"], "needs --zone"),
        ("tpu_pod.sh", ["run", "--tpu=a", "--hosts=b", "--", "x"], "by one of"),
        ("tpu_pod.sh", ["run", "--xpk", "--cluster=c", "--image=i", "--", "x"], "--xpk needs --tpu-type"),
        ("tpu_pod.sh", ["stop", "--hosts=b", "--", "x"], "takes no command"),
        ("tpu_pod.sh", ["run", "--hosts=b", "--env=A", "--", "x"], "--env=A: write --env=NAME=VALUE"),
        ("tpu_pod.sh", ["run", "--hosts=b", "--env=A=b\nc", "--", "x"], "holds a line break"),
        ("tpu_pod.sh", ["run", "--hosts=b", "--port=0", "--", "x"], "--port=0: must be a whole number, 1 to 65535"),
        ("tpu_pod.sh", ["run", "--hosts=b", "--slices=00", "--", "x"], "--slices=00: must be a whole number, 1 to"),
        ("tpu_pod.sh", ["run", "--hosts=a,", "--", "x"], "--hosts=a,: name machines"),
        ("tpu_pod.sh", ["run", "--hosts=-oPort=1", "--", "x"], "--hosts=-oPort=1: name machines"),
        ("tpu_pod.sh", ["setup", "--hosts=b", "--device=x; y"], "--device=x; y: tpu, gpu or cpu"),
        ("tpu_pod.sh", ["logs", "--hosts=b", "--directory="], "--directory is empty"),
        ("tpu_pod.sh", ["logs", "--hosts=b", "--directory=-p"], "--directory=-p: must not begin with a dash"),
        ("setup.sh", ["cuda"], "tpu, gpu or cpu"),
    ],
)
def test_mistakes_are_reported_in_one_line(script, argv, message):
    refused = bash(f"launch/{script}", *argv)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def test_numbers_are_read_as_people_write_them():
    """08 and 010 are no octal numbers."""
    message = options(
        bash("launch/slurm.sh", "--dry-run", "--nodes=08", "--gpus=010", "--grace=0090", "--", "x").stdout
    )
    assert (message["nodes"], message["gres"], message["ntasks-per-node"], message["signal"]) == (
        "8",
        "gpu:10",
        "10",
        "TERM@90",
    )
    place = ["--xpk", "--cluster=c", "--tpu-type=v5p-128", "--image=i"]
    shown = bash("launch/tpu_pod.sh", "--dry-run", "run", *place, "--slices=08", "--restarts=010", "--", "x").stdout
    assert {"--num-slices=8", "--max-restarts=10"} <= set(shlex.split(shown))


@pytest.mark.parametrize("folder", ["a b", "a'b", 'a"b', "$HOME", "$(date)", "a;b", "*"])
def test_a_folder_on_the_workers_keeps_its_name(tmp_path, folder):
    """One worker, whose ssh is this machine's shell: what it reads is in that very folder."""
    path = stand_in(tmp_path, ssh=f'mkdir -p {tmp_path}/home && cd {tmp_path}/home && exec bash -c "$4"')
    logs = tmp_path / "home" / folder / "logs"
    logs.mkdir(parents=True)
    (logs / "run.log").write_text("told\n")
    asked = ["--hosts=h", f"--directory={folder}"]
    assert bash("launch/tpu_pod.sh", "logs", *asked, path=path).stdout == "[h] told\n"
    install = bash("launch/tpu_pod.sh", "--dry-run", "setup", *asked).stdout.splitlines()[-1]
    assert shlex.split(shlex.split(install)[-1]).count(folder) == 3  # made, filled, entered


def test_the_home_folder_is_the_workers():
    for given, read in (("~/my runs", r"cd ~/my\ runs && "), ("~", "cd ~ && ")):
        shown = bash("launch/tpu_pod.sh", "--dry-run", "setup", "--hosts=h", f"--directory={given}").stdout
        assert read in shlex.split(shown.splitlines()[-1])[-1]


def test_tpu_pod_dry_runs():
    def shown(*argv: str) -> list[list[str]]:
        ran = bash("launch/tpu_pod.sh", "--dry-run", *argv)
        assert ran.returncode == 0, ran.stderr
        return [shlex.split(line) for line in ran.stdout.splitlines()]

    place = ["--tpu=pod", "--zone=us-east5-a", "--project=p"]
    archive, copy, install = shown("setup", *place)
    assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD"
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and copy[-1] == "--worker=all"
    assert install[-1].endswith("cd cfjax && PYTHON=python3 bash launch/setup.sh tpu")
    (started,) = shown("run", *place, "--", *TRAIN)
    assert started[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=us-east5-a", "--project=p", "--worker=all"} <= set(started)
    assert f" bash launch/worker.sh {TRAIN[0]} {TRAIN[1]}" in started[-1]
    (message,) = re.findall(r"nohup env (.*) bash launch/worker.sh", started[-1])
    page = "CFJAX_MAINTENANCE_URL=http://metadata.google.internal/computeMetadata/v1/instance/maintenance-event"
    assert shlex.split(message) == ["CFJAX_DISTRIBUTED=auto", "JAX_PLATFORMS=tpu,cpu", page]
    (more,) = shown("run", *place, "--env=A=b c", "--env=JAX_PLATFORMS=cpu", "--", *TRAIN)
    (message,) = re.findall(r"nohup env (.*) bash launch/worker.sh", more[-1])
    assert shlex.split(message)[-2:] == ["A=b c", "JAX_PLATFORMS=cpu"]  # the last one holds
    assert shown("stop", *place)[0][-1] == "--command=kill -TERM $(cat cfjax/logs/run.pid)"
    by_ssh = shown("run", "--hosts=me@h0,h1", "--port=1234", "--", *TRAIN)
    assert [words[3] for words in by_ssh] == ["me@h0", "h1"]
    for index, words in enumerate(by_ssh):
        assert f"JAX_COORDINATOR_ADDRESS=h0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index};" in words[-1]
    place = ["--xpk", "--cluster=c", "--tpu-type=v5p-128", "--image=i", "--slices=2"]
    (through_xpk,) = shown("run", *place, "--env=A=b c", "--env=D=", "--", *TRAIN)
    assert {"--env=A=b c", "--env=D="} <= set(through_xpk)
    assert through_xpk[:3] == ["xpk", "workload", "create"] and "--num-slices=2" in through_xpk
    assert "--restart-on-exit-codes=75" in through_xpk
    assert shlex.split(through_xpk[-1].removeprefix("--command=")) == ["bash", "launch/worker.sh", *TRAIN]


def test_tpu_pod_runs_and_stops_by_ssh(tmp_path):
    """Two workers, whose ssh is this machine's shell, each in a home of its own."""
    ssh = f'host="$3"; mkdir -p {tmp_path}/$host && cd {tmp_path}/$host && ln -sfn {ROOT}/launch . && exec bash -c "$4"'
    path = stand_in(tmp_path, ssh=ssh)
    place = ["--hosts=h0,h1", "--directory=."]
    report = 'trap "echo saved; exit 0" TERM; echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS'
    started = bash("launch/tpu_pod.sh", "run", *place, "--", "bash", "-c", f"{report}; sleep 60 & wait", path=path)
    assert started.returncode == 0, started.stderr
    logs = [tmp_path / host / "logs" / "run.log" for host in ("h0", "h1")]
    wait_for(lambda: all(log.exists() and "of" in log.read_text() for log in logs))
    assert [log.read_text().split("\n")[-2] for log in logs] == ["0 of 2 at h0:8476", "1 of 2 at h0:8476"]
    again = bash("launch/tpu_pod.sh", "run", *place, "--", "true", path=path)
    assert again.returncode != 0 and "a run is there already" in again.stdout
    assert bash("launch/tpu_pod.sh", "stop", *place, path=path).returncode == 0
    wait_for(lambda: all("saved" in log.read_text() for log in logs))
    shown = bash("launch/tpu_pod.sh", "logs", *place, path=path).stdout.splitlines()
    assert {"[h0] saved", "[h1] saved"} <= set(shown)


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobset_on_tpus(capsys):
    argv = ["--dry-run", "--name=dmd", "--image=reg/i", "--tpu=v5p:4x4x4", "--slices=2", "--bucket=b"]
    assert jobset.main([*argv, "--env", "A=b=c", "--env=JAX_PLATFORMS=", "--", *TRAIN]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert (made["kind"], made["apiVersion"], made["metadata"]["name"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2", "dmd")
    (job,) = made["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert job["replicas"] == 2 and spec["completions"] == spec["parallelism"] == 16 and spec["backoffLimit"] == 0
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["bash", "launch/worker.sh", *TRAIN]
    assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/bucket"}]
    assert pod["hostNetwork"] and pod["volumes"][0]["csi"]["volumeAttributes"]["hostNetworkPodKSA"] == "true"
    assert container["env"] == [{"name": "JAX_PLATFORMS", "value": ""}, {"name": "A", "value": "b=c"}]
    plain = jobset.manifest("dmd", TRAIN, jobset.Machines(image="i", tpu="v5p:4x4x4"))
    assert '"JAX_PLATFORMS", "value": "tpu,cpu"' in json.dumps(plain)
    # 2, a user's mistake, ends it; all else, 75 among it, starts it again
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2] and pod["restartPolicy"] == "Never"
    assert made["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_jobset_on_gpus_names_its_coordinator():
    """Pods of a JobSet are JOBSET-JOB-INDEX-POD.JOBSET: process 0 is pod 0."""
    made = jobset.manifest("dmd", TRAIN, jobset.Machines(image="i", gpu="nvidia-h100-80gb", nodes=4, bucket="b"))
    (job,) = made["spec"]["replicatedJobs"]
    container = job["template"]["spec"]["template"]["spec"]["containers"][0]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"] == f"dmd-{job['name']}-0-0.dmd:8476"
    assert (environment["JAX_PLATFORMS"], environment["LD_LIBRARY_PATH"]) == ("cuda", "/usr/local/nvidia/lib64")
    assert "hostNetworkPodKSA" not in json.dumps(made)
    assert environment["JAX_NUM_PROCESSES"] == "4" == str(job["template"]["spec"]["completions"])
    assert "job-completion-index" in json.dumps(container["env"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


@pytest.mark.parametrize(
    "name, machines, message",
    [
        ("Big_Name", {"tpu": "v5p:2x2x2"}, "--name=Big_Name"),
        ("a", {"tpu": "v9:2x2x2"}, "--tpu=v9:2x2x2"),
        ("a", {"tpu": "v5p:64"}, "write KIND:TOPOLOGY"),
        ("a", {"tpu": "v5e:2x4", "chips": 3}, "no multiple of --chips=3"),
        ("a", {}, "one of --tpu"),
        ("a", {"tpu": "v5p:2x2x2", "image": ""}, "--image is missing"),
        ("a", {"tpu": "v5p:2x2x2", "env": ("1A=b",)}, "--env=1A=b: write NAME=VALUE"),
        ("a", {"tpu": "v5p:2x2x2", "env": ("A=b\nc",)}, r"--env: 'A=b\nc' holds a line break"),
        ("a", {"tpu": "v5p:2x2x2", "image": "i\t"}, r"--image: 'i\t' holds a line break"),
        ("a", {"tpu": "v5p:2x2x2", "slices": 0}, "--slices=0: must be 1 or more"),
        ("a", {"tpu": "v5p:2x2x2", "chips": -4}, "--chips=-4: must be 0 or more"),
        ("a", {"gpu": "nvidia-h100-80gb", "nodes": -1}, "--nodes=-1: must be 1 or more"),
        ("a", {"gpu": "nvidia-h100-80gb", "grace": 0}, "--grace=0: must be 1 or more"),
        ("a", {"gpu": "nvidia-h100-80gb", "restarts": -1}, "--restarts=-1: must be 0 or more"),
    ],
)
def test_jobset_mistakes(name, machines, message):
    with pytest.raises(UserError, match=re.escape(message)):
        jobset.manifest(name, TRAIN, jobset.Machines(**{"image": "i", **machines}))


@pytest.mark.parametrize("code, message", [(0, ""), (1, "kubectl delete jobset NAME")])
def test_jobsets_are_created_again(tmp_path, monkeypatch, code, message):
    """To apply an ended JobSet once more would start nothing."""
    path = stand_in(tmp_path, kubectl=f'echo "$*" >{tmp_path}/asked; exit {code}')
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    made = jobset.manifest("a", TRAIN, jobset.Machines(image="i", tpu="v5p:2x2x2"))
    if code:
        with pytest.raises(UserError, match=message):
            jobset.submit([made], dry_run=False)
    else:
        jobset.submit([made], dry_run=False)
    assert (tmp_path / "asked").read_text() == "create --filename=-\n"
