"""Scorers: numbers of clips that need weights, of official implementations or of one's own, behind one contract.

A scorer is an entry point of the group `cfjax.scorers`: a name, and a function that makes the scorer of its settings.

    [options.entry_points]
    cfjax.scorers =
        sharp = my_package.sharp:make

    def make(settings: ScorerSettings) -> Scorer: ...

What comes with cfjax is found and made in the same way (`BUILT_IN`). Nothing of a scorer is imported before it is
asked for.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import one_line
from cfjax.evaluation.clip_source import SourceClip, reading

GROUP = "cfjax.scorers"
NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a scorer, and of each of its numbers
DEVICES = ("", "cpu", "cuda")
_ROOM = "cfjax.evaluation"
BUILT_IN = {
    "lpips": f"{_ROOM}.lpips_scorer:make",
    "fvd": f"{_ROOM}.frechet:make",
    "vbench": f"{_ROOM}.vbench_scorer:make",
    "vbench_long": f"{_ROOM}.vbench_scorer:make_long",
    "visionreward": f"{_ROOM}.reward_scorers:make_visionreward",
    "hpsv3": f"{_ROOM}.reward_scorers:make_hpsv3",
}


@dataclass(frozen=True)
class ScorerSettings:
    """What a config says of a scorer, `--config.scorers.NAME.KEY`.

    Attributes:
      name: of the scorer.
      weights: a file or folder; "" for none.
      python: interpreter of the environment that has the scorer's package; "" for this one.
      device: "cpu" or "cuda"; "" for cuda where torch has it.
      options: the scorer's own settings by name, as texts.
      folder: where the scorer may write, a log for instance; the caller makes it.
    """

    name: str
    weights: str = ""
    python: str = ""
    device: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()

    def key(self, name: str) -> str:
        """A key of the command line, for messages."""
        return f"--config.scorers.{self.name}.{name}"

    def chosen(self, known: Mapping[str, str]) -> dict[str, str]:
        """The options over their defaults.

        Raises:
          UserError: an option that is not `known`.
        """
        if unknown := [name for name in self.options if name not in known]:
            raise UserError(f"{self.key('options')}: {unknown[0]!r} is none of {', '.join(known) or 'no options'}")
        return {**known, **self.options}

    def weight_path(self, how: str) -> Path:
        """The weights, which are there.

        Args:
          how: what has to be there and how one gets it, for the message.

        Raises:
          UserError: none are named, or not there.
        """
        if not self.weights:
            raise UserError(f"{self.key('weights')} is missing: {how}")
        path = Path(self.weights)
        if not path.exists():
            raise UserError(f"{self.key('weights')}={self.weights}: no such file or folder; {how}")
        return path


@dataclass(frozen=True)
class ScoredClip:
    """A clip as scorers get it.

    Attributes:
      source: where it is.  reference: the clip of the same name in `against`; None without one.
      prompt, seed: what it was made for; seed is -1 where nothing says it.
      fps: frames per second to take in place of the file's; 0 for the file's.
    """

    source: SourceClip
    prompt: str = ""
    seed: int = -1
    reference: SourceClip | None = None
    fps: float = 0.0

    @property
    def name(self) -> str:
        """The path in its folder."""
        return self.source.name

    def frames(self) -> Iterator[np.ndarray]:
        """All frames in order, uint8 RGB [H, W, 3], one in memory at a time.

        Raises:
          Unusable: the clip cannot be decoded.
        """
        with reading(self.source, self.fps or 1.0) as opened:
            yield from opened.frames

    def reference_frames(self) -> Iterator[np.ndarray]:
        """The same of the reference. Raises Unusable."""
        assert self.reference is not None, f"{self.name}: without a reference"
        with reading(self.reference, self.fps or 1.0) as opened:
            yield from opened.frames

    def rate(self) -> float:
        """Frames per second. Raises Unusable where nothing states it."""
        with reading(self.source, self.fps) as opened:
            return opened.fps


@runtime_checkable
class Scorer(Protocol):
    """What every scorer has; besides, it is one of the three below.

    Attributes:
      name: of its numbers: {"": x} of scorer "sharp" is the metric "sharp", {"edge": x} is "sharp.edge".
      version: of what decides the numbers besides weights and options: packages and their versions.
      needs: "reference" where clips without one have no number; "prompt" where prompts decide the numbers.
    """

    name: str
    version: str
    needs: frozenset[str]

    def weights(self) -> Sequence[Path]:
        """The files that decide its numbers; their SHA-256 is recorded."""
        ...

    def close(self) -> None:
        """Ends what it holds."""
        ...


@runtime_checkable
class ClipScorer(Scorer, Protocol):
    """Numbers of each clip."""

    def score(self, clip: ScoredClip) -> Mapping[str, float]:
        """Raises Unusable for a clip that has none, UserError for what no clip can pass."""
        ...


@runtime_checkable
class SetScorer(Scorer, Protocol):
    """Numbers of all clips of a folder against all of another one."""

    def features(self, clip: ScoredClip) -> np.ndarray:
        """[N, C], of a clip of either folder. Raises Unusable."""
        ...

    def distance(self, features_NC: np.ndarray, reference_NC: np.ndarray) -> Mapping[str, float]:
        """The numbers, of the features of all clips of both."""
        ...


@dataclass(frozen=True)
class FolderScores:
    """What a `FolderScorer` found.

    Attributes:
      clips: numbers by the clips' names.  folder: numbers of the whole folder.
      faults: why a clip has none, by name.
      notes: lines to be told.
    """

    clips: Mapping[str, Mapping[str, float]]
    folder: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


@runtime_checkable
class FolderScorer(Scorer, Protocol):
    """Numbers of all clips at once, as of packages with a loop of their own."""

    def steps(self) -> int:
        """How often `score_folder` calls `done`."""
        ...

    def score_folder(self, clips: Sequence[ScoredClip], folder: Path, done: Callable[[int], Any]) -> FolderScores:
        """Scores clips.

        `folder` is empty, or what a call left with the same clips and version; weights and options may be others.
        """
        ...


def known_scorers() -> dict[str, EntryPoint]:
    """Every scorer that is there, by name: cfjax's own, and those of installed packages.

    Entry points whose names are no `NAME` are passed over, as no key of a config can name them.
    """
    own = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    others = {point.name: point for point in entry_points(group=GROUP) if NAME.fullmatch(point.name)}
    return others | own


def parse_options(text: str, key: str) -> dict[str, str]:
    """`a=1|b=x,y` by name.

    Raises:
      UserError: a part without an equals sign, or a name twice.
    """
    out: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split("|"))):
        name, mark, value = part.partition("=")
        if not mark or not name.strip():
            raise UserError(f"{key}={text}: {part!r} is no NAME=VALUE; write {key}='NAME=VALUE|NAME=VALUE'")
        if name.strip() in out:
            raise UserError(f"{key}={text}: {name.strip()} is given twice")
        out[name.strip()] = os.path.expanduser(value.strip())
    return out


def check_names(names: Sequence[str]) -> None:
    """Raises UserError for a scorer that is not there, or named twice."""
    known = known_scorers()
    for name in names:
        if name not in known:
            raise UserError(
                f"--config.score={','.join(names)}: {name} is none of {', '.join(known)}; a package adds scorers by "
                f"entry points of the group {GROUP} (docs/evaluate.md)"
            )
        if names.count(name) > 1:
            raise UserError(f"--config.score={','.join(names)}: {name} is named twice")


def make_scorer(settings: ScorerSettings) -> Scorer:
    """The scorer that an entry point makes.

    Raises:
      UserError: it cannot be imported, is not of the contract, or lacks its package or weights.
    """
    point = known_scorers()[settings.name]
    try:
        made = point.load()(settings)
    except UserError:
        raise
    except Exception as error:
        whose = f" of {point.dist.name}" if point.dist else ""
        raise UserError(
            f"--config.score: {settings.name} ({point.value}{whose}) cannot be made: {one_line(error)}"
        ) from error
    if not isinstance(made, Scorer) or not isinstance(made, ClipScorer | SetScorer | FolderScorer):
        raise UserError(
            f"--config.score: {settings.name} ({point.value}) gave {type(made).__name__}, which is none of ClipScorer, "
            "SetScorer and FolderScorer of cfjax.evaluation.scorers"
        )
    return made


def checked_values(scorer: str, clip: str, values: Any) -> dict[str, float]:
    """A scorer's numbers as metrics by name; those that are not finite are left out.

    Raises:
      UserError: they are no mapping of names to numbers.
    """
    where = f"scorer {scorer}, {clip}"
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: gave {type(values).__name__}, which is no mapping of names to numbers")
    out = {}
    for name, value in values.items():
        if not isinstance(name, str) or (name and not NAME.fullmatch(name)):
            raise UserError(f"{where}: {name!r} is no name of a number; use small letters, digits and _")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{where}: {name or scorer} is {value!r:.60}, no number") from None
        if np.isfinite(number):
            out[f"{scorer}.{name}" if name else scorer] = number
    return out
