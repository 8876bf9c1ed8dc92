"""Adapters beside a frozen network: where they start, what they compute, and their gradients, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cfjax.core.errors import UserError
from cfjax.core.lazy import as_lazy
from cfjax.core.sharding import make_mesh, shardings
from cfjax.core.tree import map_named, named_leaves
from cfjax.models.lora import Lora, LoraConfig, abstract_lora, attach, make_lora, merged, merged_arrays
from cfjax.models.wan import Wan, embed_text, preset
from cfjax.models.weight_storage import fill, with_storage_dtypes
from cfjax.training.memory import count_weights
from tests.tiny import BATCH, CONFIG, FRAMES, normal, relative, text, tiny

SETTINGS = LoraConfig(rank=4, alpha=6.0, targets="all")


def adapters(settings: LoraConfig = SETTINGS) -> Lora:
    """With both halves random."""
    template, rng = abstract_lora(CONFIG, settings), np.random.default_rng(0)
    return map_named(lambda _, x: jnp.asarray(rng.normal(0, 0.3, x.shape).astype(np.float32)), template)


@jax.jit
def flow(model: Wan) -> jax.Array:
    return model(normal(1), jnp.full((BATCH, FRAMES), 0.4), embed_text(model, text()))


def loss(model: Wan) -> jax.Array:
    return jnp.mean(jnp.square(flow(model) - normal(2)))


def test_it_starts_as_the_frozen_network():
    start = make_lora(CONFIG, SETTINGS, jax.random.key(0))
    np.testing.assert_array_equal(flow(attach(tiny(), start)), flow(tiny()))
    named = named_leaves(start)
    assert all(not np.any(x) for name, x in named.items() if name.endswith("/up"))
    down = np.asarray(named["lora/blocks/ffn/down/down"])  # [L, in, rank] of in = 32
    assert down.shape == (2, 32, 4) and 0.9 * 32**-0.5 < abs(down).max() <= 32**-0.5


def test_apart_is_merged():
    lora = adapters()
    together = merged(tiny(), lora)
    error = relative(flow(attach(tiny(), lora)), flow(together))
    print(f"apart vs merged, float32: {error:.1e}")
    assert error < 1e-5 < 0.1 < relative(flow(tiny()), flow(together))
    host = merged_arrays(as_lazy(named_leaves(tiny())), as_lazy(named_leaves(lora)), SETTINGS.factor)
    for name, x in named_leaves(together).items():
        np.testing.assert_allclose(host[name].read(), x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_gradient_is_the_dense_one_projected():
    """dL/dA = s G B^T and dL/dB = s A^T G, where G is the gradient of the whole kernel at W + s A B."""
    lora, frozen = adapters(), tiny()
    own = named_leaves(jax.jit(jax.grad(lambda pair: loss(attach(frozen, pair))))(lora))
    dense = named_leaves(jax.jit(jax.grad(loss))(merged(frozen, lora)))
    errors, s = [], SETTINGS.factor
    for layer, pair in lora.lora.items():
        whole, (down, up) = dense[f"{layer}/kernel"], (pair[half].swapaxes(-1, -2) for half in ("down", "up"))
        for half, expected in (("down", s * whole @ up), ("up", s * down @ whole)):
            apart = own[f"lora/{layer}/{half}"] - expected
            errors.append(float(jnp.linalg.norm(apart) / jnp.linalg.norm(expected)))
    print(f"gradient vs the projected dense one, worst by norm: {max(errors):.1e}")
    assert len(errors) == 2 * 16 and max(errors) < 1e-4
    assert set(own) == set(named_leaves(lora))  # none of the frozen weights has one


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_the_frozen_network_may_be_stored_in_less(storage):
    """The same sum as beside the float32 kernels that are stored so."""
    template = jax.eval_shape(lambda: tiny())
    stored = fill(with_storage_dtypes(template, storage, "float32"), as_lazy(named_leaves(tiny())))
    lora = adapters(LoraConfig(4, 6.0, "blocks"))
    change = flow(attach(stored, lora)) - flow(stored)
    error = relative(change, flow(attach(tiny(), lora)) - flow(tiny()))
    print(f"the change by the adapters, below them {storage}: {error:.1e}")
    assert error < (0.1 if storage == "int8" else 0.05)


def test_shards_follow_the_kernels():
    """The rank is on every device; the other axis is where the kernel's is."""
    mesh = make_mesh(fsdp=4, tensor=2)
    of = {name: x.spec for name, x in shardings(abstract_lora(CONFIG, SETTINGS), mesh).items()}
    assert of["lora/blocks/self_attn/q/down"] == PartitionSpec(None, "fsdp", None)
    assert of["lora/blocks/self_attn/q/up"] == PartitionSpec(None, None, "tensor")
    assert of["lora/blocks/ffn/down/down"] == PartitionSpec(None, "tensor", None)
    assert of["lora/blocks/ffn/down/up"] == PartitionSpec(None, None, "fsdp")
    assert of["lora/head/down"] == PartitionSpec("tensor", None) and of["lora/head/up"] == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(("targets", "layers"), [("attention", 8), ("blocks", 10), ("all", 16)])
def test_targets(targets, layers):
    """LongLive's: rank 256 in every linear layer of the blocks of Wan 1.3B."""
    config = preset("wan_1_3b")
    lora = abstract_lora(config, LoraConfig(256, 256.0, targets))
    assert len(lora.lora) == layers
    if targets == "blocks":
        assert count_weights(lora) == 30 * 256 * (8 * 2 * 1536 + 2 * (1536 + 8960))


def test_mistakes():
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": "everything"}):
        with pytest.raises(UserError, match=f"^lora.{next(iter(wrong))}="):
            LoraConfig(**{"rank": 4, "alpha": 4.0, **wrong})
    arrays, lora = as_lazy(named_leaves(tiny())), as_lazy(named_leaves(adapters()))
    other = {name: x for name, x in lora.items() if name != "lora/head/up"}
    with pytest.raises(UserError, match=r"lora/head: .* half of the pair is missing"):
        merged_arrays(arrays, other, 1.0)
    wide = as_lazy({"lora/head/down": np.zeros((24, 4)), "lora/head/up": np.zeros((4, 8))})
    with pytest.raises(UserError, match=r"lora/head: .* do not fit head/kernel"):
        merged_arrays(arrays, wide, 1.0)
