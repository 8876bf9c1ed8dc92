"""One process of a run of several: `cfjax` on a toy made tiny, one CPU device per process by default.

process.py VERB ...    with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, as a launcher sets them,
                       TEST_PAUSE (seconds before every batch) and TEST_HANG (the process that stops at batch 5).
                       Tells the records of every batch that it reads.
"""

import os
import sys
import time
from typing import Any

import cfjax.models.wan as wan
from cfjax.__main__ import main
from cfjax.data.latents import LatentIterator

TINY: dict[str, Any] = {"dim": 32, "ffn_dim": 32, "num_heads": 4, "num_layers": 1, "freq_dim": 16}
_next = LatentIterator.__next__
_batches = 0


def slowed(iterator: LatentIterator) -> Any:
    """The next batch, later or never."""
    global _batches
    _batches += 1
    hangs = os.environ.get("TEST_HANG") == os.environ.get("JAX_PROCESS_ID", "0") and _batches == 5
    time.sleep(3600 if hangs else float(os.environ.get("TEST_PAUSE", "0")))
    batch = _next(iterator)
    print("records", *batch["index_B"].tolist(), flush=True)
    return batch


if __name__ == "__main__":
    wan.PRESETS["toy"] = wan.WanConfig(**TINY)
    LatentIterator.__next__ = slowed  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
