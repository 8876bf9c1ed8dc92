"""Programs that are too large for a machine: every wording of TPU's compiler is a verdict, as programs provoke it."""

import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from cfjax.core.topology import GIB, open_topology, parse_topology
from cfjax.planning.programs import Cost, compile_update, shortage
from cfjax.planning.progress import telling

MACHINE = parse_topology("v5e:1x1")  # 16 GiB, of which programs have 15.75


def compiled(function: Callable, *shapes: tuple[int, ...]) -> Cost:
    place = SingleDeviceSharding(open_topology(MACHINE)[0])
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    size = sum(4 * x.size for x in arguments)
    lowered = jax.jit(function).lower(*arguments)
    return compile_update("student", lowered, MACHINE, arguments=size, trip_counts={})


def scratch(x):
    """A kernel with 256 MiB beside its blocks."""

    def kernel(x, out, rows):
        rows[:128, :128] = x[...]
        out[...] = rows[:128, :128]

    rows = pltpu.VMEM((8192, 8192), jnp.float32)
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), scratch_shapes=[rows])(x)


def double(x, out):
    out[...] = x[...] * 2


def blocks(x):
    """A kernel whose blocks are the whole array."""
    return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def scalars(numbers, x):
    """A kernel that is given all numbers as scalars."""
    spec = pl.BlockSpec((8, 128), lambda place, numbers: (0, 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(1,), in_specs=[spec], out_specs=spec)
    call = pl.pallas_call(
        lambda numbers, x, out: double(x, out), grid_spec=grid, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    return call(numbers.astype(jnp.int32), x)


# What is too large -> the program, its arguments, GiB of HBM that it needs.
TOO_LARGE = {
    "arguments": (lambda x: x[0, 0], [(8, 2**30)], 32),
    "results": (lambda x: jnp.broadcast_to(x, (20, 2**28)), [(2**28,)], 20 + 5),
    "both": (lambda x, y: (x + 1, y * 2), [(2**30,), (2, 2**30)], 24),
    "temporaries": (lambda x: jnp.sort(jnp.broadcast_to(x, (20, 2**28)), axis=1)[0], [(2**28,)], 40),
    "a constant": (lambda x: x @ jnp.ones((2**29, 8)), [(8, 2**29)], 16),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_a_program_that_is_too_large_is_a_verdict(what):
    function, shapes, gib = TOO_LARGE[what]
    cost = compiled(function, *shapes)
    print(f"{what}: {cost.peak / GIB:.2f} GiB, {cost.problem}")
    assert cost.fits is False and cost.problem.startswith("needs ") and cost.problem.endswith("programs have 15.75")
    assert cost.peak / GIB == pytest.approx(gib, rel=0.3) and cost.temporaries == cost.peak - cost.arguments


@pytest.mark.parametrize(
    ("kernel", "shapes", "problem"),
    [
        (scratch, [(128, 128)], "a kernel needs 256 MiB of VMEM, of which there are 128"),
        (blocks, [(1536, 2048)], "a kernel needs 24 MiB of VMEM, of which kernels have 16"),
        (scalars, [(2**21,), (8, 128)], "a kernel needs 8 MiB of SMEM, of which there are 1"),
    ],
)
def test_a_kernel_that_is_too_large_is_a_verdict(kernel, shapes, problem):
    cost = compiled(kernel, *shapes)
    assert cost.fits is False and cost.problem == problem and cost.peak == cost.arguments > 0


def test_other_wordings_are_verdicts_and_other_failures_are_none():
    """The older wording names the space; one that nobody knows is passed on."""
    line = "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded"
    assert shortage(line).used == int(23.5 * GIB)
    assert shortage(line).text == "needs 23.50 GiB of HBM, of which programs have 15.75"
    unknown = shortage("RESOURCE_EXHAUSTED: no room\n for this")
    assert unknown.used == 0 and unknown.text == "the compiler ran out of memory: no room for this"
    assert shortage("INTERNAL: something else") is None


def test_a_program_that_fails_otherwise_is_an_error():
    class Broken:
        def compile(self, **_):
            raise ValueError("INTERNAL: something else")

    with pytest.raises(ValueError, match="something else"):
        compile_update("student", Broken(), MACHINE, arguments=0, trip_counts={})


@pytest.mark.parametrize("quick", [False, True])
def test_a_quick_plan_asks_for_the_least_effort(quick):
    asked = []

    class Large:
        def compile(self, **options):
            asked.append(options["compiler_options"])
            raise ValueError("RESOURCE_EXHAUSTED: no room")

    cost = compile_update("student", Large(), MACHINE, arguments=1, trip_counts={}, quick=quick)
    assert cost.fits is False and asked == [{"exec_time_optimization_effort": -1.0} if quick else None]


def test_a_long_compilation_says_how_far_it_is():
    lines, said = [], threading.Event()

    def told(line: str) -> None:
        lines.append(line)
        if line.startswith("still"):
            said.set()

    with telling(told, "the student's update (1 of 2)", every=0.001):
        assert said.wait(60)
    assert lines[0] == "compiling the student's update (1 of 2)"
    assert lines[1].startswith("still compiling the student's update (1 of 2): ")
    assert lines[-1].startswith("compiled the student's update (1 of 2) in ") and lines[-1].endswith(" s")
    with pytest.raises(ValueError, match="no"), telling(told, "another"):
        raise ValueError("no")
    assert lines[-1] == "compiling another"
