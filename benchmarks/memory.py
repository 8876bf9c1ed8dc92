"""Memory policies and storage codecs on one checkpoint: quality over a long video, bytes of the cache, frames/s.

    python benchmarks/memory.py --run runs/quickstart/dmd --work runs/memory
    python benchmarks/memory.py --run runs/quickstart/dmd --work runs/memory --policies window longlive_infinity
    python benchmarks/memory.py --run runs/quickstart/dmd --work runs/memory --codecs none
    python benchmarks/memory.py --run runs/quickstart/dmd --work runs/memory --heads runs/heads/heads.json

Every policy with every codec makes the same clips of each seed, from the same noise; a video is ten times as long as
those of training. What is measured is kept in the work folder and not measured again; the table holds all of it, means
and standard deviations over the seeds. Frames/s are those of the fastest batch, with the decoder. `--heads=heads.json`
and `--labels=labels.csv`, which `cfjax profile_heads` writes, add Forcing-KV and Pyramid Forcing. Beside that,
`codec_errors`: how far the latents of 40 blocks are from those of the same stream without a codec
(`rollout.stored_error`).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from measure import others, parser, write

from cfjax.core.console import say
from cfjax.core.paths import write_atomically
from cfjax.experiment.measure_streams import measure_long
from cfjax.experiment.runs import open_run
from cfjax.memory.codecs import Codec
from cfjax.memory.names import with_memory
from cfjax.rollout.stored_error import stored_errors
from cfjax.rollout.stream import Pipeline, prompt_kv, seeded_noise

TRAINED = 12  # latent frames of the toy's clips; windows are as long
# Windows that a model of 12 frames has seen: the published ones are for 21, and for the policy's own positions.
POLICIES = {
    "full": "full",
    "window": "window(window=12, sink=3)",
    "window, no sink": "window(window=12, sink=0)",
    "infinity_rope": "infinity_rope",
    "longlive_infinity": "longlive_infinity",
    "deep_sink": "deep_sink(window=12, sink=6)",
    "ema_sink": "ema_sink",
    "memory_tokens": "memory_tokens",
    "memory_bank": "memory_bank",
    "context_recompute": "context_recompute",
    "rolling_sink": "rolling_sink(window=12)",
    "deep_forcing": "deep_forcing(window=12, sink=3, capacity=9, recent=3)",
    "dummy_forcing": "dummy_forcing",
    "forcing_kv": "forcing_kv",
    "pyramid": "pyramid(near=9, far=12)",
}
OWN_STORAGE = ("full",)  # no codec
CODECS = ("none", "bf16", "fp8", "int8", "int4")
SHOWN = ("follows", "step", "residual", "saturation", "sharpness")


def with_setting(policy: str, setting: str) -> str:
    """The policy's text with one more setting."""
    name, _, rest = policy.partition("(")
    return f"{name}({', '.join(part for part in (rest.removesuffix(')'), setting) if part)})"


def policy_text(options: argparse.Namespace, name: str, codec: str) -> str:
    """What names the policy with this codec; "" where it has none, or where a table of heads is missing."""
    text = POLICIES[name]
    tables = {"forcing_kv": options.heads, "pyramid": options.labels}
    if name in tables:
        text = with_setting(text, f"profile={tables[name]}") if tables[name] else ""
    if codec == "none" or not text:
        return text
    return "" if name in OWN_STORAGE else with_setting(text, f"codec={codec}")


def measured(options: argparse.Namespace, name: str, codec: str, seed: int) -> dict[str, Any] | None:
    """One policy, codec and seed; None where the policy stores nothing."""
    text = policy_text(options, name, codec)
    if not text:
        return None
    file = options.work / f"{name.replace(', ', '_').replace(' ', '_')}-{codec}-{seed}.json"
    if not file.exists():
        found: dict[str, float] = {}
        with others(found):
            result = measure_long(
                open_run(options.run), [text], frames=options.frames, clips=options.clips, batch=options.clips,
                seed=1000 * seed, kept=0,
            )  # fmt: skip
        (row,) = result["policies"].values()
        write_atomically(file, json.dumps({"policy": POLICIES[name], "codec": codec, "seed": seed, **row, **found}))
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def summary(name: str, codec: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A policy and codec over its seeds."""
    thirds = {}
    for key in SHOWN:
        curves = [row["over_time"][key] for row in rows]
        count = max(1, len(curves[0]) // 3)
        thirds[key] = {
            "first": spread([statistics.fmean(curve[:count]) for curve in curves]),
            "last": spread([statistics.fmean(curve[-count:]) for curve in curves]),
        }
    return {
        "case": f"{name}, {codec}",
        "policy": POLICIES[name],
        "codec": codec,
        "seeds": [row["seed"] for row in rows],
        "thirds": thirds,
        "over_time": {key: [row["over_time"][key] for row in rows] for key in ("frame", *SHOWN)},
        "cache_bytes": rows[0]["cache_bytes"],
        "frames_per_second": [row["frames_per_second"] for row in rows],
        "others_share": max(row["others_share"] for row in rows),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| policy | codec | follows its caption, first third, % | last third, % | motion, px/frame | "
        "residual, first third | last third | cache, KiB | frames/s |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        show = lambda key, part, factor=1.0, digits=1, row=row: (
            f"{factor * row['thirds'][key][part]['mean']:.{digits}f} ± "
            f"{factor * row['thirds'][key][part]['sd']:.{digits}f}"
        )
        cells = [
            row["policy"],
            row["codec"],
            show("follows", "first", 100),
            show("follows", "last", 100),
            show("step", "last", 1, 2),
            show("residual", "first", 1, 4),
            show("residual", "last", 1, 4),
            f"{row['cache_bytes'] / 1024:.0f}",
            f"{max(row['frames_per_second']):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def codec_errors(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By codec, over 40 blocks of one video; kept in the work folder."""
    file = options.work / "codec_errors.json"
    if not file.exists():
        run = open_run(options.run)
        assert run.blocks is not None
        text = run.world.encode_prompts(["a red circle moving right"])
        pipeline = Pipeline(run.model, run.world.codec, run.sampler, with_memory(run.blocks, "infinity_rope"))
        text_kv = prompt_kv(run.model, jnp.asarray(text), jnp.asarray(run.world.negative_text_SE()), run.sampler)
        errors = stored_errors(
            pipeline, text_kv, seeded_noise(np.zeros(1, np.uint32)), [Codec(name) for name in CODECS[1:]],
            num_frames=40 * run.blocks.frames, latent_shape=run.latent_shape[1:],
        )  # fmt: skip
        write_atomically(file, json.dumps({name: error.record() for name, error in errors.items()}))
    made: dict[str, dict[str, float]] = json.loads(file.read_text())
    return made


def main() -> None:
    """Measures what is asked for, and writes the record and the table of all that the work folder holds."""
    command = parser(__doc__, "memory.json")
    command.add_argument("--run", default="runs/quickstart/dmd")
    command.add_argument("--work", type=Path, default=Path("runs/memory"))
    command.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    command.add_argument("--codecs", nargs="+", default=list(CODECS), choices=CODECS)
    command.add_argument("--heads", default="", help="heads.json of the run, as cfjax profile_heads writes it")
    command.add_argument("--labels", default="", help="labels.csv beside it")
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--frames", type=int, default=10 * TRAINED, help="latent frames of a video")
    command.add_argument("--clips", type=int, default=24, help="videos of a seed")
    options = command.parse_args()
    for codec in options.codecs:
        for name in options.policies:
            for seed in options.seeds:
                if (row := measured(options, name, codec, seed)) is not None:
                    first, *_, last = row["over_time"]["follows"]
                    say(f"{name:20s} {codec:5s} {seed} {first:.3f} {last:.3f} {row['frames_per_second']:.0f}")
    rows = []
    for name in POLICIES:
        for codec in CODECS:
            stem = f"{name.replace(', ', '_').replace(' ', '_')}-{codec}"
            if found := [json.loads(file.read_text()) for file in sorted(options.work.glob(f"{stem}-[0-9]*.json"))]:
                rows.append(summary(name, codec, found))
    run = open_run(options.run, with_model=False)
    work = {"run": f"{run.stage}, step {run.step}", "frames": options.frames, "clips": options.clips}
    write(options.out, rows, work=work, codec_errors=codec_errors(options))
    options.out.with_suffix(".md").write_text(table(rows) + "\n")
    say(table(rows))


if __name__ == "__main__":
    main()
