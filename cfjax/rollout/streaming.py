"""One rollout that goes on from update to update: streaming long tuning (LongLive, arXiv 2509.22622).

Reference: `model/streaming_training.py`, `StreamingTrainingModel`, and `_get_switch_frame_index` of
`trainer/distillation.py`.

A student that trains on rollouts from a video's first frame never sees what it makes of its own late frames, and a
rollout of minutes for every update costs too much. So each update adds a chunk to the rollout of the update before it:
what the student remembers, its last frames and its prompt are carried along, without gradient. The scores see the last
`window_frames` latents; the loss counts the new ones.

    first chunk     `window_frames` new frames
    later chunks    `new_frames` or more, in whole blocks, fewer than the window: the rest is the chunk's before it
    the end         no `new_frames` more fit into `max_frames`: the next update begins another rollout

With prompts that switch, one chunk of a rollout, neither its first nor its last, begins with another prompt: the last
frames, as many as a block sees, are committed again under it, into an empty memory (`global_sink=False` there: the sink
moves), and the scores get that prompt from then on. It is that of the update's batch; LongLive's data pairs prompts.

The first latent of a later window is made anew from pixels, as in `rollout.long_video`; they are decoded from the first
kept latent on, which the decoder takes for a video's first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from cfjax.core.errors import UserError
from cfjax.memory.policies import ContextRecompute
from cfjax.memory.slots import Memory
from cfjax.models.codec import Codec
from cfjax.models.wan import KV, Wan, embed_text
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, scan_blocks
from cfjax.rollout.long_video import FIRST_REENCODED, last_picture
from cfjax.rollout.remembered import Begin
from cfjax.rollout.self_forcing import SelfForcing, replay_exit, rollout

RECOMMITTED = "committed_under_new_prompt"  # scope of the conditional that runs where the prompt switches
NEVER = 2**31 - 1


@dataclass(frozen=True)
class Streaming:
    """How a rollout goes on; all in latent frames, whole blocks. Defaults are LongLive's.

    Attributes:
      window_frames: what the scores see, and the first chunk.
      max_frames: of a rollout.
      new_frames: the least that a later chunk adds; how many is uniform among the whole blocks from it on.
      switch_prompts: whether every rollout changes its prompt once.
    """

    window_frames: int = 21
    max_frames: int = 240
    new_frames: int = 18
    switch_prompts: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.new_frames < self.window_frames <= self.max_frames:
            raise UserError(
                f"objective.new_frames={self.new_frames}, window_frames={self.window_frames}, "
                f"max_frames={self.max_frames}: a chunk adds fewer frames than the window has, and a rollout has no "
                "fewer than the window; new_frames=0 is no streaming"
            )

    def check(self, blocks: Blocks) -> Blocks:
        """The layout of a rollout that goes on: a window is a policy here, whose state can be carried.

        Raises:
          UserError: frames that are no whole blocks, memory without bound, or a policy that cannot begin anew.
        """
        if blocks.independent_first_frame:
            raise UserError("objective.new_frames: streaming has no independent first frame: leave it out")
        for name in ("window_frames", "max_frames", "new_frames"):
            if getattr(self, name) % blocks.frames:
                raise UserError(
                    f"objective.{name}={getattr(self, name)}: use a multiple of blocks.frames={blocks.frames}"
                )
        if blocks.memory is None and not blocks.window:
            raise UserError("objective.new_frames: a rollout without end needs blocks.window or blocks.memory")
        memory = blocks.memory or Memory(blocks.window, blocks.sink)
        if self.switch_prompts and not memory.recaches:
            raise UserError(
                "objective.switch_prompts=True: what blocks.memory=rolling_sink replays was made under the first "
                "prompt; use another policy, or objective.switch_prompts=False"
            )
        if isinstance(memory, ContextRecompute):
            raise UserError("objective.new_frames: blocks.memory=context_recompute does not train; use another policy")
        if self.switch_prompts and not self.switch_frames():
            least = self.window_frames + 2 * self.new_frames
            raise UserError(
                f"objective.switch_prompts=True: a chunk that is neither the first nor the last needs "
                f"objective.max_frames={least} or more"
            )
        memory.slots(replace(blocks, window=0, sink=0, memory=None))
        return replace(blocks, window=0, sink=0, memory=memory)

    def switch_frames(self) -> range:
        """Frames at which a prompt may switch, if every chunk adds `new_frames`: where a chunk between two begins."""
        return range(self.window_frames, self.max_frames - 2 * self.new_frames + 1, self.new_frames)

    def new_choices(self, blocks: Blocks) -> range:
        """How many frames a later chunk may add, where the rollout has room for all of them."""
        return range(self.new_frames, self.window_frames, blocks.frames)

    def expected(self, blocks: Blocks) -> tuple[float, float]:
        """(mean number of chunks in a rollout, mean number of new frames of a later one), about."""
        choices = self.new_choices(blocks)
        new = sum(choices) / len(choices)
        return 1 + (self.max_frames - self.window_frames) // new, new


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RolloutState:
    """A rollout between two updates.

    memory: the policy's state.  latents_BFHWC: the last `window_frames` frames as they were generated, float32.
    text_BSE: the prompt.  length: frames so far, 0 before the first chunk.  switch: the prompt changes with the first
    chunk that begins at this frame or later.
    """

    memory: Any
    latents_BFHWC: jax.Array
    text_BSE: jax.Array
    length: jax.Array
    switch: jax.Array


def empty_rollout(
    config: Any, latents: tuple[int, ...], text: tuple[int, ...], streaming: Streaming, blocks: Blocks
) -> RolloutState:
    """Before the first update, for latents of shape [B, F, H, W, C] and text rows [B, S, E]."""
    blocks = streaming.check(blocks)
    batch, _, height, width, _ = latents
    memory = blocks.memory.init(
        config, batch, config.tokens_per_frame(height, width), blocks, config.tokens_per_row(width)
    )
    last = jnp.zeros((batch, streaming.window_frames, *latents[2:]), jnp.float32)
    return RolloutState(memory, last, jnp.zeros(text, jnp.float32), jnp.int32(0), jnp.int32(NEVER))


def draw_chunk(key: jax.Array, streaming: Streaming) -> dict[str, jax.Array]:
    """Random numbers of a chunk besides `draw_rollout`'s: new_share, uniform in [0, 1), and switch, a frame or NEVER.

    `new_share` picks how many frames a later chunk adds; `switch` is used where a rollout begins.
    """
    key_new, key_switch = jax.random.split(key)
    switch, frames = jnp.int32(NEVER), streaming.switch_frames()
    if streaming.switch_prompts:
        switch = frames.start + frames.step * jax.random.randint(key_switch, (), 0, len(frames), jnp.int32)
    return {"new_share": jax.random.uniform(key_new), "switch": switch}


def next_chunk(length: jax.Array, new_share: jax.Array, streaming: Streaming, blocks: Blocks) -> tuple[jax.Array, ...]:
    """(frames before the chunk, 0 where a rollout begins; frames that it adds), after `length` frames."""
    fits = (length > 0) & (length + streaming.new_frames <= streaming.max_frames)
    before = jnp.where(fits, length, 0)
    room = (streaming.max_frames - before - streaming.new_frames) // blocks.frames + 1
    number = jnp.minimum(room, len(streaming.new_choices(blocks)))
    more = jnp.minimum((new_share * number).astype(jnp.int32), number - 1)
    new = streaming.new_frames + more * blocks.frames
    return before, jnp.where(fits, new, streaming.window_frames).astype(jnp.int32)


@dataclass(frozen=True)
class Chunk:
    """An update's part of a rollout.

    x0_BFHWC: the window that the scores see.  counted_F: which of its frames are new.  text_BSE: their prompt.
    state: the rollout after them.
    """

    x0_BFHWC: jax.Array
    counted_F: jax.Array
    text_BSE: jax.Array
    state: RolloutState


@jax.named_scope("next_chunk")
def add_chunk(
    model: Wan,
    state: RolloutState,
    text_BSE: jax.Array,
    draws: Mapping[str, jax.Array],
    config: SelfForcing,
    streaming: Streaming,
    blocks: Blocks,
    codec: Codec,
    *,
    gradient: bool,
) -> Chunk:
    """The next chunk; with `gradient`, its new frames carry it. One program for all chunks.

    Args:
      text_BSE: the prompt of a rollout that begins, or of one whose prompt switches.
      draws: of `draw_chunk`, and of `draw_rollout` for `window_frames` frames.
    """
    blocks = streaming.check(blocks)
    window, frozen = streaming.window_frames, stop_gradient(model)
    before, new = next_chunk(state.length, draws["new_share"], streaming, blocks)
    begins, old = before == 0, window - new
    switch = jnp.where(begins, draws["switch"], state.switch)
    switches = (before >= switch) & ~begins
    text_BSE = jnp.where(begins | switches, text_BSE.astype(jnp.float32), state.text_BSE)
    text_kv = embed_text(model, text_BSE)
    memory = _remembered(frozen, stop_gradient(text_kv), state, (begins, switches), streaming, blocks)

    begin = Begin(memory, before - old, old // blocks.frames)
    rolled = rollout(frozen, stop_gradient(text_kv), dict(draws), config, blocks, begin=begin)
    made = replay_exit(model, text_kv, rolled, config, blocks) if gradient else rolled.x0_BFHWC
    is_new = (jnp.arange(window) >= old)[None, :, None, None, None]
    kept = jnp.roll(state.latents_BFHWC, -new, axis=1)
    shown = jnp.where(is_new, made, kept)

    def reencoded(kept: jax.Array) -> jax.Array:
        return codec.encode(last_picture(codec, state.latents_BFHWC, new + 1)).astype(kept.dtype)

    with jax.named_scope(FIRST_REENCODED):
        first = stop_gradient(jax.lax.cond(begins, lambda kept: kept[:, :1], reencoded, kept))
    at_first = ((jnp.arange(window) == 0) & ~begins)[None, :, None, None, None]
    last = stop_gradient(jnp.where(is_new, rolled.x0_BFHWC, kept))
    after = RolloutState(rolled.state, last, text_BSE, before + new, jnp.where(switches, NEVER, switch))
    return Chunk(jnp.where(at_first, first, shown), jnp.arange(window) >= old, text_BSE, stop_gradient(after))


def _remembered(
    model: Wan,
    text_kv: KV,
    state: RolloutState,
    when: tuple[jax.Array, jax.Array],
    streaming: Streaming,
    blocks: Blocks,
) -> Any:
    """What the student remembers when a chunk begins: nothing, the same, or the same under a new prompt.

    Args:
      when: whether a rollout begins, and whether the prompt switches.
    """
    begins, switches = when
    batch, _, height, width, _ = state.latents_BFHWC.shape
    config = model.config
    init = partial(
        blocks.memory.init, config, batch, config.tokens_per_frame(height, width), blocks, config.tokens_per_row(width)
    )
    frames = min(blocks.memory.window, streaming.window_frames) // blocks.frames * blocks.frames
    layout = replace(blocks, memory=None)

    def again(_: Any) -> Any:
        def commit(memory: Any, start: jax.Array, inputs: Any) -> tuple[Any, tuple[()]]:
            at = state.length - frames + start
            return commit_block(model, inputs[0], text_kv, memory, at, blocks), ()

        return scan_blocks(commit, init(), state.latents_BFHWC[:, -frames:], None, frames, layout)[0]

    memory = jax.lax.cond(begins, lambda memory: init(), lambda memory: memory, state.memory)
    if not streaming.switch_prompts:
        return memory
    with jax.named_scope(RECOMMITTED):
        return jax.lax.cond(switches, again, lambda memory: memory, memory)
