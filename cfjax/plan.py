"""`cfjax plan`: compiles an experiment's real updates for a machine that need not be attached; their cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax

from cfjax.core.cli import Flag, given_keys, parse
from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.paths import write_atomically
from cfjax.core.sharding import abstract_mesh, batch_shards, make_mesh
from cfjax.core.topology import GIB, Topology, open_topology, parse_topology, simulate_devices
from cfjax.experiment.build import Experiment, build
from cfjax.experiment.data import Shapes
from cfjax.experiment.notes import other_sizes
from cfjax.experiment.programs import expected_trip_counts, lower_update, stage_memory, whole_flops, with_attention
from cfjax.experiment.stream_plan import plan_stream, stream_table
from cfjax.models.vae import published_vae
from cfjax.planning.programs import Cost, compile_update
from cfjax.planning.progress import telling
from cfjax.planning.search import Candidate, candidates, overrides
from cfjax.training.memory import memory_table, needed_bytes

DESCRIPTION = """Compiles every update of a training stage for a slice, a cluster or simulated devices, without them and
without allocating anything, and prints what each device needs: arguments, temporaries, peak against its memory, FLOPs
and their time at the chip's peak, collectives by kind, a verdict. --fit=N compiles up to N more machines of the same
chip to find the smallest that holds it. Exit code 1: it does not fit. Takes minutes for full networks.
With configs/generate.py or configs/bench.py: the programs of a stream and its decoders on one device of the machine,
what the chip's peak allows in frames/s, and the smallest slice for real time."""
FLAGS = (
    Flag("topology", "v4|v5e|v5p|v6e|tpu7x:SHAPE, h100:HOSTSxGPUS or cpu:N, such as v5p:4x4x4", required=True),
    Flag("fit", "compile up to so many more machines of this chip to find the smallest that fits", kind=int, default=0),
    Flag("frames", "of a video, where the data is Wan's", kind=int, default=81),
    Flag("height", "pixels, where the data is Wan's", kind=int, default=480),
    Flag("width", "pixels, where the data is Wan's", kind=int, default=832),
    Flag("text", "rows of a prompt, where the data is Wan's", kind=int, default=512),
    Flag("hlo", "write the compiled programs' HLO text, WORKDIR/ROLE.hlo.gz", kind=bool, default=False),
    Flag(
        "quick", "compile with the least effort: far sooner, mostly with larger temporaries", kind=bool, default=False
    ),
    Flag("only", "comma-separated roles that are compiled; of a stream decoders, or network (empty: all)", default=""),
)
TOY_PATCH, TOY_TEXT = 8, 64


@dataclass(frozen=True)
class Plan:
    """What one machine and mesh cost; `costs` has an entry per trained role."""

    topology: Topology
    mesh: dict[str, int]
    batch: int
    accumulate: dict[str, int]
    attention: str
    persistent: int  # bytes per device between updates
    costs: list[Cost]
    quick: bool = False  # compiled with the least effort

    @property
    def fits(self) -> bool | None:
        """Whether every update does; None on simulated devices."""
        verdicts = [cost.fits for cost in self.costs]
        return None if None in verdicts else all(verdicts)


def main(argv: Sequence[str]) -> int:
    """Parses the command line and plans; 0 if it fits, else 1."""
    c, workdir, flags = parse("plan", argv, description=DESCRIPTION, extra_flags=FLAGS, default_workdir="runs/plan")
    streams = "sampler" in c and "window" in c
    if not streams and ("roles" not in c or "optim" not in c or not c.optim):
        raise UserError("cfjax plan compiles training stages and streams: give configs/dmd.py, say, or generate.py")
    topology = parse_topology(flags["topology"])
    simulate_devices(topology)
    if streams:
        return plan_streaming(c, argv, topology, flags, workdir / "plan.json")
    e = build(c, given_keys(argv)).with_sizes()
    for note in other_sizes(e):
        say(note)
    shapes, only = shapes_of(e, flags), [role for role in flags["only"].split(",") if role]
    devices = open_topology(topology)
    keep, quick = workdir if flags["hlo"] else None, flags["quick"]
    plans = [plan(e, shapes, topology, devices, only=only, verbose=True, keep=keep, quick=quick)]
    report(e, plans[0])
    if flags["fit"] > 0:
        plans += smallest(e, shapes, plans[0], flags["fit"], only)
    record(workdir / "plan.json", argv, e, plans)
    return 1 if plans[0].fits is False else 0


def plan_streaming(c: Any, argv: Sequence[str], topology: Topology, flags: Mapping[str, Any], file: Path) -> int:
    """Plans a stream, prints and records it; 0 if it fits (with one of the decoders), or on simulated devices."""
    only = [name for name in flags["only"].split(",") if name]
    device = open_topology(topology)[0]
    quick = flags["quick"]
    found = plan_stream(c, topology, device, text_rows=flags["text"], only=only, told=say, quick=quick)
    say("\n".join(stream_table(found)))
    bounds = [
        {
            "decoder": chosen[0].name if chosen else "none",
            "memory": found.memory(*chosen),
            "fits": found.fits(*chosen),
            "frames_per_second": found.frames_per_second(*chosen),
            "smallest": found.smallest(*chosen),
        }
        for chosen in found.choices
    ]
    made = {"command": ["cfjax", "plan", *argv], "jax": jax.__version__, "stream": asdict(found), "bounds": bounds}
    made["quick"] = quick
    write_atomically(file, json.dumps(made, indent=1))
    say(f"{file}")
    return 0 if any(bound["fits"] is not False for bound in bounds) else 1


def shapes_of(e: Experiment, flags: Mapping[str, Any]) -> Shapes:
    """A sample's shapes: the toy's from its config, Wan's from the flags.

    Raises:
      UserError: a size that the autoencoder does not take.
    """
    if toy := e.data.toy:
        side = toy.shapes.size // TOY_PATCH
        return Shapes((toy.shapes.frames, side, side, toy.channels), (toy.text_length, TOY_TEXT))
    sizes = e.networks["student"].base
    time, height, width = published_vae(sizes.out_dim).stride
    if flags["frames"] % time != 1:
        raise UserError(f"--frames={flags['frames']}: use 1 + a multiple of {time}")
    for name, stride in (("height", 2 * height), ("width", 2 * width)):
        if flags[name] % stride or flags[name] < stride:
            raise UserError(f"--{name}={flags[name]}: use a multiple of {stride}")
    frames = 1 + flags["frames"] // time
    latents = (frames, flags["height"] // height, flags["width"] // width, sizes.out_dim)
    return Shapes(latents, (flags["text"], sizes.text_dim))


def plan(
    e: Experiment,
    shapes: Shapes,
    topology: Topology,
    devices: Sequence[Any],
    *,
    only: Sequence[str],
    verbose: bool = False,
    keep: Path | None = None,
    quick: bool = False,
) -> Plan:
    """Compiles the updates of an experiment (those of `only`, or all) for `devices`.

    Args:
      verbose: print the memory of the weights before compiling; what is compiled is said in any case.
      keep, quick: see `compile_update`.

    Raises:
      UserError: the mesh or the batch does not fit the devices, or an unknown role.
    """
    if unknown := sorted(set(only) - set(e.stage.losses)):
        raise UserError(f"--only={unknown[0]}: stage {e.stage.name} trains {', '.join(e.stage.losses)}")
    mesh = make_mesh(**e.mesh, devices=devices)
    accumulate = {role: e.accumulate(role) for role in e.stage.losses}
    for role, count in accumulate.items():
        parts = batch_shards(mesh) * count
        if e.data.batch_size % parts:
            raise UserError(
                f"data.batch_size={e.data.batch_size} does not divide over mesh data x fsdp x optim.{role}.accumulate"
                f" = {parts} parts"
            )
    used, attention = with_attention(e, topology.chip.platform)
    memory = stage_memory(used, shapes, mesh)
    if verbose:
        say(
            f"{e.stage.name} on {topology.name}, {counted(len(devices), 'device')}; before activations, GiB per device:"
        )
        say("\n".join(memory_table(memory)))
    costs, trip_counts = list[Cost](), expected_trip_counts(e, shapes.latents[0])
    roles = list(only or e.stage.losses)
    for number, role in enumerate(roles, 1):
        with telling(say, f"the {role}'s update for {topology.name} ({number} of {len(roles)})"):
            needed, executed = (whole_flops(e, shapes, role, remat=remat) / len(devices) for remat in (False, True))
            lowered, arguments = lower_update(used, shapes, mesh, role)
            cost = compile_update(
                role, lowered, topology, arguments=arguments, trip_counts=trip_counts, keep=keep, quick=quick
            )
        costs.append(replace(cost, flops=needed, executed=executed))
    resting = needed_bytes(memory)
    return Plan(topology, dict(e.mesh), e.data.batch_size, accumulate, attention, resting, costs, quick)


def smallest(e: Experiment, shapes: Shapes, first: Plan, tries: int, only: Sequence[str]) -> list[Plan]:
    """Up to `tries` more plans, machines of one chip from the smallest that might do; ends at the first that fits."""

    @cache
    def persistent(sizes: tuple[tuple[str, int], ...], accumulated: bool) -> int:
        mesh = dict(sizes)
        shape: Any = abstract_mesh(**mesh)
        return needed_bytes(stage_memory(changed(e, Candidate("", mesh, 1 + accumulated)), shapes, shape))

    heads = [role.network(shapes).num_heads for role in e.networks.values()]
    worst = max(first.costs, key=lambda cost: cost.peak)
    activations = max(worst.peak - first.persistent, 0)
    out: list[Plan] = []
    for candidate in candidates(first.topology, first.mesh, first.accumulate[worst.role], e.data.batch_size, heads):
        estimate = persistent(tuple(candidate.mesh.items()), candidate.accumulate > 1) + activations * candidate.share
        if estimate > 1.2 * first.topology.memory or len(out) == tries:
            continue
        topology = parse_topology(candidate.topology)
        found = plan(changed(e, candidate), shapes, topology, open_topology(topology), only=only, quick=first.quick)
        out.append(found)
        peak = max(cost.peak for cost in found.costs) / GIB
        say(f"  {topology.name}  {overrides(candidate, e.stage.losses)}  peak {peak:.1f} GiB: {verdict(found)}")
        if found.fits:
            break
    return out


def changed(e: Experiment, candidate: Candidate) -> Experiment:
    """The experiment with a candidate's mesh and microbatches."""
    accumulate = dict.fromkeys(e.schedule.accumulate, candidate.accumulate)
    return replace(e, mesh={**e.mesh, **candidate.mesh}, schedule=replace(e.schedule, accumulate=accumulate))


def verdict(found: Plan) -> str:
    """Whether it fits; simulated devices have no verdict."""
    return {True: "fits", False: "does not fit", None: "simulated, no verdict"}[found.fits]


def report(e: Experiment, found: Plan) -> None:
    """Prints a plan."""
    topology, chip = found.topology, found.topology.chip
    sizes = " ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    stand_in = "" if chip.platform == "tpu" else " (stands in for a flash kernel)"
    say(f"mesh {sizes}; batch {found.batch}, accumulate {found.accumulate}; attention {found.attention}{stand_in}")
    say("GiB per device  arguments  temporaries     peak   (live)  FLOP needed  executed  s at peak  compiled in, s")
    for cost in found.costs:
        bytes_ = (cost.arguments, cost.temporaries, cost.peak, cost.live)
        gib = "  ".join(f"{size / GIB:{width}.2f}" for size, width in zip(bytes_, (9, 11, 7, 7), strict=True))
        work = f"{cost.flops:11.3g}  {cost.executed:8.3g}  {cost.seconds(topology):9.3f}"
        say(f"{cost.role:<14}  {gib}  {work}  {cost.compile_seconds:14.0f}")
    for cost in found.costs:
        if cost.problem:
            say(f"{cost.role}: {cost.problem}")
        kinds = sorted(cost.traffic.items())
        moved = ", ".join(f"{kind} {t.runs:,.0f} of {t.bytes / GIB:,.1f} GiB" for kind, t in kinds)
        seconds = cost.traffic_bytes() * chip.devices / chip.interconnect if chip.interconnect else 0.0
        say(
            f"collectives of {cost.role}: {moved or 'none'}"
            + (f"; {seconds:.2f} s at the chip's links" * (seconds > 0))
        )
        if chip.platform == "tpu" and not cost.problem:
            say(f"kernels of {cost.role}: {', '.join(cost.kernels) or 'no flash kernel'}")
    if chip.flops and len(found.costs) == len(found.accumulate):
        least = sum(cost.seconds(topology) / e.stage.cadence.get(cost.role, 1) for cost in found.costs)
        say(f"an iteration takes {least:.2f} s at least, at the chip's peak")
    most = max((cost.peak for cost in found.costs), default=0) / GIB
    limit = f" of {topology.memory / GIB:.1f}" if topology.memory else ""
    if found.quick:
        say("--quick: temporaries are not those of the programs that training compiles, mostly larger")
    say(f"verdict: {verdict(found)}; at most {most:.1f}{limit} GiB per device")


def record(file: Path, argv: Sequence[str], e: Experiment, plans: Sequence[Plan]) -> None:
    """Writes the plans as JSON, atomically."""
    recorded = {"persistent": "resting"}  # fields whose keys in plan.json are older
    entries = [
        {recorded.get(key, key): value for key, value in asdict(found).items()}
        | {"fits": found.fits, "devices": found.topology.devices}
        for found in plans
    ]
    made = {
        "command": ["cfjax", "plan", *argv],
        "jax": jax.__version__,
        "config": dict(e.config),
        "plans": entries,
    }
    write_atomically(file, json.dumps(made, indent=1))
    say(f"{file}")
