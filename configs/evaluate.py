"""Measure what a trained run generates, over captions that no stage was trained on.

    cfjax evaluate --config.run=runs/quickstart/dmd --workdir=runs/evaluation/dmd
    cfjax evaluate --config.run=toy_teacher --workdir=runs/evaluation/teacher
    cfjax evaluate --config=configs/evaluate.py:table --workdir=runs/table      evaluations side by side

Decoded pixels are judged against the captioned factors by analysis and synthesis (cfjax/evaluation/shapes_metrics.py).
The table takes every folder of `evaluations` (a glob pattern) that holds an evaluation; folders of one name, such as
`runs/seed0/evaluation/dmd` and `runs/seed1/evaluation/dmd`, are seeds of one row: mean and standard deviation.
"""

from ml_collections import ConfigDict

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`table`. Keys: run, a run directory or a shipped teacher; clips, how many; kept, how many videos are stored."""
    table = "table" in presets.switches(arg, "table")
    return ConfigDict(
        {
            "run": "toy_teacher",
            "clips": 240,
            "kept": 8,
            "batch": 60,
            "seed": 11,
            "ema": True,
            "evaluations": "runs/quickstart/evaluation/*" if table else "",
        }
    )
