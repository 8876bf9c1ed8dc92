"""Live sessions whose next blocks are made together: one pass of the network for several streams.

    for group in groups(ready):             # which go together now
        for block in step_together(group):  # pixels first; a block is committed with the next one
            ...

One program per batch size of `SIZES`, padded with a copy of the first row. A row has its own position, prompt, seed,
memory and decoder; nothing of one row enters another, so a session's blocks are those that `Session.next` makes. The
program stacks the sessions' states, commits, draws noise, denoises, and takes them apart again: a session's state stays
a value that snapshots may hold (copying is 2 % of a block of the toy's).

Rows may be at different positions, and their memories filled to different degrees: all slots are computed, and those
that a row does not see masked (`nn.frames.masked_prefixes`). So a stream that begins joins the others at once.

What is not part of every block is done for a session by itself, before it joins: commits under a changed prompt, and
those that need pixels. Rolling samplers, sessions with a video, sharded programs, and attention by a flash kernel
(where one stream fills the device) are steps of their own.
"""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.sharding import active_mesh
from cfjax.memory.slots import State
from cfjax.models.wan import KV, Wan, WanConfig
from cfjax.nn.attention import pick_backend
from cfjax.nn.frames import masked_prefixes
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.generate import FewStep, ManyStep, few_step_block, many_step_block
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Made, SessionState
from cfjax.rollout.steering import rows_of, steered_block
from cfjax.rollout.stream import StreamCodec, block_noise, levels_of, per_prompt

SIZES = (1, 2, 4, 8)


class Row(NamedTuple):
    """One session's part of a batch; `clean_BFHWC` is the block to be committed, or zeros.

    `clean_keys`, `keys`: what steers that block and the new one (`steering.rows_of`); None: nothing.
    """

    clean_BFHWC: jax.Array
    text_kv: KV
    cache: State
    clean_keys_BFA: Any = None
    keys_BFA: Any = None


class Numbers(NamedTuple):
    """Every row's: whether it commits, the first frame of what it commits and of the new block, its seed and number."""

    commits_B: Any
    before_B: Any
    start_B: Any
    seed_B: Any
    block_B: Any


@dataclass(frozen=True)
class Plan:
    """What a program is made for, besides shapes.

    Attributes:
      shape: (F, H, W, C) of the new block.
      first: whether it is made by the sampler's list for a first block.
      commits: whether the program commits the blocks before; else each session does.
    """

    sampler: FewStep | ManyStep
    blocks: Blocks
    shape: tuple[int, int, int, int]
    first: bool
    commits: bool


@partial(jax.jit, static_argnames="plan")
def _next_blocks(model: Wan, rows: tuple[Row, ...], numbers: Numbers, *, plan: Plan) -> Any:
    """Every row's latents_BFHWC and cache. Not donated: a snapshot may hold the same cache."""
    sampler, blocks = plan.sampler, plan.blocks
    levels = levels_of(sampler, plan.first) if isinstance(sampler, FewStep) else None

    def one(row: Row, at: Any) -> tuple[jax.Array, State]:
        text_kv, cache = row.text_kv, row.cache
        if plan.commits:
            clean = per_prompt(row.clean_BFHWC, text_kv)
            committing = steered_block(model, row.clean_keys_BFA, at.before_B)
            committed = commit_block(committing, clean, text_kv, cache, at.before_B, blocks)
            cache = jax.tree.map(partial(jnp.where, at.commits_B), committed, cache)
        steps = 1 if levels is None else max(len(levels), 1)
        noise, fresh = block_noise(jax.random.key(at.seed_B), at.block_B, plan.shape, steps)
        own, work = steered_block(model, row.keys_BFA, at.start_B), (text_kv, cache, at.start_B)
        if isinstance(sampler, FewStep):
            return few_step_block(own, noise[None], fresh[:, None], levels, *work, blocks), cache  # type: ignore[arg-type]
        return many_step_block(own, noise[None], *work, sampler, blocks), cache  # type: ignore[arg-type]

    with masked_prefixes():
        made = jax.vmap(one)(_stacked(rows), numbers)
    return _apart(made, len(rows))


@jax.jit
def _decode(codec: StreamCodec, latents: tuple[jax.Array, ...], states: tuple[Any, ...]) -> tuple[jax.Array, Any]:
    """All videos, [rows, P, H, W, C], and every row's decoder state."""
    video, after = jax.vmap(codec.decode_step)(_stacked(latents), _stacked(states))
    return video[:, 0], _apart(after, len(states))


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _apart(stacked: Any, rows: int) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(rows))


def _padded(items: Sequence[Any]) -> tuple[Any, ...]:
    """As many as one of `SIZES`; the first one again in the others' places."""
    size = next(size for size in SIZES if size >= len(items))
    return (*items, *[items[0]] * (size - len(items)))


# ---- who goes together


def groups(sessions: Sequence[Session]) -> list[list[Session]]:
    """Which sessions go together now, each in one group of at most 8.

    Both within groups and among them the order is that in which the sessions are given: with those first that have
    waited longest, and a call whenever some are ready, none waits for more than one block of each group before it.
    Five are four and one: no more than a quarter of a batch is padding.

    A session that is closed or full is by itself, so that its error is nobody else's.
    """
    alike: dict[Hashable, list[Session]] = {}
    for session in sessions:
        alike.setdefault(_program(session), []).append(session)
    parts: list[list[Session]] = []
    for found in alike.values():
        while found:
            size = next(size for size in reversed(SIZES) if 4 * len(found) >= 3 * size)
            parts.append(found[:size])
            found = found[size:]
    place = {id(session): number for number, session in enumerate(sessions)}
    return sorted(parts, key=lambda part: place[id(part[0])])


def _program(session: Session) -> Hashable:
    """Equal for sessions whose next blocks are made by one program, with the same weights."""
    try:
        frames, state = session.frames_ahead(), session.state
    except UserError:
        return id(session)
    if _is_alone(session):
        return id(session)
    pipeline, plan = session.pipeline, _plan(session, frames)
    leaves, treedef = jax.tree.flatten((state.text_kv, state.cache))
    shapes = tuple((x.shape, x.dtype) for x in leaves)
    return id(pipeline.model), id(pipeline.codec), plan, _pending_frames(state, plan), treedef, shapes


def _is_alone(session: Session) -> bool:
    """Whether its blocks are made by `Session.next`."""
    sampler, config = session.pipeline.sampler, session.pipeline.model.config
    backend = pick_backend(config.attention, jnp.dtype(config.precision.compute))
    return (
        (isinstance(sampler, FewStep) and sampler.rolling)
        or session.state.source is not None
        or active_mesh() is not None
        or backend not in ("xla", "chunked", "per_head")
    )


def _plan(session: Session, frames: int) -> Plan:
    sampler = session.pipeline.sampler
    first = isinstance(sampler, FewStep) and bool(sampler.first_steps) and not session.state.generated
    shape = (frames, *session.latent_shape)
    return Plan(sampler, session.layout, shape, first, commits=not session.needs_pixels())


def _pending_frames(state: SessionState, plan: Plan) -> int:
    return plan.blocks.frames if state.pending is None else state.pending[1].shape[1]


# ---- their next blocks


def step_together(sessions: Sequence[Session]) -> list[Made]:
    """The next block of every session, in their order; those that cannot go together go one after another.

    Of blocks that were made together, `network_s` and `decode_s` are those of them all.

    Raises:
      UserError: a session is closed, full, goes along with a video, or is there twice. None has gone on then.
    """
    if len({id(session) for session in sessions}) < len(sessions):
        raise UserError("a session is there twice: a block comes after the one before it; give each session once")
    for session in sessions:
        session.frames_ahead()
        if session.state.source is not None:
            raise UserError("a session that goes along with a video needs its next frames: call its own next(video)")
    made: dict[int, Made] = {}
    for group in groups(sessions):
        alone = len(group) == 1 and _is_alone(group[0])
        blocks = [group[0].next()] if alone else _step(group)
        made.update(zip(map(id, group), blocks, strict=True))
    return [made[id(session)] for session in sessions]


def _step(group: Sequence[Session]) -> list[Made]:
    """The next blocks of sessions that go together."""
    begun = time.perf_counter()
    pipeline, call = group[0].pipeline, group[0].call
    plan = _plan(group[0], group[0].frames_ahead())
    clean_shape = (1, _pending_frames(group[0].state, plan), *plan.shape[1:])
    # What commits by itself first, and what is committed in the batch.
    by_itself = lambda state: state.transition is not None or not plan.commits
    states = [s.prepared(s.state) if by_itself(s.state) else s.state for s in group]
    config = pipeline.model.config
    rows, numbers = zip(*(_row(state, clean_shape, plan.shape[0], config) for state in states), strict=True)
    columns = Numbers(*(np.asarray(column) for column in zip(*_padded(numbers), strict=True)))
    found = call(_next_blocks, pipeline.model, _padded(rows), columns, plan=plan)
    jax.block_until_ready([x0 for x0, _ in found])
    made = time.perf_counter()
    decoded = _decoded(group[0], [x0 for x0, _ in found[: len(group)]], [state.decoder for state in states])
    blocks = []
    for session, state, (x0, cache), (video, decoder) in zip(group, states, found, decoded, strict=False):
        after = replace(session.remembers(state), cache=cache, decoder=decoder, pending=(state.frame, x0))
        blocks.append(session.went_on(after, video, begun, made))
    return blocks


def _row(state: SessionState, clean_shape: tuple[int, ...], frames: int, config: WanConfig) -> tuple[Row, Numbers]:
    commits = state.pending is not None
    before, clean = state.pending or (state.frame, np.zeros(clean_shape, np.float32))
    at = Numbers(
        np.bool_(commits), np.int32(before), np.int32(state.frame), np.uint32(state.seed), np.int32(state.block)
    )
    keys = (rows_of(config, state.held, *span) for span in ((before, clean_shape[1]), (state.frame, frames)))
    return Row(jnp.asarray(clean), state.text_kv, state.cache, *keys), at


def _decoded(session: Session, latents: Sequence[jax.Array], states: Sequence[Any]) -> list[tuple[np.ndarray, Any]]:
    """Every row's video_BPHWC, on the host, and decoder; those that began together are decoded together."""
    alike: dict[Hashable, list[int]] = {}
    for number, state in enumerate(states):
        leaves, treedef = jax.tree.flatten(state)
        key = (treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves))
        alike.setdefault(key, []).append(number)
    found: dict[int, tuple[np.ndarray, Any]] = {}
    for numbers in alike.values():
        x0, before = (_padded([items[i] for i in numbers]) for items in (latents, states))
        video, after = session.call(_decode, session.pipeline.codec, x0, before)
        pixels = np.asarray(video)
        found |= {i: (pixels[row][None].copy(), after[row]) for row, i in enumerate(numbers)}
    return [found[i] for i in range(len(states))]


def compile_sizes(session: Session, sizes: Sequence[int] = SIZES) -> None:
    """Makes a block of each of these sizes with copies of a session, which stays as it is: their programs are there."""
    for size in sizes:
        step_together([session.fork() for _ in range(size)])
