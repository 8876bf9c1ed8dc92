"""A run opened from Python: its streams are what `cfjax generate` makes, and mistakes are named."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import cfjax
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
from tests.commands import ROOT

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
    np.testing.assert_array_equal(to_uint8(run.generate(CAPTIONS, seed=3)), clips.video_BPHWC)


@pytest.fixture(scope="module")
def causal(run):
    """The same network as a one-step student of blocks of three."""
    return replace(run, sampler=FewStep((1000,)), blocks=Blocks(3))


def test_a_session_is_for_causal_runs_and_known_words(run, causal):
    with pytest.raises(UserError, match="it has no session"):
        run.session(CAPTIONS[0])
    with pytest.raises(UserError, match="prompt 'a red dog moving left': this model never saw 'dog'"):
        causal.session("a red dog moving left")
    session = causal.session(CAPTIONS[0], seed=3, memory="infinity_rope")
    streamed = next(iter(causal.stream(CAPTIONS[:1], seed=3)))
    np.testing.assert_allclose(session.next().video_BPHWC, streamed, atol=1e-5)
    with pytest.raises(UserError, match="prompt 'a red dog': this model never saw 'dog'"):
        session.set_prompt("a red dog")


def test_streams_are_parts_of_what_is_generated(causal):
    """Sizes, seeds of their own and given frames; given ones come first."""
    whole = causal.generate(CAPTIONS[:1], seed=3)
    np.testing.assert_array_equal(np.concatenate(list(causal.stream(CAPTIONS[:1], seed=[3])), axis=1), whole)
    assert causal.generate(CAPTIONS[:1], seed=3, frames=6).shape == (1, 6, 32, 32, 3)
    latents = causal.encode(to_uint8(whole))
    np.testing.assert_allclose(causal.decode(latents), np.clip(whole, -1, 1), atol=0.35)
    assert abs(causal.decode(causal.encode(whole[0].clip(-1, 1))) - whole.clip(-1, 1)).mean() < 0.05
    given, *rest = causal.stream(CAPTIONS[:1], seed=3, given_BFHWC=latents[:, :3])
    np.testing.assert_allclose(given, causal.decode(latents[:, :3]), atol=1e-5)
    assert [block.shape[1] for block in rest] == [3, 3, 3]


TEXT = CAPTIONS[0]
UNKNOWN = "a red dog moving left"
# (method, arguments, message): of a causal run. Nothing is compiled for any.
MISTAKES = [
    ("stream", {"captions": TEXT}, "give a list of captions, such as"),
    ("stream", {"captions": []}, r"captions=\[\]: give a list"),
    ("stream", {"captions": None}, "captions=None: give a list"),
    ("stream", {"captions": [3]}, "caption 3: give a text"),
    ("stream", {"captions": [UNKNOWN]}, f"caption '{UNKNOWN}': this model never saw 'dog'"),
    ("generate", {"captions": [UNKNOWN]}, f"caption '{UNKNOWN}': this model never saw 'dog'"),
    ("generate", {"seed": -1}, r"seed=-1: use 0 to 2\*\*32 - 1"),
    ("generate", {"seed": 2**32}, "seed=4294967296: use 0 to"),
    ("generate", {"seed": 1.5}, "seed=1.5: use a whole number"),
    ("generate", {"seed": [1, 2, 3]}, "3 seeds for 1 captions"),
    ("generate", {"frames": 7}, "frames=7: blocks of 3 latent frames .* use 6 or 9"),
    ("generate", {"frames": "9"}, "frames='9': use a whole number"),
    ("generate", {"frames": -3}, "frames=-3: use 0 to"),
    ("generate", {"height": 33}, "height=33: needs a multiple of 16 pixels; use 32 or 48"),
    ("generate", {"width": 8}, "width=8: needs a multiple of 16 pixels"),
    ("stream", {"memory": "infinity_roop"}, "did you mean infinity_rope"),
    ("stream", {"memory": 7}, "memory=7: give a policy or its name"),
    ("stream", {"memory": "rolling_forcing"}, "is for sampler.kind='rolling'"),
    ("stream", {"negative_prompt": UNKNOWN}, f"negative_prompt '{UNKNOWN}': this model never saw"),
    ("stream", {"given_BFHWC": np.zeros((1, 4, 4, 4, 16))}, "4 given latent frames end inside a block"),
    ("stream", {"given_BFHWC": np.zeros((1, 3, 4, 4, 9))}, "given_BFHWC: latents .* needs"),
    ("stream", {"given_BFHWC": "latents"}, "give an array of numbers, not str"),
    ("session", {"prompt": UNKNOWN}, f"prompt '{UNKNOWN}': this model never saw 'dog'"),
    ("session", {"prompt": [TEXT, UNKNOWN]}, "give a text, or a list of"),
    ("session", {"prompt": [(TEXT, 1.0), (UNKNOWN, 1.0)]}, "this model never saw 'dog'"),
    ("session", {"prompt": None}, "prompt None: give a text"),
    ("session", {"prompt": TEXT, "seed": "one"}, "seed='one': use a whole number"),
    ("session", {"prompt": TEXT, "hold": -1}, "hold=-1: use 0 to"),
    ("session", {"prompt": TEXT, "max_frames": 2.5}, "max_frames=2.5: use a whole number"),
    ("session", {"prompt": TEXT, "memory": 7}, "memory=7: give a policy or its name"),
    ("session", {"prompt": TEXT, "memory": "no"}, "memory='no': use full"),
    ("session", {"prompt": TEXT, "given_BFHWC": np.zeros((2, 3, 4, 4, 16))}, "given_BFHWC: latents"),
    ("encode", {"video": np.zeros((4, 32, 32), np.uint8)}, r"needs \[P, H, W, 3\]"),
    ("encode", {"video": np.zeros((4, 30, 32, 3), np.uint8)}, "sides that 8 x 8 divide"),
    ("encode", {"video": np.full((4, 32, 32, 3), 255.0)}, r"numbers beyond \[-1, 1\]"),
    ("encode", {"video": np.full((4, 32, 32, 3), np.nan)}, "NaN or infinity"),
    ("encode", {"video": "clip.mp4"}, "give an array of numbers, not"),
    ("decode", {"latents": np.zeros((3, 4, 4, 9))}, r"needs \[B, F, H, W, 16\]"),
    ("decode", {"latents": None}, "latents: "),
]


@pytest.mark.parametrize(("method", "arguments", "message"), MISTAKES, ids=[str(n) for n in range(len(MISTAKES))])
def test_a_mistake_is_named_before_anything_is_sampled(causal, method, arguments, message):
    asked = {"captions": [TEXT], **arguments} if method in ("stream", "generate") else arguments
    with pytest.raises(UserError, match=message) as caught:
        getattr(causal, method)(**asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("stream", {}, "is bidirectional: it makes all frames at once; use generate"),
        ("generate", {"memory": "infinity_rope"}, "this run is bidirectional, it has no blocks"),
        ("generate", {"independent_first_frame": True}, "this run is bidirectional, it has no blocks"),
        ("generate", {"given_BFHWC": np.zeros((1, 3, 4, 4, 16))}, "cannot go on from given frames"),
    ],
)
def test_what_a_bidirectional_run_cannot(run, method, arguments, message):
    with pytest.raises(UserError, match=message):
        getattr(run, method)([TEXT], **arguments)


def test_a_run_without_weights_says_so():
    run = open_run("toy_teacher", with_model=False)
    for call in (run.generate, replace(run, blocks=Blocks(3)).stream):
        with pytest.raises(UserError, match=r"opened with with_model=False: read its weights with load_weights\(run\)"):
            call([TEXT])


@pytest.mark.parametrize("name", [3, None, b"runs"])
def test_a_run_is_a_folder_or_a_name(name):
    with pytest.raises(UserError, match=r"give a run directory, or the name of a shipped model|no such run"):
        open_run(name)


def test_a_folder_may_be_a_path(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such run directory"):
        open_run(tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"run='{tmp_path}/runs/dmd'"):
        open_run("~/runs/dmd")


def test_importing_the_package_imports_no_jax():
    """And what it names is there; a typo is an AttributeError that says what is."""
    code = (
        "import sys, cfjax\n"
        "assert not {'jax', 'numpy', 'absl'} & set(sys.modules), sorted(sys.modules)\n"
        "assert cfjax.open_run.__name__ == 'open_run' and {*cfjax.__all__} <= {*dir(cfjax)}\n"
        "assert all(getattr(cfjax, name) for name in cfjax.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="'cfjax' has no attribute 'open_runs'; it has Run, "):
        cfjax.open_runs  # noqa: B018


def test_no_network_is_called_as_the_codec_is():
    c = dmd.get_config("toy,long")
    assert "codec" in roles_of(c)
    c.roles.codec = presets.role("toy")
    with pytest.raises(UserError, match=r"^roles\.codec: objective\.max_frames="):
        roles_of(c)
