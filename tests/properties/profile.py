"""How many cases a property is tried on: the same ones each time, nothing kept in the checkout, no clock."""

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.commands import ROOT

set_hypothesis_home_dir(ROOT / ".cache" / "hypothesis")


def cases(count: int) -> Callable:
    """A decorator of tests: so many cases, and the first that fails is shown as it is."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
