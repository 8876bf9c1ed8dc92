"""What a stream remembers, committed again: under another prompt, or to another memory policy.

    blocks     block after block, oldest first, as they were committed the first time
    unmasked   all at once, each frame seeing all others, later ones too (LongLive's `_recache_after_switch`)

The second is for parity with LongLive 1.0 (`pipeline/interactive_causal_inference.py`), whose pass has no mask: the
latest `window` frames at their own positions, without those of the sink's places, as the sink stays (`global_sink`,
its default for inference). With `move_sink` (`global_sink: false`, what it trains with) the sink is forgotten, and the
oldest of these frames take its place. Before anything has left, both make all frames again. LongLive computes the
frames whose keys it drops too; they change nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.memory.names import memory_name
from cfjax.memory.policies import SlotRelative
from cfjax.memory.slots import Everything, Memory, State
from cfjax.models.wan import KV
from cfjax.nn.visibility import Blocks
from cfjax.rollout.prompts import Blend, blend_rows
from cfjax.rollout.session_state import Mode, SessionState, Transition

Recache = Literal["blocks", "unmasked"]
# (state, first frame, latents_BFHWC) -> its cache with these frames committed as one block
Put = Callable[[SessionState, int, jax.Array], State]
AT_ONCE = (Memory, Everything, SlotRelative)


def by_blocks(state: SessionState, put: Put, layout: Blocks) -> SessionState:
    """The latest blocks once more, oldest first, into a cache that has forgotten them: as many as have room."""
    room = state.memory.missing(state.cache, layout)
    kept: list[tuple[int, jax.Array]] = []
    for start, own in reversed(state.recent):
        if room <= 0:
            break
        kept, room = [(start, own), *kept], room - own.shape[1]
    for start, own in kept:
        state = replace(state, cache=put(state, start, own))
    return state


def check_at_once(memory: Memory, move_sink: bool) -> None:
    """Raises UserError for a policy that LongLive does not have."""
    if type(memory) not in AT_ONCE:
        raise UserError(
            f"recache='unmasked' is LongLive's, of memory=window, longlive_infinity or full, not "
            f"{memory_name(memory)}: leave it out"
        )
    if move_sink and not memory.sink:
        raise UserError(f"move_sink=True: memory={memory_name(memory)} has no sink; leave it out")


def recommitted(state: SessionState, put: Put, layout: Blocks) -> SessionState:
    """With the remembered blocks committed again."""
    return by_blocks(replace(state, cache=state.memory.forget(state.cache)), put, layout)


def turned(state: SessionState, keys_of: Callable[[np.ndarray], KV], put: Put, layout: Blocks) -> SessionState:
    """One block further in a change of the prompt; `keys_of` makes text rows keys and values."""
    change = state.transition
    if change is None:
        return state
    done = change.done + 1
    last = done >= change.blocks
    share = done / change.blocks
    rows = change.rows_to if last else blend_rows([change.rows_from, change.rows_to], [1 - share, share], change.blend)
    further = None if last else replace(change, done=done)
    state = replace(state, rows=rows, text_kv=keys_of(rows), transition=further)
    if change.mode == "cut" and done == 1 and state.frame:
        state = replace(state, cache=state.memory.cut(state.cache))
    if change.mode == "recache" and last:
        if change.recache == "unmasked":
            return at_once(state, put, move_sink=change.move_sink)
        state = recommitted(state, put, layout)
    return state


def change_of(
    state: SessionState,
    rows: Callable[[], np.ndarray],
    mode: Mode,
    blend_blocks: int,
    blend: Blend,
    recache: Recache,
    move_sink: bool,
) -> Transition:
    """A change of the prompt to other text rows, as `Session.set_prompt` has it; `rows` is called last.

    Raises:
      UserError: there is no such mode, or it is not with this memory.
    """
    if mode not in get_args(Mode):
        raise UserError(f"mode={mode!r}: use one of {', '.join(get_args(Mode))}")
    if blend_blocks < 0:
        raise UserError(f"blend_blocks={blend_blocks}: use 0 (at once) or more")
    if mode == "recache" and not state.memory.recaches:
        raise UserError(f"{memory_name(state.memory)}: nothing to commit again; use mode='keep' or 'cut'")
    if mode == "cut" and not state.memory.cuts:
        raise UserError(f"{memory_name(state.memory)}: the next blocks are half made; use mode='keep' or 'recache'")
    if recache not in get_args(Recache):
        raise UserError(f"recache={recache!r}: use {' or '.join(get_args(Recache))}")
    if (recache == "unmasked" or move_sink) and mode != "recache":
        raise UserError(f"mode={mode!r}: recache and move_sink are of mode='recache'; leave them out")
    if move_sink and recache != "unmasked":
        raise UserError("move_sink=True is of recache='unmasked'; set that too, or leave it out")
    if recache == "unmasked":
        check_at_once(state.memory, move_sink)
    new = rows()
    blend_rows([state.rows, new], [0.5, 0.5], blend)
    return Transition(state.rows, new, max(blend_blocks, 1), 0, mode, blend, recache, move_sink)


def at_once(state: SessionState, put: Put, *, move_sink: bool = False) -> SessionState:
    """The latest frames once more in one pass without a mask; the sink stays if it is not among them."""
    memory, stop = state.memory, state.frame
    cache = memory.forget(state.cache)
    if move_sink:
        cache = replace(cache, count=jnp.int32(0))
    frames = min(memory.window - int(cache.count), stop)
    own = jnp.concatenate([own for _, own in state.recent], axis=1)[:, -frames:]
    state = replace(state, cache=cache)
    return replace(state, cache=put(state, stop - frames, own))
