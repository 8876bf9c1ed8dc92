"""`cfjax bench`: what is measured of a stream, its record and table, a comparison, and mistakes in one line."""

import json

import jax
import numpy as np
import pytest

from cfjax import bench
from cfjax.__main__ import main
from cfjax.core.topology import peak_bandwidth
from cfjax.core.tree import named_leaves
from cfjax.experiment import speed, streams
from cfjax.experiment.speed import CallLog, NoDecoder, Speed, chip_rates, percentiles
from cfjax.experiment.streams import RandomParts, random_run
from cfjax.planning.stream_cost import Need
from cfjax.rollout.clips import Times
from tests.commands import ROOT, cfjax

SMALL = {"frames": 6, "height": 16, "width": 16, "text_rows": 4, "batches": 2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One command's folder and output, with its text encoder."""
    folder = tmp_path_factory.mktemp("bench")
    assert cfjax("bench", "bench.py", folder, text=True, batch=2, **SMALL) == 0
    return folder


def test_the_record_has_every_figure(measured):
    made = json.loads((measured / "bench.json").read_text())
    found = made["speed"]
    assert made["run"] == "random toy" and made["decoder"] == "toy" and made["text_encoder_s"] > 0
    assert made["video"] == {"frames": 6, "height": 16, "width": 16, "latent_frames": 6}
    assert found["frames"] == 12 and found["batches"] == 2
    assert found["cold_s"] > found["compile_s"] > 0 and found["cold_first_frame_s"] > found["first_frame_s"] > 0
    assert found["frames_per_second"] < found["frames_per_second_without_decoder"]
    for name in ("block_s", "block_network_s", "block_decoder_s"):
        assert 0 < found[name]["p50"] <= found[name]["p95"] <= found[name]["p99"]
    print(f"executed / needed: {found['executed_over_needed']:.3f}")
    assert found["needed"]["flops"] * 0.99 < found["executed_network"] < 2 * found["needed"]["flops"]
    assert found["executed_decoder"] == 2 * 6 * 4 * 2 * 192 * 16  # two 16 x 16 videos: 4 patches a frame
    assert 0 < found["share_of_roofline"] < 1 and found["peak_host_bytes"] > 0


def test_the_table_names_them(measured):
    text = (measured / "bench.md").read_text()
    rows = ("frames/s, decoder toy", "first frames, ms: cold", "network passes", "share of the roofline", "text: enc")
    for row in rows:
        assert row in text


def test_a_memory_policy_costs_what_it_sees(tmp_path):
    """Its name is in record and table; no key beyond those of its slots is needed."""
    memory = "infinity_rope(window=5)"
    assert cfjax("bench", "bench.py", tmp_path, memory=memory, **{**SMALL, "frames": 15, "batches": 1}) == 0
    made = json.loads((tmp_path / "bench.json").read_text())
    ratio = made["speed"]["executed_network"] / made["speed"]["needed"]["flops"]
    print(f"executed / needed: {ratio:.3f}")
    assert made["blocks"]["memory"] == memory and memory in (tmp_path / "bench.md").read_text()
    assert 0.97 < ratio < 1.10


def test_a_stream_without_decoder_hands_on_its_latents():
    latents, state = np.ones((1, 2, 4, 4, 3), np.float32), NoDecoder().init_state(1)
    video, state = jax.jit(lambda codec, x, s: codec.decode_step(x, s))(NoDecoder(), latents, state)
    np.testing.assert_array_equal(video, latents)
    assert state == ()


def test_rates_are_medians_of_warm_batches():
    warm = [Times(1.0, [1.0, 2.0], [0.5, 0.5], 2.5), Times(1.0, [2.0, 4.0], [0.5, 0.5], 3.5)]
    made = Speed(
        cold_s=9.0, cold_first_frame_s=8.0, compile_s=5.0, warm=warm, frames=60, network_calls=15, programs=5,
        executed_network=3e9, executed_decoder=0.0, needed=Need(2e9, 0.0), peak_flops=1e9, bandwidth=0.0,
        weight_bytes=1, kv_cache_bytes=1, temporary_bytes=1, peak_device_bytes=None, peak_host_bytes=1,
    ).record()  # fmt: skip
    assert made["frames_per_second"] == 60 / 6.5 and made["frames_per_second_without_decoder"] == 60 / 5.5
    assert made["first_frame_s"] == 3.0 and made["executed_over_needed"] == 1.5
    assert made["bound_s"] == 2.0 and made["share_of_roofline"] == 2.0 / 5.5
    assert made["block_s"] == percentiles([1.5, 2.5, 2.5, 4.5])


def test_calls_are_counted_by_shape_and_static_arguments():
    log, double = CallLog(), jax.jit(lambda x, *, times: x @ x * times, static_argnames="times")
    for size, times in ((2, 1), (2, 1), (3, 1), (2, 2)):
        log.note(double, (np.ones((size, size), np.float32),), {"times": times})
    assert sorted(log.times.values()) == [1, 1, 2] and log.flops() == {"network": 3 * 16 + 54, "decoder": 0.0}
    log.restart()
    assert log.flops()["network"] == 0.0


@pytest.mark.parametrize(("kind", "bytes_"), [("NVIDIA H200", 4800e9), ("NVIDIA H100 80GB HBM3", 3352e9), ("cpu", 0.0)])
def test_chips_have_a_bandwidth(kind, bytes_):
    assert peak_bandwidth(kind) == bytes_


def test_a_processor_s_roof_is_measured(monkeypatch):
    monkeypatch.setattr(speed, "MATRIX", 64)
    flops, bandwidth = chip_rates("float32")
    assert flops > 1e6 and bandwidth == 0.0


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_random_weights_are_stored_as_asked(storage):
    run = random_run(RandomParts("toy", storage=storage, text_rows=4), None)
    kernels = [x for name, x in named_leaves(run.model).items() if name.startswith("blocks/ffn/up/kernel")]
    assert str(kernels[0].dtype) == storage and len(kernels) == (2 if storage == "int8" else 1)
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.model))
    assert stored < {"float32": 5.1e6, "bfloat16": 2.9e6, "int8": 2.0e6}[storage]


def test_a_bidirectional_run_computes_what_it_needs(tmp_path):
    """Arithmetic and the program's count agree where nothing is cached."""
    assert cfjax("bench", "bench.py", tmp_path, run="toy_teacher", **(SMALL | {"batches": 1, "decoder": "none"})) == 0
    made = json.loads((tmp_path / "bench.json").read_text())
    assert made["run"] == "toy_teacher" and made["blocks"] is None and made["speed"]["network_calls"] == 100
    assert made["speed"]["executed_over_needed"] == pytest.approx(1.0, abs=1e-3)
    assert made["speed"]["executed_decoder"] == 0.0


def test_pytorch_takes_turns(monkeypatch):
    ones = lambda *_: (lambda: np.ones(3, np.float32), lambda: np.full(3, 1.5, np.float32))
    monkeypatch.setattr("cfjax.comparison.diffusers_speed.dit_calls", ones)
    monkeypatch.setattr("cfjax.comparison.diffusers_speed.vae_calls", ones)
    argv = [f"--config={ROOT}/configs/bench.py", *override(**SMALL)]
    c = bench.parse("bench", argv, description="", default_workdir="w")[0]
    opened = streams.open_stream(c)
    found = bench.against(c, opened.stream, {"against": "diffusers", "reference_dir": ""})
    case = found["cases"]["VAE decode"]
    assert case["error"] == pytest.approx(1 / 3) and len(case["seconds"]["ours"]) == 2
    assert case["ratio"]["min"] <= case["ratio"]["median"] <= case["ratio"]["max"]


def override(**keys: object) -> list[str]:
    return [f"--config.{name}={value}" for name, value in keys.items()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--against=reference"], "--against=reference needs --reference_dir=CLONE"),
        (["--against=reference", "--reference_dir=nowhere"], "--reference_dir=nowhere: no such folder"),
        (["--config.decoder=mpeg"], "--config.decoder='mpeg': use vae, tiny_vae, toy, none"),
        (["--config.preset=wan_2b"], "model.preset='wan_2b': use one of wan_1_3b"),
        (["--config.storage=int4"], "storage='int4': use float32, bfloat16 or int8"),
        (["--config.frames=5"], "frames=5"),
        (["--config.preset=wan_1_3b", "--config.decoder=toy"], "decoder=toy decodes the toy's latents"),
        (["--config.run=nowhere"], "run='nowhere': no such run directory"),
        (["--config.batches=0"], "--config.batches=0: use 1"),
    ],
)
def test_a_mistake_is_one_line(argv, message, tmp_path, capsys):
    assert main(["bench", f"--config={ROOT}/configs/bench.py", f"--workdir={tmp_path}", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
