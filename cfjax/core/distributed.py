"""Joining the processes of one run by the launcher's environment, before any JAX computation.

JAX finds the other processes itself under SLURM (inside `srun`), Open MPI, on Cloud TPU and on TPUs of GKE. Elsewhere
the launcher sets three variables, which also override what a cluster says:

    JAX_COORDINATOR_ADDRESS   host:port of process 0, the same for all
    JAX_NUM_PROCESSES         how many processes there are
    JAX_PROCESS_ID            which one this is, from 0
    JAX_LOCAL_DEVICE_IDS      optional: the devices of this process, as 0,1 (default: all that the host shows)

CFJAX_DISTRIBUTED=auto asks for JAX's own detection, which on Cloud TPU machines is a question to their metadata server
(launch/tpu_pod.sh sets it); CFJAX_DISTRIBUTED=off keeps a process alone whatever surrounds it. With none of these, a
process that no cluster names as one of several is left alone.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
from absl import logging

from cfjax.core.console import complain
from cfjax.core.errors import Temporary, UserError
from cfjax.core.peers import watch_peers

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SWITCH = "CFJAX_DISTRIBUTED"
_LATER = 60  # seconds by which XLA's own deadline, which aborts, comes after ours

# What `srun` sets for the tasks of a step; a batch script or a login shell inside an allocation lacks some of them.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def initialize(environment: Mapping[str, str] | None = None, *, timeout_seconds: int = 300) -> bool:
    """Joins this process to its run, if it is one of several. Call once, before JAX is used.

    Args:
      environment: variables (default: the process's own).  JAX's detection reads the process's own in any case.
      timeout_seconds: how long the coordinator is waited for, and then the others. XLA cannot stop waiting
        for these, so the process exits then with a one-line error and exit code 75.

    Returns:
      Whether the process is now joined to others.

    Raises:
      UserError: the three variables are incomplete or contradictory.
      Temporary: the coordinator or the cluster's metadata can't be reached (or JAX is in use).
    """
    if jax.distributed.is_initialized():
        return True
    environment = os.environ if environment is None else environment
    switch = environment.get(SWITCH, "")
    if switch not in ("", "auto", "off"):
        raise UserError(f"{SWITCH}={switch!r}: use auto, off, or leave it unset")
    if switch == "off":
        return False
    given = _given(environment)
    cluster = "" if given else "cluster" if switch == "auto" else detected(environment)
    if not given and not cluster:
        return False
    where = f"{given[0]} ({ADDRESS}), process {given[2]} of {given[1]}" if given else f"found by JAX ({cluster})"
    try:
        if given:
            _initialize_given(*given, _device_ids(environment), timeout_seconds)
        else:
            with _bounded(timeout_seconds, where):
                jax.distributed.initialize(initialization_timeout=timeout_seconds + _LATER)
    except Exception as error:  # JAX, gRPC and the metadata client each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = UserError if isinstance(error, ValueError) else Temporary  # what the cluster says makes no sense
        raise kind(f"this process can't join its run, coordinator {where}: {reason}") from error
    logging.info("joined: coordinator %s", where)
    watch_peers()
    return True


def detected(environment: Mapping[str, str]) -> str:
    """The cluster of which this process is one of several: "slurm", "openmpi", "tpu", or "" for none."""
    if all(name in environment for name in _SLURM) and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "openmpi"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:  # as GKE sets them
        return "tpu"
    return ""


def _given(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(address, number of processes, index) as the launcher gave them, or None."""
    values = {name: environment.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
    if not values[COUNT] and not values[INDEX]:  # an address alone is JAX's own: a cluster may provide the rest
        if values[ADDRESS] and not detected(environment) and environment.get(SWITCH) != "auto":
            raise UserError(f"{ADDRESS}={values[ADDRESS]!r} needs {COUNT} and {INDEX} too; no cluster provides them")
        return None
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)} not set; a run started by hand needs {ADDRESS}, {COUNT} and {INDEX}")
    count, index = (_number(name, values[name]) for name in (COUNT, INDEX))
    if not 0 <= index < count:
        raise UserError(f"{INDEX}={index}: must be 0 to {count - 1}, as {COUNT}={count}")
    host, _, port = values[ADDRESS].rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{ADDRESS}={values[ADDRESS]!r}: write host:port")
    return None if count == 1 else (values[ADDRESS], count, index)


def _number(name: str, value: str) -> int:
    if not value.strip().isdigit():
        raise UserError(f"{name}={value!r}: must be a whole number")
    return int(value)


def _device_ids(environment: Mapping[str, str]) -> list[int] | None:
    name = "JAX_LOCAL_DEVICE_IDS"
    text = environment.get(name, "")
    return [_number(name, part) for part in text.split(",")] if text else None


def _wait_for(address: str, timeout_seconds: int) -> None:
    """Returns once something listens at `address`; XLA's own client aborts the process where nothing ever does."""
    host, _, port = address.rpartition(":")
    deadline, error = time.monotonic() + timeout_seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as failed:  # not up yet, or its name not known yet
            error = str(failed)
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
    raise TimeoutError(f"nothing listens there after {timeout_seconds} s ({error}); start process 0 or fix {ADDRESS}")


def _initialize_given(address: str, count: int, index: int, device_ids: list[int] | None, timeout_seconds: int) -> None:
    """Without "deactivate", JAX would look for a cluster all the same and give a SLURM task one device only."""
    if index > 0:
        _wait_for(address, timeout_seconds)
    with _bounded(timeout_seconds, f"{address} ({ADDRESS}), process {index} of {count}"):
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout_seconds + _LATER,
        )


@contextmanager
def _bounded(seconds: int, where: str) -> Iterator[None]:
    """Exits the process with a one-line error when the block takes longer: XLA's waiting cannot be interrupted."""

    def end() -> None:
        complain(
            f"cfjax: this process waited {seconds} s for the others of its run, coordinator {where}: one did not start "
            "or died before it joined; see what it said, and give the same command again"
        )
        os._exit(Temporary.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
