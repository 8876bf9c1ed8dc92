"""What a weight file holds: state dicts by name, none of their arrays read yet."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.core.schema import load_json

Arrays = dict[str, LazyArray]

SAFETENSORS, GGUF = ".safetensors", ".gguf"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"  # of shards, behind the suffix of their format


@dataclass(frozen=True)
class WeightFile:
    """The content of one file (or one set of shards).

    Attributes:
      path: the file, or the index of the shards.
      entries: state dicts by their key in the file; "" where the file is one state dict.
      ignored: what of the file is no state dict (step counts, optimizer states), for a message.
      about: what it is, where its name does not say so.
    """

    path: Path
    entries: dict[str, Arrays]
    ignored: list[str] = field(default_factory=list)
    about: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: it cannot be read or is something else.
    """
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def short(error: BaseException) -> str:
    """The text of another library's error, shortened to fit into a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:120]}..."


def listed(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
