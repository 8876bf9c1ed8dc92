"""Captions of clips that are played backwards, the conditioning of BAgger's corrective clips (arXiv 2512.12080)."""

from collections.abc import Callable, Sequence

import numpy as np

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.data.latents import Batch, ClipDataset, WrappedDataset

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def backwards(caption: str) -> str:
    """The toy's caption of the same clip played backwards: every direction is its opposite."""
    return " ".join(OPPOSITE.get(word, word) for word in caption.split(" "))


class ReversedText(WrappedDataset):
    """A `ClipDataset` whose records also hold "reversed_text_SE", the text rows of the clip played backwards.

    Args:
      rows: record -> those rows, float32 [S, E].
    """

    def __init__(self, dataset: ClipDataset, rows: Callable[[int], np.ndarray]) -> None:
        super().__init__(dataset)
        self._rows = rows

    def __getitem__(self, index: int) -> Batch:
        record = super().__getitem__(index)
        return {**record, "reversed_text_SE": self._rows(int(record["index"]))}  # a stand-in has its own caption


def encoded(dataset: ClipDataset, encode: Callable[[Sequence[str]], np.ndarray]) -> ReversedText:
    """For the toy: every caption with its directions reversed, encoded once."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(dataset.caption(i), len(numbers)) for i in range(len(dataset))])
    table = np.asarray(encode([backwards(caption) for caption in numbers]), np.float32)
    return ReversedText(dataset, lambda index: table[ids[index]])


def joined(dataset: ClipDataset, other: ClipDataset) -> ReversedText:
    """From a second dataset of prompts alone, record by record in the same order.

    Raises:
      UserError: the datasets differ in number or in the size of a caption's rows.
    """
    if (len(dataset), dataset.text_shape) != (len(other), other.text_shape):
        raise UserError(
            f"data.reversed_name: {other.path} holds {counted(len(other), 'caption')} of {other.text_shape} rows, "
            f"{dataset.path} {len(dataset)} of {dataset.text_shape}; make it of one caption per clip, in the clips' "
            "order"
        )
    return ReversedText(dataset, lambda index: other[index]["text_SE"])
