"""Measure what a trained run generates, over captions that no stage was trained on.

    cfjax evaluate --config.run=runs/quickstart/dmd --workdir=runs/evaluation/dmd
    cfjax evaluate --config.run=toy_teacher --workdir=runs/evaluation/teacher

Decoded pixels are judged against the captioned factors by analysis and synthesis (cfjax/evaluation/shapes_metrics.py).
"""

from ml_collections import ConfigDict


def get_config():
    """`run`: a run directory or a shipped teacher; `clips`: how many; `kept`: how many videos are stored."""
    return ConfigDict({"run": "toy_teacher", "clips": 240, "kept": 8, "batch": 60, "seed": 11, "ema": True})
