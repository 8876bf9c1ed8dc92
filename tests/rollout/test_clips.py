"""The account of many batches: sums of all of them, lists of the newest."""

import numpy as np
import pytest

from cfjax.rollout.clips import Times, Timings


def test_timings_are_sums_of_all_batches_and_lists_of_the_newest(monkeypatch):
    monkeypatch.setattr(Timings, "BLOCKS", 9)
    monkeypatch.setattr(Timings, "BATCHES", 4)
    timings = Timings()
    for n in range(10):
        timings.add(Times(text=1.0, network=[n + 0.1, n + 0.2, n + 0.3], decode=[2.0, 3.0], first_frame=float(n)))
    record = timings.record(videos=19, pixel_frames=21, batch=2)
    network = sum(3 * n + 0.6 for n in range(10))
    assert record["network_seconds"] == pytest.approx(network) and record["decode_seconds"] == 50.0
    assert record["prompt_kv_seconds"] == 10.0 and record["videos"] == 19
    assert record["frames_per_second_without_decoder"] == pytest.approx(21 * 2 * 10 / network)
    assert record["frames_per_second_with_decoder"] == pytest.approx(21 * 2 * 10 / (network + 50))
    assert record["seconds_per_block"] == [9.1, 9.2, 9.3] and record["first_frame_seconds"] == [6.0, 7.0, 8.0, 9.0]
    newest = [n + d for n in (7, 8, 9) for d in (0.1, 0.2, 0.3)]
    assert record["block_seconds"]["p50"] == pytest.approx(np.median(newest))
