"""A run opened from Python: its streams are what `cfjax generate` makes, and mistakes are named."""

from dataclasses import replace

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.evaluation.video import to_uint8
from cfjax.experiment import presets
from cfjax.experiment.networks import roles_of
from cfjax.experiment.runs import open_run
from cfjax.nn.visibility import Blocks
from cfjax.rollout.clips import make_clips
from cfjax.rollout.generate import FewStep
from cfjax.rollout.sizes import Sizes
from cfjax.rollout.stream import Pipeline, seeded_noise
from configs import dmd

CAPTIONS = ["a red circle moving left", "a blue square moving up"]


@pytest.fixture(scope="module")
def run():
    """The shipped teacher with two steps of its sampler."""
    run = open_run("toy_teacher")
    return replace(run, sampler=replace(run.sampler, steps=2))


def test_a_stream_is_what_generate_makes(run):
    frames, height, width, _ = run.latent_shape
    world, pipeline = run.world, Pipeline(run.model, run.world.codec, run.sampler, run.blocks)
    text, sizes = world.encode_prompts(CAPTIONS), Sizes(frames, 0, height, width, world.codec.stride)
    noise = seeded_noise(np.array([3, 3], np.uint32))
    clips = make_clips(pipeline, text, world.negative_text_SE(), noise, sizes, finish=to_uint8)
    streamed = np.concatenate([to_uint8(block) for block in run.stream(CAPTIONS, seed=3)], axis=1)
    np.testing.assert_array_equal(streamed, clips.video_BPHWC)


def test_a_session_is_for_causal_runs_and_known_words():
    with pytest.raises(UserError, match="it has no session"):
        open_run("toy_teacher").session(CAPTIONS[0])
    run = open_run("toy_teacher")
    causal = replace(run, sampler=FewStep((1000,)), blocks=Blocks(3))
    with pytest.raises(UserError, match="prompt 'a red dog moving left': this model never saw 'dog'"):
        causal.session("a red dog moving left")
    session = causal.session(CAPTIONS[0], seed=3, memory="infinity_rope")
    streamed = next(iter(causal.stream(CAPTIONS[:1], seed=3)))
    np.testing.assert_allclose(session.next().video_BPHWC, streamed, atol=1e-5)


@pytest.mark.parametrize(
    ("captions", "seed", "message"),
    [
        ("a red circle moving left", 0, "give a list of captions"),
        (["a red dog moving left"], 0, "caption 'a red dog moving left': this model never saw 'dog'"),
        (CAPTIONS, -1, "seed=-1: use 0 to"),
    ],
)
def test_a_mistake_is_named_before_anything_is_sampled(run, captions, seed, message):
    with pytest.raises(UserError, match=message):
        next(run.stream(captions, seed=seed))


def test_no_network_is_called_as_the_codec_is():
    c = dmd.get_config("toy,long")
    assert "codec" in roles_of(c)
    c.roles.codec = presets.role("toy")
    with pytest.raises(UserError, match=r"^roles\.codec: objective\.max_frames="):
        roles_of(c)
