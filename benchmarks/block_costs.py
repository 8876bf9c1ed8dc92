"""What one block of a stream costs, calculated: FLOPs, least bytes, and the bound on frames/s by chip.

    python benchmarks/block_costs.py

Nothing is run and no chip is needed. A pass over q tokens that see k tokens costs, with width d and L layers,

    2 q L (6 d^2 + 2 d ffn)  products with weights     4 q k d L  self-attention     4 q S d L  attention to S text rows

plus patches, head and time embedding. A block is a pass per step and one that commits it. The formula is compared with
the products that `cfjax.planning.flops` counts in the program itself. Bytes are the least that any program moves
through the chip's memory: weights once a pass, the visible cache once a pass, the block's own keys and values once;
activations are taken to stay on the chip. Decoders' FLOPs are XLA's, of compiled programs (benchmarks/decoders.py).
Prints a table and writes it as JSON.
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
from cfjax.models.wan import KV, PRESETS, Wan, WanConfig
from cfjax.nn.visibility import Blocks
from cfjax.planning.flops import count_flops

TEXT_ROWS = 512
LATENT = (60, 104)  # of 480 x 832 pixels
FRAMES = 21  # latent frames of 81 pixel frames
# Bytes/s of the chip's memory, from the pages that `cfjax.core.topology` names; H200's from its data sheet.
BANDWIDTH = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9, "tpu7x": 7380e9, "h100": 3350e9, "h200": 4800e9}
PEAKS = {name: CHIPS["h100" if name == "h200" else name].flops for name in BANDWIDTH}
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


def weights_in_products(config: WanConfig) -> float:
    """Weights of all layers that a token is multiplied with (the text's keys and values are made once a prompt)."""
    return config.num_layers * (6.0 * config.dim**2 + 2.0 * config.dim * config.ffn_dim)


def pass_flops(config: WanConfig, frames: int, tokens: int, keys: int, text_rows: int = TEXT_ROWS) -> float:
    """FLOPs of one pass over `frames` frames of `tokens` tokens that see `keys` tokens, their own included."""
    queries, dim = frames * tokens, config.dim
    attention = 4.0 * queries * (keys + text_rows) * dim * config.num_layers
    patch = config.patch[0] * config.patch[1]
    ends = 2.0 * queries * dim * patch * (config.in_dim + config.out_dim)
    time = 2.0 * frames * (config.freq_dim * dim + 7.0 * dim**2)
    return 2.0 * queries * weights_in_products(config) + attention + ends + time


def visible_keys(blocks: Blocks, start: int, tokens: int) -> int:
    """Tokens that the block from frame `start` on sees: those before it and its own."""
    stop = start + blocks.frames
    return tokens * (blocks.frames + sum(b - a for a, b in blocks.visible_before(start, stop)))


def block_flops(config: WanConfig, blocks: Blocks, steps: int, start: int, tokens: int) -> float:
    """FLOPs of the block from frame `start` on: its steps, and the pass that commits it."""
    return (steps + 1) * pass_flops(config, blocks.frames, tokens, visible_keys(blocks, start, tokens))


def block_bytes(config: WanConfig, blocks: Blocks, steps: int, start: int, tokens: int, weight_bytes: int = 2) -> float:
    """Least bytes of the same block, keys and values in two bytes each."""
    per_token = 2 * 2 * config.dim * config.num_layers
    past = visible_keys(blocks, start, tokens) - blocks.frames * tokens
    once = blocks.frames * tokens * per_token
    return (steps + 1) * (weight_bytes * weights_in_products(config) + past * per_token) + once


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
    """The last block of a video of `FRAMES` latent frames."""
    tokens, start = config.tokens_per_frame(*LATENT), FRAMES - mode.frames
    keys = visible_keys(mode.blocks, start, tokens)
    flops = block_flops(config, mode.blocks, mode.steps, start, tokens)
    moved = block_bytes(config, mode.blocks, mode.steps, start, tokens)
    linear = 2.0 * mode.frames * tokens * weights_in_products(config) * (mode.steps + 1)
    row: dict[str, Any] = {"mode": mode.name, "keys": keys, "passes": mode.steps + 1, "pixel_frames": 4 * mode.frames}
    starts = range(0, FRAMES, mode.frames)
    video = sum(block_flops(config, mode.blocks, mode.steps, begin, tokens) for begin in starts)
    row |= {"flops": flops, "video_flops": video, "bytes": moved, "in_attention": 1 - linear / flops, "chips": {}}
    row["decoder_flops"] = {name: decoders[name][mode.frames] for name in DECODERS}
    for chip, bandwidth in BANDWIDTH.items():
        compute, memory = flops / PEAKS[chip], moved / bandwidth
        rate = lambda extra, seconds=max(compute, memory), chip=chip: (
            4 * mode.frames / (seconds / SHARE + extra / PEAKS[chip] / SHARE)
        )
        row["chips"][chip] = {
            "seconds_at_peak": max(compute, memory),
            "bound": "compute" if compute >= memory else "memory",
            "memory_over_compute": memory / compute,
            "frames_per_second": {"none": rate(0.0), **{n: rate(row["decoder_flops"][n]) for n in DECODERS}},
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
    lines += ["", "| stream | " + " | ".join(BANDWIDTH) + " |", "|---" * (1 + len(BANDWIDTH)) + "|"]
    for row in rows:
        rates = [row["chips"][chip]["frames_per_second"] for chip in BANDWIDTH]
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
    tokens = config.tokens_per_frame(*LATENT)
    counted = counted_flops(config, FRAMES, LATENT, TEXT_ROWS)
    formula = pass_flops(config, FRAMES, tokens, FRAMES * tokens)
    say(tables(rows))
    say(f"one pass over {FRAMES} frames: {counted / formula:.6f} of the formula's FLOPs are in the program")
    write(options.out, rows, counted_over_formula=counted / formula, share=SHARE, ran="calculated; nothing was run")


if __name__ == "__main__":
    main()
