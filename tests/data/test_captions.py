"""Which column is the caption, which one the clip, and which of several captions is taken."""

from pathlib import Path

import pytest

from cfjax.core.errors import UserError
from cfjax.data.captions import Columns, caption_of, parts_of, printed, spans_of
from cfjax.data.pictures import Unusable
from cfjax.data.tables import Row

TABLE = Path("table.csv")

# The columns of published sets, from their cards and downloaders.
PUBLISHED = {
    "OpenVid-1M": ("video,caption,aesthetic score,motion score,temporal consistency score,camera motion,fps,seconds",
                   {"file": "video", "caption": "caption"}),
    "Panda-70M": ("videoID,url,timestamp,caption,matching_score,desirable_filtering,shot_boundary_detection",
                  {"file": "videoID", "caption": "caption", "times": "timestamp"}),
    "Koala-36M": ("videoID,url,timestamp,caption,clarity_score,aesthetic_score,motion_score,"
                  "video_training_suitability_score",
                  {"file": "videoID", "caption": "caption", "times": "timestamp"}),
    "MiraData": ("clip_id,source,video_url,video_id,width,height,fps,seconds,timestamp,frame_number,file_path,"
                 "short_caption,dense_caption,background_caption,main_object_caption,style_caption,camera_caption",
                 {"file": "file_path", "caption": "dense_caption", "times": "timestamp"}),
    "FastVideo": ("path,resolution,fps,duration,cap", {"file": "path", "caption": "cap"}),
    "Hugging Face": ("file_name,text", {"file": "file_name", "caption": "text"}),
    "MSR-VTT": ("video_id,caption,sen_id", {"file": "video_id", "caption": "caption"}),
    "capitals": (" File , Caption", {"file": " File ", "caption": " Caption"}),
}  # fmt: skip


def row(names: str) -> Row:
    return Row("line 2", dict.fromkeys(names.split(","), "x"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_columns_of_published_sets_are_known(name):
    names, expected = PUBLISHED[name]
    assert Columns().of(TABLE, row(names), clips=True) == expected
    assert Columns().of(TABLE, row(names), clips=False) == {"caption": expected["caption"]}


def test_columns_can_be_named():
    asked = Columns("url", "short_caption")
    names = PUBLISHED["MiraData"][0].replace("source", "url")
    assert asked.of(TABLE, row(names), clips=True) == {"file": "url", "caption": "short_caption", "times": "timestamp"}
    with pytest.raises(UserError, match=r"line 2: no column 'short_caption' \(--config.caption_column\); it has a, b"):
        asked.of(TABLE, row("a,b"), clips=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("file,text,caption", "text and caption may be meant; choose with --config.caption_column=NAME"),
        ("file,path,caption", "file and path may be meant; choose with --config.file_column=NAME"),
        (
            "file,title",
            "needs one of the columns caption, .*; it has file, title: name one",
        ),
        (
            "title,caption",
            "needs one of the columns file, .*; it has title, caption: name one, --config.file",
        ),
    ],
)
def test_a_doubtful_column_is_not_guessed(names, message):
    with pytest.raises(UserError, match=message):
        Columns().of(TABLE, row(names), clips=True)


@pytest.mark.parametrize(
    ("value", "choice", "caption"),
    [
        (" a cat ", "", "a cat"),
        (["a cat"], "", "a cat"),
        (["a cat", None, ""], "", "a cat"),
        (["a cat", "a black cat"], "first", "a cat"),
        (["a cat", "a black cat"], "longest", "a black cat"),
        ({"short": "a cat", "long": "a black cat"}, "long", "a black cat"),
        ({"long": "a black cat"}, "", "a black cat"),
        ("['a cat', 'a black cat']", "longest", "a black cat"),  # as pandas writes a list into a CSV
        ("['a cat'\n 'a black cat']", "first", "a cat"),  # and an array, which Python would read as one string
        ('["it\\u2019s a cat"]', "", "it\u2019s a cat"),
        ('{"short": "a cat", "long": "a black cat"}', "short", "a cat"),
        ("{'short': 'a cat'}", "", "a cat"),
        ("[a cat]", "", "[a cat]"),
        ("[Scene 1] 'a cat' [Scene 2]", "", "[Scene 1] 'a cat' [Scene 2]"),
        ("{a cat}", "", "{a cat}"),
        ("[1, 2]", "", "[1, 2]"),
        ("[]", "", "[]"),
    ],
)
def test_one_of_several_captions_is_taken_by_a_named_rule(value, choice, caption):
    assert caption_of(value, choice) == caption


@pytest.mark.parametrize(
    ("value", "choice", "message"),
    [
        (["a cat", "a dog"], "", "several captions: 2; choose with --config.caption_choice=first or longest"),
        (["a cat", "a dog"], "long", "several captions: 2; choose"),
        ({"short": "a", "long": "b"}, "", "several captions: short, long; choose with --config.caption_choice=NAME"),
        ({"short": "a", "long": "b"}, "first", "several captions: short, long"),
        ("['a cat', 'a dog']", "", "several captions: 2"),
        (["a cat", 3], "first", "no caption: a list of int, str"),
        ([["a cat"]], "", r"no caption: \['a cat'\] is no text"),
        (5, "", "no caption: 5 is no text"),
        (float("nan"), "", "no caption: nan is no text"),
        (True, "", "no caption: True is no text"),
        (None, "", "no caption: it is empty"),
        ("  ", "", "no caption: it is empty"),
        ([], "", "no caption: it is empty"),
        ({"long": None}, "long", "no caption: it is empty"),
        ("a \ud83d cat", "", "no caption: it holds half of a surrogate pair"),
    ],
)
def test_what_is_no_caption_is_reported(value, choice, message):
    with pytest.raises(Unusable, match=message):
        caption_of(value, choice)


def test_what_was_printed_is_read_and_all_else_stays():
    assert printed("['a', \"b's\"]") == ["a", "b's"] and printed("plain") == "plain"
    for text in ("['a', b]", "['a'", "'a']", "['a', 1]", "['a'] and ['b']", "{}", "{'a'}", "[" * 99 + "]" * 99):
        assert printed(text) == text


# ---- parts of a video


@pytest.mark.parametrize(
    ("value", "spans"),
    [
        ("['0:00:43.836', '0:00:50.175']", [(43.836, 50.175)]),  # Koala-36M
        ("[['0:00:43.836', '0:00:50.175'], ['0:01:00', '1:00:00.5']]", [(43.836, 50.175), (60.0, 3600.5)]),  # Panda-70M
        ([1, 2.5], [(1.0, 2.5)]),
        ([["00:01.5", "3"]], [(1.5, 3.0)]),
    ],
)
def test_time_stamps_of_parts(value, spans):
    assert spans_of(value) == [pytest.approx(span) for span in spans]


@pytest.mark.parametrize("value", ["", "soon", "[1]", "[2, 1]", "[-1, 3]", "[1, 2, 3]", "['1:2:3:4', 2]", None, "{}"])
def test_other_time_stamps_are_reported(value):
    with pytest.raises(Unusable, match=r"no part: .* is no \[start, stop\]"):
        spans_of(value)


def test_every_part_has_a_caption_of_its_own():
    assert parts_of([[0, 1], [1, 2]], "['a', 'b']") == [("a", (0.0, 1.0)), ("b", (1.0, 2.0))]
    assert parts_of([0, 1], "a, b") == [("a, b", (0.0, 1.0))]
    assert parts_of([0, 1], ["a", "b"]) == [(["a", "b"], (0.0, 1.0))]  # several of one part: chosen from later
    with pytest.raises(Unusable, match="several captions: 1 for 2 parts"):
        parts_of([[0, 1], [1, 2]], "a")
