"""OpenCV, which only the measuring of videos needs (extra `eval`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cfjax.core.errors import UserError


def opencv() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError("OpenCV is missing, which measures videos; pip install -e '.[eval]' in the clone") from None
    return cv2


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, OpenCV's functions start no threads: clips are measured side by side."""
    cv2 = opencv()
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
