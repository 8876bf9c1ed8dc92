"""Sessions: the blocks of `generate`, whose prompt, memory and course change between any two of them."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.compression import DeepForcing
from cfjax.memory.heads import DummyForcing, ForcingKV
from cfjax.memory.policies import SlotRelative
from cfjax.memory.profile import HeadLabels, HeadTable
from cfjax.memory.pyramid import PyramidHeads
from cfjax.memory.slots import Everything, Memory
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep
from cfjax.rollout.prompts import blend_rows
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import SessionState, Text
from cfjax.rollout.stream import Pipeline, prompt_kv, seeded_noise, stream_latents
from tests.tiny import CONFIG, SHAPE, TEXT_LEN, normal, relative, tiny

FRAMES, SEED = 6, 7
NEGATIVE = np.asarray(normal(102, (TEXT_LEN, CONFIG.text_dim)))
PROMPTS = {name: np.asarray(normal(200 + i, (TEXT_LEN, CONFIG.text_dim))) for i, name in enumerate("abc")}
FEW = FewStep((1000, 500))


def encode(prompts):
    for prompt in prompts:
        if prompt not in PROMPTS:
            raise UserError(f"prompt {prompt!r}: use a, b or c")
    return np.stack([PROMPTS[prompt] for prompt in prompts])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counting:
    """A codec that adds the number of the chunk to its latents."""

    def init_state(self, batch: int):
        return jnp.float32(0.0)

    def decode_step(self, latents, state):
        return latents + state, state + 1


CODEC = Counting()


def session(blocks=Blocks(2), sampler=FEW, **changes) -> Session:
    given = {"latent_shape": SHAPE[2:], "seed": SEED, "max_frames": FRAMES} | changes
    words = Text(encode, given.pop("negative", NEGATIVE))
    return Session(Pipeline(tiny(), CODEC, sampler, blocks), words, given.pop("prompt", "a"), **given)


def made(stream: Session, count: int) -> list:
    return [stream.next() for _ in range(count)]


def latents(blocks) -> np.ndarray:
    return np.concatenate([np.asarray(block.latents_BFHWC) for block in blocks], axis=1)


def generated(blocks, sampler=FEW, frames=FRAMES, prompt="a", **given) -> np.ndarray:
    """What `generate` makes of the same seed."""
    kv = prompt_kv(tiny(), jnp.asarray(encode([prompt])), jnp.asarray(NEGATIVE), sampler)
    sizes = {"num_frames": frames, "latent_shape": SHAPE[2:]} | given
    pipeline = Pipeline(tiny(), CODEC, sampler, blocks, fused_commit="off")
    chunks = list(stream_latents(pipeline, kv, seeded_noise(np.array([SEED], np.uint32)), **sizes))
    return np.concatenate([np.asarray(x) for x in chunks], axis=1)


SLOTS = Blocks(2, memory=SlotRelative(5, 1))  # as most tests have it: one program each
CASES = {
    "chunkwise": (Blocks(2), FEW),
    "policy": (SLOTS, FEW),
    "framewise": (Blocks(1), FEW),
    "first list": (Blocks(2), FewStep((1000, 500), (1000, 750, 500))),
    "window and sink": (Blocks(2, window=5, sink=1), FEW),
    "many-step": (Blocks(2), ManyStep("euler", steps=3)),
}
SLOW = pytest.mark.slow
# Policies whose commits look at queries, or whose heads see different frames.
OBSERVING = {
    "deep_forcing": DeepForcing(8, 2, capacity=6, recent=2),
    "dummy_forcing": DummyForcing(5, 1),
    "forcing_kv": ForcingKV(
        5, 1, profile=HeadTable("t", ((True, False), (False, True)), CONFIG.head_dim, "a run"), runs=2
    ),
    "pyramid": PyramidHeads(profile=HeadLabels("t", ((1, -1), (2, 1)))),
}


@pytest.mark.parametrize("name", [*list(CASES)[:2], *(pytest.param(name, marks=SLOW) for name in list(CASES)[2:])])
def test_a_session_is_generate(name):
    blocks, sampler = CASES[name]
    stream = session(blocks, sampler)
    chunks = made(stream, FRAMES // blocks.frames)
    error = relative(latents(chunks), generated(blocks, sampler))
    print(f"{name}: {error:.1e}")
    assert error < 1e-5
    assert [c.index for c in chunks] == list(range(len(chunks))) and chunks[1].start == blocks.frames
    for index, chunk in enumerate(chunks):  # the codec's state went along
        np.testing.assert_allclose(chunk.video_BPHWC, np.asarray(chunk.latents_BFHWC) + index, rtol=1e-6)


def test_a_session_goes_on_from_given_frames():
    whole = generated(Blocks(2))
    stream = session(given_BFHWC=whole[:, :2])
    assert relative(latents(made(stream, 2)), whole[:, 2:]) < 1e-5
    with pytest.raises(UserError, match="end inside a block"):
        session(given_BFHWC=whole[:, :3])


def test_pixels_leave_before_the_commit():
    """The first block has no commit before it, and every later one has its predecessor's."""
    called: list[str] = []

    def call(function, *args, **static):
        called.append(getattr(function, "__name__", "decode"))
        return function(*args, **static)

    stream = session(call=call)
    called.clear()
    made(stream, 3)
    counts = Counter(called)
    assert counts["next_block"] == 3 and counts["commit_kept"] == 2
    assert "commit_kept" not in called[: called.index("<lambda>")]


def test_snapshots_and_forks_are_values():
    """A fork with the same seed goes on bit for bit, another seed diverges; a snapshot stays as it is."""
    stream = session(SLOTS)
    made(stream, 2)
    before = stream.snapshot()
    same, other = stream.fork(), stream.fork(seed=SEED + 1)
    own, copied, apart = (latents(made(s, 3)) for s in (stream, same, other))
    np.testing.assert_array_equal(own, copied)
    assert relative(apart, own) > 0.1
    stream.restore(before)
    np.testing.assert_array_equal(latents(made(stream, 3)), own)


def test_seek_goes_back_to_what_is_held():
    stream = session(hold=2)
    chunks = made(stream, 3)
    stream.seek(2)
    np.testing.assert_array_equal(latents(made(stream, 1)), np.asarray(chunks[2].latents_BFHWC))
    stream.seek(1)
    np.testing.assert_array_equal(latents(made(stream, 2)), latents(chunks[1:]))
    with pytest.raises(UserError, match=r"block 0 is not held: the session can go to 1, 2, 3"):
        stream.seek(0)


# ---- prompts


@SLOW
@pytest.mark.parametrize("name", OBSERVING)
def test_a_session_under_a_policy_that_observes_is_generate(name):
    """Twelve blocks: whatever is dropped, chosen or merged was so in both."""
    blocks = Blocks(2, memory=OBSERVING[name])
    stream = session(Blocks(2), memory=OBSERVING[name])
    error = relative(latents(made(stream, 12)), generated(blocks, frames=24))
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("blocks", [Blocks(2), SLOTS], ids=["full", "slot_relative"])
def test_recaching_the_same_prompt_changes_nothing(blocks):
    """L4, where every block that is committed again sees what it saw."""
    plain, turned = session(blocks), session(blocks)
    count = 2 if blocks.memory is None else 1
    made(plain, count), made(turned, count)
    turned.set_prompt("a", "recache")
    error = relative(latents(made(turned, 1)), latents(made(plain, 1)))
    print(f"recache of the same prompt: {error:.1e}")
    assert error < 2e-6


def test_a_recached_stream_remembers_under_the_new_prompt():
    """As if all that is remembered had been given frames of a session with the new prompt."""
    stream = session()
    first = made(stream, 1)
    stream.set_prompt("b", "recache")
    other = session(prompt="b", given_BFHWC=latents(first))
    found, wanted = latents(made(stream, 2)), latents(made(other, 2))
    assert relative(found, wanted) < 2e-6
    assert relative(found, generated(Blocks(2))[:, 2:]) > 0.05


def test_a_window_recaches_what_it_holds():
    """The sink stays; as many blocks as the slots hold are committed again."""
    stream = session(SLOTS)
    made(stream, 4)
    stream.set_prompt("a", "recache")
    stream.next()
    assert stream.state.cache.frame_F.tolist() == [0, 6, 7]
    stream.next()
    assert stream.state.cache.frame_F.tolist() == [0, 8, 9]


def test_modes_differ_and_a_switch_at_the_start_is_the_new_prompt():
    def after(mode):
        stream = session(SLOTS)
        made(stream, 3)
        stream.set_prompt("b", mode)
        return latents(made(stream, 1))

    recache, keep, cut = (after(mode) for mode in ("recache", "keep", "cut"))
    assert min(relative(x, y) for x, y in ((recache, keep), (keep, cut), (recache, cut))) > 1e-2
    stream = session()
    stream.set_prompt("b")
    assert relative(latents(made(stream, 2)), generated(Blocks(2), frames=4, prompt="b")) < 1e-5


def test_a_transition_goes_over_block_by_block():
    stream = session()
    stream.set_prompt("b", "keep", blend_blocks=2)
    made(stream, 1)
    np.testing.assert_allclose(stream.state.rows, blend_rows([PROMPTS["a"], PROMPTS["b"]], [0.5, 0.5]))
    made(stream, 1)
    np.testing.assert_array_equal(stream.state.rows, PROMPTS["b"])
    assert stream.state.transition is None
    stream.set_prompt([("a", 1.0), ("c", 3.0)])
    made(stream, 1)
    np.testing.assert_allclose(stream.state.rows, blend_rows([PROMPTS["a"], PROMPTS["c"]], [1.0, 3.0]))


def test_blends():
    """Norms are kept, rows of zeros stay, ends are the prompts themselves, and equal prompts stay as they are."""
    a, b = np.array(PROMPTS["a"]), np.array(PROMPTS["b"])
    a[-1] = b[-1] = 0.0
    mixed = blend_rows([a, b], [1, 3])
    assert np.linalg.norm(mixed) == pytest.approx(0.25 * np.linalg.norm(a) + 0.75 * np.linalg.norm(b), rel=1e-6)
    for blend in ("linear", "slerp"):
        np.testing.assert_array_equal(blend_rows([a, b], [1, 0], blend), a)
        assert not blend_rows([a, b], [1, 1], blend)[-1].any()
        np.testing.assert_allclose(blend_rows([a, a], [1, 1], blend), a, rtol=1e-6)
    e = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(blend_rows([2 * e[:1], 4 * e[1:]], [1, 1], "slerp"), [[3 * 0.5**0.5] * 2], rtol=1e-6)
    for rows, weights, blend, message in (
        ([a], [0.0], "linear", "not all 0"),
        ([a, b], [1.0], "linear", "2 prompts with 1 weights"),
        ([a, b, a], [1, 1, 1], "slerp", "between two prompts, not 3"),
        ([a, b], [1, -1], "linear", "0 or more"),
        ([a, b], [1, 1], "cubic", "use linear or slerp"),
    ):
        with pytest.raises(UserError, match=message):
            blend_rows(rows, weights, blend)


# ---- memory


def test_another_policy_remembers_what_the_session_holds():
    stream = session()
    chunks = made(stream, 2)
    stream.set_memory("infinity_rope(window=5)")
    other = session(SLOTS, given_BFHWC=latents(chunks))
    assert relative(latents(made(stream, 1)), latents(made(other, 1))) < 2e-6


def test_what_remembers_everything_has_an_end():
    stream = session()
    made(stream, 3)
    with pytest.raises(UserError, match="6 latent frames and remembers all of at most 6"):
        stream.next()
    stream.set_memory("infinity_rope(window=5)")
    made(stream, 2)
    assert isinstance(session().state.memory, Everything)


@pytest.mark.slow
def test_two_thousand_blocks_cost_as_the_first():
    """One program each for denoising and committing, the same bytes and calls for every block; and it still works."""
    counts: Counter = Counter()

    def call(function, *args, **static):
        counts[function] += 1
        return function(*args, **static)

    one = FewStep((1000,))
    stream = session(Blocks(1, memory=SlotRelative(3, 1)), one, call=call)
    made(stream, 10)  # slots and the latents of a recache are full
    sizes = lambda: sum(x.nbytes for x in jax.tree.leaves(array_parts(stream.state)))
    before, size = {f: f._cache_size() for f in counts if hasattr(f, "_cache_size")}, sizes()
    counts.clear()
    for block in islice(iter(stream.next, None), 2000):
        assert np.isfinite(block.video_BPHWC).all()
    assert {f: f._cache_size() for f in before} == before and sizes() == size
    assert all(number == 2000 for number in counts.values())
    assert stream.state.frame == 2010 and stream.state.cache.frame_F.tolist() == [0, 2008]


def array_parts(state: SessionState):
    recent = [own for _, own in (*state.recent, state.pending)]
    return state.cache, state.text_kv, state.decoder, recent


def test_a_stream_is_correct_at_positions_beyond_ten_thousand():
    """A window's positions are frame indices; attention depends on their differences alone."""
    near, far = (session(Blocks(2, memory=Memory(5, 0))) for _ in range(2))
    made(near, 3), made(far, 3)
    moved = 12_000
    state = far.state
    cache, (start, own) = state.cache, state.pending
    labels = {name: getattr(cache, name) + moved for name in ("frame_F", "position_F", "stop")}
    far._state = replace(state, cache=replace(cache, **labels), frame=state.frame + moved, pending=(start + moved, own))
    error = relative(latents(made(far, 2)), latents(made(near, 2)))
    print(f"12,000 frames later: {error:.1e}")
    assert error < 2e-5


# ---- bad input: one line, and the stream goes on as if nothing had happened


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.set_prompt("zebra"), "prompt 'zebra': use a, b or c"),
        (lambda s: s.set_prompt("b", "sudden"), "mode='sudden': use one of recache, keep, cut"),
        (lambda s: s.set_prompt("b", blend_blocks=-1), "blend_blocks=-1"),
        (lambda s: s.set_prompt([]), "no prompt"),
        (lambda s: s.set_prompt([("a", 0.0)]), "not all 0"),
        (lambda s: s.set_memory("infinite"), "did you mean infinity_rope"),
        (lambda s: s.set_memory("window(window=3, sink=2)"), "at least 4"),
        (lambda s: s.set_memory("rolling_sink(window=8)"), "rolling_sink.window=8. needs a stream's first frames"),
        (lambda s: s.seek(99), "block 99 is not held"),
        (lambda s: s.fork(seed=-1), "seed=-1: use 0 to"),
        (lambda s: s.restore(session(Blocks(1)).snapshot()), "another blocks"),
    ],
)
def test_a_refusal_leaves_the_stream_as_it_was(act, message):
    stream = session()
    made(stream, 1)
    before = stream.state
    with pytest.raises(UserError, match=message):
        act(stream)
    assert stream.state is before


def test_a_closed_session_and_one_that_cannot_be():
    stream = session()
    stream.close()
    with pytest.raises(UserError, match="closed"):
        stream.next()
    with pytest.raises(UserError, match="no session"):
        session(blocks=None)
    with pytest.raises(UserError, match="negative prompt"):
        session(sampler=ManyStep("euler", steps=3), negative=None)
    with pytest.raises(UserError, match="use a, b or c"):
        session(prompt="zebra")
    rolling = session(memory="rolling_sink(window=8)")
    with pytest.raises(UserError, match="nothing to commit again"):
        rolling.set_prompt("b", "recache")
