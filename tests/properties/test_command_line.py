"""Any text behind an override: an error line, or a value of the default's kind; and tuples come back as they were."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cfjax.core.cli import keys_of, parse
from cfjax.core.errors import UserError
from cfjax.core.tuples import parse_tuple
from tests.properties.profile import cases

CONFIG = '''"""cfjax train --config=this"""
from ml_collections import ConfigDict


def get_config():
    values = {"steps": 10, "rate": 1e-3, "quiet": True, "name": "a", "none": None, "group": {"depth": 2}}
    return ConfigDict({**values, "dims": (1, 2), "speeds": (1.0, 0.5), "words": ("red", "green")})
'''
LIKELY = st.sampled_from(
    ["1", "-1", "08", "1e9", "1e999", "nan", "inf", "True", "None", "a,b", "1,2", "(1,)", "[1]", "()", "", " ", "'",
     '"a"', "{}", "9" * 5000, "1_000", "0x10", "\u0661", "=", "a=b", "\n", "(" * 300, "1 2", "\u00b2",
     "--config.steps=1"]
)  # fmt: skip
TEXT = st.one_of(LIKELY, st.text(max_size=40), st.text(alphabet="0123456789.,()[]'\"eE+-_ aNn{}:\\", max_size=30))
KINDS = {"dims": int, "speeds": float, "words": str}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("configs") / "small.py"
    file.write_text(CONFIG)
    return f"--config={file}"


def test_any_text_is_reported_or_a_value_of_the_right_kind(config):
    plain = keys_of(parse("train", [config, "--workdir=w"], description="")[0])

    @cases(250)
    @given(key=st.sampled_from([*plain, "nothing", "dims[0]", "group.deep"]), text=TEXT)
    @example(key="steps", text="9" * 5000)
    def holds(key: str, text: str) -> None:
        try:
            made = keys_of(parse("train", [config, "--workdir=w", f"--config.{key}={text}"], description="")[0])
        except UserError as error:
            assert str(error)
            return
        assert made.keys() == plain.keys()
        assert {name for name in made if made[name] != plain[name]} <= {key, "group"}
        kind = type(made[key])
        assert kind is type(plain[key]) or plain[key] is None
        if kind is tuple:
            assert {type(entry) for entry in made[key]} <= {KINDS[key]}
        if kind is float:
            assert math.isfinite(made[key])

    holds()


@cases(150)
@given(
    words=st.lists(
        st.one_of(TEXT, st.sampled_from(["--help=", "--workdir", "-x", "--config.steps", "--noconfig.quiet"]))
    )
)
def test_any_command_line_is_reported_or_read(config, words):
    try:
        parse("train", [config, "--workdir=w", *words], description="")
    except UserError as error:
        assert str(error)
    except SystemExit as end:
        assert end.code == 0  # --help


TUPLES = st.one_of(
    st.lists(st.integers(), min_size=1).map(tuple),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1).map(tuple),
    st.lists(st.from_regex(r"[a-z][a-z0-9_./-]{0,8}", fullmatch=True), min_size=1).map(tuple),
)


@cases(200)
@given(value=TUPLES)
def test_a_tuple_comes_back(value):
    for text in (str(value), ",".join(map(str, value))):
        assert parse_tuple("--config.key", text, value) == value


@cases(300)
@given(
    default=st.sampled_from([("red", "green"), (1, 2), (1.0, 0.5), ()]),
    kind=st.sampled_from([None, int, str]),
    text=TEXT,
)
def test_any_text_is_a_tuple_or_reported(default, kind, text):
    try:
        value = parse_tuple("--config.key", text, default, kind)
    except UserError as error:
        assert str(error).startswith("--config.key=")
        return
    wanted = type(default[0]) if default else kind
    assert isinstance(value, tuple) and len({type(entry) for entry in value}) <= 1
    assert wanted is None or all(type(entry) is wanted for entry in value)
