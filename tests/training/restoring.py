"""One process of two that save together, until one of them cannot read the newest checkpoint: restoring.py WORKDIR.

Each prints its number, the weights that `load_role` and `open_role` gave it, the step and the weights of
`restore_latest`, and what is left.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cfjax.core.distributed import initialize
from cfjax.training import checkpoint

STEPS = (1, 2)


def state(value: float) -> dict:
    """A vector of which each process holds half."""
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    return {"params": {"student": {"w": jax.make_array_from_callback((2,), rows, lambda _: np.full(1, value, "f4"))}}}


def value(tree: dict) -> float:
    return float(tree["w"].addressable_data(0)[0])


def main() -> None:
    initialize()
    store, probe = checkpoint.CheckpointStore(sys.argv[1], keep=3), checkpoint._probe
    for step in STEPS:
        store.save(step, state(step), {}, {"stage": "toy"})
        store.wait()

    def unreachable(folder: Path) -> None:
        if jax.process_index() == 1 and folder.name == str(STEPS[-1]):
            raise OSError("input/output error")
        probe(folder)

    checkpoint._probe = unreachable
    loaded = checkpoint.load_role(sys.argv[1], "student", state(0.0)["params"]["student"])
    (opened,) = checkpoint.open_role(sys.argv[1], "student", stages=("toy",), together=True).values()
    first = float(opened.read()[0])
    restored, _, meta = store.restore_latest(state(0.0), stage="toy")
    store.save(STEPS[-1], state(5.0), {}, {"stage": "toy"})  # its number is free again, for both
    store.wait()
    print(jax.process_index(), value(loaded), first, meta["step"], value(restored["params"]["student"]), store.steps())
    store.close()


if __name__ == "__main__":
    main()
