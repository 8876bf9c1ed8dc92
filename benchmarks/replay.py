"""What parallel replay buys: the student's self-rollout gradient, replayed in one pass or by differentiating the loop.

    python benchmarks/replay.py

All sides run the same no-gradient steps before each block's exit step and the same commits, on the toy network; they
differ in how the exit steps are differentiated. Replay runs each exit step's forward pass once more than the loop, but
all blocks at once: on a CPU the two nearly balance; it is meant for devices that small passes leave idle. "saved" is
replay from what the exit steps kept (`models.saved`), without that pass. The network has full rematerialisation, as
the large presets have. Times are medians over interleaved pairs, each pair with the same random numbers and exit step;
the ratios are medians of the pairs' ratios, of wall time and of CPU time (which a busy machine disturbs less).
Temporary memory and compile time are XLA's own, without a compilation cache. Prints a table and writes it as JSON.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from measure import compile_call, interleave, parser, ratio, write

from cfjax.core.console import say
from cfjax.core.tree import named_leaves
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.flow.schedule import warp_steps
from cfjax.models.cache import KVCache, init_cache
from cfjax.models.wan import KV, Wan, embed_text, make_wan, preset
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block, denoise_block, scan_blocks
from cfjax.rollout.self_forcing import SelfForcing, draw_rollout, replay_exit, rollout

SELF_FORCING = SelfForcing(tuple(float(s) for s in warp_steps((1000, 750, 500, 250), shift=5.0)))
LAYOUTS = ((12, 3), (21, 3), (21, 1))  # latent frames, frames per block
SIDE, TEXT_ROWS = 4, 8
Draws = dict[str, jax.Array]


def sequential(model: Wan, text_kv: KV, draws: Draws, blocks: Blocks) -> jax.Array:
    """The generated video with gradient through every exit step, as the loop that anyone would write first."""
    frozen, frozen_kv = jax.lax.stop_gradient((model, text_kv))
    batch, num_frames, height, width, _ = draws["noise_BFHWC"].shape
    levels_GJ, _ = SELF_FORCING.tables(len(blocks.spans(num_frames)))
    cache = init_cache(model.config, batch, num_frames, model.config.tokens_per_frame(height, width), blocks)

    def block(cache: KVCache, start: jax.Array, inputs: Any) -> tuple[KVCache, jax.Array]:
        (x, renoise), (levels, exit_step) = inputs

        def step(j: jax.Array, x: jax.Array) -> jax.Array:
            x0 = x0_from_flow(denoise_block(frozen, x, levels[j], frozen_kv, cache, start, blocks), x, levels[j])
            return add_noise(x0, jax.lax.dynamic_index_in_dim(renoise, j, axis=2, keepdims=False), levels[j + 1])

        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, exit_step, step, x))
        x0 = x0_from_flow(
            denoise_block(model, x, levels[exit_step], text_kv, cache, start, blocks), x, levels[exit_step]
        )
        cache = commit_block(frozen, jax.lax.stop_gradient(x0), frozen_kv, cache, start, blocks)
        return jax.lax.stop_gradient(cache), x0

    frames = (draws["noise_BFHWC"], draws["renoise_BFJHWC"])
    return scan_blocks(block, cache, frames, (levels_GJ, draws["exit_G"]), num_frames, blocks)[1]


def replayed(model: Wan, text_kv: KV, draws: Draws, blocks: Blocks) -> jax.Array:
    """The same video and gradient by cfjax: roll out without gradient, then one pass over all exit steps."""
    frozen, frozen_kv = jax.lax.stop_gradient((model, text_kv))
    return replay_exit(model, text_kv, rollout(frozen, frozen_kv, draws, SELF_FORCING, blocks), SELF_FORCING, blocks)


def saved(model: Wan, text_kv: KV, draws: Draws, blocks: Blocks) -> jax.Array:
    """`replayed`, from saved activations."""
    frozen, frozen_kv = jax.lax.stop_gradient((model, text_kv))
    rolled = rollout(frozen, frozen_kv, draws, SELF_FORCING, blocks, save=True)
    return replay_exit(model, text_kv, rolled, SELF_FORCING, blocks)


SIDES = {"sequential": sequential, "replay": replayed, "saved": saved}


def gradient_of(video: Callable[..., jax.Array], blocks: Blocks) -> Callable[..., Wan]:
    """The student's gradient when `weight` is the gradient at its video."""

    def value(model: Wan, text_BSE: jax.Array, draws: Draws, weight: jax.Array) -> jax.Array:
        return jnp.sum(video(model, embed_text(model, text_BSE), draws, blocks) * weight)

    return jax.grad(value)


def toy_student() -> Wan:
    """The toy network with every parameter random (the published initialisation has a zero head)."""
    model = make_wan(preset("toy"), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.02 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def difference(a: Wan, b: Wan) -> float:
    """|a - b| / |b| over all parameters."""
    pairs = list(zip(named_leaves(a).values(), named_leaves(b).values(), strict=True))
    return float(jnp.sqrt(sum(jnp.sum((x - y) ** 2) for x, y in pairs) / sum(jnp.sum(y**2) for _, y in pairs)))


def compare(frames: int, block: int, batch: int, pairs: int) -> dict[str, Any]:
    """One row: both sides compiled, checked against each other, and timed in interleaved pairs."""
    model, blocks = toy_student(), Blocks(block)
    shape = (batch, frames, SIDE, SIDE, model.config.in_dim)
    text = jax.random.normal(jax.random.key(2), (batch, TEXT_ROWS, model.config.text_dim))
    weight = jax.random.normal(jax.random.key(3), shape)

    def draws(pair: int) -> Draws:
        drawn = draw_rollout(jax.random.key(10 + pair), shape, SELF_FORCING, blocks)
        exits = jnp.full(drawn["exit_G"].shape, pair % len(SELF_FORCING.sigmas), jnp.int32)
        return {**drawn, "exit_G": exits}

    row: dict[str, Any] = {"frames": frames, "frames_per_block": block, "batch": batch, "pairs": pairs}
    compiled = {}
    for name, video in SIDES.items():
        compiled[name], row[name] = compile_call(gradient_of(video, blocks), model, text, draws(0), weight)
    warm = {name: run(model, text, draws(2), weight) for name, run in compiled.items()}
    row["gradient_difference"] = difference(warm["replay"], warm["sequential"])
    row["saved_difference"] = difference(warm["saved"], warm["sequential"])
    for name, times in interleave(
        compiled, lambda i: dict.fromkeys(compiled, (model, text, draws(i), weight)), pairs
    ).items():
        row[name] |= times
    for clock, key in (("ms", "speedup"), ("cpu_ms", "cpu_speedup")):
        row[key] = ratio(row["sequential"][clock], row["replay"][clock])
        row[f"saved_{key}"] = ratio(row["replay"][clock], row["saved"][clock])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown: sequential -> replay -> saved; speed-ups of replay over the loop, of saved over replay."""
    lines = [
        "| frames | block | ms | replay (min, max) | saved (min, max) | CPU time | temp MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sides = [row[name] for name in SIDES]
        cells = [
            f"{row['frames']}",
            f"{row['frames_per_block']}",
            " -> ".join(f"{side['median_ms']:.0f}" for side in sides),
            "{median:.2f} ({min:.2f}, {max:.2f})".format(**row["speedup"]),
            "{median:.2f} ({min:.2f}, {max:.2f})".format(**row["saved_speedup"]),
            f"{row['cpu_speedup']['median']:.2f}, {row['saved_cpu_speedup']['median']:.2f}",
            " -> ".join(f"{side['temp_mib']:.1f}" for side in sides),
            f"{max(row['gradient_difference'], row['saved_difference']):.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures every layout, prints the table, writes the JSON."""
    command = parser(__doc__, "replay.json")
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--pairs", type=int, default=8, help="timed pairs per layout; a multiple of 4 exit steps")
    options = command.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [compare(frames, block, options.batch, options.pairs) for frames, block in LAYOUTS]
    write(options.out, rows, network="toy preset, full remat, float32")
    say(table(rows))


if __name__ == "__main__":
    main()
