"""What a session is made of: its state, and what goes in and comes out. See `rollout.session`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from cfjax.core.errors import UserError
from cfjax.memory.slots import Everything, Memory, State
from cfjax.models.wan import KV
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.rollout.prompts import Blend, blend_rows
from cfjax.rollout.rolling import Window, rolling_layout
from cfjax.rollout.steering import Held
from cfjax.rollout.stream import Pipeline

Mode = Literal["recache", "keep", "cut"]
# A prompt, or several with weights
Prompt = str | Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Text:
    """How prompts become text rows.

    Attributes:
      encode: prompts -> rows [n, S, E], float32; raises UserError for a prompt that it cannot take.
      negative_SE: rows of the negative prompt, for a guided sampler.
    """

    encode: Callable[[Sequence[str]], np.ndarray]
    negative_SE: np.ndarray | None = None

    def rows(self, prompt: Prompt) -> np.ndarray:
        """Text rows of a prompt, or of several blended, [S, E].

        Raises:
          UserError: there is none, or one that it cannot take.
        """
        if isinstance(prompt, str):
            return np.asarray(self.encode([prompt]))[0]
        if not prompt:
            raise UserError("no prompt: give one, or a list of (prompt, weight)")
        return blend_rows(list(np.asarray(self.encode([text for text, _ in prompt]))), [w for _, w in prompt])


@dataclass(frozen=True)
class Made:
    """One block of a stream.

    Attributes:
      index: its number, from 0; given frames count.  start: its first latent frame.
      video_BPHWC: pixels, on the host.  latents_BFHWC: on the device.
      prompt: the one that it was made with.
      network_s, decode_s: seconds that its network passes (with the commit before it) and its decoding took.
    """

    index: int
    start: int
    video_BPHWC: np.ndarray
    latents_BFHWC: jax.Array
    prompt: Prompt
    network_s: float
    decode_s: float


@dataclass(frozen=True)
class Transition:
    """A change of the prompt that is under way: text rows from and to, and how many blocks of how many are made.

    The others are those of `Session.set_prompt`.
    """

    rows_from: np.ndarray
    rows_to: np.ndarray
    blocks: int
    done: int
    mode: Mode
    blend: Blend
    recache: str = "blocks"
    move_sink: bool = False


@dataclass(frozen=True)
class Source:
    """The video that a session goes along with: the encoder's state, its last frame, the noise level of its block."""

    encoder: Any
    last_HWC: np.ndarray | None
    level: float


@dataclass(frozen=True)
class SessionState:
    """Everything that decides how a stream goes on. Arrays are never written to: a state can be kept and gone back to.

    Attributes:
      cache: what is remembered.  memory: the policy of it.  decoder: the codec's state.
      text_kv: keys and values of the prompt, for all layers.  rows: its text rows [S, E].  prompt: in words.
      block: the next block's number.  frame: its first latent frame.  generated: how many blocks were made here.
      pending: the finished block that is not committed yet, or None.
      recent: the latest committed blocks, (first frame, latents_BFHWC), which a change of the prompt commits again.
      transition: a change of the prompt that is under way.
      seed: of the noise of all later blocks.
      source: the video that it goes along with, or None.
      window: of a rolling sampler, the blocks that are half denoised; None before the first block.
      pixels_BPHWC: the newest decoded pixel frames, as many as a commit needs; None: none.
      held: the keys that steer it; None: it cannot be steered.
    """

    cache: State
    memory: Memory
    decoder: Any
    text_kv: KV
    rows: np.ndarray
    prompt: Prompt
    block: int
    frame: int
    generated: int
    pending: tuple[int, jax.Array] | None
    recent: tuple[tuple[int, jax.Array], ...]
    transition: Transition | None
    seed: int
    source: Source | None = None
    window: Window | None = None
    pixels_BPHWC: np.ndarray | None = None
    held: Held | None = None


@dataclass(frozen=True)
class Snapshot:
    """A state, and the pipeline that it belongs to."""

    pipeline: Pipeline
    state: SessionState

    def check(self, pipeline: Pipeline) -> None:
        """Raises UserError unless it can go on in this pipeline."""
        for name in ("model", "codec", "sampler", "blocks"):
            ours, theirs = getattr(pipeline, name), getattr(self.pipeline, name)
            if ours is not theirs and (name in ("model", "codec") or ours != theirs):
                raise UserError(f"this snapshot is of a session with another {name}: restore it there")


def checked_seed(seed: int) -> int:
    """The seed. Raises UserError beyond 32 bits."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: use 0 to 2**32 - 1")
    return int(seed)


def own_memory(blocks: Blocks, sampler: FewStep | ManyStep, max_frames: int) -> Memory:
    """What a run remembers of itself: its policy, window and sink, or everything, of at most `max_frames`."""
    if isinstance(sampler, FewStep) and sampler.rolling:
        blocks = rolling_layout(blocks, len(sampler.steps))
    own = Memory(blocks.window, blocks.sink) if blocks.window else Everything(max_frames)
    memory = blocks.memory or own
    assert isinstance(memory, Memory)
    return memory
