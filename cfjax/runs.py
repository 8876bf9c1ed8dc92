"""`cfjax.experiment.runs` under its old name, for scripts of one's own that import it from here."""

from cfjax.experiment.runs import *  # noqa: F403
