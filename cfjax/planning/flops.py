"""FLOPs of matrix products, counted on the program's jaxpr: XLA's own count takes a scan's body once and kernels as 0.

Counted is every `dot_general` as 2 B M N K, times the length of the scans around it; a loop whose length only its data
tell runs as often as the caller says, and so does a conditional's dearer branch (`trips`). A program is counted with
dense attention, which spends exactly the rectangles that its visibility asks for (a KV cache: all of its slots).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cfjax.planning.trips import Trips, share_of, trips_of


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


def count(jaxpr: Any, trips: Trips) -> float:
    """FLOPs of one run of a jaxpr. Of a conditional of unknown course the dearest branch counts."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, stack = equation.primitive.name, str(equation.source_info.name_stack)
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            parts = [count(inner, trips) for inner in _inner(equation)]
            if name == "cond":
                share = share_of(stack, trips)
                total += share * max(parts) + (1 - share) * min(parts)
                continue
            times = equation.params["length"] if name == "scan" else trips_of(stack, trips) if name == "while" else 1.0
            total += sum(parts) * times
    return total


def count_flops(fn: Callable[..., Any], *args: Any, trips: Trips | None = None) -> float:
    """FLOPs of one call on all devices together; arguments may be shapes."""
    return count(jax.make_jaxpr(fn)(*args).jaxpr, trips or {})
