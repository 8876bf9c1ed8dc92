"""A probe: one quantity, computed by cfjax and by the PyTorch reference from the same weights, inputs and draws.

The two sides are separate functions of a `Subject`, so that the reference's answers can be recorded once and cfjax held
against the record without a clone. Names of results say how they are compared: `grad/...` together as parameter
gradients, `layer/...` as the layers of the result they come with, everything else by itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from cfjax.comparison.case import Case, have
from cfjax.comparison.report import Row, compare_arrays, compare_named
from cfjax.conversion.wan import ORIGINAL, export_wan
from cfjax.core.tree import map_named
from cfjax.models.wan import Wan, WanConfig
from cfjax.nn.visibility import Blocks

if TYPE_CHECKING:
    from cfjax.comparison.reference import Reference

BATCH = 2
SHAKE = 0.1  # of every parameter: how far the other roles' networks are from the student's
Arrays = dict[str, np.ndarray]


class Subject:
    """A case with its networks and the test inputs that every probe draws from by name."""

    def __init__(self, case: Case):
        self.case = case

    @cached_property
    def student(self) -> Wan:
        """The case's own network."""
        return have("dit", self.case.dit)

    def role(self, name: str) -> Wan:
        """Another network of the same sizes (ema, teacher, critic, real_score): the student's weights, perturbed."""
        if name == "student":
            return self.student
        shaken = lambda leaf, x: x * (1.0 + SHAKE * self.case.normal(f"{name} {leaf}", *x.shape))
        return map_named(shaken, self.student)

    @cached_property
    def _student_weights(self) -> Arrays:
        return weights(self.student)

    def weights(self, role: str = "student") -> Arrays:
        """A role's weights in the original layout; the student's are kept, being asked for by every probe."""
        return self._student_weights if role == "student" else weights(self.role(role))

    @property
    def config(self) -> WanConfig:
        return self.student.config

    @property
    def tokens_per_frame(self) -> int:
        return self.config.tokens_per_frame(self.case.height, self.case.width)

    def blocks(self, frames: int) -> list[Blocks]:
        """Layouts to try for a clip of so many frames: the case's own block size, 3 and 1, those that divide it."""
        sizes = sorted({self.case.blocks.frames, 3, 1}, reverse=True)
        return [Blocks(frames=n) for n in sizes if frames % n == 0]

    def latents(self, name: str, frames: int = 0) -> np.ndarray:
        """N(0, 1) latents_BFHWC."""
        case = self.case
        return case.normal(name, BATCH, frames or case.frames, case.height, case.width, self.config.in_dim)

    def text(self, name: str = "positive") -> np.ndarray:
        """Text rows [B, S, E]; the last two are zeros, as behind a short prompt (quirk Q18)."""
        rows = self.case.normal(f"text {name}", BATCH, self.case.text_length, self.config.text_dim)
        rows[:, -2:] = 0.0
        return rows

    @property
    def negative_text(self) -> np.ndarray:
        """The negative prompt's rows [S, E]."""
        return self.text("negative")[0]

    def index(self, name: str, low: int, high: int, *shape: int) -> np.ndarray:
        """Integers in [low, high)."""
        return (low + (high - low) * self.case.uniform(name, *shape)).astype(np.int64)


class NotInReference(Exception):
    """The reference has no counterpart; the message says why."""


@dataclass(frozen=True)
class Probe:
    """One quantity.

    Attributes:
      part: the check it belongs to.
      what: its name in the table.
      ours, theirs: the two sides, named arrays.
      tolerance: relative bound of the values.
      gradient_tolerance: relative bound of parameter gradients.
      note: what a reader should know, quirks foremost.
    """

    part: str
    what: str
    ours: Callable[[Subject], Mapping[str, Any]]
    theirs: Callable[["Reference", Subject], Mapping[str, Any]]
    tolerance: float = 1e-4
    gradient_tolerance: float = 1e-3
    note: str = ""

    def run_ours(self, subject: Subject) -> Arrays:
        """cfjax's results."""
        return {name: np.asarray(x) for name, x in self.ours(subject).items()}

    def run_theirs(self, reference: "Reference", subject: Subject) -> Arrays:
        """The reference's results.

        Raises:
          NotInReference: this clone cannot give them.
        """
        return {name: np.asarray(x) for name, x in self.theirs(reference, subject).items()}

    def rows(self, subject: Subject, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Row]:
        """Both sides, compared."""
        case = subject.case
        layers = {n.removeprefix("layer/"): (ours[n], theirs[n]) for n in theirs if n.startswith("layer/")}
        gradients = [name for name in theirs if name.startswith("grad/")]
        for name in theirs:
            if name.startswith(("layer/", "grad/")):
                continue
            what = ": ".join(filter(None, (self.what, name)))
            tolerance = case.bound(self.tolerance)
            sides = (ours[name], theirs[name])
            yield compare_arrays(self.part, what, *sides, layers=layers, tolerance=tolerance, note=self.note)
        if gradients:
            yield compare_named(
                self.part,
                f"{self.what}: parameter gradients",
                {n.removeprefix("grad/"): x for n, x in ours.items() if n.startswith("grad/")},
                {n.removeprefix("grad/"): theirs[n] for n in gradients},
                tolerance=case.bound(self.gradient_tolerance),
                note=self.note,
            )

    def compare(self, reference: "Reference", subject: Subject) -> Iterator[Row]:
        """Runs both sides. What the clone does not have is one row that says so and passes."""
        try:
            theirs = self.run_theirs(reference, subject)
        except NotInReference as absent:
            yield Row(self.part, self.what, (), math.nan, math.nan, math.nan, self.tolerance, "", str(absent), True)
            return
        yield from self.rows(subject, self.run_ours(subject), theirs)


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` for a program that runs once. On a CPU LLVM's optimisation, which takes longer than the run, is off."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)


def weights(model: Wan) -> Arrays:
    """A network, or its gradient, in the original release's names and layout."""
    return export_wan(model, ORIGINAL)


def gradients(model: Wan) -> Arrays:
    """Parameter gradients by the original's names, as `Probe` wants them."""
    return {f"grad/{name}": x for name, x in weights(jax.device_get(model)).items()}


def to_torch(latents_BFHWC: np.ndarray) -> Any:
    """[B, F, H, W, C] as the reference's [B, F, C, H, W] tensor."""
    import torch

    return torch.tensor(np.ascontiguousarray(np.moveaxis(latents_BFHWC, -1, -3)))


def from_torch(latents: Any) -> np.ndarray:
    """The reference's [B, F, C, H, W] as [B, F, H, W, C]."""
    return np.moveaxis(latents.detach().numpy(), -3, -1)
