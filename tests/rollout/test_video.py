"""Video to video: strength 1 is text to video, strength 0 the codec's own round trip."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise
from cfjax.models.codec import PatchCodec
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep, ManyStep, levels_from, network_calls
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Text
from cfjax.rollout.stream import Pipeline, seeded_noise, stream_latents
from cfjax.rollout.video import adapted_level, motion, noised
from tests.tiny import BATCH, CONFIG, FRAMES, SHAPE, normal, relative, text_kv, tiny

FEW, BLOCKS = FewStep((1000, 500)), Blocks(2)
LATENTS = normal(5, (1, *SHAPE[1:]))
NOISE = seeded_noise(np.array([3, 4], np.uint32))


def latents_of(sampler, noise=NOISE, blocks=BLOCKS) -> np.ndarray:
    pipeline = Pipeline(tiny(), None, sampler, blocks, fused_commit="off")
    sizes = {"num_frames": FRAMES, "latent_shape": SHAPE[2:], "batch": BATCH}
    return np.concatenate([np.asarray(x) for x in stream_latents(pipeline, text_kv(), noise, **sizes)], axis=1)


def test_levels_begin_at_the_strength():
    warped = FEW.sigmas()
    np.testing.assert_array_equal(replace(FEW, strength=1.0).sigmas(), warped)
    np.testing.assert_allclose(replace(FEW, strength=0.9).sigmas(), [0.9, warped[1]], rtol=1e-6)
    np.testing.assert_allclose(replace(FEW, strength=0.6).sigmas(), [0.6], rtol=1e-6)
    assert not replace(FEW, strength=0.0).sigmas().size
    assert levels_from(1.0, np.array([0.9998, 0.0], np.float32)).tolist() == [np.float32(0.9998), 0.0]
    for solver in ("euler", "heun", "unipc"):
        whole, (sigmas, model_sigmas) = (ManyStep(solver, 8, strength=s).grid() for s in (1.0, 0.7))
        assert sigmas[0] == np.float32(0.7) and set(sigmas[1:]) == {s for s in whole[0] if s < 0.7}
        if solver == "unipc":
            np.testing.assert_array_equal(model_sigmas[1:], whole[1][-len(model_sigmas) + 1 :])
            assert model_sigmas[0] == 0.7 and len(model_sigmas) == len(sigmas) - 1
    assert network_calls(replace(FEW, strength=0.6), BLOCKS, FRAMES) == 3 * 2 - 1
    with pytest.raises(UserError, match=r"strength=1.5: use a noise level from 0"):
        FewStep(strength=1.5)


def test_strength_one_is_text_to_video():
    given = noised(NOISE, LATENTS, FEW, BLOCKS)
    np.testing.assert_allclose(latents_of(FEW, given), latents_of(FEW), atol=1e-6)


def test_strength_zero_is_the_video():
    for sampler in (FewStep(strength=0.0), ManyStep("unipc", 4, strength=0.0)):
        noise = noised(NOISE, LATENTS, sampler, BLOCKS)
        start, _ = noise(1, (BATCH, 2, *SHAPE[2:]), 0)
        np.testing.assert_array_equal(start, np.broadcast_to(LATENTS[:, 2:4], start.shape))
    few = FewStep(strength=0.0)
    found = latents_of(few, noised(NOISE, LATENTS, few, BLOCKS))
    np.testing.assert_array_equal(found, np.broadcast_to(LATENTS, found.shape))


def test_a_block_begins_with_its_part_of_the_video():
    sampler = replace(FEW, strength=0.7)
    noise = noised(NOISE, LATENTS, sampler, BLOCKS)
    start, _ = noise(2, (BATCH, 2, *SHAPE[2:]), 2)
    plain, _ = NOISE(2, (BATCH, 2, *SHAPE[2:]), 2)
    np.testing.assert_array_equal(start, add_noise(LATENTS[:, 4:6], plain, np.float32(0.7)))


def test_motion_lowers_the_level():
    """RMS of 0.1 is half of the most; a still video settles at the strength."""
    still = np.zeros((1, 3, 4, 4, 3), np.float32)
    moving = still + np.array([0.0, 0.1, 0.2], np.float32).reshape(1, 3, 1, 1, 1)
    assert motion(still) == 0 and motion(moving) == pytest.approx(0.5) and motion(10 * moving) == 1
    assert motion(still, moving[:, -1]) == pytest.approx(1.0) and motion(still[:, :1]) == 0
    level = 0.2
    for _ in range(20):
        level = adapted_level(0.8, 0.0, level)
    assert level == pytest.approx(0.8) and adapted_level(0.8, 1.0, 0.8) == pytest.approx(0.71)


# ---- sessions


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    """One pixel per latent, of as many channels."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((12, CONFIG.in_dim)))[0]
    return PatchCodec(*(jnp.asarray(x, jnp.float32) for x in (rng.standard_normal(12), basis, 1 + rng.random(4))))


def session(codec, sampler=FEW, **changes) -> Session:
    rows = np.asarray(normal(200, (1, 3, CONFIG.text_dim)))
    words = Text(lambda prompts: np.repeat(rows, len(prompts), 0), np.asarray(rows[0]))
    return Session(Pipeline(tiny(), codec, sampler, BLOCKS), words, "a", latent_shape=SHAPE[2:], seed=3, **changes)


@pytest.fixture(scope="module")
def video(codec) -> np.ndarray:
    return np.asarray(codec.decode(LATENTS))


def test_a_session_goes_along_with_a_video(codec, video):
    """Frame by frame as the whole at once; at another level it is one program still."""
    sampler = replace(FEW, strength=0.9)
    stream = session(codec, sampler)
    made = [stream.next(video[:, i : i + 2]) for i in (0, 2, 4)]
    found = np.concatenate([np.asarray(block.latents_BFHWC) for block in made], axis=1)
    kv = jax.tree.map(lambda x: x, stream.state.text_kv)
    pipeline, noise = Pipeline(tiny(), None, sampler, BLOCKS, "off"), seeded_noise(np.array([3], np.uint32))
    given = noised(noise, codec.encode(jnp.asarray(video)), sampler, BLOCKS)
    wanted = list(stream_latents(pipeline, kv, given, num_frames=FRAMES, latent_shape=SHAPE[2:]))
    error = relative(found, np.concatenate(wanted, axis=1))
    print(f"session vs whole video: {error:.1e}")
    assert error < 1e-5
    moving = session(codec, sampler)
    levels = []
    for i in (0, 2, 4):
        moving.next(video[:, i : i + 2], follow_motion=True)
        levels.append(moving.state.source.level)
    assert levels[0] < 0.9 and levels[-1] < levels[0]


def test_what_a_session_cannot_go_along_with(codec, video):
    stream = session(codec)
    with pytest.raises(UserError, match=r"the next block takes \(1, 2, 8, 8, 3\)"):
        stream.next(video[:, :1])
    stream.next(video[:, :2])
    with pytest.raises(UserError, match="give its next frames too"):
        stream.next()
    late = session(codec)
    late.next()
    with pytest.raises(UserError, match="began without a video"):
        late.next(video[:, :2])
    with pytest.raises(UserError, match="needs a few-step sampler"):
        session(codec, ManyStep("euler", 3)).next(video[:, :2])
    with pytest.raises(UserError, match="open the run with decoder='vae'"):
        session(Blind()).next(video[:, :2])


class Blind:
    """A codec without an encoder of streams."""

    def init_state(self, batch: int) -> int:
        return 0
