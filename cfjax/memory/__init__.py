"""What a stream remembers: memory policies for long videos, and the storage of their keys and values.

slots.py     the state (a pytree of slots), what a block reads of it, what a commit leaves in it
policies.py  the policies, each with its source
bank.py      one of them: frames that fit the prompt
codecs.py    keys and values in fewer bits
names.py     policies by name, for configs and command lines

A policy is a frozen dataclass in `Blocks.memory`. Without one, `models.cache` holds all frames or a window of them.
"""
