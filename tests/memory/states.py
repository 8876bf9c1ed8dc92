"""States of memory policies whose keys and values are plain numbers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.memory.slots import Memory
from cfjax.nn.rope import rotate_time
from cfjax.nn.visibility import Blocks
from tests.tiny import CONFIG

LAYOUT = Blocks(2)


def layout(memory: Memory | None) -> Blocks:
    return replace(LAYOUT, memory=memory)


def committed(memory: Memory, numbers: np.ndarray, count: int, *, again: bool = False):
    """A state after `count` blocks of one layer whose keys and values are `numbers`, [F], in every channel."""
    config, blocks = replace(CONFIG, num_layers=1), layout(memory)
    state = memory.init(config, 1, 1, blocks)
    shape = (1, 1, 2, 1, CONFIG.num_heads, CONFIG.head_dim)

    @jax.jit
    def commit(state, own, start):
        values = jnp.broadcast_to(own.reshape(1, 1, 2, 1, 1, 1), shape)
        at = memory.own_positions(state, start, 2)
        return memory.commit(state, jax.vmap(rotate_time, (0, None))(values, at), values, start)

    for start in range(0, 2 * count, 2):
        own = jnp.asarray(numbers[start : start + 2], jnp.float32)
        for _ in range(2 if again else 1):
            state = commit(state, own, jnp.int32(start))
    return state
