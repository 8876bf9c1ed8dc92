"""Loops whose length only their data tell: how often they run is known by the named scope right around each."""

import re
from collections.abc import Mapping

Trips = Mapping[str, float]  # scope -> runs of the loop's body
_WORDS = re.compile(r"[/()]+")


def trips_of(stack: str, trips: Trips) -> float:
    """Runs of a loop by its name stack ("update/self_rollout/steps_before_exit"): the innermost known scope, else 1."""
    return next((trips[word] for word in reversed(_WORDS.split(stack)) if word in trips), 1.0)
