"""States of memory policies whose keys and values are plain numbers, and streams of the tiny network."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.memory.slots import Memory
from cfjax.models.cache import init_cache
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, denoise_block, scan_blocks
from tests.tiny import CONFIG, SIDE, text_kv, tiny

LAYOUT = Blocks(2)
TOKENS, ROW = CONFIG.tokens_per_frame(SIDE, SIDE), CONFIG.tokens_per_row(SIDE)


def layout(memory: Memory | None) -> Blocks:
    return replace(LAYOUT, memory=memory)


@partial(jax.jit, static_argnames="memory")
def commit(state, own, start, *, memory: Memory):
    """Two frames whose keys and values are a number each: one program for all states of a policy."""
    values = jnp.broadcast_to(own.reshape(1, 1, 2, 1, 1, 1), (1, 1, 2, 1, CONFIG.num_heads, CONFIG.head_dim))
    at = memory.own_positions(state, start, 2)
    return memory.commit(state, jax.vmap(rotate_time, (0, None))(values, at), values, start)


def committed(memory: Memory, numbers: np.ndarray, count: int, *, again: bool = False):
    """A state after `count` blocks of one layer whose keys and values are `numbers`, [F], in every channel."""
    state = memory.init(replace(CONFIG, num_layers=1), 1, 1, layout(memory))
    for start in range(0, 2 * count, 2):
        own = jnp.asarray(numbers[start : start + 2], jnp.float32)
        for _ in range(2 if again else 1):
            state = commit(state, own, jnp.int32(start), memory=memory)
    return state


@partial(jax.jit, static_argnames="blocks")
def stream(model, kv, noisy, clean, start, state, *, blocks):
    """Block by block from frame `start` on: the flow of the noisy block, then a commit of the clean one."""

    def step(cache, at, inputs):
        (x, own), _ = inputs
        flow = denoise_block(model, x, 0.7, kv, cache, start + at, blocks)
        return commit_block(model, own, kv, cache, start + at, blocks), flow

    return scan_blocks(step, state, (noisy, clean), None, noisy.shape[1], blocks)


def streamed(memory: Memory | None, noisy, clean, start: int = 0):
    """The last state and the flows of the tiny network."""
    blocks = layout(memory)
    state = init_cache(CONFIG, noisy.shape[0], noisy.shape[1], TOKENS, blocks, ROW)
    kv = jax.tree.map(lambda x: x[:, : noisy.shape[0]], text_kv())
    return stream(tiny(), kv, noisy, clean, jnp.int32(start), state, blocks=blocks)
