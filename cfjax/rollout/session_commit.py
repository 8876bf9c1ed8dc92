"""A session's commit of a block."""

from functools import partial
from typing import Any

import jax

from cfjax.memory.slots import State
from cfjax.models.wan import KV, Wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.stream import per_prompt


# Not donated: a snapshot may hold the same cache.
@partial(jax.jit, static_argnames="blocks")
def commit_kept(
    model: Wan,
    clean: jax.Array,
    text_kv: KV,
    cache: Any,
    start: jax.Array,
    picture: jax.Array | None = None,
    *,
    blocks: Blocks,
) -> State:
    """The cache with the block from `start` on; the one before stays as it is."""
    picture = None if picture is None else per_prompt(picture, text_kv)
    return commit_block(model, per_prompt(clean, text_kv), text_kv, cache, start, blocks, picture_BFHWC=picture)
