"""Watch a stream of `cfjax serve` from the command line, and write it to an mp4 file.

    cfjax play --config.url=ws://127.0.0.1:8000 --config.prompt="a red circle moving left" --workdir=runs/play
    ... --config.prompt="a red circle moving left | a blue square moving up"    the prompt changes on the way

Writes video.mp4.
"""

from ml_collections import ConfigDict


def get_config():
    """Ten blocks of each prompt."""
    return ConfigDict(
        {
            "url": "ws://127.0.0.1:8000",
            "token": "",  # of the server, if it has one
            "prompt": "a red circle moving left",  # several, one after another: a | b
            "mode": "recache",  # how prompts change: recache, keep, cut (docs/memory.md)
            "seed": 0,
            "memory": "",  # one of the server's policies; "": its first
            "blocks": 10,  # of each prompt; those that are on their way when it changes come besides
            "scale": 8,
            "overwrite": False,  # replace a video that is there
        }
    )
