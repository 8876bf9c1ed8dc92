"""What a stream remembers: memory policies for long videos, and the storage of their keys and values.

slots.py        the state (a pytree of slots), what a block reads of it, what a commit leaves in it
policies.py     policies in which all heads see the same frames, each with its source
bank.py         one of them: frames that fit the prompt
compression.py  another: tokens that recent queries look at
heads.py        policies in which heads see different frames: static and dynamic, or dummies
pyramid.py      another: anchor, wave and veil heads
profile.py      tables of heads, and the attention that they are made from
codecs.py       keys and values in fewer bits
names.py        policies by name, for configs and command lines

A policy is a frozen dataclass in `Blocks.memory`. Without one, `models.cache` holds all frames or a window of them.
"""
