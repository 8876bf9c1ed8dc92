"""One server for all tests that need no other: compiling takes longest."""

from collections.abc import Iterator

import pytest

from tests.serving.running import Running, running


@pytest.fixture(scope="package")
def server() -> Iterator[Running]:
    with running() as found:
        yield found
