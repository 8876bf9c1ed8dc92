"""A live stream: blocks without end, whose prompt, memory and course can change between any two of them.

    session = Session(pipeline, Text(encode), "a red circle moving left", latent_shape=(16, 16, 4), seed=0)
    block = session.next()                          # pixels first; the block is committed when the next is asked for
    session.set_prompt("a blue square moving up", mode="recache", blend_blocks=2)
    before = session.snapshot()                     # a value: nothing is copied
    other = session.fork(seed=1)

All that a session is lies in a `SessionState`, which `next` replaces. Blocks equal those of `rollout.generate` with the
same noise, whatever the sampler.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.memory.names import memory_name, parse_memory
from cfjax.memory.slots import Everything, Memory, State
from cfjax.models.lora import Lora, attach, scaled
from cfjax.models.wan import KV
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import given_blocks, layout_from
from cfjax.rollout.generate import FewStep, ManyStep, layout_of
from cfjax.rollout.prompts import Blend
from cfjax.rollout.recache import Recache, by_blocks, change_of, recommitted, turned
from cfjax.rollout.session_commit import commit_kept
from cfjax.rollout.session_state import (
    Made,
    Mode,
    Prompt,
    SessionState,
    Snapshot,
    Text,
    checked_seed,
    own_memory,
)
from cfjax.rollout.session_video import next_from, next_source
from cfjax.rollout.steering import Held, changed, steered_at
from cfjax.rollout.stream import (
    Call,
    Pipeline,
    decode_step,
    levels_of,
    next_block,
    plain,
    prompt_kv,
    rolled,
    seeded_noise,
)
from cfjax.rollout.video import levels_at

NO_END = 2**30  # the frame that an endless video ends before; differences of frames stay within int32

_encode = jax.jit(lambda codec, video: codec.encode(video))


class Session:
    """One stream of one video. See the module.

    Args:
      latent_shape: (H, W, C) of a latent frame.
      memory: a policy or its name (`memory.names`); None: the pipeline's own, or its window and sink.
      max_frames: latent frames that a memory of everything ("full") holds; its stream ends there.
      given_BFHWC: latent frames to go on from, such as an encoded picture.
      hold: how many of the latest block boundaries `seek` can go back to; each holds a cache.
      call: calls the jitted functions, as `stream_latents` has it.

    Attributes:
      given_video_BPHWC: the given frames' pixels, if there are any.

    Raises:
      UserError: a bidirectional pipeline, a prompt or policy that there is none of, a seed out of range.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        text: Text,
        prompt: Prompt,
        *,
        latent_shape: tuple[int, int, int],
        seed: int = 0,
        memory: Memory | str | None = None,
        max_frames: int = 21,
        given_BFHWC: jax.Array | None = None,
        hold: int = 0,
        call: Call = plain,
    ) -> None:
        if pipeline.blocks is None:
            raise UserError("a bidirectional network makes all frames at once: it has no session; use generate")
        if isinstance(pipeline.sampler, ManyStep) and text.negative_SE is None:
            raise UserError("a guided sampler needs the text rows of a negative prompt")
        self._pipeline, self._text, self._call = pipeline, text, call
        self._below = pipeline.model
        self._shape, self._max_frames = latent_shape, max_frames
        self._held: deque[SessionState] = deque(maxlen=hold)
        self._state: SessionState | None = None
        chosen = self._memory(memory)
        rows = self._text.rows(prompt)
        state = SessionState(
            self._empty(chosen), chosen, pipeline.codec.init_state(1), self._keys_of(rows), rows, prompt,
            0, 0, 0, None, (), None, checked_seed(seed), held=Held.none_of(pipeline.model.config),
        )  # fmt: skip
        self.given_video_BPHWC: np.ndarray | None = None
        self._state = state if given_BFHWC is None else self._given(state, jnp.asarray(given_BFHWC))

    # ---- what a builder calls

    @property
    def state(self) -> SessionState:
        """The stream as it is now.

        Raises:
          UserError: it was closed.
        """
        if self._state is None:
            raise UserError("this session is closed: open another one")
        return self._state

    def next(self, video_BPHWC: np.ndarray | None = None, *, follow_motion: bool = False) -> Made:
        """The next block.

        Args:
          video_BPHWC: pixels that it begins with, at the noise level of the sampler's `strength`: the block's frames,
            float32 in [-1, 1]. Every block of a session has them, or none.
          follow_motion: lower that level where the video moves (`video.adapted_level`).

        Raises:
          UserError: the session is closed, a memory of everything is full, or the video does not fit.
        """
        begun, before = time.perf_counter(), self.state
        frames = self.frames_ahead()
        state, x0 = self._latents(self.prepared(before), frames, video_BPHWC, follow_motion)
        jax.block_until_ready(x0)
        made = time.perf_counter()
        video, decoder = self._call(decode_step, self._pipeline.codec, x0, state.decoder)
        after = replace(state, decoder=decoder, pending=(before.frame, x0))
        return self.went_on(after, np.asarray(video), begun, made)

    def set_prompt(
        self,
        prompt: Prompt,
        mode: Mode = "recache",
        blend_blocks: int = 0,
        blend: Blend = "linear",
        *,
        recache: Recache = "blocks",
        move_sink: bool = False,
    ) -> None:
        """Another prompt, from the next block on.

        Args:
          mode: "recache" commits the remembered blocks again under the new prompt (LongLive); "keep" leaves what is
            remembered as it is; "cut" also moves the next block away in time (RoPE cut of Infinity-RoPE, or a lasting
            gap of 8 positions as in LongLive 2.0, as the policy has it).
          blend_blocks: the prompt goes over to the new one during so many blocks; "recache" is done at the last.
          recache: how: "blocks", or "unmasked" and `move_sink` as LongLive does it, see `rollout.recache`.

        Raises:
          UserError: an unknown prompt or mode. The stream goes on as before.
        """
        state = self.state
        how = (mode, blend_blocks, blend, recache, move_sink)
        self._state = replace(state, prompt=prompt, transition=change_of(state, lambda: self._text.rows(prompt), *how))

    def set_actions(self, keys: Sequence[float]) -> None:
        """The keys that are held, a number for each, from the next block on. Raises what `steering.changed` does."""
        state = self.state
        self._state = replace(state, held=changed(state.held, keys, self._pipeline.sampler, state.memory))

    def set_memory(self, memory: Memory | str) -> None:
        """Another policy, from the next block on: what the session still has the latents of is committed to it.

        Raises:
          UserError: there is no such policy, it does not fit, or it needs the frames from the first one on. The stream
            goes on as before.
        """
        chosen = self._memory(memory)
        if (not chosen.recaches or self._pictures(chosen)) and self.state.frame:
            raise UserError(f"{memory_name(chosen)} needs a stream's first frames: begin a session with it")
        state = self._committed(self.state)
        empty = replace(state, memory=chosen, cache=self._empty(chosen))
        self._state = by_blocks(empty, self._put, self._blocks(chosen))

    def set_lora(self, lora: Lora | None, weight: float = 1.0, mode: Literal["recache", "keep"] = "recache") -> None:
        """Adapters beside the network, from the next block on, in the place of those that are there; None: none.

        Ranks and layers as before compile nothing new. Snapshots and held blocks of before are another network's.

        Args:
          lora: see `models.lora`; of the session's network.  weight: a factor of all that they add.
          mode: "recache" commits the remembered blocks again; "keep" leaves what is remembered as it is.

        Raises:
          UserError: they are another network's, or the memory cannot commit again. The stream goes on as before.
        """
        state, below = self.state, self._below
        if mode not in ("recache", "keep"):
            raise UserError(f"mode={mode!r}: use recache or keep")
        if mode == "recache" and not state.memory.recaches:
            raise UserError(f"{memory_name(state.memory)}: nothing to commit again; use mode='keep'")
        model = below if lora is None else attach(below, scaled(lora, weight))
        state = self._committed(state)
        self._pipeline = replace(self._pipeline, model=model)
        state = replace(state, text_kv=self._keys_of(state.rows))
        if mode == "recache":
            state = recommitted(state, self._put, self._blocks(state.memory))
        self._held.clear()
        self._state = state

    def snapshot(self) -> Snapshot:
        """The stream as it is now; costs nothing until the session goes on, and then holds one more cache."""
        return Snapshot(self._pipeline, self.state)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a snapshot, of this session or of another one of the same pipeline.

        Raises:
          UserError: it belongs to another model, codec, sampler or layout.
        """
        snapshot.check(self._pipeline)
        self._held.clear()  # of the course that is left
        self._state = snapshot.state

    def fork(self, seed: int | None = None) -> "Session":
        """Another session from here on; with the same seed (None) it makes the same blocks."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._held = deque(self._held, maxlen=self._held.maxlen)
        state = self.state
        other._state = state if seed is None else replace(state, seed=checked_seed(seed))
        return other

    def seek(self, block: int) -> None:
        """Goes back to the beginning of a block that is held.

        Raises:
          UserError: it is not.
        """
        states = {state.block: state for state in (*self._held, self.state)}
        if block not in states:
            known = ", ".join(map(str, sorted(states)))
            raise UserError(f"block {block} is not held: the session can go to {known} (hold= keeps more)")
        self._state = states[block]
        while self._held and self._held[-1].block >= block:
            self._held.pop()

    def close(self) -> None:
        """Lets go of all memory."""
        self._state = None
        self._held.clear()

    # ---- the parts of `next`, which `rollout.batched` calls too

    @property
    def pipeline(self) -> Pipeline:
        """What the session's blocks are made with."""
        return self._pipeline

    @property
    def call(self) -> Call:
        """What calls the jitted functions."""
        return self._call

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent frame."""
        return self._shape

    @property
    def layout(self) -> Blocks:
        """The block layout, with the session's memory."""
        return self._blocks(self.state.memory)

    def frames_ahead(self) -> int:
        """Latent frames of the next block.

        Raises:
          UserError: the session is closed, or a memory of everything is full.
        """
        state = self.state
        layout = layout_from(self._pipeline.blocks, state.frame)  # type: ignore[arg-type]
        frames = 1 if layout.independent_first_frame else layout.frames
        if isinstance(state.memory, Everything) and state.frame + frames > state.memory.window:
            raise UserError(
                f"the stream has {state.frame} latent frames and remembers all of at most {state.memory.window}: give "
                f"max_frames, or a memory policy such as longlive_infinity for a stream without end"
            )
        return frames

    def needs_pixels(self) -> bool:
        """Whether commits take decoded pixels."""
        return bool(self._pictures(self.state.memory))

    def prepared(self, state: SessionState) -> SessionState:
        """With the pending block committed, and one block further in a change of the prompt."""
        return turned(self._committed(state), self._keys_of, self._put, self._blocks(state.memory))

    def remembers(self, state: SessionState) -> SessionState:
        """With the pending block among the recent ones; its commit is elsewhere."""
        if state.pending is None:
            return state
        recent = (*state.recent, state.pending)[-self._recent_blocks(state.memory) :]
        return replace(state, pending=None, recent=recent)

    def went_on(self, state: SessionState, video_BPHWC: np.ndarray, begun: float, made: float) -> Made:
        """Goes on after a block, which is in the state as its pending one.

        Args:
          begun, made: when its work began, and when its latents were there, as of `time.perf_counter`.
        """
        before, pending = self.state, state.pending
        assert pending is not None
        start, x0 = pending
        held = state.held and state.held.went_on(start, x0.shape[1])
        after = replace(state, block=state.block + 1, frame=start + x0.shape[1], generated=state.generated + 1)
        self._state = self._seen(replace(after, held=held), video_BPHWC)
        self._held.append(before)
        return Made(state.block, start, video_BPHWC, x0, state.prompt, made - begun, time.perf_counter() - made)

    # ---- how

    def _memory(self, memory: Memory | str | None) -> Memory:
        blocks, sampler = self._pipeline.blocks, self._pipeline.sampler
        assert blocks is not None
        chosen = (parse_memory(memory) or Everything(self._max_frames)) if isinstance(memory, str) else memory
        if chosen is None:
            chosen = own_memory(blocks, sampler, self._max_frames)
        chosen.slots(blocks)
        chosen.check(self._pipeline.model.config)
        layout_of(sampler, self._blocks(chosen))
        if self._pictures(chosen) and not hasattr(self._pipeline.codec, "encode"):
            raise UserError(
                f"memory={memory_name(chosen)}: this codec does not encode; open the run with decoder='vae'"
            )
        return chosen

    def _blocks(self, memory: Memory) -> Blocks:
        blocks = self._pipeline.blocks
        assert blocks is not None
        return replace(blocks, window=0, sink=0, memory=memory)

    def _empty(self, memory: Memory) -> State:
        config, blocks, (height, width, _) = self._pipeline.model.config, self._blocks(memory), self._shape
        rows, tokens = 2 if isinstance(self._pipeline.sampler, ManyStep) else 1, config.tokens_per_frame(height, width)
        return memory.init(config, rows, tokens, blocks, config.tokens_per_row(width))

    def _keys_of(self, rows: np.ndarray) -> KV:
        negative = rows if self._text.negative_SE is None else self._text.negative_SE
        pipeline = self._pipeline
        return prompt_kv(pipeline.model, jnp.asarray(rows[None]), jnp.asarray(negative), pipeline.sampler, self._call)

    def _given(self, state: SessionState, given_BFHWC: jax.Array) -> SessionState:
        blocks = self._pipeline.blocks
        assert blocks is not None
        given_blocks(blocks, given_BFHWC.shape[1])
        videos = []
        for start, stop in blocks.spans(given_BFHWC.shape[1]):
            own = given_BFHWC[:, start:stop]
            video, decoder = self._call(decode_step, self._pipeline.codec, own, state.decoder)
            state = replace(state, decoder=decoder, block=state.block + 1, frame=stop, pending=(start, own))
            state = self._committed(self._seen(state, np.asarray(video)))
            videos.append(np.asarray(video))
        self.given_video_BPHWC = np.concatenate(videos, axis=1)
        return state

    def _latents(
        self, state: SessionState, frames: int, video_BPHWC: np.ndarray | None, follow_motion: bool
    ) -> tuple[SessionState, jax.Array]:
        """The next block, and the state with what went into it."""
        sampler, start = self._pipeline.sampler, state.frame
        model = steered_at(self._pipeline.model, state.held, start, frames)
        # The first generated block has a program of its own only where its steps are its own.
        first = isinstance(sampler, FewStep) and bool(sampler.first_steps) and not state.generated
        steps = len(levels_of(sampler, first)) if isinstance(sampler, FewStep) else 1
        noise, layout = seeded_noise(np.array([state.seed], np.uint32), self._call), self._blocks(state.memory)
        new_block = lambda ahead: noise(state.block + ahead, (1, frames, *self._shape), max(steps, 1))
        if isinstance(sampler, FewStep) and sampler.rolling:
            if video_BPHWC is not None:
                raise UserError("video to video is not with sampler.kind='rolling'; use kind='few_step'")
            given = (state.text_kv, state.cache), (start, NO_END)
            window, x0 = rolled(self._pipeline, state.window, new_block, *given, blocks=layout, call=self._call)
            return replace(state, window=window), x0
        own, fresh = new_block(0)
        work = (state.text_kv, state.cache, jnp.int32(start))
        if video_BPHWC is None:
            if state.source is not None:
                raise UserError("this session goes along with a video: give its next frames too")
            return state, self._call(next_block, model, own, fresh, *work, sampler=sampler, first=first, blocks=layout)
        shape = (frames, *self._shape)
        source, latents = next_source(
            self._pipeline, state, np.asarray(video_BPHWC), shape, follow_motion=follow_motion, call=self._call
        )
        assert isinstance(sampler, FewStep)
        levels = levels_at(source.level, sampler, first)
        x0 = self._call(next_from, model, latents, own, fresh, levels, *work, blocks=layout)
        return replace(state, source=source), x0

    def _put(self, state: SessionState, start: int, own: jax.Array) -> State:
        """The cache with one more block."""
        model = steered_at(self._pipeline.model, state.held, start, own.shape[1])
        work = [model, own, state.text_kv, state.cache, jnp.int32(start)]
        if count := self._pictures(state.memory):
            pixels, picture = state.pixels_BPHWC, jnp.zeros_like(own[:, :1])
            if pixels is not None and pixels.shape[1] == count:  # else nothing has left
                picture = self._call(_encode, self._pipeline.codec, jnp.asarray(pixels[:, :1]))
            work.append(picture)
        return self._call(commit_kept, *work, blocks=self._blocks(state.memory))

    def _pictures(self, memory: Memory) -> int:
        """How many decoded pixel frames are kept."""
        codec = self._pipeline.codec
        return memory.pictures(self._blocks(memory), getattr(codec, "stride", (1,))[0])

    def _seen(self, state: SessionState, video: np.ndarray) -> SessionState:
        """With decoded pixel frames, where commits need some."""
        count, before = self._pictures(state.memory), state.pixels_BPHWC
        if not count:
            return state
        both = video if before is None else np.concatenate([before, video], axis=1)
        return replace(state, pixels_BPHWC=both[:, -count:])

    def _committed(self, state: SessionState) -> SessionState:
        """With the pending block in the cache."""
        if state.pending is None:
            return state
        start, own = state.pending
        return replace(self.remembers(state), cache=self._put(state, start, own))

    def _recent_blocks(self, memory: Memory) -> int:
        """How many blocks' latents are kept: those that are in slots, or would be in those of another policy."""
        blocks = self._pipeline.blocks
        assert blocks is not None
        frames = max(memory.slots(blocks) + blocks.frames, self._max_frames - blocks.frames)
        return -(-frames // blocks.frames) + int(blocks.independent_first_frame)
