"""Streams of forty blocks whose keys and values are stored in fewer bits."""

import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.memory.codecs import Codec
from cfjax.memory.policies import SlotRelative
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep
from cfjax.rollout.stored_error import StoredError, stored_errors
from cfjax.rollout.stream import Pipeline, seeded_noise
from tests.tiny import BATCH, SHAPE, text_kv, tiny

BLOCKS = 40
# The largest error of a block after the same past, and the mean of streams on their own past: twice what was measured.
BOUNDS = {"bf16": (6e-4, 5e-4), "int8": (1.3e-3, 9e-4), "fp8": (9e-3, 6e-3), "int4": (2.2e-2, 1.5e-2)}


def errors(names, blocks: int, batch: int = BATCH) -> dict[str, StoredError]:
    pipeline = Pipeline(tiny(), None, FewStep((1000,)), Blocks(1, memory=SlotRelative(5, 1)))
    noise = seeded_noise(np.arange(batch, dtype=np.uint32))
    codecs = [Codec(name) for name in names]
    return stored_errors(pipeline, text_kv(), noise, codecs, num_frames=blocks, latent_shape=SHAPE[2:], batch=batch)


@pytest.mark.slow
def test_errors_do_not_grow_with_the_stream():
    found = errors(BOUNDS, BLOCKS)
    for name, error in found.items():
        record = error.record()
        print(name, {key: f"{value:.1e}" for key, value in record.items()})
        same, own = BOUNDS[name]
        assert 0 < record["same_past_largest"] < same and record["own_past_mean"] < own
        assert record["same_past_last_quarter"] < 2 * error.same_past[5:15].mean()  # the window is full from block 4 on
        assert record["own_past_last_quarter"] < 3 * error.own_past[5:15].mean()
    means = [found[name].record()["same_past_mean"] for name in ("int8", "fp8", "int4")]
    assert means == sorted(means)


def test_the_same_codec_has_no_error():
    (error,) = errors(["none"], 3).values()
    np.testing.assert_array_equal(error.own_past, np.zeros(3))
    assert error.same_past.max() < 1e-6
    with pytest.raises(UserError, match="need a few-step sampler and a memory policy"):
        stored_errors(
            Pipeline(tiny(), None, FewStep(), Blocks(1)), text_kv(), None, [], num_frames=1, latent_shape=SHAPE[2:]
        )
