"""`cfjax.worlds.wan` under its old name, for scripts of one's own that import it from here."""

from cfjax.worlds.open import *  # noqa: F403
from cfjax.worlds.records import *  # noqa: F403
from cfjax.worlds.wan import *  # noqa: F403
