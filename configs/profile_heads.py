"""Measure where every attention head looks, for memory policies that treat heads differently.

    cfjax profile_heads --config.run=runs/quickstart/dmd --workdir=runs/heads
    cfjax profile_heads --config.run=checkpoints/causal_forcing --config.prompts=prompts.txt --workdir=runs/heads
    cfjax generate --config.run=runs/quickstart/dmd --config.memory="forcing_kv(profile=runs/heads/heads.json)"
    cfjax generate --config.run=runs/quickstart/dmd --config.memory="pyramid(profile=runs/heads/labels.csv)"

Makes a video of every prompt (or takes the one that is given), denoises its last block at the sampler's levels, and
writes WORKDIR/heads.json: for every layer and head its mean attention to each key frame, the share of the last `recent`
key frames in what lies behind the first `sink`, and whether that is `threshold` or more (a static head).

WORKDIR/labels.csv says of the same measurement which heads are anchors, waves and veils, in Pyramid Forcing's format. A
head is a wave where one period has `periodicity` or more of the variation of its attention over the key frames that are
neither sink nor recent, else a veil where these have less than `between` times what uniform attention would give
them, else an anchor (cfjax/memory/profile.py). A period has to fit twice: with 12 latent frames those of 3 and
less are seen; give more --config.frames for longer ones.
"""

from ml_collections import ConfigDict


def get_config():
    """`run`: a run that generates block by block; `prompt`, several separated by |, or `prompts`, a file of them."""
    return ConfigDict(
        {
            "run": "runs/quickstart/dmd",
            "ema": True,
            "world": "",  # a Wan world's folder; "": beside the run
            "precision": "",
            "prompt": "a red circle moving left | a blue square moving up",
            "prompts": "",  # or a file: .txt, .csv, .jsonl ...
            "videos": 2,  # of each prompt
            "seed": 0,
            "latents": "",  # instead of making videos: a file, as cfjax generate --config.save_latents=True writes
            "frames": 0,  # pixel frames; 0: what the run was trained on
            "levels": 4,  # noise levels, of the sampler's
            "sink": 1,  # key frames that are not counted
            "recent": 4,  # key frames, the block's own included
            "threshold": 0.8,
            "periodicity": 0.5,
            "between": 0.5,
            "batch": 1,
        }
    )
