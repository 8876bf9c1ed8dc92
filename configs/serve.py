"""Serve live streams of a run that was trained here or converted, with a page to play with.

    cfjax serve --config.run=runs/quickstart/dmd
    cfjax serve --config=configs/serve.py:wan --config.run=checkpoints/causal_forcing
    ... --config.host=0.0.0.0 --config.token=SECRET         for others too (docs/serving.md)
    ... --config.port=0                                     a free port, which it says
    ... --config.memories="infinity_rope,ema_sink"          memory policies that clients can choose from

Programs are compiled, or read from the last start, before /healthz says ready.
"""

from ml_collections import ConfigDict

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`wan`: 16 frames per second, few caches per session; `toy` (the default): the moving-shapes world."""
    wan = "wan" in presets.switches(arg, "toy", "wan")
    return ConfigDict(
        {
            # the model
            "run": "checkpoints/causal_forcing" if wan else "runs/quickstart/dmd",
            "ema": True,  # averaged weights, when the run keeps them
            "world": "",  # a Wan world's folder; "": beside the run
            "decoder": "vae",  # or tiny_vae
            "decoder_precision": "",  # float32, bfloat16; "": as recorded
            "precision": "",  # of the network's matrix products: float32, bfloat16; "": the run's own
            "attention": "",  # auto, xla, cudnn; "": the run's own
            "text_cache": "",  # a folder of text embeddings
            # what clients can choose from; the first of each is the default
            "memories": ("infinity_rope",) if wan else ("longlive_infinity", "infinity_rope", "ema_sink", "deep_sink"),
            "prompts": (
                ("A cat surfs on a wave at sunset", "A dog surfs on a wave at night")
                if wan
                else ("a red circle moving left", "a blue square moving up", "a green triangle moving right")
            ),
            "fps": 16.0 if wan else 8.0,  # of the videos
            # where
            "host": "127.0.0.1",
            "port": 8000,  # 0: a free one
            "token": "",  # needed for any address that others can reach
            "origins": (),  # pages of other hosts that may connect, as https://example.com
            # how much
            "sessions": 4 if wan else 8,  # at a time
            "devices": 0 if wan else 1,  # that sessions are spread over, at most; 0: all; a CPU counts as so many
            "together": True,  # sessions go through a device together, up to eight
            "snapshots": 1 if wan else 16,  # of a session; each holds a cache on the device
            "seek_blocks": 1 if wan else 8,  # that a session can go back; each holds a cache
            "idle_seconds": 300.0,  # without a message
            "resume_seconds": 30.0,  # that a lost socket can come back
        }
    )
