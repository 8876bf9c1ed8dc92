"""`--against=reference`: every check of a clone of the PyTorch reference, by the names that `--only` knows."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from cfjax.comparison.case import Case
from cfjax.comparison.probe import Probe, Subject
from cfjax.comparison.reference import check_clone, open_reference
from cfjax.comparison.reference_encoders import text_probes, tokenizer_probes, vae_probes
from cfjax.comparison.reference_forward import forward_probes, schedule_probes
from cfjax.comparison.reference_losses import consistency_probes, diffusion_probes, ode_probes
from cfjax.comparison.reference_matching import dmd_probes
from cfjax.comparison.reference_rollout import rollout_probes, window_probes
from cfjax.comparison.report import Check, Row

PROBES: dict[str, Callable[[Subject], list[Probe]]] = {
    "schedules": schedule_probes,
    "forward": forward_probes,
    "rollout": rollout_probes,
    "window": window_probes,
    "vae": vae_probes,
    "text": text_probes,
    "tokenizer": tokenizer_probes,
    "ar_diffusion": diffusion_probes,
    "ode_regression": ode_probes,
    "consistency": consistency_probes,
    "dmd": dmd_probes,
}


SMALL = 256  # width up to which a network's matrices gain nothing from threads, and lose much on a busy machine


@contextlib.contextmanager
def _threads(subject: Subject) -> Iterator[None]:
    """One thread on PyTorch's side for a small network, its usual number for a large one."""
    usual = torch.get_num_threads()
    if subject.config.dim <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _check(root: Path, probes: Callable[[Subject], list[Probe]], case: Case) -> list[Row]:
    subject, rows = Subject(case), list[Row]()
    with open_reference(root) as reference, _threads(subject):
        for probe in probes(subject):
            rows += probe.compare(reference, subject)
    return rows


def open_checks(reference_dir: str | Path) -> dict[str, Check[Case]]:
    """The checks of a clone, which is imported afresh for each.

    Raises:
      UserError: the folder is missing or is not a clone.
    """
    root = check_clone(reference_dir)
    return {name: partial(_check, root, probes) for name, probes in PROBES.items()}
