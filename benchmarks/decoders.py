"""What the tiny decoder saves: one step of a stream, decoded by the tiny autoencoder and by Wan2.1's own.

    python benchmarks/decoders.py

Published sizes, random weights: this is about time and memory, not about pictures. A stream's first step (F latent
frames give 1 + 4 (F - 1)) and a later one (4 F) are timed on small frames, interleaved; the ratios are medians over
rounds, of wall time and of CPU time (which a busy machine disturbs less). Temporary memory and operations are XLA's
own (it counts Wan's attention for one frame only, an error below 1 %); those at 480 x 832 are of a program that is
compiled here and not run. Prints a table and writes it as JSON.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from measure import compile_call, interleave, parser, ratio, write

from cfjax.core.console import say
from cfjax.core.precision import Policy
from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig, make_tiny_vae
from cfjax.models.vae import VAEConfig, WanVAE, make_vae

FRAMES = (3, 1)  # latent frames per step: chunk-wise and frame-wise generation
LARGE = (60, 104)  # latent pixels of 480 x 832
Decoder = TinyVAE | WanVAE


def step(codec: Decoder, latents_BFHWC: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """The next frames of a stream."""
    return codec.decode_step(latents_BFHWC, state)


def like(tree: Any, fill: Callable[[tuple[int, ...], Any], Any]) -> Any:
    """A pytree of shapes, filled."""
    return jax.tree.map(lambda x: fill(x.shape, x.dtype), tree)


def compare(codecs: dict[str, Decoder], frames: int, later: bool, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """One row: both decoders compiled for one step, and timed in turn."""
    shape, large = (1, frames, *size, 16), jax.ShapeDtypeStruct((1, frames, *LARGE, 16), jnp.float32)
    latents = jax.random.normal(jax.random.key(1), shape)
    row: dict[str, Any] = {"latent_frames": frames, "step": "later" if later else "first", "latent_pixels": list(size)}
    calls, given = {}, {}
    for name, codec in codecs.items():
        state = large_state = codec.init_state(1)
        if later:
            state = like(jax.eval_shape(step, codec, latents, state)[1], jnp.zeros)
            large_state = jax.eval_shape(step, codec, large, large_state)[1]
        given[name] = (codec, latents, state)
        calls[name], row[name] = compile_call(step, *given[name])
        program, at_large = compile_call(step, codec, large, large_state)
        row[name] |= {"temp_mib_at_480p": at_large["temp_mib"], "gflop_at_480p": program.cost_analysis()["flops"] / 1e9}
        row[name]["state_mib_at_480p"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(large_state)) / 2**20
        row["pixel_frames"] = jax.block_until_ready(calls[name](*given[name]))[0].shape[1]  # and the first run
    for name, times in interleave(calls, lambda _: given, rounds).items():
        row[name] |= times
    row["speedup"] = ratio(row["wan"]["ms"], row["tiny"]["ms"])
    row["cpu_speedup"] = ratio(row["wan"]["cpu_ms"], row["tiny"]["cpu_ms"])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, Wan's decoder -> the tiny one in each cell."""
    lines = [
        "| latents | step | ms | speed-up (min, max) | in CPU time | GFLOP at 480p | temp MiB at 480p | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pair = lambda key, digits, row=row: f"{row['wan'][key]:.{digits}f} -> {row['tiny'][key]:.{digits}f}"
        cells = [
            f"{row['latent_frames']}",
            row["step"],
            pair("median_ms", 0),
            "{median:.0f} ({min:.0f}, {max:.0f})".format(**row["speedup"]),
            "{median:.0f} ({min:.0f}, {max:.0f})".format(**row["cpu_speedup"]),
            pair("gflop_at_480p", 0),
            pair("temp_mib_at_480p", 0),
            pair("compile_s", 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures every kind of step, prints the table, writes the JSON."""
    command = parser(__doc__, "decoders.json")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--size", type=int, nargs=2, default=(6, 10), help="latent height and width that are timed")
    command.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    options = command.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    precision, key = Policy(compute=options.compute), jax.random.key(0)
    codecs: dict[str, Decoder] = {
        "wan": make_vae(VAEConfig(precision=precision), key),
        "tiny": make_tiny_vae(TinyVAEConfig(precision=precision), key),
    }
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    parameters = {name: {"all": count(codec), "decoder": count(codec.decoder)} for name, codec in codecs.items()}
    size = (options.size[0], options.size[1])
    rows = [compare(codecs, frames, later, size, options.rounds) for frames in FRAMES for later in (False, True)]
    write(options.out, rows, compute=options.compute, batch=1, parameters=parameters)
    say(table(rows))
    say(f"parameters: {parameters}")


if __name__ == "__main__":
    main()
