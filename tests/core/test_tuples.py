"""Tuples as one types them: every usual spelling is read, what could mean two things is refused with the right one."""

import pytest

from cfjax.core.errors import UserError
from cfjax.core.tuples import parse_tuple

WORDS, INTS, FLOATS = ("red", "green"), (1, 2), (1.0, 0.5)


@pytest.mark.parametrize(
    ("default", "text", "expected"),
    [
        (WORDS, "blue", ("blue",)),
        (WORDS, "blue,red", ("blue", "red")),
        (WORDS, " blue , red ", ("blue", "red")),
        (WORDS, "blue,", ("blue",)),
        (WORDS, "(blue,red)", ("blue", "red")),
        (WORDS, "[blue, red]", ("blue", "red")),
        (WORDS, "'blue'", ("blue",)),
        (WORDS, "'blue','red'", ("blue", "red")),
        (WORDS, '("blue", "red",)', ("blue", "red")),
        (WORDS, "('a, b', 'it\\'s')", ("a, b", "it's")),
        (WORDS, "('a, b',)", ("a, b",)),
        (WORDS, "2step,a-b,x/y.z", ("2step", "a-b", "x/y.z")),
        (WORDS, "'1','None'", ("1", "None")),
        (WORDS, "\u7ea2,\u7eff", ("\u7ea2", "\u7eff")),
        (WORDS, "()", ()),
        (WORDS, "[ ]", ()),
        (INTS, "3", (3,)),
        (INTS, "(3)", (3,)),
        (INTS, "(3,)", (3,)),
        (INTS, "3, -4,1_000", (3, -4, 1000)),
        (FLOATS, "1,2e-3", (1.0, 0.002)),
        (((1, 2),), "((3, 4), (5, 6))", ((3, 4), (5, 6))),
        ((True,), "False,True", (False, True)),
        ((), "a,b", ("a", "b")),
        ((), "1,2", (1, 2)),
        ((), "1,0.5", (1.0, 0.5)),
        (("a red circle", "b"), "a blue square, c", ("a blue square", "c")),
    ],
)
def test_spellings(default, text, expected):
    value = parse_tuple("--config.x", text, default)
    assert value == expected and list(map(type, value)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("default", "text", "write"),
    [
        (WORDS, "blue red", "blue,red"),
        (WORDS, "blue;red", "blue,red"),
        (WORDS, "blue\uff0cred", "blue,red"),
        (WORDS, "blue\u3001red", "blue,red"),
        (WORDS, "blue\u3000red", "blue,red"),
        (WORDS, "'blue,red'", "blue,red"),
        (WORDS, "('blue,red')", "blue,red"),
        (WORDS, "{'blue','red'}", "blue,red"),  # a set, whose order is nobody's
        (WORDS, "(blue,red", "blue,red"),
        (WORDS, "((blue),red)", "blue,red"),
        (WORDS, "blue,,red", "blue,red"),
        (WORDS, ",blue", "blue"),
        (WORDS, "'blue,red", "blue,red"),
        (WORDS, "", "red,green"),
        (WORDS, ",", "red,green"),
        (WORDS, "1,2", "red,green"),
        (WORDS, "None", "red,green"),
        (INTS, "3 4", "3,4"),
        (INTS, "3;4", "3,4"),
        (INTS, "'3','4'", "3,4"),
        (INTS, "1e3", "1,2"),
        (INTS, "3.0", "1,2"),
        (INTS, "True", "1,2"),
        (INTS, "a", "1,2"),
        (FLOATS, "nan", "1.0,0.5"),
        (FLOATS, "1e999,1", "1.0,0.5"),
        ((), "-1e999", r"A,B, or \(\) for none"),
        (((1, 2),), "3,4", r"\(\(1,2\),\)"),
        ((), "", r"A,B, or \(\) for none"),
        ((), "1,a", r"A,B, or \(\) for none"),
        ((), "None", r"A,B, or \(\) for none"),
    ],
)
def test_what_is_refused_is_reported_with_the_right_spelling(default, text, write):
    with pytest.raises(UserError, match=rf"--config\.x=.*: needs a value of type tuple.*; write --config\.x={write}$"):
        parse_tuple("--config.x", text, default)


def test_an_empty_default_may_have_a_kind():
    assert parse_tuple("--config.seeds", "3,4", (), int) == (3, 4)
    for text in ("a,b", "1.5", "True"):
        with pytest.raises(UserError, match=r"is not of type int; write --config\.seeds=1,2, or \(\) for none"):
            parse_tuple("--config.seeds", text, (), int)
