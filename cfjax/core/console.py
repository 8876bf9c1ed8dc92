"""The one door to standard output; library code logs, verbs speak."""

import sys


def say(message: str = "") -> None:
    """Writes one line to standard output at once (progress bars live on standard error)."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()
