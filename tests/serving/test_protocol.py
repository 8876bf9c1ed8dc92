"""The protocol without a server: the schema, the documentation, values, frames."""

import json
import re
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from cfjax.serving.pictures import decode_frame, encode_frame
from cfjax.serving.protocol import (
    FORMATS,
    MESSAGES,
    ChangePrompt,
    Open,
    Refused,
    Seek,
    pack_frame,
    parse_message,
    schema,
    unpack_frame,
)
from tests.commands import ROOT
from tests.serving.fuzz import messages

MOST = 65_536
DOCS = (ROOT / "docs" / "serving.md").read_text()


def test_the_schema_is_one_and_names_every_message():
    Draft202012Validator.check_schema(schema())
    definitions = schema()["$defs"]
    sides = {
        side: [one["$ref"].removeprefix("#/$defs/") for one in definitions[side]["oneOf"]]
        for side in ("client", "server")
    }
    assert sorted(name for names in sides.values() for name in names) == sorted(
        name for name in definitions if name.startswith(("client_", "server_"))
    )
    assert {name.removeprefix("client_") for name in sides["client"]} == MESSAGES.keys()
    for kind, cls in MESSAGES.items():
        named = definitions[f"client_{kind}"]["properties"].keys() - {"type"}
        assert named == {f.name for f in fields(cls)}, kind
        assert definitions[f"client_{kind}"]["additionalProperties"] is False


@pytest.mark.parametrize("side", ["client", "server"])
def test_the_documentation_has_every_key(side):
    """A row of its tables per message, with all keys in code."""
    rows = {}
    for line in DOCS.partition(f"### {side.title()}'s messages")[2].partition("###")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[1].startswith("`") and cells[1] != "`type`":
            for kind in re.findall(r"`(\w+)`", cells[1]):
                rows[kind] = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", " ".join(cells[2:])))))
    definitions = schema()["$defs"]
    kinds = {name.removeprefix(f"{side}_") for name in definitions if name.startswith(f"{side}_")}
    assert rows.keys() == kinds
    for kind in kinds:
        assert definitions[f"{side}_{kind}"]["properties"].keys() - {"type"} <= rows[kind], kind


def test_the_documentation_has_every_code_and_reason():
    definitions = schema()["$defs"]
    for kind, key in (("error", "code"), ("closed", "reason")):
        for value in definitions[f"server_{kind}"]["properties"][key]["enum"]:
            assert f"`{value}`" in DOCS, value


def test_messages_become_values():
    opened = parse_message('{"type": "open", "version": 1, "prompt": "a", "seed": 3.0}', MOST)
    assert opened == Open(1, "a", seed=3) and isinstance(opened, Open) and type(opened.seed) is int
    assert parse_message('{"type": "seek", "block": 7}', MOST) == Seek(7)
    both = parse_message('{"type": "prompt", "prompts": [{"text": "a", "weight": 2}], "mode": "cut"}', MOST)
    assert isinstance(both, ChangePrompt) and both.value() == [("a", 2.0)] and both.mode == "cut"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no message in JSON"),
        ("[1]", "no JSON object"),
        ("[" * 60_000, "nested too deeply"),
        ('{"type": ' + "[" * 100 + "]" * 100 + "}", "nested more than 64 levels"),
        ('{"type": "start"}', "type is 'start'; a message has a type, one of open"),
        ('{"type": ["open"]}', "type is"),
        ('{"type": "open", "type": "ack"}', "stands in one object twice"),
        ('{"type": "open", "version": 2, "prompt": "a"}', "version is 2; this server speaks version 1"),
        ('{"type": "open", "version": 1}', "'prompt' is a required property"),
        ('{"type": "open", "version": 1, "prompt": ""}', "prompt is ''"),
        ('{"type": "open", "version": 1, "prompt": "a", "size": 3}', "'size' was unexpected"),
        ('{"type": "open", "version": 1, "prompt": "a", "seed": -1}', "seed is -1; the schema says minimum: 0"),
        ('{"type": "open", "version": 1, "prompt": "a", "seed": true}', "seed is True"),
        ('{"type": "open", "version": 1, "prompt": "a", "fps": 1e999}', "too large a number"),
        ('{"type": "prompt", "prompt": "a", "prompts": [{"text": "b", "weight": 1}]}', "oneOf"),
        ('{"type": "prompt", "prompts": [{"text": "b", "weight": 0}]}', "prompts.0.weight is 0"),
        ('{"type": "set"}', "minProperties"),
        ('{"type": "action", "keys": [' + ",".join(["{}"] * 20_000) + "]}", "maxItems"),
        ('{"type": "ack", "block": 1' + " " * MOST + "}", "at most 65,536 bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_line(text, told):
    with pytest.raises(Refused, match=re.escape(told)) as refused:
        parse_message(text, MOST)
    line = str(refused.value)
    assert refused.value.code == "invalid_message" and len(line) < 400 and "\n" not in line


@settings(max_examples=300, deadline=None)
@given(messages())
def test_any_message_is_taken_or_refused_as_the_schema_says(text):
    """The schema's own validator agrees, wherever both read the JSON."""
    try:
        parse_message(text, MOST)
        taken = True
    except Refused as refused:
        assert refused.code == "invalid_message" and "\n" not in str(refused)
        taken = False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        assert not taken
        return
    valid = Draft202012Validator({"$ref": "#/$defs/client", "$defs": schema()["$defs"]}).is_valid(value)
    assert valid or not taken


def test_frames_are_packed_as_the_documentation_says():
    packed = pack_frame(258, 3, b"picture", last=True)
    assert packed == b"CFJX" + bytes([0, 0, 1, 2, 0, 3, 0, 1]) + b"picture"
    assert unpack_frame(packed) == (258, 3, 1, b"picture") and unpack_frame(pack_frame(0, 0, b"", last=False))[2] == 0
    for broken in (b"", b"CFJX", b"CFJY" + bytes(8)):
        with pytest.raises(ValueError, match="no frame"):
            unpack_frame(broken)


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_come_back(kind):
    y, x = np.mgrid[:24, :40]
    frame = np.stack([6 * x, 10 * y, 3 * (x + y)], axis=-1).astype(np.uint8)
    back = decode_frame(encode_frame(frame, kind), kind, 24, 40)
    error = np.abs(back.astype(int) - frame).max()
    print(f"{kind}: {error}")
    assert error <= (0 if kind in ("raw", "png") else 24)
