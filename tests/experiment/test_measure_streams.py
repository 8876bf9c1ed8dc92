"""Long videos under policies and prompt switches, of the shipped network run block by block."""

from dataclasses import replace

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.evaluation.stream_sections import long_sections, switch_sections
from cfjax.evaluation.video import to_uint8
from cfjax.experiment.measure_streams import LONG, SWITCH, load_streams, measure_long, measure_switch, save_streams
from cfjax.experiment.runs import Run, open_run
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep
from cfjax.worlds.toy import evaluation_clips, two_captions

PROMPTS = ("a red circle moving right", "a blue square moving left")


@pytest.fixture(scope="module")
def run() -> Run:
    """Few-step and causal, though it was not trained to be: its videos are no good, but they are videos."""
    return replace(open_run("toy_teacher"), sampler=FewStep(steps=(1000, 500)), blocks=Blocks(frames=3))


def test_long_videos_are_those_of_generate(run, tmp_path):
    """The same bits as a stream of the same seed; curves, drift and bytes per policy; kept and read again."""
    result = measure_long(run, ["full", "longlive_infinity(window=6, sink=1)"], frames=12, clips=2, batch=2, seed=5)
    caption = evaluation_clips(run.toy.shapes, 1)[0]["caption"]
    assert result["captions"][0] == caption
    video = np.concatenate(list(run.stream([caption], seed=5)), axis=1)
    shown = result["videos"]["full"]
    assert shown.shape == (2, 12, 32, 32, 3)
    assert np.abs(shown[0].astype(int) - to_uint8(video[0])).max() <= 1
    full, policy = result["policies"].values()
    assert full["over_time"]["frame"] == [0, 6] and set(full["drift"]) == set(full["over_time"]) - {"frame"}
    # 12 slots, or 3 with their labels
    assert 3.9 < full["cache_bytes"] / policy["cache_bytes"] < 4.1
    save_streams(tmp_path, LONG, result)
    read = load_streams(tmp_path, LONG)
    assert read["policies"] == result["policies"] and list(read["videos"]) == list(result["videos"])
    assert all(np.array_equal(read["videos"][name], video) for name, video in result["videos"].items())
    page = "".join(long_sections(read, 8.0))
    assert page.count("<figure>") == 4 and page.count('class="clip"') == 4 and "longlive_infinity" in page


def test_prompt_switches_are_sessions(run, tmp_path):
    """Before the switch all modes show the same; after it they differ; the record counts by block."""
    result = measure_switch(
        run,
        PROMPTS,
        ["recache", "keep", "cut"],
        memory="longlive_infinity(window=6, sink=1)",
        frames=12,
        clips=2,
        seed=3,
    )
    assert (result["switch"], result["blocks"]) == (2, [0, 3, 6, 9])
    recache, keep, cut = result["videos"].values()
    session = run.session(PROMPTS[0], seed=3, memory="longlive_infinity(window=6, sink=1)")
    before = [session.next().video_BPHWC for _ in range(2)]
    assert np.array_equal(recache[0, :6], to_uint8(np.concatenate(before, axis=1)[0]))
    assert np.array_equal(recache[:, :6], keep[:, :6]) and np.array_equal(keep[:, :6], cut[:, :6])
    assert not np.array_equal(recache[:, 6:], keep[:, 6:]) and not np.array_equal(cut[:, 6:], keep[:, 6:])
    for shares in result["modes"].values():
        assert len(shares["follows"]) == 4 and shares["settled_low"] <= shares["settled"] <= shares["settled_high"]
    save_streams(tmp_path, SWITCH, result)
    page = "".join(switch_sections(load_streams(tmp_path, SWITCH), 8.0))
    assert page.count("<tr>") == 4 and "becomes" in page


def test_what_cannot_be_measured_is_refused(run):
    teacher = open_run("toy_teacher", with_model=False)
    with pytest.raises(UserError, match="bidirectional"):
        measure_long(teacher, ["full"], frames=12, clips=2, batch=2, seed=0)
    with pytest.raises(UserError, match="multiple of batch=3"):
        measure_long(run, ["full"], frames=12, clips=4, batch=3, seed=0)
    with pytest.raises(UserError, match="did you mean ema_sink"):
        measure_long(run, ["full", "ema_sinks"], frames=12, clips=2, batch=2, seed=0)
    with pytest.raises(UserError, match="4 blocks or more, of 3 frames"):
        measure_switch(run, PROMPTS, ["keep"], memory="full", frames=9, clips=1, seed=0)
    with pytest.raises(UserError, match="purple"):
        measure_switch(
            run, ("a purple circle moving up", PROMPTS[1]), ["keep"], memory="full", frames=12, clips=1, seed=0
        )


def test_the_two_captions_of_a_world():
    shapes = open_run("toy_teacher", with_model=False).toy.shapes
    assert two_captions(shapes) == PROMPTS
    assert two_captions(replace(shapes, colours=("green", "white"), shapes=("star", "ring"))) == (
        "a green star moving right",
        "a white ring moving left",
    )
    with pytest.raises(UserError, match=r"shapes.colours=\('red',\)"):
        two_captions(replace(shapes, colours=("red",)))
