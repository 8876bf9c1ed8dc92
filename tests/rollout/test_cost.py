"""Streams cost what they see: what XLA counts of the attention that runs, against the rectangles of the visibility."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.models.cache import attend_past, view
from cfjax.nn.attention import dense
from cfjax.nn.visibility import Blocks, Rectangle, Visibility
from cfjax.planning.flops import count_flops

FRAMES, TOKENS, HEADS, DIM = 21, 16, 2, 16
LAYOUTS = {
    "chunk-wise": Blocks(3),
    "frame-wise": Blocks(1),
    "window": Blocks(3, window=9),
    "window and sink": Blocks(3, window=9, sink=3),
    "frame-wise window and sink": Blocks(1, window=6, sink=2),
    "sink inside a block": Blocks(3, window=7, sink=1),
    "first frame alone": Blocks(2, independent_first_frame=True),
}


def arrays(frames: int, *, layers: int = 0, seed: int = 0) -> list[jax.Array]:
    """Three of shape [B, F, T, N, K], with `layers` in front."""
    shape = (*((layers,) if layers else ()), 1, frames, TOKENS, HEADS, DIM)
    return [jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape) for i in range(3)]


def cost(fn, *args) -> dict[str, float]:
    """XLA's own count of the program that runs."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()


def of_block(rectangle: Rectangle, slots: int, blocks: Blocks):
    """The attention of one block against a cache, its queries, keys and values, and a stack of two layers."""
    start, stop = rectangle.queries
    q, k, v = (x[:, start:stop] for x in arrays(FRAMES))
    keys, values, _ = arrays(slots, layers=2, seed=1)
    seen = view(slots, jnp.int32(stop), blocks)  # a constant: XLA keeps one branch
    return lambda q, k, v, keys, values: attend_past(q, k, v, (keys, values, 1), seen, backend="xla"), (
        q, k, v, keys, values,
    )  # fmt: skip


def exactly(rectangle: Rectangle):
    """The rectangle's own arithmetic."""
    start, stop = rectangle.queries
    number = sum(b - a for a, b in rectangle.keys)
    q = jnp.zeros((1, (stop - start) * TOKENS, HEADS, DIM))
    k, v = (jnp.zeros((1, number * TOKENS, HEADS, DIM)) for _ in range(2))
    return partial(dense, backend="xla"), (q, k, v)


@pytest.mark.parametrize("name", LAYOUTS)
def test_executed_attention_is_that_of_the_rectangles(name):
    """The sum over a video's blocks is at most 1.10 times theirs (XLA's FLOPs; softmax included on both sides)."""
    blocks = LAYOUTS[name]
    rectangles = Visibility("block_causal", blocks).rectangles(FRAMES)
    known = {}

    def flops(made, key):
        if key not in known:
            known[key] = cost(made[0], *made[1])["flops"]
        return known[key]

    for kept_whole in {False, bool(blocks.window)}:  # a ring; and self-rollout's cache of all frames
        slots = FRAMES if kept_whole or not blocks.window else blocks.window
        executed = needed = 0.0
        for one in rectangles:
            start, stop = one.queries
            executed += flops(of_block(one, slots, blocks), ("executed", slots, stop))
            needed += flops(exactly(one), (stop - start, sum(b - a for a, b in one.keys)))
        print(f"{name}, {slots} slots: {executed / needed:.3f} of the rectangles' FLOPs")
        assert 0.99 < executed / needed <= 1.10


def test_no_layer_copies_the_cache():
    """Bytes that an early block touches do not depend on the length of the cache: of 2 layers, and 12 or 36 frames."""
    one = Visibility("block_causal", Blocks(3)).rectangles(FRAMES)[1]
    short, long = (cost(*(lambda made: (made[0], *made[1]))(of_block(one, slots, Blocks(3)))) for slots in (12, 36))
    own = 4 * 3 * TOKENS * HEADS * DIM  # bytes of a block's keys
    print({key: (short[key], long[key]) for key in ("flops", "bytes accessed")}, own)
    assert long["bytes accessed"] - short["bytes accessed"] < own


def test_long_videos_have_few_branches_and_little_waste():
    """At most twelve lengths for any video; what is computed beyond the visible is below 1/12."""
    for blocks, frames in [(Blocks(1), 21), (Blocks(3), 240), (Blocks(1), 240), (Blocks(2, True), 121)]:
        stops = [stop for _, stop in blocks.spans(frames)]
        lengths = view(frames, jnp.int32(0), blocks).lengths
        computed = [min(length for length in lengths if length >= stop) for stop in stops]
        assert len(lengths) <= 12 and lengths[-1] == frames and sum(computed) / sum(stops) < 1 + 1 / 12


@pytest.mark.parametrize("backend", ["xla", "per_head", "chunked"])
def test_a_block_sees_what_the_layout_says(backend, monkeypatch):
    """Every block of every layout, against a softmax over exactly the visible frames, in NumPy."""
    monkeypatch.setattr("cfjax.nn.attention.SMALL", 0)
    worst = 0.0
    for blocks in LAYOUTS.values():
        q, k, v = arrays(FRAMES)
        rings = {min(blocks.window or FRAMES, FRAMES), FRAMES}
        for slots in rings:
            run = jax.jit(
                lambda q, k, v, keys, values, stop, b=blocks, s=slots: attend_past(
                    q, k, v, (keys, values, 1), view(s, stop, b), backend=backend
                )
            )
            keys, values = (np.full((2, 1, slots, TOKENS, HEADS, DIM), 1e4, np.float32) for _ in range(2))
            for rectangle in Visibility("block_causal", blocks).rectangles(FRAMES):
                start, stop = rectangle.queries
                found = run(*(x[:, start:stop] for x in (q, k, v)), keys, values, jnp.int32(stop))
                sees = np.concatenate([np.arange(*span) for span in rectangle.keys])
                scores = np.einsum("bftnk,bgsnk->bnftgs", q[:, start:stop], k[:, sees]) * DIM**-0.5
                weights = np.exp(scores - scores.max((-2, -1), keepdims=True))
                weights /= weights.sum((-2, -1), keepdims=True)
                wanted = np.einsum("bnftgs,bgsnk->bftnk", weights, v[:, sees])
                worst = max(worst, np.abs(found - wanted).max())
                for frame in range(start, stop):
                    ring = blocks.window and slots == blocks.window
                    behind = blocks.sink + (frame - blocks.sink) % (slots - blocks.sink) if ring else frame
                    slot = frame if frame < blocks.sink else behind
                    keys[1, :, slot], values[1, :, slot] = k[:, frame], v[:, frame]
    print(f"{backend}: largest error {worst:.1e}")
    assert worst < 2e-6


def test_flops_of_a_conditional_over_lengths_are_the_mean():
    """`count_flops` weighs the branches by how often they run."""
    q, k, v = arrays(3)
    keys, values, _ = arrays(FRAMES, layers=1)
    run = lambda stop: attend_past(q, k, v, (keys, values, 0), view(FRAMES, stop, Blocks(3)), backend="xla")
    per_frame = 4 * 3 * TOKENS * TOKENS * HEADS * DIM
    assert count_flops(run, jnp.int32(3)) == per_frame * FRAMES
    assert count_flops(run, jnp.int32(3), trip_counts={"visible_prefix": 1 / 7}) == pytest.approx(per_frame * 12)
