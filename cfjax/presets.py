"""`cfjax.experiment.presets` under its old name, for configs of one's own that import it from here."""

from cfjax.experiment.presets import *  # noqa: F403
