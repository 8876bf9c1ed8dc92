"""Iterator states and meta records as plain JSON, and back."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json(value: Any) -> Any:
    """Iterator states and meta as plain JSON; bytes as base64."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value


def from_json(value: Any) -> Any:
    """Inverse of `to_json`, with lists in place of tuples."""
    if isinstance(value, dict):
        if value.keys() == {"__bytes__"}:
            return base64.b64decode(value["__bytes__"])
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value
