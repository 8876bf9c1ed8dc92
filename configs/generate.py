"""Generate videos from a trained run, streamed block by block where its sampler is few-step.

cfjax generate --config.prompt="a red circle moving left" --config.run=runs/quickstart/dmd --workdir=runs/videos
"""

from ml_collections import ConfigDict


def get_config():
    """`prompt`: one caption, or several separated by `|`; `run`: a run directory or a shipped teacher."""
    return ConfigDict(
        {
            "run": "runs/quickstart/dmd",
            "prompt": "a red circle moving left",
            "videos": 4,
            "seed": 0,
            "fps": 8,
            "scale": 8,
            "ema": True,
        }
    )
