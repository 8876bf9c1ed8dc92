"""What one block of a stream costs, calculated: FLOPs, least bytes, and the bound on frames/s by chip.

    python benchmarks/block_costs.py

Nothing is run and no chip is needed: the arithmetic is `cfjax.planning.stream_cost`'s, compared here with the products
that `cfjax.planning.flops` counts in the program itself. A block is a pass per step, and one that commits it. Bytes are
the least that any program moves through the chip's memory, with bfloat16 weights; activations are taken to stay on the
chip. Decoders' FLOPs are XLA's, of compiled programs (benchmarks/decoders.py). Prints tables and writes them as JSON.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from measure import parser, write

from cfjax.core.console import say
from cfjax.core.topology import CHIPS
from cfjax.experiment.speed import network_size, passes_of
from cfjax.models.wan import KV, PRESETS, Wan, WanConfig
from cfjax.models.weight_storage import with_storage_dtypes
from cfjax.nn.visibility import Blocks
from cfjax.planning.flops import count_flops
from cfjax.planning.stream_cost import NetworkSize, Pass, pass_flops, stream_need
from cfjax.rollout.generate import FewStep
from cfjax.rollout.sizes import Sizes

TEXT_ROWS = 512
LATENT = (60, 104)  # of 480 x 832 pixels
FRAMES = 21  # latent frames of 81 pixel frames
# FLOP/s in bfloat16 and bytes/s of the memory, at their peaks. An H200 computes what an H100 does.
RATES = {name: (CHIPS[name].flops, CHIPS[name].bandwidth) for name in ("v5e", "v5p", "v6e", "tpu7x", "h100")}
STEPS = {4: (1000, 750, 500, 250), 2: (1000, 500), 1: (1000,)}
SHARE = 0.4  # of the peak that good programs of this kind reach
DECODERS = {"wan": "Wan VAE", "tiny": "tiny"}


@dataclass(frozen=True)
class Mode:
    """A way to stream: frames per block, steps per block, and how far back a block sees (a sink costs nothing more)."""

    name: str
    frames: int
    steps: int
    window: int = 0

    @property
    def blocks(self) -> Blocks:
        """The block layout."""
        return Blocks(self.frames, window=self.window)


MODES = (
    Mode("chunk-wise, 4 steps", 3, 4),
    Mode("chunk-wise, 2 steps", 3, 2),
    Mode("chunk-wise, 1 step", 3, 1),
    Mode("frame-wise, 4 steps", 1, 4),
    Mode("frame-wise, 2 steps", 1, 2),
    Mode("frame-wise, 1 step", 1, 1),
    Mode("chunk-wise, 4 steps, window of 12", 3, 4, 12),
)


def sizes_of(config: WanConfig) -> NetworkSize:
    """The network with its weights in bfloat16."""
    shapes = jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0))
    return network_size(with_storage_dtypes(shapes, "bfloat16", "bfloat16"))


def counted_flops(config: WanConfig, frames: int, latent: tuple[int, int], text_rows: int) -> float:
    """FLOPs of the products in the program of one pass over frames that all see each other, without a cache."""
    config = replace(config, attention="xla")
    model = jax.eval_shape(lambda key: Wan(config, key), jax.random.key(0))
    text = (config.num_layers, 1, text_rows, config.num_heads, config.head_dim)
    shapes = [((1, frames, *latent, config.in_dim), jnp.float32), ((1, frames), jnp.float32)]
    x, sigma, k, v = (jax.ShapeDtypeStruct(*of) for of in (*shapes, *[(text, config.precision.compute)] * 2))
    return count_flops(lambda model, x, sigma, text: model(x, sigma, text), model, x, sigma, KV(k, v))


def decoder_flops(record: Path) -> dict[str, dict[int, float]]:
    """Decoder -> latent frames of a later block -> FLOPs at 480 x 832, from `benchmarks/decoders.py`."""
    rows = [row for row in json.loads(record.read_text())["rows"] if row["step"] == "later"]
    return {name: {row["latent_frames"]: 1e9 * row[name]["gflop_at_480p"] for row in rows} for name in DECODERS}


def row_of(mode: Mode, config: WanConfig, decoders: dict[str, dict[int, float]]) -> dict[str, Any]:
    """The last block of a video of `FRAMES` latent frames, and the whole video."""
    size, tokens = sizes_of(config), config.tokens_per_frame(*LATENT)
    video = Sizes(FRAMES, 0, *LATENT, (4, 8, 8))
    passes = passes_of(FewStep(STEPS[mode.steps]), mode.blocks, video, tokens)
    last = passes[-(mode.steps + 1) :]
    block, whole = (stream_need(size, part, TEXT_ROWS) for part in (last, passes))
    unseen = sum(pass_flops(size, replace(work, keys=0), TEXT_ROWS) for work in last)
    row: dict[str, Any] = {"mode": mode.name, "keys": last[-1].keys, "passes": len(last), "flops": block.flops}
    row |= {"bytes": block.bytes, "video_flops": whole.flops, "in_attention": 1 - unseen / block.flops, "chips": {}}
    row["decoder_flops"] = {name: decoders[name][mode.frames] for name in DECODERS}
    for chip, (flops, bandwidth) in RATES.items():
        least, memory = block.seconds(flops, bandwidth), block.bytes / bandwidth
        extra = {"none": 0.0, **row["decoder_flops"]}
        row["chips"][chip] = {
            "seconds_at_peak": least,
            "memory_over_compute": memory / (block.flops / flops),
            "frames_per_second": {n: 4 * mode.frames * SHARE / (least + more / flops) for n, more in extra.items()},
        }
    return row


def tables(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as markdown: what a block costs, then frames/s by chip."""
    rows = list(rows)
    lines = [
        "| stream | keys seen | passes | TFLOP | of them attention | least GB | bytes' time / FLOPs' time, H100 |"
        " TFLOP of 81 frames |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["mode"], f"{row['keys']}", f"{row['passes']}", f"{row['flops'] / 1e12:.1f}"]
        cells += [f"{100 * row['in_attention']:.0f} %", f"{row['bytes'] / 1e9:.1f}"]
        cells += [f"{row['chips']['h100']['memory_over_compute']:.2f}", f"{row['video_flops'] / 1e12:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| stream | " + " | ".join(RATES) + " |", "|---" * (1 + len(RATES)) + "|"]
    for row in rows:
        rates = [row["chips"][chip]["frames_per_second"] for chip in RATES]
        cells = [f"{rate['none']:.1f}, {rate['tiny']:.1f}, {rate['wan']:.1f}" for rate in rates]
        lines.append(f"| {' | '.join([row['mode'], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Calculates every mode, compares the formula with the program, prints the tables, writes the JSON."""
    command = parser(__doc__, "block_costs.json")
    options = command.parse_args()
    config = PRESETS["wan_1_3b"]
    decoders = decoder_flops(Path(__file__).parent / "results" / "decoders.json")
    rows = [row_of(mode, config, decoders) for mode in MODES]
    tokens = FRAMES * config.tokens_per_frame(*LATENT)
    counted = counted_flops(config, FRAMES, LATENT, TEXT_ROWS)
    formula = pass_flops(sizes_of(config), Pass(FRAMES, tokens, tokens), TEXT_ROWS)
    say(tables(rows))
    say(f"one pass over {FRAMES} frames: {counted / formula:.6f} of the formula's FLOPs are in the program")
    write(options.out, rows, counted_over_formula=counted / formula, share=SHARE, ran="calculated; nothing was run")


if __name__ == "__main__":
    main()
