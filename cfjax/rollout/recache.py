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
from typing import Literal

import jax
import jax.numpy as jnp

from cfjax.core.errors import UserError
from cfjax.memory.names import memory_name
from cfjax.memory.policies import SlotRelative
from cfjax.memory.slots import Everything, Memory, State
from cfjax.nn.visibility import Blocks
from cfjax.rollout.session_state import SessionState

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
