"""Exported models, shipped with the package or written by `cfjax export`: a folder, found by its name or its path."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
MODEL_FILE = "model.safetensors"
META_FILE = "model.json"


def asset(name: str, file: str) -> Path | None:
    """`file` of the exported model `name`: one that ships with the package, or a path; None if it is neither."""
    candidates = (ASSETS / name / file, Path(name) / file)
    return next((path for path in candidates if path.is_file()), None)
