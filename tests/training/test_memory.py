"""Memory per role, from shapes: the shipped sizes without an allocation, and small ones against real arrays."""

import jax
import pytest
from jax.sharding import AbstractMesh

from cfjax.core.errors import UserError
from cfjax.core.sharding import AXES, make_mesh
from cfjax.core.tree import named_leaves
from cfjax.experiment.build import build
from cfjax.experiment.data import Shapes
from cfjax.experiment.programs import stage_memory
from cfjax.training.memory import (
    GIB,
    abstract_state,
    check_memory,
    device_bytes,
    memory_table,
    needed_bytes,
)
from cfjax.training.placement import place_state
from cfjax.training.state import init_state
from configs import dmd

WAN, TOY = Shapes((21, 60, 104, 16), (512, 4096)), Shapes((12, 4, 4, 16), (8, 64))
# Parameters of the released checkpoints, counted from their shapes: 1,418,996,800 and 14,288,491,584.
WAN_1_3B, WAN_14B = 1_418_996_800, 14_288_491_584


def full_size(storage: str = "bfloat16", *, offload: bool = False, mesh=None, **optim):
    c = dmd.get_config()
    c.roles.real_score.update({"storage": storage, "offload": offload})
    c.optim.student.update(optim)
    return {row.role: row for row in stage_memory(build(c), WAN, mesh)}


def fsdp(size: int) -> AbstractMesh:
    return AbstractMesh((1, size, 1, 1), AXES)


def test_the_shipped_dmd_with_its_14b_real_score():
    """Adam's two moments, gradient and average in float32; a frozen role has none of them."""
    rows = full_size()
    student, critic, real = rows["student"], rows["critic"], rows["real_score"]
    assert (student.parameters, critic.parameters, real.parameters) == (WAN_1_3B, WAN_1_3B, WAN_14B)
    assert student.weights == student.gradients == student.ema == 4 * WAN_1_3B
    assert (critic.ema, real.gradients, real.optimizer, real.ema, real.host) == (0, 0, 0, 0, 0)
    assert student.optimizer == pytest.approx(8 * WAN_1_3B, rel=1e-8)
    assert (student.stored, real.stored) == ("float32", "bfloat16")
    assert 2 * WAN_14B < real.weights < 2.05 * WAN_14B
    assert needed_bytes(list(rows.values())) == sum(row.persistent for row in rows.values()) + student.gradients
    assert full_size(accumulate=2)["student"].gradients == 2 * student.gradients


def test_int8_offloading_and_a_mesh_save_what_they_promise():
    plain, int8, away = full_size(), full_size("int8"), full_size("int8", offload=True)
    assert int8["real_score"].weights < 0.52 * plain["real_score"].weights
    assert (away["real_score"].weights + away["real_score"].host) == int8["real_score"].weights
    assert away["real_score"].weights < 0.002 * int8["real_score"].weights
    assert [away[role] == plain[role] for role in ("student", "critic")] == [True, True]
    for role, row in full_size(mesh=fsdp(8)).items():
        assert row.weights < 1.01 * plain[role].weights / 8, role  # biases and norms are on every device
        assert row.optimizer <= 1.01 * plain[role].optimizer / 8, role


def test_the_table_says_it_and_too_much_is_refused():
    rows = list(full_size().values())
    lines = memory_table(rows)
    print("\n".join(lines))
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    assert "14,288.49 M" in lines[2] and "bfloat16" in lines[2] and "26.96" in lines[2]
    check_memory(rows, None)
    check_memory(rows, needed_bytes(rows))
    with pytest.raises(
        UserError, match=r"hold 69.\d GiB per device, which has 16.0 GiB; .*mesh.fsdp, or set roles.real"
    ):
        check_memory(rows, 16 * GIB)


def toy(mesh_sizes: dict[str, int]):
    """DMD on the toy's networks, with their real arrays on a mesh."""
    c, mesh = dmd.get_config("toy"), make_mesh(**mesh_sizes)
    for role in c.roles.values():
        role.init = ""
    c.roles.real_score.update({"storage": "int8", "offload": True})
    e = build(c)
    models = {name: role.initial(TOY, 0, mesh) for name, role in e.roles.items()}
    state = init_state(e.stage, {role: models[role] for role in e.stage.losses}, e.optimizers, 0)
    rows = {row.role: row for row in stage_memory(e, TOY, mesh)}
    return e.stage, e.optimizers, models, place_state(state, mesh), rows, mesh


def held(tree) -> int:
    """Bytes of real arrays on the first device, or in its host's memory."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves if leaf.sharding.memory_kind == "device")


def test_the_reported_memory_is_the_real_one():
    """Bytes and shardings of the abstract state are the real one's, those of optimiser and average too."""
    stage, txs, models, state, rows, mesh = toy({"data": 1, "fsdp": 4, "context": 1, "tensor": 2})
    for role in stage.losses:
        assert rows[role].weights == held(state.params[role])
        assert rows[role].optimizer == held(state.opt[role])
    assert rows["student"].ema == held(state.ema["student"])
    real = rows["real_score"]
    assert real.weights == held(models["real_score"]) == device_bytes(models["real_score"])
    on_host = [leaf for leaf in jax.tree.leaves(models["real_score"]) if leaf.sharding.memory_kind == "pinned_host"]
    assert real.host == sum(leaf.addressable_shards[0].data.nbytes for leaf in on_host) > 2 * real.weights
    shapes = {role: jax.eval_shape(lambda x: x, models[role]) for role in stage.losses}
    abstract = named_leaves(abstract_state(stage, shapes, txs, mesh))
    for name, leaf in named_leaves(state).items():
        assert (abstract[name].shape, abstract[name].dtype) == (leaf.shape, leaf.dtype), name
        assert abstract[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name


def test_nothing_is_allocated():
    before = {id(x) for x in jax.live_arrays()}
    full_size(mesh=fsdp(16))
    assert sum(x.nbytes for x in jax.live_arrays() if id(x) not in before) < 1000


def test_a_trained_role_rests_in_float32_on_the_device():
    for key, value, said in (
        ("storage", "int8", r"roles.critic.storage='int8': critic is trained"),
        ("storage", "bfloat16", r"roles.critic.storage='bfloat16': critic is trained"),
        ("offload", True, r"roles.critic.offload=True: critic is trained"),
        ("storage", "int4", r"roles.critic.storage='int4': use one of float32, bfloat16, int8"),
    ):
        c = dmd.get_config("toy")
        c.roles.critic[key] = value
        with pytest.raises(UserError, match=said):
            build(c)
