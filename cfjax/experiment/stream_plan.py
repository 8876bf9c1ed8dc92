"""A stream's programs from shapes alone, compiled for a machine that need not be attached; the rate that they allow.

The programs are those that `rollout.stream` calls: a call is noted, and answered with shapes. One device is compiled
for. Of several, the bound is the work divided evenly, without collectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.paths import is_folder, path_of
from cfjax.core.topology import Topology, parse_topology, shapes_of
from cfjax.experiment.job import blocks_of, sampler_of
from cfjax.experiment.runs import Run, open_run
from cfjax.experiment.speed import CallLog, network_size, passes_of
from cfjax.experiment.streams import RandomParts, random_codec, random_parts_of, random_run, sizes_of, with_blank
from cfjax.nn.attention import pick_backend
from cfjax.nn.cpu_conv import traced_for
from cfjax.planning.programs import Cost, compile_update
from cfjax.planning.progress import telling
from cfjax.planning.stream_cost import Need, stream_need
from cfjax.rollout.blocks import FusedCommit, fuses
from cfjax.rollout.clips import cache_bytes
from cfjax.rollout.generate import layout_of
from cfjax.rollout.sizes import Sizes
from cfjax.rollout.stream import Pipeline, decode_step, prompt_kv, seeded_noise, stream_latents
from cfjax.worlds.assets import META_FILE, asset

REAL_TIME = 16.0  # frames/s of Wan's videos


@dataclass(frozen=True)
class ProgramCost:
    """A program: its calls per batch of videos, the executed FLOPs of one call, and what the compiler says."""

    name: str
    calls: int
    flops: float
    cost: Cost

    @property
    def working(self) -> int:
        """Bytes besides its arguments."""
        return self.cost.peak - self.cost.arguments


@dataclass(frozen=True)
class Part:
    """The network or a decoder: its programs, bytes that stay, what a batch of videos needs."""

    name: str
    programs: list[ProgramCost]
    resident: int
    need: Need

    @property
    def working(self) -> int:
        """Bytes of its largest program besides its arguments."""
        return max(program.working for program in self.programs)


@dataclass(frozen=True)
class StreamPlan:
    """A stream on one device of a machine."""

    topology: Topology
    run: str
    pixels: tuple[int, int, int]
    batch: int
    attention: str
    network: Part
    decoders: list[Part] = field(default_factory=list)

    @property
    def choices(self) -> list[tuple[Part, ...]]:
        """Each of the decoders by itself; without any, the network alone."""
        return [(decoder,) for decoder in self.decoders] or [()]

    def memory(self, *decoders: Part) -> int:
        """Bytes in use at the most, with these decoders."""
        parts = (self.network, *decoders)
        return sum(part.resident for part in parts) + max(part.working for part in parts)

    def fits(self, *decoders: Part) -> bool | None:
        """Whether that is less than a device has; None on simulated ones."""
        return self.memory(*decoders) <= self.topology.memory if self.topology.memory else None

    def frames_per_second(self, *decoders: Part) -> float:
        """The bound of one device, all frames of the batch; 0 where the chip's peak is unknown."""
        chip = self.topology.chip
        bandwidth = chip.bandwidth / chip.devices
        seconds = sum(part.need.seconds(self.topology.flops, bandwidth) for part in (self.network, *decoders))
        return self.batch * self.pixels[0] / seconds if seconds else 0.0

    def smallest(self, *decoders: Part, target: float = REAL_TIME) -> str:
        """The smallest slice of this chip whose bound reaches `target` frames/s and that holds it; "" for none."""
        rate, memory = self.frames_per_second(*decoders) / self.batch, self.memory(*decoders)
        one = "x".join(["1"] * self.topology.chip.dimensions)
        for shape in dict.fromkeys((one, *shapes_of(self.topology.chip))):
            other = parse_topology(f"{self.topology.chip.name}:{shape}")
            if rate * other.devices >= target and memory <= other.memory * other.devices:
                return other.name
        return ""


def stream_shapes(c: ConfigDict, text_rows: int) -> tuple[Run, Sizes, RandomParts | None]:
    """The run of configs/generate.py or configs/bench.py in shapes, and its sizes; without one on disk a preset's.

    Raises:
      UserError: the run is bidirectional, or the sizes do not fit.
    """
    parts = None
    if c.run and (asset(c.run, META_FILE) or is_folder(path_of(c.run))):
        run = open_run(
            c.run,
            ema=c.ema,
            world=c.world,
            precision=c.precision,
            attention=c.attention,
            storage=c.storage,
            with_model=False,
        )
    else:
        if "preset" in c:
            parts = random_parts_of(c)
        else:
            wan = c.run == "checkpoints/causal_forcing"
            frames = c.expect.block_frames or RandomParts.block_frames
            rows = text_rows if wan else 8
            preset = "wan_1_3b" if wan else "toy"
            parts = RandomParts(preset, c.precision, c.storage, block_frames=frames, text_rows=rows)
        run = random_run(parts, c, shapes=True)
    if run.blocks is None:
        raise UserError(f"run={run.name!r} is bidirectional, and does not stream; name a causal one")
    return run, sizes_of(c, run, layout_of(sampler_of(c, run), blocks_of(c, run.blocks))), parts


def plan_stream(
    c: ConfigDict,
    topology: Topology,
    device: Any,
    *,
    text_rows: int,
    only: Sequence[str] = (),
    told: Callable[[str], None] = lambda line: None,
    quick: bool = False,
) -> StreamPlan:
    """Compiles everything that a stream of `c` runs, with each of the world's decoders, for one device.

    Args:
      only: the decoders that are compiled, or "network" for none of them; empty: all.
      told: gets lines about each program: before it is compiled, which may take minutes, meanwhile, and after.
      quick: see `compile_update`.

    Raises:
      UserError: see `stream_shapes`; or no such decoder.
    """
    run, sizes, parts = stream_shapes(c, text_rows)
    codecs = decoders_of(run, parts)
    if unknown := sorted(set(only) - {"network", *codecs}):
        raise UserError(f"--only={unknown[0]}: use network, {', '.join(codecs)}")
    config, platform = run.model.config, topology.chip.platform
    backend = pick_backend("auto", jnp.dtype(config.precision.compute), platform) if platform == "tpu" else "chunked"
    model = with_backend(run.model, backend)
    sampler = sampler_of(c, run)
    blocks = layout_of(sampler, blocks_of(c, run.blocks))
    fused: FusedCommit = "on" if fuses("auto", platform, memory=blocks.memory if blocks else None) else "off"
    pipeline = Pipeline(with_blank(model, sizes), run.world.codec, sampler, blocks, fused)
    rows, batch = run.world.text_length, c.batch
    log, latents = record_network(pipeline, sizes, (batch, rows, config.text_dim))
    tokens = config.tokens_per_frame(sizes.height, sizes.width)
    passes = passes_of(pipeline.sampler, pipeline.blocks, sizes, tokens)
    size = network_size(model)
    resident = size.weight_bytes + cache_bytes(model, pipeline.sampler, pipeline.blocks, sizes, batch)
    programs = compiled("network", log, topology, device, told, quick)
    network = Part("network", programs, resident, stream_need(size, passes, rows, batch))
    decoders = []
    with traced_for(platform):
        for name, codec in codecs.items():
            if only and name not in only:
                continue
            log, state = record_decoder(codec, latents, batch)
            programs, own = compiled(name, log, topology, device, told, quick), bytes_of((codec, state))
            moved = sum(program.calls * (program.cost.arguments + bytes_of(state)) for program in programs)
            need = Need(sum(program.calls * program.flops for program in programs), float(moved))
            decoders.append(Part(name, programs, own, need))
    return StreamPlan(topology, run.name, sizes.pixels(), batch, backend, network, decoders)


def with_backend(model: Any, backend: str) -> Any:
    """The network's shapes with another attention."""
    other = jax.eval_shape(lambda: type(model)(replace(model.config, attention=backend), jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model)) if _alike(other, model) else model


def _alike(one: Any, other: Any) -> bool:
    return len(jax.tree.leaves(one)) == len(jax.tree.leaves(other))


def decoders_of(run: Run, parts: RandomParts | None) -> dict[str, Any]:
    """The run's own decoder in shapes; both of Wan's where weights are random."""
    if parts is None or parts.toy:
        return {type(run.world.codec).__name__: jax.eval_shape(lambda: run.world.codec)}
    policy = replace(run.model.config.precision, norm="float32")
    channels = run.model.config.out_dim
    return {name: jax.eval_shape(partial(random_codec, name, policy, channels)) for name in ("vae", "tiny_vae")}


def bytes_of(tree: Any) -> int:
    """Bytes of a pytree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def record_network(
    pipeline: Pipeline, sizes: Sizes, text_shape: tuple[int, int, int]
) -> tuple[CallLog, list[jax.ShapeDtypeStruct]]:
    """The network's calls for a batch of videos, and the latents' shapes of every block; nothing is computed."""
    log = CallLog()
    call = recording(log)
    text = jax.ShapeDtypeStruct(text_shape, jnp.float32)
    negative: Any = np.zeros(text_shape[1:], np.float32)
    text_kv = prompt_kv(pipeline.model, text, negative, pipeline.sampler, call)  # type: ignore[arg-type]
    noise = seeded_noise(np.zeros(text_shape[0], np.uint32), call)
    latent_shape = (sizes.height, sizes.width, pipeline.model.config.in_dim)
    blocks = stream_latents(
        pipeline,
        text_kv,
        noise,
        num_frames=sizes.generated,
        latent_shape=latent_shape,
        batch=text_shape[0],
        call=call,
    )
    return log, list(blocks)  # type: ignore[arg-type]


def recording(log: CallLog) -> Callable[..., Any]:
    """Calls a jitted function for its results' shapes alone."""

    def call(function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        shapes = log.note(function, args, static)
        return jax.eval_shape(partial(function, **static), *shapes)

    return call


def record_decoder(codec: Any, latents: list[Any], batch: int) -> tuple[CallLog, Any]:
    """A decoder's calls for a stream of latents, and its last state's shapes."""
    log = CallLog()
    call, state = recording(log), codec.init_state(batch)
    for x0 in latents:
        _, state = call(decode_step, codec, x0, state)
    return log, state


def compiled(
    part: str, log: CallLog, topology: Topology, device: Any, told: Callable[[str], None], quick: bool
) -> list[ProgramCost]:
    """Every program of a log with arguments, compiled for a device; `told` and `quick` as in `plan_stream`."""
    place, out = SingleDeviceSharding(device), list[ProgramCost]()
    calls = {key: call for key, call in log.calls.items() if jax.tree.leaves(call[1])}  # without: an empty cache
    for number, (key, (function, shapes, static)) in enumerate(calls.items(), 1):
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        name = "decode" if function is decode_step else getattr(function, "__name__", "program").strip("_")
        with telling(told, f"{name} of the {part} ({number} of {len(calls)}), {counted(log.times[key], 'call')}"):
            lowered = function.lower(*placed, **static)  # type: ignore[attr-defined]
            cost = compile_update(name, lowered, topology, arguments=bytes_of(shapes), trip_counts={}, quick=quick)
        out.append(ProgramCost(name, log.times[key], log.flops_of(key), cost))
    return out


def stream_table(plan: StreamPlan) -> list[str]:
    """A plan's lines for the terminal."""
    gib, topology = 2**30, plan.topology
    frames, height, width = plan.pixels
    lines = [
        f"{plan.run} on one device of {topology.name}: {counted(frames, 'frame')} of {width} x {height}, "
        f"batch {plan.batch}, attention {plan.attention}",
        "GiB           program  calls  GFLOP each  arguments  temporaries     peak  compiled in, s",
    ]
    for part in (plan.network, *plan.decoders):
        for p in part.programs:
            sizes = f"{p.cost.arguments / gib:9.3f}  {p.cost.temporaries / gib:11.3f}  {p.cost.peak / gib:7.3f}"
            lines.append(
                f"{part.name:<9} {p.name:>11}  {p.calls:5d}  {p.flops / 1e9:10.4g}  {sizes}  "
                f"{p.cost.compile_seconds:14.0f}"
            )
    per_frame = 1 / (plan.batch * frames)
    need = plan.network.need
    flops, moved = need.flops * per_frame / 1e9, need.bytes * per_frame / 1e9
    lines.append(f"needed of the network, a frame: {flops:.4g} GFLOP, {moved:.4g} GB")
    if plan.decoders and (rate := plan.frames_per_second()):
        lines.append(f"without decoder: {rate:.1f} frames/s at the most")
    for chosen in plan.choices:
        verdict = {True: "fits", False: "does not fit", None: "simulated, no verdict"}[plan.fits(*chosen)]
        memory = f"{plan.memory(*chosen) / gib:.2f}" + (f" of {topology.memory / gib:.1f}" if topology.memory else "")
        with_decoder = f"with {chosen[0].name}" if chosen else "without decoder"
        line = f"{with_decoder}: {memory} GiB, {verdict}"
        if rate := plan.frames_per_second(*chosen):
            smallest = plan.smallest(*chosen) or "none of this chip"
            line += f"; {rate:.1f} frames/s at the most; {REAL_TIME:.0f} frames/s from {smallest}"
        lines.append(line)
    return lines
