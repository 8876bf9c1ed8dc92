"""Detection of diverging losses, whose weights are no state to resume from even if every number is finite.

The bound of a role is relative to the median of the absolute losses of its last `WINDOW` updates. The median, as
one odd batch does not move it; absolute, as a generator's loss may be negative; a running one, as a stage-3 loss that
begins near nothing (both scores are one network) may grow as far as it likes within its first hundreds of updates. The
median counts as `FLOOR` at least: latents and noise have unit variance, so a loss below a thousand times that, which is
1, is an ordinary error, however small the losses before it were (a GAN's or SiD's cross zero).

Losses beyond the bound do not enter the median, and a role counts as recovered after `CALM` updates within it.
"""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

WINDOW, ENOUGH, CALM, FLOOR = 101, 20, 8, 1e-3


class LossWatch:
    """Remembers the losses of every role.

    Args:
      factor: how many times its running median a loss may be; 0 is any number.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._past: dict[str, deque[float]] = {}
        self._left: dict[str, int] = {}  # updates until a role that exceeded its bound has recovered
        self._what: dict[str, str] = {}

    def add(self, step: int, role: str, loss: float) -> None:
        """Records the finite loss of a role's update at iteration `step`."""
        past = self._past.setdefault(role, deque(maxlen=WINDOW))
        middle = median(past) if len(past) >= ENOUGH else float("inf")
        if self._factor and abs(loss) > self._factor * max(middle, FLOOR):
            self._what[role] = (
                f"the loss of role {role!r} was {loss:.4g} at step {step}, its running median {middle:.4g}"
            )
            self._left[role] = CALM
            return
        past.append(abs(loss))
        self._left[role] = max(0, self._left.get(role, 0) - 1)

    def grown(self) -> str:
        """The message about a loss that exceeded its bound and has not recovered; "" if there is none."""
        return next((self._what[role] for role, left in self._left.items() if left), "")

    def get_state(self) -> dict[str, list[float]]:
        """The recent losses, for the checkpoint: a resumed run then behaves as the uninterrupted one."""
        return {role: list(past) for role, past in self._past.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_state` returned."""
        self._past = {role: deque(past, maxlen=WINDOW) for role, past in state.items()}
