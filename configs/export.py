"""Write a run's averaged weights as a self-contained folder: bf16 safetensors, its world, its record and curves.

The toy teacher that ships with the package was written by

    cfjax export --config.run=runs/teacher --workdir=cfjax/assets/toy_teacher
"""

from ml_collections import ConfigDict


def get_config():
    """`run`: the run directory; `clips`: videos for the recorded evaluation; `note`: free text (machine, duration)."""
    return ConfigDict({"run": "runs/teacher", "clips": 480, "note": ""})
