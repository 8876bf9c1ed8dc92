"""Expected trip counts of loops and frequencies of branches that depend on data, by the enclosing named scope."""

import re
from collections.abc import Mapping

# Named scope -> mean trip count of a loop, or frequency of a conditional's costliest branch (others share the rest).
TripCounts = Mapping[str, float]
_WORDS = re.compile(r"[/()]+")


def loop_trip_count(stack: str, trip_counts: TripCounts) -> float:
    """A loop's trip count, by the innermost known scope of its name stack ("update/rollout/before_exit"); else 1."""
    return next((trip_counts[word] for word in reversed(_WORDS.split(stack)) if word in trip_counts), 1.0)


def branch_frequency(stack: str, trip_counts: TripCounts) -> float:
    """How often a conditional takes its costliest branch, by the last scope of its name stack; 1 if that is unknown.

    Outer scopes, such as that of a loop around it, do not count. XLA's name stacks end with the operation itself.
    """
    words = [word for word in _WORDS.split(stack) if word not in ("", "cond")]
    return trip_counts.get(words[-1], 1.0) if words else 1.0
