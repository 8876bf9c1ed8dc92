"""Every stage on every mesh: loss and gradients are the single device's, and arrays on a mesh are really sharded."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cfjax.core.sharding import (
    batch_sharding,
    constrain_parameters,
    make_mesh,
    on_mesh,
    place,
    replicated,
    shard_model,
    shardings,
)
from cfjax.core.tree import map_named, named_leaves
from cfjax.memory.codecs import Codec
from cfjax.memory.policies import EmaSink
from cfjax.models.wan import Wan, WanConfig
from cfjax.nn.visibility import Blocks
from cfjax.objectives.consistency import ConsistencyConfig, consistency
from cfjax.objectives.diffusion import DiffusionConfig, ar_diffusion, flow_matching
from cfjax.objectives.dmd import DMDConfig, critic_loss, generator_loss
from cfjax.objectives.ode_regression import PairsConfig, ode_regression
from cfjax.objectives.stage import Ema, Stage
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.rollout.streaming import Streaming, empty_rollout
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.placement import place_state, placement_of, rollout_shardings
from cfjax.training.state import init_state
from cfjax.training.step import has_batch_axis, make_update
from tests.tiny import normal

BLOCKS = Blocks(2)
DMD = DMDConfig(SelfForcing((1.0, 0.6), kv_gradient="straight_through"))
SAVING = DMDConfig(SelfForcing((1.0, 0.6), kv_gradient="straight_through", save_activations=True))
# The losses of a stage; both of DMD's draw the same numbers here, so that the self-rollout is compiled once.
STAGES = {
    "bidirectional": {"student": flow_matching(DiffusionConfig())},
    "ar_diffusion": {"student": ar_diffusion(DiffusionConfig(text_dropout=0.5), BLOCKS)},
    "ode_regression": {"student": ode_regression(PairsConfig(steps=(1000, 500)), BLOCKS)},
    "consistency": {"student": consistency(ConsistencyConfig(solver_steps=4), BLOCKS)},
    "dmd": {"student": generator_loss(DMD, BLOCKS), "critic": critic_loss(DMD, BLOCKS)},
    "dmd_saving": {"student": generator_loss(SAVING, BLOCKS)},
}
# Four blocks of a frame, of which one has left the window, and is in the sink, before the last.
REMEMBERING = Blocks(1, memory=EmaSink(3, 1, alpha=0.8))
WITH_MEMORY = {"dmd_memory": {"student": generator_loss(DMDConfig(SelfForcing((1.0, 0.6))), REMEMBERING)}}
LOSSES = {**STAGES, **WITH_MEMORY}
# Eight heads divide by every axis: self-attention by heads. Six do not: by tokens, keys gathered, caches cut by tokens.
MESHES = {
    "data": (8, {"data": 8}),
    "fsdp": (8, {"fsdp": 8}),
    "context": (8, {"context": 8}),
    "context_by_tokens": (6, {"context": 8}),
    "tensor": (8, {"tensor": 8}),
    "mixed": (8, {"data": 2, "context": 2, "tensor": 2}),
    "mixed_by_tokens": (6, {"fsdp": 2, "context": 2, "tensor": 2}),
}
SHAPE, TEXT, LENGTH = (8, 4, 4, 8, 4), 8, 2  # eight tokens per frame


def config(heads: int) -> WanConfig:
    return WanConfig(
        dim=8 * heads, ffn_dim=32, num_heads=heads, num_layers=2, in_dim=4, out_dim=4, text_dim=TEXT, freq_dim=16
    )


@cache
def models(heads: int):
    """Every weight random, by numpy: nothing to compile."""
    template, rng = jax.eval_shape(lambda key: Wan(config(heads), key), jax.random.key(0)), np.random.default_rng(0)

    def leaf(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        spread = like.shape[-2] ** -0.5 if name.endswith("kernel") else 0.2
        return jnp.asarray(rng.normal(float(name.endswith("scale")), spread, like.shape).astype(np.float32))

    names = ("student", "critic", "real_score", "teacher", "student_ema")
    return {name: map_named(leaf, template) for name in names}


@cache
def batch():
    return {
        "latents_BFHWC": normal(1, SHAPE),
        "text_BSE": normal(2, (SHAPE[0], LENGTH, TEXT)),
        "negative_text_SE": normal(3, (LENGTH, TEXT)),
        "trajectory_BJFHWC": normal(4, (SHAPE[0], 3, *SHAPE[1:])),
    }


def on(mesh, models, batch, key):
    """Everything of a loss, placed."""
    where = {name: batch_sharding(mesh) if has_batch_axis(name) else replicated(mesh) for name in batch}
    return (
        {name: shard_model(model, mesh) for name, model in models.items()},
        {name: place(leaf, where[name]) for name, leaf in batch.items()},
        place(key, replicated(mesh)),
    )


@partial(jax.jit, static_argnames="stage")
def value_and_grad(stage, models, batch, key):
    def of(role):
        loss = LOSSES[stage][role]
        value, grads = jax.value_and_grad(lambda own: loss({**models, role: own}, batch, key)[0])(models[role])
        return value, constrain_parameters(grads)

    return {role: of(role) for role in LOSSES[stage]}


@cache
def alone(stage: str, heads: int):
    return jax.device_get(value_and_grad(stage, models(heads), batch(), jax.random.key(7)))


def compare(stage: str, name: str, capfd) -> None:
    """Raises unless loss and gradients are those of one device, and cut as the tables say."""
    heads, sizes = MESHES[name]
    mesh = make_mesh(**sizes)
    with on_mesh(mesh):
        got = value_and_grad(stage, *on(mesh, models(heads), batch(), jax.random.key(7)))
    printed = [line for line in capfd.readouterr().err.splitlines() if "Involuntary full rematerialization" in line]
    assert not [line for line in printed if "while/body" in line], "XLA replicates an activation of the layers"
    for role, (expected_loss, expected) in alone(stage, heads).items():
        loss, grads = got[role]
        errors, where = {}, shardings(models(heads)[role], mesh)
        for leaf, grad in named_leaves(grads).items():
            wanted = named_leaves(expected)[leaf]
            errors[leaf] = float(np.linalg.norm(np.asarray(grad) - wanted) / np.linalg.norm(wanted))
            assert grad.sharding.is_equivalent_to(where[leaf], grad.ndim), leaf
        worst = max(errors, key=errors.__getitem__)
        off = float(abs(loss / expected_loss - 1))
        with capfd.disabled():
            print(f"{stage} {role} on {name}: loss {off:.1e}, worst gradient {errors[worst]:.1e} ({worst})")
        assert off < 1e-5 and errors[worst] < 1e-5, errors


def test_loss_and_gradients_do_not_depend_on_the_mesh(capfd):
    compare("ar_diffusion", "mixed", capfd)


@pytest.mark.slow
def test_a_memory_policy_on_a_mesh(capfd):
    """Batch over fsdp, tokens over context, heads over tensor; the keys that are remembered are cut by tokens too."""
    compare("dmd_memory", "mixed_by_tokens", capfd)


# A rollout is the longest to compile: meshes that have every axis between them, with attention by heads and by tokens.
WITH_ROLLOUT = ("fsdp", "context_by_tokens", "mixed", "mixed_by_tokens")
CASES = [(stage, mesh) for stage in STAGES for mesh in (WITH_ROLLOUT if stage.startswith("dmd") else MESHES)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "mesh"), CASES)
def test_every_stage_on_every_mesh(stage, mesh, capfd):
    compare(stage, mesh, capfd)


@pytest.mark.parametrize(
    ("name", "tokens", "heads"), [("mixed", None, ("tensor", "context")), ("mixed_by_tokens", "context", "tensor")]
)
def test_a_rollout_that_goes_on_is_cut_as_its_cache(name, tokens, heads):
    """Rows over data and fsdp; keys, their codes and scales by heads or by tokens; what is small on every device."""
    network, mesh = config(MESHES[name][0]), make_mesh(**MESHES[name][1])
    blocks = Blocks(1, memory=EmaSink(3, 1, Codec("int8")))
    make = partial(empty_rollout, network, SHAPE, (SHAPE[0], LENGTH, TEXT), Streaming(3, 8, 1), blocks)
    where = rollout_shardings(jax.eval_shape(make), mesh)
    placed = jax.jit(make, out_shardings=where)()
    rows = ("data", "fsdp")
    assert placed.memory.k.codes.sharding.spec == PartitionSpec(None, rows, None, tokens, heads, None)
    assert placed.latents_BFHWC.sharding.spec[0] == placed.text_BSE.sharding.spec[0] == rows
    assert placed.memory.frame_F.sharding.is_fully_replicated and placed.length.sharding.is_fully_replicated


def test_nothing_of_a_state_is_replicated_by_accident():
    """Weights, moments and averages are sharded by the tables, before an update and after it."""
    heads, sizes = MESHES["mixed_by_tokens"]
    mesh = make_mesh(**sizes)
    stage = Stage("bidirectional", STAGES["bidirectional"], ema={"student": Ema()})
    txs = {"student": make_optimizer(OptimizerConfig(lr=1e-3), steps=10)}
    with on_mesh(mesh):
        given, placed_batch, _ = on(mesh, {"student": models(heads)["student"]}, batch(), jax.random.key(0))
        before = place_state(init_state(stage, given, txs, 0), mesh)
        after, metrics = make_update(stage, "student", txs["student"], placement=placement_of(before))(
            before, {}, placed_batch
        )
    assert bool(metrics["finite"])
    cuts = shardings(models(heads)["student"], mesh)
    for state in (before, after):
        for name, leaf in named_leaves(state).items():
            own = next((sharding for weight, sharding in cuts.items() if name.endswith(f"/{weight}")), replicated(mesh))
            assert leaf.sharding.is_equivalent_to(own, leaf.ndim), (name, leaf.sharding)
            if name.endswith("kernel"):
                assert 4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size, name
