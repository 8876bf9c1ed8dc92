"""Submits a command to Kubernetes as a JobSet, on TPU slices (tpu.yaml) or GPU nodes (gpu.yaml).

    python launch/gke/jobset.py --name=dmd --image=IMAGE --tpu=v5p:4x4x4 --bucket=BUCKET \\
        -- cfjax train --config=configs/dmd.py --workdir=/bucket/runs/dmd
    python launch/gke/jobset.py --name=dmd --image=IMAGE --gpu=nvidia-h100-80gb --nodes=4 -- cfjax train ...
    python launch/gke/jobset.py --dry-run ...        prints the manifest instead of giving it to kubectl
    python launch/gke/jobset.py --env NAME=VALUE ... a variable of every process; may be repeated

--bucket mounts a Cloud Storage bucket at /bucket (GKE's gcsfuse driver; the service account must be allowed to use it,
and the bucket needs a hierarchical namespace, so that a checkpoint's folder is renamed at once). A JobSet that has
ended keeps its name until `kubectl delete jobset NAME`; the same command then goes on with the run.
"""

import argparse
import json
import math
import re
import string
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cfjax.__main__ import SHARED
from cfjax.core.console import say
from cfjax.core.errors import UserError

HERE = Path(__file__).parent
PORT = 8476
LEAST = {"slices": 1, "nodes": 1, "grace": 1}  # of the other numbers 0
TPUS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}


@dataclass(frozen=True)
class Machines:
    """Where a JobSet runs: `tpu` as v5p:4x4x4 (chips along each axis of one slice), or `gpu`, GKE's name of one.

    `chips`: chips or GPUs of one host; 0 is what is usual: all of a slice of one host, else 4; 8 GPUs.
    `env`: NAME=VALUE of every process, over what this file sets.
    """

    image: str
    tpu: str = ""
    slices: int = 1
    gpu: str = ""
    nodes: int = 1
    chips: int = 0
    bucket: str = ""
    service_account: str = "default"
    restarts: int = 100
    grace: int = 300
    env: Sequence[str] = ()


def manifest(name: str, command: Sequence[str], machines: Machines) -> dict[str, Any]:
    """The JobSet that runs `command` on every host of `machines`.

    Raises:
      UserError: a name that Kubernetes refuses; a number too small, a line break in an option; a slice that is not
        one; neither or both of tpu and gpu; a variable without a value; a verb that is one process's, on several hosts.
    """
    _check_options(command, machines)
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name={name}: small letters, digits and dashes, from a letter, at most 40: pods are named by it"
        )
    if bool(machines.tpu) == bool(machines.gpu):
        raise UserError("name the machines by one of --tpu=v5p:4x4x4 and --gpu=nvidia-h100-80gb")
    if not machines.image:
        raise UserError("--image is missing: the container's image, see launch/gke/Dockerfile")
    if not command:
        raise UserError("no command behind --, as in -- cfjax train --config=configs/dmd.py --workdir=/bucket/runs/dmd")
    values = _tpu(machines) if machines.tpu else _gpu(name, machines)
    if values["hosts"] * values["slices"] > 1 and command[0] == "cfjax" and command[1:2] and command[1] not in SHARED:
        raise UserError(f"cfjax {command[1]} is one process's work; name one host, as --tpu=v5p:2x2x1 or --nodes=1")
    bucket = bool(machines.bucket)
    values |= {
        "name": name,
        "command": ["bash", "launch/worker.sh", *command],
        "image": machines.image,
        "restarts": machines.restarts,
        "grace": machines.grace,
        "service_account": machines.service_account,
        "pod_annotations": {"gke-gcsfuse/volumes": "true"} if bucket else {},
        "volumes": [_bucket(machines)] if bucket else [],
        "mounts": [{"name": "bucket", "mountPath": "/bucket"}] if bucket else [],
    }
    return _fill("tpu.yaml" if machines.tpu else "gpu.yaml", values)


def _check_options(command: Sequence[str], machines: Machines) -> None:
    """Refuses numbers that are no counts, and line breaks, which logs and other launchers would not survive."""
    for field, value in vars(machines).items():
        name, least = f"--{field.replace('_', '-')}", LEAST.get(field, 0)
        if isinstance(value, int) and value < least:
            raise UserError(f"{name}={value}: must be {least} or more")
        check_plain(name, *([value] if isinstance(value, str) else value if field == "env" else []))
    check_plain("the command", *command)


def check_plain(what: str, *words: str) -> None:
    """Refuses words with a line break, or another control character, in them.

    Raises:
      UserError: there is one; `what` names the option.
    """
    for word in words:
        if any(unicodedata.category(letter) == "Cc" for letter in word):
            raise UserError(f"{what}: {word!r} holds a line break or another control character")


def _fill(file: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON is YAML, so every value stands in the template as it is."""
    text = string.Template((HERE / file).read_text())
    return yaml.safe_load(text.substitute({key: json.dumps(value) for key, value in values.items()}))


def _tpu(machines: Machines) -> dict[str, Any]:
    kind, _, topology = machines.tpu.partition(":")
    if kind not in TPUS or not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", topology):
        raise UserError(f"--tpu={machines.tpu}: write KIND:TOPOLOGY, as v5p:4x4x4; kinds: {', '.join(TPUS)}")
    total = math.prod(map(int, topology.split("x")))
    chips = machines.chips or min(total, 4)
    if total % chips:
        raise UserError(f"--tpu={machines.tpu}: its {total} chips are no multiple of --chips={chips} per host")
    return {
        "accelerator": TPUS[kind],
        "topology": topology,
        "slices": machines.slices,
        "hosts": total // chips,
        "chips": chips,
        "environment": _environment(machines, {"name": "JAX_PLATFORMS", "value": "tpu,cpu"}),
    }


def _gpu(name: str, machines: Machines) -> dict[str, Any]:
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return {
        "slices": 1,
        "hosts": machines.nodes,
        "chips": machines.chips or 8,
        "node_selector": {"cloud.google.com/gke-accelerator": machines.gpu},
        "environment": _environment(
            machines,
            {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"},  # where GKE mounts the driver
            {"name": "JAX_PLATFORMS", "value": "cuda"},  # "cuda,cpu" would pass over GPUs that are not there
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-node-0-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(machines.nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": index},
        ),
    }


def _environment(machines: Machines, *ours: dict[str, Any]) -> list[dict[str, Any]]:
    for word in machines.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", word):
            raise UserError(f"--env={word}: write NAME=VALUE")
    given = (dict(zip(("name", "value"), word.split("=", 1), strict=True)) for word in machines.env)
    return list({one["name"]: one for one in (*ours, *given)}.values())


def _bucket(machines: Machines) -> dict[str, Any]:
    attributes = {"bucketName": machines.bucket, "mountOptions": "implicit-dirs"}
    if machines.tpu:  # these pods use the host's network, where the driver takes the pod's account only if asked
        attributes["hostNetworkPodKSA"] = "true"
    return {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `Machines`."""
    for name, default in vars(Machines(image="")).items():
        kind: dict[str, Any] = {"type": type(default), "default": default}
        if name == "env":
            kind = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)


def machines_of(given: argparse.Namespace) -> Machines:
    """What the flags of `add_arguments` say."""
    return Machines(**{name: getattr(given, name) for name in vars(Machines(image=""))})


def submit(manifests: Sequence[Mapping[str, Any]], *, dry_run: bool) -> None:
    """Gives the manifests to kubectl, or prints them.

    They are created, not applied: to apply a JobSet that has ended changes nothing and starts nothing.

    Raises:
      UserError: no kubectl, or it refuses, also a name that is taken.
    """
    text = yaml.safe_dump_all(manifests, sort_keys=False, width=120)
    if dry_run:
        return say(text.rstrip())
    try:
        subprocess.run(["kubectl", "create", "--filename=-"], input=text, text=True, check=True)
    except FileNotFoundError:
        raise UserError("no kubectl here; --dry-run shows what would be submitted") from None
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"kubectl refused (exit code {error.returncode}), its reason stands above; "
            "a JobSet that is there already goes by kubectl delete jobset NAME"
        ) from None


def main(argv: Sequence[str]) -> int:
    """Reads the command line; returns the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cfjax")
    parser.add_argument("--dry-run", action="store_true")
    add_arguments(parser)
    given = parser.parse_args(argv[:split])
    submit([manifest(given.name, argv[split + 1 :], machines_of(given))], dry_run=given.dry_run)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"launch/gke/jobset.py: {error}\n")
        sys.exit(2)
