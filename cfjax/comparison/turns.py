"""Two implementations' calls in turn, so that what disturbs the machine disturbs both."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round; the order is turned around from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def round_ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """slow / fast of each round: median, least, greatest."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}
