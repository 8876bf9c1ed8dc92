"""Real processes on one machine train one run: killed, gone on with by other numbers of processes and other meshes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import tensorstore as ts

from cfjax.data.precompute import LatentWriter
from cfjax.training.watchdog import STALLED
from tests.quick import QUICK

ROOT = Path(__file__).parents[2]
RECORDS, SHAPE, STEPS = 16, (2, 4, 4, 4), 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    with LatentWriter(root / "clips", records=RECORDS, latent_shape=SHAPE) as writer:
        writer.append(rng.standard_normal((RECORDS, *SHAPE)).astype(np.float32), np.arange(RECORDS) % 3)
        text = rng.standard_normal((4, 2, 8)).astype(np.float32)
        writer.write_text(["a", "b", "c"], text[:3], text[3])
    return root


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def place_in_run(index: int, count: int, port: int) -> dict[str, str]:
    """The variables by which a launcher tells a process its run."""
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return {**address, "JAX_PROCESS_ID": str(index)} if count > 1 else {}


# By the config, what its objective, cadence and roles need besides. DMD's is the one with two optimisers and a rollout.
STAGES = {
    "ar_diffusion": {"roles.student.init": ""},
    "dmd": {
        "objective.steps": "(1000, 500)",
        "cadence.student": 2,
        "optim.critic.eps": 1e-3,
        **{f"roles.{role}.init": "" for role in ("student", "critic", "real_score")},
    },
}


class Run:
    """The processes of one `cfjax train`, each a device of the mesh (or `devices` of them).

    With `worker`, launch/worker.sh is around each, as a launcher puts it.
    """

    def __init__(
        self,
        data: Path,
        workdir: Path,
        count: int,
        *,
        devices: int = 1,
        mesh: str = "",
        stage: str = "dmd",
        stall: float = 600.0,
        worker: bool = False,
        keys: Mapping[str, object] = MappingProxyType({}),
        **environment: str,
    ) -> None:
        port = free_port()
        values = {
            "data.source": "",
            "data.path": data,
            "data.batch_size": 4,
            "blocks.frames": 1,
            "steps": STEPS,
            "save_every": 2,
            "log_every": 1,
            "guard.enabled": False,
            "sample_clips": 0,
            "progress": False,
            "optim.student.eps": 1e-3,  # Adam makes a step of every rounding error in a gradient that is zero
            "stall_seconds": stall,
            **STAGES[stage],
            **{f"mesh.{axis}": size for axis, size in (part.split("=") for part in mesh.split())},
            **keys,
        }
        command = ["bash", str(ROOT / "launch/worker.sh")] if worker else []
        command += [sys.executable, str(ROOT / "tests/training/process.py"), "train"]
        command += [f"--config={ROOT}/configs/{stage}.py:toy", f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in values.items()]
        flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
        self.processes = []
        for index in range(count):
            own = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **environment}
            own |= place_in_run(index, count, port)
            with (workdir.parent / f"{workdir.name}.{index}.log").open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **own},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        self.workdir = workdir

    def output(self, index: int = 0) -> str:
        return (self.workdir.parent / f"{self.workdir.name}.{index}.log").read_text()

    def finish(self) -> list[int]:
        try:
            return [process.wait(timeout=900) for process in self.processes]
        finally:
            self.kill()

    def saved(self) -> int:
        """Step of the newest complete checkpoint."""
        names = [path.name for path in (self.workdir / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=-1)

    def records(self, index: int) -> list[list[int]]:
        """Of every batch, the records that a process read; those of earlier runs in the folder too."""
        return [list(map(int, line.split())) for line in re.findall("^records (.*)$", self.output(index), re.MULTILINE)]

    def until_saved(self, step: int) -> None:
        """Waits for a complete checkpoint of `step` or later."""
        limit = time.monotonic() + 900
        while self.saved() < step:
            alive = all(process.poll() is None for process in self.processes)
            if not alive or time.monotonic() > limit:
                self.kill()
                raise AssertionError(self.output())
            time.sleep(0.05)

    def kill_after(self, step: int) -> None:
        """SIGKILL to all once a checkpoint of `step` or later is complete."""
        self.until_saved(step)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def weights(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint."""
    state = workdir / "checkpoints" / str(STEPS) / "state"
    base = {"driver": "ocdbt", "base": f"file://{state}/"}
    store = ts.KvStore.open(base).result()
    names = sorted(key.decode().removesuffix("/.zarray") for key in store.list().result() if key.endswith(b".zarray"))
    kvstore = [{**base, "path": f"{name}/"} for name in names]
    opened = [ts.open({"driver": "zarr", "kvstore": spec}, open=True).result() for spec in kvstore]
    return dict(zip(names, [array.read().result() for array in opened], strict=True))


def assert_same(run: Run, other: Run) -> None:
    errors, got, expected = {}, weights(run.workdir), weights(other.workdir)
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        errors[name] = float(
            np.linalg.norm((got[name] - wanted).astype(np.float64)) / max(np.linalg.norm(wanted), 1e-6)
        )
    worst = sorted(errors, key=errors.__getitem__)[-3:]
    print(run.workdir.name, {name: f"{errors[name]:.1e}" for name in worst})
    weights_alone = {name: error for name, error in errors.items() if name.startswith(("params", "ema"))}
    assert max(weights_alone.values()) < 1e-5


def test_a_checkpoint_that_one_process_cannot_read_is_set_aside_by_all(tmp_path):
    command = [sys.executable, str(ROOT / "tests/training/restoring.py"), str(tmp_path / "run")]
    port, flags = free_port(), f"--xla_force_host_platform_device_count=1 {QUICK}"
    own = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(command, env=own | place_in_run(index, 2, port), stdout=-1, stderr=-1, text=True)
        for index in range(2)
    ]
    try:
        ends = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], ends
    assert [out.splitlines()[-1] for out, _ in ends] == [f"{index} 1.0 1.0 1 1.0 [1, 2]" for index in range(2)], ends
    assert "2 is broken and is passed over (OSError: input/output error)" in ends[1][1]
    assert "step 2 is passed over, as another process cannot read it" in ends[0][1]
    assert (tmp_path / "run/checkpoints_broken/2").is_dir()


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The whole run in one process on one device."""
    run = Run(data, tmp_path_factory.mktemp("alone") / "run", 1)
    assert run.finish() == [0], run.output()
    return run


@pytest.mark.slow
def test_killed_and_gone_on_with_by_other_processes_it_is_the_same_run(data, alone, tmp_path):
    """Two processes, killed; four on another mesh, killed; one with two devices to the end."""
    workdir = tmp_path / "run"
    Run(data, workdir, 2, mesh="data=2", TEST_PAUSE="0.5").kill_after(2)
    Run(data, workdir, 4, mesh="fsdp=2 context=2", TEST_PAUSE="0.5").kill_after(4)
    last = Run(data, workdir, 1, devices=2, mesh="tensor=2")
    assert last.finish() == [0], last.output()
    assert len(re.findall("going on from step", last.output())) == 2, last.output()
    assert_same(last, alone)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_goes_on(data, alone, tmp_path):
    """Together they read every record of every batch once, as one process alone does."""
    stopped = Run(data, tmp_path / "run", 2, mesh="data=2", worker=True, TEST_PAUSE="2")
    stopped.until_saved(2)
    stopped.processes[1].send_signal(signal.SIGTERM)
    codes = stopped.finish()
    assert codes == [0, STALLED], (codes, stopped.output(0), stopped.output(1))  # 75 is the word of who was told
    steps = [re.findall(r"SIGTERM: saved step (\d+) of 6", stopped.output(index)) for index in range(2)]
    assert steps[0] == steps[1] == [str(stopped.saved())] and 2 < stopped.saved() < STEPS
    resumed = Run(data, tmp_path / "run", 2, mesh="data=2", keys={"log_every": 2})
    assert resumed.finish() == [0, 0], resumed.output()
    changed = f"changed since step {steps[0][0]}: log_every 1 -> 2\n"
    assert [resumed.output(index).count(changed) for index in range(2)] == [1, 0]  # the first says it for all
    assert all(f"going on from step {steps[0][0]}\n" in resumed.output(index) for index in range(2))
    assert_same(resumed, alone)
    first, second, whole = resumed.records(0), resumed.records(1), alone.records(0)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole and all(len(set(batch)) == 4 for batch in whole)

    refused = Run(data, tmp_path / "run", 2, mesh="data=2", keys={"objective.shift": 3.0})
    assert refused.finish() == [2, 2], refused.output()
    line = f"objective.shift 5.0 -> 3.0 since its checkpoint of step {STEPS}, which changes what the run learns"
    assert all(line in refused.output(index).splitlines()[-1] for index in range(2))


@pytest.mark.slow
def test_a_process_that_hangs_or_dies_ends_the_others(data, tmp_path):
    run = Run(data, tmp_path / "hangs", 2, mesh="data=2", stage="ar_diffusion", stall=20.0, TEST_HANG="1")
    codes = run.finish()
    assert STALLED in codes and all(codes), (codes, run.output(0), run.output(1))
    assert any("no iteration ended in 20 s after step" in run.output(i) for i in range(2)), run.output()
    run = Run(data, tmp_path / "dies", 2, mesh="data=2", stage="ar_diffusion", TEST_PAUSE="0.5")
    run.until_saved(2)
    run.processes[1].send_signal(signal.SIGKILL)
    codes = run.finish()
    # A collective failed, perhaps one inside a save; on a busy machine the coordination service may abort it first.
    assert codes[0] in (STALLED, -signal.SIGABRT) and codes[1] == -signal.SIGKILL, (codes, run.output())
    last = run.output().splitlines()[-1]
    ended = "cfjax: process 0 of 2 ends: (another one died|.*checkpoint could not be written)"
    assert codes[0] != STALLED or re.match(ended, last), last
