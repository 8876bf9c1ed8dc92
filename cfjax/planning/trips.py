"""How often that runs whose course only the data tell, by the named scope right around it: a loop, a conditional."""

import re
from collections.abc import Mapping

Trips = Mapping[str, float]  # scope -> mean runs of a loop's body, or of a conditional's dearer branch
_WORDS = re.compile(r"[/()]+")


def trips_of(stack: str, trips: Trips) -> float:
    """Runs of a loop by its name stack ("update/self_rollout/steps_before_exit"): the innermost known scope, else 1."""
    return next((trips[word] for word in reversed(_WORDS.split(stack)) if word in trips), 1.0)


def share_of(stack: str, trips: Trips) -> float:
    """How often a conditional takes its dearer branch, by the last scope of its name stack; always, if not known.

    Not by a scope further out, as that of a loop around it. XLA's stacks end with the operation itself.
    """
    words = [word for word in _WORDS.split(stack) if word not in ("", "cond")]
    return trips.get(words[-1], 1.0) if words else 1.0
