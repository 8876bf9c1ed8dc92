"""Ahead-of-time compilation of jitted functions before their first call, with the time that it took."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Programs:
    """Calls jitted functions; a first call with new shapes or static arguments compiles, which is timed separately.

    Args:
      told: called with a line before the first program is compiled.

    Attributes:
      seconds: spent tracing and compiling so far.
      temporary_bytes: of the program with the largest temporary buffers so far, 0 when the backend does not report it.
    """

    def __init__(self, told: Callable[[str], None] | None = None) -> None:
        self._told = told
        self.seconds = 0.0
        self.temporary_bytes = 0
        self._compiled: dict[Any, Any] = {}

    @property
    def count(self) -> int:
        """How many programs there are."""
        return len(self._compiled)

    def __call__(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """`function(*args, **static)`; `static` are its static arguments, by name."""
        leaves, treedef = jax.tree.flatten(args)
        shapes = tuple((jax.numpy.shape(leaf), jax.numpy.result_type(leaf)) for leaf in leaves)
        key = (function, treedef, shapes, tuple(sorted(static.items())))
        if key not in self._compiled:
            if self._told and not self._compiled:
                self._told("compiling the programs of the stream and its decoder, once ...")
            begun = time.perf_counter()
            self._compiled[key] = function.lower(*args, **static).compile()  # type: ignore[attr-defined]
            self.seconds += time.perf_counter() - begun
            memory = self._compiled[key].memory_analysis()
            self.temporary_bytes = max(self.temporary_bytes, getattr(memory, "temp_size_in_bytes", 0))
        return self._compiled[key](*args)
