"""Every stage at full size (Wan 1.3B, 14B real score, 81 frames of 480 x 832, batch 64) compiled for machines.

    python benchmarks/plans.py                 all of them, one after the other; what is there already is kept
    python benchmarks/plans.py --only=dmd      those whose name contains a word
    python benchmarks/plans.py --collect       compile nothing: the table of what is there

Needs `pip install -e '.[tpu]'` for TPU slices and '.[gpu]' for H100 clusters, and minutes of CPU for each; no
accelerator. Nothing here was run on one: memory and collectives are the compiler's, times bounds by the chip's peak.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import commit, parser, write

from cfjax.core.console import say
from cfjax.core.topology import GIB, parse_topology

ROOT = Path(__file__).parents[1]
COMMIT = "commit"  # in a plan's folder: what compiled it
POD = ("fsdp=16", "context=4")
SLICE = ("fsdp=16", "tensor=4")
# name: config, topology, mesh, microbatches
PLANS: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    "ar_v5p": ("ar_diffusion.py", "v5p:4x4x4", POD, 4),
    "dmd_v5p": ("dmd.py:framewise", "v5p:4x4x4", POD, 4),
    "dmd_h100": ("dmd.py", "h100:8x8", ("fsdp=32", "tensor=2"), 2),
    "consistency_v5p": ("consistency.py", "v5p:4x4x4", POD, 4),
    "ode_v5p": ("ode_regression.py", "v5p:4x4x4", POD, 4),
    "bidirectional_v5p": ("bidirectional.py", "v5p:4x4x4", POD, 4),
    "ar_v6e": ("ar_diffusion.py", "v6e:8x8", SLICE, 4),
    "ar_v5e": ("ar_diffusion.py", "v5e:8x8", SLICE, 4),
    "ar_h100": ("ar_diffusion.py", "h100:2x8", ("fsdp=16",), 4),
    "dmd_v6e": ("dmd.py:framewise", "v6e:16x16", ("fsdp=64", "tensor=4"), 1),
    "dmd_tpu7x": ("dmd.py:framewise", "tpu7x:2x4x4", ("fsdp=16", "tensor=4"), 4),
    "streaming_v5p": ("dmd.py:streaming", "v5p:4x4x4", POD, 1),
    "dmd_cpu": ("dmd.py:framewise", "cpu:64", POD, 4),
}
LEAST_EFFORT = ("streaming_v5p",)  # with the Wan VAE in its updates: one encoder call alone takes 200 CPU seconds
TRAINED = {"dmd": ("student", "critic")}


def command(name: str, workdir: Path) -> list[str]:
    """`cfjax plan` of one entry."""
    config, topology, mesh, accumulate = PLANS[name]
    roles = TRAINED.get(config.partition(".")[0], ("student",))
    sizes = [f"--config.mesh.{size}" for size in mesh]
    parts = [f"--config.optim.{role}.accumulate={accumulate}" for role in roles]
    effort = ["--quick=True"] if name in LEAST_EFFORT else []
    return [
        "plan", f"--config=configs/{config}", f"--topology={topology}", *sizes, *parts, *effort, f"--workdir={workdir}",
    ]  # fmt: skip


def compile_one(name: str, workdir: Path) -> None:
    """Runs it in a process of its own: a platform's compiler is opened once per process."""
    say(f"{name}: {' '.join(command(name, workdir))}")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-m", "cfjax", *command(name, workdir)], cwd=ROOT, env=environment, check=False
    )
    if ran.returncode == 2 or not (workdir / "plan.json").exists():
        raise SystemExit(f"{name}: exit code {ran.returncode}")
    (workdir / COMMIT).write_text(commit())


def rows_of(name: str, workdir: Path) -> list[dict[str, Any]]:
    """A row per update of a plan; none if it was not made."""
    file = workdir / "plan.json"
    if not file.exists():
        return []
    made = json.loads(file.read_text())
    found = made["plans"][0]
    topology = parse_topology(found["topology"]["name"])
    keys = ("mesh", "batch", "accumulate", "attention", "fits")
    return [
        {
            "name": name,
            "commit": (workdir / COMMIT).read_text() if (workdir / COMMIT).exists() else "unknown",
            "config": PLANS[name][0],
            "topology": topology.name,
            "devices": found["devices"],
            "memory_per_device": topology.memory,
            "peak_flops": topology.flops,
            **{key: found[key] for key in keys},
            **cost,
        }
        for cost in found["costs"]
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, GiB and seconds per device."""
    lines = [
        "| stage | update | machine | mesh | microbatches | arguments | temporaries | peak | of |"
        " TFLOP needed / executed | s at peak | collectives, GiB | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gib = lambda key, row=row: f"{row[key] / GIB:.1f}"
        mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        seconds = f"{row['executed'] / row['peak_flops']:.1f}" if row["peak_flops"] else ""
        limit = gib("memory_per_device") if row["memory_per_device"] else ""
        moved = ", ".join(f"{kind} {t['bytes'] / GIB:.0f}" for kind, t in sorted(row["traffic"].items()))
        verdict = {True: "fits", False: "does not fit", None: "simulated"}[row["fits"]]
        cells = [
            row["config"].replace(".py", ""),
            row["role"],
            row["topology"],
            mesh,
            str(row["accumulate"][row["role"]]),
            *(gib(key) for key in ("arguments", "temporaries", "peak")),
            limit,
            f"{row['flops'] / 1e12:.0f} / {row['executed'] / 1e12:.0f}",
            seconds,
            moved,
            verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def commands() -> str:
    """Every entry's command as it is given in a shell, one a line."""
    return "\n".join(shlex.join(["cfjax", *command(name, Path("runs/plans") / name)]) for name in PLANS)


def main() -> None:
    """Compiles what is missing, prints the table, writes the JSON."""
    options_parser = parser(__doc__, "plans.json")
    options_parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "plans", help="a folder per plan")
    options_parser.add_argument("--only", default="", help="a word of the names")
    options_parser.add_argument("--collect", action="store_true", help="compile nothing")
    options = options_parser.parse_args()
    rows = []
    for name in PLANS:
        wanted = options.only in name and not options.collect
        if wanted and not (options.runs / name / "plan.json").exists():
            compile_one(name, options.runs / name)
        rows += rows_of(name, options.runs / name)
    write(options.out, rows, batch=64, video="81 frames, 480 x 832", ran="compiled without hardware; nothing was run")
    say(table(rows))


if __name__ == "__main__":
    main()
