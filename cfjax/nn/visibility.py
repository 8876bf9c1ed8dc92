"""Attention masks as a small static description at frame granularity.

One law ties the three uses together: a teacher-forced pass equals a KV-cached rollout over clean blocks, because both
follow `Blocks.visible_before`. Every rule decomposes into rectangles (a block of queries against a few runs of keys),
so no mask is ever built and no masked score is ever computed.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from cfjax.core.errors import UserError

Span = tuple[int, int]  # frames [start, stop)
Kind = Literal["full", "block_causal", "teacher_forced", "replay"]


@dataclass(frozen=True)
class Blocks:
    """How a video is divided into blocks, and how far back a block attends.

    Attributes:
      frames: latent frames per block (3 = "chunk-wise", 1 = "frame-wise").
      independent_first_frame: frame 0 is a block of its own (image conditioning).
      window: visible frames, counted back from the end of the query's block, sink and block included; 0 = all.
      sink: the first frames that stay visible inside the window's budget.
      memory: a policy of `cfjax.memory`, in place of window and sink; None: none.
    """

    frames: int = 3
    independent_first_frame: bool = False
    window: int = 0
    sink: int = 0
    memory: Any = None

    def __post_init__(self) -> None:
        if self.memory is not None and (self.window or self.sink):
            raise UserError("blocks.window and blocks.sink are those of a memory policy here: set them there")
        if self.frames < 1:
            raise UserError(f"blocks.frames={self.frames}: use 1 or more")
        for name in ("window", "sink"):
            if getattr(self, name) < 0:
                raise UserError(f"blocks.{name}={getattr(self, name)}: use 0 (off) or more")
        if self.window and self.window < self.frames + self.sink:
            raise UserError(
                f"blocks.window={self.window} must hold the sink and one block: at least {self.frames + self.sink}"
            )
        if self.sink and not self.window:
            raise UserError(f"blocks.sink={self.sink} needs blocks.window (0 means that everything is visible)")

    def spans(self, num_frames: int) -> list[Span]:
        """The blocks of a video, in order.

        Raises:
          UserError: the frames (minus an independent first one) are not a multiple of the block size.
        """
        first = 1 if self.independent_first_frame else 0
        if num_frames < max(first, 1) or (num_frames - first) % self.frames:
            rule = f"1 + a multiple of {self.frames}" if first else f"a multiple of {self.frames}"
            raise UserError(f"{num_frames} latent frames do not divide into blocks: blocks.frames needs {rule}")
        starts = range(first, num_frames, self.frames)
        return ([(0, 1)] if first else []) + [(s, s + self.frames) for s in starts]

    def visible_before(self, start: int, stop: int) -> list[Span]:
        """Earlier frames that the block [start, stop) sees, as disjoint runs in order."""
        oldest = stop - (self.window - self.sink) if self.window else 0
        if oldest <= self.sink:
            runs = [(0, start)]
        else:
            runs = [(0, min(self.sink, start)), (oldest, start)]
        return [(a, b) for a, b in runs if a < b]


@dataclass(frozen=True)
class Rectangle:
    """Queries of one span of frames against the concatenation of some spans of key frames: dense, no mask."""

    queries: Span
    keys: tuple[Span, ...]


@dataclass(frozen=True)
class Visibility:
    """A kind of attention over a block layout.

    full            everything sees everything (bidirectional).
    block_causal    a block sees itself and earlier blocks: clean blocks when caching, noisy ones in diffusion forcing.
    teacher_forced  sequence [clean, noisy]: the clean half is block-causal; a noisy block sees *clean* earlier blocks
                    and itself. Clean never sees noisy.
    replay          queries are the noisy half only; keys are [context, noisy] with a given context: the second half of
                    `teacher_forced` when the clean keys are already known.
    """

    kind: Kind = "full"
    blocks: Blocks = field(default_factory=Blocks)

    def __post_init__(self) -> None:
        if self.blocks.memory is not None:
            raise UserError("a memory policy is for generation, block by block: leave it out of passes over all frames")

    def rectangles(self, num_frames: int) -> list[Rectangle]:
        """The rectangles for a video of `num_frames` (each half's length when there are two); queries in order."""
        if self.kind == "full":
            return [Rectangle((0, num_frames), ((0, num_frames),))]
        causal, noisy = [], []
        noisy_queries_from = num_frames if self.kind == "teacher_forced" else 0
        for start, stop in self.blocks.spans(num_frames):
            past = tuple(self.blocks.visible_before(start, stop))
            own = (start + num_frames, stop + num_frames)
            causal.append(Rectangle((start, stop), _join((*past, (start, stop)))))
            noisy.append(Rectangle((start + noisy_queries_from, stop + noisy_queries_from), (*past, own)))
        return {"block_causal": causal, "teacher_forced": causal + noisy, "replay": noisy}[self.kind]


def _join(runs: tuple[Span, ...]) -> tuple[Span, ...]:
    """Merges runs that touch."""
    out: list[Span] = []
    for start, stop in runs:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


FULL = Visibility("full")
