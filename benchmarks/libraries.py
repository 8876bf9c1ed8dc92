"""Two libraries beside what cfjax has of its own: qwix's quantised products, tokamax's attention for TPU.

    python benchmarks/libraries.py
    python benchmarks/libraries.py --only=cpu     what is timed here, alone; the other rows of the JSON stay

Needs `pip install qwix==0.1.8 tokamax==0.0.12 'jax[tpu]'`; no accelerator. Products have the shape of a feed-forward
layer of Wan 1.3B, and fewer tokens: timed on this CPU in turn, compared with float64. The same products at a block's
tokens, and attention over 81 frames of 480 x 832 (block-causal, forward alone and with its gradient), are compiled for
one v6e chip and not run: bytes and temporary memory are the compiler's, and so are its estimates of the time.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from measure import compile_call, interleave, parser, ratio, write

from cfjax.core.console import say
from cfjax.core.quantize import Quantized, quantize
from cfjax.core.topology import open_topology, parse_topology
from cfjax.nn.layers import project
from cfjax.nn.splash import block_ends, splash_attend
from cfjax.nn.visibility import Blocks, Visibility

INPUTS, OUTPUTS = 1536, 8960
CPU_TOKENS, TPU_TOKENS = 390, 4680
FRAMES, TOKENS, HEADS, WIDTH = 21, 1560, 12, 128
CHIP, TILE = "v6e:2x2", 1024
TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
ROWS = (((1,), (0,)), ((), ()))  # x[t, i] kernel[i, o]
CAUSAL = Visibility("block_causal", Blocks(3))


def weights_alone(x: jax.Array, kernel: Any) -> jax.Array:
    """qwix: the kernel is quantised."""
    import qwix

    return qwix.dot_general(x, kernel, ROWS, preferred_element_type=x.dtype)


def both(x: jax.Array, kernel: Any) -> jax.Array:
    """qwix: the kernel and, with a scale per token, the activations."""
    import qwix

    rows = qwix.quantize(x, kernel.qvalue.dtype, channelwise_axes=(0,))
    return qwix.dot_general(rows, kernel, ROWS, preferred_element_type=jnp.float32).astype(x.dtype)


def products(float_kernel: Any, ours: Any, theirs: dict[str, Any]) -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """(name, product, kernel) of everything that is compared."""
    yield "plain", lambda x, kernel: x @ kernel.astype(x.dtype), float_kernel
    yield "cfjax int8 weights", project, ours
    for name, kernel in theirs.items():
        yield f"qwix {name} weights", weights_alone, kernel
        yield f"qwix {name} weights and activations", both, kernel


def on_cpu(dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Times and errors here."""
    import qwix

    rng = np.random.default_rng(0)
    kernel = (rng.standard_normal((INPUTS, OUTPUTS)) * (2 / (INPUTS + OUTPUTS)) ** 0.5).astype(np.float32)
    x = rng.standard_normal((CPU_TOKENS, INPUTS)).astype(np.float32)
    exact, given = x.astype(np.float64) @ kernel.astype(np.float64), jnp.asarray(x, dtype)
    wide, ours = jnp.asarray(kernel), jax.tree.map(jnp.asarray, quantize(kernel))
    theirs = {name: qwix.quantize(wide, t, channelwise_axes=(1,)) for name, t in TYPES.items()}
    calls, arguments, rows = {}, {}, {}
    for name, product, stored in products(wide, ours, theirs):
        calls[name], rows[name] = compile_call(product, given, stored)
        arguments[name] = (given, stored)
        out = np.asarray(jax.block_until_ready(calls[name](*arguments[name])), np.float64)
        rows[name]["error"] = float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
    times = interleave(calls, lambda _: arguments, rounds)
    for name, row in rows.items():
        row |= {"where": "cpu", "dtype": dtype, "name": name, "median_ms": times[name]["median_ms"]}
        row["of_plain"] = ratio(times[name]["ms"], times["plain"]["ms"])["median"]
    return list(rows.values())


def for_tpu(name: str, call: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What TPU's compiler says about a program."""
    begun = time.perf_counter()
    compiled = jax.jit(call).lower(*arguments).compile()
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return {
        "where": CHIP,
        "name": name,
        "compile_s": time.perf_counter() - begun,
        "mb": cost.get("bytes accessed", 0.0) / 1e6,
        "us": 1e6 * cost.get("optimal_seconds", 0.0),
        "temp_mib": memory.temp_size_in_bytes / 2**20,
    }


def products_for_tpu(chip: Any) -> list[dict[str, Any]]:
    """The products at a block's tokens."""
    import qwix

    shape = lambda sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=chip)
    scale, sizes = shape((1, OUTPUTS), jnp.float32), (INPUTS, OUTPUTS)
    theirs = {name: qwix.QArray(shape(sizes, t), scale, None, t) for name, t in TYPES.items()}
    ours, x = Quantized(shape(sizes, jnp.int8), scale), shape((TPU_TOKENS, INPUTS), jnp.bfloat16)
    made = products(shape(sizes, jnp.bfloat16), ours, theirs)
    return [for_tpu(name, product, x, stored) for name, product, stored in made]


def tokamax_attend(**settings: Any) -> Callable[..., jax.Array]:
    """Block-causal attention by tokamax's kernel: cfjax's tiles, and its rule, key < end of the query's block."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernels
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    class BlockEnds(masks._ComputableMask):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, BlockEnds) and np.array_equal(self.q_sequence, other.q_sequence)

        def __hash__(self) -> int:
            return hash(self.q_sequence.tobytes())

    ends = block_ends(CAUSAL, FRAMES, TOKENS, TOKENS)
    missing = -len(ends) % TILE
    mask = BlockEnds((len(ends) + missing,) * 2, lambda end, key: key < end)
    mask.q_sequence = np.pad(ends, (0, missing), mode="edge")
    kernel = kernels.make_splash_mha_single_device(mask, config=kernels.SplashConfig(*[TILE] * 6, **settings))

    def attend(q_BTNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array) -> jax.Array:
        padded = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))
        out = jax.vmap(kernel)(*map(padded, (q_BTNK * WIDTH**-0.5, k_BTNK, v_BTNK)))
        return out[:, :, : len(ends)].swapaxes(1, 2)

    return attend


def attention_for_tpu(chip: Any) -> list[dict[str, Any]]:
    """Both kernels, with and without gradients; tokamax's gradient keeps every partial sum, or three."""
    x = jax.ShapeDtypeStruct((1, FRAMES * TOKENS, HEADS, WIDTH), jnp.bfloat16, sharding=chip)
    kinds = {
        "JAX's splash": lambda *qkv: splash_attend(*qkv, CAUSAL, num_frames=FRAMES),
        "tokamax's splash": tokamax_attend(),
        "tokamax's splash, 3 partial sums": tokamax_attend(dq_reduction_steps=3),
    }
    rows = []
    for name, attend in kinds.items():
        total = lambda *qkv, attend=attend: jnp.sum(attend(*qkv).astype(jnp.float32))
        rows.append(for_tpu(name, attend, x, x, x))
        rows.append(for_tpu(f"{name}, with gradients", jax.grad(total, argnums=(0, 1, 2)), x, x, x))
    return rows


def main() -> None:
    """Measures and compiles, prints the rows, writes the JSON."""
    command = parser(__doc__, "libraries.json")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--only", choices=("cpu", "tpu"), help="make these rows alone, and keep the others")
    options = command.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no questions to a cloud that this machine may not be in
    rows = [] if options.only is None else json.loads(options.out.read_text())["rows"]
    rows = [row for row in rows if (row["where"] == "cpu") != (options.only == "cpu")]
    if options.only != "cpu":
        chip = SingleDeviceSharding(open_topology(parse_topology(CHIP))[0])
        rows += products_for_tpu(chip) + attention_for_tpu(chip)
    if options.only != "tpu":
        rows += [row for dtype in ("float32", "bfloat16") for row in on_cpu(dtype, options.rounds)]
    for row in rows:
        say("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    versions = {name: version(name) for name in ("qwix", "tokamax")}
    write(options.out, rows, libraries=versions)


if __name__ == "__main__":
    main()
