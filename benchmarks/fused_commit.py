"""What a fused commit buys: one block of a few-step stream, its predecessor's commit as a pass of its own or not.

    python benchmarks/fused_commit.py

Both sides commit a block and make the next one in four steps, at the same place of the same cache; unfused these are
five passes, fused four, the first of them over both blocks. The matrix products are the same, in fewer and larger
calls: fusing can only save what a pass costs besides them, which are reading the weights and, on an accelerator, its
launches. So it is the default there, and on a CPU where this table says so. Times are medians over interleaved pairs,
the ratios medians of the pairs' ratios, of wall time and of CPU time. Prints a table and writes it as JSON.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import compile_call, interleave, parser, ratio, write

from cfjax.core.console import say
from cfjax.models.cache import KVCache, init_cache
from cfjax.models.wan import KV, Wan, WanConfig, embed_text, make_wan
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.generate import FewStep, few_step_block, fused_block

SMALL, LARGE = (256, 4, 14), (384, 6, 32)  # width, layers, latent side: 49 and 256 tokens a frame
CASES = ((SMALL, 3), (SMALL, 1), (LARGE, 3), (LARGE, 1))  # network, frames per block
FRAMES, TEXT_ROWS = 12, 16


def network(width: int, layers: int) -> Wan:
    """Random weights; heads of 64, a feed-forward of four widths."""
    config = WanConfig(width, 4 * width, width // 64, layers, text_dim=64)
    return make_wan(config, jax.random.key(0))


def compare(size: tuple[int, int, int], block: int, pairs: int) -> dict[str, Any]:
    """One row: both sides compiled, checked against each other, and timed in interleaved pairs."""
    width, layers, side = size
    model, blocks, start = network(width, layers), Blocks(block), FRAMES - block
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.float32)
    frame = (side, side, model.config.in_dim)
    clean, noise, fresh = (normal(i, *lead, 1, block, *frame) for i, lead in ((1, ()), (2, ()), (3, (3,))))
    text_kv = embed_text(model, normal(4, 1, TEXT_ROWS, 64))
    tokens = model.config.tokens_per_frame(side, side)
    cache = init_cache(model.config, 1, FRAMES, tokens, blocks)
    frame_F = jnp.where(jnp.arange(FRAMES) < start - block, jnp.arange(FRAMES), -1)
    cache = KVCache(normal(5, *cache.k_LBFTNK.shape), normal(6, *cache.v_LBFTNK.shape), frame_F)
    sigmas = FewStep().sigmas()

    def apart(model: Wan, kv: KV, cache: KVCache, at: jax.Array) -> tuple[jax.Array, KVCache]:
        cache = commit_block(model, clean, kv, cache, at - block, blocks)
        return few_step_block(model, noise, fresh, sigmas, kv, cache, at, blocks), cache

    def fused(model: Wan, kv: KV, cache: KVCache, at: jax.Array) -> tuple[jax.Array, KVCache]:
        return fused_block(model, clean, noise, fresh, sigmas, kv, cache, at, blocks)

    given = (model, text_kv, cache, jnp.int32(start))
    row: dict[str, Any] = {"width": width, "layers": layers, "tokens": tokens, "frames_per_block": block}
    compiled = {}
    for name, call in (("apart", apart), ("fused", fused)):
        compiled[name], row[name] = compile_call(call, *given)
    one, other = (np.asarray(compiled[name](*given)[0]) for name in ("fused", "apart"))
    row["difference"] = float(np.abs(one - other).max() / np.abs(other).max())
    for name, times in interleave(compiled, lambda _: dict.fromkeys(compiled, given), pairs).items():
        row[name] |= times
    for clock, key in (("ms", "speedup"), ("cpu_ms", "cpu_speedup")):
        row[key] = ratio(row["apart"][clock], row["fused"][clock])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, apart -> fused in each cell."""
    lines = [
        "| width | tokens | block | ms | speed-up (min, max) | in CPU time | temp MiB | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, after = row["apart"], row["fused"]
        cells = [
            *(f"{row[key]}" for key in ("width", "tokens", "frames_per_block")),
            f"{before['median_ms']:.0f} -> {after['median_ms']:.0f}",
            "{median:.2f} ({min:.2f}, {max:.2f})".format(**row["speedup"]),
            "{median:.2f}".format(**row["cpu_speedup"]),
            f"{before['temp_mib']:.1f} -> {after['temp_mib']:.1f}",
            f"{row['difference']:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures every case, prints the table, writes the JSON."""
    command = parser(__doc__, "fused_commit.json")
    command.add_argument("--pairs", type=int, default=8, help="timed pairs per case")
    options = command.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = [compare(size, block, options.pairs) for size, block in CASES]
    write(options.out, rows, network="random weights, float32, 12 latent frames")
    say(table(rows))


if __name__ == "__main__":
    main()
