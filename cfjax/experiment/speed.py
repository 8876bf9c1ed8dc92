"""How fast videos stream: rates, latencies, network passes, FLOPs executed and needed, memory."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.programs import Programs
from cfjax.core.quantize import is_quantized
from cfjax.core.topology import peak_bandwidth, peak_flops
from cfjax.core.tree import map_named, named_leaves
from cfjax.memory.rolling import RollingForcing
from cfjax.memory.slots import Seen
from cfjax.models.experts import Conditioned
from cfjax.models.wan import Wan, WanConfig
from cfjax.nn.visibility import Blocks
from cfjax.planning.flops import count_flops
from cfjax.planning.stream_cost import Need, NetworkSize, Pass, stream_need, text_flops
from cfjax.rollout.blocks import given_blocks, layout_from
from cfjax.rollout.clips import Times, cache_bytes, make_clips
from cfjax.rollout.generate import FewStep, ManyStep, layout_of, network_calls
from cfjax.rollout.sizes import Sizes
from cfjax.rollout.stream import Pipeline, decode_step, seeded_noise

PERCENTILES = (50, 95, 99)
MATRIX = 2048  # side of the products that tell the rate of a processor without a data sheet


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoDecoder:
    """Hands latents on, for streams without pixels."""

    def init_state(self, batch: int) -> tuple[()]:
        """Nothing."""
        return ()

    def decode_step(self, latents_BFHWC: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """The latents."""
        return latents_BFHWC, state


class CallLog:
    """Calls of jitted functions by what is compiled for them: function, shapes, static arguments.

    Attributes:
      times: how often each was called since the last `restart`.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {}
        self.times: dict[Any, int] = {}

    def note(self, function: Callable[..., Any], args: tuple[Any, ...], static: dict[str, Any]) -> tuple[Any, ...]:
        """Counts a call; returns its arguments' shapes."""
        shapes = jax.eval_shape(lambda *given: given, *args)
        key = (function, jax.tree.structure(shapes), *jax.tree.leaves(shapes), *sorted(static.items()))
        self.calls.setdefault(key, (function, shapes, static))
        self.times[key] = self.times.get(key, 0) + 1
        return shapes

    def flops_of(self, key: Any) -> float:
        """FLOPs of one call."""
        function, shapes, static = self.calls[key]
        return count_flops(lambda *args: function(*args, **static), *map(_dense, shapes))

    def flops(self) -> dict[str, float]:
        """FLOPs of all calls since the last `restart`: of the network, and of the decoder."""
        out = {"network": 0.0, "decoder": 0.0}
        for key, times in self.times.items():
            out["decoder" if self.calls[key][0] is decode_step else "network"] += times * self.flops_of(key)
        return out

    def restart(self) -> None:
        """Counts calls from here."""
        self.times.clear()


class CountedPrograms(Programs):
    """Programs with a log of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.log = CallLog()

    def __call__(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """See `Programs`."""
        self.log.note(function, args, static)
        return super().__call__(function, *args, **static)


def _dense(argument: Any) -> Any:
    """A network with the attention whose FLOPs `count_flops` sees: kernels have none in a jaxpr."""
    if isinstance(argument, Conditioned):
        image = None if argument.image is None else argument.image.get_value()
        return jax.eval_shape(Conditioned, _dense(argument.network), argument.condition.get_value(), image)
    if not isinstance(argument, Wan):
        return argument
    config = replace(argument.config, attention="xla")
    other = jax.eval_shape(lambda: Wan(config, jax.random.key(0)))
    named = named_leaves(argument, is_quantized)
    return map_named(lambda name, _: named[name], other)


@dataclass(frozen=True)
class Stream:
    """What is measured: a pipeline (its codec may be a `NoDecoder`), text rows, sizes."""

    pipeline: Pipeline
    text_BSE: np.ndarray
    negative_SE: np.ndarray
    sizes: Sizes

    @property
    def batch(self) -> int:
        """Videos at a time."""
        return len(self.text_BSE)


def network_size(model: Wan) -> NetworkSize:
    """A network's sizes, for `planning.stream_cost`."""
    config: WanConfig = model.config
    patch = config.patch[0] * config.patch[1]
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    wide = jnp.dtype(config.precision.compute).itemsize
    return NetworkSize(
        dim=config.dim,
        ffn_dim=config.ffn_dim,
        layers=config.num_layers,
        inputs=patch * config.in_dim,
        outputs=patch * config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        weight_bytes=stored,
        cache_bytes=wide,
    )


def passes_of(sampler: FewStep | ManyStep, blocks: Blocks | None, sizes: Sizes, tokens_per_frame: int) -> list[Pass]:
    """The network calls that one video needs: denoising steps, commits of all blocks but the last; guided: twice."""
    if isinstance(sampler, FewStep) and sampler.rolling:
        return _rolling_passes(sampler, blocks, sizes, tokens_per_frame)
    twice, total = (2 if isinstance(sampler, ManyStep) else 1), sizes.frames
    if blocks is None:
        calls = network_calls(sampler, None, total)
        return [Pass(total, total * tokens_per_frame, total * tokens_per_frame)] * calls

    def call(start: int, stop: int, commits: bool) -> Pass:
        if blocks.memory is not None:
            past = min(start, blocks.memory.slots(blocks))
        else:
            past = sum(b - a for a, b in blocks.visible_before(start, stop))
        seen = stop - start + past
        return Pass(stop - start, (stop - start) * tokens_per_frame, seen * tokens_per_frame, commits)

    out: list[Pass] = []
    before = blocks.spans(sizes.given)[: given_blocks(blocks, sizes.given)] if sizes.given else []
    out += [call(*span, True) for span in before for _ in range(twice)]
    spans = layout_from(blocks, sizes.given).spans(sizes.generated)
    for index, (start, stop) in enumerate(spans):
        if isinstance(sampler, FewStep):
            steps = len(sampler.first_sigmas() if index == 0 else sampler.sigmas())
        else:
            steps = network_calls(sampler, None, total)
        span = sizes.given + start, sizes.given + stop
        commits = twice if index + 1 < len(spans) else 0
        out += [call(*span, False)] * steps + [call(*span, True)] * commits
    return out


def _rolling_passes(sampler: FewStep, blocks: Blocks | None, sizes: Sizes, tokens_per_frame: int) -> list[Pass]:
    """Passes over the windows' blocks that exist, and commits."""
    layout = layout_of(sampler, blocks)
    assert layout is not None and isinstance(layout.memory, RollingForcing)
    windows = layout.memory.plan_windows(sizes.frames, layout, len(sampler.steps), sizes.given)
    commits = layout.memory.plan(sizes.frames, layout)[:-1]

    def call(seen: Seen, commits: bool) -> Pass:
        own, keys = len(seen.own), len(seen.own) + len(seen.frames)
        return Pass(own, own * tokens_per_frame, keys * tokens_per_frame, commits)

    return [call(seen, False) for seen in windows] + [call(seen, True) for seen in commits]


@dataclass(frozen=True)
class Speed:
    """Figures of one stream; seconds of a batch, frames are pixel frames of all its videos.

    Attributes:
      cold_s, cold_first_frame_s: of the first batch, with compiling (`compile_s`).
      warm: of every further batch.
      frames: of a batch.
      network_calls: per video.
      executed_network, executed_decoder: FLOPs of a batch, counted on the programs with dense attention.
      needed: by arithmetic, of the network.
      peak_flops, bandwidth: of the chip, 0 is unknown.
    """

    cold_s: float
    cold_first_frame_s: float
    compile_s: float
    warm: list[Times]
    frames: int
    network_calls: int
    programs: int
    executed_network: float
    executed_decoder: float
    needed: Need
    peak_flops: float
    bandwidth: float
    weight_bytes: int
    kv_cache_bytes: int
    temporary_bytes: int
    peak_device_bytes: int | None
    peak_host_bytes: int

    def record(self) -> dict[str, Any]:
        """Plain numbers, with rates and percentiles."""
        network = [times.text + sum(times.network) for times in self.warm]
        whole = [seconds + sum(times.decode) for seconds, times in zip(network, self.warm, strict=True)]
        blocks = [n + d for t in self.warm for n, d in zip(t.network, t.decode, strict=True)]
        bound = self.needed.seconds(self.peak_flops, self.bandwidth)
        made = {name: value for name, value in vars(self).items() if name not in ("warm", "needed")}
        return made | {
            "batches": len(self.warm),
            "frames_per_second": self.frames / float(np.median(whole)),
            "frames_per_second_without_decoder": self.frames / float(np.median(network)),
            "first_frame_s": float(np.median([times.first_frame for times in self.warm])),
            "block_s": percentiles(blocks),
            "block_network_s": percentiles([x for times in self.warm for x in times.network]),
            "block_decoder_s": percentiles([x for times in self.warm for x in times.decode]),
            "prompt_s": float(np.median([times.text for times in self.warm])),
            "needed": asdict(self.needed),
            "executed_over_needed": self.executed_network / self.needed.flops,
            "network_flops_per_s": self.needed.flops / float(np.median(network)),
            "bound_s": bound,
            "share_of_roofline": bound / float(np.median(network)),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99."""
    return {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}


def matrix_flops(compute: str) -> float:
    """FLOP/s of large matrix products on this machine, the best of some: the roof of a CPU, which has no data sheet."""
    x = jnp.ones((MATRIX, MATRIX), compute)
    multiply = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    jax.block_until_ready(multiply(x))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(multiply(x))
        best = min(best, time.perf_counter() - start)
    return 2.0 * MATRIX**3 / best


def chip_rates(compute: str) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of this process's device at its peak: the vendor's, or a CPU's measured one and 0."""
    kind = jax.devices()[0].device_kind
    known = peak_flops(kind)
    return (known, peak_bandwidth(kind)) if known else (matrix_flops(compute), 0.0)


def run_once(stream: Stream, seed: int, programs: Programs) -> Times:
    """One batch of videos; pixels are not kept."""
    return make_clips(
        stream.pipeline,
        stream.text_BSE,
        stream.negative_SE,
        seeded_noise(np.arange(seed, seed + stream.batch, dtype=np.uint32), programs),
        stream.sizes,
        finish=lambda pixels: pixels[:, :, :1, :1],
        programs=programs,
    ).times


def measure_stream(stream: Stream, *, batches: int = 3, seed: int = 0) -> Speed:
    """Streams a batch of videos cold, then `batches` more; in a fresh process, cold includes every compilation."""
    pipeline, sizes, programs = stream.pipeline, stream.sizes, CountedPrograms()
    start = time.perf_counter()
    first = run_once(stream, seed, programs)
    cold = time.perf_counter() - start
    warm = []
    for number in range(batches):
        programs.log.restart()
        warm.append(run_once(stream, seed + (1 + number) * stream.batch, programs))
    executed = programs.log.flops()
    tokens = pipeline.model.config.tokens_per_frame(sizes.height, sizes.width)
    size, rows = network_size(pipeline.model), stream.text_BSE.shape[1]
    passes = passes_of(pipeline.sampler, pipeline.blocks, sizes, tokens)
    prompts = 2 if isinstance(pipeline.sampler, ManyStep) else 1
    flops, bandwidth = chip_rates(pipeline.model.config.precision.compute)
    memory = jax.devices()[0].memory_stats() or {}
    generated = sizes.pixels()[0] - (1 + sizes.stride[0] * (sizes.given - 1) if sizes.given else 0)
    return Speed(
        cold_s=cold,
        cold_first_frame_s=programs.seconds + first.first_frame,
        compile_s=programs.seconds,
        warm=warm,
        frames=generated * stream.batch,
        network_calls=network_calls(pipeline.sampler, pipeline.blocks, sizes.generated, sizes.given),
        programs=programs.count,
        executed_network=executed["network"],
        executed_decoder=executed["decoder"],
        needed=stream_need(size, passes, rows, stream.batch)
        + Need(prompts * stream.batch * text_flops(size, rows), 0.0),
        peak_flops=flops,
        bandwidth=bandwidth,
        weight_bytes=size.weight_bytes,
        kv_cache_bytes=cache_bytes(pipeline.model, pipeline.sampler, pipeline.blocks, sizes, stream.batch),
        temporary_bytes=programs.temporary_bytes,
        peak_device_bytes=memory.get("peak_bytes_in_use"),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )
