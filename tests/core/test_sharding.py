"""The same loss and gradients on one device and on a mesh, and a clear word about meshes and rules that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cfjax.core.errors import UserError
from cfjax.core.sharding import WAN_RULES, batch_sharding, make_mesh, replicated, shard_model, shardings
from cfjax.core.tree import named_leaves
from cfjax.nn.visibility import Blocks
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion
from tests.tiny import CONFIG, SHAPE, TEXT_LEN, normal, tiny


def test_loss_and_gradients_do_not_depend_on_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    loss = ar_diffusion(DiffusionConfig(text_dropout=0.5), Blocks(2))
    value_and_grad = jax.jit(jax.value_and_grad(lambda model, batch, key: loss({"student": model}, batch, key)[0]))
    batch = {
        "latents_BFHWC": normal(1, (4, *SHAPE[1:])),
        "text_BSE": normal(2, (4, TEXT_LEN, CONFIG.text_dim)),
        "negative_text_SE": normal(3, (TEXT_LEN, CONFIG.text_dim)),
    }
    place = {
        "latents_BFHWC": batch_sharding(mesh),
        "text_BSE": batch_sharding(mesh),
        "negative_text_SE": replicated(mesh),
    }
    key = jax.random.key(7)

    one_loss, one_grads = value_and_grad(tiny(), batch, key)
    mesh_loss, mesh_grads = value_and_grad(
        shard_model(tiny(), mesh), jax.device_put(batch, place), jax.device_put(key, replicated(mesh))
    )
    assert len(mesh_loss.devices()) == 8
    np.testing.assert_allclose(mesh_loss, one_loss, rtol=1e-5)
    errors = {}
    for name, expected in named_leaves(one_grads).items():
        got = np.asarray(named_leaves(mesh_grads)[name])
        errors[name] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    print(f"loss {abs(mesh_loss / one_loss - 1):.1e}, worst gradient {max(errors.values()):.1e}")
    assert max(errors.values()) < 1e-5, errors


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
    with pytest.raises(UserError, match=r"data=3 fsdp=1 context=1 tensor=2 has 6 places; .* 8 devices"):
        make_mesh(data=3, tensor=2)
    with pytest.raises(UserError, match="has 0 places"):
        make_mesh(data=0)
    mesh = make_mesh(data=8)
    with pytest.raises(UserError, match="no rule matches 'extra'"):
        shardings({"extra": jnp.zeros(3)}, mesh, [("kernel", ())])
    with pytest.raises(UserError, match="matches nothing"):
        shardings(tiny(), mesh, (("lora/.*", ()), *WAN_RULES))
    with pytest.raises(UserError, match="has 2 entries"):
        shardings({"kernel": jnp.zeros((2, 4, 8))}, mesh, [("kernel", ("fsdp", "tensor"))])
