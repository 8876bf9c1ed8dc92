"""Machines by name, the meshes that a search goes through, and one line for every mistake."""

import math

import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc

from cfjax.core import topology
from cfjax.core.errors import UserError
from cfjax.core.sharding import make_mesh, mesh_choices
from cfjax.core.topology import CHIPS, GIB, open_topology, parse_topology, shapes_of
from cfjax.planning.search import candidates


def test_slices_clusters_and_simulated_devices():
    slice_, cores = parse_topology("v5p:4x4x4"), parse_topology("tpu7x:2x2x1")
    assert (slice_.chips, slice_.devices, slice_.memory) == (64, 64, 95 * GIB)
    assert (cores.chips, cores.devices, cores.memory) == (4, 8, 96 * GIB) and cores.flops == 2307e12 / 2
    assert parse_topology("h100:8x8").devices == 64 and parse_topology("cpu:256").devices == 256
    assert [device.platform for device in open_topology(parse_topology("cpu:4"))] == ["cpu"] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5litepod-64", "write CHIP:SHAPE, such as v5p:4x4x4; chips are v4, v5e, v5p, v6e, tpu7x, h100, cpu"),
        ("v5p:64", "v5p needs 3 numbers, such as v5p:4x4x4"),
        ("h100:64", "h100 needs 2 numbers, such as h100:8x8"),
        ("cpu:512", "use 1 to 256 devices"),
    ],
)
def test_a_wrong_name_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v6e:4x4", "tpu"), ("h100:1x8", "gpu")])
def test_a_missing_compiler_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
        open_topology(parse_topology(name))


def test_too_few_simulated_devices():
    with pytest.raises(UserError, match=r"8 CPU devices; unset XLA_FLAGS, or set it to .*count=64"):
        open_topology(parse_topology("cpu:64"))


def test_a_search_goes_from_small_to_large_with_whole_heads():
    for sizes, accumulate in mesh_choices(64, 64, (12, 40)):
        assert math.prod(sizes.values()) == 64 and sizes["fsdp"] * accumulate == 64 and 12 % sizes["tensor"] == 0
    first = parse_topology("v5p:4x4x4")
    mesh = {"data": 1, "fsdp": 16, "context": 4, "tensor": 1}
    tried = list(candidates(first, mesh, 4, 64, (12, 40)))
    sizes = [parse_topology(candidate.topology).devices for candidate in tried]
    assert sizes == sorted(sizes) and sizes[0] == 4 and sizes[-1] == 256
    assert all((c.topology, c.mesh, c.accumulate) != (first.name, mesh, 4) for c in tried)
    quarter = next(c for c in tried if c.mesh == {"data": 1, "fsdp": 4, "context": 4, "tensor": 1})
    assert (quarter.topology, quarter.accumulate, quarter.share) == ("v5p:2x2x4", 16, 1.0)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_has_as_many_devices_as_the_machine(name):
    assert len(open_topology(parse_topology(name))) == parse_topology(name).devices


def test_slices_lie_along_data_and_then_fsdp(monkeypatch):
    """Two slices of 16 chips: what lies within one of them has a slice index alone."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices
    for sizes, axis in (({"data": 2, "fsdp": 16}, 0), ({"fsdp": 8, "context": 4}, 1), ({"data": 4, "tensor": 8}, 0)):
        placed = make_mesh(**sizes, devices=devices).devices
        index = np.vectorize(lambda device: device.slice_index)(placed)
        halves = np.split(index, 2, axis=axis)
        assert {*halves[0].ravel()} == {0} and {*halves[1].ravel()} == {1}, sizes
    with pytest.raises(UserError, match=r"mesh data=1 fsdp=1: 2 slices need mesh\.data x mesh\.fsdp"):
        make_mesh(context=32, devices=devices)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_chip_has_shapes_to_search(chip):
    assert all(parse_topology(f"{chip.name}:{shape}").devices for shape in shapes_of(chip))
