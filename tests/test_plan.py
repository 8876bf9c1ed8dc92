"""`cfjax plan`: figures against closed forms and against the arrays of a real run; what is compiled is what is run."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cfjax import plan
from cfjax.__main__ import main
from cfjax.core.cli import parse
from cfjax.core.topology import GIB, parse_topology
from cfjax.experiment.build import build
from cfjax.experiment.data import Shapes
from cfjax.experiment.programs import expected_trip_counts
from cfjax.experiment.stage import STAGES
from cfjax.experiment.stream_plan import Part, ProgramCost, StreamPlan
from cfjax.nn.frames import VISIBLE_PREFIX
from cfjax.planning.programs import Cost
from cfjax.planning.stream_cost import Need
from cfjax.rollout.blocks import COUNTED_BLOCKS
from cfjax.rollout.long_video import FIRST_REENCODED, LAST_PICTURE
from cfjax.rollout.remembered import REPLAYED
from cfjax.rollout.streaming import RECOMMITTED
from tests.commands import ROOT

SMALL = ["--config.data.shapes.frames=6", "--config.data.batch_size=8"]


def config(name: str, *overrides: str):
    argv = [f"--config={ROOT}/configs/{name}", *overrides]
    return build(parse("plan", argv, description="", extra_flags=plan.FLAGS[1:], default_workdir="w")[0])


def shapes(e, **sizes: int) -> Shapes:
    given = {"frames": 81, "height": 480, "width": 832, "text": 512, **sizes}
    return plan.shapes_of(e, given)


def forward_flops(dim: int, ffn: int, layers: int, tokens: int, pairs: int, rows: int, text_dim: int, frames: int):
    """Matrix products of one sample through Wan, in closed form."""
    self_attention = 4 * 2 * tokens * dim**2 + 2 * 2 * pairs * dim
    cross_attention = 2 * 2 * tokens * dim**2 + 2 * 2 * rows * dim**2 + 2 * 2 * tokens * rows * dim
    ends = 2 * 2 * tokens * 64 * dim + 2 * rows * (text_dim * dim + dim**2)
    time = 2 * frames * (256 * dim + dim**2 + 6 * dim**2)
    return layers * (self_attention + cross_attention + 2 * 2 * tokens * dim * ffn) + ends + time


def test_flops_of_a_full_network_are_the_closed_form():
    """Wan 1.3B at 480 x 832, 81 frames: forward and twice that backward; the first products need no input gradient."""
    e = config("bidirectional.py", "--config.data.batch_size=2")
    tokens = 21 * 30 * 52
    once = forward_flops(1536, 8960, 30, tokens, tokens**2, 512, 4096, 21)
    needed = plan.whole_flops(e, shapes(e), "student", remat=False)
    print(f"{needed:.4e} against {2 * 3 * once:.4e}")
    assert needed == pytest.approx(2 * 3 * once, rel=1e-3)
    executed = plan.whole_flops(e, shapes(e), "student", remat=True)
    assert executed == pytest.approx(2 * 4 * once, rel=1e-2)


def test_teacher_forcing_pays_for_its_rectangles_only():
    e = config("ar_diffusion.py", "--config.data.batch_size=1")
    frame, blocks = 30 * 52, 7
    seen = sum((b + 1) * 3 * 3 for b in range(blocks)) * frame**2  # of the clean half, and of the noisy one
    tokens = 2 * 21 * frame
    once = forward_flops(1536, 8960, 30, tokens, 2 * seen, 512, 4096, 42) - 2 * 64 * 1536 * tokens / 2  # head: one half
    assert plan.whole_flops(e, shapes(e), "student", remat=False) == pytest.approx(3 * once, rel=2e-3)


def test_long_rollouts_are_counted_with_their_blocks_and_their_codec():
    """Rollouts as long as the window need no codec; of longer ones count their mean number of blocks and pictures."""
    flops, tokens, batch = {}, 3 * 4, 32
    for most in (0, 12, 18):
        e = config("dmd.py:toy,long", f"--config.objective.max_frames={most}") if most else config("dmd.py:toy")
        assert ("codec" in e.roles) == (most > 0) and e.data.batch_size == batch
        flops[most] = plan.whole_flops(e, shapes(e), "critic", remat=False)
    assert flops[12] == flops[0]
    picture = 2 * batch * 16 * 192 * 16  # a frame of 4 x 4 patches, encoded or decoded
    pictures = 3 + 2 / 3 * 2  # before the window, 3 on average; two of three windows make their first again

    def rollout(blocks: int, frames: int) -> float:
        """3.5 passes a block: 1.5 steps before the exit, the exit, the cache, but for the last.

        They see themselves and what is before them in a window of 12. Those for the cache lack the last layer's ends
        and the head.
        """
        text = 2 * 8 * (64 * 128 + 128**2) + 4 * 2 * 2 * 8 * 128**2  # once per rollout
        seen = [min(stop, 12) for stop in range(3, frames + 1, 3)]
        pairs = tokens * 4 * sum(seen) // len(seen)
        one = forward_flops(128, 512, 4, tokens, pairs, 8, 64, 3) - text
        unread = 8 * tokens * 128**2 + 4 * (pairs + tokens * 8) * 128 + 4 * tokens * 128 * 512 + 2 * tokens * 64 * 128
        return batch * ((3.5 * blocks - 1) * one - (blocks - 1) * unread)

    longer = rollout(5, 18) - rollout(4, 12)
    assert flops[18] - flops[12] - pictures * picture == pytest.approx(longer, rel=1e-3)


@pytest.mark.slow
def test_a_rollout_that_goes_on_is_counted_by_its_mean_chunk():
    """LongLive's 13 chunks: 237 frames in blocks of 3, of which all but the first begin with a latent made anew."""
    runs = expected_trip_counts(config("dmd.py:streaming"), 21)
    assert runs[COUNTED_BLOCKS] == runs[REPLAYED] == pytest.approx(237 / 13 / 3)
    assert runs[FIRST_REENCODED] == pytest.approx(12 / 13) and runs[RECOMMITTED] == pytest.approx(1 / 13)
    assert runs[VISIBLE_PREFIX] == pytest.approx(77 / 80) and runs[LAST_PICTURE] == 18


def test_a_simulated_plan_counts_the_real_arguments(tmp_path, capsys):
    """The stage compiled on eight devices: arguments are the state's and the batch's parts, and the JSON has it all."""
    argv = ["plan", f"--config={ROOT}/configs/bidirectional.py:toy", *SMALL, "--config.roles.student.remat=none"]
    argv += ["--config.optim.student.name=adamw"]  # compiles faster than the toy's Muon
    argv += ["--topology=cpu:8", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", f"--workdir={tmp_path}"]
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "verdict: simulated, no verdict" in output and "chunked (stands in for a flash kernel)" in output
    (made,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert made["resting"] > 0 and "persistent" not in made  # the key in plan.json is older than the field
    (cost,) = made["costs"]
    assert made["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2} and made["fits"] is None
    parameters, cut = 1_248_192, 8
    state = 4 * 4 * parameters / cut  # weights, two moments, an average, float32
    batch = 4 * (2 * (6 * 16 * 16 + 8 * 64 + 1) + 8 * 64)
    assert state + batch < cost["arguments"] < 1.1 * (state + batch)  # biases and scales lie on every device
    assert cost["temporaries"] > 0 and cost["peak"] >= cost["arguments"] + cost["temporaries"]
    assert cost["traffic"]["all-gather"]["runs"] > 4 and cost["traffic"]["all-reduce"]["bytes"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=configs/dmd.py:toy"], "--topology is missing"),
        (["--config=configs/evaluate.py", "--topology=cpu:8"], "give configs/dmd.py, say, or generate.py"),
        (["--config=configs/dmd.py:toy", "--topology=cpu:8"], "mesh data=1 fsdp=1 context=1 tensor=1 has size 1"),
        (["--config=configs/dmd.py", "--topology=cpu:8", "--frames=80"], "--frames=80: use 1 + a multiple of 4"),
        (["--config=configs/dmd.py", "--topology=cpu:8", "--width=830"], "--width=830: use a multiple of 16"),
        (
            ["--config=configs/dmd.py:toy", "--topology=cpu:8", "--config.mesh.fsdp=8", "--only=real_score"],
            "--only=real_score: stage dmd trains",
        ),
        (
            ["--config=configs/dmd.py:toy", "--topology=cpu:8", "--config.mesh.fsdp=8", "--config.data.batch_size=12"],
            "data.batch_size=12 does not divide",
        ),
    ],
)
def test_a_mistake_is_one_line(argv, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *argv, f"--workdir={tmp_path}/w"]) == 2
    output = capsys.readouterr().err
    assert message in output and output.count("\n") == 1 and not (tmp_path / "w").exists()


@pytest.mark.parametrize(("machine", "extra"), [("h100:1x8", ".[gpu]"), ("v5e:2x4", ".[tpu]")])
def test_a_compiler_that_is_not_installed_is_named(machine, extra, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["--config=configs/dmd.py", f"--topology={machine}", "--config.mesh.fsdp=8", f"--workdir={tmp_path}"]
    assert main(["plan", *argv]) == 2
    assert (
        f"--topology={machine} needs" in (output := capsys.readouterr().err) and f"pip install -e '{extra}'" in output
    )


def test_a_search_ends_at_the_first_machine_that_fits(monkeypatch, capsys):
    """Peaks by a stand-in for the compiler: what rests, and activations that tokens and heads cut."""
    e = config("dmd.py", "--config.mesh.fsdp=16", "--config.mesh.context=4")
    tried = []

    def stand_in(e, shapes, topology, devices, *, only, quick=False):
        mesh = dict(e.mesh)
        samples = e.data.batch_size / (mesh["fsdp"] * e.accumulate("student"))
        peak = int((640 / (mesh["fsdp"] * mesh["tensor"]) + 80 * samples / (mesh["context"] * mesh["tensor"])) * GIB)
        cost = Cost("student", peak=peak, fits=peak <= topology.memory)
        tried.append((topology.name, peak))
        return plan.Plan(topology, mesh, e.data.batch_size, e.schedule.accumulate, "splash", int(40 * GIB), [cost])

    monkeypatch.setattr(plan, "plan", stand_in)
    monkeypatch.setattr(plan, "open_topology", lambda topology: [None] * topology.devices)
    first = stand_in(e, None, parse_topology("v5p:4x4x4"), [], only=())
    found = plan.smallest(e, shapes(e), first, 20, ())
    assert found[-1].fits and all(not other.fits for other in found[:-1])
    assert found[-1].topology.devices < 64 and "accumulate=" in capsys.readouterr().out


def documented() -> list[tuple[str, list[str]]]:
    """The `cfjax plan` commands in the docstrings of the training configs."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        doc = path.read_text().split('"""')[1]
        for command in re.findall(r"^ +cfjax plan (.*(?:\\\n.*)*)", doc, re.MULTILINE):
            found.append((path.stem, command.replace("\\\n", " ").split()))
    return found


def test_every_training_config_names_a_topology():
    assert {name for name, _ in documented()} == set(STAGES)


SHRINK = """
import dataclasses, sys
from cfjax.models import wan
for name in ("wan_1_3b", "wan_14b"):
    full = wan.PRESETS[name]
    wan.PRESETS[name] = dataclasses.replace(full, num_layers=2, dim=8 * full.num_heads, ffn_dim=64)
from cfjax.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def shrunk(argv: list[str], workdir: Path) -> list[dict]:
    """A documented command at toy depth, width and resolution, in a process with devices of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    small = ["--height=64", "--width=64", "--text=8", "--quick=True", f"--workdir={workdir}"]
    command = [sys.executable, "-c", SHRINK, "plan", *argv, *small]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads((workdir / "plan.json").read_text())["plans"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argv"), documented(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_config_compiles_for_the_topology_of_its_docstring(name, argv, tmp_path):
    topology = next(word for word in argv if word.startswith("--topology=")).partition("=")[2]
    (made,) = shrunk(argv, tmp_path)
    assert made["topology"]["name"] == topology
    assert math.prod(made["mesh"].values()) == parse_topology(topology).devices == made["devices"]
    for cost in made["costs"]:
        assert cost["flops"] > 0 and cost["traffic"]["all-gather"]["runs"] > 0


TRAINED = {"fwd_residuals", "dq_no_residuals", "dkv_no_residuals"}


def called(cost: dict, scope: str) -> set[str]:
    """Kernels of self-attention below a scope of the model."""
    paths = [kernel.split("/") for kernel in cost["kernels"]]
    return {path[-1].removeprefix("splash_mha_") for path in paths if {scope, "self_attention"} <= set(path)}


V5E = ["--topology=v5e:2x2", "--config.mesh.fsdp=2", "--config.data.batch_size=2"]


@pytest.mark.slow
def test_on_tpu_training_scores_and_rollout_call_the_splash_kernel(tmp_path):
    """DMD's student update compiled for a slice of v5e: self-rollout through the cache (a traced mask: "segmented"),
    replay with gradient (residuals kept, two backward kernels), and the bidirectional scores without one."""
    made = shrunk(
        [*V5E, "--config=configs/dmd.py", "--config.mesh.context=2", "--only=student"],
        tmp_path,
    )
    (cost,) = made[0]["costs"]
    print("\n".join(cost["kernels"]))
    assert called(cost, "self_rollout") == {"fwd_segmented_no_residuals"}
    assert called(cost, "replay_exit_steps") == TRAINED
    assert called(cost, "real_score") == called(cost, "fake_score") == {"fwd_no_residuals"}
    made = shrunk([*V5E, "--config=configs/ar_diffusion.py", "--config.mesh.tensor=2"], tmp_path)
    assert called(made[0]["costs"][0], "teacher_forced") == TRAINED


def test_a_stream_is_planned_from_shapes(tmp_path, capsys):
    """Toy's streaming programs and decoder for a simulated device; the network's are what `stream_latents` calls."""
    argv = ["plan", f"--config={ROOT}/configs/generate.py", "--topology=cpu:1", f"--workdir={tmp_path}"]
    assert main([*argv, "--config.frames=6", "--config.height=16", "--config.width=16", "--config.batch=2"]) == 0
    output = capsys.readouterr().out
    assert "simulated, no verdict" in output and "frames/s at the most" not in output
    made = json.loads((tmp_path / "plan.json").read_text())
    stream, (bound,) = made["stream"], made["bounds"]
    (decode,) = stream["decoders"][0]["programs"]
    assert decode["calls"] == 2 and decode["flops"] == 2 * 2 * 3 * 4 * 192 * 16  # blocks of three frames of 4 patches
    network = {program["name"]: program for program in stream["network"]["programs"]}
    assert network["embed_text"]["calls"] == 1 and sum(p["calls"] * p["flops"] for p in network.values()) > 0
    assert bound["memory"] > stream["network"]["resident"] > 4 * 1_248_192 and bound["fits"] is None
    assert main([*argv, "--only=vae"]) == 2
    assert "--only=vae: use network, PatchCodec" in capsys.readouterr().err


def part(name: str, flops: float, resident: float, working: float = 0.0) -> Part:
    cost = Cost(name, arguments=0, temporaries=int(working * GIB), peak=int(working * GIB))
    return Part(name, [ProgramCost(name, 1, flops, cost)], int(resident * GIB), Need(flops, 0.0))


def test_the_bound_and_the_smallest_slice_of_a_stream():
    """v5e: 197e12 FLOP/s, 16 GiB. 197e13 FLOPs take ten seconds; memory and rate both decide how many chips."""
    network, decoder = part("network", 177.3e13, 3.0, 2.0), part("vae", 19.7e13, 1.0, 4.0)
    plan = StreamPlan(parse_topology("v5e:1x1"), "run", (80, 480, 832), 1, "splash", network, [decoder])
    assert plan.memory(decoder) == 8 * GIB and plan.fits(decoder)
    assert plan.frames_per_second(decoder) == pytest.approx(8.0) and plan.frames_per_second() == pytest.approx(80 / 9)
    assert plan.smallest(decoder) == "v5e:2x2" and plan.smallest(decoder, target=8.0 * 0.99) == "v5e:1x1"
    assert StreamPlan(plan.topology, "run", plan.pixels, 1, "splash", network).choices == [()]
    assert plan.memory() == 5 * GIB and plan.fits() and plan.smallest(target=8.5) == "v5e:1x1"
    large = part("vae", 19.7e13, 40.0)
    assert plan.fits(large) is False and plan.smallest(large, target=1.0) == "v5e:2x2"
    assert plan.smallest(part("vae", 1e20, 0.0)) == ""


def test_a_bidirectional_run_has_no_stream_to_plan(tmp_path, capsys):
    argv = ["plan", f"--config={ROOT}/configs/generate.py", "--topology=cpu:1", f"--workdir={tmp_path}"]
    assert main([*argv, "--config.run=toy_teacher"]) == 2
    assert "run='toy_teacher' is bidirectional, and does not stream" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1"])
def test_a_stream_compiles_for_one_chip(topology, tmp_path):
    """In a process of its own, as every machine is opened once: the toy with the flash kernel."""
    argv = ["plan", "--config=configs/bench.py", f"--topology={topology}", "--quick=True", f"--workdir={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "cfjax", *argv]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["stream"]["attention"] == "splash"
    assert made["bounds"][0]["fits"] and made["bounds"][0]["smallest"] == topology
