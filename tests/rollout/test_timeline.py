"""Prompts over time, in the forms of several systems."""

import json

import pytest

from cfjax.core.errors import UserError
from cfjax.rollout.timeline import Clock, Switch, parse_timed, read_timelines

CLOCK = Clock(fps=16.0, frames=3, stride=4)  # 0.75 s a block


def test_seconds_in_brackets():
    """Rounded to the nearest block; # only inside the brackets; the marked scene begins with the cut."""
    found = parse_timed("a calm sea [5s] | storm #3[10s#]| lightning", CLOCK)
    assert found.switches == (
        Switch(0, "a calm sea", "keep"),
        Switch(7, "storm #3", "cut"),  # 6.67 blocks
        Switch(20, "lightning", "keep"),
    )
    assert found.prompts() == ["a calm sea", "storm #3", "lightning"]
    found.check(21)
    with pytest.raises(UserError, match="'lightning' begins at block 20, the video has 20"):
        found.check(20)


def test_longlives_lines(tmp_path):
    """Latent frames, rounded up to the next block: frame 40 is block 14."""
    file = tmp_path / "interactive.jsonl"
    rows = [
        {"prompts": ["a", "b", "c"], "switch_frame_indices": [40, 80]},
        {"prompts": ["d", "e"], "switch_frame_indices": "42"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    one, other = read_timelines(str(file), CLOCK)
    assert one.switches == (Switch(0, "a"), Switch(14, "b"), Switch(27, "c"))
    assert other.switches == (Switch(0, "d"), Switch(14, "e"))


def test_scopes_timeline(tmp_path):
    file = tmp_path / "timeline.json"
    segments = [
        {"startTime": 0, "endTime": 3, "prompts": [{"text": "a", "weight": 100}]},
        {"startTime": 3, "endTime": 9, "prompts": [{"text": "a", "weight": 1}, {"text": "b"}], "transitionSteps": 4},
    ]
    for value in (segments, {"prompts": segments}):
        file.write_text(json.dumps(value))
        (found,) = read_timelines(str(file), CLOCK)
        assert found.switches == (Switch(0, "a"), Switch(4, (("a", 1.0), ("b", 1.0)), "recache", 4))
        assert found.prompts() == ["a", "b"]


SEGMENT = {"startTime": 0, "endTime": 3, "text": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", "a | b[3s]", "prompt 1, 'a', has no duration: write a[5s]"),
        ("", "a[3s] | [3s]", "prompt 2 is empty"),
        ("", "a[0.1s] | b", "prompt 2, 'b', begins at block 0, no later than the one before it"),
        ("x.json", [SEGMENT, {"startTime": 2, "endTime": 4, "text": "b"}], "prompt 2 begins at 2 s and overlaps"),
        ("x.json", [SEGMENT, {"startTime": 5, "endTime": 6, "text": "b"}], "leaves a gap after the one before it"),
        ("x.json", [{"startTime": 3, "endTime": 6, "text": "b"}], "the first one has to begin with the video"),
        ("x.json", [{"startTime": 3, "endTime": 3, "text": "b"}], "where it begins or before"),
        ("x.json", {"text": "b"}, "no timeline: give"),
        ("x.json", [], "no prompts in it"),
        ("x.jsonl", {"prompts": ["a", "b"], "switch_frame_indices": []}, "2 prompts with 0 switch_frame_indices"),
        ("x.jsonl", {"prompts": ["a", ""], "switch_frame_indices": [9]}, r"x.jsonl:1: prompt 2 is empty"),
    ],
)
def test_what_is_no_timeline_is_said(name, content, message, tmp_path):
    source = content
    if name:
        (tmp_path / name).write_text(json.dumps(content))
        source = str(tmp_path / name)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        read_timelines(source, CLOCK)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"timeline=.*none.json: cannot be read"):
        read_timelines(str(tmp_path / "none.json"), CLOCK)
