"""FLOPs of matrix products, counted on the program's jaxpr: XLA's own count takes a scan's body once and kernels as 0.

Counted is every `dot_general` as 2 B M N K, times the length of the scans around it; the trip count of a loop that
depends on data is the caller's, and so is the frequency of a conditional's costlier branch (`trip_counts`). A program
is counted with dense attention, which computes exactly the rectangles of its visibility.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cfjax.planning.trip_counts import TripCounts, branch_frequency, loop_trip_count


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation holds."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns"):
                yield one
            elif hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                yield one.jaxpr


def _dot(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contract)


def _convolution(equation: Any) -> float:
    """Every output takes one product per kernel element of its own output channel."""
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_channels


def count(jaxpr: Any, trip_counts: TripCounts) -> float:
    """FLOPs of one run of a jaxpr. A conditional of unknown frequency counts as its costliest branch."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, stack = equation.primitive.name, str(equation.source_info.name_stack)
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            parts = [count(inner, trip_counts) for inner in _inner(equation)]
            if name == "cond":
                share = branch_frequency(stack, trip_counts)
                *others, most = sorted(parts)
                total += share * most + (1 - share) * sum(others) / max(len(others), 1)
                continue
            times = (
                equation.params["length"]
                if name == "scan"
                else loop_trip_count(stack, trip_counts)
                if name == "while"
                else 1.0
            )
            total += sum(parts) * times
    return total


def count_flops(fn: Callable[..., Any], *args: Any, trip_counts: TripCounts | None = None) -> float:
    """FLOPs of one call on all devices together; arguments may be shapes."""
    return count(jax.make_jaxpr(fn)(*args).jaxpr, trip_counts or {})
