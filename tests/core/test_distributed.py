"""Joining processes: what the environment says, two real processes, and errors for a wrong environment."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from cfjax.core.distributed import detected, initialize
from cfjax.core.errors import UserError

JOINED = """
from cfjax.core.distributed import initialize
assert initialize() and initialize()
import jax
from cfjax.core.sharding import batch_rows, make_mesh
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.asarray(1 + jax.process_index())).sum()
rows = batch_rows(make_mesh(data=2), 6)
print(jax.process_index(), jax.process_count(), jax.device_count(), total, *rows, flush=True)
"""
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "environment, cluster",
    [
        ({}, ""),
        ({**SLURM, "SLURM_NTASKS": "16"}, "slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, ""),  # srun --pty bash
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, ""),  # the batch script itself
        ({"OMPI_MCA_orte_hnp_uri": "1;tcp", "OMPI_COMM_WORLD_SIZE": "2"}, "openmpi"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
    ],
)
def test_clusters_are_known_by_their_variables(environment, cluster):
    assert detected(environment) == cluster


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_NTASKS": "16", "CFJAX_DISTRIBUTED": "off"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_process_alone_is_left_alone(environment):
    """JAX is in use in this process, so that an attempt to join would raise."""
    assert initialize(environment) is False


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "needs JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS not set"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "must be 0 to 1"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES"),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "host:port"),
        ({"CFJAX_DISTRIBUTED": "yes"}, "use auto, off"),
    ],
)
def test_a_wrong_environment_is_reported_in_one_line(environment, message):
    with pytest.raises(UserError, match=message) as error:
        initialize(environment)
    assert "\n" not in str(error.value)


def test_joining_after_jax_was_used_is_reported():
    jax.devices()
    with pytest.raises(UserError, match=r"process 0 of 2.*before any JAX calls"):
        initialize({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"})


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_an_absent_coordinator_is_reported(free_port, host):
    address = f"{host}:{free_port}"
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    with pytest.raises(UserError, match=rf"{address}.*process 1 of 2: nothing listens there") as error:
        initialize(environment, timeout_seconds=1)
    assert "\n" not in str(error.value)


def test_two_processes_join(free_port):
    """The variables that the launchers set; a collective runs, a second call changes nothing, a batch is divided."""
    ours = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port}", "JAX_NUM_PROCESSES": "2"}
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    clean |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1", **ours}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED], env={**clean, "JAX_PROCESS_ID": str(i)}, stdout=-1, stderr=-1, text=True
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    assert [out.splitlines()[-1].split() for out, _ in ends] == [
        ["0", "2", "2", "3", "0", "1", "2"],
        ["1", "2", "2", "3", "3", "4", "5"],
    ]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


DIES = """
import os, sys, types
import jax
import cfjax.__main__ as entry
from cfjax.core.errors import UserError
from jax.experimental import multihost_utils
def train(argv):
    if jax.process_index() == int(argv[0]):
        raise UserError("the data is not on this machine")
    multihost_utils.process_allgather(jax.numpy.asarray(1))
sys.modules["cfjax.train"] = types.ModuleType("cfjax.train")
sys.modules["cfjax.train"].main = train
sys.exit(entry.main(["train", sys.argv[1]]))
"""


def start(script: str, index: int, port: int, *argv: str) -> subprocess.Popen:
    place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
    environment = {**os.environ, **place, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", script, *argv], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_ends_while_it_starts_is_reported_by_the_other_in_a_line(free_port, dying):
    """Within seconds, with its exit code, and not by XLA after its heartbeats are missed."""
    started = [start(DIES, index, free_port, str(dying)) for index in range(2)]
    message = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], message
    assert message[dying].splitlines()[-1] == f"cfjax: process {dying} of 2 ends: the data is not on this machine"
    other = f"cfjax: process {dying} of 2 has ended, and so does this one, {1 - dying}: the data is not on this machine"
    assert message[1 - dying].splitlines()[-1] == other


def test_a_process_whose_peer_does_not_start_says_so(free_port):
    alone = start("from cfjax.core.distributed import initialize\ninitialize(timeout_seconds=2)", 0, free_port)
    message = alone.communicate(timeout=300)[1]
    assert alone.returncode == 75, message
    assert message.splitlines()[-1].startswith(
        "cfjax: this process waited 2 s for the others of its run, coordinator 127."
    )
