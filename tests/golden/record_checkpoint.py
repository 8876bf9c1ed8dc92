"""Records a checkpoint of this JAX version, for tests/training/test_checkpoint.py to restore under every other.

python -m tests.golden.record_checkpoint
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.training.checkpoint import CheckpointStore
from cfjax.training.state import TrainState
from tests.training.toy import setup, two_roles

FOLDER = Path(__file__).parent / "checkpoints"
DATA, META = {"position": 3, "raw": b"\x00\xff"}, {"stage": "toy", "model": {"width": 4}}


def known() -> TrainState:
    """A state of two roles whose every number follows from its place, not from a random generator."""

    def leaf(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(3)
        return jnp.asarray((np.arange(x.size).reshape(x.shape) + 1) / 7, x.dtype)

    return jax.tree.map(leaf, setup(two_roles(), 0, 4)[0])


if __name__ == "__main__":
    store = CheckpointStore(FOLDER / f"jax_{jax.__version__}", keep=1)
    store.save(3, known(), DATA, META)
    store.close()
    for note in FOLDER.rglob("commit_success.txt"):  # without this machine's path
        note.write_text(note.read_text().replace(str(FOLDER), "checkpoints"))
