"""`cfjax bench`: how fast a run, or random weights of a preset's sizes, streams videos; beside PyTorch, if asked."""

import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cfjax.core.cli import Flag, parse
from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import write_atomically
from cfjax.core.precision import Policy, to_record
from cfjax.experiment.speed import Stream, measure_stream
from cfjax.experiment.streams import Opened, open_stream
from cfjax.memory.names import blocks_record
from cfjax.models.vae import published_vae
from cfjax.rollout.generate import FewStep

DESCRIPTION = """Streams videos cold and warm and prints a table: frames/s with and without the decoder, time to the
first frames, percentiles of a block, network passes, FLOPs executed and needed, share of the roofline, memory. Writes
WORKDIR/bench.json and bench.md. With --against, the same work is also done by PyTorch on this machine's CPU, in turn
with cfjax: by the reference a few-step video without decoder, by diffusers a pass over all frames and the VAE."""
FLAGS = (
    Flag("against", "time PyTorch beside it, with random weights", choices=("diffusers", "reference")),
    Flag("reference_dir", "with --against=reference: your clone of Causal-Forcing or Self-Forcing", default=""),
)
NEEDS = {"diffusers": ("torch", "diffusers", "transformers"), "reference": ("torch", "diffusers")}
MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Parses the command line, measures, prints the table."""
    c, workdir, flags = parse(
        "bench",
        argv,
        description=DESCRIPTION,
        extra_flags=FLAGS,
        default_config="configs/bench.py",
        default_workdir="runs/bench",
    )
    check_against(flags["against"], flags["reference_dir"])
    opened = open_stream(c)
    with holding(workdir):
        record = measure(c, opened)
        if flags["against"]:
            record["against"] = {"name": flags["against"], **against(c, opened.stream, flags)}
        text = table(record)
        write_atomically(workdir / "bench.json", json.dumps({"command": ["cfjax", "bench", *argv], **record}, indent=1))
        write_atomically(workdir / "bench.md", text + "\n")
    say(text)
    say(f"{workdir}/bench.json")
    return 0


def measure(c: ConfigDict, opened: Opened) -> dict[str, Any]:
    """Everything that is recorded, but for a comparison."""
    stream, device = opened.stream, jax.devices()[0]
    pipeline, sizes = stream.pipeline, stream.sizes
    frames, height, width = sizes.pixels()
    return {
        "jax": jax.__version__,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": 1},
        "run": opened.name,
        "network": to_record(pipeline.model.config),
        "decoder": opened.decoder,
        "sampler": {"kind": type(pipeline.sampler).__name__, **vars(pipeline.sampler)},
        "blocks": blocks_record(pipeline.blocks) if pipeline.blocks else None,
        "video": {"frames": frames, "height": height, "width": width, "latent_frames": sizes.frames},
        "batch": stream.batch,
        "text_rows": int(stream.text_BSE.shape[1]),
        "speed": measure_stream(stream, batches=c.batches, seed=c.seed).record(),
        "text_encoder_s": seconds_of(opened.encode_prompt, c.batches) if opened.encode_prompt else None,
        "config": c.to_dict(),
    }


def seconds_of(call: Callable[[], Any], times: int) -> float:
    """Median seconds of a call, after a first one."""
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---- beside PyTorch


def check_against(name: str | None, reference_dir: str) -> None:
    """Raises UserError where the other side is not there.

    Raises:
      UserError: its packages or its clone are missing.
    """
    if name is None:
        return
    if missing := [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]:
        raise UserError(f"--against={name} needs {', '.join(missing)}: pip install -e '.[compare]' in the clone")
    if name == "reference":
        if not reference_dir:
            raise UserError(
                "--against=reference needs --reference_dir=CLONE, the folder of your clone of Causal-Forcing"
            )
        from cfjax.comparison.reference import check_clone

        check_clone(reference_dir)


def against(c: ConfigDict, stream: Stream, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Per case: seconds of every round of both sides, the ratio theirs / ours, the error of the first results.

    Raises:
      UserError: the reference has no such sampler or batch.
    """
    import torch

    threads = torch.get_num_threads()
    make = _against_reference if flags["against"] == "reference" else _against_diffusers
    return {"threads": threads, "cases": make(c, stream, flags["reference_dir"])}


def _against_reference(c: ConfigDict, stream: Stream, reference_dir: str) -> dict[str, Any]:
    from cfjax.comparison.reference import open_reference
    from cfjax.comparison.reference_speed import STEP_LISTS, Work, our_stream, their_stream

    pipeline, sizes = stream.pipeline, stream.sizes
    sampler, blocks = pipeline.sampler, pipeline.blocks
    steps = {steps: count for count, steps in STEP_LISTS.items()}
    if not isinstance(sampler, FewStep) or blocks is None or sampler.steps not in steps or sampler.first_steps:
        known = "; ".join(",".join(map(str, listed)) for listed in steps)
        raise UserError(f"--against=reference compares few-step samplers; use --config.sampler.steps of {known}")
    if blocks.memory is not None:
        raise UserError("--against=reference has no memory policies: use --config.window and --config.sink")
    if stream.batch != 1:
        raise UserError(f"--config.batch={stream.batch}: --against=reference compares one video at a time; use 1")
    config = pipeline.model.config
    work = Work(
        replace(config, remat="none"),
        frames=sizes.frames,
        height=sizes.height,
        width=sizes.width,
        blocks=blocks,
        steps=steps[sampler.steps],
        text_rows=stream.text_BSE.shape[1],
        seed=c.seed,
    )
    dtype = config.precision.compute
    with open_reference(reference_dir) as reference:
        sides = {"ours": our_stream(work, dtype), "theirs": their_stream(reference, work, dtype)}
        calls = {name: lambda side=side: side.arrays(side.run())[""] for name, side in sides.items()}
        return {"stream": _in_turn(calls, c.batches)}


def _against_diffusers(c: ConfigDict, stream: Stream, _: str) -> dict[str, Any]:
    from cfjax.comparison.diffusers_speed import dit_calls, vae_calls

    model, sizes = stream.pipeline.model.config, stream.sizes
    shape = (stream.batch, sizes.frames, sizes.height, sizes.width, model.in_dim)
    codec = replace(published_vae(model.in_dim), precision=Policy(c.decoder_precision or model.precision.compute))
    cases = {
        "network pass, all frames": dit_calls(model, shape, stream.text_BSE.shape[1], c.seed),
        "VAE decode": vae_calls(codec, (*shape[:-1], codec.z_dim), c.seed),
    }
    return {
        name: _in_turn(dict(zip(("ours", "theirs"), calls, strict=True)), c.batches) for name, calls in cases.items()
    }


def _in_turn(calls: Mapping[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, Any]:
    from cfjax.comparison.report import relative_error
    from cfjax.comparison.turns import round_ratios, take_turns

    first = {name: call() for name, call in calls.items()}
    seconds = take_turns(calls, rounds)
    return {
        "seconds": seconds,
        "error": relative_error(first["ours"], first["theirs"]),
        "ratio": round_ratios(seconds["theirs"], seconds["ours"]),
    }


# ---- the table


def table(record: Mapping[str, Any]) -> str:
    """All figures as markdown, a row each."""
    speed, video, network = record["speed"], record["video"], record["network"]
    ms = lambda seconds: f"{1e3 * seconds:.1f}"
    three = lambda values: " / ".join(ms(values[name]) for name in ("p50", "p95", "p99"))
    blocks, per_frame = record["blocks"], 1 / speed["frames"]
    seen = (blocks or {}).get("memory") or f"window {blocks['window'] or 'all'}" if blocks else ""
    layout = f"blocks of {blocks['frames']}, {seen}" if blocks else "bidirectional"
    layers, frames = counted(network["num_layers"], "layer"), counted(video["frames"], "frame")
    rows = {
        record["run"]: f"{network['dim']} wide, {layers}, {network['precision']['compute']}",
        "video": f"{frames} of {video['width']} x {video['height']}, batch {record['batch']}, {layout}",
        "on": record["device"]["kind"],
        f"frames/s, decoder {record['decoder']}": f"{speed['frames_per_second']:.2f}",
        "frames/s without decoder": f"{speed['frames_per_second_without_decoder']:.2f}",
        "first frames, ms: warm": ms(speed["first_frame_s"]),
        "first frames, ms: cold, with compiling": ms(speed["cold_first_frame_s"]),
        "compiling, s": f"{speed['compile_s']:.1f} ({counted(speed['programs'], 'program')})",
        "block, ms: p50 / p95 / p99": three(speed["block_s"]),
        "of these the network": three(speed["block_network_s"]),
        "of these the decoder": three(speed["block_decoder_s"]),
        "network passes of a video": str(speed["network_calls"]),
        "GFLOP a frame: needed": f"{speed['needed']['flops'] * per_frame / 1e9:.3g}",
        "GFLOP a frame: executed": f"{speed['executed_network'] * per_frame / 1e9:.3g}",
        "GFLOP a frame: of the decoder": f"{speed['executed_decoder'] * per_frame / 1e9:.3g}",
        "GFLOP/s of the network": f"{speed['network_flops_per_s'] / 1e9:.4g} of {speed['peak_flops'] / 1e9:.4g}",
        "share of the roofline": f"{100 * speed['share_of_roofline']:.1f} %",
        "weights / KV cache / temporary, MiB": " / ".join(
            f"{speed[name] / MIB:.1f}" for name in ("weight_bytes", "kv_cache_bytes", "temporary_bytes")
        ),
        "peak memory, MiB": " / ".join(
            f"{what} {speed[name] / MIB:.0f}"
            for what, name in (("device", "peak_device_bytes"), ("host", "peak_host_bytes"))
            if speed[name]
        ),
        "text: keys and values of a prompt, ms": ms(speed["prompt_s"]),
    }
    if record["text_encoder_s"] is not None:
        rows["text: encoder, ms"] = ms(record["text_encoder_s"])
    for name, case in record.get("against", {}).get("cases", {}).items():
        ratio, median = case["ratio"], {side: statistics.median(s) for side, s in case["seconds"].items()}
        rows[f"{record['against']['name']}, {name}"] = (
            f"{ratio['median']:.2f} times its speed ({ratio['min']:.2f} to {ratio['max']:.2f}; "
            f"{median['ours']:.3g} s against {median['theirs']:.3g}; error {case['error']:.1e})"
        )
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
