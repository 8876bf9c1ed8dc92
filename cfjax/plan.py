"""`cfjax plan`: compiles an experiment's real updates for a machine that need not be there, and says what they cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cfjax.core.cli import Flag, given_keys, parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.paths import write_atomically
from cfjax.core.sharding import abstract_mesh, batch_sharding, batch_shards, make_mesh, on_mesh, replicated
from cfjax.core.topology import GIB, Topology, open_topology, parse_topology, simulate_devices
from cfjax.experiment.config import blocks_of, branch_config, dmd_config, optimizers_of, stage_of
from cfjax.experiment.networks import codec_template, role_template, stage_memory, with_codec
from cfjax.experiment.reference import faithful
from cfjax.models.codec import Codec
from cfjax.models.discriminator import TAP, tapped_layers
from cfjax.models.wan import preset
from cfjax.nn.attention import pick_backend
from cfjax.objectives.diffusion import CORRECTIVE
from cfjax.objectives.stage import Stage
from cfjax.planning.flops import count_flops
from cfjax.planning.programs import Cost, compile_update
from cfjax.planning.search import Candidate, candidates, overrides
from cfjax.rollout.blocks import COUNTED_BLOCKS
from cfjax.rollout.long_video import FIRST_REENCODED, LAST_PICTURE
from cfjax.rollout.self_forcing import BEFORE_EXIT, COMMIT
from cfjax.training.memory import abstract_state, device_bytes, memory_table, needed_bytes
from cfjax.training.placement import state_shardings
from cfjax.training.step import has_batch_axis, make_update

DESCRIPTION = """Compiles every update of a training stage for a slice, a cluster or simulated devices, without them and
without allocating anything, and prints what each device needs: arguments, temporaries, peak against its memory, FLOPs
and their time at the chip's peak, collectives by kind, a verdict. --fit=N compiles up to N more machines of the same
chip to find the smallest that holds it. Exit code 1: it does not fit. Takes minutes for full networks."""
FLAGS = (
    Flag("topology", "v4|v5e|v5p|v6e|tpu7x:SHAPE, h100:HOSTSxGPUS or cpu:N, such as v5p:4x4x4", required=True),
    Flag("fit", "compile up to so many more machines of this chip to find the smallest that fits", kind=int, default=0),
    Flag("frames", "of a video, where the data is Wan's", kind=int, default=81),
    Flag("height", "pixels, where the data is Wan's", kind=int, default=480),
    Flag("width", "pixels, where the data is Wan's", kind=int, default=832),
    Flag("text", "rows of a prompt, where the data is Wan's", kind=int, default=512),
    Flag("hlo", "write the compiled programs' HLO text, WORKDIR/ROLE.hlo.gz", kind=bool, default=False),
    Flag("only", "comma-separated roles whose updates are compiled (empty: all)", default=""),
)
WAN_STRIDE, WAN_CHANNELS, WAN_TEXT = (4, 8, 8), 16, 4096
TOY_PATCH, TOY_TEXT = 8, 64


@dataclass(frozen=True)
class Shapes:
    """What one sample is: latents [F, H, W, C] and text rows [S, E]."""

    latents: tuple[int, int, int, int]
    text: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What one machine and mesh cost; `costs` has an entry per trained role."""

    topology: Topology
    mesh: dict[str, int]
    batch: int
    accumulate: dict[str, int]
    attention: str
    resting: int
    costs: list[Cost]

    @property
    def fits(self) -> bool | None:
        """Whether every update does; None on simulated devices."""
        verdicts = [cost.fits for cost in self.costs]
        return None if None in verdicts else all(verdicts)


def main(argv: Sequence[str]) -> int:
    """Parses the command line and plans; 0 if it fits, else 1."""
    c, workdir, flags = parse("plan", argv, description=DESCRIPTION, extra_flags=FLAGS, default_workdir="runs/plan")
    shapes, topology = shapes_of(c, flags), parse_topology(flags["topology"])
    c = faithful(c, given_keys(argv))
    simulate_devices(topology)
    only = [role for role in flags["only"].split(",") if role]
    devices = open_topology(topology)
    plans = [plan(c, shapes, topology, devices, only=only, verbose=True, keep=workdir if flags["hlo"] else None)]
    report(c, plans[0])
    if flags["fit"] > 0:
        plans += smallest(c, shapes, plans[0], flags["fit"], only)
    record(workdir / "plan.json", argv, c, plans)
    return 1 if plans[0].fits is False else 0


def shapes_of(c: ConfigDict, flags: Mapping[str, Any]) -> Shapes:
    """A sample's shapes: the toy's from its config, Wan's from the flags.

    Raises:
      UserError: a config that trains nothing, or a size that the autoencoder does not take.
    """
    if "roles" not in c or "optim" not in c or not c.optim:
        raise UserError("cfjax plan compiles training stages: give the config of one, such as configs/dmd.py")
    if c.data.source == "shapes":
        side = c.data.shapes.size // TOY_PATCH
        return Shapes((c.data.shapes.frames, side, side, c.data.channels), (c.data.text_length, TOY_TEXT))
    time, height, width = WAN_STRIDE
    if flags["frames"] % time != 1:
        raise UserError(f"--frames={flags['frames']}: use 1 + a multiple of {time}")
    for name, stride in (("height", 2 * height), ("width", 2 * width)):
        if flags[name] % stride or flags[name] < stride:
            raise UserError(f"--{name}={flags[name]}: use a multiple of {stride}")
    frames = 1 + flags["frames"] // time
    latents = (frames, flags["height"] // height, flags["width"] // width, WAN_CHANNELS)
    return Shapes(latents, (flags["text"], WAN_TEXT))


def batch_of(c: ConfigDict, shapes: Shapes, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the data iterator makes it, as shapes."""
    size, text = c.data.batch_size, shapes.text
    arrays: dict[str, Any] = {
        "latents_BFHWC": ((size, *shapes.latents), jnp.float32),
        "text_BSE": ((size, *text), jnp.float32),
        "negative_text_SE": (text, jnp.float32),
        "index_B": ((size,), jnp.int32),
    }
    if c.stage == "ode_regression":
        arrays["trajectory_BJFHWC"] = ((size, len(c.objective.steps) + 1, *shapes.latents), jnp.float32)

    def where(name: str) -> Any:
        if mesh is None:
            return None
        return batch_sharding(mesh) if has_batch_axis(name) else replicated(mesh)

    return {name: jax.ShapeDtypeStruct(*of, sharding=where(name)) for name, of in arrays.items()}


def expected_trip_counts(c: ConfigDict, frames: int) -> dict[str, float]:
    """Mean trip counts of loops and branches that are drawn, by scope (`planning.trip_counts`), for `frames` latents.

    Loops: steps before the exit; a long rollout's blocks, and the latents before its window. Conditionals: all blocks
    but the last are committed; windows after the start, of all; a branch's layers, of all; corrective clips, of all.
    """
    runs: dict[str, float] = {}
    branch = branch_config(c.roles.critic) if "critic" in c.roles else None
    if branch is not None:
        depth = preset(c.roles.critic.preset).num_layers
        runs[TAP] = len(tapped_layers(branch, depth)) / depth
    if c.stage == "ar_diffusion":
        runs[CORRECTIVE] = c.objective.bagger
    if c.stage != "dmd":
        return runs
    runs[BEFORE_EXIT] = (len(c.objective.steps) - 1) / 2
    long, blocks = dmd_config(c).long, blocks_of(c)
    if long:
        least, most = long.counts(blocks)
        runs[COUNTED_BLOCKS] = (least + most) / 2 - blocks.independent_first_frame
        runs[FIRST_REENCODED] = (most - least) / (most - least + 1)
        runs[LAST_PICTURE] = (most - least + 1) / 2 * blocks.frames  # of windows after the start
    number = (least + most) / 2 if long else len(blocks.spans(frames))
    runs[COMMIT] = (number - 1) / number
    return runs


def with_attention(c: ConfigDict, platform: str) -> tuple[ConfigDict, str]:
    """The config with every role's "auto" resolved for `platform`.

    cuDNN does not lower without a GPU, and dense scores of a simulated device say nothing of a flash kernel: both stand
    in as "chunked", which keeps the scores of a few queries at a time.
    """
    c, used = c.copy_and_resolve_references(), set()
    for role in c.roles.values():
        if role.attention == "auto":
            picked = pick_backend("auto", jnp.dtype(role.precision), platform)
            role.attention = picked if platform == "tpu" else "chunked"
        used.add(role.attention)
    return c, ", ".join(sorted(used))


def whole_flops(c: ConfigDict, shapes: Shapes, role: str, *, remat: bool, codec: Codec | None = None) -> float:
    """FLOPs of one update on all devices together, recomputation included or not.

    Args:
      codec: shapes of the frozen one, where the stage needs it.
    """
    c = c.copy_and_resolve_references()
    for each in c.roles.values():
        each.attention, each.offload = "xla", False
        each.remat = each.remat if remat else "none"
    stage = stage_of(c)
    txs = optimizers_of(c, stage)
    models = {name: role_template(r, shapes.latents[-1], shapes.text[-1]) for name, r in c.roles.items()}
    state = abstract_state(stage, models, txs)
    frozen = {name: model for name, model in models.items() if name not in stage.losses} | with_codec(codec)
    update = make_update(stage, role, txs[role], accumulate=c.optim[role].accumulate)
    return count_flops(
        update, state, frozen, batch_of(c, shapes, None), trip_counts=expected_trip_counts(c, shapes.latents[0])
    )


def lower_update(
    c: ConfigDict, stage: Stage, txs: Mapping[str, Any], shapes: Shapes, mesh: Mesh, role: str
) -> tuple[Any, int]:
    """The real update of one role on `mesh`, lowered from shapes, and the bytes of its arguments per device."""
    models = {name: role_template(r, shapes.latents[-1], shapes.text[-1], mesh) for name, r in c.roles.items()}
    state = abstract_state(stage, models, txs, mesh)
    codec = codec_template(c, shapes.latents[-1], mesh)
    frozen = {name: model for name, model in models.items() if name not in stage.losses} | with_codec(codec)
    batch = batch_of(c, shapes, mesh)
    placement = state_shardings(state, mesh)
    update: Any = make_update(stage, role, txs[role], accumulate=c.optim[role].accumulate, placement=placement)
    with on_mesh(mesh):
        return update.lower(state, frozen, batch), device_bytes((state, frozen, batch))


def plan(
    c: ConfigDict,
    shapes: Shapes,
    topology: Topology,
    devices: Sequence[Any],
    *,
    only: Sequence[str],
    verbose: bool = False,
    keep: Path | None = None,
) -> Plan:
    """Compiles the updates of `c` (those of `only`, or all) for `devices`.

    Args:
      tell: print what rests, before anything is compiled.
      keep: see `compile_update`.

    Raises:
      UserError: the mesh or the batch does not fit the devices, or an unknown role.
    """
    stage = stage_of(c)
    if unknown := sorted(set(only) - set(stage.losses)):
        raise UserError(f"--only={unknown[0]}: stage {c.stage} trains {', '.join(stage.losses)}")
    txs = optimizers_of(c, stage)
    mesh = make_mesh(**c.mesh.to_dict(), devices=devices)
    for role in stage.losses:
        parts = batch_shards(mesh) * c.optim[role].accumulate
        if c.data.batch_size % parts:
            raise UserError(
                f"data.batch_size={c.data.batch_size} does not divide over mesh data x fsdp x optim.{role}.accumulate"
                f" = {parts} parts"
            )
    used, attention = with_attention(c, topology.chip.platform)
    codec = codec_template(c, shapes.latents[-1])
    memory = stage_memory(used, stage, txs, shapes.latents[-1], shapes.text[-1], mesh, codec=codec)
    if verbose:
        say(f"{c.stage} on {topology.name}, {len(devices)} devices; before activations, GiB per device:")
        say("\n".join(memory_table(memory)))
    costs, trip_counts = [], expected_trip_counts(c, shapes.latents[0])
    for role in only or stage.losses:
        needed, executed = (
            whole_flops(c, shapes, role, remat=remat, codec=codec) / len(devices) for remat in (False, True)
        )
        lowered, arguments = lower_update(used, stage, txs, shapes, mesh, role)
        cost = compile_update(role, lowered, topology, arguments=arguments, trip_counts=trip_counts, keep=keep)
        costs.append(replace(cost, flops=needed, executed=executed))
    accumulate = {role: c.optim[role].accumulate for role in stage.losses}
    return Plan(topology, c.mesh.to_dict(), c.data.batch_size, accumulate, attention, needed_bytes(memory), costs)


def smallest(c: ConfigDict, shapes: Shapes, first: Plan, tries: int, only: Sequence[str]) -> list[Plan]:
    """Up to `tries` more plans, machines of one chip from the smallest that might do; ends at the first that fits."""
    stage = stage_of(c)
    txs = optimizers_of(c, stage)

    @cache
    def resting(sizes: tuple[tuple[str, int], ...], accumulated: bool) -> int:
        mesh = dict(sizes)
        used = changed(c, Candidate("", mesh, 1 + accumulated))
        shape: Any = abstract_mesh(**mesh)
        codec = codec_template(used, shapes.latents[-1])
        return needed_bytes(stage_memory(used, stage, txs, shapes.latents[-1], shapes.text[-1], shape, codec=codec))

    heads = [role_template(r, shapes.latents[-1], shapes.text[-1]).config.num_heads for r in c.roles.values()]
    worst = max(first.costs, key=lambda cost: cost.peak)
    activations = max(worst.peak - first.resting, 0)
    out: list[Plan] = []
    for candidate in candidates(first.topology, first.mesh, first.accumulate[worst.role], c.data.batch_size, heads):
        estimate = resting(tuple(candidate.mesh.items()), candidate.accumulate > 1) + activations * candidate.share
        if estimate > 1.2 * first.topology.memory or len(out) == tries:
            continue
        topology = parse_topology(candidate.topology)
        found = plan(changed(c, candidate), shapes, topology, open_topology(topology), only=only)
        out.append(found)
        peak = max(cost.peak for cost in found.costs) / GIB
        say(f"  {topology.name}  {overrides(candidate, stage.losses)}  peak {peak:.1f} GiB: {verdict(found)}")
        if found.fits:
            break
    return out


def changed(c: ConfigDict, candidate: Candidate) -> ConfigDict:
    """The config with a candidate's mesh and microbatches."""
    c = c.copy_and_resolve_references()
    c.mesh.update(candidate.mesh)
    for role in c.optim:
        c.optim[role].accumulate = candidate.accumulate
    return c


def verdict(found: Plan) -> str:
    """One word."""
    return {True: "fits", False: "does not fit", None: "simulated, no verdict"}[found.fits]


def report(c: ConfigDict, found: Plan) -> None:
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
        least = sum(cost.seconds(topology) / c.cadence.get(cost.role, 1) for cost in found.costs)
        say(f"an iteration takes {least:.2f} s at least, at the chip's peak")
    most = max((cost.peak for cost in found.costs), default=0) / GIB
    limit = f" of {topology.memory / GIB:.1f}" if topology.memory else ""
    say(f"verdict: {verdict(found)}; at most {most:.1f}{limit} GiB per device")


def record(file: Path, argv: Sequence[str], c: ConfigDict, plans: Sequence[Plan]) -> None:
    """Writes the plans as JSON, whole or not at all."""
    entries = [{**asdict(found), "fits": found.fits, "devices": found.topology.devices} for found in plans]
    made = {
        "command": ["cfjax", "plan", *argv],
        "jax": jax.__version__,
        "config": json.loads(c.to_json()),
        "plans": entries,
    }
    write_atomically(file, json.dumps(made, indent=1))
    say(f"{file}")
