"""`cfjax.worlds.toy` under its old name, for scripts of one's own that import it from here."""

from cfjax.worlds.assets import *  # noqa: F403
from cfjax.worlds.toy import (  # noqa: F401
    SplitSource,
    evaluation_clips,
    held_out_captions,
    is_held_out,
    make_world,
    shipped_world,
    stack_videos,
)
from cfjax.worlds.toy import ToyWorld as World  # noqa: F401
from cfjax.worlds.toy import open_toy_world as open_world  # noqa: F401
