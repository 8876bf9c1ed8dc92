"""The record of a config's key."""

from typing import NamedTuple


class Key(NamedTuple):
    """What a key means.

    Attributes:
      pattern: a regular expression of its dotted name.
      text: one sentence.
      unit: of its numbers, or what kind of text it is.
      choices: the texts that it may be; () for any.
    """

    pattern: str
    text: str
    unit: str = ""
    choices: tuple[str, ...] = ()
