"""The cases of benchmarks/device.py, the most worth knowing first: what each one compiles, and what it measures."""

import inspect
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_parts import Ahead, Scale, hashed_uniform, random_like, traced, zeros_if

from cfjax.core.quantize import dequantize, is_quantized
from cfjax.core.topology import peak_flops
from cfjax.experiment.speed import Stream as Videos
from cfjax.experiment.speed import network_size, passes_of, percentiles, run_once
from cfjax.models.tiny_vae import TinyVAE
from cfjax.models.vae import WanVAE
from cfjax.models.wan import Wan, WanConfig, embed_text
from cfjax.models.weight_storage import STORAGES, with_storage_dtypes
from cfjax.nn.attention import dense, pick_backend
from cfjax.nn.visibility import Blocks
from cfjax.planning.stream_cost import stream_need
from cfjax.rollout.clips import Times
from cfjax.rollout.generate import FewStep
from cfjax.rollout.sizes import Sizes
from cfjax.rollout.stream import Pipeline, decode_step, prompt_kv, seeded_noise, stream_latents

FOUR, TWO, ONE = (1000, 750, 500, 250), (1000, 500), (1000,)
WAYS = {3: "chunk-wise", 1: "frame-wise"}
DECODERS = {"wan": "Wan VAE", "tiny": "tiny decoder"}
RUNS = 5  # of a short case
CHANNELS = 16


class Skipped(Exception):
    """A case that this machine or this version cannot have, with the reason."""


@dataclass
class Context:
    """What the cases share.

    Attributes:
      cached_attention: backend of networks that read a KV cache; "auto" until the device was seen to refuse it.
      rate: bfloat16 FLOP/s that the device was seen to reach in a large matrix product; 0: not measured.
      held: weights in memory.  makers: jitted functions by name, so that each is compiled once.
    """

    sizes: Scale
    ahead: Ahead
    cached_attention: str = "auto"
    rate: float = 0.0
    held: dict[str, Any] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """bfloat16 FLOP/s by the data sheet; 0: unknown."""
        return peak_flops(jax.devices()[0].device_kind)

    def jitted(self, name: str, function: Callable[..., Any]) -> Any:
        """`jax.jit(function)`, the first one of a name."""
        if name not in self.makers:
            function.__name__ = name
            self.makers[name] = jax.jit(function)
        return self.makers[name]

    def student(self) -> WanConfig:
        """The causal network's config."""
        return replace(self.sizes.student, attention=self.cached_attention)

    def network(self, name: str, config: WanConfig, storage: str, *, arrays: bool) -> Any:
        """A network with random weights on the device, or its shapes while its maker is compiled."""
        config = replace(config, text_dim=self.sizes.student.text_dim)
        template = with_storage_dtypes(jax.eval_shape(partial(Wan, config), jax.random.key(0)), storage, "bfloat16")
        label = f"make_{name}_{storage}_{config.attention}"
        return self.random(label, lambda: random_like(template), arrays=arrays)

    def codec(self, name: str, *, arrays: bool) -> Any:
        """A decoder with random weights, or its shapes."""
        kind, config = {"wan": (WanVAE, self.sizes.vae), "tiny": (TinyVAE, self.sizes.tiny)}[name]
        template = jax.eval_shape(partial(kind, config), jax.random.key(0))
        return self.random(f"make_{name}", lambda: random_like(template), arrays=arrays)

    def text(self, *, arrays: bool) -> Any:
        """Text rows of one prompt [1, S, E]."""
        shape = (1, self.sizes.text_rows, self.sizes.student.text_dim)
        return self.random("make_text", lambda: hashed_uniform(shape, 0), arrays=arrays)

    def random(self, label: str, make: Callable[[], Any], *, arrays: bool) -> Any:
        """What `make` draws, kept until `free`; or its shapes while it is compiled."""
        maker = self.jitted(label, make)
        if not arrays:
            return self.ahead.prepare(maker)
        if label not in self.held:
            self.held[label] = jax.block_until_ready(self.ahead(maker))
        return self.held[label]

    def free(self, *kept: str) -> None:
        """Drops the weights whose names do not begin with one of `kept`."""
        self.held = {name: value for name, value in self.held.items() if name.startswith(kept or ("\0",))}

    def share(self, flops: float, seconds: float) -> dict[str, float | None]:
        """Shares of the data sheet's peak and of the rate that was measured."""
        reached = flops / seconds
        return {
            "tflops": reached / 1e12,
            "of_peak": reached / self.peak if self.peak else None,
            "of_measured": reached / self.rate if self.rate else None,
        }


@dataclass(frozen=True)
class Case:
    """One entry of the JSON: `prepare` names its programs, `run` returns what it measured.

    Attributes:
      section: the cases of one share a budget, see `benchmarks.device`.
      least_s: seconds without which it is not begun at full scale.
      variant: other numbers than another case's; left out at tiny scale.
    """

    section: str
    name: str
    least_s: float
    prepare: Callable[[Context], None]
    run: Callable[[Context], dict[str, Any]]
    variant: bool = False


def nothing(context: Context) -> None:
    """For a case without programs of its own."""


def median_ms(call: Callable[[], Any], runs: int = RUNS) -> float:
    """Median wall time of a call after one that warms up."""
    times = []
    for index in range(runs + 1):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - begun))
        if index == 0:
            times.clear()
    return statistics.median(times)


# ---- the machine, and whether its arithmetic is right


def rates(context: Context) -> dict[str, Any]:
    """What the device reaches: a large bfloat16 product on random numbers, and a copy (bytes read and written)."""
    side, count = context.sizes.matmul, context.sizes.copied
    a, b = (hashed_uniform((side, side), seed).astype(jnp.bfloat16) for seed in (0, 1))
    long = hashed_uniform((count,), 2).astype(jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: -x)
    ms = {"matmul": median_ms(lambda: product(a, b)), "copy": median_ms(lambda: copy(long))}
    context.rate = 2.0 * side**3 / (1e-3 * ms["matmul"])
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "memory_gib": memory.get("bytes_limit", 0) / 2**30,
        "tflops": context.rate / 1e12,
        "of_peak": context.rate / context.peak if context.peak else None,
        "gb_per_s": 2 * long.nbytes / (1e6 * ms["copy"]),
    }


def error(found: Any, expected: Any) -> float:
    """|found - expected| / |expected|."""
    a, b = (np.asarray(x, np.float32) for x in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def attention_parity(context: Context) -> dict[str, Any]:
    """The device's kernel in bfloat16 against all scores in float32: outputs and gradients, all keys and some of them.

    Where a network with a cache fails, these go on with XLA's attention, so that the other cases can be measured.
    """
    queries, keys, heads, width = context.sizes.attention
    draw = lambda seed, length: hashed_uniform((1, length, heads, width), seed).astype(jnp.bfloat16)
    given = draw(0, queries), draw(1, keys), draw(2, keys)
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "masked": {"key_mask_T": jnp.arange(keys) % 3 < 2}}
    if "num_keys" in inspect.signature(dense).parameters:
        kinds["prefix"] = {"num_keys": jnp.int32(keys // 2)}
    backend = pick_backend("auto", jnp.dtype("bfloat16"))
    out: dict[str, Any] = {"backend": backend, "tolerance": 0.02}
    with jax.default_matmul_precision("highest"):
        for name, some in kinds.items():
            run = partial(_attention_and_gradients, some)
            expected = jax.jit(partial(run, "xla"))(*(x.astype(jnp.float32) for x in given))
            out[name] = problem_of(lambda run=run: jax.block_until_ready(jax.jit(partial(run, backend))(*given)))
            if out[name] is None:
                found = jax.jit(partial(run, backend))(*given)
                out[name] = dict(zip(("out", "dq", "dk", "dv"), map(error, found, expected), strict=True))
    out["network_with_a_cache"] = problem_of(lambda: small_stream(context.sizes))
    if out["network_with_a_cache"]:
        context.cached_attention = out["networks_go_on_with"] = "xla"
    errors = [max(out[name].values()) if isinstance(out[name], dict) else np.inf for name in kinds]
    out["right"] = max(errors) < out["tolerance"]
    return out


def problem_of(call: Callable[[], Any]) -> str | None:
    """What a call raises, None if it ends well."""
    try:
        call()
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"[:500]
    return None


def small_stream(sizes: Scale) -> None:
    """Two blocks of a network of one layer, by the kernels that the large one will have."""
    heads, width = 2, sizes.attention[3]
    config = replace(sizes.student, dim=heads * width, ffn_dim=64, num_heads=heads, num_layers=1, text_dim=16)
    model = random_like(jax.eval_shape(partial(Wan, config), jax.random.key(0)))
    sampler, text = FewStep(ONE), hashed_uniform((1, 8, 16), 0)
    pipeline = Pipeline(model, Bytes(None), sampler, Blocks(1))
    text_kv, noise = prompt_kv(model, text, text[0], sampler), seeded_noise(np.zeros(1, np.uint32))
    jax.block_until_ready(list(stream_latents(pipeline, text_kv, noise, num_frames=2, latent_shape=(4, 4, CHANNELS))))


def _attention_and_gradients(some: dict[str, Any], backend: str, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    weigh = lambda out: jnp.sum(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape) * out)
    out, back = jax.vjp(lambda *qkv: dense(*qkv, **some, backend=backend), q, k, v)
    return (out, *back(jax.grad(weigh)(out.astype(jnp.float32)).astype(out.dtype)))


def network_parity(context: Context) -> dict[str, Any]:
    """A network of a few layers in bfloat16, and with int8 weights, against float32 with the same weights."""
    sizes, out = context.sizes, {"tolerance": 0.05}
    config = replace(sizes.student, num_layers=sizes.layers, remat="none")
    wide = replace(config, attention="xla", precision=replace(config.precision, compute="float32"))
    shape = (1, 3, *sizes.latent, CHANNELS)
    x, sigma = hashed_uniform(shape, 3), jnp.full((1, 3), 0.7, jnp.float32)
    text, flow = context.text(arrays=True), jax.jit(_flow)
    with jax.default_matmul_precision("highest"):
        for storage in ("bfloat16", "int8"):
            model = context.network(f"{sizes.layers}_layers", config, storage, arrays=True)
            out[storage] = error(flow(model, x, sigma, text), flow(_widened(model, wide), x, sigma, text))
    out["right"] = max(out["bfloat16"], out["int8"]) < out["tolerance"]
    return out


def _flow(model: Wan, x: jax.Array, sigma: jax.Array, text: jax.Array) -> jax.Array:
    return model(x, sigma, embed_text(model, text))


def _widened(model: Wan, config: WanConfig) -> Wan:
    """The same network in float32."""
    template = jax.eval_shape(partial(Wan, config), jax.random.key(0))
    wide = lambda x: dequantize(x) if is_quantized(x) else x.astype(jnp.float32)
    leaves = [wide(x) for x in jax.tree.leaves(model, is_leaf=is_quantized)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def decoder_parity(context: Context) -> dict[str, Any]:
    """Both decoders in bfloat16 against float32, on a corner of the picture."""
    height, width = (min(side, 16) for side in context.sizes.latent)
    z = hashed_uniform((1, 2, height, width, CHANNELS), 4)
    out: dict[str, Any] = {"tolerance": 0.05}
    for name, kind in (("wan", WanVAE), ("tiny", TinyVAE)):
        codec = context.codec(name, arrays=True)
        config = replace(codec.config, precision=replace(codec.config.precision, compute="float32"))
        structure = jax.tree.structure(jax.eval_shape(partial(kind, config), jax.random.key(0)))
        wide = jax.tree.unflatten(structure, jax.tree.leaves(codec))
        decode = jax.jit(lambda codec, z: codec.decode(z))
        with jax.default_matmul_precision("highest"):
            out[name] = error(decode(codec, z), decode(wide, z))
    out["right"] = max(out["wan"], out["tiny"]) < out["tolerance"]
    return out


# ---- streams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bytes:
    """A decoder whose pixels are uint8 before they leave the device."""

    codec: Any

    def init_state(self, batch: int) -> Any:
        """The decoder's."""
        return self.codec.init_state(batch)

    def decode_step(self, latents_BFHWC: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The next frames of a stream."""
        video, state = self.codec.decode_step(latents_BFHWC, state)
        return jnp.round((video + 1.0) * 127.5).astype(jnp.uint8), state


@dataclass(frozen=True)
class Stream:
    """One way to stream: latent frames per block, steps, decoder ("": latents only), cache, storage of the weights."""

    frames: int
    steps: tuple[int, ...]
    decoder: str
    policy: str = "full"
    storage: str = "bfloat16"
    profile: bool = False

    @property
    def name(self) -> str:
        """As in "chunk-wise, 4 steps, Wan VAE"; what is usual is left out."""
        steps = f"{len(self.steps)} step{'s' * (len(self.steps) > 1)}"
        parts = [WAYS[self.frames], steps, DECODERS[self.decoder]]
        parts += [self.policy] if self.policy != "full" else []
        return ", ".join([*parts, *([f"{self.storage} weights"] if self.storage != "bfloat16" else [])])

    def blocks(self, sizes: Scale) -> Blocks:
        """The block layout."""
        bounds = {"full": (0, 0), "window": (sizes.window, 0), "sink": (sizes.window, sizes.sink)}[self.policy]
        return Blocks(self.frames, window=bounds[0], sink=bounds[1])

    def opened(self, context: Context, *, arrays: bool) -> Videos:
        """The stream with its weights on the device, or their shapes while what makes them is compiled."""
        sizes = context.sizes
        model = context.network("student", context.student(), self.storage, arrays=arrays)
        codec, text = context.codec(self.decoder, arrays=arrays), context.text(arrays=arrays)
        pipeline = Pipeline(model, Bytes(codec), FewStep(self.steps), self.blocks(sizes))
        return Videos(pipeline, text, text[0] if arrays else text, Sizes(sizes.frames, 0, *sizes.latent, codec.stride))

    def prepare(self, context: Context) -> None:
        """Names the programs of a whole video."""
        videos, call = self.opened(context, arrays=False), context.ahead.prepare
        pipeline, sizes = videos.pipeline, videos.sizes
        text_kv = prompt_kv(pipeline.model, videos.text_BSE, videos.negative_SE, pipeline.sampler, call)
        shape, state = (sizes.height, sizes.width, CHANNELS), pipeline.codec.init_state(1)
        noise = seeded_noise(np.zeros(1, np.uint32), call)
        for x0 in stream_latents(pipeline, text_kv, noise, num_frames=sizes.frames, latent_shape=shape, call=call):
            _, state = call(decode_step, pipeline.codec, x0, state)

    def run(self, context: Context) -> dict[str, Any]:
        """A video to warm up (with the profiler, if asked), and one that is measured."""
        context.free(f"make_student_{self.storage}", "make_wan", "make_tiny", "make_text")
        videos, kernels = self.opened(context, arrays=True), {}
        with traced(kernels) if self.profile else nullcontext():
            run_once(videos, 0, context.ahead)
        figures = stream_figures(context, videos, run_once(videos, 1, context.ahead))
        return {**figures, **({"kernels": kernels} if self.profile else {})}


def stream_figures(context: Context, videos: Videos, times: Times) -> dict[str, Any]:
    """Rates and shares, named as `cfjax bench` names them; "steady" is the last third of the blocks."""
    pipeline, sizes = videos.pipeline, videos.sizes
    size, rows = network_size(pipeline.model), videos.text_BSE.shape[1]
    tokens = pipeline.model.config.tokens_per_frame(sizes.height, sizes.width)
    passes = passes_of(pipeline.sampler, pipeline.blocks, sizes, tokens)
    network, whole = np.array(times.network), np.array(times.network) + np.array(times.decode)
    late = max(1, len(network) // 3)
    needed, last = (stream_need(size, part, rows) for part in (passes, passes[-late * len(passes) // len(network) :]))
    frames = sizes.pixels()[0]
    return {
        "frames_per_second": frames / float(whole.sum()),
        "steady_frames_per_second": 4 * pipeline.blocks.frames / float(np.median(whole[-late:])),
        "frames_per_second_without_decoder": frames / float(network.sum()),
        "first_frame_s": times.first_frame,
        "block_s": percentiles(list(whole[1:])),
        "network_s": times.network,
        "decoder_s": times.decode,
        "network": context.share(needed.flops, float(network.sum())),
        "network_steady": context.share(last.flops, float(network[-late:].sum())),
        "included": "the prompt's keys and values (first frame), decoder, copy of uint8 pixels to the host, commits; "
        "not: text encoder, compiling",
    }


# ---- decoders and encoder alone


def decoder_alone(name: str, frames: int) -> Case:
    """A later step of a decoder's stream, several times."""

    def later(context: Context, *, arrays: bool) -> tuple[Any, Any, Any]:
        codec = Bytes(context.codec(name, arrays=arrays))
        shape = (1, frames, *context.sizes.latent, CHANNELS)
        z, state = jax.ShapeDtypeStruct(shape, jnp.float32), codec.init_state(1)
        for _ in range(2):
            state = jax.eval_shape(decode_step, codec, z, state)[1]
        return codec, hashed_uniform(shape, 5) if arrays else z, zeros_if(arrays, state)

    def prepare(context: Context) -> None:
        codec, z, state = later(context, arrays=False)
        context.ahead.prepare(decode_step, codec, z, state)

    def run(context: Context) -> dict[str, Any]:
        codec, z, state = later(context, arrays=True)
        flops = (context.ahead.compiled(decode_step, codec, z, state).cost_analysis() or {}).get("flops", 0.0)

        def step() -> Any:
            nonlocal state
            video, state = context.ahead(decode_step, codec, z, state)
            return video

        ms, kernels = median_ms(step), {}
        with traced(kernels):
            jax.block_until_ready(step())
        return {"ms": ms, "frames_per_second": 4e3 * frames / ms, **context.share(flops, 1e-3 * ms), "kernels": kernels}

    return Case("vae", f"{DECODERS[name]} alone, {WAYS[frames]}", 8, prepare, run, variant=frames == 1)


def encoder_alone() -> Case:
    """Wan's encoder on a later piece of a clip, 12 frames."""

    def step(codec: Any, video_BPHWC: jax.Array, state: Any) -> Any:
        return codec.encode_step(video_BPHWC, state)

    def later(context: Context, *, arrays: bool) -> tuple[Any, Any, Any, Any]:
        codec = context.codec("wan", arrays=arrays)
        height, width = (8 * side for side in context.sizes.latent)
        first, rest = (jax.ShapeDtypeStruct((1, n, height, width, 3), jnp.float32) for n in (1, 12))
        state = jax.eval_shape(step, codec, first, codec.init_encode_state(1))[1]
        video = hashed_uniform(rest.shape, 6, 1.0) if arrays else rest
        return context.jitted("encode_step", step), codec, video, zeros_if(arrays, state)

    def prepare(context: Context) -> None:
        context.ahead.prepare(*later(context, arrays=False))

    def run(context: Context) -> dict[str, Any]:
        given = later(context, arrays=True)
        ms = median_ms(lambda: context.ahead(*given))
        return {"ms": ms, "frames_per_second": 12e3 / ms}

    return Case("vae", "Wan encoder alone, 12 frames", 10, prepare, run)


def fp8(context: Context) -> dict[str, Any]:
    """A stream with fp8 weights, once cfjax stores them."""
    if not any("8_e4m3" in storage or storage == "fp8" for storage in STORAGES):
        raise Skipped(f"cfjax stores weights as {', '.join(STORAGES)}: no fp8")
    name = next(storage for storage in STORAGES if "8_e4m3" in storage or storage == "fp8")
    return Stream(3, FOUR, "tiny", storage=name).run(context)


def stream_cases(section: str, *streams: Stream, least_s: float = 8, variants: bool = False) -> list[Case]:
    """A case per stream."""
    return [Case(section, stream.name, least_s, stream.prepare, stream.run, variants) for stream in streams]
