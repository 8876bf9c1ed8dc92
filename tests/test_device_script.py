"""benchmarks/device.sh and benchmarks/block_costs.py: every case at tiny scale, what it records, what it survives."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from cfjax.models.wan import WanConfig
from tests.commands import ROOT
from tests.quick import QUICK

TINY = WanConfig(32, 64, 2, 3, text_dim=16, freq_dim=16)


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts' folder, importable."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(f"{ROOT}/benchmarks")]:
        del sys.modules[name]


def start(out: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """device.sh with this Python, on one CPU device."""
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, **variables}
    command = ["bash", str(ROOT / "benchmarks" / "device.sh"), "--scale=tiny", f"--out={out}", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def record(out: Path) -> dict:
    return json.loads((out / "device.json").read_text())


def check_stream(result: dict, blocks: int) -> None:
    assert result["frames_per_second"] > 0 and result["first_frame_s"] > 0
    assert len(result["network_s"]) == len(result["decoder_s"]) == blocks
    assert result["network"]["tflops"] > 0 and result["network"]["of_peak"] is None  # a CPU's peak is not known


def test_streams_decoders_and_caches_are_measured(tmp_path):
    ran = start(tmp_path, "--minutes=60", "--only=machine,streams,vae,caches and weights")
    assert ran.returncode == 0, ran.stderr[-3000:]
    known = record(tmp_path)
    assert {name: case["status"] for name, case in known["cases"].items() if case["status"] != "measured"} == {
        "fp8 weights": "skipped"
    }
    cases = {name: case["result"] for name, case in known["cases"].items() if case["status"] == "measured"}
    for name in ("Wan VAE", "tiny decoder", "tiny decoder, int8 weights", "tiny decoder, sink"):
        check_stream(cases[f"chunk-wise, 4 steps, {name}"], 2)
    slowest = cases["chunk-wise, 4 steps, Wan VAE"]["kernels"]["slowest"]
    assert len(slowest) == 3 and slowest[0]["ms"] >= slowest[1]["ms"] > 0 and 0 < slowest[0]["share"] <= 1
    assert all(program["done"] and program["compile_s"] > 0 for program in known["programs"])
    assert {goal["what"] for goal in known["goals"]} >= {"frames_per_second", "first_frame_s", "network.of_peak"}
    assert "goal > 17" in ran.stdout and "goal > 35" in ran.stdout


@pytest.mark.slow
def test_every_case_is_measured(tmp_path):
    """The whole script, as it would run on a GPU."""
    ran = start(tmp_path, "--minutes=60")
    assert ran.returncode == 0, ran.stderr[-3000:]
    cases = record(tmp_path)["cases"]
    assert [name for name, case in cases.items() if case["status"] != "measured"] == ["fp8 weights"]
    for name in ("attention", "network"):
        print(name, cases[name]["result"])
        assert cases[name]["result"]["right"]
    stage_1 = cases["stage 1 step, teacher forcing, 1 clip"]["result"]["student"]
    dmd = cases["DMD step, real score in int8, 1 clip"]["result"]
    for row in (stage_1, dmd["student"], dmd["critic"]):
        assert row["finite"] and row["tflops"] > 0 and row["kernels"]["slowest"]
    assert dmd["student"]["exit_step"] in range(4)


def test_too_little_time_is_recorded_and_an_interrupted_case_is_not_tried_again(tmp_path, benchmarks):
    import device
    from device_cases import Case, Context, nothing
    from device_parts import SCALES, Ahead

    file = tmp_path / "device.json"
    file.write_text(json.dumps({"cases": {"first": {"section": "machine", "status": "begun"}}}))
    found = device.Record(file, time.time(), 60.0, {"scale": "tiny"})
    found.resume()
    cases = [Case("machine", name, 0, nothing, lambda context: {"x": 1.0}) for name in ("first", "second")]
    device.run(found, Context(SCALES["tiny"], Ahead(1)), cases)
    known = record(tmp_path)["cases"]
    assert known["first"] == {"section": "machine", "status": "failed", "problem": "the process ended in this case"}
    assert known["second"]["status"] == "skipped" and "no time" in known["second"]["problem"]


def test_a_missing_package_is_named_in_a_line(tmp_path):
    blind = tmp_path / "python"
    blind.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without installed packages, pip too
    blind.chmod(0o755)
    ran = start(tmp_path, PYTHON=str(blind))
    assert ran.returncode == 2 and "missing here:" in ran.stderr and "--download" in ran.stderr


def test_a_process_that_dies_is_followed_by_one_that_resumes(tmp_path):
    calls, dying = tmp_path / "calls", tmp_path / "python"
    run = f'echo "$@" >>{calls}; [ "$(wc -l <{calls})" -gt 1 ] || kill -SEGV $$'
    dying.write_text(f'#!/bin/sh\ncase "$1" in benchmarks/*) {run} ;; *) exec {sys.executable} "$@" ;; esac\n')
    dying.chmod(0o755)
    ran = start(tmp_path, "--minutes=5", PYTHON=str(dying))
    assert ran.returncode == 0 and "ended with exit code 139" in ran.stderr, ran.stderr
    first, second = calls.read_text().splitlines()
    assert second == f"{first} --resume" and "--ends=" in first and f"--out={tmp_path}" in first


def test_unknown_sections_are_refused(tmp_path):
    ran = start(tmp_path, "--only=stream")
    assert ran.returncode == 2 and "--only=stream: sections are machine" in ran.stderr


def test_a_failure_costs_its_case_alone(tmp_path, benchmarks):
    import device
    from device_cases import Case, Context, nothing
    from device_parts import SCALES, Ahead

    def broken(context):
        raise RuntimeError("out of memory")

    found = device.Record(tmp_path / "device.json", time.time() + 60, 60.0, {"scale": "tiny"})
    cases = [
        Case("machine", "broken", 0, broken, broken),
        Case("machine", "fine", 0, nothing, lambda context: {"x": 1.0}),
    ]
    device.run(found, Context(SCALES["tiny"], Ahead(1)), cases)
    known = record(tmp_path)["cases"]
    assert known["broken"]["status"] == "failed" and "RuntimeError: out of memory" in known["broken"]["problem"]
    assert "broken(context)" in known["broken"]["trace"] or "raise RuntimeError" in known["broken"]["trace"]
    assert "out of memory" in known["broken"]["while_compiling"]
    assert known["fine"]["result"] == {"x": 1.0}


def test_random_weights_are_stored_as_asked_and_spread_like_xaviers(benchmarks):
    from device_parts import hashed_uniform, random_like

    from cfjax.core.quantize import dequantize
    from cfjax.models.wan import Wan
    from cfjax.models.weight_storage import with_storage_dtypes

    template = jax.eval_shape(lambda key: Wan(replace(TINY, dim=128, ffn_dim=256), key), jax.random.key(0))
    model = jax.jit(lambda: random_like(with_storage_dtypes(template, "int8", "bfloat16")))()
    up = model.blocks.ffn.up.kernel.get_value()
    assert up.int8.dtype == np.int8 and np.abs(np.asarray(up.int8)).max() == 127
    expected = (2 / (128 + 256)) ** 0.5
    assert np.std(dequantize(up)) == pytest.approx(expected, rel=0.02)
    x = np.asarray(hashed_uniform((2, 50_000), 7))
    correlation = np.corrcoef(x[0], x[1])[0, 1]
    print(f"variance {x.var():.4f}, correlation of halves {correlation:.4f}")
    assert x.var() == pytest.approx(1, rel=0.02) and abs(correlation) < 0.02


def test_the_arithmetic_counts_what_the_program_holds(benchmarks):
    from block_costs import counted_flops, sizes_of

    from cfjax.planning.stream_cost import Pass, pass_flops

    frames, latent, rows = 6, (4, 6), 8
    tokens = frames * TINY.tokens_per_frame(*latent)
    needed = pass_flops(sizes_of(TINY), Pass(frames, tokens, tokens), rows)
    assert counted_flops(TINY, frames, latent, rows) == pytest.approx(needed, rel=1e-9)


def test_block_costs_on_the_page_are_those_of_the_record(benchmarks):
    from block_costs import DECODERS, MODES, TEXT_ROWS, decoder_flops, row_of, tables

    from cfjax.models.wan import PRESETS

    results = ROOT / "benchmarks" / "results"
    known = json.loads((results / "block_costs.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert all(table in page for table in tables(known["rows"]).split("\n\n"))
    framewise = next(row["chips"] for row in known["rows"] if row["mode"] == "frame-wise, 4 steps")
    shares = [f"{framewise[chip]['memory_over_compute']:.2f}" for chip in ("h100", "v6e")]
    assert "{} of the computing's time on an H100 and {} on a v6e".format(*shares) in " ".join(page.split())
    decoders = decoder_flops(results / "decoders.json")
    again = [row_of(mode, PRESETS["wan_1_3b"], decoders) for mode in MODES]
    assert json.loads(json.dumps(again)) == known["rows"] and set(decoders) == set(DECODERS) and TEXT_ROWS == 512


def test_the_libraries_figures_on_the_page_are_those_of_the_record():
    known = json.loads((ROOT / "benchmarks" / "results" / "libraries.json").read_text())
    cpu = {row["name"]: row for row in known["rows"] if row["where"] == "cpu" and row["dtype"] == "bfloat16"}
    tpu = {row["name"]: row for row in known["rows"] if row["where"] != "cpu"}
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert "qwix {qwix}, tokamax {tokamax}".format(**known["libraries"]) in page
    theirs, ours, plain = (cpu[name] for name in ("qwix int8 weights", "cfjax int8 weights", "plain"))
    assert (
        plain["of_plain"] == 1 and f"{theirs['error']:.1e} from the exact product against {ours['error']:.1e}" in page
    )
    assert f"{theirs['of_plain']:.2f} and {ours['of_plain']:.2f} of the plain product's time" in page
    both, fp8 = "qwix int8 weights and activations", cpu["qwix fp8 weights"]
    assert f"{fp8['error'] / theirs['error']:.1f} times the error ({fp8['error']:.1e})" in page
    assert f"{cpu[both]['of_plain']:.2f} of the time on a CPU, at {cpu[both]['error']:.1e}" in page
    assert f"{tpu[both]['mb']:.0f} MB and {tpu[both]['us']:.0f} us" in page
    kinds = ("JAX's splash", "tokamax's splash", "tokamax's splash, 3 partial sums")
    memory = [f"{tpu[f'{kind}, with gradients']['temp_mib']:.0f}" for kind in kinds]
    assert "{} MiB with JAX's kernels as cfjax calls them, {} with tokamax's, and {} when".format(*memory) in page
