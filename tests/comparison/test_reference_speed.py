"""benchmarks/against_reference.py: both sides do the same work. The clone's side is replaced by a stand-in here."""

import contextlib
import json
import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cfjax.comparison import reference_speed
from cfjax.comparison.reference_speed import Pair, Side, Work, our_stream, our_video
from cfjax.comparison.turns import take_turns
from cfjax.core.compile_cache import no_compile_cache
from cfjax.core.errors import UserError
from cfjax.models.wan import WanConfig
from cfjax.nn.visibility import Blocks

ROOT = Path(__file__).parents[2]
TINY = ["--dim=16", "--heads=2", "--ffn=24", "--layers=1", "--side=4", "--frames=6", "--text_dim=8", "--text_rows=4"]


def work(**more) -> Work:
    model = WanConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=1, text_dim=8)
    return Work(model, frames=6, height=4, width=4, text_rows=4, **more)


@pytest.fixture
def script(monkeypatch):
    """The script's names, after its reference is replaced: the same video as one program, and nothing to open."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stand_in = Pair(our_stream, lambda _, work, dtype: our_video(work, dtype))
    monkeypatch.setitem(reference_speed.PAIRS, "stream", stand_in)
    monkeypatch.setattr("cfjax.comparison.reference.open_reference", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with no_compile_cache():  # the script turns it off for good
        yield runpy.run_path(str(ROOT / "benchmarks" / "against_reference.py"))


def test_a_miniature_leaves_errors_ratios_and_the_work(script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    flags = ["--reference_dir=none", "--cases=small", "--rounds=2", "--no-memory", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["against_reference.py", *flags, *TINY])
    script["main"]()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["work"]["tokens_per_frame"] == 4 and row["work"]["frames"] == 6
    assert all(len(times) == 2 for times in row["seconds"].values()) and row["seconds"].keys() == set(script["SIDES"])
    print(row["error"])
    assert row["error"]["cfjax_float32"]["output"] < 1e-5 < row["error"]["cfjax_bfloat16"]["output"] < 0.05
    assert row["ratio"].keys() == {
        "reference_float32 / cfjax_float32",
        "reference_float32 / cfjax_bfloat16",
        "reference_bfloat16 / cfjax_bfloat16",
    }
    assert "| small | cfjax float32 |" in capsys.readouterr().out


def test_ratios_are_of_the_same_round(script):
    seconds = {"reference_float32": [2.0, 8.0, 3.0], "cfjax_float32": [1.0, 2.0, 3.0]}
    assert script["ratios"](seconds) == {"reference_float32 / cfjax_float32": {"median": 2.0, "min": 1.0, "max": 4.0}}


def test_sides_take_turns():
    order = []
    take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "abbaab"


def test_memory_is_what_a_call_adds(script):
    def make():
        held = []
        return Side(lambda: held.append(np.ones(2**24, np.uint8)), lambda _: {})

    found = script["peak_mib"](make)
    assert 14 < found["resting_mib"] < 40 and 28 < found["peak_mib"] < 60, "16 MiB a call, kept"


def test_other_programs_show(script):
    found = {}
    with script["others"](found):
        pass
    assert found.keys() == {"load_average", "others_share"} and found["others_share"] >= 0.0


def test_gradients_are_compared_with_the_values(script):
    theirs = {"": np.float32(2.0), "grad/w": np.array([1.0, 2.0]), "grad/b": np.array([1e-9])}
    ours = {"": np.float32(2.2), "grad/w": np.array([1.0, 2.1]), "grad/b": np.array([2e-9])}
    assert script["errors"](ours, theirs) == pytest.approx({"output": 0.1, "gradient": 0.05})


def test_a_torch_step_starts_from_no_gradient():
    network = torch.nn.Linear(2, 1, bias=False)
    unused = torch.nn.Parameter(torch.ones(3))
    network.register_parameter("unused", unused)
    side = reference_speed._their_step(network, lambda: network(torch.ones(1, 2)).sum())
    for _ in range(2):
        arrays = side.arrays(side.run())
    np.testing.assert_array_equal(arrays["grad/weight"], [[1.0, 1.0]])
    np.testing.assert_array_equal(arrays["grad/unused"], np.zeros(3))


def test_dtypes_have_the_same_weights_and_inputs():
    f32, bf16 = (work().subject(name) for name in ("float32", "bfloat16"))
    assert bf16.config.precision.compute == "bfloat16"
    np.testing.assert_array_equal(f32.student.head.kernel[...], bf16.student.head.kernel[...])
    np.testing.assert_array_equal(f32.latents("noise"), bf16.latents("noise"))
    assert f32.student.head.kernel[...].dtype == jnp.float32


@pytest.mark.parametrize(("wrong", "message"), [({"steps": 3}, "steps=3"), ({"blocks": Blocks(4)}, "blocks.frames")])
def test_impossible_work_is_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        work(**wrong)
