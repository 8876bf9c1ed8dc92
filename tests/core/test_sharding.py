"""Shardings of arrays on a mesh, and clear errors for meshes and rules that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cfjax.core.errors import UserError
from cfjax.core.sharding import (
    WAN_RULES,
    activation_spec,
    active_mesh,
    batch_rows,
    batch_sharding,
    constrain,
    context_sharding,
    make_mesh,
    on_mesh,
    place_rows,
    shard_model,
    shardings,
    vmap_over_context,
)
from cfjax.core.tree import named_leaves
from tests.tiny import tiny


def test_parameters_are_cut_and_nothing_changes():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = named_leaves(shard_model(tiny(), mesh))
    for name, leaf in named_leaves(tiny()).items():
        np.testing.assert_array_equal(sharded[name], leaf)
    assert sharded["blocks/self_attn/q/kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert sharded["blocks/ffn/down/kernel"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert sharded["blocks/norm3/bias"].sharding.is_fully_replicated
    kernels = [leaf for name, leaf in sharded.items() if name.endswith("kernel")]
    held = sum(leaf.addressable_shards[0].data.size for leaf in kernels)
    assert held * 4 == sum(leaf.size for leaf in kernels)


def test_an_axis_that_does_not_divide_is_dropped():
    mesh = make_mesh(fsdp=8)
    spec = shardings({"wide/kernel": jnp.zeros((12, 16))}, mesh, [(".*kernel", ("tensor", "fsdp"))])["wide/kernel"].spec
    assert spec == PartitionSpec("tensor", "fsdp")
    spec = shardings({"odd/kernel": jnp.zeros((12, 16))}, mesh, [(".*kernel", ("fsdp", "tensor"))])["odd/kernel"].spec
    assert spec == PartitionSpec(None, "tensor")


def test_misfits_are_named():
    with pytest.raises(UserError, match=r"data=3 fsdp=1 context=1 tensor=2 has size 6; .* 8 devices"):
        make_mesh(data=3, tensor=2)
    with pytest.raises(UserError, match="has size 0"):
        make_mesh(data=0)
    mesh = make_mesh(data=8)
    with pytest.raises(UserError, match="no rule matches 'extra'"):
        shardings({"extra": jnp.zeros(3)}, mesh, [("kernel", ())])
    with pytest.raises(UserError, match="matches nothing"):
        shardings(tiny(), mesh, (("lora/.*", ()), *WAN_RULES))
    with pytest.raises(UserError, match="has 2 entries"):
        shardings({"kernel": jnp.zeros((2, 4, 8))}, mesh, [("kernel", ("fsdp", "tensor"))])


def test_activations_are_sharded_by_their_logical_axes_and_unchanged_without_a_mesh():
    x = jnp.zeros((4, 3, 8, 12, 2))
    logical_axes = ("batch", None, "tokens", "heads", None)
    assert constrain(x, *logical_axes) is x and active_mesh() is None and context_sharding(12, 8) == ("heads", 1)
    with on_mesh(make_mesh(data=2, context=2, tensor=2)):
        assert activation_spec(x.shape, logical_axes) == PartitionSpec(
            ("data", "fsdp"), None, ("context",), ("tensor", "context"), None
        )
        assert activation_spec((3, 3, 7, 6, 2), logical_axes) == PartitionSpec(None, None, None, ("tensor",), None)
        assert context_sharding(12, 8) == ("heads", 1) and context_sharding(6, 8) == ("tokens", 2)
        assert context_sharding(6, 7) == ("whole", 1)
        with pytest.raises(ValueError, match="4 logical axes"):
            constrain(x, "batch", None, None, None)
    assert active_mesh() is None


def test_inside_an_array_of_parts_the_context_axis_is_taken():
    seen = []

    def part(x):
        seen.append(activation_spec(x.shape, ("batch", "heads")))
        return x

    mesh = make_mesh(data=2, context=2, tensor=2)
    with on_mesh(mesh):
        jax.eval_shape(vmap_over_context(part, 1, 1), jax.ShapeDtypeStruct((4, 2, 8), jnp.float32))
        assert activation_spec((4, 8), ("batch", "heads"))[1] == ("tensor", "context")
    assert seen == [PartitionSpec(("data", "fsdp"), ("tensor",))]


def test_extra_leaves_have_a_table_of_their_own():
    """A table is strict against its own leaves, and is not consulted when there are none."""
    mesh = make_mesh(fsdp=4, tensor=2)
    branch = {"branch": {"classifier": {"up": {"kernel": jnp.zeros((8, 8))}}}}
    with pytest.raises(UserError, match=r"branch.*matches nothing"):
        shardings(branch, mesh)
    assert shardings(tiny(), mesh)["head/kernel"].spec == PartitionSpec("tensor", "fsdp")


def test_every_process_reads_the_rows_of_its_devices():
    mesh = make_mesh(data=2, fsdp=2, context=2)
    assert batch_rows(mesh, 8) == list(range(8))  # one process has all devices
    with pytest.raises(UserError, match=r"data.batch_size=6 must divide by .* = 4"):
        batch_rows(mesh, 6)
    rows = np.arange(16.0).reshape(8, 2)
    placed = place_rows(range(8), rows, mesh, 8)
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == batch_sharding(mesh) and placed.addressable_shards[0].data.shape == (2, 2)
